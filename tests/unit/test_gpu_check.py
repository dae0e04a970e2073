import importlib
import json
import signal
import sys
from pathlib import Path

import pytest

from cases import nightly_unless

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield


@pytest.fixture(scope="module")
def gpu_check(scripts):
    return importlib.import_module("gpu_check")


@pytest.fixture(scope="module")
def echo_task(scripts):
    return importlib.import_module("echo_task")


def test_the_echo_reward_is_the_share_of_correct_positions(echo_task):
    from rl.types import Reply

    def reward(text):
        return echo_task.share_of_echoes(Reply(text=text, finished=False, task={"digit": "7"}, token_ids=[]))

    assert [reward(t) for t in ("", "77777777", "7777====", "12345678")] == [0.0, 1.0, 0.5, 0.125]


def test_a_made_model_has_about_the_requested_entropy_and_a_tied_head(echo_task, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = echo_task.make_model(tmp_path / "model", hidden=128, inner=256, layers=2, vocabulary=512, nats=3.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.manual_seed(3)
    with torch.no_grad():
        log_p = model(torch.randint(512, (4, 64))).logits.log_softmax(-1)
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    # Measured on other random tokens than make_model uses; an unscaled random model has log(512) = 6.24.
    assert 1.0 < entropy < 4.5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("7=")) == "7="


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "status"), nightly_unless(lambda device, _: device == "cuda", [("cuda", 1), ("cpu", 0)])
)
def test_a_failing_phase_is_recorded_and_makes_the_exit_status_one(device, status, gpu_check, tmp_path, monkeypatch):
    # Works without a GPU: `facts` fails on cuda where there is none, and passes on cpu.
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    before = signal.getsignal(signal.SIGTERM)
    output = tmp_path / "report.json"
    flags = ["--device", device, "--only", "facts", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    signal.signal(signal.SIGTERM, before)
    found = json.loads(output.read_text())["phases"]["facts"]
    assert ended.value.code == status, found
    assert found["ok"] is (status == 0)
    assert found["seconds"] > 0
    assert bool(found["error"]) is (status == 1)
