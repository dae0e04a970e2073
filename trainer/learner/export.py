"""How does a trained model leave the learner? As files that transformers, vLLM and PEFT load."""

import json
import os
from hashlib import sha256
from pathlib import Path

import deepspeed
from safetensors import SafetensorError
from safetensors.torch import save_file

from trainer.learner.examine import digests
from trainer.learner.rank import Rank
from trainer.model import lora


def export(rank: Rank, folder: str) -> None:
    """Save the model as safetensors, and adapters apart in `folder`/adapter. The driver adds the tokenizer.

    A collective over all ranks; rank 0 writes.
    """
    # Every rank takes part in gathering; rank 0 keeps the gathered tensors.
    tensors = {name: tensor.cpu() for name, tensor in rank.weights if rank.rank == 0}
    if rank.rank == 0:
        os.makedirs(folder, exist_ok=True)
        try:
            save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        except SafetensorError as error:
            # It cannot travel between processes.
            raise OSError(str(error)) from None
        rank.policy.hf.config.save_pretrained(folder)

    adapters = [p for layer in rank.weights.adapted.values() for p in lora.adapter_parameters(layer)]
    with deepspeed.zero.GatheredParameters(adapters, enabled=rank.weights.sharded):
        if adapters and rank.rank == 0:
            lora.save_adapter(rank.policy.hf, rank.config.model, Path(folder, "adapter"))


def base_digest(rank: Rank) -> str:
    """Digest of the weights below the adapters; "" where all weights are trained. A collective over all ranks."""
    if not rank.config.trainer.lora.rank:
        return ""
    with lora.switched_off(rank.policy.hf):
        return sha256(json.dumps(digests(rank.weights)).encode()).hexdigest()
