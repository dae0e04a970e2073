"""A third side next to engine and trainer: a fresh copy of the model that computes plainly, in fp32, row by row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rl.types import Batch
from trainer.model.files import remote_code
from trainer.model.head import watched
from trainer.model.lora import as_engines_have_it


@dataclass(frozen=True)
class Witness:
    """A model that shares no module, no packing and no softmax with the policy, and has its weights."""

    hf: Any

    @torch.no_grad()
    def row(
        self, ids: Int[Tensor, " S"], positions: Int[Tensor, " S"] | None = None, window: int = 0
    ) -> tuple[Float[Tensor, "S V"], Float[Tensor, "S H"]]:
        """Logits of one sequence and what its lm_head gets, in fp32.

        `positions` other than 0, 1, ... and a `window` of so many tokens are experiments.
        """
        more: dict[str, Tensor] = {} if positions is None else {"position_ids": positions[None]}
        if window or positions is not None:
            # transformers would take positions that do not grow by 1 for packed sequences, and cut there.
            window = window or len(ids)
            seen_by = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).tril().triu(1 - window)
            more["attention_mask"] = torch.where(seen_by, 0.0, torch.finfo(torch.float32).min)[None, None]
        with watched(self.hf.get_output_embeddings()) as seen:
            logits = self.hf(input_ids=ids[None], use_cache=False, **more).logits[0]
        return logits.float(), seen[-1][0].float()

    def rows(self, batch: Batch) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N H"]]:
        """The same at the masked columns of a batch, in its order."""
        logits, hidden = [], []
        for ids, mask in zip(batch.input_ids, batch.mask, strict=True):
            columns = mask.nonzero()[:, 0]
            if not len(columns):
                continue
            row_logits, row_hidden = self.row(ids[: int(columns[-1]) + 1])
            logits.append(row_logits[columns])
            hidden.append(row_hidden[columns])
        return torch.cat(logits), torch.cat(hidden)


@torch.no_grad()
def make_witness(policy_hf: nn.Module, model: str, *, device: torch.device, sharded: bool, remote: bool) -> Witness:
    """Load the model's files again and give it the policy's weights, adapters merged. A collective under ZeRO-3."""
    with remote_code(model, remote) as more:
        hf: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager", **more)
    hf = hf.to(device).eval()
    ours = dict(policy_hf.named_modules())
    for path, module in hf.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        source = ours[path]
        with deepspeed.zero.GatheredParameters(list(source.parameters()), enabled=sharded):
            given = as_engines_have_it(source)
            for name, parameter in own.items():
                parameter.data = given.get_parameter(name).detach().float().to(device, copy=True)
    return Witness(hf)


@contextmanager
def in_fp32(module: nn.Module) -> Iterator[None]:
    """A module computes in fp32 until the end; its own weights are untouched and come back. Not for sharded ones."""
    kept = [(t, t.data) for t in (*module.parameters(), *module.buffers()) if t.dtype in (torch.bfloat16, torch.half)]
    for tensor, data in kept:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
