"""What do a run's curves look like? Small panels, one for each question that the run's own metrics answer."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl.loop.estimates import headlines

PANELS = {
    "reward": "reward/mean|filter/reward_mean",
    "parts of the reward": r"reward/.+/mean",
    "held-out": "",
    "reward by turn": r"reward/turn_\d+",
    "entropy (nats)": "actor/entropy",
    "clip fraction": "actor/clip_frac",
    "KL to the reference": "actor/kl_loss|actor/kl_reward",
    "|trainer - rollout| (nats)": "rollout_corr/logprob_abs_diff_(mean|max)",
    "tokens per reply": "response_length/(mean|max)",
    "shares": "response_length/truncated_frac|reward/frac_zero_std|filter/taken_frac|staleness/dropped_frac",
    "age (weight versions)": "staleness/(mean|max)",
    "critic: explained variance": "critic/vf_explained_var",
    "turns per episode": "episode/turns(_max)?",
    "groups under way": "queue/(sampling|scoring|ready)",
    "seconds": "timing_s/(wait_for_samples|learn)|weight_sync/seconds",
    "tokens per second": "perf/(tokens_per_s|engine_.+)",
}
"""Title of each panel, and which metrics it shows."""
MOST_LINES, MARKED = 8, 60
"""Lines of one panel, and points up to which each has a mark."""
Points = list[tuple[float, float, float]]


def panels(history: Sequence[dict[str, float]]) -> dict[str, dict[str, Points]]:
    """The lines of each panel that has any: (step, value, standard error), the error NaN where it is not known."""
    names = list(dict.fromkeys(name for row in history for name in row))
    found: dict[str, dict[str, Points]] = {}
    for title, pattern in PANELS.items():
        shown = [n for n in names if re.fullmatch(pattern, n)] if pattern else headlines(names)
        lines = {name: points(history, name) for name in shown[:MOST_LINES]}
        # A figure that is always 0 answers nothing, unless it is the reward.
        lines = {n: p for n, p in lines.items() if p and (n == "reward/mean" or any(value for _, value, _ in p))}
        if lines:
            found[title] = lines
    return found


def points(history: Sequence[dict[str, float]], name: str) -> Points:
    """The finite values of a metric by step."""
    rows = [row for row in history if math.isfinite(row.get(name, math.nan))]
    return [(row["step"], row[name], row.get(f"{name}_se", math.nan)) for row in rows]


def plot(history: list[dict[str, float]], path: Path, title: str, alerts: Sequence[dict[str, Any]] = ()) -> None:
    """Write one PNG of the run's curves by step; a red line stands where an alert was."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = panels(history)
    columns = min(4, max(1, math.ceil(math.sqrt(len(drawn)))))
    rows = max(1, math.ceil(len(drawn) / columns))
    size = (max(6.0, 4.3 * columns), max(3.5, 2.9 * rows))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, (label, lines) in zip(axes.flat, drawn.items(), strict=False):
        for name, line in lines.items():
            _draw(axis, label, name, line)
        _scale(axis, [value for line in lines.values() for _, value, _ in line])
        for step in {alert["step"] for alert in alerts if alert["step"] > 0}:
            axis.axvline(step, color="tab:red", linewidth=0.7, alpha=0.5, zorder=0)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(lines) > 1 or label == "held-out":
            axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(drawn) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, label: str, name: str, line: Points) -> None:
    x, y, errors = zip(*line, strict=True)
    marked = "." if len(line) <= MARKED else None
    if label == "held-out":
        axis.errorbar(x, y, yerr=[0.0 if math.isnan(e) else e for e in errors], marker="o", capsize=3, label=name)
        return
    (drawn,) = axis.plot(x, y, marker=marked, linewidth=1.2, label=name)
    if any(math.isfinite(e) and e for e in errors):
        low, high = (
            [v + sign * (0.0 if math.isnan(e) else e) for v, e in zip(y, errors, strict=True)] for sign in (-1, 1)
        )
        axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)


def _scale(axis: Any, values: list[float]) -> None:
    """Shares keep 0 to 1, so that runs look alike. Every other figure has its own range, over decades in logarithms."""
    low, high = min(values), max(values)
    if low >= 0 and high <= 1 and high > 0.2:
        axis.set_ylim(-0.02, 1.02)
    elif low > 0 and high / low > 30:
        axis.set_yscale("log")
