"""Are the numbers log-probabilities of the sampled tokens in nats, or something near them?"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from rl.parity.guesses.guess import Hypothesis
from rl.parity.guesses.told import Told


def guesses(told: Told) -> Iterator[Hypothesis]:
    """Other units, sums, other tokens' numbers, and rounded numbers."""
    for cause, text, numbers in _numbers(told):
        yield Hypothesis(cause=cause, text=text, residual=told.remains(numbers))
    yield from _affine(told)
    yield from _rounded(told)
    yield from _bounded(told)


def _numbers(told: Told) -> Iterator[tuple[str, str, Float[Tensor, " N"]]]:
    right, log_p = told.expected, told.log_p
    chosen = told.targets[:, None]
    logits = told.logits.gather(1, chosen)[:, 0]
    p, finite = log_p.exp(), log_p.clamp(min=-1e30)
    yield "unit", "the numbers are in bits (log2)", right / math.log(2)
    yield "unit", "the numbers are log10", right / math.log(10)
    yield "unit", "the numbers have the other sign", -right
    yield "unit", "the numbers are probabilities", right.exp()
    yield "unit", "the numbers are log(1 - p)", torch.log1p(-right.exp().clamp(max=1 - 1e-7))
    yield "unit", "the numbers are sums from the reply's first token on", _by_reply(told, lambda x: x.cumsum(0))
    yield "unit", "the numbers are sums to the reply's end", _by_reply(told, lambda x: x.flip(0).cumsum(0).flip(0))
    yield "unit", "each number is the sum over the reply", _by_reply(told, lambda x: x.sum().expand_as(x))
    yield "unit", "each number is the mean over the reply", _by_reply(told, lambda x: x.mean().expand_as(x))
    yield "unit", "the numbers are means from the reply's first token on", _by_reply(told, _running_mean)
    yield "unit", "the numbers are divided by the reply's length", _by_reply(told, lambda x: x / len(x))
    yield "unit", "the numbers are entropies", -(p * finite).sum(-1)
    yield "unit", "the numbers are negative entropies", (p * finite).sum(-1)
    yield "unit", "the numbers are logits, without the softmax", logits
    yield "unit", "the numbers are logits over the temperature, without the softmax", logits / told.temperature
    yield "unit", "the numbers are logits minus the largest logit", (logits - told.logits.amax(-1)) / told.temperature
    yield "other_token", "the numbers are those of the most likely token", log_p.amax(-1)
    if log_p.shape[-1] > 1:
        yield "other_token", "the numbers are those of the second most likely token", log_p.topk(2).values[:, 1]
    yield "other_token", "the numbers are those of the least likely token", finite.amin(-1)
    before = told.input_ids[told.rows, told.columns][:, None]
    yield "shift", "the numbers are those of the token before, at the same place", log_p.gather(1, before)[:, 0]
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        inside = (told.logits.to(dtype) / told.temperature).log_softmax(-1).float()
        yield "unit", f"the softmax runs in {name}", inside.gather(1, chosen)[:, 0]
        for what, logits in (
            ("logits", told.logits.to(dtype).float()),
            ("logits over the temperature", (told.logits / told.temperature).to(dtype).float() * told.temperature),
        ):
            rounded = told.under(told.temperature, told.truncation, logits=logits).gather(1, chosen)[:, 0]
            yield "rounded", f"the {what} are rounded to {name}", rounded


def _by_reply(told: Told, of: Callable[[Tensor], Tensor]) -> Float[Tensor, " N"]:
    return torch.cat([of(told.expected[reply]) for reply in told.replies()])


def _running_mean(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return x.cumsum(0) / torch.arange(1, len(x) + 1, device=x.device)


def _affine(told: Told) -> Iterator[Hypothesis]:
    """One factor and one shift for all numbers."""
    if len(told.expected) < 8:
        return
    right, said = told.expected.double(), told.reported.double()
    factor = float((right * said).sum() / right.square().sum().clamp(min=1e-12))
    numbers = (factor * right).float()
    text = f"the numbers are {factor:.4g} times as large"
    yield Hypothesis(cause="unit", text=text, residual=told.remains(numbers), fitted=1)
    moved = float((said - right).median())
    text = f"each number is larger by {moved:.3g} nats" if moved > 0 else f"each number is smaller by {-moved:.3g} nats"
    yield Hypothesis(cause="unit", text=text, residual=told.remains(told.expected + moved), fitted=1)


def _rounded(told: Told) -> Iterator[Hypothesis]:
    """Numbers that all lie on a grid; the right ones are at most a step away."""
    said = told.reported
    if len(said) < 8 or not said.any():
        return
    left = told.remains(told.expected)
    for digits in (0, 1, 2, 3):
        scaled = said.double() * 10**digits
        if bool(((scaled - scaled.round()).abs() <= 1e-4 * scaled.abs().clamp(min=1)).all()):
            beyond = max(0.0, left - 0.5 * 10**-digits)
            yield Hypothesis(cause="rounded", text=f"the numbers are rounded to {digits} decimals", residual=beyond)
            return
    for name, dtype, step in (("bf16", torch.bfloat16, 2**-8), ("fp16", torch.float16, 2**-11)):
        if bool((said.to(dtype).float() == said).all()):
            beyond = max(0.0, left - step * float(told.expected.abs().mean()))
            yield Hypothesis(cause="rounded", text=f"the numbers are rounded to {name}", residual=beyond)


def _bounded(told: Told) -> Iterator[Hypothesis]:
    """Numbers cut at a bound, which several then share exactly."""
    for name, bound in (("below", told.reported.amin()), ("above", told.reported.amax())):
        if int((told.reported == bound).sum()) >= max(3, 0.02 * len(told.reported)):
            cut = told.expected.clamp(min=bound) if name == "below" else told.expected.clamp(max=bound)
            text = f"numbers {name} {float(bound):.3g} are cut"
            yield Hypothesis(cause="unit", text=text, residual=told.remains(cut), fitted=1)
