"""What do the sampled tokens and their log-probabilities show?"""

from collections.abc import Iterator

from rl.parity.evidence import SampleEvidence
from rl.parity.gap import Gap
from trainer.doctor.finding import Finding

MEAN_GAP = {"float32": 3e-5, "bfloat16": 6e-2}
"""Largest mean |d| in nats at which the two sides count as equal. Clean runs show 5e-6 and 4e-2."""
EXPLAINED = 0.4
"""A hypothesis counts when it leaves less than this share of the gap unexplained."""
SURPRISE = 4.5
"""Standard deviations; a clean run exceeds it once in 150,000."""
GAP_SIGMAS = 5.0
"""k1 beyond this many standard errors is a bias: the two sides compute different things."""


def structure(s: SampleEvidence) -> Iterator[Finding]:
    where = f"engine {s.engine}"
    if s.forbidden:
        text = f"{s.forbidden} sampled tokens are forbidden at their place (rollout.min_tokens, rollout.bad_words)"
        yield Finding(cause="forbidden", severity="fault", where=where, evidence=text)
    if s.nonfinite:
        text = f"{s.nonfinite} of {s.gap.tokens} sampled tokens have no finite log-probability"
        yield Finding(cause="nonfinite", severity="fault", where=where, evidence=text)
    if s.wrong_version:
        text = f"{s.wrong_version} of {s.gap.tokens} tokens have another weight version than the engine"
        yield Finding(cause="versions", severity="fault", where=where, evidence=text)
    if s.ended_without_stop_token:
        text = f"{s.ended_without_stop_token} of {s.ended} finished replies lack the token that ended them"
        yield Finding(cause="eos", severity="fault", where=where, evidence=text)


def agrees(gap: Gap, dtype: str) -> bool:
    """Whether a gap is below half of its limit, and unbiased."""
    return gap.mean_abs <= MEAN_GAP[dtype] / 2 and not is_biased(gap, dtype)


def is_biased(gap: Gap, dtype: str) -> bool:
    """Whether a gap is biased: rounding raises as many log-probabilities as it lowers."""
    return abs(gap.k1) > max(0.3 * MEAN_GAP[dtype], GAP_SIGMAS * gap.k1_se)


def numbers(s: SampleEvidence, dtype: str, *, explained: bool) -> Iterator[Finding]:
    where, g, limit = f"engine {s.engine}", s.gap, MEAN_GAP[dtype]
    size = f"mean |d| {g.mean_abs:.1e} nats, k1 {g.k1:+.1e} ± {g.k1_se:.0e}, k3 {g.k3:.1e}"
    best = s.hypotheses[0] if s.hypotheses else None
    if best is not None and best.residual < EXPLAINED * g.mean_abs and not agrees(g, dtype):
        text = f"{size}; best explanation: {best.text}; leaves {best.residual:.1e} nats unexplained"
        yield Finding(cause=best.cause, severity="fault", where=where, evidence=text)
    elif not g.mean_abs <= limit or is_biased(g, dtype):  # not >: a NaN is a fault
        if not explained:
            yield Finding(cause="unexplained", severity="fault", where=where, evidence=f"{size} (limit {limit:g})")
    elif not abs(s.surprise) <= SURPRISE:
        text = f"log-probabilities agree, but tokens are {s.surprise:+.1f} standard deviations less likely than draws"
        yield Finding(cause="not_drawn", severity="fault", where=where, evidence=text)
