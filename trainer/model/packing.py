"""How does a micro-batch become one row without padding? Sequences end to end, a group's prompt once if it is shared.

With a shared prompt, a group of n completions of P + L tokens costs P + n L token-forwards instead of n (P + L). The
numbers equal those of separate rows: every token attends to the same tokens at the same positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trainer.model.attention import Segment

BUNDLE = 64
"""At most so many tokens of short adjacent sequences attend in one call; there a call costs more than a mask wastes."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One row [1, N]."""

    input_ids: Int[Tensor, "1 N"]
    position_ids: Int[Tensor, "1 N"]
    segments: list[Segment]
    """Lengths of its sequences and their prompts; the lengths add up to N."""
    origin: Int[Tensor, " N"]
    """Which of the batch's B x T columns each column of the row is, counted row by row."""
    source: Int[Tensor, " M"]
    """Column of the row that predicts each masked column of the batch, in the batch's order."""


def pack(input_ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B T"], *, share_prompts: bool) -> Packed:
    """Lay out the rows of a micro-batch, each up to its last masked column; rows without one are left out.

    With `share_prompts`, rows that are equal up to their first masked column share the tokens before it. A batch
    without sampled tokens becomes a one-token dummy row with no loss: every layer must still run.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    first, last = mask.int().argmax(dim=1).tolist(), (mask * torch.arange(mask.shape[1])).amax(dim=1).tolist()
    for row in sorted(mask.any(dim=1).nonzero()[:, 0].tolist(), key=lambda r: (last[r] - first[r], r)):
        shared = tuple(input_ids[row, : first[row] + 1].tolist()) if share_prompts else (row,)
        groups.setdefault(shared, []).append(row)
    ids, positions, origin, segments = [], [], [], []
    answers = torch.zeros(mask.shape, dtype=torch.long)
    column = 0

    def lay(row: int, start: int, end: int) -> None:
        nonlocal column
        ids.append(input_ids[row, start:end])
        positions.append(torch.arange(start, end))
        origin.append(torch.arange(start, end) + row * mask.shape[1])
        answers[row, start:end] = torch.arange(column, column + end - start)
        column += end - start

    for rows in groups.values():
        if len(rows) == 1:
            lay(rows[0], 0, last[rows[0]] + 1)
            _add(segments, Segment(lengths=(last[rows[0]] + 1,)))
            continue
        p = first[rows[0]] + 1
        lay(rows[0], 0, p)
        prompt = len(segments)
        segments.append(Segment(lengths=(p,)))
        answered = column - 1
        for row in rows:
            # The prompt's last column predicts the first token of every completion.
            answers[row, p - 1] = answered
            if last[row] >= p:
                lay(row, p, last[row] + 1)
                _add(segments, Segment(lengths=(last[row] + 1 - p,), prompt=prompt, prompt_length=p))
    if not segments:
        lay(0, 0, 1)
        segments.append(Segment(lengths=(1,)))
    return Packed(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions)[None],
        segments=segments,
        origin=torch.cat(origin),
        source=answers[mask],
    )


def _add(segments: list[Segment], new: Segment) -> None:
    """Append a sequence; it joins the last segment if both are short and have the same prompt."""
    old = segments[-1] if segments else None
    if old is not None and old.prompt == new.prompt and sum(old.lengths) + sum(new.lengths) <= BUNDLE:
        segments[-1] = Segment(lengths=old.lengths + new.lengths, prompt=new.prompt, prompt_length=new.prompt_length)
    else:
        segments.append(new)
