"""Starting the echo recipe as a user does, waiting for what it writes, and reading what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

STARTED: list[str] = []
"""The marks of all runs so far: tests/e2e/conftest.py ends what a failed test left of them."""
RECIPE = Path(__file__).parents[1] / "e2e" / "recipes" / "echo.py"
TWO_TURNS = RECIPE.with_name("two_turns.py")
AN_AGENT = RECIPE.with_name("an_agent.py")
"""The same as an environment; its model needs a chat template."""
HANGS_S = 560
"""No wait of a run is meant to take a tenth of this: it only keeps a run that hangs from hanging the tests."""


def start(
    model: Path,
    folder: Path,
    *flags: str,
    under: Sequence[str] = (),
    env: Mapping[str, str | None] | None = None,
    log: str = "terminal.log",
    recipe: Path = RECIPE,
) -> tuple[subprocess.Popen, str]:
    """A recipe in a process group of its own, and a mark that its environment hands to every process it starts.

    `under` is a command that starts the rest of its line, such as `taskset -c 0`; `env` changes the environment, where
    None takes a variable away.
    """
    mark = uuid.uuid4().hex
    STARTED.append(mark)
    python = [sys.executable, "-W", "ignore"]
    command = [*under, *python, str(recipe), "--model", str(model), "--output-dir", str(folder), *flags]
    changed = os.environ | (env or {}) | {"UNISON_TEST_MARK": mark}
    output = (folder / log).open("w")

    def hear_ctrl_c() -> None:
        # A test run in the background of a shell inherits that SIGINT is ignored, and would hand it on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    environment = {name: value for name, value in changed.items() if value is not None}
    options: dict = {"env": environment, "start_new_session": True, "preexec_fn": hear_ctrl_c}
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options), mark


def finish(process: subprocess.Popen, folder: Path, seconds: float = HANGS_S) -> tuple[int, dict, list[dict]]:
    code = process.wait(seconds)
    run = folder / "echo"
    assert (run / "summary.json").exists(), printed(folder)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return code, json.loads((run / "summary.json").read_text()), [row for row in rows if "reward/mean" in row]


def printed(folder: Path) -> str:
    """The end of what the run printed."""
    return (folder / "terminal.log").read_text()[-3000:]


def wait_for(
    process: subprocess.Popen, folder: Path, what: str, seen: Callable[[], bool], seconds: float = HANGS_S
) -> None:
    """Return once the run has written it; a run that ends before is an error."""
    deadline = time.monotonic() + seconds
    while not seen():
        assert process.poll() is None, printed(folder)
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Return once this step is in metrics.jsonl."""
    path = folder / "echo" / "metrics.jsonl"
    wait_for(process, folder, f"step {step}", lambda: path.exists() and f'"step": {step}.0' in path.read_text())


def every_prompt_was_trained_once(run: Path, *, prompts: int, samples: int) -> None:
    """No prompt of the stream is lost and none is in two states: by the ledger, and by what was trained on."""
    every_prompt_has_one_state(run, prompts=prompts)
    assert len(trained_once(run, samples)) == prompts


def every_prompt_has_one_state(run: Path, *, prompts: int) -> None:
    """The ledger of the newest checkpoint is balanced, and says that so many were trained on."""
    state = json.loads(sorted((run / "checkpoints").iterdir())[-1].joinpath("state.json").read_text())
    ledger = state["progress"]["ledger"]
    states = [range(first, last + 1) for spans in ledger.values() for first, last in spans]
    ordinals = sorted(chain.from_iterable(states))
    assert len(ordinals) == len(set(ordinals)), "a prompt in two states"
    assert ordinals == list(range(len(ordinals))), "a prompt that was lost"
    assert sum(last + 1 - first for first, last in ledger["trained"]) == prompts


def trained_once(run: Path, samples: int) -> set[int]:
    """The prompts that were trained on: each in one step, with all its samples."""
    steps_of: dict[int, list[int]] = {}
    for line in (run / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        steps_of.setdefault(row["prompt_ordinal"], []).append(row["step"])
    assert all(len(steps) == samples and len(set(steps)) == 1 for steps in steps_of.values())
    return set(steps_of)
