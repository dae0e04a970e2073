"""A second copy of the model for new weights: an update is built completely on this twin, then swapped in at once.

vLLM's layerwise reload writes into the live model, so sampling must stop for the whole reload, and an update that fails
leaves layers of two versions. Here the reload runs on a twin, which shares everything with the model except its
tensors, while the engine samples. The commit swaps attributes, which takes milliseconds. This is for CPU, where the
reload repacks every linear weight into new memory anyway; on a GPU, captured graphs hold the tensors' addresses.
"""

from collections.abc import Iterable
from copy import copy
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
        """Each live module, its twin, and the attributes that both had at the start."""
        self._known: dict[int, Any] = {}
        self.model: Any = self._module(model)
        initialize_layerwise_reload(self.model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load tensors by their checkpoint names; a layer is packed when its last tensor has arrived."""
        self.model.load_weights(weights)

    def finish(self, model_config: ModelConfig) -> None:
        """Finish the reload. Raises ValueError when a layer got no tensor, because vLLM would keep its old weights."""
        infos = {name: get_layerwise_info(module) for name, module in self.model.named_modules()}
        without_update = [
            name
            for name, module in self.model.named_modules()
            # A tied head uses its embedding's tensor.
            if module._parameters and not isinstance(module, ParallelLMHead)
            if infos[name].can_load() and infos[name].load_numel == 0
        ]
        if without_update:
            raise ValueError(f"the update contains no tensor for {without_update[:3]}")
        finalize_layerwise_reload(self.model, model_config)

    def commit(self) -> None:
        """Put everything that the update built into the live model. No forward pass may run during this call."""
        for live, twin, before in self.pairs:
            made = {k: v for k, v in twin.__dict__.items() if k != "_modules" and v is not before.get(k)}
            live.__dict__.update(made)
            for tensor in [*live._parameters.values(), *live._buffers.values()]:
                _bind_loader(tensor, live)
        self.close()

    def close(self) -> None:
        """Free everything that was not committed, immediately.

        Tensors and layers refer to each other, and vLLM's table refers to both, so every update would otherwise keep a
        whole model in memory.
        """
        for _, twin, _ in self.pairs:
            info = LAYERWISE_INFO.pop(twin, None)
            if info is not None:
                info.restore_metadata = ({}, {})
            twin.__dict__.clear()
        self.pairs, self._known = [], {}

    def _module(self, live: nn.Module) -> nn.Module:
        # Tied modules and tensors are one object under several names, in the twin too.
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
        method: Any = getattr(live, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            # vLLM packs the experts for its CPU kernel only when it makes that kernel. An update that kept the kernel
            # would feed it plain weights, which it reads as packed ones.
            twin.__dict__["quant_method"] = method = copy(method)
            method.moe_kernel = None
        info = get_layerwise_info(live)
        parameters, buffers = (
            {name: _record_for(t, twin) for name, t in group.items()} for group in info.restore_metadata
        )
        LAYERWISE_INFO[twin] = LayerReloadingInfo((parameters, buffers), info.restore_device)
        return twin

    def _tensor(self, live: Tensor | None) -> Tensor | None:
        if live is None:
            return None
        if id(live) not in self._known:
            # Parameters will be loaded; most buffers will not.
            twin: Any = torch.empty_like(live.data) if isinstance(live, nn.Parameter) else live.data.clone()
            self._known[id(live)] = twin
            twin.__class__ = live.__class__
            twin.__dict__ = live.__dict__.copy()
        return self._known[id(live)]


def _record_for(tensor: Tensor, owner: nn.Module) -> Tensor:
    """A copy of a recorded tensor with the owner's weight loader; a reload had bound it to the live model's."""
    record: Any = to_meta_tensor(tensor)
    record.weight_loader = _get_original_loader(record)
    _bind_loader(record, owner)
    return record


def _bind_loader(tensor: Any, owner: nn.Module) -> None:
    """Bind the tensor's weight loader to the owner, if it is a method of a layer."""
    loader = getattr(tensor, "weight_loader", None)
    if isinstance(loader, MethodType):
        tensor.weight_loader = MethodType(loader.__func__, owner)
