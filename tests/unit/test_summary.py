"""The summary of a run follows from its history, however the run ended."""

import asyncio
import math

from trainer.runs.summary import ending, summarise

GAP = "rollout_corr/logprob_abs_diff_mean"
REST = {"tokens": 7, "weight_version": 3, "ledger": {"trained": 4}, "alerts": 2, "engines_lost": [], "resume": None}


def test_steps_are_the_rows_with_a_reward_and_the_worst_gap_is_the_largest():
    history = [
        {"step": 0.0, "eval/held/avg@1": 0.9},
        {"step": 1.0, "reward/mean": 0.25, GAP: 1e-6},
        {"step": 2.0, "reward/mean": 0.75, GAP: 4e-6},
        {"step": 3.0, "reward/mean": 0.5, GAP: 2e-6},
        {"step": 3.0, "eval/held/avg@1": 0.95},
    ]
    assert summarise(history, **REST) == REST | {
        "steps": 3,
        "reward_first": 0.25,
        "reward_last": 0.5,
        "worst_logprob_gap": 4e-6,
    }


def test_a_gap_that_is_no_number_is_the_worst():
    gaps = (1e-6, math.nan, 9.0)
    history = [{"step": float(s), "reward/mean": 0.0, GAP: gap} for s, gap in enumerate(gaps, start=1)]
    assert math.isnan(summarise(history, **REST)["worst_logprob_gap"])


def test_a_run_without_a_step_has_neither_reward_nor_gap():
    summary = summarise([{"step": 0.0, "eval/held/avg@1": 0.9}], **REST)
    assert (summary["steps"], summary["reward_first"], summary["reward_last"]) == (0, None, None)
    assert summary["worst_logprob_gap"] is None


def test_an_interrupted_run_has_no_error_and_a_failed_one_names_its_own():
    assert ending(None, logs="/logs") == {}
    for stop in (KeyboardInterrupt(), asyncio.CancelledError()):
        assert ending(stop, logs="/logs") == {"status": "interrupted"}
    assert ending(ValueError("no"), logs="/logs") == {"error": "ValueError: no", "logs": "/logs"}
