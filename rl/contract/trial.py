"""What one check of an objective gets to see, and what it reports."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rl.contract.synthetic_step import Bench, Outcome
from rl.objectives.objective import Objective
from rl.types import Batch

TOLERANCE = 2e-3
"""Relative to the largest number compared: fp32 noise is a hundredth of it, a wrong denominator a hundred times it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A law that an objective breaks."""

    law: str
    what: str
    """What was seen."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.law}: {self.what}. {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a law sees: the objective, its bench, a step's batch, and what the step came to in one piece."""

    objective: Objective
    bench: Bench
    batch: Batch
    whole: Outcome


Law = Callable[[Trial], Iterator[Finding]]
