"""What does `unison watch` show? One screen of a run, for any width."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rl.loop.estimates import headlines
from rl.parity.advice import advise
from trainer.runs.reading import Reading
from trainer.tracking.terminal import as_minutes, plus_minus, with_error

BLOCKS = {True: " ▁▂▃▄▅▆▇█", False: " .:-=+*#@"}
COLOURS = {"running": "green", "finished": "bold green", "interrupted": "yellow"}


def board(run: Reading, console: Console) -> Group:
    """The whole screen."""
    rows = [row for row in run.rows if row.get("reward/mean") is not None]
    last = rows[-1] if rows else {}
    width = max(8, min(40, console.width - 40))
    table = Table.grid(padding=(0, 2), expand=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in (
        ("step", _step(run, rows, width)),
        ("reward", _reward(rows, width)),
        ("held-out", _held_out(run.rows)),
        ("gap", _number(last, "rollout_corr/logprob_abs_diff_mean", ".1e", " nats")),
        ("entropy", _number(last, "actor/entropy", ".3g", " nats")),
        ("length", _length(last)),
        ("queues", _queues(last)),
        ("time", _time(last)),
    ):
        if text:
            table.add_row(label, text)
    parts: list[Any] = [_head(run), table]
    if run.alerts.rows:
        alert = run.alerts.rows[-1]
        more = f" ({len(run.alerts.rows)} alerts in all)" if len(run.alerts.rows) > 1 else ""
        parts.append(_line(f"alert at step {alert['step']}: {alert['title']}. {alert['text']}{more}", "red"))
    parts += [_line(each.text, "yellow") for each in advise(run.rows, run.settings, run.idle_s)]
    if error := run.summary.get("error"):
        parts.append(_line(error.splitlines()[0], "red"))
    return Group(*parts)


def farewell(run: Reading) -> str:
    """How to continue a run that has not finished; the user copies it, so nothing may wrap it."""
    if resume := run.summary.get("resume"):
        return f"resume with: {resume}"
    gone = "Its process is gone, and wrote no summary. Resume it with its recipe and --resume."
    return gone if run.status == "killed" else ""


def ends_in(rows: Sequence[dict[str, Any]], steps: int) -> float | None:
    """Seconds to the last step at the median pace of the last 20, without evaluations and checkpoints."""
    seconds = [row["timing_s/step"] for row in rows[-20:] if row.get("timing_s/step") is not None]
    return median(seconds) * (steps - rows[-1]["step"]) if seconds else None


def _line(text: str, style: str) -> Text:
    """One line of text; what a reply or a library put into a message moves no cursor."""
    return Text("".join(c if c.isprintable() else " " for c in text), style=style)


def _head(run: Reading) -> Text:
    return Text.assemble(
        (str(run.settings.get("name", run.folder)), "bold"),
        f" {run.folder}  ",
        (run.status, COLOURS.get(run.status, "bold red")),
    )


def _step(run: Reading, rows: Sequence[dict[str, Any]], width: int) -> str:
    steps = run.settings.get("steps") or 1
    done = int(rows[-1]["step"]) if rows else 0
    left = ends_in(rows, steps) if rows and not run.ended else None
    more = f"  about {as_minutes(left)} left" if left else ""
    if not rows and not run.ended:
        more = "  no step has ended yet"
    return f"{done} of {steps} {_bar(done / steps, width // 2)}{more}"


def _reward(rows: Sequence[dict[str, Any]], width: int) -> str:
    if not rows:
        return ""
    values = [row["reward/mean"] for row in rows]
    now = with_error(values[-1], rows[-1].get("reward/mean_se"))
    return f"{now}  (first {values[0]:.3g}, best {max(values):.3g})  {_spark(values, width)}"


def _held_out(rows: Sequence[dict[str, Any]]) -> str:
    for row in reversed(rows):
        if names := headlines(row):
            found = [
                f"{n.removeprefix('eval/')} {with_error(row[n], row.get(f'{n}_se'))}"
                for n in names
                if row[n] is not None
            ]
            return f"{', '.join(found)} after step {row['step']:.0f}"
    return ""


def _number(row: dict[str, Any], name: str, form: str, unit: str) -> str:
    if name not in row:
        return ""
    return "not a number" if row[name] is None else f"{row[name]:{form}}{unit}"


def _length(row: dict[str, Any]) -> str:
    cut = row.get("response_length/truncated_frac")
    text = _number(row, "response_length/mean", ".0f", " tokens")
    return f"{text}, {cut:.0%} cut off" if text and cut is not None else text


def _queues(row: dict[str, Any]) -> str:
    counts = {state: row.get(f"queue/{state}") for state in ("sampling", "scoring", "ready")}
    most = max((n for n in counts.values() if n is not None), default=0)
    shown = [
        f"{state} {n:.0f} {_bar(n / most, 8) if most else ''}".rstrip() for state, n in counts.items() if n is not None
    ]
    oldest = row.get("queue/oldest_s")
    return "  ".join(shown) + (f"  the oldest since {as_minutes(oldest)}" if oldest else "")


def _time(row: dict[str, Any]) -> str:
    """Where the last step's time went, and who waited for whom."""
    if row.get("timing_s/step") is None:
        return ""
    names = {"wait": "timing_s/wait_for_samples", "learn": "timing_s/learn", "update": "weight_sync/seconds"}
    spent = ", ".join(f"{label} {row[n]:.1f}" for label, n in names.items() if row.get(n) is not None)
    learner, engines = (row.get(f"perf/{side}_idle_frac") or 0.0 for side in ("trainer", "rollout"))
    who = f"the learner waited for the engines {learner:.0%} of it"
    if engines > learner:
        who = f"the engines waited for the learner {engines:.0%} of it"
    return f"{row['timing_s/step']:.1f} s a step ({spent}); {who}"


def _bar(share: float, width: int) -> str:
    full = round(min(max(share, 0.0), 1.0) * width)
    on, off = ("█", "░") if plus_minus() == "±" else ("#", ".")
    return on * full + off * (width - full)


def _spark(values: Sequence[float], width: int) -> str:
    """The values as one line of blocks, each the mean of neighbouring steps."""
    size = max(1, -(-len(values) // width))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    blocks = BLOCKS[plus_minus() == "±"]
    return "".join(blocks[1 + round((v - low) / (high - low) * 7)] if high > low else blocks[4] for v in means)
