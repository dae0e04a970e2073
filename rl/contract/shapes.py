"""Do both methods of an objective run at all, and return tensors of the right shape?"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from rl.contract.place import line_of_error
from rl.contract.run import seen
from rl.contract.scene import Scene
from rl.contract.trial import Violation
from rl.objectives.objective import Objective
from rl.types import DECLARED_BY, Batch, Step, step_of

AnyBatch = TypeVar("AnyBatch", bound=Batch)

ON_PURPOSE = ("policy gradient", "bounds", "penalty", "entropy", "critic")
"""Checks that an objective may declare to break on purpose."""


def shapes(objective: Objective, scene: Scene) -> Iterator[Violation]:
    """Both methods run and return [B, T]; metrics are [B, T] or [B] and carry no graph."""
    b, t = scene.batch.mask.shape
    yield from unknown_names(objective)
    before = seen(objective, scene.batch)
    try:
        advantages: Any = objective.advantages(before)
    except Exception as error:  # an objective may raise anything, and that is the answer
        where = "advantages(batch)"
        found = undeclared(objective, scene, before, where, objective.advantages)
        yield found or raised(objective, f"in {where}", error, method="advantages")
        return
    if not isinstance(advantages, Tensor) or advantages.shape != (b, t):
        yield Violation(
            check="shape",
            what=f"advantages(batch) returned {form(advantages)}, not [B, T]=({b}, {t})",
            remedy="Give one number per sequence to its tokens: "
            "rl.objectives.advantages.spread(per_sequence, batch.mask)",
            method="advantages",
        )
        return
    given, step = torch.where(scene.batch.mask, advantages, 0.0), step_of(before, scene.batch.old_logprobs)
    policy = replace(scene.policy, logprobs=scene.policy.logprobs.clone().requires_grad_())
    try:
        out: Any = objective.loss(policy, step, given)
    except Exception as error:  # an objective may raise anything, and that is the answer

        def with_all(rich: Step) -> object:
            return objective.loss(replace(policy, values=rich.values), rich, given)

        where = "loss(policy, batch, advantages)"
        hint = " A [B] tensor next to a [B, T] one needs spread(x, batch.mask) or x[:, None]."
        found = undeclared(objective, scene, step, where, with_all)
        yield found or raised(objective, f"in {where}", error, hint, method="loss")
        return
    yield from returned(out, b, t)


def returned(out: Any, b: int, t: int) -> Iterator[Violation]:
    """What `loss` returned: a tensor [B, T], and metrics by name."""
    kind, wrong = type(out).__name__, partial(Violation, method="loss")
    pair = cast("list[object]", list(out)) if kind == "tuple" else []
    loss, metrics = pair if len(pair) == 2 else (None, None)
    if not isinstance(loss, Tensor) or not isinstance(metrics, dict):
        yield wrong(
            check="shape",
            what=f"loss returned a {kind}, not a loss and its metrics",
            remedy="Return both: `return loss, {}`, where {} may hold metrics by name",
        )
        return
    if loss.shape != (b, t):
        yield wrong(
            check="shape",
            what=f"loss returned {form(loss)}, not [B, T]=({b}, {t})",
            remedy="Return the loss of every token, without mean() or sum(): the trainer averages (`average_over`)",
        )
    for name, value in cast("dict[str, Any]", metrics).items():
        if not isinstance(value, Tensor) or value.shape not in ((b, t), (b,)):
            yield wrong(
                check="metrics",
                what=f"metric {name!r} has shape {form(value)}",
                remedy=f"Return one number per token [B, T]=({b}, {t}) or per sequence [B]=({b},), not a reduced one: "
                "the mean over micro-batches of a mean is not the mean of the step",
            )
        elif value.requires_grad:
            yield wrong(
                check="metrics",
                what=f"metric {name!r} carries the graph of the loss, and so its memory",
                remedy="Return it with .detach()",
            )


def form(value: Any) -> str:
    """The shape of a tensor, or the type of anything else."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def unknown_names(objective: Objective) -> Iterator[Violation]:
    """`on_purpose` names checks that exist and are a matter of choice."""
    for name in objective.on_purpose:
        if name not in ON_PURPOSE:
            yield Violation(
                check="declares",
                what=f"`on_purpose` names {name!r}, which no objective may break",
                remedy=f"It may hold {', '.join(ON_PURPOSE)}; write it as a tuple: on_purpose = ({ON_PURPOSE[0]!r},)",
            )


def undeclared(
    objective: Objective, scene: Scene, given: AnyBatch, where: str, call: Callable[[AnyBatch], object]
) -> Violation | None:
    """A violation when a method runs once it gets a column that the objective did not declare."""
    for name, flag in DECLARED_BY.items():
        if getattr(objective, flag):
            continue
        more: dict[str, Any] = {name: getattr(scene.batch, name)}
        try:
            call(replace(given, **more))
        except Exception:  # then this column is not what is missing
            continue
        return Violation(
            check="declares",
            what=f"{where} reads {name}, which are None unless the objective asks for them",
            remedy=f"Declare `{flag}: ClassVar[bool] = True` in the class",
            method=where.partition("(")[0],
        )
    return None


def raised(objective: Objective, where: str, error: Exception, hint: str = "", method: str = "") -> Violation:
    """The violation for a method that raises."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return Violation(
        check="runs",
        what=f"{where} it raised {text}",
        remedy=f"Fix that first.{hint}",
        method=method,
        place=line_of_error(objective, error),
    )
