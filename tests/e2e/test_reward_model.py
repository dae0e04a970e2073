"""A whole run with a reward model: its engine starts, scores, and ends with the run."""

import json
from pathlib import Path

import pytest

from models import make_model
from processes import assert_gone, kill_one
from reward_models import make_reward_model
from runs import RECIPE, finish, printed, start, wait_for_step


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


@pytest.mark.nightly
def test_a_reward_model_that_is_killed_is_started_again_and_costs_no_reward(tmp_path: Path) -> None:
    model = make_model(tmp_path / "policy", peak=1.0)
    make_reward_model(model / "scorer", chat_template=None)
    flags = "--tracking.wandb off --no-save-final --doctor off --steps 12 --tracking.samples-per-step 4"
    process, mark = start(model, tmp_path, *flags.split(), recipe=RECIPE.with_name("judged.py"))
    wait_for_step(process, tmp_path, 1)
    kill_one(mark, "ray::ScorerActor")
    wait_for_step(process, tmp_path, 5)
    kill_one(mark, "ray::ScorerActor")
    code, summary, rows = finish(process, tmp_path)
    assert code == 0, printed(tmp_path)
    assert (summary["status"], len(rows), summary["ledger"]["trained"]) == ("finished", 12, 24)
    assert all("the judge 'scorer'" in cause for cause in summary["engines_lost"])
    assert len(summary["engines_lost"]) == 2
    assert sum(row["judge/scorer/failed"] for row in rows) == 0
    samples = [json.loads(line) for line in (tmp_path / "echo" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 48
    assert all([v["score"] for v in sample["verdicts"]] == [sample["reward"]] != [0.0] for sample in samples)
    assert_gone(mark)
