"""Does this process still work for anybody? One whose parents are gone ends itself, and what stands between."""

import ctypes
import os
import signal
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path


def end_with(generations: int) -> None:
    """Wait until the parent is gone, or the parent's parent, and so on; then end those below it, and this process."""
    line = [os.getpid()]
    for _ in range(generations):
        line.append(parent_of(line[-1]))
    while all(parent_of(child) == parent for child, parent in pairwise(line)):
        time.sleep(1.0)
    for between in line[1:-1]:
        with suppress(ProcessLookupError):
            os.kill(between, signal.SIGKILL)
    os._exit(1)


def die_with_parent() -> None:
    """Have the kernel end this process with the thread that forked it (Linux): also in its own exit, where Python's
    threads no longer run and gloo may wait for a peer that is gone."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def parent_of(pid: int) -> int:
    """A process's parent, 0 where there is no such process (Linux)."""
    try:
        # "pid (name) state parent ...", and a name may have blanks and brackets.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
