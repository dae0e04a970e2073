"""New weights reach a sampling engine whole, and what it samples afterwards is what the trainer would say."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from live import THREAD, Live, engine_config
from pair import make_learner
from rl.batch import collate, trajectory
from rl.config import RolloutConfig
from rl.types import Completion, Prompt
from rl.weights import TensorMeta, check_digests
from rollout.engine import Engine
from rollout.scorer import Scorer
from trainer.learner.weights import LearnerWeights
from trainer.model.policy import load
from trainer.prompts import load_tokenizer

PROMPT = list(range(10, 80))


def trainer_logprobs(model: str, completions: list[Completion], temperature: float = 1.0) -> list[torch.Tensor]:
    policy = load(model, dtype="float32", fp32_head=True, share_prompts=False)
    prompt = Prompt(ordinal=0, token_ids=PROMPT, task={})
    batch = collate([trajectory(prompt, c, 0.0, {}) for c in completions])
    with torch.no_grad():
        out = policy(batch.input_ids, batch.mask, temperature).logprobs
    return [row[mask] for row, mask in zip(out, batch.mask, strict=True)]


def gap(model: str, completions: list[Completion]) -> float:
    mine = torch.cat(trainer_logprobs(model, completions))
    theirs = torch.tensor([x for c in completions for x in c.logprobs])
    return float((mine - theirs).abs().mean())


@pytest.fixture(scope="module", params=["qwen2-untied", "llama-tied"])
def pair(request: pytest.FixtureRequest, live: Callable, tiny: Callable) -> tuple[Live, Path, Path]:
    family, tying = request.param.split("-")
    old, new = (tiny(family=family, tied=tying == "tied", seed=seed) for seed in (0, 1))
    return live(engine_config(old)), old, new


def test_an_update_under_way_keeps_every_request_and_switches_versions_inside_sequences(
    pair: tuple[Live, Path, Path],
) -> None:
    engine, old, new = pair
    assert gap(str(old), engine.sample(PROMPT, 4, seed=1)) <= 1e-5

    hf = AutoModelForCausalLM.from_pretrained(new)
    weights = LearnerWeights(hf, sharded=False)
    weights.digesting = True
    sender = engine.open_sender(weights)
    assert {m.name for m in weights.metadata()} == engine.wait(engine.engine.expected_weights())

    engine.wait(engine.engine.listen_to_weights(True))
    running = engine.keep_sampling(PROMPT, 8)
    engine.update(sender, 1)
    done = running.result(300)

    # Every tensor arrived bit for bit.
    check_digests(weights.digests, engine.wait(engine.engine.received_digests())[0], "the engine")
    engine.wait(engine.engine.listen_to_weights(False))
    # No request was lost, and some were in flight.
    assert engine.wait(engine.engine.counters())["aborted"] == 0
    across = [c for c in done if set(c.versions) == {0, 1}]
    assert len(across) >= 2, [sorted(set(c.versions)) for c in done]
    # Before the switch the old weights spoke, after it the new ones, over the old weights' KV.
    before, after = kept_cache_gaps(old, new, across)
    assert before <= 1e-5
    assert after <= 1e-5
    # What starts afterwards is the new policy's alone: no stale prefix, no stale head.
    fresh = engine.sample(PROMPT, 8, seed=3)
    assert all(set(c.versions) == {1} for c in fresh)
    assert gap(str(new), fresh) <= 1e-5
    assert gap(str(old), fresh) > 0.1


def test_with_recompute_kv_what_follows_an_update_is_the_new_weights_alone(live: Callable, tiny: Callable) -> None:
    old, new = (tiny(family="qwen2", tied=False, seed=seed) for seed in (0, 1))
    config = engine_config(old)
    engine = live(replace(config, rollout=replace(config.rollout, recompute_kv=True)))
    sender = engine.open_sender(LearnerWeights(AutoModelForCausalLM.from_pretrained(new), sharded=False))
    running = engine.keep_sampling(PROMPT, 8)
    engine.update(sender, 1)
    across = [c for c in running.result(300) if set(c.versions) == {0, 1}]
    assert len(across) >= 2
    assert engine.wait(engine.engine.counters())["aborted"] == 0
    mine = trainer_logprobs(str(new), across)
    theirs = [torch.tensor(c.logprobs) for c in across]
    after = [torch.tensor(c.versions) == 1 for c in across]
    assert float(torch.cat([(m - t)[a] for m, t, a in zip(mine, theirs, after, strict=True)]).abs().mean()) <= 1e-5
    assert kept_cache_gaps(old, new, across)[1] > 1e-3


def test_two_threads_load_halves_of_about_the_same_size_and_no_layer_is_split() -> None:
    from rollout.weights.staged import LayerSplit

    names = ["embed", *[f"layers.{i}.{part}" for i in range(12) for part in ("q", "o")], "head"]
    sizes = {"embed": 600, "head": 600}
    weights = [(name, torch.zeros(sizes.get(name, 50), dtype=torch.uint8)) for name in names]
    split = LayerSplit()
    # Buckets cut layers; their parts meet in the same half.
    shares: tuple[list[str], list[str]] = ([], [])
    for start in range(0, len(weights), 5):
        for share, half in zip(shares, split.halves(weights[start : start + 5]), strict=True):
            share += [name for name, _ in half]
    assert sorted(shares[0] + shares[1]) == sorted(names)
    layers = [{name.split(".")[1] for name in share if "." in name} for share in shares]
    assert layers[0].isdisjoint(layers[1])
    assert abs(split.bytes[0] - split.bytes[1]) <= 600


def kept_cache_gaps(old: Path, new: Path, completions: list[Completion]) -> tuple[float, float]:
    """Mean |trainer - engine| before and after the switch, where the trainer keeps the KV that the engine kept."""
    models = {0: AutoModelForCausalLM.from_pretrained(old), 1: AutoModelForCausalLM.from_pretrained(new)}
    gaps: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for c in completions:
        ids, cache, fed = PROMPT + c.token_ids, DynamicCache(), 0
        switch = c.versions.index(1)
        for version, start, end in ((0, 0, switch), (1, switch, len(c.token_ids))):
            # The KV of a version's first input token was computed by that version.
            upto = len(PROMPT) + end - 1
            with torch.no_grad():
                logits = models[version](torch.tensor([ids[fed:upto]]), past_key_values=cache, use_cache=True).logits[0]
            offset = len(PROMPT) + start - 1 - fed
            said = logits.log_softmax(-1)[offset : offset + end - start]
            target = torch.tensor(c.token_ids[start:end])
            mine = said.gather(1, target[:, None])[:, 0]
            gaps[version].append((mine - torch.tensor(c.logprobs[start:end])).abs())
            fed = upto
    return float(torch.cat(gaps[0]).mean()), float(torch.cat(gaps[1]).mean())


def test_a_prefix_is_shared_within_a_version_and_not_across_an_update(pair: tuple[Live, Path, Path]) -> None:
    engine, _, new = pair
    prompt = list(range(20, 90))
    assert engine.sample(prompt, 1, seed=5)[0].cached_prompt_tokens == 0
    assert engine.sample(prompt, 1, seed=5)[0].cached_prompt_tokens >= 32
    sender = engine.open_sender(LearnerWeights(AutoModelForCausalLM.from_pretrained(new), sharded=False))
    engine.update(sender, engine.version + 1)
    assert engine.sample(prompt, 1, seed=5)[0].cached_prompt_tokens == 0


def test_a_request_that_waits_for_its_turn_over_an_update_finds_nothing_of_the_old_weights(
    live: Callable, tiny: Callable
) -> None:
    old, new = (tiny(family="qwen2", tied=False, seed=seed) for seed in (0, 1))
    rollout = RolloutConfig(max_tokens=100, max_model_len=320, max_num_seqs=2, kv_cache_gib=0.25)
    engine = live(engine_config(old, rollout=rollout))
    sender = engine.open_sender(LearnerWeights(AutoModelForCausalLM.from_pretrained(new), sharded=False))
    # Its prompt is in the cache now, under the old weights.
    assert set(engine.sample(PROMPT, 1, seed=1, max_tokens=1)[0].versions) == {0}
    # Two run, and the others wait.
    running = engine.submit(engine.engine.sample(PROMPT, 12, 5))
    engine.update(sender, 1)
    done = running.result(300)
    waited = [c for c in done if set(c.versions) == {1}]
    assert len(waited) >= 4, [sorted(set(c.versions)) for c in done]
    assert gap(str(new), waited) <= 1e-5
    assert engine.wait(engine.engine.counters())["aborted"] == 0


def test_a_request_that_comes_in_during_a_pause_waits_and_runs_on_the_new_version(
    pair: tuple[Live, Path, Path],
) -> None:
    engine, _, new = pair
    sender = engine.open_sender(LearnerWeights(AutoModelForCausalLM.from_pretrained(new), sharded=False))
    engine.wait(engine.engine.pause())
    early = engine.submit(engine.engine.sample(PROMPT, 1, 7))
    for _ in range(3):
        engine.wait(engine.engine.expected_weights())  # a way to vLLM's process and back, which a token takes too
    assert not early.done()
    engine.version += 1
    sender.send_weights()
    engine.wait(engine.engine.resume())
    assert set(early.result(300)[0].versions) == {engine.version}


def test_an_engine_that_sleeps_keeps_its_requests_and_goes_on_with_the_new_weights(
    pair: tuple[Live, Path, Path],
) -> None:
    """On CPU vLLM keeps the memory, but its scheduler stops and resumes as on a GPU."""
    engine, _, new = pair
    own, old = engine.engine, engine.version
    sender = engine.open_sender(LearnerWeights(AutoModelForCausalLM.from_pretrained(new), sharded=False))
    running = engine.keep_sampling(PROMPT, 4)
    engine.wait(own.sleep())
    later = engine.submit(own.sample(PROMPT, 2, 7))
    engine.update(sender, old + 1)
    # It has weights again and no KV cache: nothing may run, and vLLM has not resumed by itself.
    assert engine.wait(own.llm.is_sleeping())
    assert not later.done()
    engine.wait(own.wake())
    assert not engine.wait(own.llm.is_sleeping())
    assert {old, old + 1} in [set(reply.versions) for reply in running.result(300)]
    fresh = later.result(300)
    assert {version for reply in fresh for version in reply.versions} == {old + 1}
    assert gap(str(new), fresh) <= 1e-5
    assert engine.wait(own.counters())["aborted"] == 0


def test_an_engine_keeps_no_memory_of_past_updates_committed_or_not(live: Callable, tiny: Callable) -> None:
    model = tiny(intermediate_size=16384)
    engine = live(engine_config(model))
    hf = AutoModelForCausalLM.from_pretrained(model)
    megabytes = sum(p.nbytes for p in hf.parameters()) / 1e6
    assert megabytes > 45
    core = engine.engine.llm.engine_core
    # The process that holds the model.
    process = psutil.Process() if THREAD else psutil.Process(core.resources.engine_manager.processes[0].pid)
    sender = engine.open_sender(LearnerWeights(hf, sharded=False))
    rss = []
    for update in range(1, 17):
        commits = engine.finish_weight_update
        if update % 2:
            engine.finish_weight_update = lambda: None
        engine.update(sender, update)
        engine.finish_weight_update = commits
        rss.append(process.memory_info().rss / 1e6)
    # The first updates fill what the allocator keeps for the next: one model beside the live one.
    assert rss[-1] - rss[5] < 2 * megabytes, [round(x) for x in rss]


def test_an_exported_model_is_one_that_transformers_and_vllm_load(
    live: Callable, tiny: Callable, tmp_path: Path
) -> None:
    learner = make_learner(engine_config(tiny(family="llama", tied=True)))
    learner.perturb(2)
    learner.export(str(tmp_path))
    learner.perturb(2)
    load_tokenizer(learner.config.model).save_pretrained(tmp_path)
    said = live(engine_config(tmp_path)).sample(PROMPT, 4, seed=1)
    assert gap(str(tmp_path), said) <= 1e-5
    assert gap(learner.config.model, said) > 1e-3


def test_an_incomplete_update_is_refused_and_names_what_is_missing(pair: tuple[Live, Path, Path]) -> None:
    engine, _, new = pair
    weights = LearnerWeights(AutoModelForCausalLM.from_pretrained(new), sharded=False)
    del weights.parameters["model.layers.1.self_attn.k_proj.weight"]
    sender = engine.open_sender(weights)
    with pytest.raises(ValueError, match=r"1 missing \(first: \['model.layers.1.self_attn.k_proj.weight'\]\)"):
        sender.send_weights()
    # Nothing was begun, so the engine goes on with the weights it has.
    assert gap(str(new), engine.sample(PROMPT, 2, seed=9)) <= 1e-5


def test_an_update_that_fails_gathers_to_its_end_so_that_no_rank_waits_for_the_sender() -> None:
    from rollout.weights.sender import GlooSender

    class Three:
        left = ["a", "b", "c"]

        def metadata(self) -> list[TensorMeta]:
            return [TensorMeta(name=name, dtype="float32", shape=(2,)) for name in "abc"]

        def __iter__(self):
            while self.left:
                yield self.left.pop(0), torch.zeros(2)

    class Refuses:
        version = 1

        def stage_weights(self, version: int) -> None:
            raise ConnectionError("engine 0 is gone")

    weights = Three()
    sender = GlooSender.__new__(GlooSender)
    sender.weights, sender.expected, sender.client, sender.outbox = weights, set("abc"), Refuses(), object()
    with pytest.raises(ConnectionError, match="engine 0 is gone"):
        sender.send_weights()
    assert weights.left == []


@pytest.mark.parametrize("kind", [Engine, Scorer])
def test_a_core_that_ends_as_it_is_killed_leaves_nothing_open(kind: type) -> None:
    closed = []

    class Late:
        """vLLM raises this out of its shutdown, whose last part then has not run."""

        def shutdown(self, timeout: float) -> None:
            raise psutil.NoSuchProcess(1)

        engine_core = SimpleNamespace(resources=lambda: closed.append("resources"))

    engine = kind.__new__(kind)
    engine.endpoint, engine.llm = None, Late()
    asyncio.run(engine.close())
    assert closed == ["resources"]
    assert not hasattr(engine, "llm")
