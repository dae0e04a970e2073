"""`unison evaluate` has the figures of a run's own evaluation, of the start model and of what the run exported."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from processes import assert_gone
from runs import HANGS_S, RECIPE, finish, start

SAMPLES = ["--eval-samples", "32"]
"""Enough for figures that differ as soon as the model does."""


def evaluate(model: Path, folder: Path, name: str) -> tuple[dict[str, Any], str]:
    mark = uuid.uuid4().hex
    unison = str(Path(sys.executable).with_name("unison"))
    flags = ["--model", str(model), "--out", str(folder / name), *SAMPLES]
    done = subprocess.run(
        [unison, "evaluate", str(RECIPE), *flags],
        env=os.environ | {"UNISON_TEST_MARK": mark, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_gone(mark)
    return json.loads((folder / name / "evaluation.json").read_text())["metrics"], done.stdout


@pytest.mark.nightly
def test_an_evaluation_alone_agrees_with_that_of_a_run_before_and_after(echo_model: Path, tmp_path: Path) -> None:
    flags = ["--steps", "15", "--tracking.wandb", "off", "--save-every", "0"]
    process, _ = start(echo_model, tmp_path, *SAMPLES, *flags)
    code, summary, _ = finish(process, tmp_path)
    assert code == 0
    assert summary["eval_before"] != summary["eval_after"]
    before, shown = evaluate(echo_model, tmp_path, "before")
    assert before == summary["eval_before"]
    assert "pass@32" in shown
    after, _ = evaluate(tmp_path / "echo" / "model", tmp_path, "after")
    assert after == summary["eval_after"]
