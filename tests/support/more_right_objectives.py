"""More right and unusual objectives, written after the checks by someone who did not look at how these judge."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from right_objectives import moved, right
from rl.objectives import GRPO, RLOO, Objective, clipped_surrogate
from rl.objectives.advantages import gae, group_relative, spread, token_rewards
from rl.reduce import AverageOver, masked_mean


def bounded(policy, batch):
    return moved(policy, batch).clamp(-20, 20)


@right
class OwnTIS(GRPO):
    def loss(self, policy, batch, advantages):
        wt = (batch.old_logprobs - batch.rollout_logprobs).clamp(-20, 20).exp().clamp(max=2).detach()
        s, m = clipped_surrogate(bounded(policy, batch), advantages, 0.2, 0.28)
        return s * wt, {**m, "w": wt}


@right
class HighEntropyTokens(GRPO):
    """only tokens above the reply's mean entropy"""

    def loss(self, policy, batch, advantages):
        e = policy.entropy.detach()
        keep = e >= spread(masked_mean(e, batch.mask), batch.mask)
        s, m = clipped_surrogate(bounded(policy, batch), advantages, 0.2, 0.2)
        return s * keep, m


@right
class Ranks(RLOO):
    def advantages(self, batch):
        same = batch.group_ids[:, None] == batch.group_ids
        wins = ((batch.rewards[:, None] > batch.rewards) & same).sum(1) - (
            (batch.rewards[:, None] < batch.rewards) & same
        ).sum(1)
        return spread(wins.float(), batch.mask)


@right
class RatioMinusOne(GRPO):
    def loss(self, policy, batch, advantages):
        r = bounded(policy, batch).exp()
        return -torch.min((r - 1) * advantages, (r.clamp(0.8, 1.2) - 1) * advantages), {}


@right
class TDCritic(Objective):
    uses_values: ClassVar[bool] = True
    group_relative: ClassVar[bool] = False
    gamma: float = 0.99

    def _adv(self, batch):
        return gae(token_rewards(batch), batch.values, batch.mask, gamma=self.gamma, lam=0.9)

    def advantages(self, batch):
        return self._adv(batch)

    def loss(self, policy, batch, advantages):
        s, m = clipped_surrogate(bounded(policy, batch), advantages, 0.2, 0.2)
        return s + 0.5 * (policy.values - (self._adv(batch) + batch.values)) ** 2, m


@right
class ReturnsFromAdvantages(TDCritic):
    def loss(self, policy, batch, advantages):
        s, m = clipped_surrogate(bounded(policy, batch), advantages, 0.2, 0.2)
        return s + 0.5 * F.smooth_l1_loss(policy.values, advantages + batch.values, reduction="none"), m


@right
class Tempered(GRPO):
    def loss(self, policy, batch, advantages):
        r = bounded(policy, batch)
        return -advantages * torch.tanh(r), {}


@right
class NegOnlyClip(GRPO):
    def loss(self, policy, batch, advantages):
        r = bounded(policy, batch).exp()
        return torch.where(advantages >= 0, -r * advantages, -r.clamp(min=0.8, max=10.0) * advantages), {}


@right
class OffPolicySequenceMask(GRPO):
    """DeepSeek V3.2: negative sequences with a large KL are masked"""

    def loss(self, policy, batch, advantages):
        d = bounded(policy, batch)
        far = (masked_mean(-d.detach(), batch.mask) > 0.5)[:, None] & (advantages < 0)
        s, m = clipped_surrogate(d, advantages, 0.2, 0.2)
        return s * ~far, m | {"masked": far.float()}


@right
class KlCovariance(GRPO):
    """own k2 to old, on clipped tokens"""

    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        d = bounded(policy, batch)
        return -d.exp() * advantages + 0.5 * d**2, {}


@right
class MeanOfStep(GRPO):
    group_relative: ClassVar[bool] = False

    def advantages(self, batch):
        r = batch.rewards
        return spread((r - r.mean()) / (r.std(unbiased=False) + 1e-6), batch.mask)


@right
class LengthPenalised(GRPO):
    def advantages(self, batch):
        r = batch.rewards - 0.01 * batch.mask.sum(1)
        return spread(group_relative(r, batch.group_ids, divide_by_std=False), batch.mask)


@right
class SqrtLength(RLOO):
    def advantages(self, batch):
        return super().advantages(batch) / batch.mask.sum(1, keepdim=True).clamp(min=1).sqrt()


@right
class DPOInLossMargin(GRPO):
    """KTO-like: sigmoid of the sequence margin, sign by advantage"""

    uses_reference: ClassVar[bool] = True
    average_over: AverageOver = "sequences"
    on_purpose: ClassVar[tuple[str, ...]] = ("policy gradient",)

    def loss(self, policy, batch, advantages):
        m = masked_mean(policy.logprobs - batch.ref_logprobs, batch.mask)
        return -torch.sigmoid(0.5 * advantages.sign() * spread(m, batch.mask)) * advantages.abs(), {}


@right
class NLLOnBest(GRPO):
    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        s, m = clipped_surrogate(bounded(policy, batch), advantages, 0.2, 0.2)
        return s - 0.1 * policy.logprobs * (advantages > 0), m


@right
class PlainNLL(GRPO):
    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        s, m = clipped_surrogate(bounded(policy, batch), advantages, 0.2, 0.2)
        return s - 0.02 * policy.logprobs, m


@right
class AbsKL(GRPO):
    """k3 with reference, importance-weighted (GRPO correction in DeepSeek V3.2)"""

    skippable: ClassVar[bool] = False
    uses_reference: ClassVar[bool] = True

    def loss(self, policy, batch, advantages):
        s, m = clipped_surrogate(bounded(policy, batch), advantages, 0.2, 0.2)
        d = (batch.ref_logprobs - policy.logprobs).clamp(-20, 20)
        return s + 0.01 * bounded(policy, batch).exp() * (d.exp() - d - 1), m
