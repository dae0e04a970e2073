"""Would other prompts or other positions give an engine's numbers? The witness computes them again."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rl.parity.guesses.guess import Hypothesis
from rl.parity.guesses.told import Told
from rl.types import Batch
from trainer.model.witness import Witness

ROWS = 6
"""Rows that each edit is tried on."""
Edit = Callable[[Tensor], Tensor | None]
"""Another prompt [P] for the one that was sent; None where it cannot be made."""

PROMPTS: dict[str, Edit] = {
    "its first token doubled": lambda p: torch.cat([p[:1], p]),
    "its last token doubled": lambda p: torch.cat([p, p[-1:]]),
    "without its first token": lambda p: p[1:] if len(p) > 1 else None,
    "without its last token": lambda p: p[:-1] if len(p) > 1 else None,
    "without its first half": lambda p: p[len(p) // 2 :] if len(p) > 3 else None,
    "without its second half": lambda p: p[: (len(p) + 1) // 2] if len(p) > 3 else None,
}
MOST_CUT = 16
"""Tokens that may be missing at one side."""
LONGEST = 64
"""Positions at which they may stop growing."""
POSITIONS = {"one too high": 1, "one too low": -1, "two too high": 2, "two too low": -2}


def edited(witness: Witness, told: Told, part: Batch) -> Iterator[Hypothesis]:
    """Guesses about the prompts that the engine really had, and about the positions of the replies."""
    replies = _chosen(told)
    prompts = [part.input_ids[told.rows[r.start], : int(told.columns[r.start]) + 1] for r in replies]
    texts = [told.targets[r] for r in replies]

    def left(change: Callable[[int], tuple[Tensor, Callable[[int, int], Tensor] | None] | None]) -> float | None:
        """Mean |d| that remains with these ids and positions."""
        gaps: list[Tensor] = []
        for i, (reply, text) in enumerate(zip(replies, texts, strict=True)):
            made = change(i)
            if made is None:
                return None
            prompt, positions = made
            ids = torch.cat([prompt, text])[:-1]
            logits = witness.row(ids, None if positions is None else positions(len(ids), len(prompt)))[0]
            gaps.append((told_under(told, reply, logits[len(prompt) - 1 :]) - told.reported[reply]).abs())
        return float(torch.cat(gaps).mean())

    for text, edit in PROMPTS.items():
        residual = left(lambda i, edit=edit: None if (p := edit(prompts[i])) is None else (p, None))
        if residual is not None:
            yield Hypothesis(cause="prompt_tokens", text=f"the engine had each prompt {text}", residual=residual)
    longest = min(len(p) for p in prompts)
    for n in range(2, min(MOST_CUT, longest - 1) + 1):
        for side, cut in (("first", lambda p, n=n: p[n:]), ("last", lambda p, n=n: p[:-n])):
            residual = left(lambda i, cut=cut: (cut(prompts[i]), None))
            if residual is not None:
                text = f"the engine had each prompt without its {side} {n} tokens"
                yield Hypothesis(cause="prompt_tokens", text=text, residual=residual, fitted=1)
    yield from _exchanged(witness, told, part, replies)

    def positioned(text: str, at: Callable[[int, int], Tensor], fitted: int = 0) -> Iterator[Hypothesis]:
        residual = left(lambda i: (prompts[i], lambda n, p: at(n, p).to(prompts[i].device)))
        if residual is not None:
            yield Hypothesis(cause="positions", text=text, residual=residual, fitted=fitted)

    ends = [len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True)]
    for most in range(1, min(max(ends), LONGEST) - 1):
        yield from positioned(f"positions stop growing at {most}", lambda n, p, m=most: torch.arange(n).clamp(max=m), 1)
    first = _first_other(told)
    if first is not None:
        yield from positioned(f"positions start again at {first}", lambda n, p: torch.arange(n) % first, 1)
        yield from _windowed(witness, told, prompts, texts, replies, first)
    for early, where in ((0, "after the prompt"), (1, "from the prompt's last token on")):
        for text, by in POSITIONS.items():
            yield from positioned(f"positions {where} are {text}", lambda n, p, e=early, b=by: _moved(n, p - e, b))
        yield from positioned(f"positions start again {where}", lambda n, p, e=early: _moved(n, p - e, e - p))


def _chosen(told: Told) -> list[slice]:
    """The replies that an edit is tried on: the half with the largest gaps, because a guess that leaves those as they
    are explains nothing; and others evenly."""
    apart = (told.expected - told.reported).abs()
    by_gap = sorted(told.replies(), key=lambda reply: -float(apart[reply].mean()))
    worst, rest = by_gap[: ROWS // 2], by_gap[ROWS // 2 :]
    more = rest[:: max(1, len(rest) // (ROWS - len(worst)))][: ROWS - len(worst)]
    return sorted([*worst, *more], key=lambda reply: reply.start)


def _exchanged(witness: Witness, told: Told, part: Batch, replies: list[slice]) -> Iterator[Hypothesis]:
    """Each reply was sampled for another prompt of the batch."""
    firsts = {int(told.groups[told.rows[r.start].cpu()]): r for r in told.replies()}
    others = [part.input_ids[told.rows[r.start], : int(told.columns[r.start]) + 1] for r in firsts.values()]
    if len(others) < 2:
        return
    best: list[Tensor] = []
    for reply in replies:
        own = part.input_ids[told.rows[reply.start], : int(told.columns[reply.start]) + 1]
        tried = []
        for prompt in others:
            if len(prompt) == len(own) and bool((prompt == own).all()):
                continue
            logits = witness.row(torch.cat([prompt, told.targets[reply]])[:-1])[0]
            tried.append((told_under(told, reply, logits[len(prompt) - 1 :]) - told.reported[reply]).abs())
        if not tried:
            return
        best.append(min(tried, key=lambda d: float(d.mean())))
    text = "each reply was sampled for another prompt of the batch"
    yield Hypothesis(cause="swapped", text=text, residual=float(torch.cat(best).mean()), fitted=1)


def _first_other(told: Told) -> int | None:
    """The first position from which on numbers differ, if all before it agree; in tokens from the sequence's start."""
    d = (told.expected - told.reported).abs()
    bad = d > max(1e-3, 0.02 * float(d.mean()))
    if not bad.any():
        return None
    # Column t is computed from the token at position t.
    first = int(told.columns[bad].min())
    before = int((told.columns < first).sum())
    return first if before >= 3 and first > 1 else None


def _windowed(
    witness: Witness, told: Told, prompts: list[Tensor], texts: list[Tensor], replies: list[slice], first: int
) -> Iterator[Hypothesis]:
    """Attention over the last tokens alone: with a window of n, the token at position n is the first that differs."""
    gaps: list[Tensor] = []
    for prompt, text, reply in zip(prompts, texts, replies, strict=True):
        ids = torch.cat([prompt, text])[:-1]
        logits = witness.row(ids, window=first)[0]
        gaps.append((told_under(told, reply, logits[len(prompt) - 1 :]) - told.reported[reply]).abs())
    text = f"attention has a window of {first} tokens"
    yield Hypothesis(cause="attention_window", text=text, residual=float(torch.cat(gaps).mean()), fitted=1)


def told_under(told: Told, reply: slice, logits: Tensor) -> Tensor:
    """The numbers of one reply with other logits [n, V]."""
    names = ("reported", "rows", "columns", "forbidden", "support")
    cut = {name: value[reply] for name in names if (value := getattr(told, name)) is not None}
    return replace(told, logits=logits, **cut).expected


def _moved(length: int, start: int, by: int) -> Tensor:
    at = torch.arange(length)
    return torch.where(at >= start, at + by, at).clamp(min=0)
