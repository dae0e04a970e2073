"""Starts of an engine are alike; and what made one of them differ is gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cases import nightly_unless

ROOT = Path(__file__).resolve().parents[2]
LATE = """
import importlib, os, sys, torch
if sys.argv[1]:
    importlib.import_module(sys.argv[1])
os.environ["MKL_VML_DEBUG_CPU_TYPE"] = "9"  # the kernel that a thread gets which comes second at the wrong moment
x = torch.linspace(0, 100, 1000)
print(float((x.cos().double() - x.double().cos()).abs().max()))
"""


def late_error(module: str) -> float:
    """Largest error of a cosine in a process that imports a module, and is told only then which kernel to choose."""
    command = [sys.executable, "-W", "ignore", "-c", LATE, module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "module", nightly_unless("rollout.worker".__eq__, ["rollout.worker", "trainer.learner.learner"])
)
def test_kernels_are_chosen_before_two_threads_can_choose_them_together(module: str) -> None:
    if late_error("") < 1e-5:
        pytest.skip("this torch chooses its kernels otherwise")
    assert late_error(module) < 1e-6


@pytest.mark.nightly
def test_a_soak_continues_where_it_stopped_and_finds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "starts.jsonl"
    command = [sys.executable, "-W", "ignore", "scripts/soak/soak.py", "--starts", "3", "--out", str(out)]
    for more, number in ((["--at-a-time", "1"], 1), ([], 3)):
        text = subprocess.run([*command, *more], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["start"] for row in rows] == list(range(number))
        assert f"| all | {number} | 0 |" in text.stdout
    assert [(row["worker"]["threads"], row["busy"]) for row in rows] == [(2, False), (2, True), (2, False)]
    for row in rows:
        assert row["findings"] == []
        assert row["mean_abs"] < 1e-5
        assert row["between_error"] < 1e-5
        assert row["worker"]["rotary_error"] < 1e-6
        assert row["cached"]["cached"] > 0
