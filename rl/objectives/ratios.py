"""Ratios of policies, from log-ratios that cannot overflow."""

import torch
from jaxtyping import Float
from torch import Tensor

from rl.types import Step

LOG_RATIO_BOUND = 20.0
"""Nats to which d is clamped before any exp, as in verl: e^20 is 5e8, and its square is still far from fp32's 3e38."""


def token_log_ratio(batch: Step) -> Float[Tensor, "B T"]:
    """d_t in nats, detached and clamped to +-20; 0 outside the mask."""
    d = (batch.old_logprobs - batch.rollout_logprobs).detach()
    return torch.where(batch.mask, d, 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def sequence_log_ratio(batch: Step) -> Float[Tensor, " B"]:
    """sum_t d_t over the sampled tokens of each sequence in nats, detached; every d_t and the sum clamped to +-20."""
    return token_log_ratio(batch).sum(dim=1).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ratio_of(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """e^d with d clamped to +-20."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
