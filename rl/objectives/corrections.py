"""How are tokens weighted that another policy sampled? By importance weights old / rollout.

They are separate from the policy ratio. d_t = log old - log rollout (nats) and r_t = e^{d_t}. Weights have no unit and
no gradient, and are 0 outside the mask. A rejected token still counts in the denominator of the loss: rejection never
increases the weight of other tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from rl.objectives.advantages import spread
from rl.objectives.ratios import sequence_log_ratio, token_log_ratio
from rl.reduce import masked_mean
from rl.typed import Checked
from rl.types import Step

if TYPE_CHECKING:
    import rl.config


def inside(ratio: Tensor, low: float, high: float) -> Tensor:
    """The ratio where low <= ratio <= high, else 0. NaN stays NaN, because it must stay visible."""
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def check_range(low: float, high: float) -> None:
    """Raise ValueError for bounds that would reject tokens on which both sides agree (ratio 1)."""
    if not 0 <= low <= 1 <= high:
        raise ValueError(
            f"ratios from {low:g} to {high:g} leave out 1, where both sides agree; use 0 <= low <= 1 <= high"
        )


@dataclass(frozen=True, kw_only=True)
class Correction(Checked, ABC):
    """Weight of every token's advantage, for tokens that another policy sampled."""

    def check(self, config: "rl.config.Config") -> None:
        """Raise ValueError, with the remedy, for settings that this correction cannot work with."""
        if config.old_logprobs == "rollout":
            raise ValueError(
                f"{type(self).__name__} weighs by the trainer's log-probabilities against the engine's, and "
                "old_logprobs='rollout' makes them the same: use old_logprobs='recompute' (or 'auto')"
            )

    @abstractmethod
    def weights(self, batch: Step) -> Float[Tensor, "B T"]:
        """Weight [B, T], without unit; 0 outside the mask."""


@dataclass(frozen=True, kw_only=True)
class Uncorrected(Correction):
    """w_t = 1."""

    def check(self, config: "rl.config.Config") -> None:
        """It works with every setting."""

    def weights(self, batch: Step) -> Float[Tensor, "B T"]:
        return batch.mask.float()


@dataclass(frozen=True, kw_only=True)
class TokenTIS(Correction):
    """Truncated importance sampling of each token: w_t = min(r_t, cap).

    Source: "Your efficient RL framework secretly brings you off-policy RL training" (Yao et al., 2025).
    """

    cap: float = 2.0
    """Largest weight."""

    def __post_init__(self) -> None:
        check_range(0.0, self.cap)

    def weights(self, batch: Step) -> Float[Tensor, "B T"]:
        return token_log_ratio(batch).exp().clamp(max=self.cap) * batch.mask


@dataclass(frozen=True, kw_only=True)
class SequenceTIS(Correction):
    """Truncated importance sampling of each sequence: w = min(prod_t r_t, cap), the same for all of its tokens.

    Without the cap it is unbiased; its variance grows exponentially with the length. Sources: "Truncated importance
    sampling" (Ionides, 2008); "When speed kills stability" (Liu, Li et al., 2025), Seq-TIS.
    """

    cap: float = 2.0
    """Largest weight."""

    def __post_init__(self) -> None:
        check_range(0.0, self.cap)

    def weights(self, batch: Step) -> Float[Tensor, "B T"]:
        return spread(sequence_log_ratio(batch).exp().clamp(max=self.cap), batch.mask)


@dataclass(frozen=True, kw_only=True)
class MIS(Correction):
    """Masked importance sampling of each sequence: w = prod_t r_t if low <= prod_t r_t <= high, else 0.

    Source: "When speed kills stability: demystifying RL collapse from the training-inference mismatch" (Liu, Li et
    al., 2025), Seq-MIS; a lower bound next to the upper one as in slime.
    """

    low: float = 0.5
    """Smallest ratio that is kept."""
    high: float = 2.0
    """Largest ratio that is kept."""

    def __post_init__(self) -> None:
        check_range(self.low, self.high)

    def weights(self, batch: Step) -> Float[Tensor, "B T"]:
        return spread(inside(sequence_log_ratio(batch).exp(), self.low, self.high), batch.mask)


@dataclass(frozen=True, kw_only=True)
class IcePop(Correction):
    """Masked importance sampling of each token: w_t = r_t if low <= r_t <= high, else 0.

    Fixed bounds may reject fewer tokens although the gap grows: read `rejected_frac` together with `k3_kl`. Source:
    Ring-1T, arXiv 2510.18855.
    """

    low: float = 0.5
    """Smallest ratio that is kept."""
    high: float = 5.0
    """Largest ratio that is kept."""

    def __post_init__(self) -> None:
        check_range(self.low, self.high)

    def weights(self, batch: Step) -> Float[Tensor, "B T"]:
        return inside(token_log_ratio(batch).exp(), self.low, self.high) * batch.mask


@dataclass(frozen=True, kw_only=True)
class GeometricMask(Correction):
    """Keep a sequence whole or not at all: w = 1 if low <= exp(mean_t d_t) <= high, else 0.

    bf16 alone moves the mean by about 0.05 / sqrt(tokens) nats: below some 50 tokens the default range rejects clean
    sequences. Source: geometric rejection in verl and SkyRL, whose range this is.
    """

    low: float = 0.99
    """Smallest ratio that is kept."""
    high: float = 1.01
    """Largest ratio that is kept."""

    def __post_init__(self) -> None:
        check_range(self.low, self.high)

    def weights(self, batch: Step) -> Float[Tensor, "B T"]:
        mean = masked_mean(token_log_ratio(batch), batch.mask).exp()
        return spread(((mean >= self.low) & (mean <= self.high)).float(), batch.mask)
