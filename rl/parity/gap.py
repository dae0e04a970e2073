"""How far are the trainer's log-probabilities from the engine's on the same tokens, and how sure is each number?"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl.objectives import Objective
from rl.objectives.ratios import LOG_RATIO_BOUND
from rl.parity.sample_size import effective_sample_share
from rl.types import Batch, PolicyOutput, step_of


@dataclass(frozen=True, kw_only=True)
class Gap:
    """d = trainer - rollout in nats over the sampled tokens of a batch. Standard errors (`_se`) treat sequences as the
    independent draws, because the tokens of one sequence are not independent."""

    tokens: int
    sequences: int
    mean_abs: float
    p99_abs: float
    max_abs: float
    k1: float
    """mean(-d): estimates KL(rollout || trainer); far from 0 when the two compute different distributions."""
    k1_se: float
    k3: float
    """mean(e^d - d - 1): estimates the same divergence; never negative."""
    k3_se: float
    chi2: float
    """mean(e^2d) - 1; negative when the engine samples from a part of the trainer's support."""
    mult: float
    """mean(e^|d|), NeMo-RL's token_mult_prob_error."""
    outside: float
    """Share of ratios e^d outside [0.5, 2]."""
    ess_token: float
    """Effective sample size over sample size, of the weights w = e^d of tokens."""
    ess_sequence: float
    """The same for whole sequences, w = e^(sum of a sequence's d)."""
    worst: tuple[int, int]
    """Row and column of the largest |d|."""

    @property
    def detectable_k3(self) -> float:
        """The smallest change of k3 that this sample can detect (two standard errors), in nats."""
        return 2 * self.k3_se


def gap(trainer: Float[Tensor, "B T"], rollout: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Gap:
    """Compare two sides' log-probabilities (nats). Raises ValueError when the mask is empty."""
    if not mask.any():
        raise ValueError("there is no sampled token to compare")
    d = torch.where(mask, trainer.double() - rollout.double(), 0.0)
    flat, rows = d[mask], mask.any(dim=1)
    ratio = flat.exp()
    k3 = torch.where(mask, d.exp() - d - 1.0, 0.0)
    sequence = d[rows].sum(dim=1).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    worst = int(d.abs().argmax())
    return Gap(
        tokens=int(mask.sum()),
        sequences=int(rows.sum()),
        mean_abs=float(flat.abs().mean()),
        p99_abs=float(flat.abs().quantile(0.99)),
        max_abs=float(flat.abs().max()),
        k1=float(-flat.mean()),
        k1_se=clustered_error(-d[rows], mask[rows]),
        k3=float(k3[mask].mean()),
        k3_se=clustered_error(k3[rows], mask[rows]),
        chi2=float((ratio**2).mean() - 1.0),
        mult=float(flat.abs().exp().mean()),
        outside=float(((ratio < 0.5) | (ratio > 2.0)).double().mean()),
        ess_token=effective_sample_share(ratio),
        ess_sequence=effective_sample_share(sequence),
        worst=(worst // d.shape[1], worst % d.shape[1]),
    )


def clustered_error(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    """Standard error of the mean of x over the mask, with whole sequences as the independent draws.

    sqrt(S / (S - 1) sum_s (sum of s - mean * length of s)^2) / tokens; NaN for a single sequence.
    """
    sums, lengths = torch.where(mask, x, 0.0).sum(dim=1), mask.sum(dim=1)
    count = len(sums)
    if count < 2:
        return math.nan
    residual = sums - sums.sum() / lengths.sum() * lengths
    return float((count / (count - 1) * (residual**2).sum()).sqrt() / lengths.sum())


@dataclass(frozen=True, kw_only=True)
class NoiseClip:
    """Share that an objective clips before the policy has moved, if `old_logprobs` are the rollout's."""

    tokens: float
    sequences: float


def clipped_by_noise(objective: Objective, batch: Batch, trainer: Float[Tensor, "B T"]) -> NoiseClip | None:
    """What the gap to the engine alone clips, as the mean over both signs of the advantage.

    None when the objective has no clip range (its `loss` returns no `actor/clip_frac` of shape [B, T]).
    """
    nothing = torch.zeros_like(trainer)
    step = step_of(replace(batch, ref_logprobs=trainer, values=nothing), batch.rollout_logprobs)
    policy = PolicyOutput(logprobs=trainer, entropy=nothing, values=nothing)
    tokens: list[float] = []
    sequences: list[float] = []
    for sign in (1.0, -1.0):
        _, metrics = objective.loss(policy, step, sign * batch.mask.float())
        bound = metrics.get("actor/clip_frac")
        if bound is None or bound.shape != batch.mask.shape:
            return None
        held = (bound > 0) & batch.mask
        tokens.append(float(held[batch.mask].float().mean()))
        sequences.append(float(held.any(dim=1)[batch.mask.any(dim=1)].float().mean()))
    return NoiseClip(tokens=sum(tokens) / 2, sequences=sum(sequences) / 2)


def surprise(logprobs: Tensor, entropy: Tensor, mask: Tensor) -> float:
    """How much less likely the sampled tokens are than draws from the given distributions, in standard deviations.

    Takes the tokens' log-probabilities and the distributions' entropies, [B, T] in nats. The excess -log p - H of a
    drawn token has mean 0, so sum(excess) / sqrt(sum(excess^2)) is about N(0, 1), and needs no log-probability of the
    engine. NaN when a token has no number.
    """
    excess = (-logprobs - entropy)[mask].double()
    return float(excess.sum() / excess.square().sum().clamp(min=1e-12).sqrt())


def finite_part(batch: Batch, trainer: Tensor) -> Batch:
    """The tokens with a finite number on both sides. One NaN would hide all others in an average."""
    finite = batch.mask & batch.rollout_logprobs.isfinite() & trainer.isfinite()
    return replace(batch, mask=finite, rollout_logprobs=batch.rollout_logprobs.nan_to_num(0.0, 0.0, 0.0))
