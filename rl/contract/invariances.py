"""What must not change a row's numbers? A second call, other rows, padding, longer prompts, another order."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from rl.batch import micro_batches
from rl.contract.place import changes, is_draw, line_where
from rl.contract.run import Outcome, prepared, run, seen
from rl.contract.scene import Scene
from rl.contract.trial import TOLERANCE, Trial, Violation
from rl.types import columns, step_of


def pure(trial: Trial) -> Iterator[Violation]:
    """The same input gives the same output, and is not changed in place."""
    objective = trial.objective
    scene = trial.scene.each(lambda x: x.clone())
    kept: dict[str, torch.Tensor] = columns(scene.batch)
    before = {name: x.clone() for name, x in kept.items()}

    def both() -> None:
        given = objective.advantages(seen(objective, scene.batch))
        objective.loss(scene.policy, step_of(seen(objective, scene.batch), scene.batch.old_logprobs), given)

    both()
    changed = [name for name, x in kept.items() if not torch.equal(before[name], x)]
    if changed:
        yield Violation(
            check="pure",
            what=f"batch.{changed[0]} was changed in place",
            remedy="Make new tensors: x = x + 1 rather than x += 1, torch.where rather than assignment to x[mask]",
            place=line_where(objective, changes({n: kept[n] for n in changed}), both),
        )
        return
    if not run(objective, trial.scene).differs(trial.whole, 0.0):
        return
    line = line_where(objective, is_draw, both)
    with torch.random.fork_rng():  # pyright: ignore[reportUnknownMemberType]
        outcomes = list[Outcome]()
        for _ in range(2):
            torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
            outcomes.append(run(objective, trial.scene))
    drawn = bool(line) or not outcomes[0].differs(outcomes[1], 0.0)
    yield Violation(
        check="pure",
        what="two calls on the same batch gave different losses: it "
        + ("draws random numbers" if drawn else "keeps a state from call to call"),
        remedy="Keep no state and draw no random numbers in an objective: all ranks and micro-batches must agree",
        method="loss",
        place=line,
    )


def outside_mask(trial: Trial) -> Iterator[Violation]:
    """Numbers at masked columns and the width of the padding have no effect."""
    for what, scene in {
        "with other numbers at columns outside the mask": trial.scene.junk(),
        "with three more columns of padding": trial.scene.padded(3),
    }.items():
        wrong = run(trial.objective, scene).differs(trial.whole, TOLERANCE)
        if wrong:
            yield Violation(
                check="mask",
                what=f"{what}, {wrong}",
                remedy="Prompts, tool replies and padding are in these tensors too: take means with "
                "rl.reduce.masked_mean(x, batch.mask), counts with batch.mask.sum(dim=1), and select by x[batch.mask]",
                method=at_fault(wrong),
            )
            return


def position(trial: Trial) -> Iterator[Violation]:
    """A column is no position: longer prompts move a reply to the right, and change none of its numbers."""
    rows, room = len(trial.scene.batch.rewards), 5
    by = torch.arange(rows) * 3 % (room + 1)
    # Both have the same width: how wide the padding is belongs to another check.
    here, moved = (run(trial.objective, trial.scene.moved(by * far, room)) for far in (0, 1))
    width = trial.scene.batch.mask.shape[1]
    back = moved.each(lambda x: x.gather(1, torch.arange(width) + by[:, None]))
    here = here.each(lambda x: x[:, :width])
    wrong = back.differs(here, TOLERANCE)
    if wrong:
        yield Violation(
            check="position",
            what=f"with longer prompts, which move each reply some columns to the right, {wrong}: a column is used as "
            "a position, and prompts differ in length",
            remedy="The position in a reply is batch.mask.cumsum(dim=1) - 1; its last token is where "
            "batch.mask.flip(1).cumsum(1).flip(1) == 1 (rl.objectives.advantages.at_end)",
            method=at_fault(wrong),
        )


def row_order(trial: Trial) -> Iterator[Violation]:
    """Rows may come in any order, and the rows of a group need not be adjacent."""
    order = torch.randperm(len(trial.scene.batch.rewards), generator=torch.Generator().manual_seed(1))
    wrong = run(trial.objective, trial.scene.rows(order)).differs(trial.whole.each(lambda x: x[order]), TOLERANCE)
    if wrong:
        yield Violation(
            check="row order",
            what=f"with the rows in another order, {wrong}",
            remedy="Find a group by batch.group_ids (rl.objectives.advantages.group_sums does), never by position: "
            "groups differ in size, and rows are shuffled",
            method=at_fault(wrong),
        )


def splits(trial: Trial) -> Iterator[Violation]:
    """No cut into micro-batches and ranks changes the loss, its gradient, or a metric; a rank may have no rows."""
    rows = torch.arange(len(trial.scene.batch.rewards))
    dealt = micro_batches(trial.scene.batch, rows, ranks=len(rows) // 2 + 1, budget=20, share_prompts=False)
    parts = [micro for rank in dealt for micro in rank]
    for name, cut in (("cut into single rows", [*rows[:, None]]), ("dealt to ranks", parts)):
        wrong = run(trial.objective, trial.scene, cut).differs(trial.whole, TOLERANCE)
        if wrong:
            yield Violation(
                check="micro-batches",
                what=f"{name}, {wrong}",
                remedy="loss() is called on parts of a step and may look at one row at a time only: no mean(), sum(), "
                "len() over rows or over the whole [B, T]. Statistics of the step belong in advantages(batch), and "
                "averaging to the trainer (`average_over`)",
                method="loss",
            )
            return


def groups(trial: Trial) -> Iterator[Violation]:
    """A constant added to all rewards of a group changes no advantage, and equal rewards give 0, in a group."""
    if not trial.objective.group_relative:
        return
    batch = trial.scene.batch
    declare = "if another baseline is intended, declare `group_relative: ClassVar[bool] = False`"
    shifted = replace(batch, rewards=batch.rewards + 3.0 * (batch.group_ids == batch.group_ids[0]))
    before, after = (prepared(trial.objective, b)[1] for b in (batch, shifted))
    moved = (after - before).abs().amax(dim=1) > TOLERANCE * before.abs().max()
    if moved.any():
        others = bool(moved[batch.group_ids != batch.group_ids[0]].any())
        yield Violation(
            check="groups",
            what="3 added to all rewards of one group changes the advantages of "
            + ("another group" if others else "that group"),
            remedy="Compare each reward with its own group's (rl.objectives.advantages.group_relative(batch.rewards, "
            f"batch.group_ids, ...)); {declare}",
            method="advantages",
        )
        return
    # 0.5 is exact in fp32, and its mean too: a number that is left there is the objective's intention.
    one_group = replace(batch, group_ids=torch.zeros_like(batch.group_ids))
    left = {
        r: float(prepared(trial.objective, replace(one_group, rewards=batch.rewards * 0 + r))[1].abs().max())
        for r in (0.5, 0.7, 0.1, 100.1)
    }
    worst = max(left, key=lambda r: left[r])
    if left[0.5] < 1e-6 and left[worst] > 0.01:
        yield Violation(
            check="groups",
            what=f"a group whose rewards are all {worst:g} gets advantages up to {left[worst]:.2g}, not 0: there is "
            "nothing to learn from it",
            remedy="In fp32 the mean of equal rewards may differ from them, and a small eps magnifies the rest: use "
            f"rl.objectives.advantages.group_relative, or an eps of 1e-4; {declare}",
            method="advantages",
        )


def at_fault(wrong: str) -> str:
    """The method that a difference points to."""
    return "advantages" if "advantages" in wrong else "loss"


def nudged(scene: Scene, row: int, by: float) -> list[tuple[str, Scene, torch.Tensor]]:
    """For each column of numbers: one copy of a long row for each of its tokens, with that token's number changed."""
    tokens = scene.batch.mask[row].nonzero()[:, 0]
    copies = scene.rows(torch.full((len(tokens),), row))
    delta = torch.zeros(copies.batch.mask.shape)
    delta[torch.arange(len(tokens)), tokens] = by
    out = [("advantages", copies, delta)]
    kept = columns(copies.batch)
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs"):
        out.append((f"batch.{name}", copies.having(**{name: kept[name] + delta}), torch.zeros_like(delta)))
    return out


def same_column(trial: Trial) -> Iterator[Violation]:
    """A number at a column belongs to that column's token; nothing is shifted."""
    row = 3
    tokens = trial.scene.batch.mask[row].nonzero()[:, 0]
    given = trial.on_policy.batch.mask.float()[row].expand(len(tokens), -1)
    base = run(trial.objective, trial.on_policy.rows(torch.full((len(tokens),), row)), given=given).logprobs
    for name, scene, more in nudged(trial.on_policy, row, 0.2):
        moved = (run(trial.objective, scene, given=given + more).logprobs - base)[:, tokens].abs()
        hit = moved > 1e-4 * base.abs().max()
        for by in (1, -1, 2, -2):
            if bool(hit.diagonal(by).all()) and not hit.diagonal(0).any():
                side = "after" if by > 0 else "before"
                yield Violation(
                    check="columns",
                    what=f"{name} of a token changes the gradient of the token {abs(by)} column{'s' * (abs(by) > 1)} "
                    f"{side} it, and not its own",
                    remedy="Column t of every [B, T] tensor belongs to the same token (the prediction of "
                    "input_ids[:, t + 1]): nothing needs [:, 1:], [:, :-1] or roll",
                    method="loss",
                )
                return
