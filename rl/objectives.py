"""What is maximised: each objective is one frozen dataclass with two pure methods."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rl.advantages import gae, group_relative, spread, whiten
from rl.kl import Estimator
from rl.reduce import AverageOver, masked_mean
from rl.types import Batch, Metrics, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Subclass this, write the two methods, and pass an instance as `Config.objective`: that is all.

    `loss` returns a per-token loss [B, T] to be minimised; the trainer masks it, averages it (`average_over`) and
    reduces it over micro-batches and ranks. Its metrics are tensors of shape [B, T] (averaged over sampled tokens) or
    [B] (over sequences). `batch.old_logprobs` is always set; `batch.values` and `policy.values` are set when
    `uses_values` says so. The KL and entropy terms are added for every objective by `rl.loss.full_loss`.
    """

    kl_coef: float = 0.0
    """Weight of KL(policy || reference); above 0 a frozen copy of the start model is kept."""
    kl_estimator: Estimator = "k3"
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    average_over: AverageOver = "tokens"

    uses_values: ClassVar[bool] = False
    group_relative: ClassVar[bool] = True
    """Whether a group of one sample gives no signal."""

    @abstractmethod
    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Advantage of every token, from the whole step's batch."""

    @abstractmethod
    def loss(
        self, policy: PolicyOutput, batch: Batch, advantages: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Metrics]:
        """Per-token loss and metrics of one micro-batch."""


def clipped_surrogate(
    log_ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"], clip_low: float, clip_high: float
) -> tuple[Float[Tensor, "B T"], Metrics]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token, and how often each side binds.

    Source: PPO, arXiv 1707.06347, eq. 7; asymmetric bounds: DAPO, arXiv 2503.14476.
    """
    ratio = log_ratio.exp()
    free = -ratio * advantages
    held = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    low = ((ratio < 1.0 - clip_low) & (advantages < 0)).float()
    high = ((ratio > 1.0 + clip_high) & (advantages > 0)).float()
    metrics = {"actor/clip_frac": low + high, "actor/clip_frac_low": low, "actor/clip_frac_high": high}
    return torch.max(free, held), metrics


@dataclass(frozen=True, kw_only=True)
class GRPO(Objective):
    """Group-relative policy optimisation (arXiv 2402.03300, eq. 3), token-level ratio, clipped."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    divide_by_std: bool = True

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        return spread(group_relative(batch.rewards, batch.group_ids, divide_by_std=self.divide_by_std), batch.mask)

    def loss(
        self, policy: PolicyOutput, batch: Batch, advantages: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Metrics]:
        return clipped_surrogate(policy.logprobs - batch.old_logprobs, advantages, self.clip_low, self.clip_high)


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """Group sequence policy optimisation (arXiv 2507.18071, eq. 5 to 7): one ratio per sequence.

    The ratio is the geometric mean of the token ratios, s = exp(mean_t(log pi_t - log old_t)). Its clip range is two
    orders of magnitude tighter than GRPO's; bf16 noise between engine and trainer alone exceeds it. With
    `Config.old_logprobs="auto"` the doctor finds that out and has the trainer recompute the old log-probabilities.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    average_over: AverageOver = "sequences"

    def loss(
        self, policy: PolicyOutput, batch: Batch, advantages: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Metrics]:
        log_s = masked_mean(policy.logprobs - batch.old_logprobs, batch.mask)
        return clipped_surrogate(spread(log_s, batch.mask), advantages, self.clip_low, self.clip_high)


@dataclass(frozen=True, kw_only=True)
class PPO(Objective):
    """Proximal policy optimisation (arXiv 1707.06347) with a value head and GAE (arXiv 1506.02438)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.5
    value_clip: float = 0.2

    uses_values: ClassVar[bool] = True
    group_relative: ClassVar[bool] = False

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        return whiten(gae(batch.rewards, batch.values, batch.mask, gamma=self.gamma, lam=self.lam), batch.mask)

    def loss(
        self, policy: PolicyOutput, batch: Batch, advantages: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Metrics]:
        surrogate, metrics = clipped_surrogate(
            policy.logprobs - batch.old_logprobs, advantages, self.clip_low, self.clip_high
        )
        old = batch.values
        returns = old + gae(batch.rewards, old, batch.mask, gamma=self.gamma, lam=self.lam)
        clipped = old + (policy.values - old).clamp(-self.value_clip, self.value_clip)
        free, held = (policy.values - returns) ** 2, (clipped - returns) ** 2
        vf_loss = 0.5 * torch.max(free, held)
        metrics |= {
            "critic/vf_loss": vf_loss,
            "critic/vf_clipfrac": (held > free).float(),
            # Moments from which the step's explained variance is made once all micro-batches are in.
            "critic/returns": returns,
            "critic/returns_sq": returns**2,
            "critic/residual": returns - old,
            "critic/residual_sq": (returns - old) ** 2,
        }
        return surrogate + self.value_coef * vf_loss, metrics
