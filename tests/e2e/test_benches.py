"""The benches of docs/performance.md still run, and no part of a run is much slower than its bare counterpart."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOISE = 0.12
"""Two sides that are alike differ by less than this on two busy cores, in the median of three rounds."""


def rows_of(command: list[str], out: Path) -> list[dict]:
    asked = [sys.executable, "-W", "ignore", *command, "--out", str(out)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.nightly
@pytest.mark.serial
@pytest.mark.timeout(900)
def test_an_engine_samples_nearly_as_fast_as_bare_vllm(tmp_path: Path) -> None:
    rows = rows_of(["scripts/bench/rollouts.py", "--rounds", "3", "--jobs", "equal"], tmp_path / "rows.json")
    assert statistics.median(row["bare"]["seconds"] / row["engine"]["seconds"] for row in rows) > 0.95 - NOISE


@pytest.mark.nightly
@pytest.mark.serial
@pytest.mark.timeout(900)
def test_a_learner_steps_nearly_as_fast_as_bare_pytorch(tmp_path: Path) -> None:
    rows = rows_of(["scripts/bench/learner.py", "--turns", "3"], tmp_path / "rows.json")
    for replies in {row["replies"] for row in rows}:
        pairs = [row for row in rows if row["replies"] == replies]
        assert statistics.median(row["bare"]["cpu"] / row["learner"]["cpu"] for row in pairs) > 0.95 - NOISE, replies


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_step_costs_its_driver_little(tmp_path: Path) -> None:
    cost = rows_of(["scripts/bench/driver.py", "--samples", "512"], tmp_path / "cost.json")
    assert cost["bytes_per_token"] < 20, "13 of the columns; what a page of memory holds beside them is in it"
    assert cost["cpu_per_million"] < 0.5
