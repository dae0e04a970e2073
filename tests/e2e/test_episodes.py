"""A run with an environment to its end: real engine, real learner, turns that continue what was sampled.

Nightly; in the gate, test_runs.py interrupts one on two engines and two ranks.
"""

from pathlib import Path

import pytest

from processes import assert_gone
from runs import TWO_TURNS, every_prompt_was_trained_once, finish, printed, start

FLAGS = "--save-every 3 --tracking.samples-per-step 8 --tracking.wandb off --no-save-final"


@pytest.mark.nightly
@pytest.mark.parametrize("doctor", ["off", "short"])
def test_a_run_trains_on_episodes_of_two_turns_and_both_sides_agree_on_each(
    chat_model: Path, tmp_path: Path, doctor: str
) -> None:
    process, mark = start(chat_model, tmp_path, *FLAGS.split(), "--doctor", doctor, recipe=TWO_TURNS)
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
