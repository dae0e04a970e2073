"""A cable between two network namespaces that delays and loses packets. It needs no module of the kernel but tun.

    python tests/support/link.py PID-A PID-B --delay 0.05 --loss 0.05 --counts FILE

Each namespace (of a process) gets the interface eth0. Every packet arrives `--delay` seconds later, in each direction,
or is lost. FILE has what went through, once a second.
"""

import argparse
import fcntl
import json
import os
import random
import select
import struct
import subprocess
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 1500
AT_ONCE = 64
"""Packets that are read from one end before the other has its turn."""


def end(process: int, side: str) -> int:
    """The interface of one namespace; what is sent there is read here."""
    name = f"link-{os.getpid() % 10_000}{side}"
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    for words in (["mtu", str(MTU), "txqueuelen", "10000"], ["netns", str(process), "name", "eth0"]):
        subprocess.run(["ip", "link", "set", name, *words], check=True)
    return descriptor


def forward(ends: list[int], delay: float, loss: float, counts: Path) -> None:
    """Carry packets until this process ends."""
    draw, clock, poll = random.Random(0).random, time.monotonic, select.poll()
    for each in ends:
        poll.register(each, select.POLLIN)
    under_way: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    count, told = {"packets": 0, "lost": 0, "bytes": 0}, 0.0
    while True:
        due = min((queue[0][0] for queue in under_way if queue), default=None)
        poll.poll(1000 if due is None else max(0.0, 1000 * (due - clock())))
        now = clock()
        for here, queue in enumerate(under_way):
            # An interface that is not up yet cannot be read or written.
            with suppress(OSError):
                for _ in range(AT_ONCE):
                    packet = os.read(ends[here], 65536)
                    count["packets"] += 1
                    if draw() < loss:
                        count["lost"] += 1
                    else:
                        queue.append((now + delay, packet))
            while queue and queue[0][0] <= now:
                _, packet = queue.popleft()
                count["bytes"] += len(packet)
                with suppress(OSError):
                    os.write(ends[1 - here], packet)
        if now - told > 1:
            told = now
            counts.with_suffix(".new").write_text(json.dumps(count))
            os.replace(counts.with_suffix(".new"), counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processes", type=int, nargs=2)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--counts", type=Path, required=True)
    asked = parser.parse_args()
    sides = [end(process, side) for process, side in zip(asked.processes, "ab", strict=True)]
    forward(sides, asked.delay, asked.loss, asked.counts)
