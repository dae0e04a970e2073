"""The whole loss of one micro-batch: objective, correction, KL and entropy, and the numbers every step reports.

What a step needs before that, from its whole batch: the KL in the reward, and the advantages.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl.episodes.joined import layout
from rl.objectives.advantages import token_rewards
from rl.objectives.corrections import Correction, Uncorrected
from rl.objectives.kl import kl_estimate
from rl.objectives.objective import Objective
from rl.parity.mismatch import mismatch
from rl.types import Batch, Metrics, PolicyOutput, TokenLoss, needed, step_of


def prepare(objective: Objective, batch: Batch) -> tuple[Batch, Float[Tensor, "B T"]]:
    """A whole step's batch with its KL in the reward, and the advantages, 0 outside the mask.

    The objective sees one row for each episode (rl/episodes/joined.py); what is returned is that of the batch's own
    rows, each with the reward of its episode. With `kl_in="reward"` every token is paid -kl_coef * KL(old || reference)
    in addition to its reward. `rewards` holds the sums, so an objective that only reads rewards of sequences includes
    the KL too. Source: arXiv 1909.08593, eq. 2.
    """
    at = layout(batch)
    rows, batch = batch, batch if at is None else at.batch(batch)
    if objective.kl_coef and objective.kl_in == "reward":
        old, reference = needed(batch.old_logprobs, "old_logprobs"), needed(batch.ref_logprobs, "ref_logprobs")
        kl = kl_estimate(old, reference, objective.kl_estimator).detach()
        paid = torch.where(batch.mask, token_rewards(batch) - objective.kl_coef * kl, 0.0)
        # A row without tokens pays nothing at its end, and its reward counts all the same.
        rewards = torch.where(batch.mask.any(dim=1), paid.sum(dim=1), batch.rewards)
        batch = replace(batch, token_rewards=paid, rewards=rewards)
    advantages = objective.advantages(batch)
    if advantages.shape != batch.mask.shape:
        raise ValueError(
            f"{type(objective).__name__}.advantages returned shape {tuple(advantages.shape)}; it must return "
            f"[B, T]={tuple(batch.mask.shape)}: rl.objectives.advantages.spread gives one number per sequence to its "
            "tokens"
        )
    advantages = torch.where(batch.mask, advantages, 0.0)
    if at is None:
        return batch, advantages
    paid = None if batch.token_rewards is None else at.rows(batch.token_rewards)
    return replace(rows, token_rewards=paid, rewards=batch.rewards[at.of_row]), at.rows(advantages)


def critic_alone(policy: PolicyOutput) -> PolicyOutput:
    """The same numbers, of which only the values have a gradient: the loss then trains the value head alone.

    The other gradients are 0 rather than missing, because DeepSpeed waits for one of every weight.
    """
    logprobs, entropy = policy.logprobs, policy.entropy
    return replace(policy, logprobs=logprobs.detach() + 0.0 * logprobs, entropy=entropy.detach() + 0.0 * entropy)


def full_loss(
    objective: Objective,
    correction: Correction,
    policy: PolicyOutput,
    batch: Batch,
    advantages: Float[Tensor, "B T"],
    *,
    old_is_rollout: bool = False,
) -> TokenLoss:
    """Per-token loss [B, T] and metrics of a micro-batch, which has one row for each episode
    (`rl.episodes.joined.joined`).

    Without `batch.old_logprobs` the current policy is the old one: exact in the first (or only) optimizer step of a
    batch, and it saves a forward pass. `old_is_rollout` (`Config.old_logprobs="rollout"`): the old log-probabilities
    are the rollout's, so the mismatch metrics compare the rollout with the current policy; with itself it is always 0.
    """
    assert batch.episode_ids is None, "several rows may be one episode: use rl.episodes.joined.joined first"
    step = step_of(batch, policy.logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs)
    if objective.entropy_coef and objective.entropy_in == "advantages":
        advantages = advantages + torch.minimum(objective.entropy_coef * policy.entropy.detach(), advantages.abs() / 2)
    weighted: Metrics = {}
    if not isinstance(correction, Uncorrected):
        # On the advantages rather than on the loss: a value loss must not be weighted.
        w = correction.weights(step)
        advantages = advantages * w
        weighted = {
            "rollout_corr/weight": w,
            "rollout_corr/weight_sq": w**2,
            "rollout_corr/rejected_frac": (w == 0).float(),
        }
    loss, metrics = objective.loss(policy, step, advantages)
    if loss.shape != step.mask.shape:
        raise ValueError(
            f"{type(objective).__name__}.loss returned shape {tuple(loss.shape)}; it must return a per-token loss "
            f"[B, T]={tuple(step.mask.shape)} and leave masking and averaging to the trainer"
        )
    if objective.kl_coef:
        kl = kl_estimate(policy.logprobs, needed(step.ref_logprobs, "ref_logprobs"), objective.kl_estimator)
        if objective.kl_in == "loss":
            loss = loss + objective.kl_coef * kl
        metrics[f"actor/kl_{objective.kl_in}"] = kl.detach()
    if objective.entropy_coef and objective.entropy_in == "loss":
        loss = loss - objective.entropy_coef * policy.entropy
    metrics |= {"actor/entropy": policy.entropy.detach(), "actor/ppo_kl": step.old_logprobs - policy.logprobs.detach()}
    return loss, metrics | weighted | mismatch(replace(step, old_logprobs=policy.logprobs) if old_is_rollout else step)
