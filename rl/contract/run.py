"""What does the trainer make of a step? Its loss, gradients, advantages and metrics, whole or cut into parts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rl.batch import take
from rl.contract.scene import Scene
from rl.episodes.joined import layout
from rl.loss import prepare
from rl.objectives.objective import Objective
from rl.reduce import Meter, Totals, loss_weights
from rl.types import Batch, PolicyOutput, step_of

HORIZON = 16


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a step: the loss as one number and by token, its gradients [B, T], and the means of its metrics."""

    total: float
    loss: Tensor
    """Of every token, times the trainer's weight."""
    logprobs: Tensor
    """Gradient with respect to the policy's log-probabilities."""
    values: Tensor
    """With respect to its values; 0 without a critic."""
    entropy: Tensor
    """With respect to its entropies."""
    advantages: Tensor
    metrics: dict[str, float]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Outcome":
        """The same with every [B, T] tensor changed."""
        names = ("loss", "logprobs", "values", "entropy", "advantages")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Advantages, loss and gradients by their names in messages."""
        return {
            "advantages": self.advantages,
            "loss": self.loss,
            "gradient": self.logprobs,
            "gradient of the values": self.values,
            "gradient of the entropies": self.entropy,
        }

    @property
    def nonfinite(self) -> str:
        """The first thing that is NaN or infinite; empty when nothing is."""
        for name, x in self.tensors.items():
            if not bool(x.isfinite().all()):
                return name
        bad = [f"metric {name!r}" for name, mean in self.metrics.items() if not math.isfinite(mean)]
        return bad[0] if bad else ""

    def differs(self, other: "Outcome", tolerance: float) -> str:
        """The first difference to `other` in words; empty when there is none."""
        for name, what in {
            "advantages": "the advantages change",
            "logprobs": "the gradient changes",
            "values": "the gradient of the values changes",
            "entropy": "the gradient of the entropies changes",
            "loss": "the loss changes",
        }.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            width = min(mine.shape[1], theirs.shape[1])
            beyond = mine[:, width:]
            if name != "loss" and beyond.numel() and beyond.abs().max() > 0:
                return "padding gets a gradient"
            gap = (mine[:, :width] - theirs[:, :width]).abs().max()
            if not bool(gap <= tolerance * theirs.abs().max() + 1e-9):
                return what
        for name, mean in self.metrics.items():
            if not abs(mean - other.metrics[name]) <= tolerance * abs(other.metrics[name]) + tolerance * 0.1:
                return f"the step's mean of metric {name!r} changes from {other.metrics[name]:.5g} to {mean:.5g}"
        return ""


def seen(objective: Objective, batch: Batch) -> Batch:
    """The columns that the trainer has before a step: only those that the objective asks for."""
    o = objective
    return replace(
        batch,
        old_logprobs=batch.old_logprobs if o.needs_old_logprobs or o.uses_values else None,
        ref_logprobs=batch.ref_logprobs if o.needs_reference else None,
        values=batch.values if o.uses_values else None,
    )


def prepared(objective: Objective, batch: Batch) -> tuple[Batch, Tensor]:
    """The whole step and its advantages, as the trainer prepares them before it cuts the step."""
    step, advantages = prepare(objective, seen(objective, batch))
    return replace(step, old_logprobs=batch.old_logprobs), advantages


def weights_of(objective: Objective, mask: Tensor) -> Tensor:
    """The trainer's averaging as a weight on every token of a step."""
    totals = Totals(tokens=int(mask.sum()), sequences=len(mask), horizon=HORIZON)
    return loss_weights(mask, objective.average_over, totals)


def run(
    objective: Objective,
    scene: Scene,
    cut: Sequence[Tensor] | None = None,
    *,
    scale: float = 1.0,
    given: Tensor | None = None,
    weights: Tensor | None = None,
) -> Outcome:
    """One optimizer step, added up over the micro-batches of `cut`; KL and entropy of the framework are off.

    `scale` multiplies the advantages, `given` replaces them, `weights`
    replaces the trainer's averaging. Rows of one episode are joined before, so a cut is one of episodes.
    """
    at = layout(scene.batch)
    if at is not None:
        scene = Scene(batch=at.batch(scene.batch), policy=at.policy(scene.policy))
    batch, advantages = prepared(objective, scene.batch) if given is None else (scene.batch, given)
    if given is not None:
        batch = replace(seen(objective, batch), old_logprobs=batch.old_logprobs)
    mask = batch.mask
    weights = weights_of(objective, mask) if weights is None else weights
    now = scene.policy
    leaves = [x.detach().clone().requires_grad_() for x in (now.logprobs, now.entropy)]
    if now.values is not None:
        leaves.append(now.values.detach().clone().requires_grad_())
    meter, total, by_token = Meter(), torch.zeros(()), torch.zeros(mask.shape)
    for rows in [torch.arange(len(mask))] if cut is None else cut:
        chosen = rows if len(rows) else torch.zeros(1, dtype=torch.long)
        part = Scene(batch=batch, policy=now).rows(rows).batch if len(rows) else take(batch, rows)
        width = part.mask.shape[1]
        logprobs, entropy, *values = [x[chosen][:, :width] for x in leaves]
        policy = PolicyOutput(logprobs=logprobs, entropy=entropy, values=values[0] if values else None)
        loss, metrics = objective.loss(policy, step_of(part), (advantages * scale)[chosen][:, :width] * part.mask)
        if loss.shape != part.mask.shape:
            raise ValueError(
                f"loss returned {tuple(loss.shape)} for a micro-batch of [B, T]={tuple(part.mask.shape)}: its shape "
                "must follow the batch that it gets"
            )
        weighted = torch.where(part.mask, loss * weights[chosen][:, :width], 0.0)
        total = total + weighted.sum()
        if len(rows):
            by_token[rows, :width] = weighted.detach()
        meter.add(metrics, part.mask)
    grads: list[Tensor | None] = [None, None, None]
    if total.requires_grad:
        grads = [*torch.autograd.grad(total, leaves, allow_unused=True), None]
    logprobs, entropy, values = (torch.zeros(mask.shape) if g is None else g for g in grads[:3])
    return Outcome(
        total=float(total.detach()),
        loss=by_token,
        logprobs=logprobs,
        values=values,
        entropy=entropy,
        advantages=advantages,
        metrics=meter.means(),
    )
