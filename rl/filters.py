"""Which groups are not worth a step? Small rules that can be combined; the loop samples another group instead.

A filter is a function, or an object with `__call__`. It may have a method `check(self, config)` that raises ValueError
for settings that it cannot work with; rl/validate.py calls it before anything starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from rl.episodes.rows import first_rows
from rl.typed import Checked
from rl.types import Trajectory

if TYPE_CHECKING:
    import rl.config

GroupFilter = Callable[[list[Trajectory]], str | None]
"""Takes a scored group, with all rows of its episodes (`rl.episodes.rows.first_rows` gives one of each). Returns why it
must not be trained on, a word for the ledger's `filtered(word)`, or None."""


ROUNDING = 1e-6
"""Parts such as 0.7 + 0.2 + 0.1 add up to a little less than 1, and the trainer has rewards in fp32."""


@dataclass(frozen=True, kw_only=True)
class ZeroAdvantage(Checked):
    """Groups whose rewards are all equal: a group-relative objective learns nothing from them.

    Source: DAPO's dynamic sampling, arXiv 2503.14476, section 3.2.
    """

    def check(self, config: "rl.config.Config") -> None:
        """A group of one has equal rewards always."""
        if config.group_size == 1:
            raise ValueError(
                "filters: the rewards of a group of one are all equal, so ZeroAdvantage would take every group: remove "
                "it, or use group_size >= 2"
            )

    def __call__(self, group: list[Trajectory]) -> str | None:
        return "zero_advantage" if same([t.reward for t in first_rows(group)]) else None


@dataclass(frozen=True, kw_only=True)
class Overlong(Checked):
    """Groups of which more than a share `above` was cut off by `rollout.max_tokens`: rewards of half replies."""

    above: float = 0.5
    """Share of the group, from 0 to 1."""

    def __call__(self, group: list[Trajectory]) -> str | None:
        return "overlong" if fmean(t.finish_reason == "length" for t in first_rows(group)) > self.above else None


@dataclass(frozen=True, kw_only=True)
class Difficulty(Checked):
    """Groups whose mean reward is outside of `low` to `high` (ends included): prompts far too hard or far too easy."""

    low: float = 0.1
    """Smallest mean reward that is kept."""
    high: float = 0.9
    """Largest mean reward that is kept."""

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"no mean reward is from low={self.low:g} to high={self.high:g}: use low < high")

    def __call__(self, group: list[Trajectory]) -> str | None:
        mean = fmean(t.reward for t in first_rows(group))
        if mean < self.low - ROUNDING:
            return "too_hard"
        return "too_easy" if mean > self.high + ROUNDING else None


def same(rewards: list[float]) -> bool:
    """Whether rewards are equal, but for rounding."""
    return max(rewards) - min(rewards) <= ROUNDING * max(1.0, *map(abs, rewards))


def reason(filters: tuple[GroupFilter, ...], group: list[Trajectory]) -> str | None:
    """The first filter's reason, None when all of them let the group pass."""
    return next((found for each in filters if (found := each(group))), None)
