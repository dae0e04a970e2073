"""How a run ends at SIGTERM: it saves within its grace period, then it ends in any case."""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM


class Stop:
    """Handles SIGTERM for the task that makes it. The first signal counts, later ones are ignored."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.gently: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Called first where something can be saved; without it the task is cancelled at once."""
        self.asked = False
        self._main = asyncio.current_task()
        self._asking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def listen(self) -> None:
        """Install the handler, again after a library (such as Ray) has installed its own."""
        # Signals go to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.handle)

    def handle(self) -> None:
        """Handle SIGTERM."""
        if self.asked:
            return
        self.asked = True
        if self.gently is None:
            self._cancel()
            return
        loop = asyncio.get_running_loop()
        self._asking = loop.create_task(self.gently(), name="stop gently")
        self._timer = loop.call_later(self.grace_s, self._cancel)

    def saved(self) -> None:
        """Everything is saved: the clean-up that follows has no deadline."""
        self.gently = None
        if self._timer:
            self._timer.cancel()

    def _cancel(self) -> None:
        assert self._main is not None
        self._main.cancel()
