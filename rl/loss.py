"""The whole loss of one micro-batch: objective, correction, KL and entropy, and the numbers every step reports.

What a step needs before that, from its whole batch: the KL in the reward, and the advantages.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl.objectives.advantages import token_rewards
from rl.objectives.corrections import Correction, Uncorrected, sequence_log_ratio, token_log_ratio
from rl.objectives.kl import kl_estimate
from rl.objectives.objective import Objective
from rl.types import Batch, Metrics, PolicyOutput

MOMENTS = {
    *(f"rollout_corr/{n}" for n in ("kl_sq", "k3_kl_sq", "mult_error_sq", "token_count", "seq_is", "seq_is_sq")),
    "rollout_corr/weight_sq",
    "critic/returns_sq",
    "critic/residual",
    "critic/residual_sq",
}
"""Metrics of which only what `finish` makes of them is shown."""


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


def mismatch(batch: Batch) -> Metrics:
    """How far the trainer (old) is from what the engine said (rollout) about the same tokens: [B, T], `seq_*` [B].

    With d = old - rollout in nats and r = e^d: kl = -d estimates KL(rollout || old), k3_kl = r - 1 - d the same with
    less variance (http://joschu.net/blog/kl-approx.html), chi2 = r^2 - 1 the chi-squared divergence, mult_error =
    e^|d| (NeMo-RL's token_mult_prob_error). `kl` and `logprob_abs_diff_*` take d as it is, the others clamped to +-20.
    `MOMENTS` are for `finish`.
    """
    d = (batch.old_logprobs - batch.rollout_logprobs).detach()
    bounded = token_log_ratio(batch)
    # expm1, for in fp32 e^d rounds by a thousand times more than the k3 of two sides that agree.
    ratio, k3, excess = bounded.exp(), bounded.expm1() - bounded, bounded.abs().expm1()
    whole = sequence_log_ratio(batch).exp()
    metrics = {
        "kl": -d,
        "kl_sq": d**2,
        "k3_kl": k3,
        "k3_kl_sq": k3**2,
        "logprob_abs_diff_mean": d.abs(),
        "logprob_abs_diff_max": d.abs(),
        "rollout_is_mean": ratio,
        "rollout_is_max": ratio,
        "chi2": (2 * bounded).expm1(),
        "mult_error": 1.0 + excess,
        "mult_error_sq": excess**2,
        "outside_frac": (~((ratio >= 0.5) & (ratio <= 2.0))).float(),
        "token_count": torch.ones_like(d),
        "seq_is": whole,
        "seq_is_sq": whole**2,
    }
    return {f"rollout_corr/{name}": value for name, value in metrics.items()}


def finish(means: dict[str, float]) -> dict[str, float]:
    """Turn the step's moments into what only the whole step can give: ESS, standard errors, explained variance.

    A standard error takes tokens as independent, and counts them again in every epoch.
    """
    out = {name: value for name, value in means.items() if name not in MOMENTS}
    corr = {n.removeprefix("rollout_corr/"): value for n, value in means.items() if n.startswith("rollout_corr/")}
    if corr:
        n = corr["token_count"]
        out |= {
            "rollout_corr/ess": effective(corr["rollout_is_mean"], 1.0 + corr["chi2"]),
            "rollout_corr/seq_ess": effective(corr["seq_is"], corr["seq_is_sq"]),
            "rollout_corr/kl_se": standard_error(corr["kl"], corr["kl_sq"], n),
            "rollout_corr/k3_kl_se": standard_error(corr["k3_kl"], corr["k3_kl_sq"], n),
            "rollout_corr/mult_error_se": standard_error(corr["mult_error"] - 1.0, corr["mult_error_sq"], n),
            "rollout_corr/logprob_abs_diff_mean_se": standard_error(corr["logprob_abs_diff_mean"], corr["kl_sq"], n),
        }
    if "weight" in corr:
        out["rollout_corr/weight_ess"] = effective(corr["weight"], corr["weight_sq"])
    if "critic/returns" in means:
        variance = means["critic/returns_sq"] - means["critic/returns"] ** 2
        residual = means["critic/residual_sq"] - means["critic/residual"] ** 2
        out["critic/vf_explained_var"] = 1.0 - residual / variance if variance > 0 else math.nan
    return out


def effective(mean: float, square: float) -> float:
    """Effective sample size as a share of the sample, E[w]^2 / E[w^2] (Kish, 1965); 0 where every weight is 0."""
    return mean**2 / square if square else 0.0


def standard_error(mean: float, square: float, count: float) -> float:
    """Of a mean over `count` independent values, from their first two moments."""
    return math.sqrt(max(square - mean**2, 0.0) / count)
