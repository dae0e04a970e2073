"""What does one check of an objective get, and what does it report?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rl.contract.synthetic_step import Outcome, SyntheticStep
from rl.objectives.objective import Objective
from rl.types import Batch

TOLERANCE = 2e-3
"""Relative to the largest number compared: fp32 noise is a hundredth of it, a wrong denominator a hundred times it."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A check that an objective fails."""

    check: str
    what: str
    """What the check found."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.check}: {self.what}. {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An objective, its synthetic steps, the batch of one step, and the outcome of that step without any cut."""

    objective: Objective
    synthetic: SyntheticStep
    batch: Batch
    whole: Outcome


Check = Callable[[Trial], Iterator[Violation]]
