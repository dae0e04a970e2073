"""Which processes does a cluster have on this node? Those that inherited its mark, and no others."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "UNISON_CLUSTER"
"""The variable that every process of a cluster inherits."""
GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""


def mark_of(folder: Path) -> str:
    """The mark of a cluster's processes. The id keeps apart nodes that see each other's processes."""
    return f"{folder}:{(folder / 'id').read_text()}"


def processes(folder: Path) -> Iterator[psutil.Process]:
    """All processes of a cluster on this node, but this one."""
    wanted = f"{MARK}={mark_of(folder)}".encode()
    for pid in psutil.pids():
        # Of other users, and of processes that end meanwhile, nothing can be read.
        with suppress(OSError, psutil.NoSuchProcess):
            if pid != os.getpid() and wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                yield psutil.Process(pid)


def is_alive(folder: Path) -> bool:
    """Whether a cluster has a process here, or is being started."""
    try:
        owner = int((folder / "owner").read_text())
        return psutil.pid_exists(owner) or next(processes(folder), None) is not None
    except (FileNotFoundError, ValueError):
        return False


def has_engines(folder: Path) -> bool:
    """Whether a run has an engine on this node."""
    for process in processes(folder):
        with suppress(psutil.Error):  # it has ended
            if "ray::EngineActor" in " ".join(process.cmdline()):
                return True
    return False


def end(folder: Path) -> int:
    """End all processes of a cluster on this node; returns how many there were."""
    found = list(processes(folder))
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, late = psutil.wait_procs(found, GRACE_S)
    for process in late:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    # What was started in between, such as a worker of a raylet that was still alive.
    for process in processes(folder):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return len(found)
