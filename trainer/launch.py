"""The command line of a recipe: typed overrides of every setting, --help, --dry-run, and errors a user can act on."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import tyro
from rich.table import Table

from rl.config import Config, check
from rl.diagnosis import ParityError
from rl.loop import StallError
from rl.protocols import EngineLost, UpdateFailed
from rl.rewards import RewardError
from trainer import report
from trainer.blame import StartError
from trainer.placement import memory_estimate, plan
from trainer.terminal import console

_OURS = (RewardError, ParityError, StallError, StartError, EngineLost, UpdateFailed)
USER_ERRORS = (ValueError, OSError, ImportError, *_OURS)
"""What a user can mend: shown as one message. UNISON_TRACEBACK=1 shows where it came from."""


def launch(config: Config) -> None:
    """Run a recipe from the command line: `--help`, typed overrides of every field, `--dry-run`."""
    arguments = sys.argv[1:]
    config = override(config, [a for a in arguments if a != "--dry-run"])
    with readable_errors():
        if "--dry-run" in arguments:
            dry_run(config)
        else:
            from trainer.run import run

            run(config)


def override(config: Config, arguments: list[str]) -> Config:
    """The config with the fields that the command line names; exits with a message for one that does not exist."""
    description = "All settings of the run. --dry-run prints config, placement and memory, and starts nothing."
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
