"""All that the loop sees of the engines, the trainer and the tracker. Its unit tests use fakes of these protocols."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rl.types import Batch, Completion


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """One published update: total seconds, seconds in which generation was paused, bytes sent to each engine."""

    seconds: float
    pause_seconds: float
    bytes: int
    verified: bool
    """Whether every engine's digests were compared with the sender's."""
    failed: int = 0
    """Failed attempts before the engines took it."""


class EngineLost(RuntimeError):
    """The engine that sampled a group was lost. Another engine, or this one restarted, may sample the group again."""


class EnvError(RuntimeError):
    """The environment failed, and the policy did not cause it. The episode is played again; it never gets a reward."""


class UpdateFailed(RuntimeError):
    """A weight update failed, and every engine keeps its weights. The update may be sent again."""


@runtime_checkable
class Rollouts(Protocol):
    """The engines as one."""

    async def sample(
        self,
        token_ids: list[int],
        n: int,
        *,
        seed: int | None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        engine: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Completion]:
        """n completions of one prompt. None uses the run's temperature, the run's `rollout.max_tokens`, and the engine
        with the least work; a named engine is used while it serves. With `tools`, the schemas that the prompt shows,
        the run's parsers read the replies (`Completion.parsed`). Raises EngineLost."""
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


class StallError(RuntimeError):
    """A wait passed its deadline, or no step can ever begin; the message names who waited for whom, and the remedy."""
