"""How far is the trainer from the engine on one batch? The metrics that every step reports."""

import math

import torch

from rl.objectives.ratios import sequence_log_ratio, token_log_ratio
from rl.parity.sample_size import effective_share
from rl.types import Metrics, Step

MOMENTS = {
    *(f"rollout_corr/{n}" for n in ("kl_sq", "k3_kl_sq", "mult_error_sq", "token_count", "seq_is", "seq_is_sq")),
    "rollout_corr/weight_sq",
    "critic/returns_sq",
    "critic/residual",
    "critic/residual_sq",
}
"""Sums that `finish` turns into other metrics, and does not show."""
TURN, TURN_TOKENS = "logprob_abs_diff_turn/", "turn_tokens/"
"""Before the number of a turn: |d| at its tokens, and 1 at its tokens; 0 at others. `finish` divides their means."""


def mismatch(batch: Step) -> Metrics:
    """The trainer's log-probabilities (old) against the engine's (rollout) on the same tokens: [B, T], `seq_*` [B].

    With d = old - rollout in nats and r = e^d: kl = -d estimates KL(rollout || old), k3_kl = r - 1 - d the same with
    less variance (http://joschu.net/blog/kl-approx.html), chi2 = r^2 - 1 the chi-squared divergence, mult_error =
    e^|d| (NeMo-RL's token_mult_prob_error). `kl` and `logprob_abs_diff_*` take d as it is, the others clamped to +-20.
    `MOMENTS` are for `finish`.
    """
    d = (batch.old_logprobs - batch.rollout_logprobs).detach()
    bounded = token_log_ratio(batch)
    # expm1, because in fp32 the rounding of e^d is a thousand times the k3 of two sides that agree.
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
    turns = torch.full_like(batch.versions, -1) if batch.turns is None else batch.turns
    for turn in range(int(turns.max()) + 1):
        here = turns == turn
        metrics |= {f"{TURN}{turn}": torch.where(here, d.abs(), 0.0), f"{TURN_TOKENS}{turn}": here.float()}
    return {f"rollout_corr/{name}": value for name, value in metrics.items()}


def finish(means: dict[str, float]) -> dict[str, float]:
    """Turn the step's moments into metrics of the whole step: ESS, standard errors, explained variance.

    Standard errors treat tokens as independent, and count them again in every epoch.
    """
    corr = {n.removeprefix("rollout_corr/"): value for n, value in means.items() if n.startswith("rollout_corr/")}
    turns = {n: corr[TURN_TOKENS + n.removeprefix(TURN)] for n in corr if n.startswith(TURN)}
    moments = MOMENTS | {f"rollout_corr/{n}" for n in corr if n.startswith((TURN, TURN_TOKENS))}
    out = {name: value for name, value in means.items() if name not in moments}
    by_turn = {f"rollout_corr/{n}": corr[n] / tokens for n, tokens in turns.items() if tokens}
    if by_turn:
        out |= by_turn | {"rollout_corr/logprob_abs_diff_worst_turn": worst([*by_turn.values()])}
    if corr:
        n = corr["token_count"]
        out |= {
            "rollout_corr/ess": effective_share(corr["rollout_is_mean"], 1.0 + corr["chi2"]),
            "rollout_corr/seq_ess": effective_share(corr["seq_is"], corr["seq_is_sq"]),
            "rollout_corr/kl_se": standard_error(corr["kl"], corr["kl_sq"], n),
            "rollout_corr/k3_kl_se": standard_error(corr["k3_kl"], corr["k3_kl_sq"], n),
            "rollout_corr/mult_error_se": standard_error(corr["mult_error"] - 1.0, corr["mult_error_sq"], n),
            "rollout_corr/logprob_abs_diff_mean_se": standard_error(corr["logprob_abs_diff_mean"], corr["kl_sq"], n),
        }
    if "weight" in corr:
        out["rollout_corr/weight_ess"] = effective_share(corr["weight"], corr["weight_sq"])
    if "critic/returns" in means:
        variance = means["critic/returns_sq"] - means["critic/returns"] ** 2
        residual = means["critic/residual_sq"] - means["critic/residual"] ** 2
        out["critic/vf_explained_var"] = 1.0 - residual / variance if variance > 0 else math.nan
    return out


def worst(values: list[float]) -> float:
    """The largest; NaN if one is NaN, which `max` may hide."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def standard_error(mean: float, square: float, count: float) -> float:
    """Standard error of a mean over `count` independent values, from their first two moments; infinite for a single
    value, which shows no spread."""
    return math.sqrt(max(square - mean**2, 0.0) / (count - 1)) if count > 1 else math.inf
