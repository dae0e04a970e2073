"""From a recipe to a run: the command line of a script, or a call from a notebook."""

import asyncio
import builtins
import sys
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rl.config import Config
from trainer.config_file import from_file
from trainer.errors import readable_errors
from trainer.flag_help import help_text
from trainer.flags import override
from trainer.plan.dry_run import dry_run
from trainer.runs.resume import Resumed, newest, resume
from trainer.runs.settings import resolved
from trainer.tracking.terminal import console, prepare_process

_importing: list[str] = []
"""The recipe files that a `unison` command is importing."""


def launch(config: Config, args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a recipe, and return its summary; empty after `--help` and `--dry-run`.

    Without `args` the flags are those of the command line, and an error ends the process with one message. With `args`,
    such as `["--steps", "3"]`, and in a notebook, errors are raised. Works also where an event loop is running.
    """
    if _importing:
        raise ValueError(
            f"{_importing[-1]} calls launch(config) while it is imported: write it at the end of the file as\n"
            '    if __name__ == "__main__":\n        launch(config)'
        )
    prepare_process()
    if args is not None or in_notebook():
        return _launch(config, list(args or ()))
    with readable_errors():
        return _launch(config, sys.argv[1:])


def _launch(config: Config, arguments: list[str]) -> dict[str, Any]:
    folder, flags = option("--resume", arguments, "the folder of a run, such as runs/quickstart, or auto")
    dry, flags = "--dry-run" in flags, [f for f in flags if f != "--dry-run"]
    if folder == "auto":
        wanted = configure(config, flags)[0]
        folder = newest(Path(wanted.output_dir) / wanted.name)
    resumed = resume(Path(folder)) if folder is not None else None
    if resumed:
        resumed.check_flags(flags)
    # The run's own flags first: those of this call count more.
    flags = [*(resumed.flags if resumed else []), *flags]
    if {"--help", "-h"} & set(flags):
        print(help_text(config, sys.argv[0]))
        return {}
    config, flags = configure(config, flags)
    if resumed:
        announce(resumed, resumed.check(resolved(config), config.steps))
    if dry:
        dry_run(config)
        return {}
    from trainer.run import run, run_async

    if not loop_is_running():
        return run(config, resumed=resumed, flags=flags)
    return run_in_thread(run_async(config, resumed=resumed, flags=flags))


def configure(config: Config, arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """The config with `--config FILE` and then the flags applied, and the arguments with the file's full path."""
    path, flags = option("--config", arguments, "a file, such as runs/quickstart/config.json")
    if path is None:
        return override(config, flags), flags
    # Resuming may happen in another folder.
    full = str(Path(path).resolve())
    return override(from_file(config, path), flags), ["--config", full, *flags]


def option(name: str, arguments: Sequence[str], needs: str) -> tuple[str | None, list[str]]:
    """The last value of an option, and the other arguments. Raises ValueError for an option without a value."""
    rest: list[str] = []
    found: str | None = None
    waiting = iter(arguments)
    for argument in waiting:
        start, _, value = argument.partition("=")
        if start != name:
            rest.append(argument)
            continue
        found = value or next(waiting, "")
        if not found or found.startswith("--"):
            raise ValueError(f"{name} needs {needs}")
    return found, rest


def announce(resumed: Resumed, changes: list[str]) -> None:
    """Print where the run continues, which damaged checkpoints were skipped, and which settings changed."""
    for problem in resumed.checkpoint.damaged.values():
        console.print(f"[bold red]skipped[/]: {problem}", highlight=False)
    console.print(f"resuming after step {resumed.progress.version}: {resumed.checkpoint.folder}", highlight=False)
    for change in changes:
        console.print(f"[yellow]changed[/] {change}", highlight=False)


@contextmanager
def importing(path: str) -> Iterator[None]:
    """While a recipe is imported for another command: `launch` then raises ValueError."""
    _importing.append(path)
    try:
        yield
    finally:
        _importing.pop()


def in_notebook() -> bool:
    """Whether this is IPython's own process, whose arguments are not ours; `%run recipe.py --flags` is a script."""
    return hasattr(builtins, "__IPYTHON__") and not hasattr(sys.modules["__main__"], "__file__")


def loop_is_running() -> bool:
    """Whether this thread has a running event loop, as in Jupyter."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run_in_thread(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Wait for a coroutine on an event loop of its own; Ctrl-C cancels it and waits until it has cleaned up."""
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> dict[str, Any]:
        task = asyncio.current_task()
        assert task is not None
        started.append((asyncio.get_running_loop(), task))
        return await work

    with ThreadPoolExecutor(1, thread_name_prefix="run") as pool:
        future = pool.submit(asyncio.run, main())
        try:
            return future.result()
        except KeyboardInterrupt:
            for loop, task in started:
                loop.call_soon_threadsafe(task.cancel)
            raise
