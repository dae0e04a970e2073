"""What do a run's curves look like? One panel per question."""

from pathlib import Path

from rl.loop.estimates import headlines

PANELS = [
    ("reward", ["reward/mean"]),
    ("held-out", []),
    ("entropy (nats)", ["actor/entropy"]),
    ("clip fraction", ["actor/clip_frac"]),
    ("|trainer - rollout| (nats)", ["rollout_corr/logprob_abs_diff_mean", "rollout_corr/logprob_abs_diff_max"]),
    ("seconds", ["timing_s/wait_for_samples", "timing_s/learn", "weight_sync/seconds"]),
]


def plot(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Write one PNG of the run's curves by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (label, names) in zip(axes.flat, PANELS, strict=True):
        if label == "held-out":
            names = headlines({name for row in history for name in row})
        for name in names:
            rows = [row for row in history if name in row]
            points = [(row["step"], row[name]) for row in rows]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            if label == "held-out":
                axis.errorbar(x, y, yerr=[row[f"{name}_se"] for row in rows], marker="o", capsize=3, label=name)
            else:
                axis.plot(x, y, marker=".", label=name)
        axis.set_title(label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
        if label in ("reward", "held-out"):
            axis.set_ylim(-0.02, 1.02)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
