"""How long has a reward worked? Its own seconds, without those in which other rewards held the interpreter.

Python runs one thread at a time: of 64 rewards that compute for 1 s each, each takes 64 s of wall time. So the clock of
a call shows the wall time less what the other calls computed meanwhile, and at least its own work.
"""

import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")
STALE_S = 0.25
"""Seconds after which the sum over all calls is taken anew for a call that begins; it reads a file per thread."""


class _Thread:
    """Seconds that a thread has computed or was ready to, as on a machine with other processes than ours."""

    def __init__(self) -> None:
        """Of the calling thread."""
        self._cpu = time.pthread_getcpuclockid(threading.get_ident())
        self._file = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")

    def seconds(self) -> float:
        try:
            computed, waited, _ = map(int, self._file.read_text().split())
        except (OSError, ValueError):
            computed = waited = 0
        # A kernel may keep no statistics; then only CPU time counts.
        return (computed + waited) / 1e9 if computed else time.clock_gettime(self._cpu)


class _Work:
    """What all calls have computed, together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[RewardClock, tuple[_Thread, float]] = {}
        """For each call that computes now: its thread, and what that showed at the beginning."""
        self._ended = 0.0
        self._sum, self._summed = 0.0, -STALE_S

    def begin(self, call: "RewardClock") -> None:
        thread = _Thread()
        with self._lock:
            self._running[call] = thread, thread.seconds()

    def end(self, call: "RewardClock") -> None:
        with self._lock:
            seconds = _since(self._running.pop(call))
            self._ended += seconds
            call.ended += seconds

    def recent(self) -> float:
        """Seconds of all calls, as of now or a moment ago."""
        with self._lock:
            if time.monotonic() - self._summed >= STALE_S:
                self._sum, self._summed = self._total(), time.monotonic()
            return self._sum

    def read(self, call: "RewardClock") -> tuple[float, float]:
        """Seconds of one call, and of all calls."""
        with self._lock:
            own = call.ended + (_since(self._running[call]) if call in self._running else 0.0)
            return own, self._total()

    def _total(self) -> float:
        return self._ended + sum(map(_since, self._running.values()))


def _since(running: tuple[_Thread, float]) -> float:
    thread, began = running
    return thread.seconds() - began


_WORK = _Work()


class RewardClock:
    """The clock of one call, which begins when it is made."""

    def __init__(self) -> None:
        self.ended = 0.0
        """Seconds of this call's work that has ended."""
        self._all, self._began = _WORK.recent(), time.monotonic()

    def seconds(self) -> float:
        """Seconds that the call has worked, or has waited for something else than other rewards."""
        own, together = _WORK.read(self)
        return max(own, time.monotonic() - self._began - (together - self._all - own))

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
        step: Callable[..., Any] = self.call.send
        value = None
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
