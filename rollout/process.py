"""How vLLM's own process starts without a second import of vLLM, and how it ends together with its parent.

Start: vLLM spawns its engine-core process, which then imports vLLM again before it can do anything; on CPU this is half
of an engine's start. Here that process is forked from a fork server that has imported vLLM and done nothing else (no
Ray, no threads of its own). The server imports while the actor imports, and it forks again when an engine is replaced.

End: a killed actor cannot end its children, and vLLM's processes would keep their memory. So they watch their parent.
"""

import ctypes
import importlib
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from itertools import pairwise
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

PRELOADED = "rollout.preload"


def start_fork_server() -> None:
    """Start a fork server that imports vLLM. It inherits this process's environment, and ends with it."""
    multiprocessing.set_forkserver_preload([PRELOADED])
    forkserver.ensure_running()


def fork_from_server() -> None:
    """Make vLLM fork its process from the server; starts the server if needed. For CPU: on GPUs vLLM spawns."""
    start_fork_server()
    vllm_engine_utils: Any = importlib.import_module("vllm.v1.engine.utils")
    vllm_engine_utils.get_mp_context = lambda: multiprocessing.get_context("forkserver")


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

    def end_with_parent(self, forked: bool) -> None:
        """End this process when its parent has ended. `forked`: the parent is a fork server of one thread."""
        if forked:
            kill_with_parent()
        threading.Thread(target=exit_when_orphaned, args=(1,), daemon=True, name="exit when orphaned").start()


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
