"""Starting the echo recipe as a user does, and reading what it leaves."""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

STARTED: list[str] = []
"""The marks of all runs so far: tests/e2e/conftest.py ends what a failed test left of them."""
RECIPE = Path(__file__).parents[1] / "e2e" / "recipes" / "echo.py"


def start(model: Path, folder: Path, *flags: str) -> tuple[subprocess.Popen, str]:
    """A recipe in a process group of its own, and a mark that its environment hands to every process it starts."""
    mark = uuid.uuid4().hex
    STARTED.append(mark)
    command = [sys.executable, "-W", "ignore", str(RECIPE), "--model", str(model), "--output-dir", str(folder), *flags]
    env = os.environ | {"UNISON_TEST_MARK": mark}
    log = (folder / "terminal.log").open("w")

    def hear_ctrl_c() -> None:
        # A test run in the background of a shell inherits that SIGINT is ignored, and would hand it on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options: dict = {"env": env, "start_new_session": True, "preexec_fn": hear_ctrl_c}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options), mark


def finish(process: subprocess.Popen, folder: Path, seconds: float = 560) -> tuple[int, dict, list[dict]]:
    code = process.wait(seconds)
    run = folder / "echo"
    text = (folder / "terminal.log").read_text()
    assert (run / "summary.json").exists(), text[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return code, json.loads((run / "summary.json").read_text()), [row for row in rows if "reward/mean" in row]
