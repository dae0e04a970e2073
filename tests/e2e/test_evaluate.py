"""`unison evaluate` has the figures of a run's own evaluation: of the start model, the best and what it exported."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from processes import assert_gone
from runs import HANGS_S, RECIPE, TWO_TURNS, finish, start

SAMPLES = ["--eval-samples", "32"]
"""Enough for figures that differ as soon as the model does."""


def evaluate(model: Path, folder: Path, name: str, recipe: Path = RECIPE) -> tuple[dict[str, Any], str]:
    mark = uuid.uuid4().hex
    unison = str(Path(sys.executable).with_name("unison"))
    flags = ["--model", str(model), "--out", str(folder / name), *SAMPLES]
    done = subprocess.run(
        [unison, "evaluate", str(recipe), *flags],
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


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", [RECIPE, TWO_TURNS], ids=["replies", "episodes"])
def test_the_best_model_has_from_disk_the_figures_that_it_was_kept_for(
    chat_model: Path, tmp_path: Path, recipe: Path
) -> None:
    flags = ["--steps", "9", "--eval-every", "2", "--keep-best", "digits/avg@32", "--tracking.wandb", "off"]
    # The last steps learn too fast, so the best model need not be the last one.
    more = [*SAMPLES, *flags, "--trainer.lr", "3e-2", "--save-every", "4", "--max-staleness", "0"]
    process, mark = start(chat_model, tmp_path, *more, recipe=recipe)
    code, summary, _ = finish(process, tmp_path)
    assert (code, summary["status"]) == (0, "finished")
    assert_gone(mark)
    best, run = summary["best"], tmp_path / "echo"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == best["step"]]
    assert best["value"] == max(row["eval/digits/avg@32"] for row in rows if "eval/digits/avg@32" in row)
    found, _ = evaluate(run / best["model"], tmp_path, "best", recipe)
    assert found == {name: value for name, value in row.items() if name.startswith("eval/")}
    assert best["again"].keys() == found.keys()
    assert "with other seeds" in (run / best["model"] / "README.md").read_text()
