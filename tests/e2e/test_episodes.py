"""A run with an environment: real engine, real learner, turns that continue what was sampled."""

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
    # Later steps have old samples: their gap is what the updates changed.
    (fresh,) = [row for row in rows if row["staleness/max"] == 0]
    for turn in (0, 1):
        assert 0 < fresh[f"rollout_corr/logprob_abs_diff_turn/{turn}"] <= 1e-5
        assert all(f"rollout_corr/logprob_abs_diff_turn/{turn}" in row for row in rows)
    assert [row["episode/turns_max"] for row in rows] == [2, 2, 2]
    assert all(row["actor/grad_norm"] > 0 for row in rows)
    assert summary["ledger"]["trained"] == 6
    assert_gone(mark)
