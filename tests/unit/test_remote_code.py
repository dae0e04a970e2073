"""Code that a model brings with it runs only where the config allows it, on every side."""

import json
from dataclasses import replace

import pytest

from rl.config import Config
from rl.types import Data, Example
from rollout.settings import engine_args
from trainer.model.files import model_config
from trainer.model.policy import load
from trainer.prompts import load_tokenizer

CODE = """
from transformers import PreTrainedConfig, Qwen2Tokenizer
class OwnConfig(PreTrainedConfig):
    model_type = "own"
"""
CONFIG = Config(name="t", model="m", data=Data(train=[Example(prompt="1")]), reward=lambda reply: 0.0)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names, "width": 7}))
    own = {"auto_map": {"AutoTokenizer": [None, "own.Qwen2Tokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    return str(tmp_path)


@pytest.mark.parametrize(
    "read",
    [
        model_config,
        load_tokenizer,
        lambda model: load(model, dtype="float32", fp32_head=True, share_prompts=False),
    ],
)
def test_code_of_a_model_is_refused_with_the_flag_that_allows_it(model, read):
    with pytest.raises(ValueError, match=r"brings Python code of its own: read it, and allow it .*--trust-remote-code"):
        read(model)


def test_allowed_code_runs(model):
    assert model_config(model, trust_remote_code=True).width == 7


@pytest.mark.parametrize("allowed", [False, True])
def test_the_engine_is_told_too(allowed):
    config = replace(CONFIG, trust_remote_code=allowed)
    args = engine_args(config, device="cpu", backend="gloo", model="m")
    assert args["trust_remote_code"] is allowed
