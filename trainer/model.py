"""The policy as the trainer sees it: a Hugging Face body, our head, and a value head if the objective has a critic."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rl.truncation import Truncation
from rl.types import PolicyOutput
from trainer.head import LogprobHead
from trainer.shared_prompts import pack


class Policy(nn.Module):
    """A causal language model that answers: how likely were these tokens?"""

    def __init__(self, hf: PreTrainedModel, *, fp32_head: bool, with_values: bool, share_prompts: bool) -> None:
        super().__init__()
        self.hf = hf
        self.share_prompts = share_prompts
        hf.set_output_embeddings(LogprobHead(hf.get_output_embeddings(), fp32=fp32_head))
        self.value_head = nn.Linear(hf.config.get_text_config().hidden_size, 1, dtype=hf.dtype) if with_values else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        mask: Bool[Tensor, "B T"],
        temperature: float,
        truncation: Truncation | None = None,
        support: Int[Tensor, "B T K"] | None = None,
    ) -> PolicyOutput:
        """What the policy says at every column of `mask`; 0 elsewhere, where nothing is computed.

        With truncated sampling, over the tokens kept: those that the engine reports in `support` (padded with -1),
        else those that `truncation` keeps of the policy's own logits.
        """
        picked = self._hidden(input_ids, mask)
        logprobs, entropy = self.hf.get_output_embeddings()(
            picked, input_ids[:, 1:][mask], temperature, truncation, None if support is None else support[mask]
        )
        values = None if self.value_head is None else self.value_head(picked)[:, 0].float()
        return PolicyOutput(
            logprobs=_scatter(logprobs, mask),
            entropy=_scatter(entropy, mask),
            values=None if values is None else _scatter(values, mask),
        )

    def _hidden(self, input_ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "N H"]:
        """Last hidden states of the masked columns, in the batch's order."""
        body = self.hf.get_decoder()
        if self.share_prompts and mask.any():
            packed = pack(input_ids.cpu(), mask.cpu())
            device = input_ids.device
            hidden = body(
                input_ids=packed.input_ids.to(device),
                position_ids=packed.position_ids.to(device),
                attention_mask=packed.attention.to(device),
                use_cache=False,
            ).last_hidden_state
            return hidden.flatten(0, 1)[packed.source.to(device)]
        # Rows are right-padded, so causal attention never sees padding and needs no mask of its own.
        return body(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state[mask]


def _scatter(picked: Float[Tensor, " N"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return torch.zeros(mask.shape, dtype=picked.dtype, device=picked.device).masked_scatter(mask, picked)


def load(
    path: str,
    *,
    dtype: str,
    fp32_head: bool,
    share_prompts: bool,
    with_values: bool = False,
    checkpointing: bool = False,
) -> Policy:
    """Load a causal LM from a folder or the hub. Raises whatever transformers raises when it is not one."""
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    if checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(hf, fp32_head=fp32_head, with_values=with_values, share_prompts=share_prompts)


def parameter_count(path: str) -> int:
    """Parameters of a model, from its config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return sum(p.numel() for p in model.parameters())
