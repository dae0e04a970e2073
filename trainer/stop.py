"""How a run ends at a signal: at SIGTERM it saves within its grace period; at Ctrl-C it ends at once, and in order."""

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

R = TypeVar("R")
EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = "stopped by Ctrl-C"


def run_stoppable(work: Coroutine[Any, Any, R]) -> R:
    """`asyncio.run` for work under `stoppable`: it ends the process where SIGTERM has, and raises KeyboardInterrupt
    where Ctrl-C has."""
    try:
        return asyncio.run(work)
    except asyncio.CancelledError as stopped:
        if INTERRUPTED in stopped.args:
            raise KeyboardInterrupt from None
        sys.exit(EXIT_CODE)


@contextmanager
def stoppable(grace_s: float) -> Iterator["Stop"]:
    """Signals cancel this task until it leaves; then they have their usual effect again, because the loop may go on."""
    stop = Stop(grace_s)
    stop.listen()
    try:
        yield stop
    except asyncio.CancelledError:
        if stop.interrupted:
            raise asyncio.CancelledError(INTERRUPTED) from None
        raise
    finally:
        stop.stop_listening()


class Stop:
    """Handles SIGTERM, SIGHUP and SIGINT for the task that makes it. The first signal counts, later ones are ignored:
    a second Ctrl-C must not interrupt the end of the first, which is bounded and leaves no process."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.gently: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Called first where something can be saved; without it the task is cancelled at once."""
        self.asked = False
        self.interrupted = False
        self._main = asyncio.current_task()
        self._asking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def listen(self) -> None:
        """Install the handlers, again after a library (such as Ray) has installed its own."""
        # Signals go to the main thread alone.
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.handle)
        loop.add_signal_handler(signal.SIGINT, self.interrupt)
        # Sent when the terminal is closed. `nohup` ignores it, and so it stays.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, self.handle)

    def stop_listening(self) -> None:
        """Remove the handlers: signals have their usual effect again."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                asyncio.get_running_loop().remove_signal_handler(number)

    def handle(self) -> None:
        """Handle SIGTERM."""
        if self.asked or self.interrupted:
            return
        self.asked = True
        if self.gently is None:
            self._cancel()
            return
        loop = asyncio.get_running_loop()
        self._asking = loop.create_task(self.gently(), name="stop gently")
        self._timer = loop.call_later(self.grace_s, self._cancel)

    def interrupt(self) -> None:
        """Handle SIGINT, which Ctrl-C sends. It also ends a run that SIGTERM lets save."""
        if self.interrupted:
            return
        self.interrupted = True
        self._cancel(INTERRUPTED)

    def saved(self) -> None:
        """Everything is saved: the clean-up that follows has no deadline."""
        self.gently = None
        if self._timer:
            self._timer.cancel()

    def _cancel(self, why: str | None = None) -> None:
        assert self._main is not None
        self._main.cancel(why)
