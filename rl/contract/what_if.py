"""What would another objective have made of the same step? Loss and gradient with respect to the log-probabilities.

No model is needed: the gradient of a loss with respect to the log-probability of each sampled token says which tokens
it pushes, where to and how hard. What the model's weights make of that push is the same for every objective.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rl.loss import full_loss, prepare
from rl.objectives.corrections import Correction, Uncorrected
from rl.objectives.objective import Objective
from rl.reduce import Meter, Totals, loss_weights
from rl.types import Batch, PolicyOutput

PLAIN = Uncorrected()


@dataclass(frozen=True, kw_only=True)
class ObjectiveReport:
    """One objective's view of a step."""

    name: str
    loss: float
    gradient: Float[Tensor, "B T"]
    """Of the averaged loss with respect to each sampled token's log-probability."""
    grad_norm: float
    clip_low: float
    """Share of tokens whose clip binds from below, and from above; NaN without a clip."""
    clip_high: float
    ess: float
    """(sum w)^2 / (n sum w^2) of the n tokens with an advantage, w their gradient over the on-policy one: 1 when none
    is clipped or weighed up."""
    effective_tokens: float
    """(sum |g|)^2 / sum g^2: how many tokens of equal gradient would carry as much."""


def evaluate_objective(
    name: str,
    objective: Objective,
    batch: Batch,
    policy: PolicyOutput,
    horizon: int,
    correction: Correction = PLAIN,
) -> ObjectiveReport:
    """An objective's verdict on a whole step, with `policy` as the policy of now.

    Raises ValueError when the record lacks what the objective reads.
    """
    for field, needed in (("values", objective.uses_values), ("ref_logprobs", objective.needs_reference)):
        if needed and getattr(batch, field) is None:
            raise ValueError(f"{name} reads {field}, which this record has not: record a run that has them")
    seen, advantages = prepare(objective, batch)
    now = policy.logprobs.detach().clone().requires_grad_()
    said = PolicyOutput(logprobs=now, entropy=policy.entropy, values=policy.values)
    loss, metrics = full_loss(objective, correction, said, seen, advantages)
    totals = Totals(tokens=int(batch.mask.sum()), sequences=len(batch.rewards), horizon=horizon)
    weights = loss_weights(batch.mask, objective.average_over, totals)
    total = torch.where(batch.mask, loss * weights, 0.0).sum()
    (gradient,) = torch.autograd.grad(total, now)
    meter = Meter()
    meter.add({n: m for n, m in metrics.items() if n.startswith("actor/clip_frac")}, batch.mask)
    clips = meter.means()
    live = batch.mask & (advantages != 0)
    pull = (gradient / (advantages * weights))[live]
    size = gradient.abs()
    return ObjectiveReport(
        name=name,
        loss=float(total.detach()),
        gradient=gradient,
        grad_norm=float(gradient.norm()),
        clip_low=clips.get("actor/clip_frac_low", torch.nan),
        clip_high=clips.get("actor/clip_frac_high", torch.nan),
        ess=share(pull),
        effective_tokens=share(size[batch.mask]) * int(batch.mask.sum()),
    )


def share(weights: Float[Tensor, " N"]) -> float:
    """(sum |w|)^2 / (n sum w^2), 0 where there is no weight (Kish, 1965)."""
    square = float((weights**2).sum()) * max(len(weights), 1)
    return float(weights.abs().sum()) ** 2 / square if square else 0.0


def cosines(verdicts: list[ObjectiveReport]) -> Float[Tensor, "N N"]:
    """How much the gradients of each pair agree: 1 the same direction, 0 at right angles; NaN where one has none."""
    flat = torch.stack([v.gradient.flatten() for v in verdicts]).double()
    unit = flat / flat.norm(dim=1, keepdim=True)
    return (unit @ unit.T).float()
