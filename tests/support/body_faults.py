"""Faults in the body of a running engine, between its layers and in them, each of which can be mended again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu
from vllm.model_executor.layers.attention import Attention

from faults import FaultyExtension
from live import Live
from rl.parity.body.fits import grids, rounded


class BodyFaults(FaultyExtension):
    """The worker's side: `break_body(name)` plants one, `mend_body()` undoes that."""

    def break_body(self, name: str) -> None:
        self.undone: list[Callable[[], Any]] = []
        self.model: Any = self.weight_transfer_engine.model
        self.layers = self.model.model.layers
        self.attentions: list[Any] = [m for m in self.model.modules() if isinstance(m, Attention)]
        getattr(self, "_" + name.replace(" ", "_"))()

    def mend_body(self) -> None:
        for undo in reversed(self.undone):
            undo()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        own = vars(owner).get(name, self)
        before = getattr(owner, name)
        self.undone.append(lambda: delattr(owner, name) if own is self else setattr(owner, name, before))
        setattr(owner, name, value)

    # -- attention -----------------------------------------------------------------------------------------------------

    def _attention(self, **values: Any) -> None:
        for one in self.attentions:
            for name, value in values.items():
                self._set(one.impl, name, value)

    def _attention_scale(self) -> None:
        self._attention(scale=self.attentions[0].impl.scale * 1.1)

    def _attention_window(self) -> None:
        self._attention(sliding_window=8)

    def _attention_cap(self) -> None:
        self._attention(logits_soft_cap=2.0)

    def _no_attention_cap(self) -> None:
        self._attention(logits_soft_cap=0)

    def _keys(self, change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """`change` gets the index of a layer, and the keys and values that go into its cache."""
        for index, one in enumerate(self.attentions):
            store = one.impl.do_kv_cache_update

            def changed(layer: Any, k: Any, v: Any, *more: Any, at: int = index, f: Any = store) -> Any:
                return f(layer, *change(at, k, v), *more)

            self._set(one.impl, "do_kv_cache_update", changed)

    def _not_causal(self) -> None:
        for one in self.attentions:
            forward = one.impl.forward

            def changed(
                layer: Any, q: Any, k: Any, v: Any, cache: Any, meta: Any, output: Any, f: Any = forward, **rest: Any
            ) -> Any:
                f(layer, q, k, v, cache, meta, output, **rest)
                if meta is not None and len(q) > 1 and len(meta.seq_lens) == 1:
                    n = len(q)
                    kk, vv = (x[:n].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (k, v))
                    p = (q[:n].transpose(0, 1) @ kk.transpose(1, 2) * layer.impl.scale).softmax(-1)
                    output[:n] = (p @ vv).transpose(0, 1)
                return output

            self._set(one.impl, "forward", changed)

    def _kv_in_bf16(self) -> None:
        self._keys(lambda at, k, v: (rounded(k, "bf16"), rounded(v, "bf16")))

    def _kv_in_fp8(self) -> None:
        self._keys(lambda at, k, v: (rounded(k, "fp8 (e4m3)"), rounded(v, "fp8 (e4m3)")))

    def _shared_kv(self) -> None:
        kept: dict[int, Any] = {}

        def change(at: int, k: Tensor, v: Tensor) -> Any:
            kept[at] = k.clone(), v.clone()
            return kept[0] if at == 1 else (k, v)

        self._keys(change)

    def _stale_kv(self) -> None:
        for one in self.attentions:
            forward = one.impl.forward

            def changed(
                layer: Any, q: Any, k: Any, v: Any, cache: Any, *more: Any, f: Any = forward, **rest: Any
            ) -> Any:
                if len(q) < 4:
                    cache.copy_(cache.roll(5, dims=-1))
                return f(layer, q, k, v, cache, *more, **rest)

            self._set(one.impl, "forward", changed)

    # -- positions -----------------------------------------------------------------------------------------------------

    def _rotary(self) -> list[Any]:
        return list({id(layer.self_attn.rotary_emb): layer.self_attn.rotary_emb for layer in self.layers}.values())

    def _cache(self, of: Callable[[Any], Tensor]) -> None:
        for one in self._rotary():
            forward, other = one.forward, of(one).to(one.cos_sin_cache.dtype)

            def changed(
                p: Tensor, q: Tensor, k: Tensor, one: Any = one, f: Any = forward, other: Tensor = other
            ) -> Any:
                before = one.cos_sin_cache.clone()
                one.cos_sin_cache.copy_(other)
                out = f(p, q, k)
                one.cos_sin_cache.copy_(before)
                return out

            self._set(one, "forward", changed)

    def _rope_theta(self) -> None:
        def of(one: Any) -> Tensor:
            n = one.rotary_dim
            speed = 5e5 ** -(torch.arange(0, n, 2) / n)
            angles = torch.arange(len(one.cos_sin_cache))[:, None] * speed
            return torch.cat([angles.cos(), angles.sin()], -1)

        self._cache(of)

    def _rope_scaling(self) -> None:
        def of(one: Any) -> Tensor:
            n = one.rotary_dim
            angles = torch.arange(len(one.cos_sin_cache))[:, None] / 4 * one.base ** -(torch.arange(0, n, 2) / n)
            return torch.cat([angles.cos(), angles.sin()], -1)

        self._cache(of)

    def _move(self, when: Callable[[Tensor], bool], by: int) -> None:
        for one in self._rotary():
            forward = one.forward
            self._set(one, "forward", lambda p, q, k, f=forward: f(p + by if when(p) else p, q, k))

    def _positions_moved(self) -> None:
        self._move(lambda p: True, 3)

    def _positions_moved_in_decode(self) -> None:
        self._move(lambda p: len(p) < 4, 1)

    # -- stream and layers ---------------------------------------------------------------------------------------------

    def _residual_in_bf16(self) -> None:
        for layer in self.layers:
            forward = layer.forward

            def changed(*args: Any, f=forward, **kwargs: Any) -> Any:
                hidden, residual = f(*args, **kwargs)
                return hidden, rounded(residual, "bf16")

            self._set(layer, "forward", changed)

    def _branch_scaled(self) -> None:
        forward = self.layers[0].mlp.forward
        self._set(self.layers[0].mlp, "forward", lambda x: forward(x) * 1.2)

    def _activation(self) -> None:
        def changed(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, dim=-1)
            return gelu(gate) * up

        for layer in self.layers:
            self._set(layer.mlp.act_fn, "forward", changed)

    def _eps(self) -> None:
        for layer in self.layers:
            self._set(layer.input_layernorm, "variance_epsilon", 1e-4)

    def _embedding_scaled(self) -> None:
        embedding = self.model.model.embed_tokens
        forward = embedding.forward
        self._set(embedding, "forward", lambda ids: forward(ids) * 1.3)

    def _layers_swapped(self) -> None:
        one, other = self.layers[0].forward, self.layers[1].forward
        self._set(self.layers[0], "forward", other)
        self._set(self.layers[1], "forward", one)

    def _layer_skipped(self) -> None:
        self._set(self.layers[1], "forward", lambda positions, hidden, residual: (hidden, residual))

    def _other_tokens(self) -> None:
        embedding = self.model.model.embed_tokens
        hook = embedding.register_forward_pre_hook(lambda m, args: (args[0].roll(1, 0),), prepend=True)
        self.undone.append(hook.remove)

    def _head_scaled(self) -> None:
        self._set(self.model.logits_processor, "scale", self.model.logits_processor.scale * 1.05)

    # -- weights, at the next update -----------------------------------------------------------------------------------

    def _load(self, change: Callable[[str, Tensor], Tensor]) -> None:
        kind = type(self.model)
        load = kind.load_weights
        self.undone.append(lambda: setattr(kind, "load_weights", load))
        kind.load_weights = lambda model, weights: load(model, [(n, change(n, t)) for n, t in weights])

    def _norm_scaled(self) -> None:
        self._load(lambda n, t: t * 1.05 if n.endswith("layers.1.post_attention_layernorm.weight") else t)

    def _int8(self) -> None:
        self._load(lambda n, t: dict(grids(t))["int8 with a scale for each row"] if n.endswith("proj.weight") else t)

    def _fp8(self) -> None:
        wanted = "fp8 (e4m3) with a scale for each tensor"
        self._load(lambda n, t: dict(grids(t))[wanted] if n.endswith("proj.weight") else t)

    def _weight_of_another_layer(self) -> None:
        self._set(self.layers[1].self_attn.o_proj, "forward", self.layers[0].self_attn.o_proj.forward)

    def _weight_is_noise(self) -> None:
        self._load(lambda n, t: torch.randn_like(t) * t.std() if n.endswith("0.mlp.down_proj.weight") else t)


@contextmanager
def in_body(live: Live, name: str) -> Iterator[None]:
    """A fault inside the engine's model."""
    live.wait(live.engine.llm.collective_rpc("break_body", args=(name,)))
    try:
        yield
    finally:
        live.wait(live.engine.llm.collective_rpc("mend_body"))
