"""Where a model comes from: a folder, the hub's cache, or the hub; and an answer at once when it is in none of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HUB_S = 3.0
"""Seconds in which the hub must answer; its own library tries five times, which takes half a minute."""


def looks_local(model: str) -> bool:
    """Whether a model name means a folder and not an `owner/name` on the hub."""
    return model.startswith((".", "/", "~", "models/")) or model.count("/") != 1 or Path(model).exists()


def check_model_folder(model: str) -> None:
    """Raise FileNotFoundError, with the remedy, for a folder without a model."""
    if looks_local(model) and not Path(model, "config.json").exists():
        raise FileNotFoundError(
            f"there is no model in {model!r} (no config.json in {Path(model).absolute()}). For the quickstart's model "
            "run ./scripts/setup; else give a folder that transformers can load, or a hub name such as "
            "Qwen/Qwen2.5-1.5B-Instruct"
        )


@contextmanager
def remote_code(model: str, allowed: bool) -> Iterator[dict[str, bool]]:
    """The argument with which every part of a model is loaded. Raises ValueError with the flag to set, where the model
    brings Python code and that is not allowed."""
    try:
        yield {"trust_remote_code": allowed}
    except ValueError as error:
        if allowed or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{model} brings Python code of its own: read it, and allow it with trust_remote_code=True in the recipe, "
            "or with --trust-remote-code"
        ) from error


def model_config(model: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config. Raises OSError, within seconds, when it is in no folder and no cache and the hub is away."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    remote = not looks_local(model) and not isinstance(try_to_load_from_cache(model, "config.json"), str)
    if remote and not hub_answers():
        raise OSError(
            f"the model {model!r} is not in the hub's cache, and the hub does not answer within {HUB_S:g} s: give a "
            "local folder, or download the model where there is a network (`hf download`)"
        )
    with remote_code(model, trust_remote_code) as more:
        return AutoConfig.from_pretrained(model, **more)


def hub_answers() -> bool:
    """Whether the hub can be reached now."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_S)
    except httpx.HTTPError:
        return False
    return True
