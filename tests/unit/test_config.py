"""Settings that cannot work are refused with the remedy, before anything starts."""

import re
from dataclasses import replace

import pytest

from rl.config import Config, Lora, RolloutConfig, TrainerConfig
from rl.filters import ZeroAdvantage
from rl.objectives import GRPO, GSPO, M2PO, PPO, RLOO, ReinforcePP
from rl.objectives.corrections import TokenTIS
from rl.rewards.shaping import SoftOverlong
from rl.sampling.truncation import Truncation
from rl.types import Data
from rl.validate import check
from trainer.cluster.placement import check_fits, default_threads, engine_threads, learner_threads, place
from trainer.plan.plan import make_plan
from trainer.plan.rules import check_truncation


def config_of(**settings):
    return Config(**({"name": "t", "model": "m", "data": lambda: Data(train=[]), "reward": lambda r: 0.0} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"prompts_per_step": 0}, "prompts_per_step=0 must be at least 1"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"eval_samples": 0}, "eval_samples=0 must be at least 1"),
        ({"trainer": TrainerConfig(micro_batch_tokens=0)}, "trainer.micro_batch_tokens=0 must be at least 1"),
        ({"max_staleness": -1}, "max_staleness=-1 must be at least 0 (0 is synchronous)"),
        ({"temperature": 0.0}, "use a temperature above 0 (eval_temperature may be 0)"),
        ({"temperature": -1.0}, "temperature=-1.0: greedy"),
        (
            {"objective": GRPO(), "group_size": 1},
            "GRPO only zero advantages, because it compares samples",
        ),
        ({"objective": GSPO(), "group_size": 1}, "use group_size >= 2, or PPO"),
        ({"max_filtered": 0}, "max_filtered=0 must be at least 1"),
        (
            {"trainer": TrainerConfig(ranks=3, sequence_parallel=2)},
            "trainer.sequence_parallel=2 must divide trainer.ranks=3",
        ),
        ({"trainer": TrainerConfig(zero_stage=0)}, "zero_stage=0 with dtype=bfloat16 has no fp32 gradients"),
        (
            {"trainer": TrainerConfig(zero_stage=0, offload="optimizer"), "dtype": "float32"},
            "trainer.offload=optimizer needs DeepSpeed's own optimizer: use zero_stage 1, 2 or 3",
        ),
        ({"trainer": TrainerConfig(lora=Lora(rank=-1))}, "rank=-1 must be at least 0"),
        ({"trainer": TrainerConfig(lora=Lora(rank=4, alpha=0.0))}, "alpha=0 above 0"),
        ({"trainer": TrainerConfig(value_lr=-1.0)}, "trainer.value_lr=-1.0 must not be negative"),
        ({"objective": GSPO(kl_target=0.02)}, "kl_target=0.02 needs to be above 0, and a kl_coef above 0"),
        (
            {"objective": RLOO(kl_coef=0.05, kl_in="loss")},
            "k1 in the loss has no gradient on average (rl/objectives/kl.py)",
        ),
        ({"objective": GRPO(kl_coef=-0.1)}, "kl_coef=-0.1 and entropy_coef=0 must not be negative"),
        ({"objective": GRPO(entropy_coef=-0.1)}, "kl_coef=0 and entropy_coef=-0.1 must not be negative"),
        ({"eval_every": -1}, "eval_every=-1 must be at least 0 (0 evaluates at the start and the end only)"),
        ({"rollout": RolloutConfig(retries=-1)}, "rollout.retries=-1 must be at least 0"),
        (
            {"filters": (ZeroAdvantage(),), "objective": PPO(), "group_size": 1},
            "ZeroAdvantage would take every group: remove it",
        ),
        (
            {"reward": SoftOverlong(reward=lambda reply: 1.0, max_tokens=1024, buffer=128)},
            "SoftOverlong(max_tokens=1024) punishes by another limit than rollout.max_tokens=256",
        ),
        ({"objective": GSPO(entropy_target=0.0)}, "entropy_target=0 must be above 0 nats per token"),
        (
            {"trainer": TrainerConfig(value_lr=1e-3)},
            "value_lr=0.001 has no value head to train: GSPO has",
        ),
        ({"objective": PPO(critic_warmup=100)}, "critic_warmup=100 covers all 100 optimizer steps of the run"),
        ({"objective": M2PO(), "old_logprobs": "rollout"}, "use old_logprobs='recompute' (or 'auto')"),
        (
            {"correction": TokenTIS(), "old_logprobs": "rollout"},
            "TokenTIS weighs by the trainer's log-probabilities against the engine's",
        ),
        ({"objective": M2PO(), "correction": TokenTIS()}, "so TokenTIS would count the mismatch twice"),
        ({"rollout": RolloutConfig(top_p=0.0)}, "rollout.top_p=0.0 must be above 0 and at most 1 (1 is off)"),
        ({"rollout": RolloutConfig(top_k=-1)}, "rollout.top_k=-1 must be at least 1, or 0 (which is off)"),
        ({"rollout": RolloutConfig(min_p=2.0)}, "rollout.min_p=2.0 must be between 0 (which is off) and 1"),
        (
            {"rollout": RolloutConfig(max_tokens=512, max_model_len=512)},
            "rollout.max_tokens=512 leaves no room for a prompt in 512 tokens",
        ),
        (
            {"prompts_per_step": 2, "group_size": 4, "trainer": TrainerConfig(minibatches=9)},
            "trainer.minibatches=9 exceeds the 8 sequences of a step",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_the_remedy(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(config_of(**settings))


def test_the_defaults_and_the_limits_pass():
    check(config_of())
    check(config_of(objective=PPO(critic_warmup=99), group_size=1, trainer=TrainerConfig(value_lr=1e-4)))
    check(config_of(objective=ReinforcePP(), group_size=1))
    check(config_of(objective=M2PO()))
    check(config_of(prompts_per_step=2, group_size=4, trainer=TrainerConfig(minibatches=8)))
    check(config_of(trainer=TrainerConfig(zero_stage=0, lora=Lora(rank=1)), dtype="float32"))
    check(config_of(trainer=TrainerConfig(offload="optimizer")))
    check(config_of(rollout=RolloutConfig(max_tokens=511, max_model_len=512)))
    check(config_of(rollout=RolloutConfig(top_p=0.9, top_k=20, min_p=0.1)))


def test_what_keeps_the_whole_vocabulary_is_no_truncation():
    assert RolloutConfig().truncation is None
    assert RolloutConfig(top_p=0.9, top_k=20, min_p=0.1).truncation == Truncation(top_p=0.9, top_k=20, min_p=0.1)


CUTS = [{"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 20}, {"top_p": 0.9, "top_k": 20, "min_p": 0.1}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_on_a_gpu_the_engine_reports_the_kept_tokens_of_any_cut(cut):
    check_truncation(config_of(rollout=RolloutConfig(**cut), doctor="off"), "cuda")


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_truncation_on_cpu_needs_fp32_on_both_sides_and_the_doctor(cut):
    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            check_truncation(config_of(rollout=RolloutConfig(**cut), **settings), "cpu")

    check_truncation(config_of(rollout=RolloutConfig(**cut), dtype="float32"), "cpu")
    refused("dtype=bfloat16, fp32_head=True round them; set dtype=float32", dtype="bfloat16")
    refused("dtype=float32, fp32_head=False round them; set dtype=float32", dtype="float32", fp32_head=False)
    refused("only the doctor shows that they are; set doctor=short", dtype="float32", doctor="off")


def test_without_truncation_none_of_this_is_asked_for():
    for device in ("cpu", "cuda"):
        check_truncation(config_of(doctor="off", fp32_head=False), device)


def test_truncation_is_refused_before_anything_starts():
    settings = {"model": "owner/name", "rollout": RolloutConfig(top_p=0.9)}
    with pytest.raises(ValueError, match=r"on cpu: .* dtype=bfloat16"):
        make_plan(config_of(device="cpu", **settings))
    assert make_plan(config_of(device="cpu", dtype="float32", **settings)).placement.device == "cpu"


def placed(*, cuda=True, engines=1, tensor_parallel=1, ranks=1, sequence_parallel=1, **settings):
    rollout = RolloutConfig(engines=engines, tensor_parallel=tensor_parallel)
    trainer = TrainerConfig(ranks=ranks, sequence_parallel=sequence_parallel)
    return place(config_of(rollout=rollout, trainer=trainer, **settings), cuda=cuda)


def test_a_run_on_gpus_needs_those_of_its_engines_and_ranks():
    got = placed(engines=2, tensor_parallel=4, ranks=3)
    assert (got.device, got.backend, got.gpus) == ("cuda", "nccl", 11)


def test_a_run_without_gpus_goes_over_gloo_and_asks_for_none():
    for got in (placed(cuda=False, engines=2, ranks=2), placed(cuda=True, device="cpu")):
        assert (got.device, got.backend, got.gpus) == ("cpu", "gloo", 0)


def test_too_many_gpus_name_both_numbers_and_where_they_come_from():
    placement = placed(engines=2, tensor_parallel=4, ranks=3)
    check_fits(placement, gpus=11)
    with pytest.raises(
        ValueError, match=r"needs 11 GPUs \(2 engines x 4 \+ 3 learner ranks x 1\).*cluster has 8\. Lower"
    ):
        check_fits(placement, gpus=8)


def test_asking_for_cuda_where_there_is_none_says_so():
    with pytest.raises(ValueError, match=r"needs 2 GPUs.*the cluster has 0"):
        check_fits(placed(cuda=False, device="cuda"), gpus=0)


def test_engine_and_learner_share_one_gpu_over_ipc():
    got = placed(share_gpu=True)
    assert (got.backend, got.gpus, got.gpus_per_engine, got.gpus_per_learner) == ("ipc", 1, 0.5, 0.5)
    check_fits(got, gpus=1)


def test_each_of_several_gpus_can_be_shared_by_an_engine_and_a_rank():
    got = placed(share_gpu=True, engines=4, ranks=4)
    assert (got.backend, got.gpus, got.gpus_per_engine, got.gpus_per_learner) == ("ipc", 4, 0.5, 0.5)
    assert got.seats == [0, 1, 2, 3, 0, 1, 2, 3]
    check_fits(got, gpus=4, nodes=[2, 2])
    with pytest.raises(ValueError, match="needs 4 GPUs"):
        check_fits(got, gpus=3)
    assert placed(engines=4, ranks=4).backend == "nccl", "nobody asked for it"


@pytest.mark.parametrize("more", [{"engines": 2}, {"tensor_parallel": 2}, {"ranks": 2}, {"sequence_parallel": 2}])
def test_a_shared_gpu_holds_one_engine_and_one_rank(more):
    ((name, value),) = more.items()
    with pytest.raises(ValueError, match=rf"an engine and a rank on each GPU.*{name}={value}.*or share_gpu=False"):
        placed(share_gpu=True, **more)


def test_on_cpu_there_is_no_gpu_to_share_and_no_tensor_parallelism():
    with pytest.raises(ValueError, match=r"share_gpu=True needs a GPU.*leave it off, or set device=cuda"):
        placed(cuda=False, share_gpu=True)
    with pytest.raises(ValueError, match=r"rollout\.tensor_parallel=2 needs GPUs; on CPU use rollout\.engines"):
        placed(cuda=False, tensor_parallel=2)


def test_on_cpu_there_is_nothing_to_offload_to():
    offloading = config_of(trainer=TrainerConfig(offload="optimizer"))
    assert place(offloading, cuda=True).device == "cuda"
    with pytest.raises(ValueError, match="offload=optimizer frees a GPU, and this run is on CPU: leave it off"):
        place(offloading, cuda=False)


@pytest.mark.parametrize("name", ["engines", "tensor_parallel", "ranks"])
def test_no_part_of_a_placement_can_be_empty(name):
    with pytest.raises(ValueError, match=rf"{name}=0 must be at least 1"):
        placed(**{name: 0})


def test_actors_that_take_turns_get_all_cores_and_others_one():
    alone = config_of(max_staleness=0)
    assert default_threads(alone, 8) == 8
    assert default_threads(replace(alone, max_staleness=1), 8) == 1
    assert default_threads(replace(alone, rollout=RolloutConfig(engines=2)), 8) == 1
    assert default_threads(replace(alone, trainer=TrainerConfig(ranks=2)), 8) == 1
    assert (engine_threads(alone, 8), learner_threads(alone, 8)) == (8, 8)


def test_ranks_share_the_cores_where_adam_steps_on_the_host():
    def threads(**trainer):
        return learner_threads(config_of(max_staleness=1, trainer=TrainerConfig(ranks=4, **trainer)), 32)

    assert (threads(), threads(offload="optimizer"), threads(offload="optimizer", threads=3)) == (1, 8, 3)
