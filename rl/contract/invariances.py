"""What must not change the loss? Another split, another row order, empty rows, columns outside the mask."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from rl.batch import micro_batches
from rl.contract.synthetic_step import junk, pad, permute
from rl.contract.trial import TOLERANCE, Trial, Violation
from rl.types import columns


def pure(trial: Trial) -> Iterator[Violation]:
    """The same input gives the same output, and is not changed in place."""
    fresh, again = columns(trial.synthetic.batch()), trial.synthetic.run(trial.batch)
    changed = [name for name, x in columns(trial.batch).items() if not torch.equal(fresh[name], x)]
    if changed:
        yield Violation(
            check="pure",
            what=f"batch.{changed[0]} was changed in place",
            remedy="Make new tensors: x = x + 1 rather than x += 1, torch.where rather than assignment to x[mask]",
        )
    elif again.differs(trial.whole, 0.0):
        yield Violation(
            check="pure",
            what="two calls on the same batch gave different losses",
            remedy="Keep no state and draw no random numbers in an objective: all ranks and micro-batches must agree",
        )


def splits(trial: Trial) -> Iterator[Violation]:
    """No cut into micro-batches changes the loss, its gradient, or a metric."""
    rows = torch.arange(len(trial.batch.rewards))
    for name, cut in {"single rows": rows.split(1), "pairs": rows.split(2), "3 and the rest": rows.split(3)}.items():
        split = trial.synthetic.run(trial.batch, list(cut))
        wrong = split.differs(trial.whole, TOLERANCE)
        if wrong:
            yield Violation(
                check="micro-batches",
                what=f"cut into {name}, {wrong}",
                remedy="loss() is called on parts of a step and may look at one row at a time only: no mean(), sum(), "
                "len() over rows or over the whole [B, T]. Statistics of the step belong in advantages(batch), and "
                "averaging to the trainer (`average_over`)",
            )
            return


def ranks(trial: Trial) -> Iterator[Violation]:
    """No cut over ranks changes them either; a rank may have no rows."""
    rows = torch.arange(len(trial.batch.rewards))
    for ranks in (2, 3, len(rows) + 2):
        dealt = micro_batches(trial.batch, rows, ranks=ranks, budget=12, share_prompts=False)
        split = trial.synthetic.run(trial.batch, [micro for rank in dealt for micro in rank])
        wrong = split.differs(trial.whole, TOLERANCE)
        if wrong and split.finite:
            yield Violation(
                check="ranks",
                what=f"on {ranks} ranks, {wrong}",
                remedy="A rank sees its own rows only: leave every denominator that counts rows to the trainer",
            )
            return


def empty_rows(trial: Trial) -> Iterator[Violation]:
    """A row without sampled tokens gives no NaN."""
    rows = torch.arange(len(trial.batch.rewards))
    idle_rank = trial.synthetic.run(trial.batch, [rows, rows[:0]])
    silent = trial.synthetic.run(replace(trial.batch, mask=trial.batch.mask & (rows != 2)[:, None]))
    if not (idle_rank.finite and silent.finite):
        yield Violation(
            check="empty mask",
            what="a row whose mask is empty makes the loss or its gradient NaN or infinite",
            remedy="A rank without work gets such a row. Divide by mask.sum(dim=1).clamp(min=1), or use "
            "rl.reduce.masked_mean",
        )


def outside_mask(trial: Trial) -> Iterator[Violation]:
    """Numbers at masked columns have no effect, and get no gradient."""
    for name, other in {
        "numbers at columns outside the mask": junk(trial.batch),
        "three more columns of padding": pad(trial.batch, 3),
    }.items():
        wrong = trial.synthetic.run(other).differs(trial.whole, TOLERANCE)
        if wrong:
            yield Violation(
                check="mask",
                what=f"with other {name}, {wrong}" if "numbers" in name else f"with {name}, {wrong}",
                remedy="Prompts, tool replies and padding are in these tensors too: take means with "
                "rl.reduce.masked_mean(x, batch.mask), counts with batch.mask.sum(dim=1), and select by x[batch.mask]",
            )
            return


def row_order(trial: Trial) -> Iterator[Violation]:
    """Rows may come in any order, and the rows of a group need not be adjacent."""
    order = torch.randperm(len(trial.batch.rewards), generator=torch.Generator().manual_seed(1))
    wrong = trial.synthetic.run(permute(trial.batch, order)).differs(trial.whole, TOLERANCE, order)
    if wrong:
        yield Violation(
            check="row order",
            what=f"with the rows in another order, {wrong}",
            remedy="Find a group by batch.group_ids (rl.objectives.advantages.group_sums does), never by position: "
            "groups differ in size, and rows are shuffled",
        )


def groups(trial: Trial) -> Iterator[Violation]:
    """A constant added to all rewards of a group changes no advantage, if the group is the baseline."""
    if not trial.objective.group_relative:
        return
    batch = trial.batch
    shifted = replace(batch, rewards=batch.rewards + 3.0 * (batch.group_ids == batch.group_ids[0]))
    before, after = (trial.synthetic.advantages(b)[1] for b in (batch, shifted))
    moved = (after - before).abs().amax(dim=1) > TOLERANCE * before.abs().max()
    if moved.any():
        others = bool(moved[batch.group_ids != batch.group_ids[0]].any())
        yield Violation(
            check="groups",
            what="3 added to all rewards of one group changes the advantages of "
            + ("another group" if others else "that group"),
            remedy="Compare each reward with its own group's (rl.objectives.advantages.group_relative(batch.rewards, "
            "batch.group_ids, ...)); if another baseline is intended, declare "
            "`group_relative: ClassVar[bool] = False`",
        )
