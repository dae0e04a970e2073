"""The lm_head on CPU: correct after an update even when it is tied, and cast to fp32 once per update.

LogitsProcessor is a pluggable layer, so vLLM builds this class instead of its own. vLLM 0.32 on CPU has two faults
here:

- A tied head multiplies by a copy of its weight that was packed at start. A weight update refreshes the embedding but
  not this copy, so the logits silently remain those of the start model.
- An fp32 head over bf16 weights casts the whole weight at every decoded token. For a vocabulary of 49,152 and 576
  features the cast takes longer than the product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


@LogitsProcessor.register_oot(name="LogitsProcessor")
class FreshHeadLogitsProcessor(LogitsProcessor):
    """LogitsProcessor that reads the head's live weight on CPU, and caches its cast to the head's dtype."""

    head: Tensor | None = None
    """The cast weight; None before the first forward pass and after `forget_heads`."""

    def forward(
        self,
        lm_head: VocabParallelEmbedding,
        hidden_states: Tensor,
        embedding_bias: Tensor | None = None,
        skip_gather: bool = False,
    ) -> Tensor | None:
        if hidden_states.device.type != "cpu" or self.logits_as_input or lm_head.tp_size > 1:
            return super().forward(lm_head, hidden_states, embedding_bias, skip_gather)
        dtype = self.head_dtype or hidden_states.dtype
        if self.head is None:
            self.head = lm_head.get_parameter("weight").detach()[: self.org_vocab_size].to(dtype)
        bias = None if embedding_bias is None else embedding_bias[: self.org_vocab_size].to(dtype)
        logits = F.linear(hidden_states.to(dtype), self.head, bias)
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits if self.scale == 1.0 else logits * self.scale


def forget_heads(model: nn.Module) -> None:
    """Drop the cached heads. Call it after every weight update, because an in-place copy cannot be detected."""
    for module in model.modules():
        if isinstance(module, FreshHeadLogitsProcessor):
            module.head = None
