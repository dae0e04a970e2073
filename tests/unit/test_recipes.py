import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models import make_model
from rl.objectives import Objective
from rl.types import Reply
from rl.validate import check
from trainer.cluster.placement import place
from trainer.learner.deepspeed_engine import deepspeed_settings
from trainer.runs.settings import resolved

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ROOT / "recipes" / "environments"
"""Recipes that need another package: tests/unit/test_bfcl.py and test_recipe_adapters.py."""
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.py") if p.stem != "loop_in_one_file" and p.parent != ADAPTERS)
"""Every file that is a run. The loop in one file has a test of its own, tests/unit/test_loop_in_one_file.py."""


def load(path, monkeypatch):
    """The recipe as a module; like a script, it finds its neighbours in its own folder."""
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_recipe(name, *arguments):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "recipes" / name), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_a_run_that_passes_the_checks(path, monkeypatch):
    config = load(path, monkeypatch).config
    check(config)
    assert config.name == path.stem
    assert isinstance(config.objective, Objective)
    assert callable(config.data)
    assert callable(config.env or config.reward or config.agent)
    assert json.loads(json.dumps(resolved(config)))["name"] == path.stem


@pytest.mark.parametrize(
    ("recipe", "gpus", "backend"),
    [
        ("gsm8k/gsm8k_gspo", 8, "nccl"),
        ("gsm8k/gsm8k_grpo", 8, "nccl"),
        ("gsm8k/gsm8k_ppo", 8, "nccl"),
        ("gsm8k/gsm8k_7b", 8, "nccl"),
        ("gsm8k/gsm8k_one_gpu", 1, "ipc"),
        ("lookup_qwen", 1, "ipc"),
    ],
)
def test_a_gpu_recipe_asks_for_the_gpus_that_its_docstring_names(recipe, gpus, backend, monkeypatch):
    module = load(ROOT / "recipes" / f"{recipe}.py", monkeypatch)
    placement = place(module.config, cuda=True)
    assert (placement.gpus, placement.backend) == (gpus, backend)
    assert {8: "8 GPUs", 1: "one GPU"}[gpus] in module.__doc__
    assert "not yet run on gpus" in module.__doc__.lower()


@pytest.mark.parametrize("recipe", ["gspo", "grpo", "ppo", "one_gpu"])
def test_a_recipe_that_fits_with_zero_1_sums_gradients_once_per_optimizer_step(recipe, monkeypatch):
    # ZeRO 2 sums them after every micro-batch: tests/unit/test_gpu_rules.py counts.
    assert load(ROOT / "recipes" / "gsm8k" / f"gsm8k_{recipe}.py", monkeypatch).config.trainer.zero_stage == 1


def test_no_recipe_is_named_like_a_package():
    assert not {p.stem for p in RECIPES} & {"rl", "rollout", "trainer"}


@pytest.mark.parametrize("recipe", ["grpo", "ppo", "7b", "one_gpu"])
def test_the_gsm8k_recipes_share_one_data_set_and_one_reward(recipe, monkeypatch):
    config = load(ROOT / "recipes" / "gsm8k" / f"gsm8k_{recipe}.py", monkeypatch).config
    assert (config.data.__name__, config.reward.__name__) == ("gsm8k", "boxed_answer_is_right")
    assert config.data.__module__ == config.reward.__module__ == "gsm8k_gspo"


@pytest.fixture
def judged(monkeypatch):
    """The reward of a reply to a problem whose solution ends in `#### 1,234`."""
    recipe = load(ROOT / "recipes" / "gsm8k" / "gsm8k_gspo.py", monkeypatch)

    def reward(text, solution="So she has 1,200 + 34 = <<1200+34=1234>>1,234 shells.\n#### 1,234"):
        task = {"question": "How many shells has Ada?", "answer": solution}
        return recipe.boxed_answer_is_right(Reply(text=text, finished=True, task=task, token_ids=[]))

    return reward


@pytest.mark.parametrize(
    "text",
    [
        r"1200 + 34 is \boxed{1234}.",
        r"\boxed{1,234}",
        r"\boxed{\$1,234}",
        r"\boxed{1234.00}",
        r"\boxed{1234 \text{ shells}}",
        r"\boxed{\frac{2468}{2}}",
        r"First \boxed{34}, and in all \boxed{1234}",
    ],
)
def test_a_right_box_is_worth_one(judged, text):
    assert judged(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is 1234.",
        r"\boxed{}",
        r"\boxed{1235}",
        r"\boxed{-1234}",
        r"\boxed{many shells}",
        r"\boxed{\frac{1}{0}}",
        r"\boxed{1234",
        r"\boxed{1234}, no, \boxed{34}",
    ],
)
def test_a_wrong_missing_or_unparsable_box_is_worth_nothing(judged, text):
    assert judged(text) == 0.0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{99999999!}", r"\boxed{\binom{9999999}{999999}}"])
def test_a_box_that_sympy_would_never_finish_is_wrong_at_once(judged, text):
    assert judged(text) == 0.0


def test_negative_and_decimal_solutions_are_read(judged):
    assert judged(r"\boxed{-3}", "#### -3") == 1.0
    assert judged(r"\boxed{2.5}", "#### 2.5") == 1.0
    assert judged(r"\boxed{\frac{5}{2}}", "#### 2.5") == 1.0


@pytest.mark.parametrize("solution", ["1,234", "#### none", "#### 12 apples", ""])
def test_a_solution_without_a_number_is_an_error_that_names_the_question(judged, solution):
    with pytest.raises(ValueError, match="How many shells has Ada"):
        judged(r"\boxed{1234}", solution)


def test_loading_gsm8k_keeps_the_splits_apart_and_refuses_a_bad_solution(monkeypatch):
    recipe = load(ROOT / "recipes" / "gsm8k" / "gsm8k_gspo.py", monkeypatch)
    rows = {
        "train": [{"question": "What is 1 + 1?", "answer": "2 it is.\n#### 2"}],
        "test": [{"question": "What is 2 + 2?", "answer": "#### 4"}],
    }

    def load_dataset(name, subset, *, split):
        assert (name, subset) == ("openai/gsm8k", "main")
        return rows[split]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = recipe.gsm8k()
    (train,), (test,) = data.train, data.evals["test"]
    assert train.task == rows["train"][0]
    assert test.prompt == [{"role": "user", "content": f"What is 2 + 2?\n{recipe.INSTRUCTION}"}]
    rows["test"][0]["answer"] = "four"
    with pytest.raises(ValueError, match=r"What is 2 \+ 2"):
        recipe.gsm8k()


@pytest.mark.nightly  # a process of 10 s; test_flags and test_docs read the same text
def test_help_explains_the_fields_and_needs_no_network():
    shown = run_recipe("gsm8k/gsm8k_ppo.py", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "--prompts-per-step" in shown.stdout
    assert "Optimizer steps per pass" in shown.stdout  # a field's docstring
    assert "(default: 512)" in shown.stdout  # the recipe's own value


@pytest.mark.slow
def test_dry_run_prints_placement_and_memory_and_starts_nothing(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | shape | heads))
    shown = run_recipe("quickstart.py", "--dry-run", "--device", "cpu", "--model", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert "1 x 1 CPU process" in shown.stdout
    assert "gloo" in shown.stdout
    # 128 * 64 embedding; a layer: q, k, v with bias, o, three MLP matrices, two norms; the last norm.
    layer = (64 * 64 + 64) + 2 * (64 * 32 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert f"{128 * 64 + 2 * layer + 64:,}" in shown.stdout


def test_deepspeed_is_told_to_keep_adam_in_the_hosts_memory(monkeypatch):
    settings = deepspeed_settings(load(ROOT / "recipes" / "gsm8k" / "gsm8k_7b.py", monkeypatch).config)
    assert settings["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    # Else DeepSpeed insists on an optimizer of its own, which it would have to compile.
    assert settings["zero_force_ds_cpu_optimizer"] is False
    gspo = deepspeed_settings(load(ROOT / "recipes" / "gsm8k" / "gsm8k_gspo.py", monkeypatch).config)
    assert gspo["zero_optimization"] == {"stage": 1}


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_with_what_would_help(tmp_path):
    make_model(tmp_path)
    flags = ("--dry-run", "--device", "cpu", "--model", str(tmp_path), "--rollout.kv-cache-gib", "5000")
    shown = run_recipe("quickstart.py", *flags)
    assert shown.returncode == 2, shown.stderr
    assert "memory: host" in shown.stdout
    assert "What would help: rollout.kv_cache_gib below 5000" in " ".join(shown.stdout.split())


@pytest.mark.nightly  # a process of 10 s; test_memory has the message
def test_where_the_model_cannot_be_read_a_dry_run_shows_the_placement_and_ends_with_the_reason():
    shown = run_recipe("gsm8k/gsm8k_gspo.py", "--dry-run", "--device", "cuda", "--model", "nobody/nothing")
    assert shown.returncode == 2, shown.stderr
    assert "nccl" in shown.stdout
    assert "the model 'nobody/nothing' is not in the hub's cache" in " ".join(shown.stdout.split())


def test_a_recipe_is_a_value_that_another_can_start_from(monkeypatch):
    gspo = load(ROOT / "recipes" / "gsm8k" / "gsm8k_gspo.py", monkeypatch).config
    ppo = load(ROOT / "recipes" / "gsm8k" / "gsm8k_ppo.py", monkeypatch).config
    assert replace(ppo.trainer, epochs=1, value_lr=None) == gspo.trainer
    assert ppo.rollout == gspo.rollout
