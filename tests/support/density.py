"""How many values changed between two versions of the weights, and how few bytes could hold the change?"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Density:
    """How many values changed, and the fewest bytes that can encode the changes."""

    changed: float
    """Share of the values that changed."""
    bound: float
    """In bytes: the entropy of the changed positions, plus that of the differences by their own frequencies."""


def density(old: Tensor, new: Tensor) -> Density:
    """Share of changed values, and the entropy bound for a payload."""
    changed = old != new
    n, count = old.numel(), int(changed.sum())
    if count == 0:
        return Density(0.0, 0.0)
    p = count / n
    where = n * -(p * math.log2(p) + ((1 - p) * math.log2(1 - p) if p < 1 else 0.0))
    _, times = (new[changed] - old[changed]).unique(return_counts=True)
    frequencies = times.double() / count
    what = count * float(-(frequencies * frequencies.log2()).sum())
    return Density(p, (where + what) / 8)
