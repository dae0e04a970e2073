"""An event loop that explores orders: what is ready runs in a seeded order, and time is a number that jumps."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any


class DeadlockError(AssertionError):
    """Everybody waits, and nothing will ever happen."""


class SeededLoop(asyncio.SelectorEventLoop):
    """Runs ready callbacks in random order. When none is left it calls `idle`, and jumps to the next timer."""

    def __init__(self, seed: int, idle: Callable[[], None] = lambda: None) -> None:
        self.random, self.now, self.idle = random.Random(seed), 0.0, idle
        super().__init__()

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if len(self._ready) > 1:
            ready = list(self._ready)
            self.random.shuffle(ready)
            self._ready = deque(ready)
        elif not self._ready:
            self.idle()
            timers = [timer for timer in self._scheduled if not timer.cancelled()]
            if not timers:
                raise DeadlockError(f"at {self.now:.1f} s everybody waits: {asyncio.all_tasks(self)}")
            self.now = max(self.now, min(timer.when() for timer in timers))
        super()._run_once()


def run_seeded(main: Coroutine[Any, Any, None], seed: int, idle: Callable[[], None] = lambda: None) -> None:
    """Run a coroutine under the orders of a seed."""
    with asyncio.Runner(loop_factory=lambda: SeededLoop(seed, idle)) as runner:
        runner.run(main)
