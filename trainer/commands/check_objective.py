"""`unison check-objective`: a table of what is wrong with an objective, or a list of what was checked."""

import argparse
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from rl.contract import check as contract
from rl.contract.trial import Violation
from rl.objectives import Objective
from trainer.commands.load import load_objective
from trainer.tracking.terminal import console


def show(objective: Objective, found: list[Violation]) -> None:
    """One row per violation."""
    name = type(objective).__name__
    if not found:
        console.print(f"[green]{name} keeps the contract[/]: {len(contract.CHECKS)} checks passed", highlight=False)
        for check in contract.CHECKS:
            console.print(f"  {check.__doc__}", style="dim", highlight=False, markup=False)
        return
    table = Table(title=f"{name} breaks its contract", show_lines=True)
    for header in ("check", "what is wrong", "where", "how to fix it"):
        table.add_column(header, overflow="fold")
    for v in found:
        table.add_row(*(escape(text) for text in (v.check, v.what, v.place or "-", v.remedy)))
    console.print(table)
    console.print("Later checks build on these: run the command again when they are fixed.", style="dim")


def check_objective(arguments: Sequence[str]) -> int:
    """Check that an objective keeps its contract; returns 1 when it breaks it."""
    parser = argparse.ArgumentParser(
        prog="unison check-objective",
        description="Check an objective of your own: gradients, masks, micro-batches, ranks, groups, extreme values. "
        "Needs no model. The exit status is 1 when a check fails; the table then names the remedy.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "objective",
        help="FILE.py:CLASS, MODULE:CLASS, or the name of one in rl.objectives; with settings if wanted: "
        "'FILE.py:CLASS(alpha=0.5)'",
    )
    objective = load_objective(parser.parse_args(arguments).objective)
    found = contract.check_objective(objective)
    show(objective, found)
    return 1 if found else 0
