"""The GPU's model runner and the trainer give every sampled token the same log-probability, in fp32.

The trainer replays the masks that the engine reports; it does not compute them again.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from live import Live, engine_config
from rl.batch import collate, trajectory
from rl.sampling.truncation import Truncation, keep
from rl.types import Batch, Completion, Prompt
from trainer.learner.weights import LearnerWeights
from trainer.model.policy import Policy, load

pytestmark = pytest.mark.nightly
PROMPT = list(range(10, 80))
CUTS: dict[str, dict[str, Any]] = {
    "T1": {"temperature": 1.0},
    "T0.7": {"temperature": 0.7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_k": {"temperature": 0.7, "top_k": 7},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "all": {"temperature": 0.7, "top_p": 0.9, "top_k": 12, "min_p": 0.02},
}


def batch_of(completions: list[Completion], prompt: list[int] = PROMPT) -> Batch:
    return collate([trajectory(Prompt(ordinal=0, token_ids=prompt, task={}), c, 0.0, {}) for c in completions])


def gaps(policy: Policy, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """|d| of every sampled token."""
    with torch.no_grad():
        mine = policy(batch.input_ids, batch.mask, temperature, None, batch.support, experts=batch.experts).logprobs
    return (mine - batch.rollout_logprobs)[batch.mask].abs()


def policy_of(model: Path) -> Policy:
    return load(str(model), dtype="float32", fp32_head=True, share_prompts=True)


@pytest.fixture(scope="module")
def models(tiny: Callable) -> tuple[Path, Path]:
    return tiny(family="qwen2", seed=0), tiny(family="qwen2", seed=1)


@pytest.fixture(scope="module", params=[False, True], ids=["in step", "async"])
def engine(request: pytest.FixtureRequest, live: Callable, models: tuple[Path, Path]) -> Live:
    """With asynchronous scheduling off and on."""
    config = engine_config(models[0])
    rollout = replace(config.rollout, async_scheduling=request.param, top_p=0.99)
    started = live(replace(config, rollout=rollout))
    vllm = started.engine.llm.vllm_config
    assert vllm.use_v2_model_runner
    assert vllm.scheduler_config.async_scheduling == request.param
    return started


@pytest.fixture(scope="module")
def policy(models: tuple[Path, Path]) -> Policy:
    return policy_of(models[0])


@pytest.mark.parametrize("name", CUTS)
def test_with_the_engine_s_masks_replayed_both_sides_agree(engine: Live, policy: Policy, name: str) -> None:
    how = CUTS[name]
    truncation = {"top_p": 1.0, "top_k": 0, "min_p": 0.0} | {k: v for k, v in how.items() if k != "temperature"}
    done = engine.sample(PROMPT, 4, seed=5, max_tokens=12, temperature=how["temperature"], **truncation)
    batch = batch_of(done)
    assert batch.support is not None
    assert gaps(policy, batch, how["temperature"]).max() <= 1e-5
    kept = (batch.support[batch.mask] >= 0).sum(-1)
    vocabulary = policy.hf.config.vocab_size
    if name in ("T1", "T0.7"):
        assert set(kept.tolist()) == {vocabulary}
        return
    assert kept.max() < vocabulary
    # The trainer's own cut is the same set, and leaving it out would show.
    own = (keep(logits_of(policy, batch) / how["temperature"], Truncation(**truncation))).sum(-1)
    assert torch.equal(own, kept)
    whole = replace(batch, support=torch.arange(vocabulary).expand(*batch.mask.shape, -1))
    assert gaps(policy, whole, how["temperature"]).mean() > 1e-3


def logits_of(policy: Policy, batch: Batch) -> torch.Tensor:
    """Logits [N, V] at the sampled tokens."""
    seen: list[torch.Tensor] = []
    head = policy.hf.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        policy(batch.input_ids, batch.mask, 1.0)
        hook.remove()
        return head.logits(seen[0], torch.float32)


def test_a_seed_gives_the_same_tokens_alone_and_among_others(engine: Live) -> None:
    together = engine.sample(PROMPT, 3, seed=40, max_tokens=10)
    alone = [engine.sample(PROMPT, 1, seed=40 + i, max_tokens=10)[0] for i in range(3)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({tuple(c.token_ids) for c in together}) == 3
    for one, other in zip(together, alone, strict=True):
        assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) <= 1e-5


def test_a_prefix_from_the_cache_changes_no_number(engine: Live) -> None:
    [missed] = engine.sample(PROMPT, 1, seed=60, max_tokens=10, fresh=True)
    [hit] = engine.sample(PROMPT, 1, seed=60, max_tokens=10)
    assert (missed.cached_prompt_tokens, hit.cached_prompt_tokens) == (0, 64)
    assert hit.token_ids == missed.token_ids
    assert max(abs(a - b) for a, b in zip(hit.logprobs, missed.logprobs, strict=True)) <= 1e-5


def test_the_first_tokens_are_draws_from_the_trainer_s_distribution(engine: Live, policy: Policy) -> None:
    done = engine.sample(PROMPT, 64, seed=100, max_tokens=1)
    batch = batch_of(done)
    with torch.no_grad():
        out = policy(batch.input_ids, batch.mask, 1.0, Truncation(top_p=0.99))
    entropy = out.entropy[batch.mask]
    surprise = -out.logprobs[batch.mask] - entropy
    assert abs(float(surprise.mean())) < 4.5 * float(surprise.std()) / math.sqrt(len(surprise))
    assert len({c.token_ids[0] for c in done}) > 10


def test_an_update_under_way_mixes_no_versions(engine: Live, models: tuple[Path, Path], policy: Policy) -> None:
    """The last test of this engine, which holds the second model afterwards."""
    second = policy_of(models[1])
    sender = engine.open_sender(LearnerWeights(second.hf, sharded=False))
    running = engine.keep_sampling(PROMPT, 2, tokens=24)
    engine.update(sender, 1)
    done = running.result(300)
    assert engine.wait(engine.engine.counters())["aborted"] == 0
    across = [c for c in done if set(c.versions) == {0, 1}]
    assert across
    batch = batch_of(across)
    before = (batch.versions == 0)[batch.mask]
    assert gaps(policy, batch)[before].max() <= 1e-5
    fresh = batch_of(engine.sample(PROMPT, 4, seed=7, max_tokens=12))
    assert set(fresh.versions[fresh.mask].tolist()) == {1}
    assert gaps(second, fresh).max() <= 1e-5
    assert gaps(policy, fresh).mean() > 0.1
