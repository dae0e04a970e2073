"""A run begins with a check: what is wrong ends it with its cause, before anything is trained."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

from models import make_model
from processes import assert_gone
from runs import HANGS_S

RECIPES = Path(__file__).parent / "recipes"


def say(*command: str, model: Path, folder: Path) -> tuple[int, str, str]:
    """Run a command; its exit status, all that it said, and the mark of the processes that it started."""
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [*command, "--model", str(model), "--output-dir", str(folder), "--tracking.wandb", "off"],
        env=os.environ | {"UNISON_TEST_MARK": mark, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    return done.returncode, done.stdout + done.stderr, mark


def test_truncated_sampling_on_cpu_is_trained_after_all_comparisons_agree(echo_model: Path, tmp_path: Path) -> None:
    recipe = [sys.executable, "-W", "ignore", str(RECIPES / "echo.py"), "--doctor", "full", "--steps", "2"]
    cut = ["--rollout.top-k", "20", "--rollout.top-p", "0.9", "--temperature", "0.9", "--rollout.max-tokens", "4"]
    code, said, _ = say(*recipe, *cut, "--group-size", "4", model=echo_model, folder=tmp_path)
    assert code == 0, said[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "echo" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward/mean" in row]
    assert [row["weight_sync/version"] for row in rows] == [1, 2]
    assert max(row["rollout_corr/logprob_abs_diff_mean"] for row in rows) <= 1e-5
    report = json.loads((tmp_path / "echo" / "doctor.json").read_text())
    assert report["verdict"] == "well"
    tried = {comparison["name"] for comparison in report["comparisons"] if comparison["gap"]}
    assert {"the same engine, asked twice", "prefix cache hit | miss"} <= tried
    assert "in flight: begun after it | trainer's new weights" in tried
    assert (tmp_path / "echo" / "doctor.html").stat().st_size > 10_000


def test_a_faulty_engine_ends_the_run_before_its_first_step_with_cause_and_remedy(
    echo_model: Path, tmp_path: Path
) -> None:
    code, said, mark = say(sys.executable, "-W", "ignore", str(RECIPES / "raw.py"), model=echo_model, folder=tmp_path)
    assert code == 2, said[-3000:]
    assert "raw_logprobs" in said
    assert 'Set logprobs_mode="processed_logprobs"' in said
    assert "Traceback" not in said
    summary = json.loads((tmp_path / "raw" / "summary.json").read_text())
    assert (summary["status"], summary["doctor"], summary["steps"]) == ("failed", "fault", 0)
    assert_gone(mark)


def test_unison_doctor_exits_with_1_for_a_fault_and_leaves_its_report(echo_model: Path, tmp_path: Path) -> None:
    unison = [str(Path(sys.executable).with_name("unison")), "doctor", str(RECIPES / "raw.py"), "--short"]
    code, said, _ = say(*unison, model=echo_model, folder=tmp_path)
    assert code == 1, said[-3000:]
    report = json.loads((tmp_path / "raw-doctor" / "doctor.json").read_text())
    assert report["verdict"] == "fault"
    assert report["findings"][0]["cause"] == "raw_logprobs"
    assert (tmp_path / "raw-doctor" / "doctor.html").exists()


def test_an_unknown_architecture_ends_the_start_with_one_message(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"architectures": ["NoSuchForCausalLM"]}))
    code, said, mark = say(sys.executable, "-W", "ignore", str(RECIPES / "echo.py"), model=model, folder=tmp_path)
    assert code == 2, said[-3000:]
    assert "engine 0 did not start" in said
    assert "NoSuchForCausalLM" in said
    assert "Traceback" not in said
    assert_gone(mark)
