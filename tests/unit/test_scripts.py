"""Every Python script explains itself: --help works at once, with an example line, and loads no engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"scripts/docs/calculator_clients.py"}
"""A recipe's --help is that of a run."""
STARTED = {path: path.read_text() for path in (ROOT / "scripts").rglob("*.py")}
SCRIPTS = sorted({str(path.relative_to(ROOT)) for path, text in STARTED.items() if "__main__" in text} - RECIPES)
# One process for all scripts, because each would import torch again.
ASK = """
import contextlib, io, json, os, runpy, sys
start, helps = list(sys.path), {}
for script in sys.argv[1:]:
    sys.argv, sys.path[:] = [script, "--help"], [os.path.dirname(os.path.abspath(script)), *start]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    helps[script] = shown.getvalue()
print(json.dumps({"helps": helps, "vllm": "vllm" in sys.modules}))
"""


@pytest.fixture(scope="module")
def answer():
    # DeepSpeed would print a warning about its accelerator to stdout.
    environ = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", ASK, *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_all_scripts_are_found():
    assert {"scripts/bench/seeds.py", "scripts/four_fixes/four_fixes.py", "scripts/parity.py"} < set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_usage_and_has_an_example_line(answer, script):
    shown = answer["helps"][script]
    assert shown.startswith("usage:")
    command = "scripts/gpu_check" if "gpu_check" in script else f"python {script}"
    assert f"{command} " in shown


@pytest.mark.slow
def test_help_loads_no_engine(answer):
    assert answer["vllm"] is False
