"""How do ranks share a packed row? Each holds an equal part, and in attention they exchange tokens for heads.

DeepSpeed's Ulysses (arXiv 2309.14509): every layer runs on a rank's own tokens; attention runs on the whole row for
some of the heads. This divides a row's activations and the work of the lm_head by the number of ranks.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.model.attention import Segment, attend_segments
from trainer.model.packing import Packed


class Ulysses:
    """One rank in a group of `size` ranks that share each row."""

    def __init__(self, *, rank: int, ranks: int, size: int) -> None:
        """A collective over all ranks, because it creates every group."""
        self.size, self.place = size, rank % size
        self.group = [dist.new_group(list(range(i, i + size))) for i in range(0, ranks, size)][rank // size]
        self.exchange = DistributedAttention(_attend, self.group, scatter_idx=2, gather_idx=1)

    def part(self, row: Packed) -> tuple[Packed, Bool[Tensor, " M"]]:
        """This rank's columns of a row with all of its segments, and a mask of the outputs in these columns."""
        length = row.input_ids.shape[1]
        rest = -length % self.size
        if rest:
            fill = torch.zeros(1, rest, dtype=torch.long)
            row = replace(
                row,
                input_ids=torch.cat([row.input_ids, fill], dim=1),
                position_ids=torch.cat([row.position_ids, fill], dim=1),
                origin=torch.cat([row.origin, fill[0]]),
                segments=[*row.segments, Segment(lengths=(rest,))],
            )
        each = (length + rest) // self.size
        start = self.place * each
        mine = (row.source >= start) & (row.source < start + each)
        own = replace(
            row,
            input_ids=row.input_ids[:, start : start + each],
            position_ids=row.position_ids[:, start : start + each],
            origin=row.origin[start : start + each],
            source=row.source[mine] - start,
        )
        return own, mine

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Float[Tensor, "B S H D"]:
        """Attention over the whole row, for this rank's tokens; arguments [B, heads, S, D] as in `attend`."""
        return self.exchange(*(x.transpose(1, 2) for x in (q, k, v)), batch_dim_idx=0, **how)

    def whole(self, own: Float[Tensor, "R m"], mine: Bool[Tensor, " M"]) -> Float[Tensor, "R M"]:
        """The outputs of all ranks. Gradients reach only this rank's own; their sum over ranks is complete."""
        placed = torch.zeros(len(own), len(mine), dtype=own.dtype, device=own.device).masked_scatter(mine, own)
        others = placed.detach().clone()
        dist.all_reduce(others, group=self.group)
        return torch.where(mine, placed, others)


def _attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return attend_segments(*(x.transpose(1, 2) for x in (q, k, v)), **how)
