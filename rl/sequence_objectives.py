"""Objectives whose ratio belongs to a whole sequence: GSPO, GSPO-token and GMPO."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rl.reduce import AverageOver
from rl.surrogates import clipped_surrogate, geometric_mean, sequence_log_ratio
from rl.token_objectives import GRPO
from rl.types import Batch, Metrics, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """Group sequence policy optimisation (arXiv 2507.18071, eq. 5 to 7): one ratio per sequence.

    The ratio is the geometric mean of the token ratios, s = exp(mean_t(log pi_t - log old_t)). Its clip range is some
    600 times tighter than GRPO's; bf16 noise between engine and trainer alone exceeds it. With
    `Config.old_logprobs="auto"` the doctor finds that out and has the trainer recompute the old log-probabilities.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    average_over: AverageOver = "sequences"

    def loss(
        self, policy: PolicyOutput, batch: Batch, advantages: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Metrics]:
        log_s = sequence_log_ratio(policy.logprobs - batch.old_logprobs, batch.mask)
        return clipped_surrogate(log_s, advantages, self.clip_low, self.clip_high, self.dual_clip)


@dataclass(frozen=True, kw_only=True)
class GSPOToken(GSPO):
    """GSPO-token (arXiv 2507.18071, eq. 13 and 14): GSPO's ratio and clip, with a gradient token by token.

    s_t = sg(s) pi_t / sg(pi_t) is as large as s, but token t alone moves it. The same as GSPO while all tokens of a
    sequence share one advantage; for advantages that differ within a sequence.
    """

    stop_gradient: ClassVar[bool] = True

    def loss(
        self, policy: PolicyOutput, batch: Batch, advantages: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Metrics]:
        log_s = sequence_log_ratio(policy.logprobs - batch.old_logprobs, batch.mask).detach()
        own = policy.logprobs - policy.logprobs.detach()
        return clipped_surrogate(log_s + own, advantages, self.clip_low, self.clip_high, self.dual_clip)


@dataclass(frozen=True, kw_only=True)
class GMPO(GRPO):
    """Geometric-mean policy optimisation (arXiv 2507.20673, eq. 4): token-wise clip in log space, then the mean.

    loss = -exp(mean_t clip(log r_t, -clip_low, clip_high)) A, clipped on the side that the advantage pushes to. One
    outlier token moves a geometric mean little, hence the wide range, e^-0.4 to e^0.4.
    """

    clip_low: float = 0.4
    clip_high: float = 0.4
    average_over: AverageOver = "sequences"

    def __post_init__(self) -> None:
        if self.dual_clip is not None:
            raise ValueError("GMPO clips in log space, before the mean: leave dual_clip=None")

    def loss(
        self, policy: PolicyOutput, batch: Batch, advantages: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Metrics]:
        log_ratio = policy.logprobs - batch.old_logprobs
        return geometric_mean(log_ratio, advantages, batch.mask, self.clip_low, self.clip_high)
