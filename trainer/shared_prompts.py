"""One forward pass for a group: its prompt once, its completions side by side, none seeing another.

A group of n completions of P + L tokens costs P + n L token-forwards instead of n (P + L). The numbers are those of
the separate rows: every token attends to the same tokens at the same positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows [G, W], one for each distinct prompt: the prompt, then what follows it in each of its sequences."""

    input_ids: Int[Tensor, "G W"]
    position_ids: Int[Tensor, "G W"]
    attention: Bool[Tensor, "G 1 W W"]
    """True where a column (dim 2) may look (dim 3)."""
    source: Int[Tensor, " N"]
    """Flat column (of G * W) that answers for each masked column of the batch, in the batch's own order."""


def pack(input_ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B T"]) -> Packed:
    """Lay out the rows of a micro-batch by prompt. Rows without a masked column are left out."""
    groups: dict[tuple[int, ...], list[int]] = {}
    first, last = [0] * len(mask), [0] * len(mask)
    for row in range(len(mask)):
        columns = mask[row].nonzero()[:, 0].tolist()
        if columns:
            first[row], last[row] = columns[0], columns[-1]
            groups.setdefault(tuple(input_ids[row, : columns[0] + 1].tolist()), []).append(row)
    width = max(len(prompt) + sum(last[r] - first[r] for r in rows) for prompt, rows in groups.items())
    ids = torch.zeros(len(groups), width, dtype=torch.long)
    positions = torch.zeros(len(groups), width, dtype=torch.long)
    # Padding looks at itself, for a row of the attention that may look nowhere is NaN.
    attention = torch.eye(width, dtype=torch.bool).repeat(len(groups), 1, 1)
    answers = torch.zeros(mask.shape, dtype=torch.long)
    for g, (prompt, rows) in enumerate(groups.items()):
        p = len(prompt)
        ids[g, :p] = torch.tensor(prompt)
        positions[g, :p] = torch.arange(p)
        attention[g, :p, :p] = torch.ones(p, p, dtype=torch.bool).tril()
        start = p
        for row in rows:
            n = last[row] - first[row]
            end = start + n
            ids[g, start:end] = input_ids[row, p : p + n]
            positions[g, start:end] = torch.arange(p, p + n)
            attention[g, start:end, :p] = True
            attention[g, start:end, start:end] = torch.ones(n, n, dtype=torch.bool).tril()
            # The prompt's last column predicts the first token of every completion.
            answers[row, first[row]] = g * width + p - 1
            answers[row, first[row] + 1 : last[row] + 1] = g * width + torch.arange(start, end)
            start = end
    return Packed(input_ids=ids, position_ids=positions, attention=attention[:, None], source=answers[mask])
