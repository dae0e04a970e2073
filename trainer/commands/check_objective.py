"""What `unison check-objective` shows: a table of findings, or what was checked."""

from rich.markup import escape
from rich.table import Table

from rl.contract.check import LAWS, Finding
from rl.objectives.objective import Objective
from trainer.tracking.terminal import console


def show(objective: Objective, found: list[Finding]) -> None:
    """One row per finding."""
    name = type(objective).__name__
    if not found:
        console.print(f"[green]{name} keeps the contract[/]: {len(LAWS)} laws were tried", highlight=False)
        for law in LAWS:
            console.print(f"  {law.__doc__}", style="dim", highlight=False, markup=False)
        return
    table = Table(title=f"{name} breaks its contract", show_lines=True)
    for header in ("law", "what is wrong", "how to mend it"):
        table.add_column(header, overflow="fold")
    for finding in found:
        table.add_row(*(escape(text) for text in (finding.law, finding.what, finding.remedy)))
    console.print(table)
