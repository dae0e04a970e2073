"""Objectives without a clipped ratio: RLOO, OPO, REINFORCE++ and its variant with a baseline."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rl.objectives.advantages import gae, group_relative, leave_one_out, length_weighted, spread, token_rewards, whiten
from rl.objectives.grpo import GRPO
from rl.objectives.kl import Estimator
from rl.objectives.objective import Objective
from rl.objectives.surrogates import reinforce
from rl.reduce import AverageOver
from rl.types import Batch, PolicyOutput, Step, TokenLoss


@dataclass(frozen=True, kw_only=True)
class RLOO(Objective):
    """REINFORCE leave-one-out (arXiv 2402.14740, section 2.2): the baseline is the mean reward of the group's others.

    A_i = R_i - mean_{j != i} R_j; loss = -r A, unclipped, a sum over tokens. As in the paper, the KL is in the reward.
    """

    kl_estimator: Estimator = "k1"
    kl_in: Literal["loss", "reward"] = "reward"
    average_over: AverageOver = "constant"

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        return spread(leave_one_out(batch.rewards, batch.group_ids), batch.mask)

    def loss(self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]) -> TokenLoss:
        return reinforce(policy.logprobs - batch.old_logprobs, advantages), {}


@dataclass(frozen=True, kw_only=True)
class OPO(RLOO):
    """On-policy RL with the optimal baseline (arXiv 2505.23585, eq. 7): A_i = R_i - sum_j l_j R_j / sum_j l_j.

    The length-weighted mean of the group minimises the gradient's variance where a gradient's size grows with the
    reply's length l. Strictly on-policy: one optimizer step per batch, no KL, no entropy bonus.
    """

    average_over: AverageOver = "tokens"

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        return spread(length_weighted(batch.rewards, batch.group_ids, batch.mask), batch.mask)


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(GRPO):
    """REINFORCE++ (arXiv 2501.03262): advantages are the rewards still to come, normalised over the whole batch.

    A_t = sum_{k >= t} reward_k, then mean 0 and variance 1 over the step's tokens; PPO's clipped loss. With `kl_coef`
    the k1 penalty is in the reward of every token. Needs no group, so `group_size=1` is enough.
    """

    turn_gamma: float = 1.0
    """Discount per turn of an episode: a reward counts for an earlier turn by turn_gamma for each turn in between."""
    kl_estimator: Estimator = "k1"
    kl_in: Literal["loss", "reward"] = "reward"

    group_relative: ClassVar[bool] = False

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        # Without values and with gamma = lam = 1, GAE is the sum of the rewards to come.
        nothing = torch.zeros_like(batch.rollout_logprobs)
        paid = token_rewards(batch)
        to_come = gae(paid, nothing, batch.mask, gamma=1.0, lam=1.0, turns=batch.turns, turn_gamma=self.turn_gamma)
        return whiten(to_come, batch.mask)


@dataclass(frozen=True, kw_only=True)
class ReinforcePPBaseline(GRPO):
    """REINFORCE++-baseline (arXiv 2501.03262): reward minus group mean, then normalised over the whole batch.

    Unlike GRPO it divides by one standard deviation for all groups: a group whose rewards hardly differ is not
    amplified. With `kl_coef`, k2 in the loss.
    """

    kl_estimator: Estimator = "k2"

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        centred = group_relative(batch.rewards, batch.group_ids, divide_by_std=False)
        return whiten(spread(centred, batch.mask), batch.mask)
