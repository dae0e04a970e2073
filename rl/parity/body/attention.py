"""Which attention did an engine compute? Recomputed from its own queries, keys and values, and varied until it fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl.parity.body.fits import FORMATS, error, minimum, rounded, scaled
from rl.parity.guesses.guess import Hypothesis


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Queries, keys and values of one sequence in fp32, and how the trainer's model attends."""

    q: Float[Tensor, "H S D"]
    k: Float[Tensor, "G S D"]
    v: Float[Tensor, "G S D"]
    mask: Bool[Tensor, "S S"]
    """True where a token (row) attends."""
    scaling: float
    softcap: float | None = None
    prompt: int
    """Tokens before the first that was sampled."""
    tiled: bool = False
    """Query heads take the key heads in turn, instead of in blocks."""

    def output(self) -> Float[Tensor, "S HD"]:
        """softmax(q k / ...) v of all heads."""
        repeats = len(self.q) // len(self.k)
        k, v = ((x.repeat(repeats, 1, 1) if self.tiled else x.repeat_interleave(repeats, 0)) for x in (self.k, self.v))
        scores = self.q @ k.transpose(1, 2) * self.scaling
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        probabilities = scores.masked_fill(~self.mask, -1e30).softmax(-1)
        return (probabilities @ v).transpose(0, 1).flatten(1)


def explain_attention(
    theirs: Float[Tensor, "S HD"], asked: Attention, *, others: list[tuple[str, Tensor, Tensor]], decode_only: bool
) -> list[Hypothesis]:
    """Guesses; `residual` is the error that each leaves.

    `others` are keys and values of other layers, by name. With `decode_only` the prompt's rows agree, and the guesses
    concern the others.
    """
    rows = slice(asked.prompt if decode_only else 0, None)
    target = theirs[rows]

    def left(attention: Attention) -> float:
        return error(target, attention.output()[rows])

    def guess(cause: str, text: str, attention: Attention) -> Hypothesis:
        return Hypothesis(cause=cause, text=text, residual=left(attention))

    mine = asked.output()[rows]
    found = [scaled(target, mine)]
    power, _ = minimum(lambda x: left(replace(asked, scaling=asked.scaling * 2**x)), [x / 4 for x in range(-24, 25)])
    s = 2**power
    text = f"its scale is {s * asked.scaling:.4g}, the trainer's {asked.scaling:.4g}"
    found.append(guess("attention_scale", text, replace(asked, scaling=asked.scaling * s)))
    found += [guess(cause, text, replace(asked, mask=mask)) for cause, text, mask in _masks(asked)]
    power, _ = minimum(lambda x: left(replace(asked, softcap=2**x)), [x / 2 for x in range(-6, 15)])
    had = f"the trainer's is {asked.softcap:.4g}" if asked.softcap else "the trainer has none"
    found.append(guess("attention_cap", f"its soft cap is {2**power:.3g}, {had}", replace(asked, softcap=2**power)))
    if asked.softcap:
        found.append(guess("attention_cap", f"it has no soft cap, {had}", replace(asked, softcap=None)))
    found += _first_row(target, asked, decode_only)
    if 1 < len(asked.k) < len(asked.q):
        text = "its query heads take the key heads in turn, the trainer's in blocks"
        found.append(guess("attention", text, replace(asked, tiled=True)))
    found += [guess("kv_cache", text, replace(asked, k=k, v=v)) for text, k, v in _caches(asked, others)]
    for name in ("bf16", "fp16"):
        text = f"it agrees once its output is rounded to {name}"
        found.append(Hypothesis(cause="dtype", text=text, residual=error(target, rounded(mine, name))))
        q, k, v = (rounded(x, name) for x in (asked.q, asked.k, asked.v))
        found.append(guess("dtype", f"it computes with {name} queries, keys and values", replace(asked, q=q, k=k, v=v)))
    return found


def _first_row(target: Tensor, asked: Attention, decode_only: bool) -> Iterator[Hypothesis]:
    """The first token sees itself alone, so all query heads of a key head give the value that was read for it, whatever
    the scale, cap or window. If they agree on another value than its own, it was not written there."""
    heads, groups = len(asked.q), len(asked.k)
    if decode_only or asked.tiled or heads == groups or bool(asked.mask[0, 1:].any()):
        return
    read = target[0].view(groups, heads // groups, -1)
    own = asked.v[:, 0]
    agreed = error(read, read[:, :1].expand_as(read)) < 1e-2
    known = min(error(read[:, 0], own.roll(n, 0)) for n in range(groups)) < 0.05
    if agreed and not known:
        text = "the first token's output is not its own value: values are read that were not written for it"
        # What it leaves is not known; a share that is an explanation, but no better than a fit.
        yield Hypothesis(cause="kv_cache", text=text, residual=0.04 * error(target, asked.output()))


def _masks(asked: Attention) -> Iterator[tuple[str, str, Tensor]]:
    """Other masks: the cause, its text, the mask."""
    size, prompt = len(asked.mask), asked.prompt
    row, column = torch.arange(size)[:, None], torch.arange(size)
    causal = column <= row
    windows = [int(n) for n in asked.mask.sum(1)]
    own = f"the trainer's is {max(windows)}" if max(windows) < size else "the trainer has none"
    for n in range(1, size):
        if n != max(windows) or max(windows) == size:
            yield "attention_window", f"its window is {n} tokens, {own}", causal & (row - column < n)
    if max(windows) < size:
        yield "attention_window", f"it has no window, {own}", causal
    inside = (row < prompt) & (column < prompt)
    yield "attention_mask", "it is not causal: a token of the prompt sees those after it", asked.mask | inside
    yield "attention_mask", "a token does not see itself", (asked.mask & (column < row)) | ((row == 0) & (column == 0))
    sampled = row >= prompt
    yield "kv_cache", "a sampled token sees only the prompt", asked.mask & ~(sampled & (column >= prompt))
    yield "kv_cache", "a sampled token does not see the prompt", asked.mask & ~(sampled & (column < prompt))
    yield (
        "kv_cache",
        "a sampled token does not see the sampled tokens before it",
        asked.mask & ~(sampled & (column >= prompt) & (column < row)),
    )


def _caches(asked: Attention, others: list[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Other keys and values: a text, keys, values."""
    k, v, prompt = asked.k, asked.v, asked.prompt
    for name in FORMATS:
        rk, rv = rounded(k, name), rounded(v, name)
        yield f"keys and values are rounded to {name}", rk, rv
        yield f"keys are rounded to {name}", rk, v
        yield f"values are rounded to {name}", k, rv
    size = k.abs().amax() / 127, v.abs().amax() / 127
    rk, rv = ((x / step.clamp(min=1e-30)).round() * step for x, step in zip((k, v), size, strict=True))
    yield "keys and values are rounded to int8", rk, rv
    for name, ok, ov in others:
        if ok.shape == k.shape:
            yield f"keys and values are those of {name}", ok, ov
            yield f"keys are those of {name}", ok, v
            yield f"values are those of {name}", k, ov
    for step, text in ((1, "before"), (-1, "after")):
        yield f"keys and values are those of the token {text}", k.roll(step, 1), v.roll(step, 1)
    empty = torch.arange(k.shape[1])[:, None] < prompt
    yield "keys and values of the prompt are 0", k.masked_fill(empty, 0.0), v.masked_fill(empty, 0.0)
    yield "keys and values are exchanged", v, k
