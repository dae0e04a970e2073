"""One node of a cluster: Ray's processes with one token, one address, one block of ports and one short folder."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.node import network, ports, processes
from trainer.node.token import with_token, write_token

STARTS = 2
"""Ray gives up after 30 s, which a node that is busy with other work may need."""
LOOK_S, LOOKS = 5.0, 3
"""A node that waits looks for the head so often, and leaves after so many looks in vain."""


@dataclass(frozen=True)
class Node:
    """This node's part of a cluster."""

    folder: Path

    @property
    def base(self) -> int:
        """First port of its block."""
        return int(self.folder.name.rpartition("-")[2])

    @property
    def token(self) -> Path:
        """File of the cluster's token."""
        return self.folder / "token"

    @property
    def head(self) -> str:
        """HOST:PORT that nodes and drivers connect to."""
        return (self.folder / "address").read_text()

    def end(self) -> int:
        """End this cluster's processes here, and remove its folder; returns how many processes there were."""
        count = processes.end(self.folder)
        shutil.rmtree(self.folder)
        return count


def job() -> str:
    """The attempt of SLURM's job that this process belongs to; "" outside of one."""
    number = os.environ.get("SLURM_JOB_ID", "")
    return f"{number}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if number else ""


def start(
    head: str | None,
    *,
    token: str | None,
    interface: str | None,
    base: int | None,
    options: list[str],
    check: Callable[[str, Path], object],
) -> Node:
    """Start a head, or join one; `check` gets its address and the token's file before anything starts.

    Raises ValueError, with the remedy, and leaves nothing then.
    """
    host, port = network.split(head) if head else (None, 0)
    if host and not network.answers(host, port):
        raise ValueError(f"nothing answers at {head}: is the head running, and may this node reach that port?")
    name, address = network.interface(interface, host)
    node = Node(ports.claim(base))
    (node.folder / "owner").write_text(str(os.getpid()))
    (node.folder / "id").write_text(secrets.token_hex(8))
    (node.folder / "job").write_text(job())
    try:
        write_token(node.token, token)
        if host:
            check(f"{host}:{port}", node.token)
        (node.folder / "address").write_text(f"{host}:{port}" if host else f"{address}:{node.base}")
        _start_ray(node, name, address, f"{host}:{port}" if host else None, options)
    except BaseException:
        node.end()
        raise
    return node


def _start_ray(node: Node, interface: str, address: str, head: str | None, options: list[str]) -> None:
    first, last = (node.base + offset for offset in ports.OURS)
    environment = with_token(dict(os.environ), node.token) | {
        processes.MARK: processes.mark_of(node.folder),
        ports.PORTS: f"{first}-{last}",
        # Ray's default of nice 15 starves its workers next to any other process.
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    for library in ("NCCL", "GLOO"):
        environment.setdefault(f"{library}_SOCKET_IFNAME", interface)
    command = [str(Path(sys.executable).with_name("ray")), "start", f"--node-ip-address={address}"]
    command += [f"--address={head}"] if head else ["--head", "--include-dashboard=false"]
    # A folder below: Ray lets everybody write to it.
    command += [
        f"--temp-dir={node.folder / 'r'}",
        "--disable-usage-stats",
        *ports.ray_ports(node.base, head=head is None),
    ]
    log = node.folder / "start.log"
    for _ in range(STARTS):
        with log.open("w") as output:
            # A session of its own: Ctrl-C in a terminal ends what waits here, which then ends Ray in order.
            done = subprocess.run(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        if not done.returncode:
            return
        processes.end(node.folder)
    raise ValueError("Ray did not start here: " + " | ".join(log.read_text().strip().splitlines()[-3:])[-600:])


def stay(node: Node) -> str:
    """Return, with the reason, at SIGTERM or Ctrl-C, when the head is gone, or when Ray ends here."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: asked.append(got))
    host, port = network.split(node.head)
    missed = 0
    while missed < LOOKS:
        until = time.monotonic() + LOOK_S
        while time.monotonic() < until:
            if asked:
                return f"{signal.Signals(asked[0]).name} was received"
            time.sleep(0.1)
        if not any("raylet" in process.name() for process in processes.processes(node.folder)):
            return "Ray ended on this node"
        missed = 0 if network.answers(host, port) else missed + 1
    return f"the head at {node.head} is gone"
