"""Which tensors does the trainer send? Those of a checkpoint, in full, gathered layer by layer over the ranks."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rl.weights import TensorMeta, WeightManifest, digest
from trainer.model.lora import adapted, adapter_parameters, base_parameters, merged


def deepspeed_fields(parameter: nn.Parameter) -> Any:
    """The parameter with the attributes that DeepSpeed adds to it, which no stub declares."""
    return parameter


class LearnerWeights:
    """The tensors that the engines need, in a fixed order; iterating is a collective over all ranks under ZeRO-3.

    A tied head has one name, a value head is not sent, adapters are merged into the weights that they change. With
    `digesting` on, every tensor is digested as it is sent.
    """

    def __init__(self, hf: PreTrainedModel, *, sharded: bool) -> None:
        self.hf = hf
        self.parameters = base_parameters(hf)
        self.adapted = adapted(hf)
        self.sharded = sharded
        self.digesting = False
        self.digests: dict[str, str] = {}

    def metadata(self) -> list[TensorMeta]:
        """Names, dtypes and full shapes, without gathering anything."""
        return self._metadata

    @cached_property
    def _metadata(self) -> list[TensorMeta]:
        shapes = {n: deepspeed_fields(p).ds_shape if self.sharded else p.shape for n, p in self.parameters.items()}
        empty = {n: torch.empty(s, dtype=self.parameters[n].dtype, device="meta") for n, s in shapes.items()}
        return [
            TensorMeta(name=name, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
            for group in layers(list(self.parameters))
            for name, t in as_in_checkpoint(self.hf, {n: empty[n] for n in group}).items()
        ]

    def manifest(self, version: int) -> WeightManifest:
        """Names, shapes and digests of the last pass over the tensors."""
        return WeightManifest(version=version, tensors=tuple(self.metadata()), digests=dict(self.digests))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.digests = {}
        for group in layers(list(self.parameters)):
            parameters = [self.parameters[name] for name in group]
            # Per layer: gathering each tensor is twice as slow, and all at once needs the whole model in memory.
            adapters = [p for name in group if name in self.adapted for p in adapter_parameters(self.adapted[name])]
            with deepspeed.zero.GatheredParameters(parameters + adapters, enabled=self.sharded):
                layer = {
                    name: merged(self.adapted[name]) if name in self.adapted else parameter.detach()
                    for name, parameter in zip(group, parameters, strict=True)
                }
                for name, tensor in as_in_checkpoint(self.hf, layer).items():
                    # The gathered storage is freed at the end of the block, when a consumer may still copy from it.
                    tensor = tensor.clone() if self.sharded else tensor
                    if self.digesting:
                        self.digests[name] = digest(tensor)
                    yield name, tensor

    @torch.no_grad()
    def flip(self, bit: int) -> None:
        """Flip the mantissa bit worth 2^-bit (1 to 7) of a value, in a random half of every tensor.

        The same call again restores every bit, without a copy of the weights. A collective over all ranks under ZeRO-3.
        """
        for index, parameter in enumerate(self.parameters.values()):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.sharded):
                integer, mantissa = {2: (torch.int16, 7), 4: (torch.int32, 23)}[parameter.element_size()]
                generator = torch.Generator(parameter.device).manual_seed(index)
                half = torch.randint(0, 2, parameter.shape, generator=generator, device=parameter.device, dtype=integer)
                parameter.data.view(integer).bitwise_xor_(half << (mantissa - bit))


def as_in_checkpoint(hf: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one layer under the names and in the shapes of the family's checkpoints, which vLLM loads.

    transformers stacks the experts of a layer, and renames modules of some families; its own inverse undoes both.
    """
    if not getattr(hf, "_weight_conversions", None):
        return tensors
    return revert_weight_conversion(hf, tensors)


def layers(names: list[str]) -> list[list[str]]:
    """Group consecutive names that are equal up to and including their first number."""
    groups: list[list[str]] = []
    last: object = None
    for name in names:
        parts = name.split(".")
        number = next((i for i, p in enumerate(parts) if p.isdigit()), None)
        key = name if number is None else tuple(parts[: number + 1])
        if key != last:
            groups.append([])
        groups[-1].append(name)
        last = key
    return groups
