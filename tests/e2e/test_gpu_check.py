"""scripts/gpu_check runs where there is no GPU, over the NCCL channel in disguise, so that a GPU's hour is not lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cases import nightly_unless

ROOT = Path(__file__).parents[2]
DISGUISE = ROOT / "tests" / "support" / "disguise"


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "phases", nightly_unless(lambda phases: phases == "facts update", ["facts update", "engines loop", "sleep", "nccl"])
)
def test_the_gpu_check_runs_on_cpu(tmp_path: Path, phases: str) -> None:
    output = tmp_path / "report.json"
    path = os.pathsep.join([str(DISGUISE), str(ROOT)])
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--device", "cpu", "--only", *phases.split()]
    environ = os.environ | {"PYTHONPATH": path, "UNISON_BUFFER": str(2**20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(output)], env=environ, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(output.read_text())["phases"]
    assert sorted(found) == sorted(phases.split())
    results = {name: phase["result"] for name, phase in found.items()}
    for name in {"update", "nccl"} & found.keys():
        assert results[name]["backend"] == "nccl"
        assert results[name]["versions in one reply, most"] > 1
        assert results[name]["aborted"] == 0
    if "engines" in found:
        gaps = {row["engine"]: row["mean_abs"] for row in results["engines"]["rows"] if row["T"] == 0.7}
        assert gaps["eager"] < 1e-5 < gaps["raw"]
    if "sleep" in found:
        assert results["sleep"]["aborted"] == 0
        assert [row["step"] for row in results["sleep"]["rows"]] == [1, 2, 3]
        assert max(row["mean_abs"] for row in results["sleep"]["rows"]) < 1e-5
    if "loop" in found:
        assert results["loop"]["reward_last"] > results["loop"]["reward_first"] + 0.3
        assert results["loop"]["worst_logprob_abs_diff_mean"] < 1e-5
