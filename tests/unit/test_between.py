"""What an engine computes between its layers is explained by the change that was made, and by no other."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl.parity.body import fits
from rl.parity.body.attention import Attention, explain_attention
from rl.parity.body.rotary import explain_rotation
from rl.parity.guesses.guess import Hypothesis

SIZE, PROMPT = 20, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def asked() -> Attention:
    causal = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
    q, k, v = normal(4, SIZE, 16), normal(2, SIZE, 16, seed=1), normal(2, SIZE, 16, seed=2)
    return Attention(q=q, k=k, v=v, mask=causal, scaling=0.25, prompt=PROMPT)


def windowed(a: Attention, n: int) -> Attention:
    index = torch.arange(SIZE)
    return replace(a, mask=a.mask & (index[:, None] - index < n))


def open_prompt(a: Attention) -> Attention:
    mask = a.mask.clone()
    mask[:PROMPT, :PROMPT] = True
    return replace(a, mask=mask)


OTHER = normal(2, SIZE, 16, seed=3), normal(2, SIZE, 16, seed=4)


def best(found: list[Hypothesis], error: float) -> Hypothesis:
    return fits.best(found, error)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "cause", "text"),
    [
        (lambda a: replace(a, scaling=0.3), "attention_scale", "its scale is 0.3, the trainer's 0.25"),
        (lambda a: windowed(a, 5), "attention_window", "its window is 5 tokens, the trainer has none"),
        (lambda a: replace(a, softcap=0.7), "attention_cap", "its soft cap is 0.7, the trainer has none"),
        (open_prompt, "attention_mask", "it is not causal"),
        (lambda a: replace(a, tiled=True), "attention", "take the key heads in turn"),
        (lambda a: replace(a, v=fits.rounded(a.v, "bf16")), "kv_cache", "values are rounded to bf16"),
        (lambda a: replace(a, k=OTHER[0], v=OTHER[1]), "kv_cache", "keys and values are those of layer 7"),
        (lambda a: replace(a, k=a.k.roll(1, 1), v=a.v.roll(1, 1)), "kv_cache", "those of the token before"),
    ],
)
def test_another_attention_is_recognised(change: Callable, cause: str, text: str) -> None:
    mine = asked()
    theirs = change(mine).output()
    found = explain_attention(theirs, mine, others=[("layer 7", *OTHER)], decode_only=False)
    error = fits.error(theirs, mine.output())
    first = best(found, error)
    assert first.cause == cause
    assert text in first.text
    assert first.residual < fits.LEFT * error
    assert [g.cause for g in found if g.residual < fits.LEFT * error and g.cause != cause] == []


def test_an_attention_that_nothing_explains_fits_nothing() -> None:
    mine = asked()
    theirs = mine.output() + 0.1 * normal(SIZE, 64, seed=9)
    error = fits.error(theirs, mine.output())
    found = explain_attention(theirs, mine, others=[("layer 7", *OTHER)], decode_only=False)
    assert not any(fits.explains(guess, error, 1e-4) for guess in found)


def test_a_window_that_only_the_trainer_has_is_recognised() -> None:
    mine = windowed(asked(), 6)
    found = explain_attention(asked().output(), mine, others=[], decode_only=False)
    assert best(found, 1.0).text == "it has no window, the trainer's is 6"


def turned(x: Tensor, positions: Tensor, speed: Tensor, *, halves: bool = True) -> Tensor:
    angles = positions[:, None] * speed
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, -1) if halves else (x[..., ::2], x[..., 1::2])
    pair = a * cos - b * sin, b * cos + a * sin
    return torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2)


def frequencies(theta: float) -> Tensor:
    return theta ** -(torch.arange(0, 16, 2) / 16)


INDEX = torch.arange(SIZE).float()
UNEVEN = torch.tensor([1, 1, 1, 0.7, 0.4, 0.2, 0.1, 0.1])


@pytest.mark.slow
@pytest.mark.parametrize("halves", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize(
    ("positions", "speed", "cause", "text"),
    [
        (INDEX + 3, frequencies(1e4), "positions", "every token is at its position +3"),
        (INDEX + (INDEX >= PROMPT), frequencies(1e4), "positions", "in decode every token is at its position +1"),
        (INDEX * 0, frequencies(1e4), "positions", "every token is at position 0"),
        (INDEX, frequencies(5e5), "rope", "theta is 5e+05, the trainer's 10000"),
        (INDEX, frequencies(1e4) / 8, "rope", "its frequencies are the trainer's times 0.125"),
        (INDEX, -frequencies(1e4), "rope", "it turns the other way"),
        (
            INDEX,
            frequencies(1e4) * torch.tensor([1, 1, 1, 0.7, 0.4, 0.2, 0.1, 0.1]),
            "rope",
            "its frequencies are 1 (fi",
        ),
    ],
)
def test_another_rotation_is_recognised(positions: Tensor, speed: Tensor, cause: str, text: str, halves: bool) -> None:
    x, own = normal(6, SIZE, 20), frequencies(1e4)
    width = 16  # four features do not turn

    def rotate(positions: Tensor, speed: Tensor) -> Tensor:
        return torch.cat([turned(x[..., :width], positions, speed, halves=halves), x[..., width:]], -1)

    angles = INDEX[:, None] * own
    angles = torch.cat([angles, angles], -1) if halves else angles.repeat_interleave(2, -1)
    mine, theirs = rotate(INDEX, own), rotate(positions, speed)
    found = explain_rotation(theirs, mine, angles.cos(), angles.sin(), PROMPT)
    error = fits.error(theirs, mine)
    first = best(found, error)
    assert (first.cause, first.text[: len(text)]) == (cause, text)
    assert first.residual < fits.LEFT * error


def test_another_pairing_of_features_is_recognised() -> None:
    x, own = normal(6, SIZE, 16), frequencies(1e4)
    angles = INDEX[:, None] * own
    whole = torch.cat([angles, angles], -1)
    mine, theirs = turned(x, INDEX, own), turned(x, INDEX, own, halves=False)
    first = best(explain_rotation(theirs, mine, whole.cos(), whole.sin(), PROMPT), 1.0)
    assert first.text == "it turns neighbouring features together"
    assert first.residual < 1e-5


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        (lambda base, branch: base + 1.3 * branch, "it adds 1 times the stream and 1.3 times the branch"),
        (lambda base, branch: 0.5 * base + branch, "it adds 0.5 times the stream and 1 times the branch"),
        (lambda base, branch: 1.1 * (base + branch), "it equals the trainer's times 1.1"),
        (lambda base, branch: fits.rounded(base + branch, "bf16"), "it holds only bf16 values"),
    ],
)
def test_another_residual_stream_is_recognised(theirs: Callable, text: str) -> None:
    base, branch = normal(SIZE, 32), normal(SIZE, 32, seed=1)
    other = theirs(base, branch)
    found = fits.stream(other, base + branch, base, [other])
    assert best(found, fits.error(other, base + branch)).text == text


def test_a_rounded_summand_shows_although_the_sum_is_on_no_grid() -> None:
    base, branch = normal(SIZE, 32), normal(SIZE, 32, seed=1)
    summands = [branch, fits.rounded(base, "bf16")]
    found = fits.stream(summands[0] + summands[1], base + branch, base, summands)
    assert best(found, 1e-3).text == "it holds only bf16 values"


@pytest.mark.parametrize(
    "name",
    [
        "int8 with a scale for each row",
        "int4 with a scale for each group of 32",
        "fp8 (e4m3) with a scale for each tensor",
    ],
)
def test_a_quantised_weight_is_on_its_grid_and_on_no_other(name: str) -> None:
    weight = normal(24, 96)
    ways = dict(fits.grids(weight))
    theirs = ways[name]
    assert fits.error(theirs, weight) > 1e-3
    again = {other: fits.error(theirs, values) for other, values in ways.items()}
    error = fits.error(theirs, weight)
    assert [other for other, left in again.items() if left < fits.LEFT * error] == [name]


def test_a_guess_that_leaves_a_third_of_an_error_is_no_name() -> None:
    guess = Hypothesis(cause="scale", text="", residual=3e-3)
    assert not fits.explains(guess, 1e-2, 1e-4)
    assert fits.explains(replace(guess, residual=3e-4), 1e-2, 1e-4)
    # In bf16 a right guess leaves the noise of rounding.
    assert fits.explains(replace(guess, residual=7e-3), 3e-2, 1.5e-2)
