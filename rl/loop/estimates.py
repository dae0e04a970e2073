"""What do samples of held-out problems show? avg@n, pass@k and maj@n with standard errors, and how two evaluations
differ."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rl.filters import ROUNDING

Problems = Mapping[int, Mapping[str, float]]
"""Figures of each problem, such as {"avg@4": 0.5, "pass@1": 0.5}, by its place in the set."""
Means = Mapping[str, Mapping[str, float]]
"""Weights of figures by the name of their mean, such as {"all": {"easy/avg@4": 1, "hard/avg@4": 2}}."""
NO_MEANS: Means = {}


def names(n: int, *, majority: bool) -> list[str]:
    """The figures of n samples per problem: k of pass@k is 1, 2, 4 and so on, and n."""
    ks = sorted({*(2**i for i in range(n.bit_length())), n})
    return [f"avg@{n}", *(f"pass@{k}" for k in ks), *([f"maj@{n}"] if majority else [])]


def of_problem(rewards: Sequence[float], answers: Sequence[Any] | None, n: int) -> dict[str, float]:
    """The figures of one problem from the rewards of its samples, and their answers where they vote.

    Where the reward applies to fewer than n samples, what needs more of them is left out.
    """
    passed = sum(reward >= 1.0 - ROUNDING for reward in rewards)
    found: dict[str, float] = {}
    for name in names(n, majority=answers is not None and len(rewards) == n):
        kind, k = name.split("@")
        if kind == "avg":
            found[name] = fmean(rewards)
        elif kind == "maj":
            found[name] = voted(answers or (), rewards)
        elif int(k) <= len(rewards):
            found[name] = pass_at_k(len(rewards), passed, int(k))
    return found


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of those that passed: an unbiased estimate
    of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def voted(answers: Sequence[Any], rewards: Sequence[float]) -> float:
    """Reward of the most frequent answer; the mean over several that are equally frequent, as if the lot decided.

    A sample without an answer (None) has no vote; where all have none, the mean of their rewards is returned.
    """
    counts = Counter(each for each in answers if each is not None) or Counter(answers)
    most = max(counts.values())
    return fmean(r for each, r in zip(answers, rewards, strict=True) if counts[each] == most)


def estimates(problems: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every figure over the problems that have it, and its standard error as `<figure>_se`."""
    rows, found = list(problems), dict[str, float]()
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        found |= {name: fmean(values), f"{name}_se": standard_error(values)}
    return found


def paired(first: Problems, last: Problems) -> dict[str, float]:
    """Mean of `last` - `first` over the problems that both have, and its standard error: that of the differences, which
    vary less than the two means where prompts and seeds are the same."""
    both = [(figures, last[i]) for i, figures in first.items() if i in last]
    return estimates({name: b[name] - a[name] for name in a if name in b} for a, b in both)


def weighted(metrics: Mapping[str, float], means: Means) -> dict[str, float]:
    """`eval/<name>/mean` of the means whose figures are all there, and its standard error: sets are independent."""
    found: dict[str, float] = {}
    for name, weights in means.items():
        if any(f"eval/{figure}" not in metrics for figure in weights):
            continue
        total = sum(weights.values())
        parts = [(w / total, f"eval/{figure}") for figure, w in weights.items()]
        found[f"eval/{name}/mean"] = sum(w * metrics[figure] for w, figure in parts)
        found[f"eval/{name}/mean_se"] = math.hypot(*(w * metrics[f"{figure}_se"] for w, figure in parts))
    return found


def headlines(metrics: Iterable[str]) -> list[str]:
    """The metrics that a line or a plot of a run shows: the mean reward of each set, and the means of several sets."""
    shown = (name for name in metrics if name.startswith("eval/") and ("/avg@" in name or name.endswith("/mean")))
    return sorted(name for name in shown if not name.endswith("_se"))


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of a sample; NaN for a single value, which shows no spread."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
