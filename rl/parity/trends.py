"""Is a figure of a run above a bound, or has it changed, and since when? Means over steps with standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean, median, variance

LEAST = 6
"""Steps that a statement needs."""
SURE = 3.0
"""Standard errors between what is stated and its contrary."""
Series = Sequence[tuple[int, float]]
"""A figure by step, without the steps that lack it."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over steps, its standard error, and the first of the steps."""

    value: float
    error: float
    since: int


def estimate(series: Series) -> Estimate:
    """The mean, with an error that counts neighbouring steps that move together as fewer steps (AR(1))."""
    values = [value for _, value in series]
    center = fmean(values)
    spread = variance(values) if len(values) > 1 else math.inf
    away = [value - center for value in values]
    power = sum(x * x for x in away)
    memory = sum(a * b for a, b in pairwise(away)) / power if power else 0.0
    memory = min(max(memory, 0.0), 0.9)
    error = math.sqrt(spread / len(values) * (1 + memory) / (1 - memory))
    return Estimate(value=center, error=error, since=series[0][0])


def smooth(series: Series) -> list[float]:
    """The median of each value and its two neighbours on either side: one odd step changes nothing."""
    values = [value for _, value in series]
    return [median(values[max(0, i - 2) : i + 3]) for i in range(len(values))]


def tail(series: Series, bound: float, *, up: bool = True) -> Series:
    """The last steps, in which the figure is above the bound (or below): those whose smoothed distances from it add up
    to the largest sum. Empty where the last step is on the other side."""
    away = [value - bound if up else bound - value for value in smooth(series)]
    sums = list(accumulate(reversed(away)))
    if not sums or sums[0] <= 0:
        return []
    return series[len(series) - 1 - max(range(len(sums)), key=sums.__getitem__) :]


def above(series: Series, bound: float) -> Estimate | None:
    """The figure over its last steps, where it is above the bound there; None where that is not sure."""
    last = tail(series, bound)
    if len(last) < LEAST:
        return None
    found = estimate(last)
    return found if found.value - SURE * found.error > bound else None


@dataclass(frozen=True, kw_only=True)
class Change:
    """From the first steps to the last ones."""

    first: Estimate
    last: Estimate

    @property
    def value(self) -> float:
        return self.last.value - self.first.value

    @property
    def error(self) -> float:
        return math.hypot(self.first.error, self.last.error)

    def sure(self, errors: float = SURE) -> bool:
        """Whether it is that many standard errors away from none."""
        return abs(self.value) > errors * self.error


def change(series: Series) -> Change | None:
    """The change of the figure from the first quarter of the steps to the last; None for too few steps."""
    if len(series) < 2 * LEAST:
        return None
    size = max(LEAST, len(series) // 4)
    return Change(first=estimate(series[:size]), last=estimate(series[-size:]))


def turned(series: Series, by: Change) -> int:
    """The step since which the figure has made more than half of its change."""
    last = tail(series, by.first.value + by.value / 2, up=by.value > 0)
    return last[0][0] if last else series[-1][0]
