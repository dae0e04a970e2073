"""The processes of a run: which are left behind, and a way to kill one."""

import time
from collections.abc import Iterator

import psutil


def marked(mark: str) -> Iterator[tuple[psutil.Process, str]]:
    """Live processes that carry the mark, and their command lines."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("UNISON_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process, " ".join(process.cmdline())[:120]
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue


def assert_gone(mark: str, within_s: float = 300) -> None:
    """No process that carries the mark lives on; Ray's own agents take seconds to see that their raylet has ended."""
    deadline = time.monotonic() + within_s
    while (left := [command for _, command in marked(mark)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def kill_one(mark: str, name: str) -> None:
    """Kill -9 a process whose command line begins with `name`."""
    next(process for process, command in marked(mark) if command.startswith(name)).kill()
