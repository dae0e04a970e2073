"""The whole loss of one micro-batch: objective, correction, KL and entropy, and the numbers every step reports.

What a step needs before that, from its whole batch: the KL in the reward, and the advantages.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl.objectives.advantages import token_rewards
from rl.objectives.corrections import Correction, Uncorrected
from rl.objectives.kl import kl_estimate
from rl.objectives.objective import Objective
from rl.parity.mismatch import mismatch
from rl.types import Batch, Metrics, PolicyOutput


def prepare(objective: Objective, batch: Batch) -> tuple[Batch, Float[Tensor, "B T"]]:
    """A whole step's batch with its KL in the reward, and the advantages, 0 outside the mask.

    With `kl_in="reward"` every token is paid -kl_coef * KL(old || reference) beside its reward. `rewards` holds the
    sums, so that an objective which knows sequences only has the KL too. Source: arXiv 1909.08593, eq. 2.
    """
    if objective.kl_coef and objective.kl_in == "reward":
        kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, objective.kl_estimator).detach()
        paid = torch.where(batch.mask, token_rewards(batch) - objective.kl_coef * kl, 0.0)
        batch = replace(batch, token_rewards=paid, rewards=paid.sum(dim=1))
    advantages = objective.advantages(batch)
    if advantages.shape != batch.mask.shape:
        raise ValueError(
            f"{type(objective).__name__}.advantages returned shape {tuple(advantages.shape)}; it must return "
            f"[B, T]={tuple(batch.mask.shape)}: rl.objectives.advantages.spread gives one number per sequence to its "
            "tokens"
        )
    return batch, torch.where(batch.mask, advantages, 0.0)


def critic_alone(policy: PolicyOutput) -> PolicyOutput:
    """The same numbers with no gradient but that of the values: the loss's other terms then leave the policy alone.

    The gradient is 0 rather than missing, for DeepSpeed waits for one of every weight.
    """
    still = {name: getattr(policy, name).detach() + 0.0 * getattr(policy, name) for name in ("logprobs", "entropy")}
    return replace(policy, **still)


def full_loss(
    objective: Objective,
    correction: Correction,
    policy: PolicyOutput,
    batch: Batch,
    advantages: Float[Tensor, "B T"],
    *,
    engine_is_old: bool = False,
) -> tuple[Float[Tensor, "B T"], Metrics]:
    """Per-token loss [B, T] and metrics. `batch.old_logprobs` of None means that the policy of now is the old one.

    That is exact in the first (or only) optimizer step of a batch, and spares the extra forward pass. With
    `engine_is_old` the old log-probabilities are the engine's own (`Config.old_logprobs="rollout"`), so the policy of
    now takes their place in the mismatch, which would else be 0 whatever the engine says.
    """
    if batch.old_logprobs is None:
        batch = replace(batch, old_logprobs=policy.logprobs.detach())
    if objective.entropy_coef and objective.entropy_in == "advantages":
        advantages = advantages + torch.minimum(objective.entropy_coef * policy.entropy.detach(), advantages.abs() / 2)
    weighted: Metrics = {}
    if not isinstance(correction, Uncorrected):
        # On the advantages rather than on the loss: a value loss must not be weighted.
        w = correction.weights(batch)
        advantages = advantages * w
        weighted = {
            "rollout_corr/weight": w,
            "rollout_corr/weight_sq": w**2,
            "rollout_corr/rejected_frac": (w == 0).float(),
        }
    loss, metrics = objective.loss(policy, batch, advantages)
    if loss.shape != batch.mask.shape:
        raise ValueError(
            f"{type(objective).__name__}.loss returned shape {tuple(loss.shape)}; it must return a per-token loss "
            f"[B, T]={tuple(batch.mask.shape)} and leave masking and averaging to the trainer"
        )
    if objective.kl_coef:
        kl = kl_estimate(policy.logprobs, batch.ref_logprobs, objective.kl_estimator)
        if objective.kl_in == "loss":
            loss = loss + objective.kl_coef * kl
        metrics[f"actor/kl_{objective.kl_in}"] = kl.detach()
    if objective.entropy_coef and objective.entropy_in == "loss":
        loss = loss - objective.entropy_coef * policy.entropy
    metrics |= {
        "actor/entropy": policy.entropy.detach(),
        "actor/ppo_kl": batch.old_logprobs - policy.logprobs.detach(),
    }
    trainer = replace(batch, old_logprobs=policy.logprobs) if engine_is_old else batch
    return loss, metrics | weighted | mismatch(trainer)
