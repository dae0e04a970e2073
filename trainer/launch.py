"""The driver: reads the command line, checks everything that can be checked cheaply, runs the loop, reports."""

import asyncio
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from rl.config import Config, check
from rl.data import stream
from rl.loop import Loop
from rl.rewards import RewardError, judge
from rl.types import Data, Prompt, Reply
from trainer import report
from trainer.placement import Placement, check_fits, memory_estimate, plan

console = Console(soft_wrap=True)

USER_ERRORS = (ValueError, FileNotFoundError, ImportError, RewardError)
"""What a user can mend: shown as one message, without a traceback."""


def launch(config: Config) -> None:
    """Run a recipe from the command line: `--help`, typed overrides of every field, `--dry-run`."""
    arguments = sys.argv[1:]
    dry = "--dry-run" in arguments
    arguments = [a for a in arguments if a != "--dry-run"]
    description = "All settings of the run. --dry-run prints config, placement and memory, and starts nothing."
    config = tyro.cli(Config, default=config, args=arguments, description=description)
    try:
        if dry:
            dry_run(config)
        else:
            run(config)
    except USER_ERRORS as error:
        if os.environ.get("UNISON_TRACEBACK"):
            raise
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def dry_run(config: Config) -> None:
    """Print the resolved config, the placement and a memory estimate. Starts no actor."""
    check(config)
    import torch

    gpus = torch.cuda.device_count()
    placement = plan(config, cuda=gpus > 0, gpus=gpus)
    console.print(report.plain_config(config), markup=False, highlight=False)
    table = Table("placement", "", show_header=True)
    for row in placement.table():
        table.add_row(*row)
    try:
        from trainer.model import parameter_count

        parameters = parameter_count(config.model)
        table.add_row("parameters", f"{parameters:,}")
        for name, gib in memory_estimate(config, parameters).items():
            table.add_row(name, f"{gib:.2f} GiB")
    except OSError as error:
        table.add_row("memory", f"unknown: the config of {config.model} cannot be read ({str(error).splitlines()[0]})")
    console.print(table)


def run(config: Config) -> dict[str, Any]:
    """Train, and return the summary that is also saved as summary.json."""
    prepared = preflight(config)
    return asyncio.run(_run(config, *prepared))


def preflight(config: Config) -> tuple[Placement, Any, list[Prompt], dict[str, list[Prompt]]]:
    """Everything that can fail before actors start: settings, placement, model folder, data, reward, context length.

    Returns the placement, the tokenizer, the training prompts and the evaluation prompts.
    """
    check(config)
    if looks_local(config.model) and not Path(config.model, "config.json").exists():
        raise FileNotFoundError(
            f"there is no model in {config.model!r} (no config.json). For the quickstart's model run ./scripts/setup; "
            "else give a folder that transformers can load, or a hub name such as Qwen/Qwen2.5-1.5B-Instruct"
        )
    from trainer.cluster import cluster_gpus

    gpus = cluster_gpus() if config.device != "cpu" else 0.0
    placement = plan(config, cuda=gpus > 0, gpus=gpus)
    check_fits(placement, gpus=gpus)
    from trainer.tokens import encode_all, load_tokenizer

    data: Data = config.data()
    if not data.train:
        raise ValueError("the training data is empty: `Config.data()` returned no `train` examples")
    for name, examples in data.evals.items():
        if not examples:
            raise ValueError(f"the evaluation set {name!r} is empty: fill it, or leave it out of `Data.evals`")
    tokenizer = load_tokenizer(config.model)
    train = encode_all(tokenizer, data.train, config, "data.train")
    evals = {
        name: encode_all(tokenizer, examples, config, f"data.evals[{name!r}]") for name, examples in data.evals.items()
    }
    # An empty reply is the one every reward must be able to judge; it finds wrong signatures before anything starts.
    judge(config.reward, Reply(text="", finished=False, task=train[0].task, token_ids=[]), 0)
    return placement, tokenizer, train, evals


def looks_local(model: str) -> bool:
    """Whether a model name means a folder rather than an `owner/name` on the hub."""
    return model.startswith((".", "/", "~", "models/")) or model.count("/") != 1 or Path(model).exists()


async def _run(
    config: Config, placement: Placement, tokenizer: Any, train: list[Prompt], evals: dict[str, list[Prompt]]
) -> dict[str, Any]:
    from trainer.cluster import Cluster
    from trainer.evaluate import evaluate
    from trainer.remote import RemoteLearner, RemoteRollouts
    from trainer.tracking import RunTracker

    folder = fresh_folder(Path(config.output_dir) / config.name)
    settings = report.resolved(config)
    folder.mkdir(parents=True)
    report.write_json(folder / "config.json", settings)
    tracker = RunTracker(
        folder=folder, config=config.tracking, name=config.name, settings=settings, show=Progress(config)
    )
    summary: dict[str, Any] = {
        "name": config.name,
        "status": "failed",
        "config_digest": report.config_digest(settings),
        "stack": report.stack_versions(),
        "seed": config.seed,
    }

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    cluster = Cluster(config, placement)
    loop: Loop | None = None
    began = time.perf_counter()
    try:
        with status(f"starting {config.rollout.engines} engine(s) and {config.trainer.ranks} learner rank(s)"):
            await cluster.start()
        summary["start_seconds"] = time.perf_counter() - began
        rollouts = RemoteRollouts(cluster)

        async def evaluated() -> dict[str, float]:
            return await evaluate(config, rollouts, tokenizer, evals)

        loop = Loop(
            config=config,
            rollouts=rollouts,
            learner=RemoteLearner(cluster, probe=train[0].token_ids),
            prompts=stream(train, config.seed),
            decode=decode,
            tracker=tracker,
            evaluate=evaluated,
            on_samples=lambda step, trajectories: tracker.samples(step, trajectories, tokenizer.decode),
        )
        with status("evaluating the start model"):
            summary["eval_before"] = await evaluated()
        tracker.log(0, dict(summary["eval_before"]))
        training = time.perf_counter()
        await loop.run()
        summary["train_seconds"] = time.perf_counter() - training
        summary["eval_after"] = {k: v for k, v in tracker.history[-1].items() if k.startswith("eval/")}
        summary["engines"] = await cluster.ask_engines("counters")
        summary["learner_peak_gib"] = await cluster.ask_learners("peak_memory_gib")
        if config.save_final:
            with status("exporting the model"):
                await cluster.ask_learners("export", str((folder / "model").resolve()))
                tokenizer.save_pretrained(folder / "model")
        summary["status"] = "finished"
    except (asyncio.CancelledError, KeyboardInterrupt):
        summary["status"] = "interrupted"
        raise
    except BaseException as error:
        summary["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        # A second Ctrl-C while this runs would leave processes behind; the steps are bounded, so it may wait.
        await asyncio.shield(cluster.close())
        finish_report(folder, tracker, summary, loop)
    return summary


def finish_report(folder: Path, tracker: Any, summary: dict[str, Any], loop: Loop | None) -> None:
    """Write what is known, however the run ended."""
    rows = [row for row in tracker.history if "reward/mean" in row]
    gaps = [row["rollout_corr/logprob_abs_diff_mean"] for row in rows]
    summary |= {
        "steps": len(rows),
        "tokens": loop.trained_tokens if loop else 0,
        "weight_version": loop.version if loop else 0,
        "ledger": dict(loop.ledger.counts) if loop else {},
        "reward_first": rows[0]["reward/mean"] if rows else None,
        "reward_last": rows[-1]["reward/mean"] if rows else None,
        "worst_logprob_gap": max(gaps, key=lambda gap: (math.isnan(gap), gap), default=None),
    }
    report.write_json(folder / "summary.json", summary)
    if rows:
        report.plot(tracker.history, folder / "curves.png", summary["name"])
    tracker.close(summary)
    report.closing_table(console, summary, folder)


def fresh_folder(wanted: Path) -> Path:
    """The wanted folder, or the first of wanted-2, wanted-3, ... that does not exist: no run overwrites another."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


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
