"""Which tensors must an update bring to replace every parameter of a vLLM model, and which does the model not know?"""

from collections.abc import Iterable
from copy import copy
from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts


def parts(model: nn.Module) -> set[str]:
    """vLLM's names of all tensors that a model is loaded from. A fused parameter is named by its parts.

    A tied head is not sent, because vLLM ties it itself.
    """
    fused = fused_modules(model)
    names: set[str] = set()
    for owner, module in model.named_modules():
        *parents, last = owner.split(".")
        for leaf, _ in module.named_parameters(recurse=False):
            if isinstance(module, RoutedExperts):
                names |= {".".join([*parents[:-1], expert]) for expert in _experts(module, leaf)}
            else:
                names |= {".".join([*parents, part, leaf]).lstrip(".") for part in fused.get(last, [last])}
    config: Any = model.config
    if config.tie_word_embeddings:
        names.discard("lm_head.weight")
    return names


def expected(model: nn.Module, sent: Iterable[str]) -> set[str]:
    """The names that must be sent: those of `sent` that the model knows, and vLLM's names of what they lack."""
    rename = _renaming(model)
    known = {name: own for name in sent if (own := rename(name)) is not None}
    needed = parts(model)
    return {name for name, own in known.items() if own in needed} | (needed - set(known.values()))


def fused_modules(model: nn.Module) -> dict[str, list[str]]:
    """The checkpoint's modules that vLLM fuses, by the last name of the fused module; not every model has any."""
    return getattr(model, "packed_modules_mapping", {})


def _experts(module: RoutedExperts, leaf: str) -> set[str]:
    """The tensors that a stacked parameter of all experts is loaded from, each of one expert."""
    mapping = [(stacked.rpartition(".")[2], weight) for stacked, weight, _, _ in module.get_expert_mapping()]
    return {weight + leaf.removeprefix(stacked) for stacked, weight in mapping if leaf.startswith(stacked)}


def _renaming(model: nn.Module) -> Any:
    """vLLM's own renaming of a checkpoint's tensors for this family, without the step that fuses them."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    mapper = copy(mapper)
    mapper.orig_to_new_stacked = {}
    return mapper.map_name
