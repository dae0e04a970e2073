"""`unison doctor`: examine a recipe."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

from trainer.commands.load import load_recipe
from trainer.launch import override
from trainer.tracking.terminal import console


def doctor(recipe: str, flags: list[str]) -> None:
    """Examine a recipe; exits with 1 when a fault was found."""
    short = "--short" in flags
    config = override(load_recipe(recipe), [f for f in flags if f != "--short"])

    from trainer.doctor.doctor import DoctorReport, examine_full, examine_short
    from trainer.doctor.report import save, show, token_table
    from trainer.plan.plan import make_plan
    from trainer.prompts import Prepared, read
    from trainer.runs.files import fresh_folder
    from trainer.runs.settings import resolved
    from trainer.tracking.tracker import RunTracker
    from trainer.tracking.wandb_run import wandb_mode

    plan = make_plan(config)
    plan.check_gpus()
    tracking = config.tracking
    if tracking.wandb == "auto" and wandb_mode(tracking) == "offline":
        # Nobody looks for a doctor's report in an offline W&B run: page and JSON hold the same, seconds earlier.
        tracking = replace(tracking, wandb="off")
    name = f"{config.name}-doctor"
    folder = fresh_folder(Path(config.output_dir) / name)

    async def record(reading: asyncio.Task[Prepared]) -> RunTracker:
        """Open the record once the data was found good, while the actors start."""
        await reading
        settings = resolved(config)
        return await asyncio.to_thread(lambda: RunTracker(folder=folder, config=tracking, name=name, settings=settings))

    async def examined() -> DoctorReport:
        reading = asyncio.create_task(asyncio.to_thread(read, plan))
        opening = asyncio.create_task(record(reading))
        try:
            result = await (examine_short if short else examine_full)(config, reading)
        except BaseException:
            if opening.done() and not opening.exception():
                opening.result().close({"status": "failed"})
            raise
        decode, tracker = (await reading).tokenizer.decode, await opening
        show(result, decode)
        save(result, folder, decode)
        tracker.table("doctor", token_table(result, decode))
        tracker.close({"status": "finished", "doctor": result.verdict})
        return result

    result = asyncio.run(examined())
    console.print(f"look at {folder / 'doctor.html'} and {folder / 'doctor.json'}", highlight=False)
    sys.exit(1 if result.faults else 0)
