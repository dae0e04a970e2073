"""How can a tracker fail without harm? Its calls run in a thread of their own, and no step waits for them."""

import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Thread

from rl.typed import shortened
from trainer.tracking.backend import About, Backend

Call = Callable[[Backend], str | None]
MOST_WAITING = 1000
"""Calls that wait for a slow tracker; later ones are left out."""
SLOW_S = 30.0
"""Seconds after which a call that has not returned is reported."""
CALL_S = 0.8
"""Seconds that the end of a run waits for one call of `log`, `table` or `alert`, or as long as the longest call so far
took: a busy machine is slow, and not hung."""


class Guard:
    """One tracker. What it raises, or a call that does not return, is one problem; the run continues without it."""

    def __init__(self, name: str, make: Callable[[], Backend], about: About, go: Event | None = None) -> None:
        """It begins when `go` is set; without one at once."""
        self.name, self.end_s = name, about.config.end_s
        self.error: BaseException | None = None
        self.begun = Event()
        """Set when `begin` has returned or failed."""
        self._calls: SimpleQueue[tuple[Call | None, float]] = SimpleQueue()
        self._problems: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._running: tuple[float, float] | None = None
        """When the call that runs now began, and how long the end of the run waits for it."""
        self._left_out = False
        self._thread = Thread(target=self._work, args=(make, about, go), daemon=True, name=f"tracker {name}")
        self._thread.start()

    def tell(self, call: Call) -> None:
        """Make a call soon. Never waits and never raises."""
        if self._thread.is_alive() and not self._left_out:
            if self._calls.qsize() < MOST_WAITING:
                self._calls.put((call, CALL_S))
            else:
                self._leave_out(f"{MOST_WAITING} calls wait for it")

    def problems(self) -> list[tuple[str, str]]:
        """What happened since the last time, as titles and texts."""
        running = self._running
        if running and (seconds := time.monotonic() - running[0]) > SLOW_S:
            self._leave_out(f"a call has not returned for {seconds:.0f} s")
        return [self._problems.get() for _ in range(self._problems.qsize())]

    def end(self, call: Call) -> None:
        """Make the last call, after those that wait."""
        if not self._left_out:
            self._calls.put((call, self.end_s))
            self._calls.put((None, 0.0))

    def wait(self) -> None:
        """Wait until all calls are made: at most `end_s`, and for a call of a step as long as one of them may take."""
        deadline = time.monotonic() + self.end_s
        while self._thread.is_alive() and not self._left_out:
            self._thread.join(0.02)
            running = self._running
            late = running and time.monotonic() - running[0] > running[1]
            if late or time.monotonic() > deadline:
                self._leave_out("it did not take its last rows in time")

    def _leave_out(self, why: str) -> None:
        if not self._left_out and self.error is None:
            self._left_out = True
            text = f"{why}. The files in the run's folder are whole."
            self._problems.put((f"{self.name} takes no more metrics", text))

    def _work(self, make: Callable[[], Backend], about: About, go: Event | None) -> None:
        backend: Backend | None = None
        if go:
            go.wait()

        def begin(_: Backend | None) -> str | None:
            nonlocal backend
            backend = make()
            return backend.begin(about)

        call, limit, longest = begin, self.end_s, 0.0
        while call is not None:
            began = time.monotonic()
            self._running = (began, max(limit, longest))
            try:
                note = call(backend)  # pyright: ignore[reportArgumentType]
            except (Exception, SystemExit) as error:  # a tracker's own errors are of any kind, and none is worth a run
                self._running = None
                self._leave_out(f"{type(error).__name__}: {shortened(str(error), 300)}")
                self.error = error
                self.begun.set()
                return
            self._running = None
            longest = max(longest, time.monotonic() - began)
            if isinstance(note, str) and note:
                title, _, text = note.partition(": ")
                self._problems.put((title, text))
            self.begun.set()
            call, limit = self._calls.get()
