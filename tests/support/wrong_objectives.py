"""Objectives that are wrong, each in one way, with the check and the words that must name it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from rl.objectives import GRPO, Objective, clipped_surrogate
from rl.objectives.advantages import group_relative, group_sums, spread, whiten
from rl.objectives.kl import kl_estimate
from rl.objectives.ratios import ratio_of
from rl.reduce import masked_mean


@dataclass
class Case:
    """A wrong objective, the check that must find it, and words of the message."""

    name: str
    check: str
    words: str
    make: Any
    line: str = field(default="")
    """A piece of the source line that the message must point to."""


CASES: list[Case] = []


def planted(base=GRPO, **members):
    """GRPO with its clip wide open (or another base) and some members that are wrong."""
    namespace = {"__annotations__": {}, **members}
    cls = dataclass(frozen=True, kw_only=True)(type("Planted", (base,), namespace))
    return cls(clip_low=0.9, clip_high=9.0) if base is GRPO else cls()


def wrong(check, words, line="", **members):
    """Register a loss (or, by its name, an advantage) as a wrong objective."""

    def register(function):
        method = "advantages" if function.__code__.co_argcount == 2 else "loss"
        CASES.append(Case(function.__name__, check, words, lambda: planted(**{method: function}, **members), line))
        return function

    return register


def moved(policy, batch):
    return policy.logprobs - batch.old_logprobs


def right(policy, batch, advantages):
    return -ratio_of(moved(policy, batch)) * advantages


# -- bounds ------------------------------------------------------------------------------------------------------------


@wrong("bounds", "on the wrong side: a token with a positive advantage that became less likely (ratio 0.74)")
def best_of_both_instead_of_worst(self, policy, batch, advantages):
    ratio = ratio_of(moved(policy, batch))
    return torch.min(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages), {}


@wrong("bounds", "on both sides: a token with a positive advantage that became less likely (ratio 0.74)")
def clipped_on_both_sides(self, policy, batch, advantages):
    return -ratio_of(moved(policy, batch)).clamp(0.8, 1.2) * advantages, {}


@wrong("bounds", "on the wrong side: a token with a positive advantage")
def clipped_from_below_alone(self, policy, batch, advantages):
    return -ratio_of(moved(policy, batch)).clamp(min=0.8) * advantages, {}


@wrong("bounds", "on the wrong side: a token with a negative advantage that became more likely")
def clipped_from_above_alone(self, policy, batch, advantages):
    return -ratio_of(moved(policy, batch)).clamp(max=1.2) * advantages, {}


@wrong("bounds", "on both sides", average_over="sequences", __annotations__={"average_over": str})
def sequence_ratio_clipped_on_both_sides(self, policy, batch, advantages):
    s = spread(masked_mean(moved(policy, batch), batch.mask), batch.mask)
    return -ratio_of(s).clamp(1 - 3e-4, 1 + 4e-4) * advantages, {}


@wrong("bounds", "on both sides")
def both_sides_masked(self, policy, batch, advantages):
    ratio = ratio_of(moved(policy, batch))
    return -ratio * ((ratio - 1).abs() < 0.2) * advantages, {}


# -- numbers that are not finite ---------------------------------------------------------------------------------------


@wrong("NaN", "with a group whose rewards are all equal, the advantages are NaN", line="centred / (var**0.5)")
def group_std_without_eps(self, batch):
    count = group_sums(torch.ones_like(batch.rewards), batch.group_ids)
    centred = batch.rewards - group_sums(batch.rewards, batch.group_ids) / count
    var = group_sums(centred**2, batch.group_ids) / count
    return spread(centred / (var**0.5), batch.mask)


@wrong("NaN", "on a step whose rewards are all equal", group_relative=False, line="/ batch.rewards.std()")
def step_std_without_eps(self, batch):
    return spread((batch.rewards - batch.rewards.mean()) / batch.rewards.std(), batch.mask)


@wrong("NaN", "with a reply of one token", line="x.std()")
def std_over_the_tokens_of_a_reply(self, policy, batch, advantages):
    rows = [policy.logprobs[i][m] for i, m in enumerate(batch.mask)]
    size = torch.stack([x.std() if len(x) else x.sum() for x in rows])
    return right(policy, batch, advantages) + 0.0 * size[:, None], {}


@wrong("NaN", "on a usual step, the loss is NaN", line="advantages.log()")
def log_of_the_advantages(self, policy, batch, advantages):
    return -advantages.log() * policy.logprobs, {}


@wrong("NaN", "the gradient is NaN", skippable=False, line=".sqrt()")
def root_without_a_gradient_at_zero(self, policy, batch, advantages):
    return right(policy, batch, advantages) + 0.01 * (moved(policy, batch) ** 2).sqrt(), {}


@wrong("empty mask", "with a row whose mask is empty", line="/ batch.mask.sum(dim=1)")
def nan_without_tokens(self, policy, batch, advantages):
    s = (moved(policy, batch) * batch.mask).sum(dim=1) / batch.mask.sum(dim=1)
    return clipped_surrogate(s[:, None] * torch.ones_like(advantages), advantages, 0.9, 9.0)


@wrong("extreme ratios", "a log-ratio of 100 nats", line="ratio = moved(policy, batch).exp()")
def overflowing(self, policy, batch, advantages):
    ratio = moved(policy, batch).exp()
    return torch.max(-ratio * advantages, -ratio.clamp(0.1, 10.0) * advantages), {}


@wrong("groups", "gets advantages up to", line="def rounded_mean")
def rounded_mean(self, batch):
    count = group_sums(torch.ones_like(batch.rewards), batch.group_ids)
    centred = batch.rewards - group_sums(batch.rewards, batch.group_ids) / count
    var = group_sums(centred**2, batch.group_ids) / count
    return spread(centred / (var.sqrt() + 1e-9), batch.mask)


# -- the other terms ---------------------------------------------------------------------------------------------------


class Critic(Objective):
    uses_values = True
    group_relative = False

    def advantages(self, batch):
        return spread(batch.rewards, batch.mask) - batch.values


def value_loss(target, sign=1.0):
    def loss(self, policy, batch, advantages):
        return right(policy, batch, advantages) + sign * 0.5 * (policy.values - target(batch, advantages)) ** 2, {}

    return loss


def add(name, check, words, line="", **members):
    CASES.append(Case(name, check, words, lambda: planted(**members), line))


def reward(batch, advantages):
    return batch.rewards[:, None]


add("critic_repelled", "critic", "wrong sign", base=Critic, loss=value_loss(reward, -1.0))
add(
    "critic_of_scaled",
    "critic",
    "not drawn to the return",
    base=Critic,
    loss=value_loss(lambda b, a: b.rewards[:, None] / 10),
)
add(
    *("critic_of_whitened", "critic", "neither whitened nor scaled"),
    base=Critic,
    loss=value_loss(lambda b, a: b.values + a),
    advantages=lambda self, batch: whiten(Critic.advantages(self, batch), batch.mask),
)
add(
    "critic_untrained", "critic", "nothing trains the critic", base=Critic, loss=lambda s, p, b, a: (right(p, b, a), {})
)


@wrong("critic", "the policy loss reaches the critic", base=Critic, skippable=False)
def baseline_not_detached(self, policy, batch, advantages):
    own = batch.rewards[:, None] - policy.values
    return right(policy, batch, advantages) - 0.0 * own + 0.5 * own**2 - 0.1 * own * policy.logprobs, {}


@wrong("entropy", "so the policy becomes less random", skippable=False)
def entropy_added(self, policy, batch, advantages):
    return right(policy, batch, advantages) + 0.01 * policy.entropy, {}


@wrong(
    "penalty",
    "wrong sign: a token 2 nats above the reference is pushed further up",
    skippable=False,
    uses_reference=True,
)
def kl_subtracted(self, policy, batch, advantages):
    return right(policy, batch, advantages) - 0.1 * kl_estimate(policy.logprobs, batch.ref_logprobs, "k3"), {}


@wrong("penalty", "on average over samples such a gradient is 0", skippable=False, uses_reference=True)
def kl_without_a_gradient(self, policy, batch, advantages):
    return right(policy, batch, advantages) + 0.1 * (policy.logprobs - batch.ref_logprobs), {}


@wrong("penalty", "wrong sign: a token 2 nats above the old policy", skippable=False)
def penalty_subtracted(self, policy, batch, advantages):
    return right(policy, batch, advantages) - 0.1 * moved(policy, batch) ** 2, {}


@wrong("penalty", "the KL in the advantages has the wrong sign", uses_reference=True, uses_old_logprobs=True)
def kl_paid_as_a_reward(self, batch):
    paid = batch.rewards + 0.1 * masked_mean(batch.old_logprobs - batch.ref_logprobs, batch.mask)
    return spread(group_relative(paid, batch.group_ids, divide_by_std=False), batch.mask)


@wrong("zero advantage", "declare `skippable: ClassVar[bool] = False`")
def penalty_not_declared(self, policy, batch, advantages):
    return right(policy, batch, advantages) + 0.1 * moved(policy, batch) ** 2, {}


# -- columns and rows --------------------------------------------------------------------------------------------------


@wrong("position", "a column is used as a position")
def discounted_by_column(self, policy, batch, advantages):
    return right(policy, batch, advantages) * 0.9 ** torch.arange(batch.mask.shape[1]), {}


@wrong("position", "a column is used as a position")
def paid_from_the_fourth_column(self, batch):
    return GRPO().advantages(batch) * (torch.arange(batch.mask.shape[1]) >= 4)


@wrong("mask", "with three more columns of padding")
def divided_by_the_width(self, policy, batch, advantages):
    return right(policy, batch, advantages) / batch.mask.shape[1], {}


@wrong("mask", "numbers at columns outside the mask")
def forgotten_mask(self, policy, batch, advantages):
    return clipped_surrogate(spread(moved(policy, batch).mean(dim=1), batch.mask), advantages, 0.9, 9.0)


@wrong("columns", "batch.old_logprobs of a token changes the gradient of the token 1 column after it")
def old_shifted(self, policy, batch, advantages):
    return -ratio_of(policy.logprobs - batch.old_logprobs.roll(1, dims=1)) * advantages, {}


@wrong("columns", "advantages of a token changes the gradient of the token 1 column before it")
def advantages_shifted(self, policy, batch, advantages):
    return -ratio_of(moved(policy, batch)) * advantages.roll(-1, dims=1), {}


@wrong("micro-batches", "cut into single rows")
def divided_by_the_rows_at_hand(self, policy, batch, advantages):
    return right(policy, batch, advantages) / len(batch.rewards), {}


@wrong("micro-batches", "may look at one row at a time")
def whitened_in_the_micro_batch(self, policy, batch, advantages):
    here = advantages[batch.mask]
    return right(policy, batch, advantages / (here.std(unbiased=False) + 1e-6) if len(here) else advantages), {}


@wrong("row order", "with the rows in another order")
def neighbour_as_baseline(self, batch):
    return spread(batch.rewards - batch.rewards.roll(1), batch.mask)


@wrong("groups", "changes the advantages of another group")
def baseline_of_the_step(self, batch):
    return spread(batch.rewards - batch.rewards.mean(), batch.mask)


@wrong("groups", "changes the advantages of that group")
def no_baseline(self, batch):
    return spread(batch.rewards, batch.mask)


# -- episodes of several rows ------------------------------------------------------------------------------------------


def shifted(mask, by):
    """The mask of the column before (1) or after (-1)."""
    return torch.nn.functional.pad(mask, (1, 0))[:, :-1] if by > 0 else torch.nn.functional.pad(mask, (0, 1))[:, 1:]


def centred_rewards(batch):
    return spread(group_relative(batch.rewards, batch.group_ids, divide_by_std=False), batch.mask)


@wrong("episodes", "with each episode cut into two rows, the advantages change")
def discount_by_gaps_in_the_mask(self, batch):
    begins = batch.mask & ~shifted(batch.mask, 1)
    return centred_rewards(batch) * 0.8 ** (begins.cumsum(dim=1) - 1).clamp(min=0)


@wrong("episodes", "Find a turn by batch.turns and its state by batch.states")
def credit_by_the_token_before(self, batch):
    return centred_rewards(batch) * (1.0 + 0.5 * (batch.input_ids[:, :-1] > 50))


@wrong("episodes", "with each episode cut into two rows, the gradient changes")
def ends_of_turns_weigh_more(self, policy, batch, advantages):
    ends = batch.mask & ~shifted(batch.mask, -1)
    return right(policy, batch, advantages) * (1.0 + 0.5 * ends), {}


# -- the policy gradient -----------------------------------------------------------------------------------------------


@wrong("policy gradient", "the weight's own gradient too")
def weight_not_detached(self, policy, batch, advantages):
    return -ratio_of(moved(policy, batch)).clamp(max=5.0) * advantages * policy.logprobs, {}


@wrong("policy gradient", "ln 2 or its inverse: log-probabilities are in nats")
def bits(self, policy, batch, advantages):
    return -torch.exp2(moved(policy, batch).clamp(-20, 20)) * advantages, {}


@wrong("policy gradient", "it is divided by the log-probability")
def quotient_of_logs(self, policy, batch, advantages):
    return -policy.logprobs / batch.old_logprobs.clamp(max=-1e-3) * advantages, {}


@wrong("policy gradient", "it is multiplied by the token's probability")
def probability(self, policy, batch, advantages):
    return -policy.logprobs.exp() * advantages, {}


@wrong("policy gradient", "there is none")
def detached(self, policy, batch, advantages):
    return -ratio_of(moved(policy, batch).detach()) * advantages, {}


@wrong("policy gradient", "it does not depend on the advantages", skippable=False)
def advantages_forgotten(self, policy, batch, advantages):
    return -policy.logprobs, {}


@wrong("policy gradient", "divided by the length of its sequence once more")
def own_average(self, policy, batch, advantages):
    return right(policy, batch, advantages) / batch.mask.sum(dim=1, keepdim=True).clamp(min=1), {}


@wrong("policy gradient", "multiplied by the length of its sequence")
def sum_over_the_sequence(self, policy, batch, advantages):
    s = (moved(policy, batch) * batch.mask).sum(dim=1)
    return clipped_surrogate(spread(s, batch.mask), advantages, 0.9, 9.0)


@wrong("policy gradient", "it is 2 times that")
def twice(self, policy, batch, advantages):
    return -(ratio_of(moved(policy, batch)) ** 2) * advantages, {}


@wrong("policy gradient", "it is multiplied by the reward")
def reward_twice(self, policy, batch, advantages):
    return right(policy, batch, advantages) * batch.rewards[:, None], {}


@wrong("sign", "it has the wrong sign. loss is minimised")
def maximised(self, policy, batch, advantages):
    return -right(policy, batch, advantages), {}


@wrong("sign", "The ratio is upside down")
def upside_down(self, policy, batch, advantages):
    return -ratio_of(-moved(policy, batch)) * advantages, {}


@wrong("sign", "where the advantage is negative: such tokens become more likely")
def sign_lost(self, policy, batch, advantages):
    return right(policy, batch, advantages.abs()), {}


@wrong("sign", "An advantage is the reward minus a baseline")
def baseline_minus_reward(self, batch):
    return -GRPO().advantages(batch)


@wrong("finite differences", "A factor that depends on policy.logprobs is detached")
def half_detached(self, policy, batch, advantages):
    return right(policy, batch, advantages).detach() * policy.logprobs, {}


# -- purity and shapes -------------------------------------------------------------------------------------------------


@wrong("pure", "batch.rewards was changed in place", line="batch.rewards.sub_(")
def rewards_changed(self, batch):
    batch.rewards.sub_(batch.rewards.mean())
    return GRPO().advantages(batch)


@wrong("pure", "batch.old_logprobs was changed in place", line="batch.old_logprobs[batch.mask] = 0.0")
def old_changed(self, policy, batch, advantages):
    batch.old_logprobs[batch.mask] = 0.0
    batch.old_logprobs.add_(1e-3)
    return right(policy, batch, advantages), {}


@wrong("pure", "it draws random numbers", line="torch.rand_like")
def noisy(self, policy, batch, advantages):
    return right(policy, batch, advantages) * (1 + 0.1 * torch.rand_like(advantages)), {}


COUNT = [0]


@wrong("pure", "it keeps a state from call to call")
def counting(self, policy, batch, advantages):
    COUNT[0] += 1
    return right(policy, batch, advantages) * (1 + COUNT[0] * 1e-3), {}


@wrong("shape", "loss returned a Tensor, not a loss and its metrics")
def without_metrics(self, policy, batch, advantages):
    return right(policy, batch, advantages)


@wrong("metrics", "metric 'mine' has shape a float")
def metric_as_a_number(self, policy, batch, advantages):
    return right(policy, batch, advantages), {"mine": 0.5}


@wrong("runs", "in advantages(batch) it raised RuntimeError", line="return batch.rewards * batch.mask")
def rewards_by_token(self, batch):
    return batch.rewards * batch.mask
