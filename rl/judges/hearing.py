"""What did the judges return to one call of a reward or an environment, and how long did it wait for them?"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from rl.protocols import EnvError
from rl.types import Reply, Verdict


class JudgeError(EnvError):
    """A judge failed, and the policy did not cause it. The reply is scored again; it never gets a reward for this."""


class Hearing:
    """The verdicts of one call of the user's code."""

    def __init__(self, outer: "Hearing | None", *, rehearsal: bool) -> None:
        self.verdicts: list[Verdict] = outer.verdicts if outer else []
        self.rehearsal = rehearsal or (outer is not None and outer.rehearsal)
        """Whether this is the trial before the run, when no reward model has started."""
        self._waiting, self._since, self._waited = 0, 0.0, 0.0

    def waited(self) -> float:
        """Seconds in which the call has waited for some judge, each of which has a deadline of its own."""
        return self._waited + (time.monotonic() - self._since if self._waiting else 0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The call waits for one more judge meanwhile."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._waited += time.monotonic() - self._since


_CURRENT: ContextVar[Hearing | None] = ContextVar("hearing", default=None)


def current() -> Hearing:
    """The hearing of the call that runs now; one that nobody reads where a judge is asked outside of a run."""
    return _CURRENT.get() or Hearing(None, rehearsal=False)


@contextmanager
def hear(*, rehearsal: bool = False) -> Iterator[Hearing]:
    """Collect the verdicts of what is called meanwhile; those of an inner hearing belong to the outer one too."""
    token = _CURRENT.set(Hearing(_CURRENT.get(), rehearsal=rehearsal))
    try:
        yield current()
    finally:
        _CURRENT.reset(token)


def about(reply: Reply, replies: Sequence[Reply], verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts about one reply of a group that was judged together: those whose text holds its text, and those that
    hold the text of none."""
    return [v for v in verdicts if reply.text in v.reply or not any(each.text in v.reply for each in replies)]
