"""`unison evaluate`: how good is a model on a recipe's held-out sets? Engines alone, without a learner."""

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rl.loop.estimates import Problems, paired
from trainer.commands.load import load_recipe
from trainer.launch import configure
from trainer.plan.plan import Plan, make_plan
from trainer.runs.files import Rows, make_folder, write_json
from trainer.runs.problems import PROBLEMS, last_problems, rows_of
from trainer.runs.settings import config_digest, resolved, stack_versions
from trainer.tracking.terminal import console, with_error


def evaluate_model(arguments: Sequence[str]) -> int:
    """Evaluate the model of a recipe, or another, on the recipe's held-out sets."""
    parser = argparse.ArgumentParser(
        prog="unison evaluate",
        usage="unison evaluate [-h] [--out FOLDER] [--against FOLDER] RECIPE.py [FLAGS of the recipe]",
        description="Sample a recipe's held-out sets and score them, as a run does before its first step: avg@n and "
        "pass@k of each set, with standard errors. Nothing is trained. Writes evaluation.json, evaluations.jsonl (the "
        "figures of each problem) and config.json.",
        epilog="All flags of the recipe work here too: --model runs/NAME/model evaluates what a run exported, "
        "--eval-samples 8 samples each problem 8 times, --eval-temperature 0 takes the most likely tokens.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.py", help="a recipe, such as recipes/quickstart.py")
    parser.add_argument("--out", metavar="FOLDER", help="folder for the result (default: OUTPUT_DIR/NAME-evaluation)")
    parser.add_argument(
        "--against",
        metavar="FOLDER",
        help="folder of a run, or of another evaluation: also report the paired difference from its last evaluation",
    )
    asked, flags = parser.parse_known_args(arguments)
    config, _ = configure(load_recipe(asked.recipe), flags)
    before = last_problems(Path(asked.against)) if asked.against else {}
    plan = make_plan(config, learners=False)
    plan.check_gpus()
    began = time.perf_counter()
    metrics, problems, sets = asyncio.run(measured(plan))
    folder = make_folder(Path(asked.out or Path(config.output_dir) / f"{config.name}-evaluation"))
    settings = resolved(config)
    write_json(folder / "config.json", settings)
    rows = Rows(folder / PROBLEMS)
    for row in rows_of(0, problems):
        rows.append(row)
    rows.close()
    changes = {name: paired(before[name], problems[name]) for name in before.keys() & problems.keys()}
    change = {f"eval/{name}/{key}": value for name, each in changes.items() for key, value in each.items()}
    result = {
        "name": config.name,
        "model": config.model,
        "sets": sets,
        "seed": config.seed,
        "metrics": metrics,
        **({"against": asked.against, "change": change} if asked.against else {}),
        "seconds": time.perf_counter() - began,
        "config_digest": config_digest(settings),
        "stack": stack_versions(),
    }
    write_json(folder / "evaluation.json", result)
    console.print(table(config.model, metrics, sets, change))
    console.print(f"see {folder / 'evaluation.json'}", highlight=False)
    return 0


async def measured(plan: Plan) -> tuple[dict[str, float], Mapping[str, Problems], dict[str, dict[str, Any]]]:
    """The metrics of every held-out set, the figures of their problems, and how each is sampled. Raises ValueError when
    there is none."""
    # Imported late: Ray takes a second that `--help` does not need.
    from trainer.evaluations import evaluated_alone

    found, sets = await evaluated_alone(plan)
    default = plan.config.temperature
    sampled = {
        name: {
            "problems": len(each.prompts),
            "samples": each.samples,
            "temperature": default if each.temperature is None else each.temperature,
        }
        for name, each in sets.items()
    }
    return found.metrics, found.problems, sampled


def table(
    model: str, metrics: Mapping[str, float], sets: Mapping[str, Mapping[str, Any]], change: Mapping[str, float]
) -> Table:
    """One row per figure, with its standard error, and its paired difference where there is one."""
    out = Table(title=model, title_justify="left")
    headers = ("set", "problems", "figure", "value", *(["paired difference"] if change else []))
    for header in headers:
        out.add_column(header, justify="left" if header in ("set", "figure") else "right")
    for name in metrics:
        if name.endswith("_se"):
            continue
        held_out, _, figure = name.removeprefix("eval/").rpartition("/")
        shown = [with_error(each[name], each.get(f"{name}_se"), digits=4) for each in (metrics, change) if name in each]
        out.add_row(held_out, str(sets[held_out]["problems"]) if held_out in sets else "", figure, *shown)
    return out
