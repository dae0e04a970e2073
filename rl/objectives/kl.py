"""Estimators of KL(policy || other) from one sampled token: their bias, variance and gradient.

An unbiased estimate of a divergence may have the wrong gradient. For tokens that the policy sampled:

| estimator | in the loss: its mean gradient is the gradient of | in the reward: only its value is used |
|---|---|---|
| k1 | nothing, because E[grad log pi] = 0 | KL(policy || other), correct |
| k2 | KL(policy || other), correct | biased |
| k3 | KL(other || policy), the reverse | KL(policy || other), with high variance if the two are far apart |
| k3+ | KL(policy || other), correct: the value of k3 with the gradient of k2 | the same as k3 |
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rl.objectives.ratios import LOG_RATIO_BOUND

Estimator = Literal["k1", "k2", "k3", "k3+"]


def kl_estimate(
    logprobs: Float[Tensor, "B T"], other: Float[Tensor, "B T"], estimator: Estimator
) -> Float[Tensor, "B T"]:
    """Per-token estimate [B, T] in nats of KL(policy || other), from tokens sampled by the policy.

    With d = other - logprobs: k1 = -d (unbiased, high variance), k2 = d^2 / 2 (its gradient is the true one),
    k3 = e^d - d - 1 (unbiased, never negative), k3+ = the value of k3 with the gradient of k2. d is clamped to +-20
    before the exp. Source: J. Schulman, "Approximating KL divergence" (2020); k3+ as in verl.
    """
    d = other - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d * d
    bounded = d.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    k3 = bounded.exp() - bounded - 1.0
    if estimator == "k3":
        return k3
    k2 = 0.5 * d * d
    return k2 + (k3 - k2).detach()
