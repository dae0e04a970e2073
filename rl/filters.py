"""Which groups are not worth a step? Small rules that can be combined; the loop samples another group instead."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from rl.types import Trajectory

GroupFilter = Callable[[list[Trajectory]], str | None]
"""Takes a judged group. Returns why it is not to be trained on, a word for the ledger's `filtered(word)`, or None."""


@dataclass(frozen=True, kw_only=True)
class ZeroAdvantage:
    """Groups whose rewards are all equal: a group-relative objective learns nothing from them.

    Source: DAPO's dynamic sampling, arXiv 2503.14476, section 3.2.
    """

    def __call__(self, group: list[Trajectory]) -> str | None:
        return "zero_advantage" if len({t.reward for t in group}) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """Groups of which more than a share `above` was cut off by `rollout.max_tokens`: rewards of half replies."""

    above: float = 0.5

    def __call__(self, group: list[Trajectory]) -> str | None:
        return "overlong" if fmean(t.finish_reason == "length" for t in group) > self.above else None


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Groups whose mean reward is outside of `low` to `high` (ends included): prompts far too hard or far too easy."""

    low: float = 0.1
    high: float = 0.9

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"no mean reward is from low={self.low:g} to high={self.high:g}: use low < high")

    def __call__(self, group: list[Trajectory]) -> str | None:
        mean = fmean(t.reward for t in group)
        return "too_hard" if mean < self.low else "too_easy" if mean > self.high else None


def reason(filters: tuple[GroupFilter, ...], group: list[Trajectory]) -> str | None:
    """The first filter's reason, None when all of them let the group pass."""
    return next((found for each in filters if (found := each(group))), None)
