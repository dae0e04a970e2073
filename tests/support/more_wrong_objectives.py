"""Wrong objectives that were written after the checks, by someone who did not look at how these judge."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import mse_loss

from rl.objectives import GRPO, GSPO, PPO, RLOO, clipped_surrogate
from rl.objectives.advantages import group_sums, spread, whiten
from wrong_objectives import CASES, Case


def wrong(check, words):
    """Register an objective."""

    def register(cls):
        made = dataclass(frozen=True, kw_only=True)(cls)
        CASES.append(Case(cls.__name__, check, words, made))
        return made

    return register


def moved(policy, batch):
    return (policy.logprobs - batch.old_logprobs).clamp(-20, 20)


@wrong("bounds", "a token with a negative advantage at ratio 1 is out of reach")
class WhereClip(GRPO):
    def loss(self, policy, batch, advantages):
        ratio = moved(policy, batch).exp()
        return -torch.where(advantages > 0, ratio.clamp(max=1.2), ratio.clamp(max=0.8)) * advantages, {}


@wrong("bounds", "on both sides")
class ClampedMean(GSPO):
    def loss(self, policy, batch, advantages):
        d = moved(policy, batch).clamp(-0.05, 0.05) * batch.mask
        s = d.sum(1) / batch.mask.sum(1).clamp(min=1)
        return -spread(s.exp(), batch.mask) * advantages, {}


@wrong("critic", "not drawn to the return")
class NormalisedReturns(PPO):
    def loss(self, policy, batch, advantages):
        loss, metrics = GRPO.loss(self, policy, batch, advantages)
        returns = torch.sigmoid(batch.rewards)[:, None].expand_as(policy.values)
        return loss + mse_loss(policy.values, returns, reduction="none"), metrics


@wrong("critic", "not drawn to the return")
class ValueOfAdvantage(PPO):
    def loss(self, policy, batch, advantages):
        surrogate, metrics = clipped_surrogate(moved(policy, batch), advantages, 0.2, 0.2)
        return surrogate + 0.5 * (policy.values - advantages) ** 2, metrics


@wrong("policy gradient+critic", "it does not depend on the advantages")
class LiveBaseline(PPO):
    def loss(self, policy, batch, advantages):
        own = batch.rewards[:, None] - policy.values
        return -moved(policy, batch).exp() * own + 0.5 * (policy.values - batch.rewards[:, None]) ** 2, {}


@wrong("position", "a column is used as a position")
class FirstColumn(GRPO):
    def advantages(self, batch):
        steps = torch.arange(batch.mask.shape[1]) - int(batch.mask.int().argmax(dim=1).min())
        return super().advantages(batch) * (0.95 ** steps.clamp(min=0))


@wrong("mask+position", "with three more columns of padding")
class DecayFromEnd(RLOO):
    def advantages(self, batch):
        width = batch.mask.shape[1]
        return super().advantages(batch) * 0.97 ** (width - 1 - torch.arange(width))


@wrong("entropy", "the policy becomes less random")
class EntropyTimesSize(GRPO):
    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        loss, metrics = super().loss(policy, batch, advantages)
        return loss + 0.01 * policy.entropy * advantages.abs(), metrics


@wrong("entropy", "Detach the weight")
class EntropyWeight(GRPO):
    def loss(self, policy, batch, advantages):
        return clipped_surrogate(moved(policy, batch), advantages * policy.entropy, 0.2, 0.2)


@wrong("row order", "Find a group by batch.group_ids")
class Contiguous(GRPO):
    def advantages(self, batch):
        _, counts = torch.unique(batch.group_ids, return_counts=True)
        parts = torch.split(batch.rewards, counts.tolist())
        return spread(batch.rewards - torch.cat([p.mean().repeat(len(p)) for p in parts]), batch.mask)


@wrong("policy gradient", "of the tokens with an advantage have none")
class LastTokenOnly(GRPO):
    def loss(self, policy, batch, advantages):
        last = batch.mask & (batch.mask.flip(1).cumsum(1).flip(1) == 1)
        now = torch.where(last, policy.logprobs, policy.logprobs.detach())
        return -(now - batch.old_logprobs).clamp(-20, 20).exp() * advantages, {}


@wrong("policy gradient", "it depends on how far the policy is from the reference")
class AgainstReference(GRPO):
    uses_reference: ClassVar[bool] = True

    def loss(self, policy, batch, advantages):
        return clipped_surrogate(policy.logprobs - batch.ref_logprobs, advantages, 0.2, 0.2)


@wrong("policy gradient", "it is 2 times that")
class TwoRatios(GRPO):
    def loss(self, policy, batch, advantages):
        second = (policy.logprobs - batch.rollout_logprobs).clamp(-20, 20).exp()
        return -moved(policy, batch).exp() * second * advantages, {}


@wrong("penalty", "the penalty has the wrong sign")
class WrongTrustRegion(GRPO):
    skippable: ClassVar[bool] = False

    def loss(self, policy, batch, advantages):
        d = moved(policy, batch)
        return -d.exp() * advantages - 0.2 * ((-d).exp() - 1 + d), {}


@wrong("NaN", "on a usual step, metric 'relative' is NaN or infinite")
class RelativeReward(GRPO):
    def loss(self, policy, batch, advantages):
        return -moved(policy, batch).exp() * advantages, {"relative": advantages.sum(1) / batch.rewards}


@wrong("NaN", "with a group whose rewards are all equal")
class MinMax(GRPO):
    def advantages(self, batch):
        same = batch.group_ids[:, None] == batch.group_ids
        low, high = (torch.stack([f(batch.rewards[row]) for row in same]) for f in (torch.min, torch.max))
        return spread((batch.rewards - low) / (high - low) - 0.5, batch.mask)


@wrong("NaN", "on a step whose rewards are all equal")
class GroupMeanStepStd(GRPO):
    def advantages(self, batch):
        n = group_sums(torch.ones_like(batch.rewards), batch.group_ids)
        centred = batch.rewards - group_sums(batch.rewards, batch.group_ids) / n
        return spread(centred / centred.std(), batch.mask)


@wrong("pure", "batch.rewards was changed in place")
class OutArgument(GRPO):
    def advantages(self, batch):
        torch.sub(batch.rewards, batch.rewards.min(), out=batch.rewards)
        return super().advantages(batch)


@wrong("columns", "batch.rollout_logprobs of a token changes the gradient of the token 1 column before it")
class ShiftedRollout(GRPO):
    def loss(self, policy, batch, advantages):
        other = torch.cat([batch.rollout_logprobs[:, 1:], batch.rollout_logprobs[:, :1]], 1)
        return -(policy.logprobs - other).clamp(-20, 20).exp() * advantages, {}


@wrong("micro-batches", "may look at one row at a time")
class LongestAtHand(GRPO):
    def loss(self, policy, batch, advantages):
        loss, metrics = super().loss(policy, batch, advantages)
        return loss / batch.mask.sum(1).max().clamp(min=1), metrics


@wrong("micro-batches", "may look at one row at a time")
class RatioNormalised(GRPO):
    def loss(self, policy, batch, advantages):
        ratio = moved(policy, batch).exp()
        mean = (ratio * batch.mask).sum() / batch.mask.sum().clamp(min=1)
        return -ratio / mean.detach().clamp(min=1e-6) * advantages, {}


@wrong("sign", "where the advantage is negative")
class InverseForNegatives(GRPO):
    def loss(self, policy, batch, advantages):
        d = moved(policy, batch)
        return -torch.where(advantages < 0, (-d).exp(), d.exp()) * advantages, {}


@wrong("sign", "An advantage is the reward minus a baseline")
class ReversedAdvantage(PPO):
    def advantages(self, batch):
        return whiten(-self._raw(batch), batch.mask)
