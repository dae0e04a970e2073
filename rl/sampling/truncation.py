"""Which tokens of the vocabulary do top-k, top-p and min-p keep? The same as in vLLM."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SHORTLIST = 1024
"""Most likely tokens that top-p tries before it sorts the whole vocabulary; the sort costs more than the logits and
their gradients."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Which tokens may be sampled. The defaults keep all of them."""

    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities add up to this. 1 is off."""
    top_k: int = 0
    """Keep the k most likely tokens, and all that tie with the last of them. 0 is off."""
    min_p: float = 0.0
    """Keep the tokens at least this likely, relative to the most likely one. 0 is off."""

    def check(self) -> None:
        """Raise ValueError, with the remedy, for a value out of range."""
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p={self.top_p} must be above 0 and at most 1 (1 is off)")
        if self.top_k < 0:
            raise ValueError(f"rollout.top_k={self.top_k} must be at least 1, or 0 (which is off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"rollout.min_p={self.min_p} must be between 0 (which is off) and 1")


def keep(logits: Float[Tensor, "N V"], truncation: Truncation) -> Bool[Tensor, "N V"]:
    """True where a token may be sampled, given fp32 logits that are divided by the temperature; at least one per row.

    vLLM's order (0.32, `v1/sample/sampler.py`, `sample`): min-p, then top-k, then top-p over what is left.
    """
    if truncation.min_p:
        p = logits.softmax(-1)
        unlikely = p < p.amax(-1, keepdim=True) * logits.new_tensor(truncation.min_p)
        logits = logits.masked_fill(unlikely, -torch.inf)
    last = None
    if 0 < truncation.top_k < logits.shape[-1]:
        last = logits.topk(truncation.top_k).values[:, -1:]
    if truncation.top_p < 1:
        # vLLM holds top_p in fp32 and compares with 1 - top_p; Python would round it differently.
        return _nucleus(logits, last, 1 - logits.new_tensor(truncation.top_p))
    return _capped(logits, last) > -torch.inf


def _capped(logits: Float[Tensor, "N V"], last: Float[Tensor, "N 1"] | None) -> Float[Tensor, "N V"]:
    return logits if last is None else logits.masked_fill(logits < last, -torch.inf)


def _nucleus(
    logits: Float[Tensor, "N V"], last: Float[Tensor, "N 1"] | None, tail: Float[Tensor, ""]
) -> Bool[Tensor, "N V"]:
    """Of the tokens not below `last`, all but the least likely whose probabilities add up to at most `tail`.

    A row whose boundary lies within the shortlist, between two different logits, needs no sort.
    """
    if logits.shape[-1] <= SHORTLIST:
        return _sorted_nucleus(logits, last, tail)
    capped = _capped(logits, last)
    p = capped.softmax(-1)
    top, ids = capped.topk(SHORTLIST)
    top_p = p.gather(-1, ids).double()
    # _sorted_nucleus sums from the least likely up, this from the most likely down; in double, then rounded, as
    # torch.cumsum does on CPU.
    up_to = (p.sum(-1, keepdim=True, dtype=torch.double) - (top_p.cumsum(-1) - top_p)).float()
    count = (up_to > tail).sum(-1, keepdim=True).clamp(min=1)
    lowest = top.gather(-1, count - 1)
    kept = capped >= lowest
    unsettled = (top.gather(-1, count.clamp(max=SHORTLIST - 1)) >= lowest)[:, 0]
    kept[unsettled] = _sorted_nucleus(logits[unsettled], None if last is None else last[unsettled], tail)
    return kept


def _sorted_nucleus(
    logits: Float[Tensor, "N V"], last: Float[Tensor, "N 1"] | None, tail: Float[Tensor, ""]
) -> Bool[Tensor, "N V"]:
    """The same by vLLM's own steps (`apply_top_k_top_p_pytorch`). If equal logits lie on both sides of the boundary,
    the order of its sort decides."""
    ascending, ids = logits.sort(dim=-1)
    ascending = _capped(ascending, last)
    dropped = ascending.softmax(-1).cumsum(-1) <= tail
    dropped[:, -1] = False
    return torch.zeros_like(dropped).scatter_(-1, ids, ~dropped & (ascending > -torch.inf))
