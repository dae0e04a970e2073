"""Does each number stand at its own token, in its own reply?"""

from collections.abc import Iterator

import torch

from rl.parity.guesses.guess import Hypothesis
from rl.parity.guesses.told import Told

FAR = 2
"""Largest shift that is tried, in tokens."""


def guesses(told: Told) -> Iterator[Hypothesis]:
    """Shifted, missing and exchanged numbers."""
    for kind in (_shifted, _missing, _exchanged, _rows_exchanged, _reordered, _own_shifts):
        yield from kind(told)


def _own_shifts(told: Told) -> Iterator[Hypothesis]:
    """Each reply's numbers are moved by a number of tokens of its own, as after padding at the wrong end."""
    gaps: list[torch.Tensor] = []
    for reply in told.replies():
        right, said = told.expected[reply], told.reported[reply]
        moved = [(right - said).abs()]
        for by in range(1, len(right) - 1):
            moved += [(said[by:] - right[:-by]).abs(), (said[:-by] - right[by:]).abs()]
        gaps.append(min(moved, key=lambda d: float(d.mean())))
    text = "the numbers of each reply are moved by a number of tokens of its own"
    yield Hypothesis(cause="shift", text=text, residual=float(torch.cat(gaps).mean()), fitted=2)


def _reordered(told: Told) -> Iterator[Hypothesis]:
    """Each reply has its own numbers, in another order."""
    replies = [reply for reply in told.replies() if reply.stop - reply.start > 2]
    if not replies:
        return
    right, said = told.expected, told.reported
    backwards = torch.cat([(right[r].flip(0) - said[r]).abs() for r in replies])
    text = "the numbers of each reply are in reversed order"
    yield Hypothesis(cause="swapped", text=text, residual=float(backwards.mean()))
    sets = torch.cat([(right[r].sort().values - said[r].sort().values).abs() for r in replies])
    text = "the numbers of each reply are its own, in another order"
    yield Hypothesis(cause="swapped", text=text, residual=float(sets.mean()), fitted=2)


def _shifted(told: Told) -> Iterator[Hypothesis]:
    for by in (*range(-FAR, 0), *range(1, FAR + 1)):
        left: list[torch.Tensor] = []
        for reply in told.replies():
            right, said = told.expected[reply], told.reported[reply]
            moved, kept = (said[by:], right[:-by]) if by > 0 else (said[:by], right[-by:])
            left.append((moved - kept).abs())
        gaps = torch.cat(left)
        if len(gaps):
            where = f"{'before' if by > 0 else 'after'} the one it stands at"
            text = f"each number belongs to the token {where}" + (f", {abs(by)} away" if abs(by) > 1 else "")
            # Ends have no counterpart, so a shift looks a little better than it is. It is still one guess of four.
            yield Hypothesis(cause="shift", text=text, residual=float(gaps.mean()))


def _missing(told: Told) -> Iterator[Hypothesis]:
    """All numbers are right except at one end of each reply, where they are one constant."""
    d = (told.expected - told.reported).abs()
    replies = told.replies()
    for name, end in (("first", 0), ("last", -1)):
        at = torch.tensor([range(len(d))[reply][end] for reply in replies])
        rest = torch.ones(len(d), dtype=torch.bool)
        rest[at] = False
        if not rest.any() or len(at) < 3:
            continue
        left = float(d.cpu()[rest].mean())
        if float((told.reported[at] - told.reported[at[0]]).abs().max()) == 0.0:
            yield Hypothesis(cause="missing_number", text=f"the {name} number of each reply is missing", residual=left)


def _exchanged(told: Told) -> Iterator[Hypothesis]:
    """Each reply's numbers are right for another reply."""
    replies = told.replies()
    if len(replies) < 2 or len(told.expected) < 3 * len(replies):
        return
    best, same_group = torch.zeros(len(replies)), 0
    for i, one in enumerate(replies):
        said = told.reported[one]
        left = {
            j: float((said[: other.stop - other.start] - told.expected[other][: len(said)]).abs().mean())
            for j, other in enumerate(replies)
            if j != i and min(len(said), other.stop - other.start) >= 2
        }
        if not left:
            return
        j = min(left, key=lambda k: left[k])
        best[i] = left[j]
        groups = told.groups[told.rows[[one.start, replies[j].start]].cpu()]
        same_group += int(groups[0] == groups[1])
    whose = "of the same prompt" if same_group > len(replies) / 2 else "to another prompt"
    # The median, because some replies may be their own.
    text = f"each reply has the numbers of another reply {whose}"
    yield Hypothesis(cause="swapped", text=text, residual=float(best.mean()))


def _rows_exchanged(told: Told) -> Iterator[Hypothesis]:
    """Each row has the numbers of some row, column by column, whatever their prompts' lengths."""
    replies = told.replies()
    if len(replies) < 2 or len(told.expected) < 3 * len(replies):
        return
    right = told.expected.new_zeros(len(told.groups), int(told.columns.max()) + 1)
    right[told.rows, told.columns] = told.expected
    left, moved = 0.0, 0
    for reply in replies:
        apart = (told.reported[reply] - right[:, told.columns[reply]]).abs().sum(dim=1)
        row = int(apart.argmin())
        moved += row != int(told.rows[reply.start])
        left += float(apart[row])
    if moved:
        text = f"{moved} of {len(replies)} rows have the numbers of another row, column by column"
        yield Hypothesis(cause="swapped", text=text, residual=left / len(told.expected), fitted=1)
