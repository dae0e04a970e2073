"""Does an objective keep the contract that makes one loss of any split? What the trainer relies on, tried on numbers.

`check_objective` does to an objective what the trainer will: whole steps cut into micro-batches and ranks, padding,
empty rows, ratios far from 1. Every finding says in the user's terms what is wrong, and how to mend it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from rl.contract.gradients import _extremes, _finite_differences, _gradient_on_policy, _sign, _zero_advantage
from rl.contract.invariances import _empty_rows, _groups, _outside, _pure, _ranks, _row_order, _splits
from rl.contract.synthetic_step import Bench
from rl.contract.trial import Finding, Law, Trial
from rl.objectives.objective import Objective
from rl.types import Batch


def check_objective(objective: Objective, *, seed: int = 0) -> list[Finding]:
    """Everything that is wrong with an objective; empty when it keeps the contract. Takes a second on one core."""
    bench = Bench(objective=objective, seed=seed)
    batch = bench.batch()
    found = [*_shapes(objective, bench, batch)]
    if found:
        return found
    trial = Trial(objective=objective, bench=bench, batch=batch, whole=bench.step(batch))
    for law in LAWS:
        try:
            found += law(trial)
        except Exception as error:
            found.append(_raised(f"under the law {law.__name__.strip('_')!r}", error))
    return found


def assert_objective(objective: Objective) -> None:
    """For a test of your own: raises AssertionError with every finding."""
    found = check_objective(objective)
    assert not found, f"{type(objective).__name__} breaks its contract:\n" + "\n".join(f"- {f}" for f in found)


# -- the laws ----------------------------------------------------------------------------------------------------------


def _shapes(objective: Objective, bench: Bench, batch: Batch) -> Iterator[Finding]:
    """Both methods run and return [B, T]; metrics are [B, T] or [B] and carry no graph."""
    b, t = batch.mask.shape
    try:
        advantages = objective.advantages(bench.seen_by_advantages(batch))
    except Exception as error:
        seen = bench.seen_by_advantages(batch)
        yield _undeclared(bench, seen, "advantages(batch)", objective.advantages) or _raised(
            "in advantages(batch)", error
        )
        return
    if advantages.shape != (b, t):
        yield Finding(
            law="shape",
            what=f"advantages(batch) returned {tuple(advantages.shape)}, not [B, T]=({b}, {t})",
            remedy="Give one number per sequence to its tokens: "
            "rl.objectives.advantages.spread(per_sequence, batch.mask)",
        )
        return
    policy, seen = bench.policy(batch), bench.seen_by_loss(batch)
    policy.logprobs.requires_grad_()
    advantages = torch.where(batch.mask, advantages, 0.0)
    try:
        loss, metrics = objective.loss(policy, seen, advantages)
    except Exception as error:
        where, hint = (
            "loss(policy, batch, advantages)",
            " A [B] tensor beside a [B, T] one needs spread(x, batch.mask) or x[:, None].",
        )
        valued = replace(policy, values=batch.values)
        yield _undeclared(
            bench, seen, where, lambda rich: objective.loss(policy if rich.values is None else valued, rich, advantages)
        ) or _raised(f"in {where}", error, hint)
        return
    if loss.shape != (b, t):
        yield Finding(
            law="shape",
            what=f"loss returned {tuple(loss.shape)}, not [B, T]=({b}, {t})",
            remedy="Return the loss of every token, without mean() or sum(): the trainer averages (`average_over`)",
        )
    for name, value in metrics.items():
        if value.shape not in ((b, t), (b,)):
            yield Finding(
                law="metrics",
                what=f"metric {name!r} has shape {tuple(value.shape)}",
                remedy=f"Return one number per token [B, T]=({b}, {t}) or per sequence [B]=({b},), not a reduced one: "
                "the mean over micro-batches of a mean is not the mean of the step",
            )
        elif value.requires_grad:
            yield Finding(
                law="metrics",
                what=f"metric {name!r} carries the graph of the loss, and so its memory",
                remedy="Return it with .detach()",
            )


LAWS: list[Law] = [
    _pure,
    _splits,
    _ranks,
    _empty_rows,
    _outside,
    _row_order,
    _groups,
    _sign,
    _gradient_on_policy,
    _zero_advantage,
    _finite_differences,
    _extremes,
]


def _raised(where: str, error: Exception, hint: str = "") -> Finding:
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return Finding(law="runs", what=f"{where} it raised {said}", remedy=f"Mend that first.{hint}")


def _undeclared(bench: Bench, seen: Batch, where: str, call: Callable[[Batch], object]) -> Finding | None:
    """When a method runs once it has what it did not ask for."""
    flags = {"values": "uses_values", "old_logprobs": "uses_old_logprobs", "ref_logprobs": "uses_reference"}
    for name, flag in flags.items():
        if getattr(bench.objective, flag):
            continue
        try:
            call(replace(seen, **{name: getattr(bench.rich(seen), name)}))
        except Exception:
            continue
        return Finding(
            law="declares",
            what=f"{where} reads {name}, which are None unless the objective asks for them",
            remedy=f"Declare `{flag}: ClassVar[bool] = True` in the class",
        )
    return None
