"""How do the rows of an episode become one row? Its sampled tokens, in the order of time.

A forward pass takes rows. Whatever counts or compares samples takes episodes: advantages, ratios of whole samples,
averages and metrics get one row for each. So an objective needs no word about rows, and no cut of an episode into rows
changes what it learns.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rl.types import Batch, PolicyOutput, columns

AnyBatch = TypeVar("AnyBatch", bound=Batch)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the sampled tokens of rows [B, T] lie in one row for each episode [E, L]."""

    shape: torch.Size
    first: Int[Tensor, " E"]
    """The first row of each episode."""
    of_row: Int[Tensor, " B"]
    """The episode of each row."""
    source: Int[Tensor, " N"]
    """Place of every sampled token among the B * T columns, by episode and time."""
    mask: Bool[Tensor, "E L"]

    def tokens(self, x: Tensor) -> Tensor:
        """[B, T, ...] as [E, L, ...]; outside the mask -1 for integers, else 0."""
        assert x.shape[:2] == self.shape, f"{tuple(x.shape)} are not the columns of {tuple(self.shape)}"
        rest = x.shape[2:]
        fill = 0 if x.is_floating_point() or x.dtype == torch.bool else -1
        picked = x.reshape(-1, *rest).index_select(0, self.source)
        mask = self.mask.reshape(*self.mask.shape, *[1] * len(rest)).expand(*self.mask.shape, *rest)
        return x.new_full((*self.mask.shape, *rest), fill).masked_scatter(mask, picked)

    def rows(self, x: Float[Tensor, "E L"]) -> Float[Tensor, "B T"]:
        """[E, L] as [B, T] again; 0 outside the mask."""
        flat = x.new_zeros(self.shape.numel())
        return flat.index_copy(0, self.source, x[self.mask]).reshape(self.shape)

    def batch(self, batch: AnyBatch) -> AnyBatch:
        """The batch with one row for each episode. `input_ids[:, t + 1]` is still the token of column t."""
        joined: dict[str, Any] = {
            name: x[self.first] if x.dim() == 1 else self.tokens(x)
            for name, x in columns(batch).items()
            if name not in ("input_ids", "experts")
        }
        tokens = self.tokens(batch.input_ids[:, 1:]).clamp(min=0)
        joined["input_ids"] = torch.cat([batch.input_ids[self.first, :1], tokens], dim=1)
        return replace(batch, **joined | {"mask": self.mask, "episode_ids": None, "experts": None})

    def policy(self, policy: PolicyOutput) -> PolicyOutput:
        """The policy's numbers in the same places, with their gradients."""
        known = {f.name: getattr(policy, f.name) for f in fields(policy)}
        return replace(policy, **{name: self.tokens(x) for name, x in known.items() if x is not None})


def layout(batch: Batch) -> Layout | None:
    """Where each token goes; None if every row is an episode already.

    The order of time is that of the turns, and within a turn that of the columns.
    """
    if batch.episode_ids is None:
        return None
    mask, device = batch.mask, batch.mask.device
    unique = torch.unique(batch.episode_ids, return_inverse=True)  # pyright: ignore
    names, of_row = cast("tuple[Tensor, Tensor]", unique)
    rows = torch.arange(len(of_row), device=device)
    first = torch.full((len(names),), len(of_row), device=device).scatter_reduce(0, of_row, rows, "amin")
    of_token = of_row[:, None].expand(mask.shape)[mask]
    source = mask.flatten().nonzero()[:, 0]
    if batch.turns is not None:
        order = batch.turns[mask].argsort(stable=True)
        of_token, source = of_token[order], source[order]
    order = of_token.argsort(stable=True)
    lengths = torch.bincount(of_token, minlength=len(names))
    held = torch.arange(max(1, int(lengths.max())), device=device) < lengths[:, None]
    return Layout(shape=mask.shape, first=first, of_row=of_row, source=source[order], mask=held)


def joined(
    batch: AnyBatch, policy: PolicyOutput, advantages: Float[Tensor, "B T"]
) -> tuple[AnyBatch, PolicyOutput, Float[Tensor, "E L"]]:
    """A step, or a micro-batch that holds whole episodes, with one row for each episode.

    The same objects if every row is an episode.
    """
    at = layout(batch)
    return (batch, policy, advantages) if at is None else (at.batch(batch), at.policy(policy), at.tokens(advantages))
