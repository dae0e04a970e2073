import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agreement_of_literal_numbers(gpu_check):
    # d = trainer - rollout: [0.1, -0.1] and [0.2]
    got = gpu_check.agreement(rollout=[[-1.0, -2.0], [-3.0]], trainer=[[-0.9, -2.1], [-2.8]])
    assert (got["tokens"], got["sequences"]) == (3, 2)
    assert got["nll"] == pytest.approx(6.0 / 3)
    assert got["abs_mean"] == pytest.approx(0.4 / 3)
    assert got["abs_max"] == pytest.approx(0.2)
    assert got["k1"] == pytest.approx(-0.2 / 3)
    e = [math.exp(d) for d in (0.1, -0.1, 0.2)]
    assert got["k3"] == pytest.approx((sum(e) - 0.2 - 3) / 3)
    assert got["ess"] == pytest.approx(sum(e) ** 2 / (3 * sum(x * x for x in e)))
    # Between sequences: sums of |d| 0.2 and 0.2, lengths 2 and 1, mean 0.4 / 3.
    left, right = 0.2 - 2 * 0.4 / 3, 0.2 - 0.4 / 3
    assert got["abs_mean_se"] == pytest.approx(math.sqrt(2 * (left**2 + right**2)) / 3)


def test_engines_that_agree_have_no_gap_and_a_full_sample_size(gpu_check):
    got = gpu_check.agreement(rollout=[[-1.0, -0.5], [-2.0]], trainer=[[-1.0, -0.5], [-2.0]])
    assert [got[k] for k in ("abs_mean", "abs_mean_se", "abs_max", "k1", "k3", "k3_se")] == [0.0] * 6
    assert got["ess"] == pytest.approx(1.0)


def test_agreement_refuses_sequences_of_different_lengths(gpu_check):
    with pytest.raises(ValueError, match="shorter"):
        gpu_check.agreement(rollout=[[-1.0, -2.0]], trainer=[[-1.0]])


def test_the_echo_reward_is_the_share_of_right_places(gpu_check):
    from rl.types import Reply

    def reward(text):
        return gpu_check.share_of_echoes(Reply(text=text, finished=False, task={"digit": "7"}, token_ids=[]))

    assert [reward(t) for t in ("", "77777777", "7777====", "12345678")] == [0.0, 1.0, 0.5, 0.125]


def test_a_made_model_has_about_the_asked_entropy_and_a_tied_head(gpu_check, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gpu_check.make_model(tmp_path / "model", hidden=128, inner=256, layers=2, vocabulary=512, nats=3.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.manual_seed(3)
    with torch.no_grad():
        log_p = model(torch.randint(512, (4, 64))).logits.log_softmax(-1)
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    # On other random tokens than those it was set on; a plain random model has the full log(512) = 6.24.
    assert 1.0 < entropy < 4.5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("7=")) == "7="


def test_a_failing_phase_is_recorded_and_makes_the_exit_status_one(tmp_path):
    # No GPU is needed to fail: `environment` on cuda raises where there is none, on cpu it passes.
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for device, status in (("cuda", 1), ("cpu", 0)):
        output = tmp_path / f"{device}.json"
        command = [sys.executable, str(SCRIPT), "--device", device, "--only", "environment", "--output", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        found = json.loads(output.read_text())["phases"]["environment"]
        assert done.returncode == status, done.stdout + done.stderr
        assert found["ok"] is (status == 0)
        assert found["seconds"] > 0
        assert bool(found["error"]) is (status == 1)
