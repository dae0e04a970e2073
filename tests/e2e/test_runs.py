"""Whole runs with real Ray actors, vLLM V1 engines and DeepSpeed ranks, on a tiny model."""

import json
import os
import signal
from pathlib import Path

import pytest

from cases import nightly_unless
from processes import assert_gone, kill_one
from recorded import figures_agree
from runs import (
    AN_AGENT,
    RECIPE,
    TWO_TURNS,
    every_prompt_was_trained_once,
    finish,
    printed,
    start,
    trained_once,
    wait_for_step,
)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("doctor", "resumes", "recipe"),
    nightly_unless(
        lambda doctor, resumes, recipe: recipe == AN_AGENT,
        [
            # An agent in training, and an environment in its evaluation.
            ("short", False, AN_AGENT),
            ("short", False, TWO_TURNS),
            ("short", False, RECIPE),
            ("short", True, RECIPE),
            ("full", True, RECIPE),
        ],
    ),
)
def test_an_asynchronous_run_of_two_engines_and_two_ranks_survives_ctrl_c_and_a_killed_engine(
    echo_model: Path, chat_model: Path, tmp_path: Path, doctor: str, resumes: bool, recipe: Path
) -> None:
    flags = "--steps 16 --prompts-per-step 4 --group-size 4 --max-staleness 1 --tracking.wandb off --no-save-final"
    more = "--rollout.engines 2 --verify-every 2 --save-every 2 --tracking.samples-per-step 16"
    ranks = f"--trainer.ranks 2 --trainer.zero-stage 3 --doctor {doctor}"
    turns = 1 if recipe == RECIPE else 2
    model, tokens = (echo_model, 200) if turns == 1 else (chat_model, 100)
    all_flags = f"{flags} {more} {ranks} --rollout.max-tokens {tokens}"
    process, mark = start(model, tmp_path, *all_flags.split(), recipe=recipe)
    run = tmp_path / "echo"
    wait_for_step(process, tmp_path, 4)
    if not resumes:
        kill_one(mark, "ray::EngineActor")
        wait_for_step(process, tmp_path, 8)  # the other engine goes on
    # As a terminal does: to every process of the foreground group.
    os.killpg(process.pid, signal.SIGINT)
    code, summary, rows = finish(process, tmp_path)
    assert code == 130, printed(tmp_path)
    assert summary["status"] == "interrupted"
    assert summary["steps"] == len(rows) >= 4
    assert summary["ledger"]["trained"] == 4 * len(rows)
    assert (run / "curves.png").stat().st_size > 0
    assert len(summary["engines_lost"]) == (not resumes)
    assert_gone(mark)
    assert len(trained_once(run, samples=4)) >= 4 * len(rows)
    assert [row["weight_sync/verified"] for row in rows[:4]] == [1, 1, 0, 1]
    # Sampling overlapped with updates: some sequences were running when new weights came.
    assert max(row["staleness/max"] for row in rows) == 1
    assert max(row["staleness/versions_per_sample"] for row in rows) > 1
    # The doctor found nothing on two engines and sharded weights, and left the weights as they were.
    report = json.loads((run / "doctor.json").read_text())
    assert (report["verdict"], len(report["evidence"]["samples"])) == ("well", 2)
    assert rows[0]["rollout_corr/logprob_abs_diff_mean"] <= 1e-5
    if turns == 2:
        # A message stands between the turns; the engine and the trainer agree on each turn.
        assert all(row["episode/turns_max"] == 2 for row in rows)
        assert all(0 < rows[0][f"rollout_corr/logprob_abs_diff_turn/{turn}"] <= 1e-5 for turn in (0, 1))
        assert all(row["actor/grad_norm"] > 0 for row in rows)
    tried = {comparison["name"] for comparison in report["comparisons"] if comparison["gap"]}
    if doctor == "full":
        assert {"the same engine, asked twice", "prefix cache hit | miss"} <= tried
        assert "in flight: begun after it | trainer's new weights" in tried
    assert (run / "doctor.html").stat().st_size > 10_000
    figures_agree(run, rows)
    if not resumes:
        return

    process, mark = start(echo_model, tmp_path, "--resume", str(run), "--doctor", "off")
    wait_for_step(process, tmp_path, len(rows) + 2)
    kill_one(mark, "ray::EngineActor")
    code, summary, rows = finish(process, tmp_path)
    assert code == 0, printed(tmp_path)
    assert summary["status"] == "finished"
    assert len(summary["engines_lost"]) >= 1
    assert summary["ledger"]["pending"] == 0
    assert summary["ledger"]["trained"] == 64
    assert [row["weight_sync/version"] for row in rows] == list(range(1, 17))
    assert all(engine["version"] == 16 for engine in summary["engines"])
    assert all(engine["aborted"] == 0 for engine in summary["engines"])
    assert max(row["staleness/max"] for row in rows) <= 1
    assert_gone(mark)
    every_prompt_was_trained_once(run, prompts=64, samples=4)
