"""Objectives without a critic and with one ratio per token: GRPO and its variants."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

from rl.objectives.advantages import group_relative, kept_by_second_moment, spread
from rl.objectives.corrections import Uncorrected
from rl.objectives.objective import Objective
from rl.objectives.surrogates import check_clip, clipped_surrogate, reinforce, soft_gate, truncated_reinforce
from rl.reduce import AverageOver
from rl.types import Batch, PolicyOutput, Step, TokenLoss, needed

if TYPE_CHECKING:
    import rl.config


@dataclass(frozen=True, kw_only=True)
class GRPO(Objective):
    """Group-relative policy optimisation (arXiv 2402.03300, eq. 3), token-level ratio, clipped.

    A = (R - mean of its group) / (std of its group + 1e-4); loss = -min(r A, clip(r) A). The paper averages over
    sequences (`average_over="sequences"`); the default counts every token alike, as most do since DAPO.
    """

    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    divide_by_std: bool = True
    """Divide advantages by the standard deviation of the group's rewards."""
    dual_clip: float | None = None
    """Bound, above 1 (such as 3.0), on the loss of tokens with a negative advantage and a very large ratio (arXiv
    1912.09729, eq. 5). Default: off."""

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high, self.dual_clip)

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        return spread(group_relative(batch.rewards, batch.group_ids, divide_by_std=self.divide_by_std), batch.mask)

    def loss(self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]) -> TokenLoss:
        log_ratio = policy.logprobs - batch.old_logprobs
        return clipped_surrogate(log_ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO done right (Dr. GRPO, arXiv 2503.20783, section 3.2): A = R - mean of its group, a sum over tokens.

    Without the division by std, easy and hard prompts count alike; with a constant divisor instead of each reply's
    length, long wrong replies are not favoured.
    """

    divide_by_std: bool = False
    average_over: AverageOver = "constant"


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """The loss of DAPO (arXiv 2503.14476, eq. 8): GRPO with clip-higher, averaged over tokens.

    Its other two parts are not the loss's: `filters=(ZeroAdvantage(),)` is its dynamic sampling (rl/filters.py), and
    `reward=SoftOverlong(...)` its soft punishment of long replies (rl/rewards/shaping.py).
    """

    clip_high: float = 0.28


@dataclass(frozen=True, kw_only=True)
class CISPO(GRPO):
    """Clipped importance-sampling policy optimisation (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: rare tokens that PPO would clip away keep a gradient. No
    lower bound by default, as in the paper, which gives no number for the upper one; TRL advises a weight of at most 5.
    """

    clip_low: float = 1.0
    clip_high: float = 4.0

    stop_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            raise ValueError("CISPO bounds the weight of every token already: leave dual_clip=None")

    def loss(self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]) -> TokenLoss:
        log_ratio = policy.logprobs - batch.old_logprobs
        return truncated_reinforce(policy.logprobs, log_ratio, advantages, self.clip_low, self.clip_high)


@dataclass(frozen=True, kw_only=True)
class SAPO(Objective):
    """Soft adaptive policy optimisation (arXiv 2511.20347, eq. 5 to 8): a soft gate in place of the clip.

    loss = -4 / tau sigmoid(tau (r - 1)) A. Gradients of negative advantages spread over the whole vocabulary, so their
    gate fades a little faster.
    """

    tau_positive: float = 1.0
    """Steepness of the gate for positive advantages; a larger one fades earlier."""
    tau_negative: float = 1.05
    """Steepness of the gate for negative advantages."""
    divide_by_std: bool = True
    """Divide advantages by the standard deviation of the group's rewards."""
    average_over: AverageOver = "sequences"

    def __post_init__(self) -> None:
        if min(self.tau_positive, self.tau_negative) <= 0:
            raise ValueError(f"SAPO's tau ({self.tau_positive:g}, {self.tau_negative:g}) must be above 0")

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        return spread(group_relative(batch.rewards, batch.group_ids, divide_by_std=self.divide_by_std), batch.mask)

    def loss(self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]) -> TokenLoss:
        return soft_gate(policy.logprobs - batch.old_logprobs, advantages, self.tau_positive, self.tau_negative)


@dataclass(frozen=True, kw_only=True)
class M2PO(Objective):
    """Second-moment trust policy optimisation (arXiv 2510.01161), for samples many versions old.

    Tokens leave the step, largest (log r)^2 first, until the mean of (log r)^2 over those that stay is at most
    `second_moment`; loss = -r A over them, unclipped. Here r is policy / rollout, so leave `Config.correction` off. The
    mask is made once, from the policy at the start of the step. Tokens that left still count in the denominator.
    """

    second_moment: float = 0.04
    """Largest mean of (log r)^2 of the tokens that stay in the step, in nats squared."""
    divide_by_std: bool = True
    """Divide advantages by the standard deviation of the group's rewards."""

    uses_old_logprobs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.second_moment <= 0:
            raise ValueError(f"second_moment={self.second_moment:g} must be above 0: no token would be left")

    def check(self, config: "rl.config.Config") -> None:
        """A correction would count the mismatch a second time."""
        if not isinstance(config.correction, Uncorrected):
            raise ValueError(
                f"M2PO's ratio is policy / rollout already, so {type(config.correction).__name__} would count the "
                "mismatch twice: leave `correction` at its default"
            )

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        advantages = group_relative(batch.rewards, batch.group_ids, divide_by_std=self.divide_by_std)
        drift = needed(batch.old_logprobs, "old_logprobs") - batch.rollout_logprobs
        return spread(advantages, batch.mask) * kept_by_second_moment(drift, batch.mask, self.second_moment)

    def loss(self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]) -> TokenLoss:
        log_ratio = policy.logprobs - batch.rollout_logprobs
        return reinforce(log_ratio, advantages), {"actor/second_moment": log_ratio.detach() ** 2}
