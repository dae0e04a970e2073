"""What did the learner's last pass give at each token? Why did it not learn? From numbers that exist anyway."""

from dataclasses import dataclass, field
from enum import IntFlag

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl.episodes.joined import Layout
from rl.types import Batch, Metrics, PolicyOutput


class Why(IntFlag):
    """Why a token did not learn; a token may have several reasons. 0: it did."""

    PROMPT = 1
    READ = 2
    CLIPPED_LOW = 4
    CLIPPED_HIGH = 8
    CLIPPED_DUAL = 16
    REJECTED = 32
    OUTSIDE = 64
    MASKED = 128
    ZERO_ADVANTAGE = 256
    NO_GRADIENT = 512
    LEFT_OUT = 1024


CLIPS = {
    "actor/clip_frac_low": Why.CLIPPED_LOW,
    "actor/clip_frac_high": Why.CLIPPED_HIGH,
    "actor/clip_frac_dual": Why.CLIPPED_DUAL,
}
"""Metrics of an objective that name clipped tokens."""
NUMBERS = ("old", "now", "entropy", "weight", "advantage")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Rows [N] of a step's batch as one rank computed them last, in float32. NaN: no pass needed the token."""

    rows: Int[Tensor, " N"]
    numbers: dict[str, Float[Tensor, "N T"]]
    """By the names of `NUMBERS`. Nats: `old` before the step (the engine's own with `old_is_rollout`), `now` in the
    last pass, `entropy`. Without unit: `weight` of the correction, and the advantage without it."""
    flags: Int[Tensor, "N T"]
    """`Why`, int16."""
    old_is_rollout: bool


@dataclass
class Watching:
    """Collects what the passes of one step give. No number is computed for it, and none is changed."""

    shape: torch.Size
    old_is_rollout: bool
    numbers: dict[str, Tensor] = field(init=False)
    flags: Tensor = field(init=False)
    passed: Tensor = field(init=False)
    """Rows [B] that a pass computed."""

    def __post_init__(self) -> None:
        self.numbers = {name: torch.full(self.shape, torch.nan) for name in NUMBERS}
        self.flags = torch.zeros(self.shape, dtype=torch.int16)
        self.passed = torch.zeros(self.shape[0], dtype=torch.bool)

    def add(
        self,
        micro: Int[Tensor, " R"],
        at: Layout | None,
        part: Batch,
        policy: PolicyOutput,
        advantages: Tensor,
        metrics: Metrics,
    ) -> None:
        """Keep a micro-batch's numbers of the batch's rows `micro`. All but `micro` have one row for each episode, of
        which `at` gives the batch's rows back."""
        now = policy.logprobs.detach()
        given = {
            "now": now,
            "old": now if part.old_logprobs is None else part.old_logprobs,
            "entropy": policy.entropy,
            "advantage": advantages,
            "weight": metrics.get("rollout_corr/weight", torch.ones_like(now)),
        }
        flags = Why.OUTSIDE * ~now.isfinite() + Why.ZERO_ADVANTAGE * (advantages == 0)
        flags += Why.REJECTED * (given["weight"] == 0)
        for name, why in CLIPS.items():
            if name in metrics:
                clipped = metrics[name].detach() > 0
                flags += why * (clipped if clipped.dim() > 1 else clipped[:, None])
        rows, width = len(micro), part.mask.shape[1] if at is None else at.shape[1]
        for name, value in given.items():
            kept = torch.where(part.mask, value.detach().float(), 0.0)
            self.numbers[name][micro, :width] = (kept if at is None else at.rows(kept))[:rows].cpu()
        kept = torch.where(part.mask, flags, 0).float()
        self.flags[micro, :width] = (kept if at is None else at.rows(kept))[:rows].cpu().to(torch.int16)
        self.passed[micro] = True

    def gradient(self, micro: Int[Tensor, " R"], mask: Tensor, gradient: Tensor) -> None:
        """Mark the tokens [R, T] whose log-probability has no gradient."""
        silent = (mask & (gradient == 0))[: len(micro)].cpu()
        self.flags[micro, : mask.shape[1]] |= Why.NO_GRADIENT * silent.to(torch.int16)

    def seen(self) -> Seen:
        """The rows that this rank computed."""
        rows = self.passed.nonzero()[:, 0]
        numbers = {name: value[rows] for name, value in self.numbers.items()}
        return Seen(rows=rows, numbers=numbers, flags=self.flags[rows], old_is_rollout=self.old_is_rollout)
