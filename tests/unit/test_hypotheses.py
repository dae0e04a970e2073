"""Each guess about where numbers come from explains exactly the numbers that come from there, and no other does."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rl.parity.draws import draws
from rl.parity.gap import surprise
from rl.parity.guesses.hypotheses import explain, judge
from rl.parity.guesses.told import Told
from rl.sampling.truncation import Truncation

torch.manual_seed(0)
ROWS, PROMPT, REPLY, VOCABULARY = 12, 4, 9, 50
LOGITS = 3.0 * torch.randn(ROWS * REPLY, VOCABULARY)
NOISE = 1e-5


def case(temperature: float = 0.8, cut: Truncation | None = None, logits: torch.Tensor = LOGITS) -> Told:
    """Replies sampled with these settings, and the right numbers."""
    rows = torch.arange(ROWS).repeat_interleave(REPLY)
    columns = (PROMPT - 1 + torch.arange(REPLY)).repeat(ROWS)
    told = Told(
        logits=logits,
        reported=torch.zeros(ROWS * REPLY),
        input_ids=torch.randint(0, VOCABULARY, (ROWS, PROMPT + REPLY), generator=torch.Generator().manual_seed(2)),
        rows=rows,
        columns=columns,
        groups=torch.arange(ROWS) // 3,
        temperature=temperature,
        truncation=cut,
    )
    p = (logits / temperature).softmax(-1) if cut is None else told.under(temperature, cut).exp()
    if cut is not None:
        # `under` always keeps the token that stands there; draw from what is kept without it.
        from rl.sampling.truncation import keep

        p = (logits / temperature).masked_fill(~keep(logits / temperature, cut), -torch.inf).softmax(-1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    ids = told.input_ids.clone()
    ids[rows, columns + 1] = drawn
    told = replace(told, input_ids=ids)
    return replace(told, reported=told.expected)


def reported(told: Told, numbers: torch.Tensor) -> Told:
    return replace(told, reported=numbers)


def masked(told: Told, gone: torch.Tensor) -> torch.Tensor:
    kept = told.logits.clone()
    kept[:, gone[~torch.isin(gone, told.targets)]] = -torch.inf
    return of(told, (kept / told.temperature).log_softmax(-1))


def by_row(x: torch.Tensor) -> torch.Tensor:
    return x.view(ROWS, REPLY)


def of(told: Told, log_p: torch.Tensor) -> torch.Tensor:
    return log_p.gather(1, told.targets[:, None])[:, 0]


def biased(told: Told, **bias: float) -> torch.Tensor:
    logits = told.logits.clone()
    for token, value in bias.items():
        logits[:, int(token[1:])] += value
    return of(told, (logits / told.temperature).log_softmax(-1))


def penalised(told: Told, presence: float) -> torch.Tensor:
    logits = told.logits.clone()
    for n in range(len(logits)):
        start = n - n % REPLY
        for token in set(told.targets[start:n].tolist()):
            logits[n, token] -= presence
    return of(told, (logits / told.temperature).log_softmax(-1))


RIGHT = case()
NUMBERS: dict[str, tuple[Callable[[Told], torch.Tensor], str]] = {
    "log2": (lambda t: t.expected / math.log(2), "unit"),
    "log10": (lambda t: t.expected / math.log(10), "unit"),
    "other sign": (lambda t: -t.expected, "unit"),
    "probabilities": (lambda t: t.expected.exp(), "unit"),
    "sums": (lambda t: by_row(t.expected).cumsum(1).flatten(), "unit"),
    "the reply's mean": (lambda t: by_row(t.expected).mean(1).repeat_interleave(REPLY), "unit"),
    "over the length": (lambda t: t.expected / REPLY, "unit"),
    "logits": (lambda t: of(t, t.logits), "unit"),
    "one nat too high": (lambda t: t.expected + 1.0, "unit"),
    "softmax in bf16": (lambda t: of(t, (t.logits.bfloat16() / t.temperature).log_softmax(-1).float()), "unit"),
    "cut at -1": (lambda t: t.expected.clamp(min=-1.0), "unit"),
    "the most likely token's": (lambda t: t.log_p.amax(-1), "other_token"),
    "the second's": (lambda t: t.log_p.topk(2).values[:, 1], "other_token"),
    "two decimals": (lambda t: (t.expected * 100).round() / 100, "rounded"),
    "bf16": (lambda t: t.expected.bfloat16().float(), "rounded"),
    "one late": (lambda t: by_row(t.expected).roll(1, 1).flatten(), "shift"),
    "two early": (lambda t: by_row(t.expected).roll(-2, 1).flatten(), "shift"),
    "first missing": (lambda t: (by_row(t.expected) * (torch.arange(REPLY) > 0)).flatten(), "missing_number"),
    "last missing": (lambda t: (by_row(t.expected) * (torch.arange(REPLY) < REPLY - 1)).flatten(), "missing_number"),
    "backwards": (lambda t: by_row(t.expected).flip(1).flatten(), "swapped"),
    "logits in bf16": (lambda t: of(t, (t.logits.bfloat16().float() / t.temperature).log_softmax(-1)), "rounded"),
    "of another reply": (lambda t: by_row(t.expected).roll(1, 0).flatten(), "swapped"),
    "temperature 0.6": (lambda t: of(t, t.under(0.6, None)), "temperature"),
    "top_p": (lambda t: of(t, t.under(0.8, Truncation(top_p=0.9))), "truncation"),
    "top_k": (lambda t: of(t, t.under(0.8, Truncation(top_k=10))), "truncation"),
    "min_p": (lambda t: of(t, t.under(0.8, Truncation(min_p=0.1))), "truncation"),
    "a bias": (lambda t: biased(t, t7=2.0), "logit_bias"),
    "two biases": (lambda t: biased(t, t7=2.0, t9=-1.5), "logit_bias"),
    "a masked half": (lambda t: masked(t, torch.arange(0, VOCABULARY, 2)), "allowed_tokens"),
    "a penalty": (lambda t: penalised(t, 1.0), "penalties"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_get_the_name_of_what_was_done_to_them(name: str) -> None:
    change, cause = NUMBERS[name]
    told = reported(RIGHT, change(RIGHT))
    found = judge(explain(told), told.remains(told.expected), NOISE)
    assert found.cause == cause, found


def test_what_was_done_in_no_known_way_gets_no_name_but_the_closest_guess() -> None:
    noise = torch.randn(len(LOGITS), generator=torch.Generator().manual_seed(5))
    told = reported(RIGHT, RIGHT.expected + noise)
    found = judge(explain(told), told.remains(told.expected), NOISE)
    assert found.cause == "unexplained"
    assert found.closest is not None
    assert "closest" in str(found)


def test_raw_numbers_and_another_temperature_differ_by_what_was_drawn() -> None:
    raw = reported(RIGHT, of(RIGHT, RIGHT.logits.log_softmax(-1)))
    assert judge(explain(raw), 0.2, NOISE).cause == "raw_logprobs"
    hot = case(1.0)
    told = replace(hot, temperature=0.5)
    assert judge(explain(told), 0.2, NOISE).cause == "temperature"


def test_a_run_that_cuts_and_an_engine_that_does_not_are_told_apart() -> None:
    told = replace(case(0.8), truncation=Truncation(top_k=5))
    found = judge(explain(told), told.remains(told.expected), NOISE)
    assert (found.cause, "without the run's cuts" in str(found)) == ("truncation", True)


def sampled(tokens: torch.Tensor, logits: torch.Tensor = LOGITS, **changes: Any) -> Told:
    ids = RIGHT.input_ids.clone()
    ids[RIGHT.rows, RIGHT.columns + 1] = tokens
    return replace(RIGHT, input_ids=ids, logits=logits, **changes)


def test_draws_are_told_from_what_only_looks_like_them() -> None:
    clean = draws(RIGHT, [3])
    assert abs(clean.surprise) < 4
    assert abs(clean.odd_sigmas) < 5
    assert clean.alike_nats < 10
    best = draws(sampled(LOGITS.argmax(-1)), [3])
    assert (best.best, best.best_sigmas > 5, best.surprise < -5) == (best.tokens, True, True)
    same = RIGHT.targets.view(ROWS // 3, 3, REPLY)[:, :1].expand(-1, 3, -1).flatten()
    # Replies of a group are equal, and so are their logits.
    alike = LOGITS.view(ROWS // 3, 3, REPLY, -1)[:, :1].expand(-1, 3, -1, -1).flatten(0, 2)
    twins = draws(sampled(same, alike), [3])
    assert twins.alike_nats > 16
    assert twins.alike_groups == 1.0
    often = RIGHT.logits.clone()
    often[:, 3] += 6
    never = draws(sampled(RIGHT.targets.where(RIGHT.targets != 3, 4), often), [3])
    assert never.no_stop_nats > 16
    ended = RIGHT.targets.clone()
    ended[1] = 3
    assert draws(sampled(ended), [3]).inner_stops >= 1
    favourite = RIGHT.targets.clone()
    favourite[::2] = 7
    assert draws(sampled(favourite), [3]).odd_token == 7


def test_surprise_is_near_zero_for_draws_and_large_for_anything_else() -> None:
    many = (LOGITS / 0.8).repeat(12, 1)
    log_p = many.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)

    def z(tokens: torch.Tensor) -> float:
        said = log_p.gather(1, tokens[:, None]).T
        return surprise(said, entropy[None], torch.ones_like(said, dtype=torch.bool))

    generator = torch.Generator().manual_seed(2)
    drawn = [z(torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]) for _ in range(200)]
    assert abs(sum(drawn) / 200) < 0.3
    assert max(map(abs, drawn)) < 4
    assert z(torch.multinomial((many / 2).softmax(-1), 1, generator=generator)[:, 0]) > 10
    assert z(many.argmax(-1)) < -10
    said = log_p[:, 0][None]
    assert math.isnan(surprise(said * math.nan, entropy[None], torch.ones_like(said, dtype=torch.bool)))
