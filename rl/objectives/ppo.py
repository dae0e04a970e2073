"""The objective with a critic: PPO, whose value head estimates the return from every token on."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rl.objectives.advantages import gae, token_rewards, whiten
from rl.objectives.objective import Objective
from rl.objectives.surrogates import check_clip, clipped_surrogate
from rl.types import Batch, PolicyOutput, Step, TokenLoss, needed


@dataclass(frozen=True, kw_only=True)
class PPO(Objective):
    """Proximal policy optimisation (arXiv 1707.06347) with a value head and GAE (arXiv 1506.02438, eq. 16).

    loss = -min(r A, clip(r) A) + value_coef / 2 max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2), with A whitened
    over the step and R = A_raw + V_old. The value head shares the policy's body and has its own learning rate,
    `trainer.value_lr`.
    """

    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound, above 1 (such as 3.0), on the loss of tokens with a negative advantage and a very large ratio (arXiv
    1912.09729, eq. 5). Default: off."""
    gamma: float = 1.0
    """Discount per token."""
    turn_gamma: float = 1.0
    """Discount per turn of an episode, in addition to that per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation: 0 trusts the critic alone, 1 the rewards alone."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    value_clip: float = 0.2
    """How far a value may move from the old one before its loss is clipped."""
    critic_warmup: int = 0  # pyright: ignore[reportIncompatibleVariableOverride]  # a constant in the base, a field here
    """Optimizer steps at the start in which only the value head learns; the policy changes by weight decay alone."""

    uses_values: ClassVar[bool] = True
    group_relative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high, self.dual_clip)

    def _raw(self, batch: Batch) -> Float[Tensor, "B T"]:
        values = needed(batch.values, "values")
        paid, turn_gamma = token_rewards(batch), self.turn_gamma
        return gae(paid, values, batch.mask, gamma=self.gamma, lam=self.lam, turns=batch.turns, turn_gamma=turn_gamma)

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        return whiten(self._raw(batch), batch.mask)

    def loss(self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]) -> TokenLoss:
        log_ratio = policy.logprobs - batch.old_logprobs
        surrogate, metrics = clipped_surrogate(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)
        old, values = needed(batch.values, "values"), needed(policy.values, "values")
        returns = old + self._raw(batch)
        moved = values - old
        clipped = old + moved.clamp(-self.value_clip, self.value_clip)
        free, held = (values - returns) ** 2, (clipped - returns) ** 2
        vf_loss = 0.5 * torch.max(free, held)
        metrics |= {
            "critic/vf_loss": vf_loss.detach(),
            # Test the bound too, because old + (values - old) differs from `values` in the last bit.
            "critic/vf_clipfrac": ((held > free) & (moved.abs() > self.value_clip)).float(),
            # Moments for the explained variance of the whole step (`rl.parity.mismatch.finish`).
            "critic/returns": returns,
            "critic/returns_sq": returns**2,
            "critic/residual": returns - old,
            "critic/residual_sq": (returns - old) ** 2,
        }
        return surrogate + self.value_coef * vf_loss, metrics
