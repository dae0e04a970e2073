"""How likely are given tokens? From hidden states, without keeping [tokens, vocabulary] for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rl.sampling.forbidden import named
from rl.sampling.truncation import Truncation, keep
from trainer.model.logits import PLAIN, LogitsMap
from trainer.model.product import gradients, operand, write_product

CHUNK, CHUNK_ON_GPU = 256, 2048
"""Tokens whose logits exist at a time: as many as a CPU's cache takes, or as keep a GPU busy."""


class _TokenLogprob(torch.autograd.Function):
    """Saves only logsumexp and entropy per token, and recomputes the logits in backward; exact for any upstream
    gradient of either output. The kept tokens are a constant of the gradient, and are recomputed too."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, inv_temperature, dtype, mapped, truncation, support, forbidden):
        w = operand(weight, hidden, dtype)
        n = hidden.shape[0]
        logprob, lse, entropy = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(3))
        spaces = _spaces(hidden, w)
        for s in _chunks(n, w.device):
            logits, space = (x[: s.stop - s.start] for x in spaces)
            _logits(hidden[s], w, dtype, bias, mapped, inv_temperature, out=logits)
            chosen = logits.gather(-1, targets[s, None])[:, 0]
            kept = _kept(logits, s, targets, truncation, support, forbidden)
            if kept is not None:
                logits.masked_fill_(~kept, -torch.inf)
            # log_softmax, as the engine does: on CPU its rounding over a large vocabulary is 1e-5 nats away from
            # logsumexp's, more than all layers before it.
            log_p = torch.log_softmax(logits, -1, out=space)
            logprob[s] = log_p.gather(-1, targets[s, None])[:, 0]
            lse[s] = chosen - logprob[s]
            p = torch.exp(log_p, out=logits)
            if kept is not None:
                log_p.masked_fill_(~kept, 0.0)  # where p is 0, -inf would make NaN of it
            entropy[s] = -p.mul_(log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy, support, forbidden)
        ctx.inv_temperature, ctx.dtype, ctx.mapped, ctx.truncation = inv_temperature, dtype, mapped, truncation
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, bias, targets, lse, entropy, support, forbidden = ctx.saved_tensors
        mapped: LogitsMap = ctx.mapped
        w = operand(weight, hidden, ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        # Frozen under adapters.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        up_logprob, up_entropy = (
            torch.zeros_like(lse) if g is None else g * ctx.inv_temperature for g in (grad_logprob, grad_entropy)
        )
        spaces = _spaces(hidden, w)
        for s in _chunks(hidden.shape[0], w.device):
            logits, space = (x[: s.stop - s.start] for x in spaces)
            _logits(hidden[s], w, ctx.dtype, bias, mapped, ctx.inv_temperature, out=logits)
            # Only a soft cap needs a third array of the vocabulary.
            capped = None if mapped.cap is None else logits / ctx.inv_temperature
            kept = _kept(logits, s, targets, ctx.truncation, support, forbidden)
            log_p = logits.sub_(lse[s, None])
            p = torch.exp(log_p, out=space)
            if kept is not None:
                p.masked_fill_(~kept, 0.0)
            # -p (d/dlogprob + d/dentropy (log p + entropy)), in place: two arrays of the vocabulary at a time.
            if grad_entropy is None:
                grad = p.mul_(-up_logprob[s, None])
            else:
                grad = log_p.add_(entropy[s, None]).mul_(up_entropy[s, None]).add_(up_logprob[s, None]).mul_(p).neg_()
            grad.scatter_add_(1, targets[s, None], up_logprob[s, None])
            mapped.backward_(grad, capped)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad_hidden[s] = gradients(grad, w, hidden[s], ctx.dtype, add_to=grad_weight)
        sums = (g if g is None else g.to(of.dtype) for g, of in ((grad_weight, weight), (grad_bias, bias)))
        return grad_hidden, *sums, *[None] * 7


def _spaces(hidden: Float[Tensor, "N H"], w: Float[Tensor, "V H"]) -> tuple[Float[Tensor, "C V"], Float[Tensor, "C V"]]:
    """Memory for two arrays of a chunk, reused by all chunks: on CPU, new pages cost as much as a sum over them."""
    shape = min(chunk_of(w.device.type), hidden.shape[0]), w.shape[0]
    return torch.empty(shape, device=w.device), torch.empty(shape, device=w.device)


def _logits(
    hidden: Float[Tensor, "C H"],
    w: Float[Tensor, "V H"],
    dtype: torch.dtype,
    bias: Float[Tensor, " V"] | None,
    mapped: LogitsMap,
    inv_temperature: float,
    *,
    out: Tensor,
) -> None:
    """Write logits / temperature into `out` [C, V], in fp32 from a product in `dtype`."""
    write_product(hidden, w, dtype, out=out)
    if bias is not None:
        out.add_(bias)
    mapped.apply_(out).mul_(inv_temperature)


def _kept(
    logits: Float[Tensor, "C V"],
    s: slice,
    targets: Int[Tensor, " N"],
    truncation: Truncation | None,
    support: Int[Tensor, "N K"] | None,
    forbidden: Int[Tensor, "N F"] | None,
) -> Bool[Tensor, "C V"] | None:
    """Vocabulary entries that a chunk's tokens were sampled from; None for the whole vocabulary."""
    if support is not None:
        kept = named(support[s], logits)
    elif truncation is not None:
        kept = keep(logits if forbidden is None else without(logits, forbidden[s]), truncation)
    else:
        # A forbidden target has the probability 0: the engine cannot have sampled it.
        return None if forbidden is None else ~named(forbidden[s], logits)
    # The engine sampled the target, so the engine kept it, even if rounding at the boundary excludes it here.
    return kept.scatter_(1, targets[s, None], True)


def without(logits: Float[Tensor, "C V"], ids: Int[Tensor, "C K"]) -> Float[Tensor, "C V"]:
    """A copy of logits with -inf at these entries of each row; -1 names none."""
    return logits.masked_fill(named(ids, logits), -torch.inf)


def chunk_of(device: str) -> int:
    """Tokens whose logits exist at a time on a device ("cpu" or "cuda")."""
    return CHUNK_ON_GPU if device == "cuda" else CHUNK


def _chunks(n: int, device: torch.device) -> list[slice]:
    size = chunk_of(device.type)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


class LogprobHead(nn.Module):
    """Replaces a model's `lm_head` and keeps its Parameters, tied or not, under the same names.

    It is a module because ZeRO-3 gathers weights of modules; a bare `F.linear` would see an empty tensor.
    """

    def __init__(self, lm_head: nn.Module, *, fp32: bool, mapped: LogitsMap = PLAIN) -> None:
        super().__init__()
        self.weight: nn.Parameter = lm_head.get_parameter("weight")
        self.bias: nn.Parameter | None = getattr(lm_head, "bias", None)
        self.fp32 = fp32
        self.mapped = mapped
        """What the model does to the product afterwards."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the product."""
        return torch.float32 if self.fp32 else self.weight.dtype

    def forward(
        self,
        hidden: Float[Tensor, "*N H"],
        targets: Int[Tensor, " N"] | None = None,
        temperature: float = 1.0,
        truncation: Truncation | None = None,
        support: Int[Tensor, "N K"] | None = None,
        forbidden: Int[Tensor, "N F"] | None = None,
    ) -> Tensor | tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Log-probability of each target and entropy (nats) of softmax(logits / temperature), in fp32.

        `support` (kept ids, padded with -1), else `truncation`, restricts the softmax to the kept tokens; each target
        is one of them. `forbidden` (ids, padded with -1) takes tokens out before that. Without targets it is a plain
        lm_head for the model's own forward: products [*N, V], in fp32.
        """
        if targets is None:
            return self.product(hidden, self.dtype)
        how = 1.0 / temperature, self.dtype, self.mapped, truncation, support, forbidden
        return _TokenLogprob.apply(hidden, self.weight, self.bias, targets, *how)

    def product(self, hidden: Float[Tensor, "*N H"], dtype: torch.dtype) -> Float[Tensor, "*N V"]:
        """What the model's own lm_head returns, multiplied in `dtype`, in fp32."""
        out = F.linear(hidden.to(dtype), self.weight.to(dtype)).float()
        return out if self.bias is None else out + self.bias

    def logits(self, hidden: Float[Tensor, "*N H"], dtype: torch.dtype) -> Float[Tensor, "*N V"]:
        """The model's logits, of a product in `dtype`, in fp32. Needs gathered parameters."""
        return self.mapped.apply_(self.product(hidden, dtype))


@contextmanager
def watched(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what goes into a head until the end."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()
