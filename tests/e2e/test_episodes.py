"""A run with an environment: real engine, real learner, turns that continue what was sampled."""

import json
from pathlib import Path

import pytest

from cases import nightly_unless
from models import make_model
from processes import assert_gone
from runs import every_prompt_was_trained_once, finish, printed, start

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
RECIPE = Path(__file__).parent / "recipes" / "two_turns.py"
FLAGS = "--save-every 3 --tracking.samples-per-step 8 --tracking.wandb off --no-save-final"


@pytest.mark.parametrize("doctor", nightly_unless(lambda doctor: doctor == "off", [("off",), ("short",)]))
def test_a_run_trains_on_episodes_of_two_turns_and_both_sides_agree_on_each(tmp_path: Path, doctor: str) -> None:
    model = make_model(tmp_path / "model", peak=1.0, chat_template=TEMPLATE)
    process, mark = start(model, tmp_path, *FLAGS.split(), "--doctor", doctor, recipe=RECIPE)
    code, summary, rows = finish(process, tmp_path)
    assert code == 0, printed(tmp_path)
    assert (summary["status"], len(rows)) == ("finished", 3)
    every_prompt_was_trained_once(tmp_path / "echo", prompts=6, samples=4)
    for row in rows:
        assert row["rollout_corr/logprob_abs_diff_turn/0"] <= 1e-5
        assert row["rollout_corr/logprob_abs_diff_turn/1"] <= 1e-5
        assert row["actor/grad_norm"] > 0
    assert json.loads((tmp_path / "echo" / "summary.json").read_text())["ledger"]["trained"] == 6
    assert_gone(mark)
