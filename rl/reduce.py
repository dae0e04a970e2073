"""How is a per-token loss averaged so that no split into micro-batches or ranks changes it, and how are metrics?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

AverageOver = Literal["tokens", "sequences", "constant"]


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Counts over the whole optimizer step and all ranks: the denominators of its loss."""

    tokens: int
    sequences: int
    """Episodes, in however many rows."""
    horizon: int
    """Largest number of tokens one sequence may hold: the divisor of `average_over="constant"`."""


def loss_weights(mask: Bool[Tensor, "B T"], average_over: AverageOver, totals: Totals) -> Float[Tensor, "B T"]:
    """Weights [B, T]: sum(weights * loss), added over all splits of a step, is the average of the per-token loss.

    A sequence is a row, and so an episode: the rows of one are joined before (rl/episodes/joined.py).

    `tokens`: every token has the same weight (DAPO, arXiv 2503.14476, eq. 8). `sequences`: every sequence has the
    same weight, spread over its tokens (GRPO, arXiv 2402.03300, eq. 3). `constant`: the sum over tokens divided by a
    fixed length (Dr. GRPO, arXiv 2503.20783). Raises ValueError for another word.
    """
    m = mask.float()
    if average_over == "tokens":
        return m / max(totals.tokens, 1)
    if average_over == "sequences":
        return m / m.sum(dim=1, keepdim=True).clamp(min=1) / max(totals.sequences, 1)
    if average_over == "constant":
        return m / (max(totals.sequences, 1) * totals.horizon)
    raise ValueError(f"average_over={average_over!r} is not one of {', '.join(map(repr, get_args(AverageOver)))}")


def masked_mean(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """Mean over the sampled tokens of each sequence; 0 for a sequence without any."""
    return torch.where(mask, x, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


@dataclass
class Meter:
    """Sums and counts of metrics over micro-batches; merged over ranks before the division.

    A [B, T] metric is averaged over sampled tokens, a [B] metric over sequences. A name that ends in `_max` is
    reduced by maximum, one that ends in `_count` by sum.
    """

    sums: dict[str, float] = field(default_factory=dict[str, float])
    counts: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, metrics: Mapping[str, Tensor], mask: Bool[Tensor, "B T"]) -> None:
        """Add one micro-batch. Raises ValueError for a metric that is neither [B, T] nor [B]."""
        present = mask.any(dim=1)
        for name, value in metrics.items():
            keep = {mask.shape: mask, present.shape: present}.get(value.shape)
            if keep is None:
                raise ValueError(
                    f"metric {name!r} has shape {tuple(value.shape)}; return [B, T]={tuple(mask.shape)} for a "
                    f"per-token metric or [B]=({mask.shape[0]},) for a per-sequence one, not a reduced number"
                )
            picked = value.detach().float()[keep]
            if picked.numel():
                self.merge_one(name, float(picked.max() if name.endswith("_max") else picked.sum()), picked.numel())

    def merge_one(self, name: str, value: float, count: float | int) -> None:
        """Add a sum (or a maximum) over `count` entries."""
        if name.endswith("_max"):
            # A plain max() would drop a NaN, which must stay visible.
            worst = self.sums.get(name, -math.inf)
            self.sums[name] = value if math.isnan(value) or value > worst else worst
        else:
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0.0) + count

    def merge(self, other: "Meter") -> None:
        """Add the meter of another rank."""
        for name, value in other.sums.items():
            self.merge_one(name, value, other.counts[name])

    def means(self) -> dict[str, float]:
        """The averages (or maxima, or sums) by name."""
        return {n: s if n.endswith(("_max", "_count")) else s / self.counts[n] for n, s in self.sums.items()}
