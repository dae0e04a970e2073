"""How good was each token, compared with what: pure functions from rewards (and values) to advantages."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_relative(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, divide_by_std: bool, eps: float = 1e-4
) -> Float[Tensor, " B"]:
    """Reward minus the mean of its group, over the group's standard deviation (unbiased, plus `eps`) if asked.

    Source: GRPO, arXiv 2402.03300, section 4.1.2; without the division: Dr. GRPO, arXiv 2503.20783.
    """
    _, index, count = torch.unique(group_ids, return_inverse=True, return_counts=True)
    mean = torch.zeros(len(count)).index_add(0, index, rewards) / count
    centred = rewards - mean[index]
    if not divide_by_std:
        return centred
    var = torch.zeros(len(count)).index_add(0, index, centred**2) / (count - 1).clamp(min=1)
    return centred / (var.sqrt()[index] + eps)


def spread(per_sequence: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Give every sampled token of a sequence that sequence's number; 0 elsewhere."""
    return per_sequence[:, None] * mask


def gae(
    rewards: Float[Tensor, " B"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, "B T"]:
    """Generalised advantage estimates [B, T] for a reward paid at the last sampled token of each sequence.

    A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t, where t + 1 is the next *sampled*
    token (tool replies in between are not steps) and V is 0 after the last. Source: arXiv 1506.02438, eq. 16.
    """
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards)
    reward = rewards.clone()
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = reward + gamma * next_value - values[:, t]
        following = torch.where(here, delta + gamma * lam * following, following)
        next_value = torch.where(here, values[:, t], next_value)
        reward = torch.where(here, 0.0, reward)
        advantages[:, t] = torch.where(here, following, 0.0)
    return advantages


def whiten(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], eps: float = 1e-8) -> Float[Tensor, "B T"]:
    """Shift and scale sampled tokens to mean 0 and variance 1 over the whole step; 0 elsewhere."""
    picked = x[mask]
    scaled = (x - picked.mean()) * (picked.var(unbiased=False) + eps).rsqrt()
    return torch.where(mask, scaled, 0.0)
