"""Which groups are being sampled or scored now, since when, and for how many seconds were there any?"""

import asyncio
from dataclasses import dataclass, field


@dataclass
class InFlight:
    """The tasks of groups that are not ready yet, by ordinal. Times are seconds on the event loop's clock."""

    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)
    """When each group was admitted."""
    _busy: float = 0.0
    """Seconds of the finished periods in which some group was in flight."""
    _busy_since: float = 0.0
    """When the current period began."""

    def start(self, ordinal: int, task: asyncio.Task[None]) -> None:
        """A group was admitted, and this task works on it."""
        if not self.since:
            self._busy_since = now()
        self.since[ordinal] = now()
        self.tasks[ordinal] = task

    def end(self, ordinal: int) -> None:
        """A group is ready, has ended, or was given up."""
        del self.since[ordinal], self.tasks[ordinal]
        if not self.since:
            self._busy += now() - self._busy_since

    def cancel(self, ordinal: int) -> None:
        """Give up a group, if it is in flight."""
        if ordinal in self.tasks:
            self.tasks[ordinal].cancel()
            self.end(ordinal)

    def seconds(self) -> float:
        """Seconds so far in which the engines or the reward had work."""
        return self._busy + (now() - self._busy_since if self.since else 0.0)

    def oldest(self) -> tuple[int, float] | None:
        """The group that has been in flight the longest, and for how many seconds; None when there is none."""
        if not self.since:
            return None
        ordinal = min(self.since, key=self.since.__getitem__)
        return ordinal, now() - self.since[ordinal]


def now() -> float:
    """Seconds on the clock of the running event loop."""
    return asyncio.get_running_loop().time()
