"""How does a trained model leave the learner? As files that transformers, vLLM and PEFT load."""

import json
import os
from copy import deepcopy
from hashlib import sha256
from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.learner.examine import digests
from trainer.learner.rank import Rank
from trainer.model import lora


def export(rank: Rank, folder: str) -> None:
    """Save the model as safetensors, and adapters apart in `folder`/adapter. The driver adds the other files.

    A collective over all ranks; rank 0 writes.
    """
    # Every rank takes part in gathering; rank 0 keeps the gathered tensors.
    dtype = getattr(torch, rank.config.export_dtype or rank.config.dtype)
    tensors = {name: exported(tensor, dtype) for name, tensor in rank.weights if rank.rank == 0}
    if rank.rank == 0:
        os.makedirs(folder, exist_ok=True)
        try:
            save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        except SafetensorError as error:
            # It cannot travel between processes.
            raise OSError(str(error)) from None
        config = deepcopy(rank.policy.hf.config)
        config.dtype = dtype
        config.save_pretrained(folder)

    adapters = [p for layer in rank.weights.adapted.values() for p in lora.adapter_parameters(layer)]
    with deepspeed.zero.GatheredParameters(adapters, enabled=rank.weights.sharded):
        if adapters and rank.rank == 0:
            lora.save_adapter(rank.policy.hf, rank.config.model, Path(folder, "adapter"))


def exported(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is saved: on CPU, in `dtype` unless it holds integers, apart from a stacked tensor that it may
    view, such as the experts of a layer."""
    tensor = (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu()
    alone = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def base_digest(rank: Rank) -> str:
    """Digest of the weights below the adapters; "" where all weights are trained. A collective over all ranks."""
    if not rank.config.trainer.lora.rank:
        return ""
    with lora.switched_off(rank.policy.hf):
        return sha256(json.dumps(digests(rank.weights)).encode()).hexdigest()
