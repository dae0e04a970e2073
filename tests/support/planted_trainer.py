"""Faults of the learner: in its packing, positions, head, mode and settings."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

import trainer.model.attention as attention
import trainer.model.head as head_module
import trainer.model.packing as packing
from pair import Pair
from trainer.model.attention import Segment

# -- settings


@contextmanager
def learner_config(pair: Pair, **changes: Any) -> Iterator[None]:
    """The learner has another config than the run."""
    parts: Any = pair.learner.parts
    old = parts.config
    object.__setattr__(parts, "config", replace(old, **changes))
    try:
        yield
    finally:
        object.__setattr__(parts, "config", old)


# -- the head


@contextmanager
def head_asked(pair: Pair, **changes: Callable[[Any], Any]) -> Iterator[None]:
    """The head gets other arguments: hidden, targets, temperature, truncation, forbidden."""
    head = pair.learner.parts.head
    one = head.forward
    names = ("hidden", "targets", "temperature", "truncation", "support", "forbidden")

    def asked(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("targets") is None:
            return one(*args, **kwargs)
        return one(**(given | {name: change(given.get(name)) for name, change in changes.items()}))

    with patch.object(head, "forward", asked):
        yield


@contextmanager
def logits_changed(pair: Pair, change: Callable[[Any], Any]) -> Iterator[None]:
    """Log-probability and entropy come from other logits (after the temperature)."""
    head = pair.learner.parts.head
    one = head.forward

    def computed(hidden: Any, targets: Any = None, temperature: float = 1.0, *args: Any, **kwargs: Any) -> Any:
        if targets is None:
            return one(hidden)
        log_p = torch.log_softmax(change(head.logits(hidden, head.dtype) / temperature), -1)
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    with patch.object(head, "forward", computed):
        yield


@contextmanager
def head_computes_in_bf16(pair: Pair) -> Iterator[None]:
    """The product of the head is in bf16, although the head is reported as fp32."""
    one = head_module._logits

    def rounded(hidden: Any, w: Any, dtype: Any, *args: Any, **kwargs: Any) -> None:
        one(hidden, w.bfloat16(), torch.bfloat16, *args, **kwargs)

    with patch.object(head_module, "_logits", rounded):
        yield


def softmax_in_bf16(logits: Any) -> Any:
    return logits.bfloat16().float()


def with_empty_column(logits: Any) -> Any:
    """The vocabulary has one more entry, which no token has: its logit is 0."""
    return F.pad(logits, (0, 1))


@contextmanager
def targets_shifted(pair: Pair) -> Iterator[None]:
    """Each column is asked for the token that it reads, not for the next one."""
    policy, seen = pair.learner.parts.policy, []
    one = policy._hidden

    def hidden(input_ids: Any, mask: Any, *more: Any) -> Any:
        seen[:] = [input_ids[:, :-1][mask]]
        return one(input_ids, mask, *more)

    with patch.object(policy, "_hidden", hidden), head_asked(pair, targets=lambda _: seen[0]):
        yield


# -- packing, positions, attention


@contextmanager
def packed_otherwise(change: Callable[[packing.Packed], packing.Packed]) -> Iterator[None]:
    """Rows are laid out otherwise."""
    one = packing.pack
    with patch("trainer.model.policy.pack", lambda *args, **kwargs: change(one(*args, **kwargs))):
        yield


def reply_positions(change: Callable[[Any, Segment], Any]) -> Callable[[packing.Packed], packing.Packed]:
    """Positions of the tokens after a shared prompt are changed."""

    def changed(packed: packing.Packed) -> packing.Packed:
        positions, start = packed.position_ids.clone(), 0
        for s in packed.segments:
            end = start + sum(s.lengths)
            if s.prompt is not None:
                positions[0, start:end] = change(positions[0, start:end], s)
            start = end
        return replace(packed, position_ids=positions)

    return changed


LATER = reply_positions(lambda positions, s: positions + 1)
RESTARTING = reply_positions(lambda positions, s: positions - s.prompt_length)


def prompts_last_column_late(packed: packing.Packed) -> packing.Packed:
    """Every column is answered by the one before it in the packed row."""
    return replace(packed, source=(packed.source - 1).clamp(min=0))


@contextmanager
def attends(change: Callable[..., Any]) -> Iterator[None]:
    """Packed attention is `change(query, key, value, segments=, scaling=)`."""
    with patch.object(attention, "attend_segments", change):
        yield


ATTEND = attention.attend_segments


def leaking(query: Any, key: Any, value: Any, *, segments: Any, scaling: float) -> Any:
    """One causal row: each sequence attends to those before it."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


def prompt_late(query: Any, key: Any, value: Any, *, segments: Any, scaling: float) -> Any:
    """Sequences read the values of their shared prompt one column late."""
    start, moved = 0, value.clone()
    for s in segments:
        end = start + sum(s.lengths)
        if s.prompt is None:
            moved[:, :, start:end] = value[:, :, start:end].roll(1, dims=2)
        start = end
    right = ATTEND(query, key, value, segments=segments, scaling=scaling)
    wrong = ATTEND(query, key, moved, segments=segments, scaling=scaling)
    shared = torch.cat([torch.full((sum(s.lengths),), s.prompt is not None) for s in segments])
    return torch.where(shared[None, :, None, None], wrong, right)


def another_scale(query: Any, key: Any, value: Any, *, segments: Any, scaling: float) -> Any:
    return ATTEND(query, key, value, segments=segments, scaling=scaling * 1.4)


def padding_counted(query: Any, key: Any, value: Any, *, segments: Any, scaling: float) -> Any:
    """Each sequence attends to one padding column, with key and value 0."""
    from itertools import pairwise

    ends = [0]
    for s in segments:
        ends.append(ends[-1] + sum(s.lengths))
    spans, outs = list(pairwise(ends)), []
    for s, (start, end) in zip(segments, spans, strict=True):
        k, v = key[:, :, start:end], value[:, :, start:end]
        own = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool).tril() for n in s.lengths])
        if s.prompt is not None:
            a, b = spans[s.prompt]
            k, v = torch.cat([key[:, :, a:b], k], 2), torch.cat([value[:, :, a:b], v], 2)
            own = F.pad(own, (b - a, 0), value=True)
        k, v, own = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), F.pad(own, (1, 0), value=True)
        q = query[:, :, start:end]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=own, scale=scaling, enable_gqa=True)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1)


@contextmanager
def tree_mask_wrong() -> Iterator[None]:
    """Short replies of a group that attend in one call see the replies before them."""

    def leaky(s: Segment) -> Any:
        causal = s.prompt is None or s.lengths[0] >= max(attention.LONG, 2 * s.prompt_length)
        if causal and len(s.lengths) == 1:
            return None
        n = sum(s.lengths)
        return F.pad(torch.ones(n, n, dtype=torch.bool).tril(), (s.prompt_length, 0), value=True)

    with patch.object(Segment, "mask", property(leaky)):
        yield


@contextmanager
def padded_on_the_left(pair: Pair) -> Iterator[None]:
    """Rows without packing get their padding in front, and attend to it."""
    policy = pair.learner.parts.policy
    body = policy.hf.get_decoder()

    def hidden(input_ids: Any, mask: Any, experts: Any) -> Any:
        assert experts is None
        columns = torch.arange(1, mask.shape[1] + 1)
        spare = (mask.shape[1] - (mask * columns).amax(dim=1)).tolist()
        moved = torch.stack([row.roll(n) for row, n in zip(input_ids[:, :-1], spare, strict=True)])
        out = body(input_ids=moved, use_cache=False).last_hidden_state
        back = torch.stack([row.roll(-n, 0) for row, n in zip(out, spare, strict=True)])
        return back[mask], None

    with patch.object(policy, "_hidden", hidden):
        yield


# -- the body


@contextmanager
def hidden_changed(pair: Pair, change: Callable[[Any], Any]) -> Iterator[None]:
    """Hidden states change between body and head."""
    policy = pair.learner.parts.policy
    one = policy._hidden

    def hidden(*args: Any) -> Any:
        picked, mine = one(*args)
        return change(picked), mine

    with patch.object(policy, "_hidden", hidden):
        yield


@contextmanager
def body_changed(pair: Pair, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """An attribute of every module that has it is changed: inv_freq, variance_epsilon."""
    with ExitStack() as stack:
        for module in pair.learner.parts.policy.hf.modules():
            value = getattr(module, name, None)
            if isinstance(value, torch.Tensor):
                stack.callback(value.copy_, value.clone())
                value.copy_(change(value))
            elif isinstance(value, float):
                stack.enter_context(patch.object(module, name, change(value)))
        yield


@contextmanager
def dropout_on(pair: Pair, p: float) -> Iterator[None]:
    """Each MLP has a dropout, and it is in training mode."""
    with ExitStack() as stack:
        for name, module in pair.learner.parts.policy.hf.named_modules():
            if name.endswith("mlp"):
                module.dropout = torch.nn.Dropout(p).train()
                stack.callback(delattr, module, "dropout")
                one = module.forward
                wrong = lambda x, one=one, module=module: module.dropout(one(x))  # noqa: E731
                stack.enter_context(patch.object(module, "forward", wrong))
        yield


@contextmanager
def body_in_bf16(pair: Pair) -> Iterator[None]:
    """The body runs under autocast."""
    policy = pair.learner.parts.policy
    one = policy._hidden

    def hidden(*args: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            picked, mine = one(*args)
        return picked.to(policy.hf.dtype), mine

    with patch.object(policy, "_hidden", hidden):
        yield
