"""When an actor is killed, its vLLM processes end too."""

import os
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from rollout.process import parent_of

WORKER = (
    "from rollout.process import exit_when_orphaned; print(__import__('os').getpid(), flush=True); "
    "exit_when_orphaned({n})"
)
START = "import subprocess, sys, os; print(os.getpid(), flush=True); subprocess.run([sys.executable, '-c', {code!r}])"


def gone(pid: int, within_s: float = 120) -> bool:
    deadline = time.monotonic() + within_s
    while parent_of(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not parent_of(pid)


@pytest.mark.slow
@pytest.mark.parametrize("generations", [1, 2])
def test_killing_the_actor_ends_its_children_and_grandchildren(generations: int) -> None:
    code = WORKER.format(n=generations)
    for _ in range(generations):
        code = START.format(code=code)
    actor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert actor.stdout
    with actor.stdout:
        line = [int(actor.stdout.readline()) for _ in range(generations + 1)]
        assert line[0] == actor.pid
        try:
            time.sleep(1.2)
            assert all(parent_of(child) == parent for parent, child in pairwise(line))
            actor.kill()
            actor.wait()
            assert all(gone(pid) for pid in line[1:])
        finally:
            for pid in line[1:]:
                if parent_of(pid):
                    os.kill(pid, 9)


@pytest.mark.slow
def test_a_process_that_hangs_in_its_exit_is_killed_with_its_parent() -> None:
    code = "from rollout.process import kill_with_parent; import os, signal; kill_with_parent(); " + (
        "signal.pthread_sigmask(signal.SIG_BLOCK, {15}); print(os.getpid(), flush=True); signal.pause()"
    )
    actor = subprocess.Popen([sys.executable, "-c", START.format(code=code)], stdout=subprocess.PIPE, text=True)
    assert actor.stdout
    with actor.stdout:
        _, child = int(actor.stdout.readline()), int(actor.stdout.readline())
        actor.kill()
        actor.wait()
        assert gone(child)


def test_a_process_that_has_ended_has_no_parent() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert parent_of(ended.pid) == 0
    assert parent_of(os.getpid()) == os.getppid()
