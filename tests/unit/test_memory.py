"""What a run needs is reckoned before it starts, and one that cannot fit is refused with what would help."""

import math
import re
from dataclasses import replace
from mmap import mmap

import pytest
import torch

import trainer.plan.memory
from models import SIZES, make_model
from rl.config import Config, Lora, RolloutConfig, TrainerConfig
from rl.environments import Limits
from rl.objectives import GRPO
from rl.types import Data
from trainer.cluster.placement import place
from trainer.learner.memory_meter import PeakMemory
from trainer.model.files import model_config, without_weights
from trainer.model.policy import load
from trainer.plan.memory import BESIDE, DRIVER, Memory, Shape, available_memory, remedies, required_memory, shape_of

BILLION = Shape(parameters=2**30, layers=16, hidden=1024, inner=4096, vocabulary=2**15, adapted=2**20)


def found(shape=BILLION, *, cuda=True, rollout=None, **settings):
    trainer = TrainerConfig(**{k: settings.pop(k) for k in list(settings) if k in TrainerConfig.__dataclass_fields__})
    data, reward = (lambda: Data(train=[])), (lambda r: 0.0)
    rollout = rollout or RolloutConfig(tensor_parallel=2 if cuda else 1)
    config = Config(name="t", model="m", data=data, reward=reward, trainer=trainer, rollout=rollout, **settings)
    return config, required_memory(config, place(config, cuda=cuda), shape)


def memory(places, limits):
    return Memory(shape=BILLION, required=places, available=limits)


def check(config, places, limits):
    memory(places, limits).check(config)


@pytest.mark.parametrize(
    ("stage", "dtype", "weights", "gradients", "optimizer"),
    [
        # 2^30 parameters over 4 ranks: 2 + 4 + 12 GiB, divided where the stage shards; at stage 1 the gradients of
        # bf16 weights lie beside their fp32 sums. Stage 0 is fp32 alone: its weights are its masters.
        (0, "float32", 4, 4, 8),
        (1, "float32", 4, 4, 3),
        (1, "bfloat16", 2, 6, 3),
        (2, "bfloat16", 2, 1, 3),
        (3, "bfloat16", 0.5, 1, 3),
    ],
)
def test_memory_of_a_billion_parameters_by_zero_stage(stage, dtype, weights, gradients, optimizer):
    _, places = found(ranks=4, zero_stage=stage, dtype=dtype)
    rank = places["learner rank"]
    assert (rank["weights"], rank["gradients"], rank["masters and Adam"]) == (weights, gradients, optimizer)
    assert places["engine"]["weights"] == (1.0 if dtype == "bfloat16" else 2.0)


def test_offload_moves_masters_and_moments_of_all_ranks_to_the_host():
    _, places = found(ranks=4, zero_stage=2, offload="optimizer")
    assert "masters and Adam" not in places["learner rank"]
    # fp32 masters and two moments, fp32 gradients, a bf16 copy of the masters.
    assert places["host"]["offloaded masters, gradients and Adam"] == 12.0 + 4.0 + 2.0
    assert "gradients again, flat, for the step" not in places["learner rank"]
    _, sharded = found(ranks=4, zero_stage=3, offload="optimizer")
    assert sharded["host"]["offloaded masters, gradients and Adam"] == 20.0


def test_the_host_has_what_its_container_may_still_allocate(monkeypatch):
    monkeypatch.setattr(trainer.plan.memory.machine, "memory", lambda: 6.0 * 2**30)
    config, _ = found(cuda=False)
    assert available_memory(config, place(config, cuda=False))["host"] == 6.0


def test_adapters_need_neither_a_reference_model_nor_gradients_of_the_base():
    _, full = found(objective=GRPO(kl_coef=0.01), dtype="float32", zero_stage=0)
    _, lora = found(objective=GRPO(kl_coef=0.01), dtype="float32", zero_stage=0, lora=Lora(rank=16))
    assert full["learner rank"]["reference model"] == 4.0
    assert "reference model" not in lora["learner rank"]
    # 16 * 2^20 parameters of adapters.
    assert lora["learner rank"]["weights"] == 4 + 4 / 64
    assert (lora["learner rank"]["gradients"], lora["learner rank"]["masters and Adam"]) == (4 / 64, 8 / 64)


def test_activations_and_the_head_grow_with_the_tokens_of_a_pass():
    _, places = found(micro_batch_tokens=4096)
    layer = 2 * 4096 * (12 * 1024 + 4 * 4096) / 2**30
    assert places["learner rank"]["activations"] == 16 * layer
    _, less = found(micro_batch_tokens=4096, gradient_checkpointing=True)
    assert less["learner rank"]["activations"] == layer + 16 * 2 * 4096 * 1024 / 2**30
    # On tensor cores: three arrays of 2048 tokens, and the gradient of the weight.
    assert places["learner rank"]["head"] == 4 * 2**15 * (3 * 2048 + 1024) / 2**30


def test_a_pass_takes_512_tokens_on_cpu_and_4096_on_gpus_unless_the_config_sets_them():
    per_token = 16 * 2 * (12 * 1024 + 4 * 4096) / 2**30
    short = RolloutConfig(max_tokens=64, max_model_len=256)
    for settings, cpu, cuda in (({}, 512, 4096), ({"micro_batch_tokens": 300}, 300, 300)):
        settings |= {"rollout": short}
        assert found(cuda=False, **settings)[1]["learner rank"]["activations"] == cpu * per_token
        assert found(cuda=True, **settings)[1]["learner rank"]["activations"] == cuda * per_token


class Waits:
    """An environment."""

    def __init__(self, task):
        self.task = task

    def reward(self, episode):
        return 0.0


@pytest.mark.parametrize("env", [None, Waits])
def test_the_longest_row_is_a_pass_of_its_own_where_it_exceeds_the_budget(env):
    per_token = 16 * 2 * (12 * 1024 + 4 * 4096) / 2**30
    rollout = RolloutConfig(max_tokens=64, max_model_len=2048)
    reward = None if env else (lambda reply: 0.0)
    config = Config(name="t", model="m", data=Data(train=[]), reward=reward, env=env, rollout=rollout, device="cpu")
    rank = required_memory(config, place(config, cuda=False), BILLION)["learner rank"]
    assert rank["activations"] == 2048 * per_token
    assert "rollout.max_model_len below 2048, the longest row" in remedies(config, "learner rank")
    few = replace(config, rollout=replace(rollout, max_model_len=256))
    assert not any("max_model_len" in remedy for remedy in remedies(few, "learner rank"))


def test_an_episode_has_as_many_sampled_tokens_as_its_limits_allow():
    settings = {"prompts_per_step": 1, "group_size": 2, "rollout": RolloutConfig(max_tokens=8, max_model_len=1024)}
    for limits, tokens in ((Limits(), 256), (Limits(tokens=20), 40)):
        given = {"name": "t", "model": "m", "data": Data(train=[]), "env": Waits, "limits": limits, "device": "cpu"}
        config = Config(**given, **settings)
        rank = required_memory(config, place(config, cuda=False), BILLION)["learner rank"]
        assert rank["head"] == 4 * 2**15 * (2 * tokens + 2 * 1024) / 2**30


def test_on_cpu_the_host_holds_every_process_and_the_weights_on_their_way():
    rollout = RolloutConfig(engines=2, kv_cache_gib=3.0)
    _, places = found(cuda=False, rollout=rollout, ranks=2, save_every=0)
    engine, rank = (sum(places[name].values()) for name in ("engine", "learner rank"))
    assert places["engine"]["KV cache"] == 3.0
    assert sum(places["host"].values()) == pytest.approx(2 * engine + 2 * rank + 2 + DRIVER)


def test_what_cannot_fit_is_refused_with_the_parts_and_only_with_remedies_that_are_left(monkeypatch):
    config, places = found(ranks=4, zero_stage=1)
    check(config, places, {"learner rank": 80, "engine": 80, BESIDE: 12, "host": math.inf})
    message = r"the learner rank needs .* \(gradients 6\.00, .*8\.0 are available\..*zero_stage=2 or more; .*offload"
    tight = {"learner rank": 8, "engine": 80, BESIDE: 12, "host": math.inf}
    with pytest.raises(ValueError, match=message):
        check(config, places, tight)
    small = {"zero_stage": 3, "gradient_checkpointing": True, "micro_batch_tokens": 256, "offload": "optimizer"}
    short = RolloutConfig(tensor_parallel=2, max_tokens=64, max_model_len=128)
    config, places = found(ranks=4, sequence_parallel=4, lora=Lora(rank=8), rollout=short, **small)
    with pytest.raises(ValueError, match=re.escape("What would help: a smaller model. ")):
        check(config, places, tight | {"learner rank": 1})
    monkeypatch.setenv("UNISON_IGNORE_MEMORY", "1")
    check(config, places, tight | {"learner rank": 1})


def test_too_large_a_cache_is_named_for_the_host():
    config, places = found(cuda=False, rollout=RolloutConfig(kv_cache_gib=500.0))
    with pytest.raises(ValueError, match=r"the host needs .* \(1 x engine 50\d.*rollout.kv_cache_gib below 500"):
        check(config, places, {"learner rank": math.inf, "engine": math.inf, "host": 64})


def test_on_several_gpus_an_update_needs_buffers_on_both_sides_and_deepspeed_needs_its_bucket():
    config, places = found(ranks=4, zero_stage=1, dtype="bfloat16")
    embedding = 2 * 2**15 * 1024 / 2**30
    under_way = {"weights under way": 2 * (0.25 + embedding), "NCCL": 1.0}
    assert places[BESIDE] == under_way
    assert under_way.items() <= places["learner rank"].items()
    assert places["learner rank"]["DeepSpeed's reduce bucket"] == 4 * 5e8 / 2**30
    assert found(ranks=4, zero_stage=2, dtype="bfloat16")[1]["learner rank"]["DeepSpeed's reduce bucket"] == 1e9 / 2**30
    assert places["host"]["the model, before it goes to the GPUs"] == 4 * 2.0
    small = {"learner rank": 80, "engine": 80, BESIDE: 1.5, "host": math.inf}
    with pytest.raises(
        ValueError, match=r"next to its share of the GPU needs 1\.6 .*gpu_memory_utilization below 0\.85; a"
    ):
        check(config, places, small)


def test_on_a_shared_gpu_the_engine_can_give_the_learner_room():
    one = {"share_gpu": True, "rollout": RolloutConfig(max_tokens=64, max_model_len=256)}
    config, places = found(replace(BILLION, hidden=16384), zero_stage=1, dtype="bfloat16", **one)
    assert BESIDE not in places
    assert "NCCL" not in places["learner rank"]
    assert places["learner rank"]["weights under way"] == 2 * 1.0  # the embedding is larger than the smallest buffer
    with pytest.raises(ValueError, match=r"learner rank needs .*help: rollout\.gpu_memory_utilization below"):
        check(config, places, {"learner rank": 12, "engine": 68, "host": math.inf})
    config, places = found(ranks=1, zero_stage=1)  # with a GPU of its own that is no remedy
    with pytest.raises(ValueError, match=r"What would help: trainer\.gradient_checkpointing"):
        check(config, places, {"learner rank": 12, "engine": 68, BESIDE: 12, "host": math.inf})


def test_gpus_that_this_machine_does_not_have_are_not_held_against_it():
    config, places = found()
    limits = available_memory(config, place(config, cuda=True))
    if not torch.cuda.is_available():
        assert set(limits.values()) == {math.inf}
    assert ("memory: engine", f"{sum(places['engine'].values()):.2f} GiB") in memory(
        places, dict.fromkeys(limits, math.inf)
    ).rows()


def test_the_shape_of_a_model_is_that_of_the_model(tmp_path):
    make_model(tmp_path, tied=True)
    shape = shape_of(without_weights(model_config(str(tmp_path))))
    policy = load(str(tmp_path), dtype="float32", fp32_head=True, share_prompts=False, lora=Lora(rank=3))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert shape.adapted * 3 == trained
    assert shape.parameters == sum(p.numel() for p in policy.parameters()) - trained
    assert (shape.layers, shape.hidden, shape.inner) == tuple(
        SIZES[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )


def test_ranks_that_share_a_row_share_its_activations():
    _, alone = found(ranks=2, micro_batch_tokens=4096)
    _, shared = found(ranks=2, micro_batch_tokens=4096, sequence_parallel=2)
    assert shared["learner rank"]["activations"] == alone["learner rank"]["activations"] / 2


def test_each_phase_has_the_peak_of_its_own():
    memory = PeakMemory(torch.device("cpu"))
    with memory.during("small"):
        torch.ones(1000)
    with memory.during("large"), mmap(-1, 2**28) as fresh:  # pages that no allocator has kept from another test
        for _ in range(256):
            fresh.write(bytes(2**20))
    with memory.during("later"):
        torch.ones(1000)
    small, large, later = memory.report().values()
    assert small + 0.2 < large < small + 0.5
    assert later < large - 0.2
    assert memory.report() == {}
