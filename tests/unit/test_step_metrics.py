"""What a batch says before training, by hand."""

from dataclasses import replace

import pytest

from rl.loop.step_metrics import batch_metrics, trainer_speed
from rl.types import Trajectory


def sampled_by(*versions, reward=1.0):
    """A sequence of one prompt token and a token of each of these versions."""
    n = len(versions)
    return Trajectory(
        group=0,
        token_ids=list(range(n + 1)),
        mask=[False] + [True] * n,
        logprobs=[0.0] * (n + 1),
        versions=[-1, *versions],
        reward=reward,
    )


def test_ages_count_tokens_from_the_version_of_the_step():
    m = batch_metrics([sampled_by(5, 5, 5), sampled_by(3, 3, 5, 5, 5)], 5, group_size=2)
    assert {k: v for k, v in m.items() if k.startswith("staleness/")} == pytest.approx(
        {
            "staleness/mean": 2 * 2 / 8,
            "staleness/max": 2.0,
            "staleness/versions_per_sample": 1.5,
            "staleness/frac_at_0": 6 / 8,
            "staleness/frac_at_1": 0.0,
            "staleness/frac_at_2": 2 / 8,
        }
    )


def test_the_error_of_the_reward_counts_each_prompt_once():
    rewards = {0: (1.0, 1.0), 1: (0.0, 0.0), 2: (1.0, 0.0)}  # means 1, 0 and 1/2: standard deviation 1/2
    rows = [replace(sampled_by(0, reward=r), group=group) for group, of in rewards.items() for r in of]
    rows = [replace(row, episode=i % 2) for i, row in enumerate(rows)]
    assert batch_metrics(rows, 0, group_size=2)["reward/mean_se"] == pytest.approx(0.5 / 3**0.5)
    assert "reward/mean_se" not in batch_metrics(rows[:2], 0, group_size=2), "one prompt shows no spread"


def test_the_speed_of_learning_is_what_was_done_over_the_time_it_took():
    done = {"perf/trained_tokens": 600.0, "perf/ideal_learn_s": 0.5, "actor/loss": 1.0}
    assert trainer_speed(done, 2.0) == {"perf/trainer_tokens_per_s": 300.0, "perf/mfu": 0.25}
    assert trainer_speed({"perf/trained_tokens": 600.0}, 2.0) == {"perf/trainer_tokens_per_s": 300.0}
