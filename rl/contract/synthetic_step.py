"""A small step on which a contract can be tried: an awkward batch, and what the trainer would make of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rl.batch import take
from rl.loss import full_loss, prepare
from rl.objectives.corrections import Uncorrected
from rl.objectives.objective import Objective
from rl.reduce import Meter, Totals, loss_weights
from rl.types import Batch, PolicyOutput, Step, columns, needed, step_of


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a step: the loss as one number, its gradients [B, T], and the means of its metrics."""

    total: float
    logprobs: Tensor
    """Gradient with respect to the policy's log-probabilities."""
    values: Tensor
    """With respect to its values; 0 without a critic."""
    advantages: Tensor
    metrics: dict[str, float]

    @property
    def finite(self) -> bool:
        """No NaN and no infinity in the loss or its gradients."""
        return math.isfinite(self.total) and bool((self.logprobs.isfinite() & self.values.isfinite()).all())

    def differs(self, other: "Outcome", tolerance: float, order: Tensor | None = None) -> str:
        """The first difference to `other` (its rows taken in `order`) in words; empty when there is none."""
        width = min(self.logprobs.shape[1], other.logprobs.shape[1])
        for name, what in {
            "advantages": "the advantages change",
            "logprobs": "the gradient changes",
            "values": "the gradient of the values changes",
        }.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            theirs = theirs if order is None else theirs[order]
            beyond = mine[:, width:]
            if beyond.numel() and beyond.abs().max() > 0:
                return "padding gets a gradient"
            gap = (mine[:, :width] - theirs[:, :width]).abs().max()
            if not bool(gap <= tolerance * theirs.abs().max() + 1e-9):
                return what
        if not abs(self.total - other.total) <= tolerance * abs(other.total) + tolerance * 0.1:
            return f"the loss changes from {other.total:.5g} to {self.total:.5g}"
        for name, mean in self.metrics.items():
            if not abs(mean - other.metrics[name]) <= tolerance * abs(other.metrics[name]) + tolerance * 0.1:
                return f"the step's mean of metric {name!r} changes from {other.metrics[name]:.5g} to {mean:.5g}"
        return ""


@dataclass(frozen=True, kw_only=True)
class SyntheticStep:
    """An objective on synthetic steps that are drawn from a seed.

    The KL and entropy terms belong to the framework and are off here, except a KL in the reward: that one changes the
    advantages.
    """

    objective: Objective
    seed: int = 0

    def _noise(self, batch: Batch, kind: int, size: float) -> Tensor:
        # Drawn per row, and wide enough for any padding: the same row has the same numbers in every step.
        keys = (self.seed * 1000 + kind * 100 + batch.input_ids[:, 0]).tolist()
        rows = [torch.randn(64, generator=torch.Generator().manual_seed(key)) for key in keys]
        return size * torch.stack(rows)[:, : batch.mask.shape[1]]

    def batch(self) -> Batch:
        """Eight rows in groups of 3, 3 and 2 that are not neighbours, of 1 to 9 sampled tokens, some with gaps."""
        mask = torch.zeros(8, 11, dtype=torch.bool)
        for row, (start, end) in enumerate([(2, 7), (1, 10), (3, 4), (2, 11), (1, 6), (4, 10), (2, 9), (1, 8)]):
            mask[row, start:end] = True
        mask[1, 4:6] = mask[5, 6] = False  # a tool's reply between two turns
        ids = torch.zeros(8, 12, dtype=torch.long)
        ids[:, 0] = torch.arange(8)  # names the row
        # The first of each group has its lowest reward, so that raising it changes its rank.
        batch = Batch(
            input_ids=ids,
            mask=mask,
            rollout_logprobs=torch.zeros(8, 11),
            versions=torch.zeros(8, 11, dtype=torch.long),
            rewards=torch.tensor([0.0, 0.3, 1.0, -0.5, 0.7, 1.0, 1.5, 0.1]),
            group_ids=torch.tensor([7, 3, 7, 5, 3, 5, 7, 3]),
        )
        return self.rich(replace(batch, rollout_logprobs=self._old(batch) + self._noise(batch, 1, 0.15) * mask))

    def _old(self, batch: Batch) -> Tensor:
        return (-1.0 - self._noise(batch, 2, 0.6).abs()) * batch.mask

    def rich(self, batch: Batch) -> Batch:
        """The batch with every optional column of numbers."""
        old = self._old(batch)
        return replace(
            batch,
            old_logprobs=old,
            ref_logprobs=old + self._noise(batch, 3, 0.3) * batch.mask,
            values=self._noise(batch, 4, 0.5) * batch.mask,
        )

    def seen_by_advantages(self, batch: Batch) -> Batch:
        """The columns that the trainer has before a step: only those that the objective asks for."""
        o = self.objective
        return replace(
            batch,
            old_logprobs=batch.old_logprobs if o.needs_old_logprobs or o.uses_values else None,
            ref_logprobs=batch.ref_logprobs if o.needs_reference else None,
            values=batch.values if o.uses_values else None,
        )

    def seen_by_loss(self, batch: Batch) -> Step:
        """The same with the old log-probabilities, which `loss` always gets."""
        return step_of(self.seen_by_advantages(batch), batch.old_logprobs)

    def policy(self, batch: Batch, drift: float | None = None) -> PolicyOutput:
        """The current policy, up to about 0.5 nats from the old one; `drift` moves it by that many nats instead."""
        moved = self._noise(batch, 5, 0.35) if drift is None else torch.full(batch.mask.shape, drift)
        base = -1.0 - self._noise(batch, 2, 0.6).abs()
        logprobs = torch.where(batch.mask, base + moved, 0.0)
        values = torch.where(batch.mask, self._noise(batch, 6, 0.5), 0.0) if self.objective.uses_values else None
        return PolicyOutput(logprobs=logprobs, entropy=torch.ones(batch.mask.shape) * batch.mask, values=values)

    def extreme(self, batch: Batch, nats: float) -> Batch:
        """The same step, with the old log-probabilities of every second row far from the rollout's."""
        odd, old = torch.arange(len(batch.rewards))[:, None] % 2 == 1, needed(batch.old_logprobs, "old_logprobs")
        return replace(batch, rollout_logprobs=torch.where(odd, old - nats, batch.rollout_logprobs))

    def advantages(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The whole step and its advantages, as the trainer prepares them before it cuts the step."""
        seen, advantages = prepare(self.objective, self.seen_by_advantages(batch))
        return replace(seen, old_logprobs=batch.old_logprobs), advantages

    def weights(self, batch: Batch) -> Tensor:
        """The trainer's averaging as a weight on every token of the step."""
        totals = Totals(tokens=int(batch.mask.sum()), sequences=len(batch.rewards), horizon=16)
        return loss_weights(batch.mask, self.objective.average_over, totals)

    def run(
        self,
        batch: Batch,
        cut: Sequence[Tensor] | None = None,
        *,
        nudge: Tensor | None = None,
        drift: float | None = None,
        scale: float = 1.0,
    ) -> Outcome:
        """One optimizer step's loss and gradients, added up over the micro-batches of `cut`.

        `nudge` is added to the policy's log-probabilities, `scale` multiplies the advantages.
        """
        plain = self.objective
        if plain.kl_in == "loss":
            plain = replace(plain, kl_coef=0.0)
        plain = replace(plain, entropy_coef=0.0)
        batch, advantages = self.advantages(batch)
        now = self.policy(batch, drift)
        logprobs = (now.logprobs if nudge is None else now.logprobs + nudge).requires_grad_()
        values = None if now.values is None else now.values.requires_grad_()
        totals = Totals(tokens=int(batch.mask.sum()), sequences=len(batch.rewards), horizon=16)
        meter, total = Meter(), torch.zeros(())
        for rows in [torch.arange(len(batch.rewards))] if cut is None else cut:
            part = take(batch, rows)
            chosen, width = (rows if len(rows) else torch.zeros(1, dtype=torch.long)), part.mask.shape[1]

            def of(x: Tensor, chosen: Tensor = chosen, width: int = width) -> Tensor:
                return x[chosen][:, :width]

            policy = PolicyOutput(
                logprobs=of(logprobs), entropy=of(now.entropy), values=None if values is None else of(values)
            )
            scaled = of(advantages) * scale * part.mask
            loss, metrics = full_loss(plain, Uncorrected(), policy, part, scaled)
            weights = loss_weights(part.mask, plain.average_over, totals)
            total = total + torch.where(part.mask, loss * weights, 0.0).sum()
            meter.add({n: m for n, m in metrics.items() if not n.startswith("rollout_corr/")}, part.mask)
        leaves = [logprobs] if values is None else [logprobs, values]
        grads: list[Any] = [None, None]
        if total.requires_grad:
            grads = [*torch.autograd.grad(total, leaves, allow_unused=True), None]
        nothing = torch.zeros_like(logprobs)
        return Outcome(
            total=float(total.detach()),
            logprobs=nothing if grads[0] is None else grads[0],
            values=nothing if grads[1] is None else grads[1],
            advantages=advantages,
            metrics=meter.means(),
        )


def junk(batch: Batch) -> Batch:
    """Other numbers wherever nothing was sampled."""
    changed: dict[str, Any] = {
        name: torch.where(batch.mask, x, 3.0 + torch.arange(x.numel()).reshape(x.shape) % 5)
        for name, x in columns(batch).items()
        if x.shape == batch.mask.shape and x.is_floating_point()
    }
    return replace(batch, **changed)


def pad(batch: Batch, width: int) -> Batch:
    """The same step with so many more columns of padding."""
    wider: dict[str, Any] = {
        name: torch.cat([x, torch.zeros(len(x), width, dtype=x.dtype)], dim=1)
        for name, x in columns(batch).items()
        if x.dim() == 2
    }
    return replace(batch, **wider)


def permute(batch: Batch, order: Tensor) -> Batch:
    """The same rows in another order."""
    permuted: dict[str, Any] = {name: x[order] for name, x in columns(batch).items()}
    return replace(batch, **permuted)
