"""What a user sees while a run goes on, and at its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rl.config import Config

console = Console(soft_wrap=True)


@contextmanager
def status(message: str) -> Iterator[None]:
    """Say what is going on, and how long it took."""
    began = time.perf_counter()
    console.print(f"[dim]{message} ...[/]")
    yield
    console.print(f"[dim]... {time.perf_counter() - began:.1f} s[/]")


class Progress:
    """One line per step."""

    def __init__(self, config: Config) -> None:
        self.steps = config.steps

    def __call__(self, step: int, m: dict[str, float]) -> None:
        evals = "  ".join(
            f"{k.removeprefix('eval/')} {v:.3f}"
            for k, v in m.items()
            if k.startswith("eval/") and "/avg@" in k and not k.endswith("_se")
        )
        if "reward/mean" not in m:
            console.print(f"step 0/{self.steps}  {evals}", highlight=False)
            return
        console.print(
            f"step {step}/{self.steps}  reward {m['reward/mean']:.3f}  entropy {m['actor/entropy']:.2f}  "
            f"clip {m['actor/clip_frac']:.3f}  kl {m['actor/ppo_kl']:.1e}  "
            f"gap {m['rollout_corr/logprob_abs_diff_mean']:.1e}  stale {m['staleness/max']:.0f}  "
            f"len {m['response_length/mean']:.1f}  {m['timing_s/step']:.1f} s"
            f" (wait {m['timing_s/wait_for_samples']:.1f} learn {m['timing_s/learn']:.1f} "
            f"sync {m['weight_sync/seconds']:.1f})  {evals}",
            highlight=False,
        )


def closing_table(summary: dict[str, Any], folder: Path) -> None:
    """The run in a dozen lines, and where to look."""
    table = Table(title=f"{summary['name']}: {summary['status']}", show_header=False, title_justify="left")
    for key in ("eval_before", "eval_after"):
        for name, value in summary.get(key, {}).items():
            if not name.endswith("_se"):
                error = summary[key].get(f"{name}_se")
                table.add_row(f"{key} {name}", f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
    for key in ("steps", "tokens", "train_seconds", "reward_first", "reward_last", "worst_logprob_gap"):
        if summary.get(key) is not None:
            value = summary[key]
            table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    if summary.get("error"):
        table.add_row("error", Text(summary["error"].splitlines()[0]))
        table.add_row("actors' logs", summary["logs"])
    table.add_row("ledger", ", ".join(f"{n} {state}" for state, n in summary["ledger"].items() if n))
    for file in ("metrics.jsonl", "summary.json", "samples.jsonl", "curves.png", "config.json", "model"):
        if (folder / file).exists():
            table.add_row("look at", str(folder / file))
    console.print(table)
