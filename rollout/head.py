"""An fp32 lm_head on CPU that casts its weight once per update instead of once per decoded token.

vLLM's CPU path runs `F.linear(h.float(), W.float())` at every step: for a vocabulary of 49,152 and 576 features the
cast alone takes longer than the product. LogitsProcessor is a pluggable layer, so vLLM builds this one in its place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor


@LogitsProcessor.register_oot(name="LogitsProcessor")
class CachedHeadLogitsProcessor(LogitsProcessor):
    """Same numbers as LogitsProcessor; keeps an fp32 copy of a bf16 head on CPU until `forget_heads`."""

    fp32_head: Tensor | None = None

    def forward(
        self,
        lm_head: nn.Module,
        hidden_states: Tensor,
        embedding_bias: Tensor | None = None,
        skip_gather: bool = False,
    ) -> Tensor | None:
        casts = self.head_dtype is torch.float32 and hidden_states.dtype is not torch.float32
        if hidden_states.is_cuda or not casts or self.logits_as_input or lm_head.tp_size > 1:
            return super().forward(lm_head, hidden_states, embedding_bias, skip_gather)
        if self.fp32_head is None:
            self.fp32_head = lm_head.weight.detach()[: self.org_vocab_size].float()
        bias = None if embedding_bias is None else embedding_bias[: self.org_vocab_size].float()
        logits = F.linear(hidden_states.float(), self.fp32_head, bias)
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits if self.scale == 1.0 else logits * self.scale


def forget_heads(model: nn.Module) -> None:
    """Drop the fp32 copies. To be called after every weight update: an in-place copy leaves no trace to detect."""
    for module in model.modules():
        if isinstance(module, CachedHeadLogitsProcessor):
            module.fp32_head = None
