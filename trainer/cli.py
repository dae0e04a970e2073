"""The `unison` command: what is not a run. Each word is a thin door to a module that can be imported."""

import asyncio
import importlib.util
import sys
from pathlib import Path

from rl.config import Config
from trainer.launch import override, readable_errors
from trainer.terminal import console

USAGE = """unison doctor RECIPE.py [--short] [--FLAGS of the recipe]

  Check that engines and trainer mean the same by a log-probability, and name the cause when they do not: the recipe's
  own engines, learner and prompts, then the ladder of precisions. --short leaves the ladder out. Writes doctor.json and
  doctor.html; the exit status is 1 when a fault was found."""


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    if len(arguments) < 2 or arguments[0] != "doctor" or arguments[1].startswith("-"):
        wants_help = bool({"-h", "--help"} & set(arguments))
        print(USAGE, file=sys.stdout if wants_help else sys.stderr)
        sys.exit(0 if wants_help else 2)
    with readable_errors():
        doctor(arguments[1], arguments[2:])


def doctor(recipe: str, flags: list[str]) -> None:
    """Examine a recipe; exits with 1 when a fault was found."""
    short = "--short" in flags
    config = override(load_recipe(recipe), [f for f in flags if f != "--short"])

    from trainer import report
    from trainer.checkup import Checkup, full_checkup, short_checkup
    from trainer.doctor_report import save, show, token_table
    from trainer.preflight import Prepared, place, prepare
    from trainer.run import fresh_folder
    from trainer.tracking import RunTracker

    place(config)
    name = f"{config.name}-doctor"
    folder = fresh_folder(Path(config.output_dir) / name)

    async def record(reading: asyncio.Task[Prepared]) -> RunTracker:
        """Open the record once the data was found good, while the actors start."""
        await reading
        settings = report.resolved(config)
        return await asyncio.to_thread(
            lambda: RunTracker(folder=folder, config=config.tracking, name=name, settings=settings)
        )

    async def examined() -> Checkup:
        reading = asyncio.create_task(asyncio.to_thread(prepare, config))
        opening = asyncio.create_task(record(reading))
        try:
            result = await (short_checkup if short else full_checkup)(config, reading)
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


def load_recipe(path: str) -> Config:
    """The `config` of a recipe file. Raises ValueError when the file has none."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no recipe {path!r}; give the path of a Python file such as recipes/quickstart.py"
        )
    # Actors look there for what the recipe defines, as they do when it is run as a script.
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ValueError(f"{path} defines no `config = Config(...)`, so it is no recipe")
    return config
