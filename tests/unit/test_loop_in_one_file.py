import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from models import make_model
from rl.objectives import GRPO
from rl.types import Prompt, Reply

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "loop_in_one_file.py"


@pytest.fixture
def recipe(monkeypatch):
    spec = importlib.util.spec_from_file_location("loop_in_one_file", RECIPE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(recipe, tmp_path):
    """A tiny model, and a reward that groups differ in."""
    folder = make_model(tmp_path, peak=1.0)
    return recipe.Settings(model=str(folder), steps=2, prompts_per_step=2, group_size=4, max_tokens=6, lr=1e-3)


def test_two_steps_change_the_weights_and_sampler_and_learner_agree(recipe, settings, monkeypatch):
    # A random model answers no sum, so digits earn something here: else every advantage would be 0.
    monkeypatch.setattr(recipe, "first_integer_is_right", lambda reply: float(sum(c.isdigit() for c in reply.text)))
    first, second = recipe.train(settings)
    assert (first["step"], second["step"]) == (1.0, 2.0)
    for metrics in (first, second):
        assert metrics["rollout_corr/logprob_abs_diff_max"] < 1e-4  # nats: one model on both sides
        assert metrics["actor/grad_norm"] > 0
    assert first["actor/entropy"] != second["actor/entropy"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(recipe, settings):
    assert list(recipe.train(settings)) == list(recipe.train(settings))


def test_a_completion_ends_with_its_end_of_sequence_token(recipe):
    stopped = recipe.completion([5, 6, 1, 9], [-0.1, -0.2, -0.3, -0.4], 1, 3)
    assert (stopped.token_ids, stopped.logprobs) == ([5, 6, 1], [-0.1, -0.2, -0.3])
    assert (stopped.finish_reason, stopped.versions) == ("stop", [3, 3, 3])
    cut = recipe.completion([5, 6], [-0.1, -0.2], 1, 3)
    assert (cut.finish_reason, cut.token_ids) == ("length", [5, 6])


def test_micro_batches_do_not_change_the_gradient(recipe, settings):
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    from rl.batch import collate, trajectory

    prompt = Prompt(ordinal=0, token_ids=[4, 5, 6], task={"answer": "1"})
    group = []
    for i, length in enumerate((2, 5, 3)):
        c = recipe.completion([7 + i] * length, [-2.0] * length, None, 0)
        group.append(trajectory(prompt, c, float(i), {}))
    after = []
    for rows in (1, 3):
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        recipe.learn(model, optimizer, collate(group), replace(settings, objective=GRPO(), micro_batch_rows=rows))
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=1e-6)


def test_the_reward_reads_the_first_integer(recipe):
    def reward(text):
        return recipe.first_integer_is_right(Reply(text=text, finished=True, task={"answer": "12"}, token_ids=[]))

    assert [reward(text) for text in (" 12\n3 + 4", "12", "1", "", "112")] == [1.0, 1.0, 0.0, 0.0, 0.0]
