"""What this process does now, for the message of a wait that passed its deadline."""

import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

LINES = 6
"""Innermost frames shown of each thread."""
MOST = 4
"""Different stacks that are shown: a message that holds one for each of a thousand calls is not read."""


class Heartbeat:
    """When this process last finished a call."""

    def __init__(self) -> None:
        self.did, self.at = "", time.monotonic()

    def beat(self, did: str) -> None:
        """A call has finished just now."""
        self.did, self.at = did, time.monotonic()

    def __str__(self) -> str:
        seconds = time.monotonic() - self.at
        return (
            f"its last finished call is {self.did}, {seconds:.0f} s ago"
            if self.did
            else f"it has finished no call in the {seconds:.0f} s since its start"
        )


def stacks(calls: Iterable[Any] = ()) -> str:
    """The stack of each thread of this process, and what each coroutine of `calls` waits for; innermost line last.

    Equal stacks are shown once, with their number, the most frequent ones first.
    """
    names = {t.ident: t.name for t in threading.enumerate()}
    frames = {i: f for i, f in sys._current_frames().items() if i != threading.get_ident() and not _waits_for_work(f)}
    found = [f"thread {names.get(i, i)}:\n{_lines(traceback.extract_stack(f))}" for i, f in frames.items()]
    for call in calls:
        where = traceback.StackSummary.extract((f, f.f_lineno) for f in _awaited(call))
        found.append(f"{call.__qualname__} waits at\n{_lines(where)}")
    shown = Counter(found).most_common()
    texts = [f"{count} times: {text}" if count > 1 else text for text, count in shown[:MOST]]
    if shown[MOST:]:
        texts.append(f"... and {sum(count for _, count in shown[MOST:])} other stacks")
    return "\n".join(texts) or "idle: no thread has work"


def _awaited(call: Any) -> Iterator[FrameType]:
    """Frames from a coroutine down to what it waits for."""
    while call is not None:
        frame = getattr(call, "cr_frame", None)
        if frame is not None:
            yield frame
        call = getattr(call, "cr_await", None)


def _lines(stack: traceback.StackSummary) -> str:
    return "\n".join(f"  {os.path.relpath(f.filename)}:{f.lineno} {f.name}: {f.line}" for f in stack[-LINES:])


def _waits_for_work(frame: FrameType) -> bool:
    """A thread of a pool, or an event loop, with nothing to run."""
    return os.path.basename(frame.f_code.co_filename) in ("selectors.py", "thread.py", "queue.py")
