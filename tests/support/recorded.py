"""The figures of metrics.jsonl, computed again from a run's rollout record."""

import math
from collections import Counter
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq
import pytest

from trainer.record.writer import entries as entries_of


def figures_agree(run: Path, rows: list[dict]) -> None:
    """Every step of a run with one pass a step has its rows, and they have its figures."""
    folder = run / "rollouts"
    entries = entries_of(folder)
    assert {int(row["step"]) for row in rows} <= entries.keys()
    for row in rows:
        step = int(row["step"])
        kept = pq.read_table(folder / entries[step].file).to_pylist()
        trained = [r for r in kept if r["state"] == "trained"]
        assert fmean(r["reward"] for r in trained if not r["row"]) == pytest.approx(row["reward/mean"], rel=1e-12)
        versions = [v for r in trained for v, flags in zip(r["version"], r["flags"], strict=True) if not flags & 3]
        ages = Counter(step - 1 - version for version in versions)
        for age, count in ages.items():
            assert count / len(versions) == row[f"staleness/frac_at_{age}"], (step, age)
        passed = [r for r in trained if r["passed"]]
        tokens = sum(r["passed"] for r in passed)
        means = {"gap_mean": "rollout_corr/logprob_abs_diff_mean", "entropy": "actor/entropy"}
        for name, metric in (means | {"clip_frac": "actor/clip_frac"}).items():
            if metric in row:
                again = math.fsum(r[name] * r["passed"] for r in passed) / tokens
                # The learner adds in float32, the rows in float64.
                assert again == pytest.approx(row[metric], rel=1e-5, abs=1e-12), (step, metric)
        worst = max(r["gap_max"] for r in passed)
        assert worst == pytest.approx(row["rollout_corr/logprob_abs_diff_max"], rel=1e-6), step
