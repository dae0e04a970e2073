"""When a running step's numbers call for the user: ranges by dtype, edges, noise, and the page that explains them."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rl.config import Config, TrainerConfig
from rl.parity.watch import THRESHOLDS, Watch
from rl.types import Data

DOC = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
EACH = pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: t.metric.removeprefix("rollout_corr/"))
FP32 = Config(name="t", model="m", data=lambda: Data(train=[]), reward=lambda reply: 0.0, dtype="float32")
BF16 = replace(FP32, dtype="bfloat16")

# A fp32 run on CPU (the quickstart), and a bf16 one (docs/parity.md: fp32 heads, T = 0.7).
CLEAN = {
    "float32": {
        "rollout_corr/logprob_abs_diff_mean": 4.5e-6,
        "rollout_corr/logprob_abs_diff_max": 1.3e-4,
        "rollout_corr/kl": -1.8e-6,
        "rollout_corr/k3_kl": 2.4e-11,
        "rollout_corr/mult_error": 1.0000045,
        "rollout_corr/rollout_is_mean": 1.0000018,
        "rollout_corr/ess": 0.9999998,
        "rollout_corr/outside_frac": 0.0,
        "staleness/dropped_frac": 0.0,
    },
    "bfloat16": {
        "rollout_corr/logprob_abs_diff_mean": 3.6e-2,
        "rollout_corr/logprob_abs_diff_max": 3.6e-1,
        "rollout_corr/kl": 1.3e-3,
        "rollout_corr/k3_kl": 1.9e-3,
        "rollout_corr/mult_error": 1.038,
        "rollout_corr/rollout_is_mean": 1.001,
        "rollout_corr/ess": 0.9962,
        "rollout_corr/outside_frac": 0.0,
        "staleness/dropped_frac": 0.0,
    },
}


def raised(watch, metrics):
    return [alert.metric.removeprefix("rollout_corr/") for alert in watch(metrics)]


@pytest.mark.parametrize("config", [FP32, BF16], ids=["float32", "bfloat16"])
def test_a_clean_run_raises_nothing(config):
    assert raised(Watch(config), CLEAN[config.dtype]) == []
    assert set(CLEAN[config.dtype]) == {t.metric for t in THRESHOLDS} - {"rollout_corr/rejected_frac"}


def test_raw_log_probabilities_in_bf16_raise_alerts():
    # perf_reliability.md, section 3.3: raw instead of processed log-probabilities at T = 0.7.
    measured = {"logprob_abs_diff_mean": 0.24, "kl": -0.12, "k3_kl": 0.064, "mult_error": 1.35, "outside_frac": 0.063}
    assert raised(Watch(BF16), {f"rollout_corr/{n}": v for n, v in measured.items()}) == list(measured)


def test_truncation_that_the_trainer_does_not_replay_raises_an_alert_that_says_so():
    # The same section: top_p = 0.9 in the rollout only.
    (alert,) = Watch(BF16)({"rollout_corr/kl": 0.074, "rollout_corr/k3_kl": 2.9e-3})
    assert alert.text.startswith("It is 0.074, above 0.02.")
    assert "truncated sampling" in alert.text
    assert "unison doctor" in alert.text


def test_a_stale_update_shows_in_fp32_and_hides_in_bf16():
    # The same section: one step of lr 1e-6 behind.
    assert raised(Watch(FP32), {"rollout_corr/k3_kl": 3.5e-9}) == ["k3_kl"]
    assert raised(Watch(BF16), {"rollout_corr/k3_kl": 3.5e-9}) == []


def test_an_alert_is_raised_at_the_edge_and_again_only_after_a_return():
    watch = Watch(BF16)
    means = [1.0, 1.06, 1.2, math.nan, 0.94, 1.05, 0.94, 0.95, 1.0]
    assert [len(watch({"rollout_corr/rollout_is_mean": x})) for x in means] == [0, 1, 0, 0, 0, 0, 1, 0, 0]


def test_metrics_are_watched_apart_and_a_step_without_one_changes_nothing():
    watch = Watch(BF16)
    assert raised(watch, {"rollout_corr/kl": 1.0, "rollout_corr/ess": 0.95}) == ["kl"]
    assert raised(watch, {"reward/mean": 0.5}) == []
    assert raised(watch, {"rollout_corr/kl": 1.0, "rollout_corr/ess": 0.5}) == ["ess"]


@EACH
@pytest.mark.parametrize("config", [FP32, BF16], ids=["float32", "bfloat16"])
def test_the_ends_of_a_range_are_in_it_and_nan_is_not(threshold, config):
    low, high = threshold.tight if config is FP32 else threshold.loose
    for value in (low, high):
        assert not Watch(config)({threshold.metric: value})
    for value in (math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan):
        if not math.isinf(value):
            assert len(Watch(config)({threshold.metric: value})) == 1
    assert len(Watch(config)({threshold.metric: math.nan, f"{threshold.metric}_se": math.nan})) == 1


@EACH
def test_every_tight_range_lies_within_the_loose_one(threshold):
    assert threshold.loose[0] <= threshold.tight[0] <= threshold.tight[1] <= threshold.loose[1]
    assert threshold.tight != threshold.loose


def test_three_standard_errors_of_noise_are_no_alert():
    kl = {"rollout_corr/kl": 0.05}
    assert raised(Watch(BF16), kl) == ["kl"]
    assert raised(Watch(BF16), kl | {"rollout_corr/kl_se": 0.011}) == []
    assert raised(Watch(BF16), kl | {"rollout_corr/kl_se": 0.009}) == ["kl"]
    assert raised(Watch(BF16), {"rollout_corr/kl": -0.05, "rollout_corr/kl_se": 0.009}) == ["kl"]


@pytest.mark.parametrize(
    ("settings", "tight"),
    [
        ({}, True),
        ({"dtype": "bfloat16"}, False),
        ({"max_staleness": 1}, False),
        ({"old_logprobs": "rollout"}, True),
        ({"old_logprobs": "recompute", "trainer": TrainerConfig(minibatches=2)}, True),
        ({"old_logprobs": "rollout", "trainer": TrainerConfig(minibatches=2)}, False),
        ({"old_logprobs": "auto", "trainer": TrainerConfig(epochs=2)}, False),
    ],
)
def test_the_tight_ranges_hold_only_where_the_policy_cannot_have_moved(settings, tight):
    gap = {"rollout_corr/logprob_abs_diff_mean": 1e-3}
    assert bool(Watch(replace(FP32, **settings))(gap)) == tight


@EACH
def test_every_watched_metric_is_explained_with_the_same_numbers(threshold):
    rows = [line for line in DOC.read_text().splitlines() if line.startswith(f"| `{threshold.metric}`")]
    assert len(rows) == 1, f"docs/metrics.md has no row of its own for {threshold.metric}"
    healthy = rows[0].split("|")[3]
    numbers = {float(x) for x in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", healthy)}
    # A bound of 0 below a quantity that cannot be negative goes without saying.
    bounds = {b for b in (*threshold.tight, *threshold.loose) if b and not math.isinf(b)}
    assert bounds == numbers - {0.0}


def test_what_auto_came_to_decides_the_ranges():
    watch = Watch(replace(FP32, old_logprobs="auto", trainer=TrainerConfig(minibatches=2)))
    assert not watch.tight
    watch.settle("recompute")
    assert watch.tight
