"""What could the engine do differently to produce these log-probabilities? Each guess is tested on the numbers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl.sampling.truncation import Truncation, keep

TOP_PS = [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.98, 0.99]
TOP_KS = [2, 3, 5, 8, 10, 15, 20, 30, 40, 50, 64, 100]
MIN_PS = [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3]


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One guess, and the gap that it leaves unexplained."""

    cause: str
    """Key of `trainer.doctor.remedies`."""
    text: str
    """What the engine would be doing."""
    residual: float
    """What remains if the guess is right: mean |d| in nats, or for a layer the share of its output."""


def explain(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    rollout: Float[Tensor, " N"],
    *,
    temperature: float,
    truncation: Truncation | None,
) -> list[Hypothesis]:
    """Guesses about the engine's sampler, best first, from the trainer's own logits (temperature 1, whole vocabulary).

    Shapes: N sampled tokens, V vocabulary; `rollout` is the engine's log-probabilities in nats.
    """
    guesses = [*_sampling(logits, targets, rollout, temperature, truncation)]
    best_t, residual = fit_temperature(logits, targets, rollout)
    if abs(best_t / temperature - 1) > 5e-3 and best_t != 1.0:
        guesses.append(
            Hypothesis(cause="temperature", text=f"it samples at temperature {best_t:.3g}", residual=residual)
        )
    return sorted(guesses, key=lambda g: g.residual)


def _sampling(
    logits: Tensor, targets: Tensor, rollout: Tensor, temperature: float, truncation: Truncation | None
) -> Iterator[Hypothesis]:
    if temperature != 1.0 or truncation:
        left = _left(logits.log_softmax(-1), targets, rollout)
        yield Hypothesis(
            cause="raw_logprobs", text="it returns raw log-probabilities, before temperature and cuts", residual=left
        )
    scaled = logits / temperature
    whole = scaled.log_softmax(-1)
    if truncation:
        left = _left(whole, targets, rollout)
        yield Hypothesis(cause="truncation", text="it samples from the whole vocabulary", residual=left)
        return
    cuts = [Truncation(top_p=p) for p in TOP_PS]
    cuts += [Truncation(top_k=k) for k in TOP_KS if k < logits.shape[1]] + [Truncation(min_p=p) for p in MIN_PS]
    # Truncation only raises the probability of kept tokens, so d is nowhere positive.
    d = whole.gather(1, targets[:, None])[:, 0] - rollout
    if float(d.mean()) >= -1e-6 or float((d > 1e-3).float().mean()) > 0.4:
        return
    for cut in cuts:
        kept = keep(scaled, cut).scatter(1, targets[:, None], True)
        mass = torch.where(kept, whole, -torch.inf).logsumexp(-1)
        left = float((d - mass).abs().mean())
        name = next(f"{n}={v:g}" for n, v in vars(cut).items() if v != getattr(Truncation(), n))
        yield Hypothesis(cause="truncation", text=f"it samples with {name} (or close to it)", residual=left)


def _left(logprobs: Tensor, targets: Tensor, rollout: Tensor) -> float:
    return float((logprobs.gather(1, targets[:, None])[:, 0] - rollout).abs().mean())


def fit_temperature(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], rollout: Float[Tensor, " N"]
) -> tuple[float, float]:
    """The temperature that fits the engine's numbers best, by golden-section search, and the mean |d| that remains."""
    low, high, golden = 0.2, 3.0, 0.6180339887

    def left(t: float) -> float:
        return _left((logits / t).log_softmax(-1), targets, rollout)

    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = left(a), left(b)
    while high - low > 1e-4:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - golden * (high - low)
            at_a = left(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + golden * (high - low)
            at_b = left(b)
    best = (low + high) / 2
    return best, left(best)


def shifts(trainer: Float[Tensor, "B T"], rollout: Float[Tensor, "B T"], mask: Tensor) -> list[Hypothesis]:
    """Do the engine's numbers belong to the token before or after? Both sides [B, T] in nats."""
    found: list[Hypothesis] = []
    for by, where in ((1, "after"), (-1, "before")):
        moved, both = rollout.roll(by, dims=1), mask & mask.roll(by, dims=1)
        if both.any():
            left = float((trainer - moved)[both].abs().mean())
            found.append(
                Hypothesis(
                    cause="shift", text=f"each number belongs to the token {where} the one it stands at", residual=left
                )
            )
    return found
