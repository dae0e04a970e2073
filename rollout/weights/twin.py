"""New weights beside the ones that serve: an update is built in full on a twin of the model, then exchanged at once.

vLLM's layerwise reload writes into the live model, so sampling must stand still all the while, and an update that
fails leaves layers of two versions. Here the reload runs on a twin, which shares everything with the model but its
tensors, while the engine samples; the commit exchanges attributes, which takes milliseconds. For CPU, where the reload
repacks every linear weight into new memory anyhow; on a GPU, captured graphs hold the tensors' addresses.
"""

import ctypes
from collections.abc import Iterable
from contextlib import suppress
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, _get_original_loader, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo


class Twin:
    """A model with the structure of `model` and its own tensors, under construction."""

    def __init__(self, model: nn.Module) -> None:
        self.pairs: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
        """Each live module, its twin, and the attributes that both had at first."""
        self._known: dict[int, Any] = {}
        self.model = self._module(model)
        initialize_layerwise_reload(self.model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load tensors by their checkpoint names; a layer is packed once the last of its tensors is here."""
        self.model.load_weights(weights)

    def finish(self, model_config: ModelConfig) -> None:
        """Nothing more will be loaded. Raises ValueError when a layer got nothing: vLLM would keep its old weights."""
        infos = {name: get_layerwise_info(module) for name, module in self.model.named_modules()}
        left = [
            name
            for name, module in self.model.named_modules()
            # A tied head has its embedding's tensor.
            if module._parameters and not isinstance(module, ParallelLMHead)
            if infos[name].can_load() and infos[name].load_numel == 0
        ]
        if left:
            raise ValueError(f"the update brought nothing for {left[:3]}")
        finalize_layerwise_reload(self.model, model_config)

    def commit(self) -> None:
        """Put everything that the update made into the live model. Nothing may run in it meanwhile."""
        for live, twin, before in self.pairs:
            made = {k: v for k, v in twin.__dict__.items() if k != "_modules" and v is not before.get(k)}
            live.__dict__.update(made)
            for tensor in [*live._parameters.values(), *live._buffers.values()]:
                _bind(tensor, live)
        self.close()

    def close(self) -> None:
        """Let go of all that was not committed, now: tensors and layers hold each other, and vLLM's table holds both,
        so that every update would keep a whole model in memory."""
        for _, twin, _ in self.pairs:
            LAYERWISE_INFO.pop(twin, LayerReloadingInfo({}, {})).restore_metadata = ({}, {})
            twin.__dict__.clear()
        self.pairs, self._known = [], {}

    def _module(self, live: nn.Module) -> nn.Module:
        # Tied modules and tensors are one object under several names, and stay so.
        if id(live) in self._known:
            return self._known[id(live)]
        twin = self._known[id(live)] = object.__new__(type(live))
        self.pairs.append((live, twin, live.__dict__.copy()))
        twin.__dict__ = live.__dict__ | {
            "_parameters": {name: self._tensor(p) for name, p in live._parameters.items()},
            "_buffers": {name: self._tensor(b) for name, b in live._buffers.items()},
            "_non_persistent_buffers_set": set(live._non_persistent_buffers_set),
            "_modules": {name: m and self._module(m) for name, m in live._modules.items()},
        }
        info = get_layerwise_info(live)
        metadata = tuple({name: _meta(t, twin) for name, t in group.items()} for group in info.restore_metadata)
        LAYERWISE_INFO[twin] = LayerReloadingInfo(restore_metadata=metadata, restore_device=info.restore_device)
        return twin

    def _tensor(self, live: Tensor | None) -> Tensor | None:
        if live is None:
            return None
        if id(live) not in self._known:
            # Parameters are about to be loaded; buffers mostly are not.
            twin = torch.empty_like(live.data) if isinstance(live, nn.Parameter) else live.data.clone()
            self._known[id(live)] = twin
            twin.__class__ = live.__class__
            twin.__dict__ = live.__dict__.copy()
        return self._known[id(live)]


def keep_freed_memory() -> None:
    """What this process frees stays with it. An update needs new memory for a whole model, as the last one has freed;
    glibc would give it back and fetch it again page by page, which takes longer than the copies into it."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    with suppress(OSError, AttributeError):  # another allocator
        libc = ctypes.CDLL("libc.so.6")
        for option, nbytes in ((mmap_threshold, 2**30), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
            libc.mallopt(option, nbytes)


def _meta(tensor: Tensor, owner: nn.Module) -> Tensor:
    """A copy of a recorded tensor whose weight loader is the owner's: a reload of the live model binds it to that."""
    copy = to_meta_tensor(tensor)
    copy.weight_loader = _get_original_loader(copy)
    _bind(copy, owner)
    return copy


def _bind(tensor: Tensor | None, owner: nn.Module) -> None:
    """Its weight loader, where that is a method of a layer, becomes the owner's."""
    loader = getattr(tensor, "weight_loader", None)
    if isinstance(loader, MethodType):
        tensor.weight_loader = MethodType(loader.__func__, owner)
