"""`unison watch`: follow a run in the terminal."""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.live import Live

from trainer.runs.reading import Reading
from trainer.tracking.board import board, farewell
from trainer.tracking.terminal import Lines, Terminal, alert_line, console

EVERY_S = 1.0
"""Seconds between two looks at the folder."""


def watch(arguments: Sequence[str]) -> int:
    """Show a run until it ends; returns 0 if it has finished or still runs, else 1."""
    parser = argparse.ArgumentParser(
        prog="unison watch",
        usage="unison watch [-h] [--once] RUN",
        description="Show a run in the terminal: step, time left, reward, gap, queues, who waits for whom, the last "
        "alert, and what holds the run back. It only reads the run's folder, on this machine or another one, while the "
        "run writes and after its end. Without a terminal it prints one line for each step. The exit status is 1 for a "
        "run that failed or was killed.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run, such as runs/quickstart")
    parser.add_argument("--once", action="store_true", help="show it as it is now, and end")
    asked = parser.parse_args(arguments)
    run = Reading(Path(asked.run))
    run.refresh()
    try:
        if asked.once:
            console.print(board(run, console), soft_wrap=not console.is_terminal)
        elif console.is_terminal:
            _follow(run)
        else:
            _print_lines(run)
    except KeyboardInterrupt:
        pass
    if text := farewell(run):
        console.print(text, markup=False, highlight=False)
    return 0 if run.status in ("running", "finished") else 1


def _follow(run: Reading) -> None:
    """Redraw the board until the run ends; its last state stays on the terminal."""
    screen = Terminal()
    with Live(board(run, screen), console=screen, auto_refresh=False) as live:
        while not run.ended:
            time.sleep(EVERY_S)
            run.refresh()
            live.update(board(run, screen), refresh=True)


def _print_lines(run: Reading) -> None:
    """One line for each step, and for each alert, as the run itself prints them; then how it ended."""
    show, rows, alerts = Lines(run.settings.get("steps", 0)), 0, 0
    while True:
        for row in run.rows[rows:]:
            show(int(row["step"]), {name: math.nan if value is None else value for name, value in row.items()})
        for alert in run.alerts.rows[alerts:]:
            alert_line(alert["step"], alert["title"], alert["text"])
        rows, alerts = len(run.rows), len(run.alerts.rows)
        if run.ended:
            break
        time.sleep(EVERY_S)
        run.refresh()
        rows, alerts = min(rows, len(run.rows)), min(alerts, len(run.alerts.rows))
    console.print(board(run, console))
