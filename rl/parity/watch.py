"""Do engine and trainer still agree at this step, and if not, what is the most likely cause?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rl.config import Config

Range = tuple[float, float]


@dataclass(frozen=True)
class Threshold:
    """The ranges (ends included) in which a metric is healthy."""

    metric: str
    tight: Range
    """In float32, when the samples come from the current policy: rounding noise alone."""
    loose: Range
    """In bfloat16, or when d also contains the policy's own change."""
    advice: str
    """The most likely cause of a value outside, and the remedy."""


STALE = "If it is staleness, lower `max_staleness` or `trainer.lr`, or set a `correction`."

RANGES = {
    "rollout_corr/logprob_abs_diff_mean": ((0.0, 1e-5), (0.0, 0.05)),
    "rollout_corr/logprob_abs_diff_max": ((0.0, 1e-3), (0.0, math.inf)),
    "rollout_corr/kl": ((-5e-6, 5e-6), (-0.02, 0.02)),
    "rollout_corr/k3_kl": ((-math.inf, 1e-9), (-math.inf, 3e-3)),
    "rollout_corr/mult_error": ((0.0, 1.00001), (0.0, 1.05)),
    "rollout_corr/rollout_is_mean": ((0.99999, 1.00001), (0.95, 1.05)),
    "rollout_corr/ess": ((0.9999, math.inf), (0.9, math.inf)),
    "rollout_corr/outside_frac": ((0.0, 0.0), (0.0, 0.01)),
    "rollout_corr/rejected_frac": ((0.0, 0.01), (0.0, 0.3)),
    "staleness/dropped_frac": ((0.0, 0.0), (0.0, 0.05)),
}
"""The tight and the loose range of each metric."""
ADVICE = {
    "rollout_corr/logprob_abs_diff_mean": "Engine and trainer compute different numbers: stale weights, other "
    "dtypes, a bf16 head on one side.",
    "rollout_corr/logprob_abs_diff_max": "Few tokens are far off while the rest agree: a wrong support (top_p, "
    "top_k) or a stale cache.",
    "rollout_corr/kl": "The gap has a sign; rounding has none. Above 0: truncated sampling that the trainer does not "
    "replay. Below: raw log-probabilities, or another temperature.",
    "rollout_corr/k3_kl": "Growing over steps: the engines do not sample from the weights that learn. Set "
    "`verify_every=1`, and look at weight_sync/*.",
    "rollout_corr/mult_error": "NeMo-RL's limit for an investigation: at 1.05 a token's probability is 5 % off. Keep "
    "`fp32_head=True`.",
    "rollout_corr/rollout_is_mean": f"The mean ratio is 1 when both sides compute the same distribution. {STALE}",
    "rollout_corr/ess": f"Few tokens carry most of the weight. {STALE}",
    "rollout_corr/outside_frac": "Tokens are more than twice, or less than half, as likely to the trainer as to the "
    f"engine. {STALE}",
    "rollout_corr/rejected_frac": "The correction rejects much of the batch: find the cause of the gap, then widen "
    "its range.",
    "staleness/dropped_frac": "Groups became too old before a step took them, and those are the long ones. Raise "
    "`max_staleness`, or set `late_groups=wait`.",
}
THRESHOLDS = [Threshold(name, *ranges, ADVICE[name]) for name, ranges in RANGES.items()]


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A metric that left its range at this step."""

    metric: str
    value: float
    bounds: Range
    advice: str

    @property
    def title(self) -> str:
        return f"{self.metric} left its range"

    @property
    def text(self) -> str:
        low, high = self.bounds
        side = f"above {high:g}" if self.value > high else f"below {low:g}" if self.value < low else "in no range"
        return f"It is {self.value:.6g}, {side}. {self.advice} `unison doctor` names the cause."


class Watch:
    """Called with each step's metrics; returns an alert for each metric that has left its range."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.outside: set[str] = set()
        self.settle(config.old_logprobs)

    def settle(self, old_logprobs: str) -> None:
        """Choose the ranges, once `old_logprobs="auto"` is decided."""
        t = self.config.trainer
        moving = t.epochs * t.minibatches > 1 and old_logprobs != "recompute"
        self.tight = self.config.dtype == "float32" and self.config.max_staleness == 0 and not moving

    def __call__(self, metrics: Mapping[str, float]) -> list[Alert]:
        alerts: list[Alert] = []
        for threshold in THRESHOLDS:
            name = threshold.metric
            if name not in metrics:
                continue
            low, high = bounds = threshold.tight if self.tight else threshold.loose
            # A step with few trained rows has few tokens: a deviation within its sampling noise is no alert.
            noise = 3.0 * metrics.get(f"{name}_se", 0.0)
            if low - noise <= metrics[name] <= high + noise:
                self.outside.discard(name)
            elif name not in self.outside:
                # Also for NaN, which is in no range.
                self.outside.add(name)
                alerts.append(Alert(metric=name, value=metrics[name], bounds=bounds, advice=threshold.advice))
        return alerts
