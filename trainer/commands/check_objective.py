"""What `unison check-objective` shows: a table of violations, or what was checked."""

import sys

from rich.markup import escape
from rich.table import Table

from rl.contract.check import CHECKS
from rl.contract.trial import Violation
from rl.objectives import Objective
from trainer.commands.load import load_objective
from trainer.tracking.terminal import console


def show(objective: Objective, found: list[Violation]) -> None:
    """One row per violation."""
    name = type(objective).__name__
    if not found:
        console.print(f"[green]{name} keeps the contract[/]: {len(CHECKS)} checks passed", highlight=False)
        for check in CHECKS:
            console.print(f"  {check.__doc__}", style="dim", highlight=False, markup=False)
        return
    table = Table(title=f"{name} breaks its contract", show_lines=True)
    for header in ("check", "what is wrong", "how to fix it"):
        table.add_column(header, overflow="fold")
    for violation in found:
        table.add_row(*(escape(text) for text in (violation.check, violation.what, violation.remedy)))
    console.print(table)


def check_objective(target: str, flags: list[str]) -> None:
    """Hold an objective to its contract; exits with 1 when it breaks it."""
    if flags:
        raise ValueError(f"check-objective takes one objective and no flags, but got {flags}")
    from rl.contract import check as contract
    from trainer.commands.check_objective import show

    objective = load_objective(target)
    found = contract.check_objective(objective)
    show(objective, found)
    sys.exit(1 if found else 0)
