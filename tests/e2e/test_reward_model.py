"""A whole run with a reward model: its engine starts, scores, and ends with the run."""

import json
from pathlib import Path

import pytest

from models import make_model
from processes import assert_gone
from reward_models import make_reward_model
from runs import RECIPE, finish, printed, start


@pytest.mark.nightly
def test_a_run_with_a_reward_model_is_paid_by_it_and_leaves_no_process(tmp_path: Path) -> None:
    model = make_model(tmp_path / "policy", peak=1.0)
    make_reward_model(model / "scorer", chat_template=None)
    flags = ["--tracking.wandb", "off", "--no-save-final", "--doctor", "off"]
    process, mark = start(model, tmp_path, *flags, recipe=RECIPE.with_name("judged.py"))
    code, summary, rows = finish(process, tmp_path)
    assert code == 0, printed(tmp_path)
    assert (summary["status"], len(rows)) == ("finished", 2)
    assert all(row["judge/scorer/tries"] == 1 and row["judge/scorer/failed"] == 0 for row in rows)
    first = json.loads((tmp_path / "echo" / "metrics.jsonl").read_text().splitlines()[0])
    assert {0.0, 1.0} >= {first["judge/scorer/accuracy"]}, "three equal pairs"
    for line in (tmp_path / "echo" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert [v["score"] for v in sample["verdicts"]] == [sample["reward"]] != [0.0]
    assert_gone(mark)
