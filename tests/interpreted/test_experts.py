"""Mixture-of-experts models: the engine reports each token's experts, and the trainer sends the token there too."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from live import Live, engine_config
from pair import Pair, examiner, make_learner
from rl.batch import collate, trajectory
from rl.config import Config
from rl.environments.tree import Tree
from rl.types import Batch, Completion, Prompt
from trainer.doctor.comparisons import Comparisons
from trainer.learner.weights import LearnerWeights
from trainer.model.attention import NAME
from trainer.model.policy import Policy, load

pytestmark = pytest.mark.nightly
PROMPT = list(range(10, 60))
SIZES: dict[str, Any] = {
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "initializer_range": 0.06,
    "peak": 2.0,
    "experts": 2.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"norm_topk_prob": False},  # vLLM's OLMoE knows no other, and no released one has another
}


def config_of(model: Path, dtype: Any = "float32") -> Config:
    config = engine_config(model, dtype=dtype)
    return replace(config, rollout=replace(config.rollout, router_replay=True))


def batch_of(completions: list[Completion], prompt: list[int] = PROMPT) -> Batch:
    batch = collate([trajectory(Prompt(ordinal=0, token_ids=prompt, task={}), c, 0.0, {}) for c in completions])
    assert batch.experts is not None
    return batch


def differences(policy: Policy, batch: Batch, *, replayed: bool, layout: str = "shared") -> tuple[torch.Tensor, list]:
    """d of every sampled token, and the counts of `RouterReplay`."""
    policy.packs, policy.share_prompts = layout != "padded", layout == "shared"
    policy.hf.set_attn_implementation("sdpa" if layout == "padded" else NAME)
    policy.replay.counts.zero_()
    policy.replay.counting_only = not replayed
    with torch.no_grad():
        mine = policy(batch.input_ids, batch.mask, 1.0, experts=batch.experts).logprobs
    policy.replay.counting_only = False
    return (mine - batch.rollout_logprobs)[batch.mask], policy.replay.counts.tolist()


def k3(d: torch.Tensor) -> float:
    return float((d.expm1() - d).mean())


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tiny: Callable) -> Path:
    return tiny(family=request.param, **SIZES, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def engine(live: Callable, model: Path) -> Live:
    return live(config_of(model))


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return load(str(model), dtype="float32", fp32_head=True, share_prompts=True)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_in_fp32_both_sides_choose_the_same_experts_and_agree(engine: Live, policy: Policy, layout: str) -> None:
    batch = batch_of(engine.sample(PROMPT, 4, seed=3, max_tokens=16))
    for replayed in (False, True):
        d, (_, tokens, moved_pairs, pairs) = differences(policy, batch, replayed=replayed, layout=layout)
        assert tokens >= 4 * 15 + 50
        assert moved_pairs <= 1e-3 * pairs
        assert d.abs().max() <= 1e-5
    # The experts matter: others give other numbers.
    other = replace(batch, experts=(batch.experts + 1) % SIZES["num_experts"])
    assert differences(policy, other, replayed=True, layout=layout)[0].abs().mean() > 1e-3


def test_a_prefix_from_the_cache_has_its_experts_too(engine: Live) -> None:
    [missed] = engine.sample(PROMPT, 1, seed=60, max_tokens=4, fresh=True)
    [hit] = engine.sample(PROMPT, 1, seed=60, max_tokens=4)
    assert hit.cached_prompt_tokens == 32
    assert hit.token_ids == missed.token_ids
    assert torch.equal(hit.experts, missed.experts)


def test_a_second_turn_reports_the_experts_of_its_whole_context(engine: Live, policy: Policy) -> None:
    tree = Tree()
    [first] = engine.sample(PROMPT, 1, seed=70, max_tokens=6)
    context = [*PROMPT, *first.token_ids, 20, 21, 22]
    tree.add(PROMPT, first, 0)
    tree.add(context, engine.sample(context, 1, seed=71, max_tokens=6)[0], 1)
    batch = collate(tree.rows(group=0, episode=0, reward=1.0))
    assert batch.experts.shape[:2] == (1, len(context) + 5)
    d, (_, tokens, moved_pairs, _) = differences(policy, batch, replayed=True)
    assert (tokens, moved_pairs) == (len(context) + 5, 0)
    assert d.abs().max() <= 1e-5


def test_the_doctor_compares_both_ways_and_finds_nothing(engine: Live, model: Path) -> None:
    config = config_of(model)
    pair = Pair(config, engine, make_learner(config))
    examined = examiner(pair, ["12+34=", "5*6="])
    check = [*examined_findings(pair, examined)]
    assert check == []


def examined_findings(pair: Pair, examined: Any) -> list[str]:
    import asyncio

    async def ask() -> list[str]:
        check = await examined.examine(1)
        found = await Comparisons(examined)._routing()
        assert [c.name.split("|")[1].strip() for c in found] == [
            "trainer with the engine's experts",
            "trainer with its own experts",
        ]
        assert all(c.gap.mean_abs <= 1e-5 for c in found)
        assert "0 of" in found[1].note
        return [str(f) for f in check.findings]

    return asyncio.run(ask())


def test_an_update_under_way_changes_experts_with_the_weights(engine: Live, tiny: Callable, model: Path) -> None:
    """The last test of this engine, which holds other weights afterwards."""
    family = "olmoe" if "olmoe" in (model / "config.json").read_text() else "qwen3_moe"
    old = load(str(model), dtype="float32", fp32_head=True, share_prompts=True)
    other = tiny(family=family, **SIZES, **FAMILIES[family], seed=1)
    new = load(str(other), dtype="float32", fp32_head=True, share_prompts=True)
    engine.update(engine.open_sender(LearnerWeights(old.hf, sharded=False)), 5)
    sender = engine.open_sender(LearnerWeights(new.hf, sharded=False))
    running = engine.keep_sampling(PROMPT, 2, tokens=24)
    engine.update(sender, 6)
    across = [c for c in running.result(300) if set(c.versions) == {5, 6}]
    assert across
    batch = batch_of(across)
    d, _ = differences(old, batch, replayed=True)
    assert d[(batch.versions == 5)[batch.mask]].abs().max() <= 1e-5
    fresh = batch_of(engine.sample(PROMPT, 4, seed=7, max_tokens=12))
    assert differences(new, fresh, replayed=True)[0].abs().max() <= 1e-5
    assert differences(old, fresh, replayed=False)[1][0] > 0


def test_in_bf16_replay_is_worth_half_of_k3_or_more(live: Callable, model: Path) -> None:
    engine = live(config_of(model, "bfloat16"))
    batch = batch_of(engine.sample(PROMPT, 16, seed=3, max_tokens=16))
    engine.close()
    policy = load(str(model), dtype="bfloat16", fp32_head=True, share_prompts=True)
    with_replay, _ = differences(policy, batch, replayed=True)
    without, (moved, tokens, _, _) = differences(policy, batch, replayed=False)
    print(f"k3 {k3(with_replay):.1e} with replay, {k3(without):.1e} without; {moved} of {tokens} tokens differ")
    assert moved > 0.01 * tokens
    assert k3(with_replay) <= 0.5 * k3(without)
