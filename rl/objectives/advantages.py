"""How do rewards (and values) become advantages? Pure functions, one for each baseline; a row is an episode."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rl.types import Batch


def group_relative(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, divide_by_std: bool, eps: float = 1e-4
) -> Float[Tensor, " B"]:
    """Reward minus the mean of its group, over the group's standard deviation (unbiased, plus `eps`) if asked.

    Equal rewards give exactly 0: computed in fp64, because in fp32 the mean of eight times 0.7 is not 0.7. Source:
    GRPO, arXiv 2402.03300, section 4.1.2; without the division: Dr. GRPO, arXiv 2503.20783.
    """
    precise = rewards.double()
    count = group_sums(torch.ones_like(precise), group_ids)
    centred = precise - group_sums(precise, group_ids) / count
    if divide_by_std:
        var = group_sums(centred**2, group_ids) / (count - 1).clamp(min=1)
        centred = centred / (var.sqrt() + eps)
    return centred.to(rewards.dtype)


def leave_one_out(rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Reward minus the mean reward of the group's other samples; 0 in a group of one. Source: RLOO, arXiv 2402.14740.

    R_i - (S - R_i) / (k - 1) = (R_i - S / k) k / (k - 1), with S the group's sum and k its size.
    """
    precise = rewards.double()
    count = group_sums(torch.ones_like(precise), group_ids)
    others = (precise - group_sums(precise, group_ids) / count) * count / (count - 1).clamp(min=1)
    return others.to(rewards.dtype)


def length_weighted(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Reward minus the mean of its group, weighted by the number of sampled tokens.

    Source: OPO, arXiv 2505.23585, eq. 7.
    """
    precise, tokens = rewards.double(), mask.sum(dim=1).double()
    baseline = group_sums(tokens * precise, group_ids) / group_sums(tokens, group_ids).clamp(min=1)
    return (precise - baseline).to(rewards.dtype)


def group_sums(x: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The sum of x over each row's group, at that row. Rows of a group need not be adjacent; sizes may differ."""
    unique = torch.unique(group_ids, return_inverse=True)  # pyright: ignore
    names, index = cast("tuple[Tensor, Tensor]", unique)
    return x.new_zeros(len(names)).index_add(0, index, x)[index]


def spread(per_sequence: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Give every sampled token of a sequence that sequence's number; 0 elsewhere."""
    return per_sequence[:, None] * mask


def at_end(rewards: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Pay each sequence's reward at its last sampled token, and 0 elsewhere."""
    last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    return rewards[:, None] * last


def token_rewards(batch: Batch) -> Float[Tensor, "B T"]:
    """The reward of every token: `batch.token_rewards` if set, else the sequence's reward at its last token."""
    return at_end(batch.rewards, batch.mask) if batch.token_rewards is None else batch.token_rewards


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
    turns: Int[Tensor, "B T"] | None = None,
    turn_gamma: float = 1.0,
) -> Float[Tensor, "B T"]:
    """Generalised advantage estimates [B, T] for the rewards of every token.

    A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t, where t + 1 is the next *sampled*
    token (tool replies in between are skipped) and V is 0 after the last. Source: arXiv 1506.02438, eq. 16. From the
    last token of a turn to the first of the next, gamma is multiplied by `turn_gamma`.
    """
    columns = values.shape[1]
    places = torch.where(mask, torch.arange(columns, device=mask.device), columns)
    # For every column the next sampled one, and `columns`, where the value is 0, after the last.
    later = F.pad(places[:, 1:], (0, 1), value=columns).flip(1).cummin(dim=1).values.flip(1)
    between = torch.ones_like(values)
    if turns is not None and turn_gamma != 1.0:
        between[F.pad(turns, (0, 1), value=-1).gather(1, later) != turns] = turn_gamma
    delta = rewards + gamma * between * F.pad(values, (0, 1)).gather(1, later) - values
    following, advantages = torch.zeros_like(values[:, 0]), [values[:, :0]]
    for here, step, factor in zip(*(each.unbind(1)[::-1] for each in (mask, delta, between)), strict=True):
        following = torch.where(here, step + gamma * lam * factor * following, following)
        advantages.append(following[:, None])
    return torch.where(mask, torch.cat(advantages, dim=1).flip(1), 0.0)


def whiten(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], eps: float = 1e-8) -> Float[Tensor, "B T"]:
    """Shift and scale sampled tokens to mean 0 and variance 1 over the whole step; 0 elsewhere."""
    picked = x[mask]
    scaled = (x - picked.mean()) * (picked.var(unbiased=False) + eps).rsqrt()
    return torch.where(mask, scaled, 0.0)


def kept_by_second_moment(
    log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], limit: float
) -> Bool[Tensor, "B T"]:
    """The sampled tokens that stay when the largest (log r)^2 are removed until the mean is at most `limit`.

    Tokens with equal (log r)^2 stay or are removed together. Source: M2PO, arXiv 2510.01161, algorithm 1.
    """
    square = torch.where(mask, log_ratio.double() ** 2, torch.inf)
    ordered = square[mask].sort().values
    # The running mean of an ascending sequence ascends too: all means within the limit come first.
    mean = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=mask.device)
    stay = int((mean <= limit).sum())
    return mask if stay == len(ordered) else mask & (square < ordered[stay])
