"""A model's files: where they come from (a folder, the hub's cache, or the hub), and what they name besides weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rl.tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HUB_S = 3.0
"""Seconds in which the hub must answer; its own library tries five times, which takes half a minute."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
"""Endings of the files that hold weights, or list those that do."""
OWN = ("config.json", "adapter_config.json", "README.md", ".gitattributes")
"""Files that the base model has and an export writes by itself."""

TEMPLATES = "additional_chat_templates"
"""transformers' folder of further chat templates."""


def looks_local(model: str) -> bool:
    """Whether a model name means a folder and not an `owner/name` on the hub."""
    return model.startswith((".", "/", "~", "models/", "runs/")) or model.count("/") != 1 or Path(model).exists()


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


def without_weights(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config on torch's meta device. Raises ValueError when it is no causal language model."""
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
        raise ValueError(
            f"{config.name_or_path or 'the model'} is of the family {config.model_type}, which transformers does not "
            "know as a causal language model: give a model with a text decoder and an lm_head"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def scoring_parameters(model: str, *, trust_remote_code: bool = False) -> int:
    """Parameters of a reward model. Raises ValueError for one that does not return a single number."""
    from transformers import AutoModelForSequenceClassification

    config = model_config(model, trust_remote_code=trust_remote_code)
    kinds, outputs = config.architectures or ["no architecture"], config.num_labels
    if not kinds[0].endswith("ForSequenceClassification") or outputs != 1:
        raise ValueError(
            f"the reward model {model} is a {kinds[0]} with {outputs} outputs: give a ...ForSequenceClassification "
            "with one output (num_labels=1 in its config.json)"
        )
    with torch.device("meta"):
        scorer = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in scorer.parameters())


def listed_stop_ids(model: str, tokenizer: Any, *, trust_remote_code: bool = False) -> list[int]:
    """Every token id that ends a reply of this model: see `rl.tokens.stop_ids`."""
    from transformers import GenerationConfig, PretrainedConfig

    try:
        generation = GenerationConfig.from_pretrained(model)
    except OSError:  # there is no such file; transformers and vLLM then make one of the config
        generation = GenerationConfig.from_model_config(model_config(model, trust_remote_code=trust_remote_code))
    return stop_ids(tokenizer, generation.to_diff_dict(), PretrainedConfig.get_config_dict(model)[0])


def base_folder(model: str) -> Path | None:
    """The folder that holds the model's files: its own, or the hub's snapshot of them; None without one here."""
    from huggingface_hub import try_to_load_from_cache

    if looks_local(model):
        folder = Path(model).expanduser()
        return folder if folder.is_dir() else None
    cached = try_to_load_from_cache(model, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def copy_companions(model: str, tokenizer: Any, folder: Path) -> list[str]:
    """Copy what a model has besides config and weights into `folder`, and return the names: generation_config,
    tokenizer, chat template, processor, code. They are copied as they are, because saving them again changes them.

    The tokenizer is saved from memory only where the model has no file of it. Raises OSError where the model's files
    are gone.
    """
    base, folder = base_folder(model), folder.resolve()
    if base is None:
        raise FileNotFoundError(f"the files of {model!r} are no longer on this machine")
    names = [
        path.name
        for path in sorted(base.iterdir())
        if path.is_file() and path.name not in OWN and not path.name.endswith(WEIGHTS)
    ]
    if not {"tokenizer.json", "tokenizer_config.json"} & set(names):
        tokenizer.save_pretrained(folder)
    for name in names:
        shutil.copyfile(base / name, folder / name)
    if (base / TEMPLATES).is_dir():
        shutil.copytree(base / TEMPLATES, folder / TEMPLATES, dirs_exist_ok=True)
    return names


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
