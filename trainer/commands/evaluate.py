"""`unison evaluate`: how good is a model on a recipe's held-out sets? Engines alone, without a learner."""

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rl.loop.evaluate import evaluate
from rl.types import Prompt
from trainer.commands.load import load_recipe
from trainer.launch import configure
from trainer.plan.plan import Plan, make_plan
from trainer.runs.files import make_folder, write_json
from trainer.runs.settings import config_digest, resolved, stack_versions
from trainer.tracking.terminal import console, status, with_error


def evaluate_model(arguments: Sequence[str]) -> int:
    """Evaluate the model of a recipe, or another, on the recipe's held-out sets."""
    parser = argparse.ArgumentParser(
        prog="unison evaluate",
        usage="unison evaluate [-h] [--out FOLDER] RECIPE.py [FLAGS of the recipe]",
        description="Sample a recipe's held-out sets and score them, as a run does before its first step: avg@k and "
        "pass@k of each set, with standard errors. Nothing is trained. Writes evaluation.json and config.json.",
        epilog="All flags of the recipe work here too: --model runs/NAME/model evaluates what a run exported, "
        "--eval-samples 8 samples each problem 8 times, --eval-temperature 0 takes the most likely tokens.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.py", help="a recipe, such as recipes/quickstart.py")
    parser.add_argument("--out", metavar="FOLDER", help="folder for the result (default: OUTPUT_DIR/NAME-evaluation)")
    asked, flags = parser.parse_known_args(arguments)
    config, _ = configure(load_recipe(asked.recipe), flags)
    plan = make_plan(config, learners=False)
    plan.check_gpus()
    began = time.perf_counter()
    metrics, sizes = asyncio.run(measured(plan))
    folder = make_folder(Path(asked.out or Path(config.output_dir) / f"{config.name}-evaluation"))
    settings = resolved(config)
    write_json(folder / "config.json", settings)
    result = {
        "name": config.name,
        "model": config.model,
        "problems": sizes,
        "samples_per_problem": config.eval_samples,
        "temperature": config.temperature if config.eval_temperature is None else config.eval_temperature,
        "seed": config.seed,
        "metrics": metrics,
        "seconds": time.perf_counter() - began,
        "config_digest": config_digest(settings),
        "stack": stack_versions(),
    }
    write_json(folder / "evaluation.json", result)
    console.print(table(config.model, metrics, sizes))
    console.print(f"see {folder / 'evaluation.json'}", highlight=False)
    return 0


async def measured(plan: Plan) -> tuple[dict[str, float], dict[str, int]]:
    """The metrics of every held-out set, and how many problems each has. Raises ValueError when there is none."""
    # Imported late: Ray takes a second that `--help` does not need.
    from trainer.cluster.cluster import Cluster
    from trainer.cluster.fleet import Fleet
    from trainer.cluster.remote import RemoteRollouts
    from trainer.episodes import episodes_of
    from trainer.prompts import read

    config = plan.config
    cluster = Cluster(config, plan.placement)
    try:
        # The engines import vLLM, which takes longest, while the data is read and checked here.
        reading = asyncio.create_task(asyncio.to_thread(read, plan))
        cluster.boot()
        prepared = await reading
        check_sets(prepared.evals)
        with status(f"starting {config.rollout.engines} engine(s) with {config.model}"):
            await cluster.start()
        fleet = Fleet(cluster)
        fleet.recover = lambda: restarted(fleet)
        with status(f"sampling {sum(map(len, prepared.evals.values()))} problems"):
            rollouts = RemoteRollouts(cluster, fleet)
            player = episodes_of(config, rollouts, prepared)
            metrics = await evaluate(config, rollouts, prepared.decode, prepared.evals, player)
        return metrics, {name: len(prompts) for name, prompts in prepared.evals.items()}
    finally:
        await asyncio.shield(cluster.close())


async def restarted(fleet: Any) -> None:
    """Bring back lost engines. They read the model themselves, so they serve as soon as they have started."""
    while fleet.lost:
        await fleet.revive()
        await fleet.mark_serving()


def check_sets(sets: Mapping[str, list[Prompt]]) -> None:
    """Raise ValueError, with the remedy, where there is nothing to evaluate on."""
    if not sets:
        raise ValueError(
            "the recipe's data has no held-out set: return Data(train=[...], evals={'held_out': [Example(...)]})"
        )


def table(model: str, metrics: Mapping[str, float], sizes: Mapping[str, int]) -> Table:
    """One row per figure, with its standard error."""
    out = Table(title=model, title_justify="left")
    for header in ("set", "problems", "figure", "value"):
        out.add_column(header, justify="right" if header in ("problems", "value") else "left")
    for name, value in metrics.items():
        if name.endswith("_se"):
            continue
        held_out, _, figure = name.removeprefix("eval/").rpartition("/")
        shown = with_error(value, metrics.get(f"{name}_se"), digits=4)
        out.add_row(held_out, str(sizes[held_out]), figure, shown)
    return out
