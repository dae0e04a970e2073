"""How to weigh tokens that another policy sampled: importance weights old / rollout, apart from the policy ratio."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rl.advantages import spread
from rl.reduce import masked_mean
from rl.types import Batch


@dataclass(frozen=True, kw_only=True)
class TruncatedIS:
    """Truncated importance sampling: w = min(old / rollout, cap), detached from the gradient.

    `level="token"` takes the ratio of each token, `"sequence"` the geometric mean over the sequence's tokens.
    Source: "Your efficient RL framework secretly brings you off-policy RL training" (Yao et al., 2025).
    """

    level: Literal["token", "sequence"] = "token"
    cap: float = 2.0

    def weights(self, batch: Batch) -> Float[Tensor, "B T"]:
        """Weight [B, T] of every token's advantage, without unit."""
        log_ratio = batch.old_logprobs - batch.rollout_logprobs
        if self.level == "sequence":
            log_ratio = spread(masked_mean(log_ratio, batch.mask), batch.mask)
        return log_ratio.detach().exp().clamp(max=self.cap)
