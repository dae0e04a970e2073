"""Which ports does a cluster use on this node? One block below the ephemeral floor, claimed while it lives."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from trainer.node.processes import is_alive

SPAN = 400
"""Ports of a block."""
BASE = ("node-manager-port", "object-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
BASE += ("runtime-env-agent-port", "metrics-export-port", "ray-client-server-port", "dashboard-port")
"""Ray's ports, from the second of the block on; the first is the one that nodes and drivers connect to. The last two
are the head's alone, but a node that is not told them takes Ray's own, 10001 and 8265, and does not start where these
are in its block."""
WORKERS, OURS = (20, 319), (320, SPAN - 1)
"""In the block: ports of Ray's workers, and those of the learner's and the weight channel's meeting places."""
PORTS = "UNISON_PORTS"
"""The variable that gives OURS to the actors, as FIRST-LAST."""
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FOLDERS = Path("/tmp")
"""Where clusters have their folders: short, because the path of a socket has at most 107 bytes."""
NAME = "unison-ray-"
CLAIMING_S = 60.0
"""Seconds in which a claimed block must have an owner."""


def blocks() -> list[int]:
    """First ports of all blocks, the one of this job or user first. Raises ValueError where none fits."""
    floor = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    found = list(range(10_000 if floor >= 20_000 else 2_000, floor - SPAN + 1, SPAN))
    if not found:
        raise ValueError(f"the ephemeral ports begin at {floor}, so no {SPAN} ports are left below: give --port-base")
    first = int(os.environ.get("SLURM_JOB_ID", "") or os.getuid()) % len(found)
    return [*found[first:], *found[:first]]


def claim(base: int | None) -> Path:
    """The folder of a block that nobody uses, which is then this user's. Raises ValueError where there is none."""
    for first in blocks() if base is None else [base]:
        folder = FOLDERS / f"{NAME}{first}"
        if (folder.exists() and not _abandoned(folder)) or not _made(folder):
            continue
        if all(_is_free(first + offset) for offset in range(len(BASE) + 1)):
            return folder
        folder.rmdir()
    taken = f"the ports from {base} on are" if base is not None else "all blocks of ports are"
    raise ValueError(f"{taken} in use on this node (folders {FOLDERS}/{NAME}PORT): give another --port-base")


def ray_ports(base: int, *, head: bool) -> list[str]:
    """Ray's options for a block."""
    fixed = [f"--{name}={base + i}" for i, name in enumerate(BASE, 1)] + ([f"--port={base}"] if head else [])
    first, last = (base + offset for offset in WORKERS)
    return [*fixed, f"--min-worker-port={first}", f"--max-worker-port={last}"]


def listener(address: str = "") -> socket.socket:
    """A socket that listens on a free port of OURS, or of the system's choice where no cluster gave this node any.

    Raises OSError where none is free.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    first, _, last = os.environ.get(PORTS, "0-0").partition("-")
    for port in range(int(first), int(last) + 1):
        with suppress(OSError):
            return socket.create_server(("", port), family=family)
    raise OSError(f"no port of {first}-{last} is free on this node (the ports of the cluster: unison cluster)")


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _abandoned(folder: Path) -> bool:
    """Whether a folder of this user has no process any more; it is then removed."""
    with suppress(OSError):
        state = folder.stat()
        if state.st_uid != os.getuid() or is_alive(folder):
            return False
        if (folder / "id").exists() or time.time() - state.st_mtime > CLAIMING_S:
            shutil.rmtree(folder)
            return True
    return False


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def mine() -> Iterator[Path]:
    """The folders of this user's clusters on this node that are alive."""
    for folder in sorted(FOLDERS.glob(f"{NAME}[0-9]*")):
        with suppress(OSError):
            if folder.stat().st_uid == os.getuid() and (folder / "address").exists() and is_alive(folder):
                yield folder
