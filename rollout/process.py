"""How vLLM's processes end together with their parent.

A killed actor cannot end its children, and vLLM's processes would keep their memory. So they watch their parent.
"""

import ctypes
import os
import signal
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from psutil import NoSuchProcess


def exit_when_orphaned(generations: int) -> None:
    """Wait until an ancestor of the next `generations` ends. Then kill the processes between it and this one, and exit.

    `generations` is 1 to watch the parent, 2 to watch its parent too.
    """
    line = [os.getpid()]
    for _ in range(generations):
        line.append(parent_of(line[-1]))
    while all(parent_of(child) == parent for child, parent in pairwise(line)):
        time.sleep(1.0)
    for between in line[1:-1]:
        with suppress(ProcessLookupError):
            os.kill(between, signal.SIGKILL)
    os._exit(1)


class FrozenWorker:
    """Methods that vLLM adds to the worker class of an engine whose weights never change."""

    def end_with_parent(self) -> None:
        """End this process when its parent has ended."""
        threading.Thread(target=exit_when_orphaned, args=(1,), daemon=True, name="exit when orphaned").start()


def end_vllm(llm: Any) -> None:
    """End the processes of an `AsyncLLM`. They hold no state to save, so they get 1 s; vLLM would take several.

    vLLM kills a process that has ended by itself a moment before, and then leaves its sockets open. Python would wait
    for them for ever at the next garbage collection.
    """
    try:
        llm.shutdown(timeout=1.0)
    except NoSuchProcess:
        llm.engine_core.resources()


def kill_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that forked it ends (Linux).

    This also works while Python shuts down. Its threads no longer run then, and gloo may wait for an ended peer.
    """
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def parent_of(pid: int) -> int:
    """The parent of a process, 0 if there is no such process (Linux)."""
    try:
        # "pid (name) state parent ...", and a name may contain blanks and brackets.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
