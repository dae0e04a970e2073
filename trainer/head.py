"""Log-probability and entropy of given tokens from hidden states, without holding [tokens, vocabulary] for backward."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

CHUNK = 1024
"""Tokens whose logits exist at a time."""


class _TokenLogprob(torch.autograd.Function):
    """Saves only logsumexp and entropy per token and computes the logits again in backward; exact for any upstream
    gradient of either output."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, inv_temperature, dtype):
        w = weight.to(dtype)
        n = hidden.shape[0]
        logprob, lse, entropy = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(3))
        for s in _chunks(n):
            logits = F.linear(hidden[s].to(dtype), w).float() * inv_temperature
            chosen = logits.gather(-1, targets[s, None])[:, 0]
            # log_softmax, as the engine does: on CPU its rounding over a large vocabulary is 1e-5 nats away from
            # logsumexp's, more than all layers before it.
            log_p = logits.log_softmax(-1)
            logprob[s] = log_p.gather(-1, targets[s, None])[:, 0]
            lse[s] = chosen - logprob[s]
            entropy[s] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.inv_temperature, ctx.dtype = inv_temperature, dtype
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        w = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for s in _chunks(hidden.shape[0]):
            h = hidden[s].to(ctx.dtype)
            log_p = F.linear(h, w).float().mul_(ctx.inv_temperature).sub_(lse[s, None])
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if grad_logprob is not None:
                grad -= p * grad_logprob[s, None]
                grad.scatter_add_(1, targets[s, None], grad_logprob[s, None])
            if grad_entropy is not None:
                grad -= p * (log_p + entropy[s, None]) * grad_entropy[s, None]
            grad.mul_(ctx.inv_temperature)
            grad_hidden[s] = grad.to(ctx.dtype).matmul(w).to(hidden.dtype)
            grad_weight.addmm_(grad.t(), h.float())
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _chunks(n: int) -> list[slice]:
    return [slice(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]


class LogprobHead(nn.Module):
    """Takes the place of a model's `lm_head` and keeps its Parameter, tied or not, under the same name.

    It is a module so that ZeRO-3 gathers its weight; a bare `F.linear` with the Parameter would see an empty tensor.
    """

    def __init__(self, lm_head: nn.Module, *, fp32: bool) -> None:
        super().__init__()
        if getattr(lm_head, "bias", None) is not None:
            raise ValueError("an lm_head with a bias is not supported")
        self.weight = lm_head.weight
        self.fp32 = fp32

    def forward(
        self, hidden: Float[Tensor, "N H"], targets: Int[Tensor, " N"], temperature: float
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Log-probability of each target and entropy (nats) of softmax(logits / temperature), in fp32."""
        dtype = torch.float32 if self.fp32 else self.weight.dtype
        return _TokenLogprob.apply(hidden, self.weight, targets, 1.0 / temperature, dtype)
