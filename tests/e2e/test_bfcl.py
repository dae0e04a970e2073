"""BFCL's recipe from its tasks to a trained step: tools in the prompt, vLLM's parser, four held-out sets."""

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bfcl_wheel import bfcl_path
from models import make_model
from processes import assert_gone
from runs import RECIPE, finish, printed, start

TEMPLATE = Path(__file__).parents[1] / "support" / "templates" / "qwen2_5.jinja"
WORDS = Path(__file__).parents[2] / "models" / "smollm2-135m"


@pytest.mark.nightly
def test_a_run_evaluates_and_trains_on_the_benchmark(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(WORDS)
    # A character model would have prompts of 20,000 tokens.
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 8192, "eos_token_id": tokenizer.eos_token_id}
    model = make_model(tmp_path / "model", peak=1.0, **sizes)
    tokenizer.chat_template = TEMPLATE.read_text()
    tokenizer.save_pretrained(model)
    paths = [*bfcl_path(tmp_path), os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    recipe = RECIPE.with_name("bfcl_tiny.py")
    process, mark = start(model, tmp_path, "--tracking.wandb", "off", env=env, recipe=recipe)
    code, summary, rows = finish(process, tmp_path)
    assert code == 0, printed(tmp_path)
    assert (summary["status"], len(rows)) == ("finished", 1)
    assert rows[0]["actor/grad_norm"] > 0
    for kind in ("base", "miss_func", "miss_param", "long_context"):
        assert summary["eval_after"][f"eval/{kind}/avg@1"] >= 0
    assert_gone(mark)
