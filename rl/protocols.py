"""All that the loop sees of the engines, the trainer and the tokenizer. Fakes of these drive its unit tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rl.types import Batch, Completion, Trajectory


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """One published update: seconds in all, seconds in which generation stood still, bytes sent to each engine."""

    seconds: float
    pause_seconds: float
    bytes: int
    verified: bool
    """Whether every engine's digests were compared with the sender's."""
    failed: int = 0
    """How often it was sent before the engines took it."""


class EngineLost(RuntimeError):
    """The engine that sampled a group is gone; the group may be sampled again, by another or by its successor."""


class UpdateFailed(RuntimeError):
    """A weight update was not taken, and every engine goes on with the weights that it had; it may be sent again."""


@runtime_checkable
class Rollouts(Protocol):
    """The engines as one."""

    async def sample(
        self, token_ids: list[int], n: int, *, seed: int | None, temperature: float | None = None
    ) -> list[Completion]:
        """n completions of one prompt; `temperature=None` means the run's. Raises EngineLost."""
        ...


@runtime_checkable
class Learner(Protocol):
    """The trainer's ranks as one."""

    async def step(self, batch: Batch) -> dict[str, float]:
        """Train on the batch of one step and return its metrics."""
        ...

    async def publish(self, version: int) -> SyncReport:
        """Give every engine the current weights as `version`; returns when all of them have committed it."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """A place that a run's numbers go to."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step."""
        ...

    def alert(self, step: int, title: str, text: str) -> None:
        """Show the user what needs attention."""
        ...

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Show rows, which have the same keys, as a table."""
        ...

    def samples(self, step: int, trajectories: list[Trajectory], decode: Callable[[list[int]], str]) -> None:
        """Keep trajectories as text; step -1 means that they were set aside as broken."""
        ...

    def close(self, summary: dict[str, Any]) -> None:
        """Finish the record with the run's summary."""
        ...


class StallError(RuntimeError):
    """A wait passed its deadline; the message says who waited for whom."""
