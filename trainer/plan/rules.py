"""Settings that the device or the model forbids; what no machine allows is in `rl.validate`."""

from pathlib import Path

import torch

from rl.config import Config
from rl.sampling.reports import engine_reports
from trainer.cluster.placement import Device, Placement
from trainer.machine import shared_memory
from trainer.model.files import model_config

DRIVER = Path("/proc/driver/nvidia/version")
"""Exists where a GPU's driver is loaded."""
LEAST_SHARED = 1 << 30
"""Bytes that must be free in /dev/shm for several GPUs; Docker gives a container 64 MB."""


def check_truncation(config: Config, device: Device) -> None:
    """Raise ValueError, with the remedy, where the trainer could not know which tokens truncated sampling kept."""
    r = config.rollout
    if r.truncation is None or engine_reports(device):
        return
    wanted = f"truncated sampling (rollout.top_p={r.top_p:g}, top_k={r.top_k}, min_p={r.min_p:g}) on {device}"
    # The CPU engine reports no support, so the learner finds it from its own logits.
    reason = "the trainer finds the tokens that the engine kept from its own logits, which must be the engine's"
    if config.dtype != "float32" or not config.fp32_head:
        raise ValueError(
            f"{wanted}: {reason}, but dtype={config.dtype}, fp32_head={config.fp32_head} round them; set "
            "dtype=float32 and fp32_head=True, or sample without truncation"
        )
    if config.doctor == "off":
        raise ValueError(
            f"{wanted}: {reason}, and only the doctor shows that they are; set doctor=short, or sample without "
            "truncation"
        )


def check_experts_reported(config: Config, device: Device) -> None:
    """Raise ValueError where router replay is asked for and the device's engines report no experts."""
    if config.rollout.router_replay and not engine_reports(device):
        raise ValueError(
            f"rollout.router_replay=True on {device}: vLLM's model runner there (V1) does not report the experts of a "
            "token; set it to False, or run on GPUs"
        )


def check_turns(config: Config, placement: Placement) -> None:
    """Raise ValueError, with the remedy, where engine and learner cannot take turns on their GPU."""
    t = config.trainer
    reasons = {
        "engine and learner share no GPU: set share_gpu=True": placement.backend != "ipc",
        f"max_staleness={config.max_staleness} samples while the learner steps: use 0": config.max_staleness > 0,
        f"trainer.zero_stage={t.zero_stage} cannot move its states: use 2": t.zero_stage != 2,
        f"trainer.offload={t.offload} keeps them in host memory always: leave it off": t.offload != "none",
    }
    for reason, holds in reasons.items():
        if config.rollout.sleep and holds:
            raise ValueError(f"rollout.sleep=True, but {reason}")


def check_aside(config: Config, placement: Placement) -> None:
    """Raise ValueError, with the remedy, where an update cannot arrive while the engine samples."""
    if not config.rollout.receive_while_sampling:
        return
    if placement.backend == "ipc":
        raise ValueError(
            "rollout.receive_while_sampling=True is for NCCL, and here engine and learner share a GPU, where nothing "
            "is sent: set it to False, or share_gpu=False"
        )
    if config.rollout.tensor_parallel > 1:
        raise ValueError(
            f"rollout.receive_while_sampling=True and rollout.tensor_parallel={config.rollout.tensor_parallel}: two "
            "groups of NCCL at work on a GPU may wait for each other for ever: set one of them to its default"
        )


def check_router(config: Config) -> None:
    """Raise ValueError where router replay is asked for and the model has no experts, or its routers are not known."""
    if not config.rollout.router_replay:
        return
    from trainer.model.experts.replay import FAMILIES

    family = model_config(config.model, trust_remote_code=config.trust_remote_code).get_text_config().model_type
    if family not in FAMILIES:
        raise ValueError(
            f"rollout.router_replay=True replays the routers of {', '.join(sorted(FAMILIES))}, and this model is "
            f"{family}: set it to False"
        )


def check_rows(config: Config) -> None:
    """Raise ValueError where the model's rows cannot be shared as the settings ask, by ranks or by a group's prompt."""
    ranks, share_prompts = config.trainer.sequence_parallel, config.trainer.share_prompts
    if ranks == 1 and not share_prompts:
        return
    from trainer.model.attention import check_split, packs

    model = model_config(config.model, trust_remote_code=config.trust_remote_code)
    if ranks > 1:
        check_split(model, ranks)
    if share_prompts and not packs(model):
        raise ValueError(
            f"trainer.share_prompts=True needs packed rows, and rows of {model.get_text_config().model_type} stay "
            "padded: leave it unset"
        )


def check_shared_memory(placement: Placement) -> None:
    """Raise ValueError, with the remedy, where a run on several GPUs lacks shared memory."""
    if placement.device == "cuda" and placement.gpus > 1 and shared_memory() < LEAST_SHARED:
        raise ValueError(
            f"/dev/shm has {shared_memory() / 2**30:.2f} GiB free, and a run on several GPUs needs 1 GiB there: NCCL "
            "and vLLM's workers send through it. In Docker start the container with --shm-size=8g; in Kubernetes mount "
            "an emptyDir with medium: Memory at /dev/shm"
        )


def check_build(device: str) -> None:
    """Raise ValueError, with the remedy, where this environment's torch cannot use a device ("cpu" or "cuda")."""
    build = torch.version.cuda
    if build is not None if device == "cpu" else build is None and DRIVER.exists():
        raise ValueError(
            f"device={device}, but this environment has vLLM's build for {f'CUDA {build}' if build else 'CPU'}, which "
            f"knows no other: install the other one with `rm -rf .venv && scripts/setup {device}`"
        )
    # The count comes from the driver's own library, which answers also where the driver is too old for this CUDA.
    if device == "cuda" and torch.cuda.device_count() and not torch.cuda.is_available():
        raise ValueError(
            f"torch finds {torch.cuda.device_count()} GPUs and cannot use them: the driver is older than CUDA {build} "
            "needs (CUDA 13 needs 580 or newer). See `nvidia-smi`, and update the driver"
        )
