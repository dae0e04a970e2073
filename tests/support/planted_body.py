"""Faults of the engine's body and head, planted inside the engine's process, between and in the layers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from planted_worker import every, model_of, named, renew, wrapped


def attentions(worker: Any) -> list[Any]:
    """vLLM's attention layers; each has its implementation as `impl`."""
    return [m for m in named(worker, "attn") if hasattr(m, "impl")]


def head_of(worker: Any) -> Any:
    return next(m for m in model_of(worker).modules() if isinstance(m, LogitsProcessor))


def norms(worker: Any) -> list[Any]:
    return [m for m in model_of(worker).modules() if hasattr(m, "variance_epsilon")]


# -- attention


@contextmanager
def attention_differs(worker: Any, name: str, value: Any) -> Iterator[None]:
    """A constant of attention (scale, sliding_window, logits_soft_cap) is another one; a factor if it is the scale."""
    with ExitStack() as stack:
        for layer in attentions(worker):
            new = layer.impl.scale * value if name == "scale" else value
            stack.enter_context(patch.object(layer.impl, name, new))
        yield


@contextmanager
def window_differs(worker: Any, window: int) -> Iterator[None]:
    """The layers that have a sliding window have another one."""
    with ExitStack() as stack:
        for layer in attentions(worker):
            if layer.impl.sliding_window > 0:
                stack.enter_context(patch.object(layer.impl, "sliding_window", window))
        yield


@contextmanager
def not_causal(worker: Any) -> Iterator[None]:
    """A token of a prompt attends to the tokens after it."""

    def attend(one: Any, layer: Any, q: Any, k: Any, v: Any, cache: Any, metadata: Any, *args: Any, **more: Any) -> Any:
        if metadata is None:
            return one(layer, q, k, v, cache, metadata, *args, **more)
        with patch.object(metadata, "causal", False):
            return one(layer, q, k, v, cache, metadata, *args, **more)

    with every([layer.impl for layer in attentions(worker)], "forward", attend):
        yield


@contextmanager
def heads_mixed_up(worker: Any) -> Iterator[None]:
    """Query heads use the keys of another group: interleaved instead of repeated."""

    def attend(one: Any, q: Any, k: Any, v: Any, **more: Any) -> Any:
        heads, size = layer_heads, layer_size
        order = torch.arange(heads).view(-1, 2).t().reshape(-1)
        back = order.argsort()
        mixed = q.view(-1, heads, size)[:, order].reshape(q.shape)
        return one(mixed, k, v, **more).view(-1, heads, size)[:, back].reshape(q.shape)

    layers = attentions(worker)
    layer_heads, layer_size = layers[0].num_heads, layers[0].head_size
    with every(layers, "forward", attend):
        yield


@contextmanager
def cache_rounds(worker: Any) -> Iterator[None]:
    """The KV cache holds keys and values that were rounded to bf16."""

    def update(one: Any, layer: Any, key: Any, value: Any, *args: Any) -> Any:
        return one(layer, key.bfloat16().to(key.dtype), value.bfloat16().to(value.dtype), *args)

    with ExitStack() as stack:
        for layer in attentions(worker):
            stack.enter_context(wrapped(layer.impl, "do_kv_cache_update", update))
        yield


@contextmanager
def cache_shared(worker: Any) -> Iterator[None]:
    """The last layer reads the keys and values of the first."""
    first, *_, last = attentions(worker)

    def attend(one: Any, layer: Any, q: Any, k: Any, v: Any, cache: Any, *args: Any, **more: Any) -> Any:
        return one(layer, q, k, v, first.kv_cache if cache.numel() else cache, *args, **more)

    with wrapped(last.impl, "forward", attend):
        yield


@contextmanager
def cache_keeps_old(worker: Any) -> Iterator[None]:
    """The values of every fifth slot of the KV cache are not written: what an earlier request left is read."""

    def update(one: Any, layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> Any:
        fresh = slots % 5 != 4
        n = len(slots)
        return one(layer, key[:n][fresh], value[:n][fresh], cache, slots[fresh])

    with ExitStack() as stack:
        for layer in attentions(worker):
            stack.enter_context(wrapped(layer.impl, "do_kv_cache_update", update))
        yield


# -- positions


@contextmanager
def rope_differs(worker: Any, theta: float, factor: float) -> Iterator[None]:
    """The rotary embedding has another base, or its positions are divided by a factor."""
    with ExitStack() as stack:
        for rotary in named(worker, "rotary_emb"):
            right = rotary.cos_sin_cache.clone()
            stack.enter_context(patch.object(rotary, "base", rotary.base * theta))
            inverse = rotary._compute_inv_freq(rotary.base) / factor
            angles = torch.outer(torch.arange(right.shape[0], dtype=torch.float), inverse)
            rotary.cos_sin_cache.copy_(torch.cat([angles.cos(), angles.sin()], dim=-1).to(right.dtype))
            stack.callback(lambda rotary=rotary, right=right: rotary.cos_sin_cache.copy_(right))
        yield
        renew(worker)


@contextmanager
def positions_differ(worker: Any, how: str) -> Iterator[None]:
    """Positions of sampled tokens are one too high ("later"), or no position exceeds 30 ("clamped")."""

    def rotate(one: Any, positions: Any, *args: Any) -> Any:
        if how == "clamped":
            return one(positions.clamp(max=30), *args)
        metadata: Any = get_forward_context().attn_metadata
        metadata = next(iter(metadata.values())) if isinstance(metadata, dict) else metadata
        decode = metadata is not None and int(metadata.max_query_len) == 1
        return one(positions + 1 if decode else positions, *args)

    with every(named(worker, "rotary_emb"), "forward", rotate):
        yield


# -- norms, residual stream, embedding, layers


@contextmanager
def eps_differs(worker: Any, eps: float) -> Iterator[None]:
    with ExitStack() as stack:
        for norm in norms(worker):
            stack.enter_context(patch.object(norm, "variance_epsilon", eps))
        yield


@contextmanager
def residual_in_bf16(worker: Any) -> Iterator[None]:
    """What travels past the layers is rounded to bf16 at every norm."""

    def normed(one: Any, x: Any, residual: Any = None) -> Any:
        if residual is None:
            return one(x)
        out, residual = one(x, residual)
        return out, residual.bfloat16().to(residual.dtype)

    with every(norms(worker), "forward", normed):
        yield


@contextmanager
def norms_in_bf16(worker: Any) -> Iterator[None]:
    """The norms compute and return bf16."""

    def normed(one: Any, x: Any, residual: Any = None) -> Any:
        if residual is None:
            return one(x).bfloat16().to(x.dtype)
        out, residual = one(x, residual)
        return out.bfloat16().to(x.dtype), residual

    with every(norms(worker), "forward", normed):
        yield


@contextmanager
def output_scaled(worker: Any, ending: str, factor: float) -> Iterator[None]:
    """The output of each module of this name is multiplied."""

    def scaled(one: Any, *args: Any, **kwargs: Any) -> Any:
        out = one(*args, **kwargs)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    with every(named(worker, ending), "forward", scaled):
        yield


@contextmanager
def embedding_scaled(worker: Any, factor: float) -> Iterator[None]:
    """What the model multiplies its embedding by is multiplied."""

    def embedded(one: Any, ids: Any) -> Any:
        return one(ids) * factor

    with wrapped(model_of(worker).model, "embed_input_ids", embedded):
        yield


@contextmanager
def layer_skipped(worker: Any, index: int) -> Iterator[None]:
    """One layer returns what it was given."""

    def skipped(_: Any, positions: Any, hidden: Any, residual: Any, *args: Any) -> Any:
        return hidden, residual

    with wrapped(named(worker, "layers")[0][index], "forward", skipped):
        yield


@contextmanager
def dropout_on(worker: Any, p: float) -> Iterator[None]:
    """The engine's model is in training mode, and drops a part of each MLP's output."""

    def dropped(one: Any, x: Any) -> Any:
        return torch.dropout(one(x), p, True)

    with every(named(worker, "mlp"), "forward", dropped):
        yield


@contextmanager
def other_activation(worker: Any) -> Iterator[None]:
    """GELU where the model has SiLU."""

    def gelu(_: Any, x: Any) -> Any:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate) * up

    with every(named(worker, "act_fn"), "forward", gelu):
        yield


# -- the head


@contextmanager
def head_differs(worker: Any, name: str, value: Any) -> Iterator[None]:
    """A constant of the logits (head_dtype, scale, soft_cap) is another one; a dtype is given by its name."""
    with patch.object(head_of(worker), name, getattr(torch, value) if name == "head_dtype" else value):
        renew(worker)
        yield


@contextmanager
def head_biased(worker: Any) -> Iterator[None]:
    """The head adds a bias that the model does not have."""

    def biased(one: Any, lm_head: Any, hidden: Any, embedding_bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        size = lm_head.weight.shape[0]
        bias = 0.3 * torch.sin(torch.arange(size, dtype=torch.float32))
        return one(lm_head, hidden, bias, *args, **kwargs)

    with wrapped(head_of(worker), "forward", biased):
        yield


@contextmanager
def hidden_scaled(worker: Any, factor: float) -> Iterator[None]:
    """Hidden states are multiplied between the last norm and the head."""

    def computed(one: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return one(hidden * factor, *args, **kwargs)

    with wrapped(model_of(worker), "compute_logits", computed):
        yield
