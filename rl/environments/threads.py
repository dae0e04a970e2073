"""How does a method of an environment run, so that one that hangs holds up nobody but its own episode?

Methods that are not async run in a bounded pool of daemon threads: at exit Python would wait for any other kind. Async
methods share one event loop, which is not the driver's, so an episode that waits costs no thread.
"""

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any

from rl.environments.types import EnvError, EnvLate
from rl.judges.hearing import hear
from rl.judges.loops import awaited_on

ASYNC = "async environments"
"""The kind of event loop of their async methods."""
MOST_THREADS = 64
"""Calls that run at the same time: many tools wait for a sandbox or for a server."""
MOST_STUCK = 256
"""Threads whose call was given up and never returned. No thread can be ended from outside."""


class Threads:
    """A pool that grows to `most` threads. A thread whose call is late is given up, and another takes its place."""

    def __init__(self, most: int = MOST_THREADS) -> None:
        self.most = most
        self.running = self.stuck = 0
        """Threads of the pool, and those that were given up and still run."""
        self._idle = 0
        self._jobs: deque[_Job] = deque()
        self._ready = threading.Condition()

    async def run(self, work: Callable[[], Any], seconds: float, unwanted: Callable[[Any], None] | None = None) -> Any:
        """What `work` returns, awaited if it is a coroutine. Raises EnvLate when that takes longer than `seconds`,
        which count from when it begins and not while it waits for a judge, and EnvError when too many calls hang; else
        what it raises. A result that comes when the caller is late or cancelled is given to `unwanted`, in any thread;
        it must return at once."""
        with hear() as heard:
            job = _Job(work, unwanted or _ignore)
        self._put(job)
        try:
            while not job.done.done():
                left = seconds - (time.monotonic() - job.began if job.began else 0.0) + heard.waited()
                if left <= 0:
                    raise EnvLate(f"took longer than {seconds:g} s")
                # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
                await asyncio.wait({job.done}, timeout=max(left, 0.01))
            result, job.unwanted = job.done.result(), _ignore
            return result
        finally:
            self._leave(job)

    def _put(self, job: "_Job") -> None:
        with self._ready:
            if self.stuck >= MOST_STUCK:
                raise EnvError(f"{self.stuck} calls of the environment's methods hang: give its waits a time limit")
            self._jobs.append(job)
            self._staff()

    def _staff(self) -> None:
        """Have a thread for every job that waits, if there may be one. The lock is held."""
        if len(self._jobs) > self._idle and self.running < self.most:
            self.running += 1
            threading.Thread(target=self._work, daemon=True, name="environment").start()
        else:
            self._ready.notify()

    def _leave(self, job: "_Job") -> None:
        """Nobody waits for this job any more."""
        if not job.done.cancel() and job.done.exception() is None:
            job.unwanted(job.done.result())  # it came together with the cancellation
        with self._ready:
            job.left = True
            if job.waiting is not None:
                job.waiting.cancel()
            if job.in_thread:
                self.running, self.stuck = self.running - 1, self.stuck + 1
                if self._jobs:
                    self._staff()

    def _work(self) -> None:
        while job := self._next():
            result, error = None, None
            try:
                result = job.context.run(job.work)
            except BaseException as raised:
                error = raised
            with self._ready:
                job.in_thread = False
                if job.left:  # another thread has taken the place of this one
                    self.stuck -= 1
                    if inspect.iscoroutine(result):
                        result.close()
                    elif error is None:
                        job.unwanted(result)
                    return
                if inspect.isawaitable(result):
                    job.waiting = job.context.run(awaited_on, ASYNC, result)
                    job.waiting.add_done_callback(job.answered)
                    continue
            job.settle(result, error)

    def _next(self) -> "_Job":
        with self._ready:
            while True:
                while not self._jobs:
                    self._idle += 1
                    self._ready.wait()
                    self._idle -= 1
                job = self._jobs.popleft()
                if not job.left:
                    job.in_thread, job.began = True, time.monotonic()
                    return job


class _Job:
    def __init__(self, work: Callable[[], Any], unwanted: Callable[[Any], None]) -> None:
        self.work, self.unwanted = work, unwanted
        self.loop = asyncio.get_running_loop()
        self.context = copy_context()
        """Of who made it: so a judge knows whose call it answers."""
        self.done: asyncio.Future[Any] = self.loop.create_future()
        self.began = 0.0
        self.in_thread = self.left = False
        self.waiting: concurrent.futures.Future[Any] | None = None
        """The call of an async method."""

    def answered(self, future: concurrent.futures.Future[Any]) -> None:
        if future.cancelled():
            self.settle(None, EnvError("was cancelled by its own code"))
        else:
            error = future.exception()
            self.settle(None if error else future.result(), error)

    def settle(self, result: Any, error: BaseException | None) -> None:
        if error is not None and (not isinstance(error, Exception) or isinstance(error, StopIteration)):
            # On the driver, SystemExit would end the run and a cancellation the episode.
            own, error = error, EnvError(f"raised {type(error).__name__}: {error}")
            error.__cause__ = own
        with suppress(RuntimeError):  # the run has ended, and its event loop is closed
            self.loop.call_soon_threadsafe(self._set, result, error)

    def _set(self, result: Any, error: BaseException | None) -> None:
        if self.done.done():
            if error is None:
                self.unwanted(result)
            return
        if error is None:
            self.done.set_result(result)
        else:
            self.done.set_exception(error)


def aside(work: Callable[[], Any]) -> None:
    """Do work whose result and errors concern nobody, in a thread of its own."""

    def run() -> None:
        with suppress(Exception):  # the environment's own, of an episode that has ended
            result = work()
            if inspect.isawaitable(result):
                awaited_on(ASYNC, result)

    threading.Thread(target=run, daemon=True, name="end of an environment").start()


def _ignore(result: Any) -> None:
    pass
