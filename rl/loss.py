"""The whole loss of one micro-batch: objective, correction, KL and entropy, and the numbers every step reports."""

import math
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from rl.corrections import TruncatedIS
from rl.kl import kl_estimate
from rl.objectives import Objective
from rl.types import Batch, Metrics, PolicyOutput


def full_loss(
    objective: Objective,
    correction: TruncatedIS | None,
    policy: PolicyOutput,
    batch: Batch,
    advantages: Float[Tensor, "B T"],
) -> tuple[Float[Tensor, "B T"], Metrics]:
    """Per-token loss [B, T] and metrics. `batch.old_logprobs` of None means that the policy of now is the old one.

    That is exact in the first (or only) optimizer step of a batch, and spares the extra forward pass.
    """
    if batch.old_logprobs is None:
        batch = replace(batch, old_logprobs=policy.logprobs.detach())
    weighted: Metrics = {}
    if correction is not None:
        # On the advantages rather than on the loss: a value loss must not be weighted.
        weighted["rollout_corr/weight"] = correction.weights(batch)
        advantages = advantages * weighted["rollout_corr/weight"]
    loss, metrics = objective.loss(policy, batch, advantages)
    if loss.shape != batch.mask.shape:
        raise ValueError(
            f"{type(objective).__name__}.loss returned shape {tuple(loss.shape)}; it must return a per-token loss "
            f"[B, T]={tuple(batch.mask.shape)} and leave masking and averaging to the trainer"
        )
    if objective.kl_coef:
        kl = kl_estimate(policy.logprobs, batch.ref_logprobs, objective.kl_estimator)
        loss = loss + objective.kl_coef * kl
        metrics["actor/kl_loss"] = kl
    if objective.entropy_coef:
        loss = loss - objective.entropy_coef * policy.entropy
    metrics |= {"actor/entropy": policy.entropy, "actor/ppo_kl": batch.old_logprobs - policy.logprobs}
    return loss, metrics | weighted | mismatch(batch)


def mismatch(batch: Batch) -> Metrics:
    """How far the trainer (old) is from what the engine said (rollout) about the same tokens, in nats [B, T].

    With d = old - rollout: kl = -d estimates KL(rollout || old), k3_kl = e^d - d - 1 the same with less variance.
    `rollout_is` = e^d and its square make the effective sample size once all micro-batches are in.
    """
    d = (batch.old_logprobs - batch.rollout_logprobs).detach()
    ratio = d.exp()
    return {
        "rollout_corr/kl": -d,
        "rollout_corr/k3_kl": ratio - d - 1.0,
        "rollout_corr/logprob_abs_diff_mean": d.abs(),
        "rollout_corr/logprob_abs_diff_max": d.abs(),
        "rollout_corr/rollout_is_mean": ratio,
        "rollout_corr/rollout_is_max": ratio,
        "rollout_corr/rollout_is_sq": ratio**2,
    }


def finish(means: dict[str, float]) -> dict[str, float]:
    """Turn the step's moments into the ratios that only the whole step can give: ESS and explained variance."""
    out = dict(means)
    square = out.pop("rollout_corr/rollout_is_sq", math.nan)
    if "rollout_corr/rollout_is_mean" in out:
        out["rollout_corr/ess"] = out["rollout_corr/rollout_is_mean"] ** 2 / square
    if "critic/returns" in out:
        variance = out.pop("critic/returns_sq") - out["critic/returns"] ** 2
        residual = out.pop("critic/residual_sq") - out.pop("critic/residual") ** 2
        out["critic/vf_explained_var"] = 1.0 - residual / variance if variance > 0 else math.nan
    return out
