"""Does an objective keep the contract that makes one loss of any split? What the trainer relies on, tried on numbers.

`check_objective` does to an objective what the trainer will: whole steps cut into micro-batches and ranks, padding,
empty rows, ratios far from 1. Every finding says in the user's terms what is wrong, and how to mend it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rl.batch import micro_batches
from rl.contract.synthetic_step import Bench, Outcome, junk, pad, permute
from rl.objectives.objective import Objective
from rl.types import Batch

TOLERANCE = 2e-3
"""Relative to the largest number compared: fp32 noise is a hundredth of it, a wrong denominator a hundred times it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A law that an objective breaks."""

    law: str
    what: str
    """What was seen."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.law}: {self.what}. {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a law sees: the objective, its bench, a step's batch, and what the step came to in one piece."""

    objective: Objective
    bench: Bench
    batch: Batch
    whole: Outcome


Law = Callable[[Trial], Iterator[Finding]]


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


def _pure(trial: Trial) -> Iterator[Finding]:
    """The same input gives the same output, and is left as it was."""
    fresh, again = trial.bench.batch(), trial.bench.step(trial.batch)
    present = [f.name for f in fields(Batch) if getattr(fresh, f.name) is not None]
    changed = [n for n in present if not torch.equal(getattr(fresh, n), getattr(trial.batch, n))]
    if changed:
        yield Finding(
            law="pure",
            what=f"batch.{changed[0]} was changed in place",
            remedy="Make new tensors: x = x + 1 rather than x += 1, torch.where rather than assignment to x[mask]",
        )
    elif again.differs(trial.whole, 0.0):
        yield Finding(
            law="pure",
            what="two calls on the same batch gave different losses",
            remedy="Keep no state and draw no random numbers in an objective: every rank and micro-batch must agree",
        )


def _splits(trial: Trial) -> Iterator[Finding]:
    """No cut into micro-batches changes the loss, its gradient, or a metric."""
    rows = torch.arange(len(trial.batch.rewards))
    for name, cut in {"single rows": rows.split(1), "pairs": rows.split(2), "3 and the rest": rows.split(3)}.items():
        split = trial.bench.step(trial.batch, list(cut))
        wrong = split.differs(trial.whole, TOLERANCE)
        if wrong:
            yield Finding(
                law="micro-batches",
                what=f"cut into {name}, {wrong}",
                remedy="loss() is called on parts of a step and may look at one row at a time only: no mean(), sum(), "
                "len() over rows or over the whole [B, T]. Statistics of the step belong in advantages(batch), and "
                "averaging to the trainer (`average_over`)",
            )
            return


def _ranks(trial: Trial) -> Iterator[Finding]:
    """Nor does a cut over ranks, of which one may have no rows at all."""
    rows = torch.arange(len(trial.batch.rewards))
    for ranks in (2, 3, len(rows) + 2):
        dealt = micro_batches(trial.batch, rows, ranks=ranks, budget=12, share_prompts=False)
        split = trial.bench.step(trial.batch, [micro for rank in dealt for micro in rank])
        wrong = split.differs(trial.whole, TOLERANCE)
        if wrong and split.finite:
            yield Finding(
                law="ranks",
                what=f"on {ranks} ranks, {wrong}",
                remedy="A rank sees its own rows only: leave every denominator that counts rows to the trainer",
            )
            return


def _empty_rows(trial: Trial) -> Iterator[Finding]:
    """A row without sampled tokens gives no NaN."""
    rows = torch.arange(len(trial.batch.rewards))
    idle_rank = trial.bench.step(trial.batch, [rows, rows[:0]])
    silent = trial.bench.step(replace(trial.batch, mask=trial.batch.mask & (rows != 2)[:, None]))
    if not (idle_rank.finite and silent.finite):
        yield Finding(
            law="empty mask",
            what="a row whose mask is empty makes the loss or its gradient NaN or infinite",
            remedy="A rank without work gets such a row. Divide by mask.sum(dim=1).clamp(min=1), or use "
            "rl.reduce.masked_mean",
        )


def _outside(trial: Trial) -> Iterator[Finding]:
    """What stands at a masked column never matters, and is never moved."""
    for name, other in {
        "numbers at columns outside the mask": junk(trial.batch),
        "three more columns of padding": pad(trial.batch, 3),
    }.items():
        wrong = trial.bench.step(other).differs(trial.whole, TOLERANCE)
        if wrong:
            yield Finding(
                law="mask",
                what=f"with other {name}, {wrong}" if "numbers" in name else f"with {name}, {wrong}",
                remedy="Prompts, tool replies and padding are in these tensors too: take means with "
                "rl.reduce.masked_mean(x, batch.mask), counts with batch.mask.sum(dim=1), and select by x[batch.mask]",
            )
            return


def _row_order(trial: Trial) -> Iterator[Finding]:
    """Rows come in any order, and groups need not be neighbours."""
    order = torch.randperm(len(trial.batch.rewards), generator=torch.Generator().manual_seed(1))
    wrong = trial.bench.step(permute(trial.batch, order)).differs(trial.whole, TOLERANCE, order)
    if wrong:
        yield Finding(
            law="row order",
            what=f"with the rows in another order, {wrong}",
            remedy="Find a group by batch.group_ids (rl.objectives.advantages.group_sums does), never by position: "
            "groups differ in size, and rows are shuffled",
        )


def _groups(trial: Trial) -> Iterator[Finding]:
    """A constant added to one group's rewards changes no advantage, where the group is the baseline."""
    if not trial.objective.group_relative:
        return
    batch = trial.batch
    shifted = replace(batch, rewards=batch.rewards + 3.0 * (batch.group_ids == batch.group_ids[0]))
    before, after = (trial.bench.advantages(b)[1] for b in (batch, shifted))
    moved = (after - before).abs().amax(dim=1) > TOLERANCE * before.abs().max()
    if moved.any():
        others = bool(moved[batch.group_ids != batch.group_ids[0]].any())
        yield Finding(
            law="groups",
            what="3 added to all rewards of one group changes the advantages of "
            + ("another group" if others else "that group"),
            remedy="Compare each reward with its own group's (rl.objectives.advantages.group_relative(batch.rewards, "
            "batch.group_ids, ...)); if the baseline is another one on purpose, declare "
            "`group_relative: ClassVar[bool] = False`",
        )


def _sign(trial: Trial) -> Iterator[Finding]:
    """A sequence that is rewarded more becomes more likely than it would have."""
    bench, batch = trial.bench, bench_on_policy(trial)
    for row in (0, 3):
        better = replace(batch, rewards=batch.rewards + 4.0 * (torch.arange(len(batch.rewards)) == row))
        push = [-float(bench.step(b).logprobs[row].sum()) for b in (batch, better)]
        if not push[1] > push[0]:
            yield Finding(
                law="sign",
                what=f"raising a sequence's reward by 4 changes the push on its log-probability from {push[0]:+.3g} to "
                f"{push[1]:+.3g}",
                remedy="loss is minimised: it falls when a token with a positive advantage becomes more likely, as "
                "-ratio * advantages does",
            )
            return


def _gradient_on_policy(trial: Trial) -> Iterator[Finding]:
    """Where the policy is the old one, the gradient is the policy gradient: -A over the trainer's denominator."""
    bench, batch = trial.bench, bench_on_policy(trial)
    out = bench.step(batch)
    want = -bench.advantages(batch)[1] * bench.weights(batch)
    live = batch.mask & (want.abs() > 1e-3 * want.abs().max())
    factor = (out.logprobs / want)[live]
    if bool((factor - 1).abs().max() < 0.01):
        return
    length = batch.mask.sum(dim=1, keepdim=True).expand_as(want)[live].float()
    if bool(factor.abs().max() < 1e-3):
        what, remedy = (
            "there is none",
            (
                "The loss does not depend on policy.logprobs: a .detach(), .item(), torch.no_grad() or a ratio of "
                "batch.old_logprobs to itself cuts it off"
            ),
        )
    elif bool((factor < 0).all()):
        what, remedy = "it has the wrong sign", "loss is minimised: return -ratio * advantages"
    elif _steady(factor * length):
        what = "each token's is divided by the length of its sequence once more"
        remedy = 'Do not average yourself: set `average_over="sequences"`, and return the loss of every token'
    elif _steady(factor / length):
        what = "each token's is multiplied by the length of its sequence"
        remedy = "Take the mean, not the sum, over a sequence's tokens (rl.reduce.masked_mean)"
    elif _steady(factor):
        what = f"it is {float(factor.mean()):.3g} times that"
        remedy = "Leave every denominator to the trainer (`average_over`); a weight on all of it belongs in the lr"
    else:
        what = f"tokens get {float(factor.min()):.2g} to {float(factor.max()):.2g} times that"
        remedy = "Weigh tokens in advantages(batch), where the weights are part of the advantage"
    yield Finding(
        law="policy gradient",
        what=f"at ratio 1 the gradient should be -advantage / (the trainer's denominator), and {what}",
        remedy=remedy,
    )


def _zero_advantage(trial: Trial) -> Iterator[Finding]:
    """Zero advantages give zero policy gradient, on which the trainer and the critic's warm-up rely."""
    if not trial.objective.skippable:
        return
    grad = trial.bench.step(trial.batch, scale=0.0).logprobs
    if bool(grad.abs().max() > 1e-7):
        yield Finding(
            law="zero advantage",
            what=f"with all advantages 0 the policy still has a gradient (up to {float(grad.abs().max()):.2g})",
            remedy="Multiply every term by the advantages. If another term is meant (a penalty), declare `skippable: "
            "ClassVar[bool] = False`: then the trainer leaves no row out",
        )


def _finite_differences(trial: Trial) -> Iterator[Finding]:
    """The gradient is that of the loss's value, token by token."""
    if trial.objective.stop_gradient:
        return
    bench, batch, h = trial.bench, trial.batch, 1e-2
    scale = float(trial.whole.logprobs.abs().max())
    for row, column in batch.mask.nonzero()[::3].tolist():
        nudge = torch.zeros(batch.mask.shape)
        nudge[row, column] = h
        up, down = (bench.step(batch, nudge=sign * nudge).total for sign in (1, -1))
        slopes = sorted([(up - trial.whole.total) / h, (trial.whole.total - down) / h])
        got = float(trial.whole.logprobs[row, column])
        # At a kink any slope between those of the two sides is right.
        if not slopes[0] - 0.02 * scale - 1e-5 <= got <= slopes[1] + 0.02 * scale + 1e-5:
            yield Finding(
                law="finite differences",
                what=f"the loss's value says that the gradient of row {row}, token {column} is {slopes[0]:.4g}, and "
                f"backward() says {got:.4g}",
                remedy="A factor that depends on policy.logprobs is detached. If that is on purpose (CISPO's weight), "
                "declare `stop_gradient: ClassVar[bool] = True`",
            )
            return


def _extremes(trial: Trial) -> Iterator[Finding]:
    """Ratios of e^20 to e^100 give finite numbers."""
    for nats in (20.0, 100.0, -20.0, -100.0):
        out = trial.bench.step(trial.bench.extreme(trial.batch, nats), drift=nats)
        if not out.finite:
            yield Finding(
                law="extreme ratios",
                what=f"a log-ratio of {nats:g} nats makes the loss or its gradient NaN or infinite",
                remedy="Clamp before the exp: rl.objectives.surrogates.ratio_of(log_ratio). In fp32 e^89 is infinite, "
                "and 0 times infinity is NaN also where torch.where or max picks the other side",
            )
            return


def bench_on_policy(trial: Trial) -> Batch:
    """The step's batch as its first optimizer step sees it: sampled by the policy of now."""
    now = trial.bench.policy(trial.batch).logprobs.detach()
    return replace(trial.batch, old_logprobs=now, rollout_logprobs=now)


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


def _steady(x: Tensor) -> bool:
    """Whether all numbers are the same but for rounding, and not 0."""
    return bool((x - x.mean()).abs().max() < 0.02 * x.mean().abs())


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
