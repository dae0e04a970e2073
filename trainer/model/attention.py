"""How does attention work in a packed row? Sequences lie next to each other without padding; none sees another."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

NAME = "segments"
"""Name of this attention in transformers."""

PLAIN = frozenset({"llama", "mistral", "mixtral", "olmo2", "olmoe", "qwen2", "qwen3", "qwen3_moe", "smollm3"})
"""Families in which attention is causal and nothing else mixes tokens. A test compares each with separate rows."""

SPECIAL = ("sliding_window", "softcap", "s_aux", "position_bias")
"""Features of attention that a model may need and that are not supported here."""

LONG = 512
"""Completions of at least so many tokens recompute prompt queries with causal attention instead of a mask: on CPU,
causal attention skips later tokens, and a mask does not."""


def grouped(kernel: Any) -> dict[str, bool]:
    """How to tell the varlen kernel that there are fewer key-value heads; torch 2.11's takes them without a word."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}


GROUPED = grouped(varlen_attn)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Adjacent sequences in one attention call: causal within each, full on their shared prompt."""

    lengths: tuple[int, ...]
    """Tokens of each sequence; several sequences only where they are short, because a call has a fixed cost."""
    prompt: int | None = None
    """Index in the row of the segment that is their prompt, which each of them sees completely."""
    prompt_length: int = 0

    @cached_property
    def mask(self) -> Bool[Tensor, "L K"] | None:
        """True where a token attends: its prompt, and its own sequence up to itself. None: causal over prompt and
        sequence together."""
        causal = self.prompt is None or self.lengths[0] >= max(LONG, 2 * self.prompt_length)
        if causal and len(self.lengths) == 1:
            return None
        own = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool).tril() for n in self.lengths])
        return F.pad(own, (self.prompt_length, 0), value=True)


def packs(config: PreTrainedConfig) -> bool:
    """Whether a model's rows can be packed: its family is in `PLAIN`, and no layer has a sliding window.

    Other models run on padded rows. To add a family, show with tests/unit/test_packing.py that nothing leaks.
    """
    text = config.get_text_config()
    plain = text.model_type in PLAIN and "sliding_attention" not in (getattr(text, "layer_types", None) or [])
    return plain and getattr(text, "sliding_window", None) is None


def check_split(config: PreTrainedConfig, ranks: int) -> None:
    """Raise ValueError if `ranks` ranks cannot share the rows of a model."""
    text = config.get_text_config()
    if not packs(config):
        raise ValueError(
            f"trainer.sequence_parallel={ranks} divides packed rows, and rows of {text.model_type} stay padded: set "
            "it to 1"
        )
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    if heads % ranks or groups % ranks:
        raise ValueError(
            f"trainer.sequence_parallel={ranks} must divide the model's attention heads ({heads}) and key-value heads "
            f"({groups})"
        )


def use_segments(hf: PreTrainedModel) -> None:
    """Make a model take `segments=` in its forward call. Without `segments` a row is one causal sequence."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    hf.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B G S D"],
    value: Float[Tensor, "B G S D"],
    attention_mask: None,
    *,
    scaling: float,
    dropout: float = 0.0,
    segments: Sequence[Segment] | None = None,
    split: Any = None,
    **asked: Any,
) -> tuple[Float[Tensor, "B S H D"], None]:
    """transformers' interface of attention. With `split` (`Ulysses`) the arguments hold a part of `segments`' row.

    Raises ValueError for a model that needs more than causal attention, because its numbers would be wrong.
    """
    special = [name for name in SPECIAL if asked.get(name) is not None] + ["dropout"] * (dropout > 0)
    if special:
        raise ValueError(f"this model's attention needs {', '.join(special)}, which packed rows do not support")
    if segments is None:
        segments = [Segment(lengths=(query.shape[2],))]
    attention = attend_segments if split is None else split.attend
    return attention(query, key, value, segments=segments, scaling=scaling), None


def attend_segments(
    query: Float[Tensor, "B H S D"],
    key: Float[Tensor, "B G S D"],
    value: Float[Tensor, "B G S D"],
    *,
    segments: Sequence[Segment],
    scaling: float,
) -> Float[Tensor, "B S H D"]:
    """Attention over a whole row: one call per segment.

    On CUDA in half precision, where no prompt is shared, one varlen kernel computes the row.
    """
    one_row = len(query) == 1 and all(s.prompt is None for s in segments)
    if query.is_cuda and query.dtype != torch.float32 and one_row:
        lengths = tuple(n for s in segments for n in s.lengths)
        ends = sequence_ends(lengths, query.device)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        most = max(lengths)
        out = varlen_attn(q, k, v, ends, ends, most, most, scale=scaling, window_size=(-1, 0), **GROUPED)
        assert isinstance(out, Tensor)
        return out[None]
    # Split instead of slices: the backward of a slice writes a whole row of zeros.
    sizes = [sum(s.lengths) for s in segments]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    outs = []
    for s, q, k, v in zip(segments, queries, keys, values, strict=True):
        if s.prompt is not None:
            k, v = torch.cat([keys[s.prompt], k], dim=2), torch.cat([values[s.prompt], v], dim=2)
            if s.mask is None:
                q = torch.cat([queries[s.prompt], q], dim=2)
        mask = None if s.mask is None else s.mask.to(q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outs.append(out.transpose(1, 2)[:, -sum(s.lengths) :])
    return torch.cat(outs, dim=1)


@lru_cache(maxsize=4)
def sequence_ends(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " N"]:
    """Columns where sequences of `lengths` tokens begin, and the end of the last: int32 [sequences + 1] on `device`.

    All layers of a row share it, because a copy to a GPU waits for the GPU.
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _no_mask(*, attention_mask: Tensor | None = None, **_: Any) -> None:
    if attention_mask is not None:
        raise ValueError("packed rows have no padding: pass `segments`, or rows of one length without attention_mask")
