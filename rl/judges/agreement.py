"""How far does a judge agree with labels? Preferences between two replies, or a score for each reply."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import StatisticsError, correlation, fmean, stdev
from typing import Any

from rl.data import Given
from rl.typed import Checked


@dataclass(frozen=True, kw_only=True)
class Preference(Checked):
    """A prompt, and two replies of which the first is known to be better."""

    prompt: Given
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class Labelled(Checked):
    """A prompt, a reply, and its known score."""

    prompt: Given
    reply: str
    label: float


Cases = Sequence[Preference | Labelled]


async def agreement(judge: Callable[[Given, str], Awaitable[float]], cases: Cases) -> dict[str, float]:
    """How far a judge agrees with labels, each figure with its standard error `<figure>_se` over the cases.

    Of preferences: `accuracy`, the share in which the chosen reply has the higher score; equal scores count one half.
    Of labelled replies: `exact`, the share of scores that are the label, and `correlation`, Pearson's r, whose standard
    error is (1 - r^2) / sqrt(n - 1); NaN where all scores or all labels are equal.
    """
    if not cases:
        raise ValueError("there are no cases: a judge's agreement needs some Preference(...) or Labelled(...)")
    preferences = [case for case in cases if isinstance(case, Preference)]
    labelled = [case for case in cases if isinstance(case, Labelled)]
    if len(cases) not in (len(preferences), len(labelled)):
        raise ValueError("the cases must be all Preference(...) or all Labelled(...)")
    pairs = [(p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)]
    scores = await asyncio.gather(*(judge(*pair) for pair in pairs or [(c.prompt, c.reply) for c in labelled]))
    if preferences:
        right = [
            0.5 * ((chosen > rejected) + (chosen >= rejected))
            for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)
        ]
        return _mean("accuracy", right)
    labels = [case.label for case in labelled]
    try:
        r = correlation(scores, labels)
    except StatisticsError:
        r = math.nan
    exact = [float(score == label) for score, label in zip(scores, labels, strict=True)]
    se = (1 - r * r) / math.sqrt(max(1, len(labels) - 1))
    return _mean("exact", exact) | {"correlation": r, "correlation_se": se}


async def agreements(judges: Iterable[Any]) -> dict[str, float]:
    """The agreement of each judge with its own labelled cases, where it has some."""
    found = {judge.label: await agreement(judge, judge.labelled()) for judge in judges if judge.labelled}
    return {"/".join(("judge", name, each)): value for name, of in found.items() for each, value in of.items()}


def _mean(name: str, values: list[float]) -> dict[str, float]:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {name: fmean(values), f"{name}_se": error}
