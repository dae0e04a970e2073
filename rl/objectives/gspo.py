"""Objectives with one ratio per sequence: GSPO and GMPO.

Each is computed token by token (`rl.objectives.surrogates.token_by_token`): what differs within a sequence (a token's
correction, its entropy, a process reward) stays with its token.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rl.objectives.grpo import GRPO
from rl.objectives.surrogates import check_clip, clipped_surrogate, geometric_mean, token_by_token
from rl.reduce import AverageOver
from rl.types import PolicyOutput, Step, TokenLoss


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """Group sequence policy optimisation (arXiv 2507.18071, eq. 5 to 7): one ratio per sequence.

    The ratio is the geometric mean of the token ratios, s = exp(mean_t(log pi_t - log old_t)), computed as GSPO-token
    (eq. 13 and 14): the same value, and the same gradient where a sequence has one advantage. Its clip range is some
    600 times tighter than GRPO's, and bf16 noise between engine and trainer alone exceeds it. With
    `Config.old_logprobs="auto"` the doctor measures this, and the trainer then recomputes the old log-probabilities.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    average_over: AverageOver = "sequences"

    def loss(self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]) -> TokenLoss:
        log_s = token_by_token(policy.logprobs - batch.old_logprobs, batch.mask)
        return clipped_surrogate(log_s, advantages, self.clip_low, self.clip_high, self.dual_clip)


@dataclass(frozen=True, kw_only=True)
class GMPO(GRPO):
    """Geometric-mean policy optimisation (arXiv 2507.20673, eq. 4): token-wise clip in log space, then the mean.

    loss = -exp(mean_t clip(log r_t, -clip_low, clip_high)) A, clipped on the side that the advantage pushes to. One
    outlier token moves a geometric mean little, hence the wide range, e^-0.4 to e^0.4.
    """

    clip_low: float = 0.4
    """The log-ratio of a token is clipped from below at -clip_low."""
    clip_high: float = 0.4
    """The log-ratio of a token is clipped from above at clip_high."""
    average_over: AverageOver = "sequences"

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            raise ValueError("GMPO clips in log space, before the mean: leave dual_clip=None")

    def loss(self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]) -> TokenLoss:
        log_ratio = policy.logprobs - batch.old_logprobs
        return geometric_mean(log_ratio, advantages, batch.mask, self.clip_low, self.clip_high)
