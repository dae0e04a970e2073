"""The command line of a recipe: typed overrides of every setting, --help, --dry-run, and errors a user can act on."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tyro

from rl.config import Config
from rl.protocols import EngineLost, StallError, UpdateFailed
from rl.rewards.score import RewardError
from trainer.cluster.start_error import StartError
from trainer.doctor.diagnosis import ParityError
from trainer.plan.dry_run import dry_run
from trainer.runs.resume import Resumed, resume
from trainer.runs.settings import resolved
from trainer.tracking.terminal import console

_OURS = (RewardError, ParityError, StallError, StartError, EngineLost, UpdateFailed)
USER_ERRORS = (ValueError, OSError, ImportError, *_OURS)
"""What a user can mend: shown as one message. UNISON_TRACEBACK=1 shows where it came from."""


def launch(config: Config) -> None:
    """Run a recipe from the command line: `--help`, typed overrides of every field, `--dry-run`, `--resume FOLDER`."""
    relax_gc()
    folder, flags = resume_folder(sys.argv[1:])
    dry, flags = "--dry-run" in flags, [f for f in flags if f != "--dry-run"]
    with readable_errors():
        resumed = resume(Path(folder)) if folder is not None else None
        # The run's own flags first: what is said now counts.
        flags = [*(resumed.flags if resumed else []), *flags]
        config = override(config, flags)
        if resumed:
            announce(resumed, resumed.check(resolved(config), config.steps))
        if dry:
            dry_run(config)
        else:
            from trainer.run import run

            run(config, resumed=resumed, flags=flags)


def relax_gc() -> None:
    """Look for garbage less often: a start is imports, which leave none, and the search takes a fifth of their time."""
    gc.set_threshold(50_000, 20, 20)


def resume_folder(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--resume`, and the other arguments."""
    rest, folder = [], None
    waiting = iter(arguments)
    for argument in waiting:
        name, _, value = argument.partition("=")
        if name != "--resume":
            rest.append(argument)
            continue
        folder = value or next(waiting, "")
    if folder == "":
        console.print("--resume needs the folder of a run, such as runs/quickstart")
        sys.exit(2)
    return folder, rest


def announce(resumed: Resumed, changes: list[str]) -> None:
    """Say where the run goes on, which checkpoints were passed over and why, and what is not as it was."""
    for problem in resumed.checkpoint.damaged.values():
        console.print(f"[bold red]passed over[/]: {problem}", highlight=False)
    console.print(f"resuming after step {resumed.progress.version}: {resumed.checkpoint.folder}", highlight=False)
    for change in changes:
        console.print(f"[yellow]changed[/] {change}", highlight=False)


def override(config: Config, arguments: list[str]) -> Config:
    """The config with the fields that the command line names; exits with a message for one that does not exist."""
    description = (
        "All settings of the run. --dry-run prints config, placement and memory, and starts nothing. --resume FOLDER "
        "goes on with the run in FOLDER from its last checkpoint, with the flags that it was started with."
    )
    return tyro.cli(Config, default=config, args=arguments, description=description)


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the process with one message for what a user can mend, and quietly at Ctrl-C."""
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get("UNISON_TRACEBACK"):
            raise
        console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
