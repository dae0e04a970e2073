"""What does one check of an objective get, and what does it report?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from rl.contract.run import Outcome, run
from rl.contract.scene import Scene
from rl.objectives.objective import Objective

TOLERANCE = 2e-3
"""Relative to the largest number compared: fp32 noise is a hundredth of it, a wrong denominator a hundred times it."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A check that an objective fails."""

    check: str
    what: str
    """What was measured, and what it means."""
    remedy: str
    method: str = ""
    """The method at fault, where one is: `loss` or `advantages`."""
    place: str = ""
    """The line of the user's file, where it is known."""

    def __str__(self) -> str:
        return f"{self.check}: {self.what}. {self.remedy}" + (f" [{self.place}]" if self.place else "")


@dataclass(frozen=True)
class Trial:
    """An objective, one synthetic step, and its outcome without any cut."""

    objective: Objective
    scene: Scene

    @cached_property
    def whole(self) -> Outcome:
        """The outcome of the step."""
        return run(self.objective, self.scene)

    @cached_property
    def on_policy(self) -> Scene:
        """The step as the current policy sampled it."""
        return self.scene.on_policy()


Check = Callable[[Trial], Iterator[Violation]]
