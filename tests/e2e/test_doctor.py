"""A run begins with a check: what is wrong ends it with its cause, before anything is trained."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

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


@pytest.mark.nightly
def test_unison_doctor_exits_with_1_for_a_fault_and_leaves_its_report(echo_model: Path, tmp_path: Path) -> None:
    unison = [str(Path(sys.executable).with_name("unison")), "doctor", str(RECIPES / "raw.py"), "--short"]
    code, said, _ = say(*unison, model=echo_model, folder=tmp_path)
    assert code == 1, said[-3000:]
    report = json.loads((tmp_path / "raw-doctor" / "doctor.json").read_text())
    assert report["verdict"] == "fault"
    assert report["findings"][0]["cause"] == "raw_logprobs"
    assert (tmp_path / "raw-doctor" / "doctor.html").exists()


@pytest.mark.nightly
def test_a_model_that_vllm_computes_otherwise_ends_the_run_and_its_layer_is_named(tmp_path: Path) -> None:
    """vLLM 0.32's OLMoE knows no `norm_topk_prob=True`. The doctor asks the engine twice before it blames a layer."""
    sizes = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
    model = make_model(tmp_path / "model", family="olmoe", norm_topk_prob=True, peak=2.0, experts=2.0, **sizes)
    code, said, mark = say(sys.executable, "-W", "ignore", str(RECIPES / "echo.py"), model=model, folder=tmp_path)
    assert code == 2, said[-3000:]
    assert "fault: scale, engine 0" in said
    assert "goes into 'model.layers.1'" in said
    assert "Traceback" not in said
    assert_gone(mark)


@pytest.mark.nightly
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
