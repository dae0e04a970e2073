"""What must change nothing: another split, another order, other rows, columns outside the mask."""

from collections.abc import Iterator
from dataclasses import fields, replace

import torch

from rl.batch import micro_batches
from rl.contract.synthetic_step import junk, pad, permute
from rl.contract.trial import TOLERANCE, Finding, Trial
from rl.types import Batch


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
