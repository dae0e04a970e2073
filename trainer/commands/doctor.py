"""`unison doctor`: examine a recipe."""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.commands.load import load_recipe
from trainer.launch import configure
from trainer.tracking.terminal import console


def doctor(arguments: Sequence[str]) -> int:
    """Examine a recipe; returns 1 when a fault was found."""
    parser = argparse.ArgumentParser(
        prog="unison doctor",
        usage="unison doctor [-h] [--short] RECIPE.py [FLAGS of the recipe]",
        description="Check that engines and trainer compute the same log-probabilities, and name the cause if they do "
        "not: on the recipe's own engines, learner and prompts, then in several precisions. Writes doctor.json and "
        "doctor.html. The exit status is 1 when a fault was found.",
        epilog="All flags of the recipe work here too: `python RECIPE.py --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.py", help="a recipe, such as recipes/quickstart.py")
    parser.add_argument("--short", action="store_true", help="do not compare precisions; saves some minutes")
    asked, flags = parser.parse_known_args(arguments)
    config, _ = configure(load_recipe(asked.recipe), flags)

    from trainer.doctor.doctor import DoctorReport, examine_full, examine_short
    from trainer.doctor.report import save, show, token_table
    from trainer.plan.plan import make_plan
    from trainer.prompts import Prepared, read
    from trainer.runs.files import make_folder
    from trainer.runs.settings import resolved
    from trainer.stop import run_stoppable, stoppable
    from trainer.tracking.tracker import RunTracker
    from trainer.tracking.wandb_mode import wandb_mode

    plan = make_plan(config)
    plan.check_gpus()
    tracking = config.tracking
    if tracking.wandb == "auto" and wandb_mode(tracking) == "offline":
        # Page and JSON hold the same as an offline W&B run, seconds earlier.
        tracking = replace(tracking, wandb="off")
    name = f"{config.name}-doctor"

    async def record(reading: asyncio.Future[Prepared]) -> RunTracker:
        """Open the record once the data is read and valid, while the actors start."""
        for line in (await reading).lines():
            console.print(line)
        settings, folder = resolved(config), make_folder(Path(config.output_dir) / name)
        return await asyncio.to_thread(lambda: RunTracker(folder=folder, config=tracking, name=name, settings=settings))

    async def examined() -> tuple[DoctorReport, Path]:
        # A task begins at the first wait, and so after Ray's start, which needs the cores.
        reading = asyncio.create_task(asyncio.to_thread(read, plan))
        opening = asyncio.create_task(record(reading))
        try:
            with stoppable(0.0):
                result = await (examine_short if asked.short else examine_full)(config, reading)
        except BaseException:
            if opening.done() and not opening.exception():
                opening.result().close({"status": "failed"})
            raise
        decode, tracker = (await reading).tokenizer.decode, await opening
        show(result, decode)
        save(result, tracker.folder, decode)
        tracker.table("doctor", token_table(result, decode))
        tracker.close({"status": "finished", "doctor": result.verdict})
        return result, tracker.folder

    result, folder = run_stoppable(examined())
    console.print(f"see {folder / 'doctor.html'} and {folder / 'doctor.json'}", highlight=False)
    return 1 if result.faults else 0
