"""Does a learner step come to the same in every way of dividing it? ZeRO stages, offload, checkpointing, prompts."""

import argparse
import multiprocessing
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from echo_task import make_model
from gpu.setting import Result, base_config

from rl.batch import collate, trajectory
from rl.config import TrainerConfig
from rl.objectives import GSPO
from rl.types import Batch, Completion, Prompt

STEPS = 3
METRICS = ("actor/loss", "actor/grad_norm")
LIMIT = {"actor/loss": (5e-4, 5e-3), "actor/grad_norm": (0.01, 0.05)}
"""Largest difference from ZeRO 1 in bf16, in the first step and later: of losses of 3e-2, and relative for norms. On an
H100 it was 2e-4 in the first step, and 2e-3 in the third: Adam's first changes have the size of the learning rate also
where a gradient is no larger than bf16's rounding, so the weights drift apart."""
FP32_LIMIT = 1e-5
"""The same on a CPU, in every step."""
PLAIN = TrainerConfig(lr=1e-6, minibatches=2, micro_batch_tokens=1024, zero_stage=1)
VARIANTS = {
    "ZeRO 1": PLAIN,
    "ZeRO 2": replace(PLAIN, zero_stage=2),
    "ZeRO 3": replace(PLAIN, zero_stage=3),
    "offload": replace(PLAIN, offload="optimizer"),
    "checkpointing": replace(PLAIN, gradient_checkpointing=True),
    "shared prompts": replace(PLAIN, share_prompts=True),
}


def learner(args: argparse.Namespace) -> Result:
    """Loss and gradient norm of `STEPS` steps in each variant; each in a process of its own."""
    cpu = args.device == "cpu"
    shape = {"hidden": 128, "inner": 256, "layers": 2, "vocabulary": 512}
    shape = shape if cpu else {"hidden": 1024, "inner": 2816, "layers": 8, "vocabulary": 32768}
    model = make_model(Path(args.work) / "learner", nats=4.0, **shape)
    wanted = [name for name in VARIANTS if not cpu or name != "offload"]
    context = multiprocessing.get_context("spawn")
    for name in wanted:
        child = context.Process(target=steps_to_file, args=(args, name, model))
        child.start()
        if cpu:
            child.join()
    for child in multiprocessing.active_children():
        child.join()
    result: Result = {"problems": []}
    for name in wanted:
        file = Path(args.work) / f"learner {name}.pt"
        found = torch.load(file) if file.exists() else {"error": "its process ended without a result"}
        result[name] = found
        if "error" in found:
            result["problems"].append(f"{name}: {found['error']}")
            continue
        for metric in METRICS:
            pairs = zip(found[metric], result["ZeRO 1"].get(metric, ()), strict=True)
            scale = (lambda b: 1.0) if metric == "actor/loss" else abs
            first, *later = [abs(a - b) / scale(b) for a, b in pairs]
            for steps, away, limit in zip(("1", f"2 to {STEPS}"), (first, max(later)), LIMIT[metric], strict=True):
                if not away < (FP32_LIMIT if cpu else limit):
                    result["problems"].append(f"{name}: {metric} of step {steps} is {away:.2g} away from ZeRO 1's")
    return result


def steps_to_file(args: argparse.Namespace, name: str, model: str) -> None:
    """In a process of its own: the metrics of one variant, or its error."""
    try:
        found: dict[str, Any] = steps(args, name, model)
    except BaseException as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error)[:800]}"}
    torch.save(found, Path(args.work) / f"learner {name}.pt")


def steps(args: argparse.Namespace, name: str, model: str) -> dict[str, Any]:
    """Loss, gradient norm and seconds of each step, and the peak of memory."""
    from trainer.learner.learner import Learner

    config = base_config(args, "learner", model, max_tokens=128, max_model_len=256)
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    objective = GSPO(clip_low=0.03, clip_high=0.04, kl_coef=0.01, entropy_coef=0.01)
    config = replace(config, trainer=VARIANTS[name], objective=objective, old_logprobs="recompute", dtype=dtype)
    rank = Learner(config, rank=0, device=args.device, address="127.0.0.1", port=0, model=model)
    vocabulary = rank.parts.policy.hf.config.vocab_size
    history, seconds = [], []
    for step in range(STEPS):
        began = time.perf_counter()
        history.append(rank.step(batch_of(step, vocabulary)))
        seconds.append(time.perf_counter() - began)
    found: dict[str, Any] = {metric: [metrics[metric] for metrics in history] for metric in METRICS}
    return found | {"seconds": seconds[-1], "peak_gib": rank.peak_memory_gib()}


def batch_of(step: int, vocabulary: int) -> Batch:
    """8 prompts of 4 replies each, up to 104 tokens long, with rewards and rollout log-probabilities out of the air."""
    generator, rows = torch.Generator().manual_seed(step), []
    for ordinal in range(8):
        ids = torch.randint(3, vocabulary, (20 + ordinal,), generator=generator).tolist()
        prompt = Prompt(ordinal=ordinal, token_ids=ids, task={})
        for sample in range(4):
            tokens = torch.randint(3, vocabulary, (14 + 30 * sample,), generator=generator).tolist()
            logprobs = (-4.6 + 0.1 * torch.randn(len(tokens), generator=generator)).tolist()
            reply = Completion(token_ids=tokens, logprobs=logprobs, versions=[step] * len(tokens), finish_reason="stop")
            rows.append(trajectory(prompt, reply, float(torch.rand(1, generator=generator)), {}))
    return collate(rows)
