"""How do a ratio and an advantage become a per-token loss? The pure functions that objectives share.

All take log-ratios in nats, clamped to +-20 before any exp (`LOG_RATIO_BOUND`): e^100 is infinite in fp32, and the
gradient of a clipped branch, 0 times infinity, is NaN. A token beyond the bound has no gradient.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl.objectives.advantages import spread
from rl.objectives.ratios import ratio_of
from rl.reduce import masked_mean
from rl.types import Metrics, TokenLoss


def clipped_surrogate(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token, and how often each side binds.

    With `dual_clip` c > 1, where A < 0 the loss is at most -c A, however large r is. Sources: PPO, arXiv 1707.06347,
    eq. 7; asymmetric bounds: DAPO, arXiv 2503.14476, eq. 8; dual clip: arXiv 1912.09729, eq. 5.
    """
    ratio = ratio_of(log_ratio)
    held = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = torch.max(-ratio * advantages, held)
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    metrics = clip_metrics(low, high)
    if dual_clip is not None:
        # torch.where, so the ratio of a cut token gets no gradient (0 * inf would be NaN).
        dual = (ratio > dual_clip) & (advantages < 0)
        loss = torch.where(dual, -dual_clip * advantages, loss)
        metrics["actor/clip_frac_dual"] = dual.float()
    return loss, metrics


def clip_metrics(low: Bool[Tensor, "B T"], high: Bool[Tensor, "B T"]) -> Metrics:
    """`actor/clip_frac` and its sides."""
    return {
        "actor/clip_frac": (low | high).float(),
        "actor/clip_frac_low": low.float(),
        "actor/clip_frac_high": high.float(),
    }


def reinforce(log_ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-r A: on-policy, where r = 1, its gradient is -A grad log pi (Williams, 1992); else importance-weighted."""
    return -ratio_of(log_ratio) * advantages


def truncated_reinforce(
    logprobs: Float[Tensor, "B T"],
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: a clipped token keeps a gradient, with a bounded weight.

    Source: CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5.
    """
    ratio = ratio_of(log_ratio).detach()
    metrics = clip_metrics(ratio < 1.0 - clip_low, ratio > 1.0 + clip_high)
    return -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages * logprobs, metrics


def soft_gate(
    log_ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"], tau_positive: float, tau_negative: float
) -> TokenLoss:
    """-4 / tau sigmoid(tau (r - 1)) A with a tau for each sign of A: slope 1 at r = 1, less on both sides.

    `actor/gate` is that slope, 4 p (1 - p) with p the sigmoid: the share of the gradient that passes. Source:
    SAPO, arXiv 2511.20347, eq. 5 to 8.
    """
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    p = torch.sigmoid(tau * (ratio_of(log_ratio) - 1.0))
    return -4.0 / tau * p * advantages, {"actor/gate": (4.0 * p * (1.0 - p)).detach()}


def token_by_token(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The mean log-ratio of each sequence at each of its sampled tokens, with a gradient to that token alone.

    log s_t = sg(mean log r) + log r_t - sg(log r_t), 0 outside the mask. A loss s_t A_t has the gradient
    s A_t grad log pi_t at token t; if all tokens share A, the sum of these is the gradient of s A.
    Source: arXiv 2507.18071, eq. 14.
    """
    own = torch.where(mask, log_ratio - log_ratio.detach(), 0.0)
    return spread(masked_mean(log_ratio.detach(), mask), mask) + own


def geometric_mean(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """-exp(mean_t clip(log r_t)) A: every token's log-ratio is clipped on the side its advantage pushes to.

    The bounds are in log space: r between e^-clip_low and e^clip_high. Source: GMPO, arXiv 2507.20673, eq. 4.
    """
    low, high = (log_ratio < -clip_low) & (advantages < 0), (log_ratio > clip_high) & (advantages > 0)
    held = torch.where(low, -clip_low, torch.where(high, clip_high, log_ratio))
    return reinforce(token_by_token(held, mask), advantages), clip_metrics(low, high)


def check_clip(clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    """Raise ValueError for bounds that would cut tokens on which old and new policy agree (ratio 1)."""
    if clip_low < 0 or clip_high < 0:
        raise ValueError(
            f"clip_low={clip_low:g} and clip_high={clip_high:g} must not be negative: ratios are kept between "
            "1 - clip_low and 1 + clip_high"
        )
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip:g} must be above 1, e.g. 3.0, or None (off)")
