"""The `unison` command: what is not a run. Each word is a thin door to a module that can be imported."""

import asyncio
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from rl.config import Config
from rl.objectives import Objective
from trainer.launch import hurry, override, readable_errors
from trainer.tracking.terminal import console

USAGE = """unison doctor RECIPE.py [--short] [--FLAGS of the recipe]

  Check that engines and trainer mean the same by a log-probability, and name the cause when they do not: the recipe's
  own engines, learner and prompts, then the ladder of precisions. --short leaves the ladder out. Writes doctor.json and
  doctor.html; the exit status is 1 when a fault was found.

unison check-objective FILE.py:CLASS | MODULE:CLASS

  Check that an objective of your own keeps the contract: gradients, masks, micro-batches, ranks, groups, extremes.
  Needs no model. The exit status is 1 when it does not, with what is wrong and how to mend it.

unison what-if BATCH.safetensors [--objectives gspo,grpo,cispo] [--out FOLDER]

  Compare objectives on one recorded step (`--record-batches 1`): loss, gradient, clipping, and how much their gradients
  agree."""


def main() -> None:
    """Entry point of the console script."""
    hurry()
    word, *rest = sys.argv[1:] or [""]
    words: dict[str, Callable[[str, list[str]], None]] = {
        "doctor": doctor,
        "check-objective": check_objective,
        "what-if": what_if,
    }
    if word not in words or not rest or rest[0].startswith("-"):
        wants_help = bool({"-h", "--help"} & {word, *rest})
        if word not in words and word and not wants_help:
            print(f"unknown command {word!r}\n", file=sys.stderr)
        print(USAGE, file=sys.stdout if wants_help else sys.stderr)
        sys.exit(0 if wants_help else 2)
    with readable_errors():
        words[word](rest[0], rest[1:])


def doctor(recipe: str, flags: list[str]) -> None:
    """Examine a recipe; exits with 1 when a fault was found."""
    short = "--short" in flags
    config = override(load_recipe(recipe), [f for f in flags if f != "--short"])

    from trainer.doctor.doctor import Checkup, full_checkup, short_checkup
    from trainer.doctor.report import save, show, token_table
    from trainer.plan.preflight import Prepared, place, prepare
    from trainer.run import fresh_folder
    from trainer.runs import settings as report
    from trainer.tracking.tracker import RunTracker, wandb_mode

    place(config)
    tracking = config.tracking
    if tracking.wandb == "auto" and wandb_mode(tracking) == "offline":
        # Nobody looks for a doctor's report in an offline W&B run: page and JSON hold the same, seconds earlier.
        tracking = replace(tracking, wandb="off")
    name = f"{config.name}-doctor"
    folder = fresh_folder(Path(config.output_dir) / name)

    async def record(reading: asyncio.Task[Prepared]) -> RunTracker:
        """Open the record once the data was found good, while the actors start."""
        await reading
        settings = report.resolved(config)
        return await asyncio.to_thread(lambda: RunTracker(folder=folder, config=tracking, name=name, settings=settings))

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


def check_objective(target: str, flags: list[str]) -> None:
    """Hold an objective to its contract; exits with 1 when it breaks it."""
    if flags:
        raise ValueError(f"check-objective takes one objective and no flags, but got {flags}")
    from rl.contract import check as contract
    from trainer.commands.check_objective import show

    objective = load_objective(target)
    found = contract.check_objective(objective)
    show(objective, found)
    sys.exit(1 if found else 0)


def what_if(path: str, flags: list[str]) -> None:
    """Compare objectives on a recorded step."""
    from trainer.commands.what_if import compare

    compare(path, flags)


def load_objective(target: str) -> Objective:
    """An objective with its defaults, from "file.py:Class" or "module:Class". Raises ValueError when it is none."""
    where, _, name = target.rpartition(":")
    if name.endswith(".py"):
        raise ValueError(f"{target} is a file: name the objective in it, as in {target}:CLASS")
    module = load_file(where) if where.endswith(".py") else importlib.import_module(where or "rl.objectives")
    made = getattr(module, name, None)
    if isinstance(made, type) and issubclass(made, Objective):
        if missing := sorted(getattr(made, "__abstractmethods__", ())):
            raise ValueError(f"{target} lacks {' and '.join(missing)}: write both (docs/objectives.md, Your own)")
        try:
            made = made()
        except TypeError as error:
            raise ValueError(
                f"{target} cannot be made without arguments ({error}): give every field a default, or name an "
                "instance, as in mine = Mine(alpha=0.5) and FILE.py:mine"
            ) from error
    if not isinstance(made, Objective):
        near = [n for n, x in vars(module).items() if isinstance(x, type) and issubclass(x, Objective)]
        raise ValueError(
            f"{target} is no objective; {where or 'rl.objectives'} has {', '.join(sorted(near)) or 'none'}"
        )
    return made


def load_recipe(path: str) -> Config:
    """The `config` of a recipe file. Raises ValueError when the file has none."""
    config = getattr(load_file(path), "config", None)
    if not isinstance(config, Config):
        raise ValueError(f"{path} defines no `config = Config(...)`, so it is no recipe")
    return config


def load_file(path: str) -> ModuleType:
    """A Python file as a module that other modules can import."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {path!r}; give the path of a Python file such as recipes/quickstart.py"
        )
    # Actors look there for what the recipe defines, as they do when it is run as a script.
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
