"""What can be known to be wrong before anything expensive: settings, GPUs, model folder, data, reward, lengths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rl.config import Config
from rl.validate import check
from trainer.cluster.placement import Device, Placement, check_fits, plan
from trainer.cluster.ray_session import cluster_gpus
from trainer.plan.memory import check_memory, needs, shape_of, there
from trainer.prompts import Prepared, prepare

if TYPE_CHECKING:
    pass


def place(config: Config) -> Placement:
    """Check the settings and what they ask of the machine; takes no time. Raises ValueError or FileNotFoundError."""
    check(config)
    if looks_local(config.model) and not Path(config.model, "config.json").exists():
        raise FileNotFoundError(
            f"there is no model in {config.model!r} (no config.json). For the quickstart's model run ./scripts/setup; "
            "else give a folder that transformers can load, or a hub name such as Qwen/Qwen2.5-1.5B-Instruct"
        )
    gpus = cluster_gpus() if config.device != "cpu" else 0.0
    placement = plan(config, cuda=gpus > 0, gpus=gpus)
    check_truncation(config, placement.device)
    check_fits(placement, gpus=gpus)
    return placement


def check_truncation(config: Config, device: Device) -> None:
    """Raise ValueError, with the remedy, where the trainer could not know which tokens truncated sampling kept."""
    r = config.rollout
    if r.truncation is None:
        return
    wanted = f"truncated sampling (rollout.top_p={r.top_p:g}, top_k={r.top_k}, min_p={r.min_p:g}) on {device}"
    if device == "cuda":
        if not r.top_k:
            raise ValueError(
                f"{wanted}: the trainer replays the tokens that the engine kept, and vLLM reports them only where "
                "top_k bounds their number; set rollout.top_k (e.g. 200, which top_p and min_p then narrow)"
            )
        return
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


def check_rows(config: Config) -> None:
    """Raise ValueError where the model's rows cannot be shared as the settings ask, by ranks or by a group's prompt."""
    ranks, share_prompts = config.trainer.sequence_parallel, config.trainer.share_prompts
    if ranks == 1 and not share_prompts:
        return
    from transformers import AutoConfig

    from trainer.model.attention import check_split, packs

    model = AutoConfig.from_pretrained(config.model)
    if ranks > 1:
        check_split(model, ranks)
    if share_prompts and not packs(model):
        raise ValueError(
            f"trainer.share_prompts=True needs packed rows, and rows of {model.get_text_config().model_type} stay "
            "padded: leave it unset"
        )


def looks_local(model: str) -> bool:
    """Whether a model name means a folder rather than an `owner/name` on the hub."""
    return model.startswith((".", "/", "~", "models/")) or model.count("/") != 1 or Path(model).exists()


def _read(config: Config, placement: Placement) -> Prepared:
    check_rows(config)
    found, limits = needs(config, placement, shape_of(config.model)), there(config, placement)
    check_memory(config, found, limits)
    return prepare(config)
