"""Objectives that are right, and unusual: the contract checker must accept each."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import huber_loss

from rl.objectives import GRPO, Objective, clipped_surrogate
from rl.objectives.advantages import group_relative, group_sums, spread
from rl.objectives.kl import kl_estimate
from rl.objectives.ratios import ratio_of
from rl.reduce import AverageOver, masked_mean

ACCEPTED: list[Any] = []


def right(cls):
    """Register an objective."""
    made = dataclass(frozen=True, kw_only=True)(cls)
    ACCEPTED.append(made)
    return made


def moved(policy, batch):
    return policy.logprobs - batch.old_logprobs


class Reinforce(Objective):
    """-A log pi on the reward minus its group's mean."""

    def advantages(self, batch):
        return spread(group_relative(batch.rewards, batch.group_ids, divide_by_std=False), batch.mask)

    def loss(self, policy, batch, advantages):
        return -advantages * policy.logprobs, {}


@right
class ReinforceWithBaseline(Reinforce): ...


@right
class ReinforceWithoutBaseline(Reinforce):
    group_relative: ClassVar[bool] = False

    def advantages(self, batch):
        return spread(batch.rewards, batch.mask)


@right
class OwnLeaveOneOut(Reinforce):
    def advantages(self, batch):
        n = group_sums(torch.ones_like(batch.rewards), batch.group_ids)
        others = (group_sums(batch.rewards, batch.group_ids) - batch.rewards) / (n - 1)
        return spread(batch.rewards - others, batch.mask)


@right
class OverTheHorizon(Reinforce):
    average_over: AverageOver = "constant"


@right
class ByLengthInTheAdvantages(Reinforce):
    """A / length: the weights are part of the advantage."""

    def advantages(self, batch):
        length = batch.mask.sum(dim=1, keepdim=True).clamp(min=1)
        return super().advantages(batch) / length


@right
class ByLengthOverAConstant(Reinforce):
    """A mean over each sequence, over a constant."""

    average_over: AverageOver = "constant"

    def loss(self, policy, batch, advantages):
        length = batch.mask.sum(dim=1, keepdim=True).clamp(min=1)
        return -ratio_of(moved(policy, batch)) * advantages / length, {"length": length[:, 0].float()}


@right
class PlainSequenceRatio(GRPO):
    """GSPO as its paper writes it, without the trick of a ratio per token."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    average_over: AverageOver = "sequences"

    def loss(self, policy, batch, advantages):
        s = spread(masked_mean(moved(policy, batch), batch.mask), batch.mask)
        return clipped_surrogate(s, advantages, self.clip_low, self.clip_high)


@right
class AsymmetricClip(GRPO):
    clip_low: float = 0.1
    clip_high: float = 0.5
    dual_clip: float | None = 2.0


@right
class StoppedWeights(GRPO):
    """CISPO with a lower bound too."""

    stop_gradient: ClassVar[bool] = True

    def loss(self, policy, batch, advantages):
        weight = ratio_of(moved(policy, batch)).clamp(0.5, 2.0).detach()
        return -weight * advantages * policy.logprobs, {"actor/weight": weight}


@right
class ExponentialWeights(Objective):
    """AWR: a likelihood, weighted by exp(A / beta); weights below 20."""

    def advantages(self, batch):
        a = group_relative(batch.rewards, batch.group_ids, divide_by_std=False)
        return spread((a / 0.5).exp().clamp(max=20.0), batch.mask)

    def loss(self, policy, batch, advantages):
        return -advantages * policy.logprobs, {}


@right
class ExponentialWeightsInTheLoss(Reinforce):
    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        return -(advantages / 0.5).exp().clamp(max=20.0) * policy.logprobs, {}


@right
class ContrastInAGroup(Reinforce):
    """Online DPO: each pair of a group with different rewards, weighted by sigmoid(-beta margin)."""

    uses_old_logprobs: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = True
    average_over: AverageOver = "constant"

    def advantages(self, batch):
        score = 0.1 * ((batch.old_logprobs - batch.ref_logprobs) * batch.mask).sum(dim=1)
        same = batch.group_ids[:, None] == batch.group_ids
        better = (batch.rewards[:, None] > batch.rewards) & same
        weight = torch.sigmoid(-(score[:, None] - score)) * better
        return spread(0.1 * (weight.sum(dim=1) - weight.sum(dim=0)), batch.mask)


@right
class WithEntropy(GRPO):
    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        surrogate, metrics = super().loss(policy, batch, advantages)
        return surrogate - 0.01 * policy.entropy, metrics | {"mine/entropy": policy.entropy.detach()}


@right
class OwnKL(GRPO):
    uses_reference: ClassVar[bool] = True
    skippable: ClassVar[bool] = False
    estimator: str = "k3"

    def loss(self, policy, batch, advantages):
        surrogate, metrics = super().loss(policy, batch, advantages)
        kl = kl_estimate(policy.logprobs, batch.ref_logprobs, self.estimator)
        return surrogate + 0.1 * kl, metrics | {"mine/kl": kl.detach()}


@right
class OwnSquaredKL(OwnKL):
    estimator: str = "k2"


@right
class WeightedKL(GRPO):
    """k1 times the ratio: its gradient is that of the KL."""

    uses_reference: ClassVar[bool] = True
    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        ratio = ratio_of(moved(policy, batch))
        return -ratio * advantages + 0.05 * ratio * (policy.logprobs - batch.ref_logprobs), {}


@right
class KLInTheReward(Reinforce):
    uses_reference: ClassVar[bool] = True
    uses_old_logprobs: ClassVar[bool] = True

    def advantages(self, batch):
        kl = ((batch.old_logprobs - batch.ref_logprobs) * batch.mask).sum(dim=1)
        return spread(group_relative(batch.rewards - 0.05 * kl, batch.group_ids, divide_by_std=True), batch.mask)


@right
class WithLikelihood(GRPO):
    """A likelihood term on rewarded replies, as in supervised fine-tuning."""

    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        surrogate, metrics = super().loss(policy, batch, advantages)
        return surrogate - 0.1 * policy.logprobs * (batch.rewards > 0)[:, None], metrics


@right
class RejectionSampling(Objective):
    """Supervised fine-tuning on the replies above a threshold."""

    group_relative: ClassVar[bool] = False

    def advantages(self, batch):
        return spread((batch.rewards > 0.6).float(), batch.mask)

    def loss(self, policy, batch, advantages):
        return -advantages * policy.logprobs, {}


@right
class OwnCritic(Objective):
    """PPO with a Huber loss of its own, and the baseline at every token."""

    uses_values: ClassVar[bool] = True
    group_relative: ClassVar[bool] = False

    def advantages(self, batch):
        return spread(batch.rewards, batch.mask) - batch.values

    def loss(self, policy, batch, advantages):
        surrogate, metrics = clipped_surrogate(moved(policy, batch), advantages, 0.2, 0.2)
        returns = batch.rewards[:, None].expand_as(policy.values)
        value = huber_loss(policy.values, returns, reduction="none")
        return surrogate + 0.3 * value, metrics | {"critic/loss": value.detach()}


@right
class NearOld(Reinforce):
    """The quadratic penalty of tests/e2e/recipes/echo.py."""

    group_relative: ClassVar[bool] = False
    skippable: ClassVar[bool] = False

    def advantages(self, batch):
        return spread(batch.rewards - batch.rewards.mean(), batch.mask)

    def loss(self, policy, batch, advantages):
        move = moved(policy, batch)
        return -advantages * policy.logprobs + 0.1 * move**2, {"actor/move": move.abs().detach()}


@right
class SimplePolicyOptimisation(GRPO):
    """SPO, arXiv 2401.16025: a penalty |A| (r - 1)^2 / (2 eps) in place of the clip."""

    def loss(self, policy, batch, advantages):
        ratio = ratio_of(moved(policy, batch))
        return -ratio * advantages + advantages.abs() * (ratio - 1) ** 2 / 0.4, {}


@right
class MirrorDescent(Reinforce):
    """Kimi k1.5, arXiv 2501.12599: (A - tau log r)^2 / (2 tau)."""

    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        return (advantages - 0.2 * moved(policy, batch)) ** 2 / 0.4, {}


@right
class NegativesCountLess(Reinforce):
    def loss(self, policy, batch, advantages):
        weight = torch.where(advantages > 0, 1.0, 0.3)
        return -ratio_of(moved(policy, batch)) * weight * advantages, {}


@right
class DiscountedFromTheEnd(Reinforce):
    """Tokens near the end of a reply count more; the place is counted in sampled tokens."""

    def advantages(self, batch):
        left = batch.mask.flip(1).cumsum(dim=1).flip(1) - 1
        return super().advantages(batch) * 0.9**left


@right
class BothSidesMasked(GRPO):
    """A mask on both sides, declared."""

    on_purpose: ClassVar[tuple[str, ...]] = ("bounds",)

    def loss(self, policy, batch, advantages):
        ratio = ratio_of(moved(policy, batch))
        near = (ratio.detach() - 1).abs() < 0.2
        return -ratio * near * advantages, {"actor/masked": (~near).float()}


@right
class MedianBaseline(Reinforce):
    def advantages(self, batch):
        same = batch.group_ids[:, None] == batch.group_ids
        median = torch.stack([batch.rewards[row].median() for row in same])
        return spread(batch.rewards - median, batch.mask)


@right
class BestAndWorst(Reinforce):
    """+1 for the best of a group, -1 for the worst."""

    def advantages(self, batch):
        same = batch.group_ids[:, None] == batch.group_ids
        best = torch.stack([batch.rewards[row].max() for row in same])
        worst = torch.stack([batch.rewards[row].min() for row in same])
        return spread((batch.rewards == best).float() - (batch.rewards == worst).float(), batch.mask)
