"""How long has a reward worked? Its own seconds, without those in which other rewards held the interpreter.

Python runs one thread at a time: of 64 rewards that compute for 1 s each, each takes 64 s of wall time. So the clock of
a call shows the wall time less what the other calls computed meanwhile, and at least the CPU time of its own work.
"""

import threading
import time
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

R = TypeVar("R")


class _Work:
    """CPU seconds of the work that is done between `begin` and `end`, of all calls together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[RewardClock, tuple[int, float]] = {}
        """For each call that computes now: the CPU clock of its thread, and what that showed at the beginning."""
        self._ended = 0.0

    def begin(self, call: "RewardClock") -> None:
        thread = time.pthread_getcpuclockid(threading.get_ident())
        with self._lock:
            self._running[call] = thread, time.clock_gettime(thread)

    def end(self, call: "RewardClock") -> None:
        with self._lock:
            seconds = _since(self._running.pop(call))
            self._ended += seconds
            call.ended += seconds

    def read(self, call: "RewardClock") -> tuple[float, float]:
        """CPU seconds of one call, and of all calls."""
        with self._lock:
            own = call.ended + (_since(self._running[call]) if call in self._running else 0.0)
            return own, self._ended + sum(map(_since, self._running.values()))


def _since(running: tuple[int, float]) -> float:
    thread, began = running
    return time.clock_gettime(thread) - began


_WORK = _Work()


class RewardClock:
    """The clock of one call, which begins when it is made."""

    def __init__(self) -> None:
        self.ended = 0.0
        """CPU seconds of the work that has ended."""
        _, self._all = _WORK.read(self)
        self._began = time.monotonic()

    def seconds(self) -> float:
        """Seconds that the call has worked, or has waited for something else than other rewards."""
        own, together = _WORK.read(self)
        others = together - self._all - own
        return max(own, time.monotonic() - self._began - others)

    @contextmanager
    def working(self) -> Iterator[None]:
        """What the calling thread does meanwhile is work of this call."""
        _WORK.begin(self)
        try:
            yield
        finally:
            _WORK.end(self)

    async def awaited(self, call: Coroutine[Any, Any, R]) -> R:
        """Await a coroutine, each step of which is work of this call."""
        return await _Steps(self, call)


class _Steps:
    """Takes the steps of a coroutine one by one."""

    def __init__(self, clock: RewardClock, call: Coroutine[Any, Any, Any]) -> None:
        self.clock, self.call = clock, call

    def __await__(self) -> Generator[Any, Any, Any]:
        step, value = self.call.send, None
        while True:
            try:
                with self.clock.working():
                    waits_for = step(value)
            except StopIteration as done:
                return done.value
            try:
                step, value = self.call.send, (yield waits_for)
            except BaseException as error:  # a cancellation is the coroutine's to handle
                step, value = self.call.throw, error
