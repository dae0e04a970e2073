"""What does the terminal show during a run, and at its end?"""

import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from trainer.home import prepare_home


class Terminal(Console):
    """A console whose reader may leave, or whose disk may be full: what it cannot print is lost, and nothing else."""

    def on_broken_pipe(self) -> None:
        """The reader has left, as in `python recipe.py | head`."""
        self.quiet = True
        discard_output()

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, if possible."""
        try:
            super().print(*objects, **options)
        except (OSError, ValueError):  # ValueError: the stream is closed
            # Else it would be printed again with the next line.
            del self._buffer[:]


console = Terminal(soft_wrap=True)


def escape_unencodable() -> None:
    """Write what the terminal's encoding lacks as an escape, such as \\xb1. Without it such a character is an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def prepare_process() -> None:
    """Prepare this process for any command: its terminal and its home."""
    escape_unencodable()
    if note := prepare_home():
        console.print(note, style="dim", markup=False, highlight=False)


def discard_output() -> None:
    """Send to nowhere what is still printed. Else Python's own flush at exit would fail, with exit status 120."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def flush_output() -> None:
    """Flush what was printed, as long as somebody can take it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        discard_output()


@contextmanager
def status(message: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Print what is in progress, and how long it took. Gives a function that counts one of `total` parts as done."""
    began = time.perf_counter()
    console.print(f"[dim]{message} ...[/]")
    with working(message, total) as done:
        yield done
    console.print(f"[dim]... {time.perf_counter() - began:.1f} s[/]")


@contextmanager
def working(message: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """While this runs, a terminal shows a bar: the seconds so far, and how many of `total` parts are done. Any other
    output gets nothing, and a bar within another one is not shown."""
    if not console.is_terminal or console.is_dumb_terminal or console.quiet or _shown:
        yield lambda: None
        return
    bars = [BarColumn(), MofNCompleteColumn()] if total else []
    columns = (SpinnerColumn("line"), "{task.description}", *bars, TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, refresh_per_second=4)
    task = progress.add_task(message, total=total)
    _shown.append(message)
    with suppress(OSError, ValueError):  # the terminal is gone
        progress.start()
    try:
        yield lambda: progress.advance(task)
    finally:
        _shown.pop()
        with suppress(OSError, ValueError):
            progress.stop()


_shown: list[str] = []
"""The bar that is on the terminal."""


def as_typed(program: Path) -> str:
    """A program as its user would type it here: its name where the shell finds it, else the shorter path to it."""
    found = shutil.which(program.name)
    if found and os.path.abspath(found) == os.path.abspath(program):
        return program.name
    near = os.path.relpath(program)
    return str(program) if near.startswith("..") else near


COLUMNS = [
    ("reward", "reward/mean", ".3f"),
    ("entropy", "actor/entropy", ".2f"),
    ("clip", "actor/clip_frac", ".3f"),
    ("kl", "actor/ppo_kl", ".1e"),
    ("gap", "rollout_corr/logprob_abs_diff_mean", ".1e"),
    ("stale", "staleness/max", ".0f"),
    ("len", "response_length/mean", ".1f"),
    ("sec", "timing_s/step", ".1f"),
    ("wait", "timing_s/wait_for_samples", ".1f"),
    ("learn", "timing_s/learn", ".1f"),
    ("sync", "weight_sync/seconds", ".1f"),
]


class Lines:
    """One line per step, of those columns that the run's objective has."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        # Imported late: it takes torch, which `unison cluster` does not need.
        from rl.loop.estimates import headlines

        cells = [f"{label} {metrics[name]:{form}}" for label, name, form in COLUMNS if name in metrics]
        cells += [f"{name.removeprefix('eval/')} {metrics[name]:.3f}" for name in headlines(metrics)]
        console.print(f"step {step}/{self.steps}  " + "  ".join(cells), highlight=False)


def alert_line(step: int, title: str, text: str) -> None:
    """Print an alert in one line: its title in red, the explanation in yellow."""
    console.print(Text.assemble((f"alert at step {step}: {title}. ", "bold red"), (text, "yellow")))


def plus_minus() -> str:
    """The sign, as the terminal can show it."""
    try:
        "±".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return "+-"
    return "±"


def with_error(value: float, error: float | None, digits: int = 3) -> str:
    """A figure with its standard error, where that is known; a single value has none."""
    known = error is not None and math.isfinite(error)
    return f"{value:.{digits}f}" + (f" {plus_minus()} {error:.{digits}f}" if known else "")


def as_minutes(seconds: float) -> str:
    """A time in its largest unit, or two."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def closing_table(summary: dict[str, Any], folder: Path) -> None:
    """Print the run's results in a dozen lines, and its files."""
    table = Table(title=f"{summary['name']}: {summary['status']}", show_header=False, title_justify="left")
    for key in ("eval_before", "eval_after", "eval_change"):
        for name, value in summary.get(key, {}).items():
            if not name.endswith("_se"):
                table.add_row(f"{key} {name}", with_error(value, summary[key].get(f"{name}_se")))
    if best := summary.get("best"):
        figure = f"eval/{best['figure']}"
        table.add_row(f"best {figure}", f"{best['value']:.3f} at step {best['step']}: {best['model']}")
        if figure in best.get("again", {}):
            table.add_row("with other seeds", with_error(best["again"][figure], best["again"].get(f"{figure}_se")))
    for key in ("steps", "tokens", "train_seconds", "reward_first", "reward_last", "worst_logprob_gap", "alerts"):
        if summary.get(key) is not None:
            value = summary[key]
            table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    if summary.get("error"):
        table.add_row("error", Text(summary["error"].splitlines()[0]))
        table.add_row("actors' logs", summary["logs"])
    table.add_row("ledger", ", ".join(f"{n} {state}" for state, n in summary["ledger"].items() if n))
    files = ("alerts.jsonl", "metrics.jsonl", "summary.json", "samples.jsonl", "curves.png", "config.json", "model")
    for file in files:
        if (folder / file).exists():
            table.add_row("look at", str(folder / file))
    console.print(table)
    for text in summary.get("advice", ()):
        console.print(f"advice: {text}", markup=False, highlight=False, style="yellow")
    # Outside the table, which would cut the lines: the user copies them.
    if kept := sorted((folder / "wandb").glob("offline-run-*")):
        words = [as_typed(Path(sys.executable).with_name("wandb")), "sync", *map(str, kept)]
        console.print(f"send to W&B with: {shlex.join(words)}", markup=False, highlight=False)
    if summary.get("resume"):
        console.print(f"resume with: {summary['resume']}", markup=False, highlight=False)
