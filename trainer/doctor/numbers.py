"""What do the sampled tokens and their log-probabilities show?"""

from collections.abc import Iterator

from rl.parity.evidence import SampleEvidence
from rl.parity.gap import Gap
from rl.parity.guesses.hypotheses import judge
from trainer.doctor.finding import Finding, faults_of

MEAN_GAP = {"float32": 3e-5, "bfloat16": 6e-2}
"""Largest mean |d| in nats at which the two sides count as equal, at temperature 1 and above; below, it grows with
1 / temperature. Clean runs show 5e-6 and 4e-2."""
GAP_SIGMAS = 5.0
"""k1 beyond this many standard errors is a bias: the two sides compute different things."""

SIGMAS = 4.5
"""Standard deviations; a clean run exceeds it once in 150,000."""
TOKEN_SIGMAS = 7.0
"""The same for the count of one token: there are many tokens, and small counts have long tails."""
GREEDY = 0.95
"""Share of most likely tokens from which on a sampler counts as greedy; in bf16 a few of them look like the second."""
NATS = 16.0
"""-log probability; a clean run exceeds it once in ten million."""


def limit_of(dtype: str, temperature: float) -> float:
    """The limit of mean |d|: the temperature divides the logits, and so multiplies their rounding."""
    return MEAN_GAP[dtype] * max(1.0, 1.0 / temperature)


def agrees(gap: Gap, limit: float) -> bool:
    """Whether a gap is below half of its limit, and unbiased."""
    return gap.mean_abs <= limit / 2 and not is_biased(gap, limit)


def is_biased(gap: Gap, limit: float) -> bool:
    """Whether a gap is biased: rounding raises as many log-probabilities as it lowers."""
    return abs(gap.k1) > max(0.3 * limit, GAP_SIGMAS * gap.k1_se)


def structure(s: SampleEvidence) -> Iterator[Finding]:
    """What is wrong whatever the log-probabilities are."""
    texts = {
        "forbidden": (
            s.forbidden,
            f"{s.forbidden} sampled tokens are forbidden at their place (rollout.min_tokens, rollout.bad_words)",
        ),
        "nonfinite": (s.nonfinite, f"{s.nonfinite} of {s.gap.tokens} sampled tokens have no finite log-probability"),
        "versions": (
            s.wrong_version,
            f"{s.wrong_version} of {s.gap.tokens} tokens have another weight version than the engine",
        ),
        "eos": (
            s.ended_without_stop_token,
            f"{s.ended_without_stop_token} of {s.ended} finished replies lack the token that ended them",
        ),
        "finish_reason": (
            s.too_long + s.wrong_reason,
            f"{s.too_long} replies are longer than was asked for; {s.wrong_reason} shorter ones count as cut off",
        ),
    }
    for cause, (count, text) in texts.items():
        if count:
            yield Finding(cause=cause, severity="fault", where=f"engine {s.engine}", evidence=text)


def trainer_at_fault(s: SampleEvidence) -> bool:
    """Whether the trainer's numbers are not the model's own."""
    return s.witness is not None and not s.witness.trainer.mean_abs <= s.witness.limit


def trainer_numbers(s: SampleEvidence) -> Iterator[Finding]:
    """The trainer against the witness."""
    w = s.witness
    if w is not None and trainer_at_fault(s) and w.trainer_cause:
        text = (
            f"its log-probabilities differ from the model's own forward pass by {w.trainer.mean_abs:.1e} nats "
            f"(limit {w.limit:g}): {w.trainer_text}"
        )
        yield Finding(cause=w.trainer_cause, severity="fault", where="trainer", evidence=text)


def sampler_numbers(s: SampleEvidence, temperature: float) -> Iterator[Finding]:
    """The engine's numbers against its own logits."""
    e = s.sampler
    if e is None:
        return
    where, limit = f"engine {s.engine}", limit_of("float32", temperature)
    if e.other_tokens and s.requests <= 1:
        text = f"{e.other_tokens} of {e.tokens} tokens are not those that the sampler returned"
        yield Finding(cause="swapped", severity="fault", where=where, evidence=text)
    if e.error > limit:
        found = judge(e.guesses, e.error, limit)
        place = "between the sampler and the trainer" if e.handed_on > limit else "in the sampler"
        text = f"its numbers differ by {e.error:.1e} nats from what its own logits give; the fault is {place}: {found}"
        cause = found.cause
        if cause == "raw_logprobs" and s.draws is not None and s.draws.likelier_nats > NATS / 2:
            # At temperature 1 raw numbers are those of a sampler without a temperature; the draws tell them apart.
            cause, text = "temperature", f"{text}; the tokens too look like draws with {s.draws.likelier}"
        yield Finding(cause=cause, severity="fault", where=where, evidence=text)


def engine_numbers(s: SampleEvidence, dtype: str, temperature: float) -> Iterator[Finding]:
    """The engine's numbers against the witness, or against the trainer where there is none."""
    limit = limit_of(dtype, temperature)
    g = s.gap if s.witness is None else s.witness.engine
    if g.mean_abs <= limit and not is_biased(g, limit):  # written so that a NaN is a fault
        return
    found = judge([] if s.witness is None else s.witness.engine_guesses, g.mean_abs, limit / 2)
    size = f"mean |d| {g.mean_abs:.1e} nats (limit {limit:g}), k1 {g.k1:+.1e} ± {g.k1_se:.0e}, k3 {g.k3:.1e}"
    yield Finding(cause=found.cause, severity="fault", where=f"engine {s.engine}", evidence=f"{size}; {found}")


def drawn(s: SampleEvidence) -> Iterator[Finding]:
    """The tokens against the distribution that they should be draws from."""
    fault, d = faults_of(f"engine {s.engine}"), s.draws
    if s.requests > 1:
        yield fault("selected", f"the engine served {s.requests:.3g} requests for each reply that it returned")
        return
    if d is not None:
        if d.inner_stops:
            yield fault("ignored_eos", f"{d.inner_stops} tokens that end a reply have more tokens after them")
        elif d.no_stop_nats > NATS:
            text = f"no token ended a reply, where {d.stops_expected:.1f} were to be expected"
            yield fault("ignored_eos", text)
        if d.best_sigmas > SIGMAS and d.best >= GREEDY * d.tokens:
            text = (
                f"{d.best} of {d.tokens} tokens are the most likely one, where {d.best_expected:.0f} were to be "
                "expected"
            )
            yield fault("greedy", text)
            return
        if d.alike_nats > NATS:
            text = (
                f"replies of one group begin alike, which has the probability e^-{d.alike_nats:.0f}; in "
                f"{d.alike_groups:.0%} of the groups all replies are equal"
            )
            yield fault("seeds", text)
            return
    if text := odd_draws(s):
        yield fault("not_drawn", text)


def odd_draws(s: SampleEvidence) -> str:
    """What shows that the tokens are no draws; empty if nothing does."""
    d = s.draws
    if not abs(s.surprise) <= SIGMAS:
        more = "more" if s.surprise < 0 else "less"
        text = f"tokens are {abs(s.surprise):.1f} standard deviations {more} likely than draws"
        if d is not None and d.likelier_nats > NATS / 2:
            text += f"; they look like draws with {d.likelier}, or like replies that were chosen"
        return text
    if d is None:
        return ""
    if d.likelier_nats > NATS:
        return f"log-probabilities agree, but the tokens look like draws with {d.likelier}"
    if abs(d.stops_sigmas) > SIGMAS:
        return (
            f"{d.stops} tokens ended a reply, where {d.stops_expected:.1f} were to be expected: the end is made more "
            "or less likely, or replies are chosen by their length"
        )
    if abs(d.odd_sigmas) > TOKEN_SIGMAS:
        return f"token {d.odd_token} was sampled {d.odd_count} times, where {d.odd_expected:.1f} were to be expected"
    return ""
