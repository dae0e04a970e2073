"""Estimators of KL(policy || other) from one sampled token, and what they cost in bias and variance."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logprobs: Float[Tensor, "B T"], other: Float[Tensor, "B T"], estimator: Estimator
) -> Float[Tensor, "B T"]:
    """Per-token estimate [B, T] in nats of KL(policy || other), from tokens sampled by the policy.

    With d = other - logprobs: k1 = -d (unbiased, high variance), k2 = d^2 / 2 (its gradient is the true one),
    k3 = e^d - d - 1 (unbiased, never negative). Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    d = other - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d * d
    return d.exp() - d - 1.0
