"""Do both methods of an objective run at all, and return tensors of the right shape?"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from rl.contract.synthetic_step import SyntheticStep
from rl.contract.trial import Violation
from rl.types import DECLARED_BY, Batch, Step

AnyBatch = TypeVar("AnyBatch", bound=Batch)


def shapes(synthetic: SyntheticStep, batch: Batch) -> Iterator[Violation]:
    """Both methods run and return [B, T]; metrics are [B, T] or [B] and carry no graph."""
    objective = synthetic.objective
    b, t = batch.mask.shape
    before = synthetic.seen_by_advantages(batch)
    try:
        advantages = objective.advantages(before)
    except Exception as error:  # an objective may raise anything, and that is the answer
        where = "advantages(batch)"
        yield undeclared(synthetic, before, where, objective.advantages) or raised(f"in {where}", error)
        return
    if advantages.shape != (b, t):
        yield Violation(
            check="shape",
            what=f"advantages(batch) returned {tuple(advantages.shape)}, not [B, T]=({b}, {t})",
            remedy="Give one number per sequence to its tokens: "
            "rl.objectives.advantages.spread(per_sequence, batch.mask)",
        )
        return
    policy, seen = synthetic.policy(batch), synthetic.seen_by_loss(batch)
    policy.logprobs.requires_grad_()
    advantages = torch.where(batch.mask, advantages, 0.0)
    try:
        loss, metrics = objective.loss(policy, seen, advantages)
    except Exception as error:  # the same

        def with_all(rich: Step) -> object:
            return objective.loss(replace(policy, values=rich.values), rich, advantages)

        where = "loss(policy, batch, advantages)"
        hint = " A [B] tensor next to a [B, T] one needs spread(x, batch.mask) or x[:, None]."
        yield undeclared(synthetic, seen, where, with_all) or raised(f"in {where}", error, hint)
        return
    if loss.shape != (b, t):
        yield Violation(
            check="shape",
            what=f"loss returned {tuple(loss.shape)}, not [B, T]=({b}, {t})",
            remedy="Return the loss of every token, without mean() or sum(): the trainer averages (`average_over`)",
        )
    for name, value in metrics.items():
        if value.shape not in ((b, t), (b,)):
            yield Violation(
                check="metrics",
                what=f"metric {name!r} has shape {tuple(value.shape)}",
                remedy=f"Return one number per token [B, T]=({b}, {t}) or per sequence [B]=({b},), not a reduced one: "
                "the mean over micro-batches of a mean is not the mean of the step",
            )
        elif value.requires_grad:
            yield Violation(
                check="metrics",
                what=f"metric {name!r} carries the graph of the loss, and so its memory",
                remedy="Return it with .detach()",
            )


def undeclared(
    synthetic: SyntheticStep, seen: AnyBatch, where: str, call: Callable[[AnyBatch], object]
) -> Violation | None:
    """A violation when a method runs once it gets a column that the objective did not declare."""
    for name, flag in DECLARED_BY.items():
        if getattr(synthetic.objective, flag):
            continue
        try:
            call(replace(seen, **{name: getattr(synthetic.rich(seen), name)}))
        except Exception:  # then this column is not what is missing
            continue
        return Violation(
            check="declares",
            what=f"{where} reads {name}, which are None unless the objective asks for them",
            remedy=f"Declare `{flag}: ClassVar[bool] = True` in the class",
        )
    return None


def raised(where: str, error: Exception, hint: str = "") -> Violation:
    """The violation for a method that raises."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return Violation(check="runs", what=f"{where} it raised {text}", remedy=f"Fix that first.{hint}")
