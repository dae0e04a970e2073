"""Each guess about an engine's sampler explains exactly the numbers that such a sampler gives."""

import math

import pytest
import torch

from rl.parity.gap import surprise
from rl.parity.hypotheses import explain, fit_temperature, shifts
from rl.sampling.truncation import Truncation, keep

torch.manual_seed(0)
LOGITS = 3.0 * torch.randn(60, 50)


def said(temperature: float, cut: Truncation | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets drawn by such a sampler, and their log-probabilities."""
    scaled = LOGITS / temperature
    if cut:
        scaled = scaled.masked_fill(~keep(scaled, cut), -torch.inf)
    log_p = scaled.log_softmax(-1)
    targets = torch.multinomial(log_p.exp(), 1, generator=torch.Generator().manual_seed(1))
    return targets[:, 0], log_p.gather(1, targets)[:, 0]


@pytest.mark.parametrize(
    ("true", "cause", "says"),
    [
        (said(0.6), "temperature", "temperature 0.6"),
        (said(0.8, Truncation(top_p=0.9)), "truncation", "top_p=0.9"),
        (said(0.8, Truncation(top_k=10)), "truncation", "top_k=10"),
        (said(0.8, Truncation(min_p=0.1)), "truncation", "min_p=0.1"),
    ],
)
def test_the_true_guess_leaves_nothing(true: tuple, cause: str, says: str) -> None:
    best = explain(LOGITS, *true, temperature=0.8, truncation=None)[0]
    assert best.cause == cause
    assert says in best.text
    assert best.residual < 1e-4


def test_raw_log_probabilities_are_told_from_another_temperature() -> None:
    targets, _ = said(0.8)
    raw = LOGITS.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    guesses = explain(LOGITS, targets, raw, temperature=0.8, truncation=None)
    assert guesses[0].cause == "raw_logprobs"
    assert guesses[0].residual < 1e-6


def test_a_trainer_that_cuts_alone_is_told() -> None:
    guesses = explain(LOGITS, *said(0.8), temperature=0.8, truncation=Truncation(top_k=5))
    assert guesses[0].text == "it samples from the whole vocabulary"
    assert guesses[0].residual < 1e-6


def test_the_fitted_temperature_is_the_one_that_was_used() -> None:
    for temperature in (0.5, 1.0, 1.7):
        targets, rollout = said(temperature)
        best, left = fit_temperature(LOGITS, targets, rollout)
        assert best == pytest.approx(temperature, abs=1e-3)
        assert left < 1e-3


def test_a_shift_by_one_leaves_nothing_in_its_direction() -> None:
    trainer = torch.randn(2, 6)
    mask = torch.tensor([[True] * 6, [False, True, True, True, True, False]])
    after, before = shifts(trainer, trainer.roll(-1, dims=1), mask)
    assert after.residual == 0.0
    assert "token after" in after.text
    assert before.residual > 0.1
    after, before = shifts(trainer, trainer.roll(1, dims=1), mask)
    assert before.residual == 0.0
    assert after.residual > 0.1


def test_surprise_is_near_zero_for_draws_and_large_for_anything_else() -> None:
    many = (LOGITS / 0.8).repeat(20, 1)
    log_p = many.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)

    def of(tokens: torch.Tensor) -> float:
        said = log_p.gather(1, tokens[:, None]).T
        return surprise(said, entropy[None], torch.ones_like(said, dtype=torch.bool))

    generator = torch.Generator().manual_seed(2)
    drawn = [of(torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]) for _ in range(200)]
    assert abs(sum(drawn) / 200) < 0.3
    assert max(map(abs, drawn)) < 4
    assert of(torch.multinomial((many / 2).softmax(-1), 1, generator=generator)[:, 0]) > 10
    assert of(many.argmax(-1)) < -10
    said = log_p[:, 0][None]
    assert math.isnan(surprise(said * math.nan, entropy[None], torch.ones_like(said, dtype=torch.bool)))
