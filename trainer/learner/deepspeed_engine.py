"""How does DeepSpeed wrap the policy? Its settings, each with its reason, the optimizer and its schedule."""

import importlib
import math
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State
from transformers.integrations import HfDeepSpeedConfig

from rl.config import Config
from trainer.model.policy import Policy, load

BUCKET = 2**23
"""Gradients that are summed over ranks at a time under ZeRO 0; a larger tensor goes alone."""

MOVED = (State.optim_states, State.hp_params, State.lp_grads)
"""What `OnHost` moves: not the weights that the model computes with, because updates and the doctor read them."""


def deepspeed_engine(config: Config, model: str, device: str, *, share_prompts: bool) -> Any:
    """DeepSpeed around the policy, with the settings that agree with plain torch."""
    if device == "cpu":
        # It would spend minutes on compiling a C++ operator that only inference uses; a killed compile leaves a lock
        # that hangs every later run. (`import deepspeed.comm.torch` would bind the real torch.)
        setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010 (no stub)
    t = config.trainer
    settings = deepspeed_settings(config)
    sharding = HfDeepSpeedConfig(settings) if t.zero_stage == 3 else None
    policy = load(
        model,
        dtype=config.dtype,
        fp32_head=config.fp32_head,
        share_prompts=share_prompts,
        with_values=config.objective.uses_values,
        checkpointing=t.gradient_checkpointing,
        lora=t.lora,
        trust_remote_code=config.trust_remote_code,
    )
    groups = parameter_groups(policy, t.value_lr)
    if t.zero_stage in (1, 2):
        # DeepSpeed's buffer has 500 million elements by default, however small the model is.
        trained = sum(p.numel() for group in groups for p in group["params"])
        settings["zero_optimization"]["reduce_bucket_size"] = min(500_000_000, trained)
    optimizer = torch.optim.AdamW(groups, lr=t.lr, betas=t.betas, weight_decay=t.weight_decay, fused=True)
    if t.zero_stage == 0:
        clip_before_step(optimizer, t.max_grad_norm)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(config, step))
    engine, *_ = deepspeed.initialize(
        model=policy, optimizer=optimizer, lr_scheduler=scheduler, config=settings, dist_init_required=False
    )
    engine.hf_deepspeed_config = sharding  # transformers keeps only a weak reference
    # Without shards DeepSpeed lays gradients end to end for their sum over ranks, by default 2 GB of them at a time.
    engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=BUCKET)
    # It would also sum where a rank has nobody to sum with, which takes longer than the optimizer.
    engine.enable_backward_allreduce = t.zero_stage > 0 or t.ranks > 1
    return engine


def clip_before_step(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clip in the optimizer and store the norm where DeepSpeed reads it: under ZeRO 0 it clips without a norm."""

    def clip(optimizer: Any, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)

    optimizer.register_step_pre_hook(clip)


def parameter_groups(policy: Policy, value_lr: float | None) -> list[dict[str, Any]]:
    """All trained weights in one group; the value head in a second group where it has its own learning rate."""
    if policy.value_head is None or value_lr is None:
        return [{"params": [p for p in policy.parameters() if p.requires_grad]}]
    body = [p for p in policy.hf.parameters() if p.requires_grad]
    return [{"params": body}, {"params": list(policy.value_head.parameters()), "lr": value_lr}]


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    t = config.trainer
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": t.max_grad_norm if t.zero_stage else 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": t.zero_stage},
        "steps_per_print": 10**9,
    }
    if t.offload == "optimizer":
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # torch's own fused Adam runs there too; DeepSpeed's would need compiling first.
        settings["zero_force_ds_cpu_optimizer"] = False
    if config.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
    if t.zero_stage == 3:
        # zero.Init would round the rotary embedding's inverse frequencies to bf16 without a warning.
        settings["data_types"]["keep_in_fp32_modules"] = ["inv_freq"]
    return settings


def lr_factor(config: Config, step: int) -> float:
    """Learning rate divided by its peak, at optimizer step `step` (from 0)."""
    t = config.trainer
    total = config.steps * t.epochs * t.minibatches
    if step < t.warmup_steps:
        return (step + 1) / t.warmup_steps
    done = min(1.0, (step - t.warmup_steps) / max(total - t.warmup_steps, 1))
    if t.lr_schedule == "linear":
        return 1.0 - done
    if t.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


class OnHost:
    """Gradients, masters and Adam's moments are in host memory, and on the GPU inside `with`.

    For ZeRO 2: DeepSpeed's optimizer of ZeRO 1 in bf16 is another one, and cannot move.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._leave()

    def __enter__(self) -> None:
        self.engine.reload_states()

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self.engine.offload_states(include=MOVED)
        # DeepSpeed forgets where each parameter's master is, and a checkpoint reads it.
        self.engine.optimizer._link_all_hp_params()
