"""What would another objective compute on the same step? Its loss and gradient with respect to the log-probabilities.

No model is needed: the gradient with respect to the log-probability of each sampled token gives the direction and the
size of the push on that token. How the weights then change follows from it in the same way for every objective.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl.episodes.joined import joined
from rl.loss import full_loss, prepare
from rl.objectives.corrections import Correction, Uncorrected
from rl.objectives.objective import Objective
from rl.parity.sample_size import effective_sample_share
from rl.reduce import Meter, Totals, loss_weights
from rl.types import Batch, PolicyOutput

PLAIN = Uncorrected()
NUMBERS = ("loss", "grad_norm", "clip_low", "clip_high", "ess", "effective_tokens")
"""What a report holds besides its gradient."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveReport:
    """One objective's view of a step."""

    name: str
    loss: float
    gradient: Float[Tensor, "B T"]
    """Gradient of the averaged loss with respect to each sampled token's log-probability."""
    grad_norm: float
    clip_low: float
    """Share of tokens that the clip holds at its lower bound; NaN without a clip."""
    clip_high: float
    """The same at its upper bound."""
    ess: float
    """Effective sample size over sample size of the tokens with an advantage. Their weights are their gradients over
    the on-policy gradients: 1 when no token is clipped or weighted."""
    effective_tokens: float
    """(sum |g|)^2 / sum g^2: the number of tokens with equal gradients that would have the same spread."""


def evaluate_objective(
    name: str, objective: Objective, batch: Batch, policy: PolicyOutput, horizon: int, correction: Correction = PLAIN
) -> ObjectiveReport:
    """The report of one objective on a whole step, with `policy` as the current policy.

    Raises ValueError when the record has no values or reference and the objective reads them.
    """
    for field, needed in (("values", objective.uses_values), ("ref_logprobs", objective.needs_reference)):
        if needed and getattr(batch, field) is None:
            raise ValueError(f"{name} reads {field}, which this record does not have: record a run that has them")
    seen, advantages = prepare(objective, batch)
    batch, policy, advantages = joined(seen, policy, advantages)
    now = policy.logprobs.detach().clone().requires_grad_()
    current = PolicyOutput(logprobs=now, entropy=policy.entropy, values=policy.values)
    loss, metrics = full_loss(objective, correction, current, batch, advantages)
    totals = Totals(tokens=int(batch.mask.sum()), sequences=int(batch.mask.any(dim=1).sum()), horizon=horizon)
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
        grad_norm=float(norm(gradient)),
        clip_low=clips.get("actor/clip_frac_low", torch.nan),
        clip_high=clips.get("actor/clip_frac_high", torch.nan),
        ess=effective_sample_share(pull.abs()),
        effective_tokens=effective_sample_share(size[batch.mask]) * int(batch.mask.sum()),
    )


def over_steps(reports: list[ObjectiveReport]) -> ObjectiveReport:
    """One objective's reports of several steps as one: their means, and the gradients one after the other."""

    def mean(name: str) -> float:
        return sum(float(getattr(r, name)) for r in reports) / len(reports)

    return replace(
        reports[0],
        **{name: mean(name) for name in NUMBERS},
        gradient=torch.cat([r.gradient.flatten() for r in reports])[None],
    )


def cosines(reports: list[ObjectiveReport]) -> Float[Tensor, "N N"]:
    """Cosine between the gradients of each pair: 1 the same direction, 0 orthogonal; NaN where a gradient is 0."""
    flat = torch.stack([r.gradient.flatten() for r in reports]).double()
    unit = flat / torch.stack([norm(row) for row in flat])[:, None]
    return (unit @ unit.transpose(0, 1)).float()


def norm(x: Tensor) -> Tensor:
    """The Euclidean norm of all entries: torch does not state the type of `norm`."""
    return x.norm()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
