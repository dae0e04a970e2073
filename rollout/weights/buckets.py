"""How tensors are packed into a few large messages. Both sides derive the same cut from names, types and shapes."""

from collections.abc import Iterable, Iterator
from math import prod

import torch
from torch import Tensor

BUCKET_BYTES = 64 << 20
_ALIGN = 16

Meta = tuple[str, torch.dtype, tuple[int, ...]]
Bucket = tuple[list[tuple[Meta, int]], int]
"""Tensors with their offsets in bytes, and the size of the bucket in bytes."""


def buckets(metas: Iterable[Meta], limit: int) -> Iterator[Bucket]:
    """Cut tensors, in order, into buckets of at most `limit` bytes; a larger tensor gets its own bucket."""
    items: list[tuple[Meta, int]] = []
    size = 0
    for meta in metas:
        _, dtype, shape = meta
        need = -(-prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
        if items and size + need > limit:
            yield items, size
            items, size = [], 0
        items.append((meta, size))
        size += need
    if items:
        yield items, size


def pack(bucket: Bucket, tensors: Iterator[tuple[str, Tensor]], into: Tensor | None = None) -> Tensor:
    """One flat uint8 buffer of the bucket's tensors, taken from `tensors` in order; `into` is the memory to use.

    Raises ValueError when `tensors` yields another tensor than was announced: both sides would cut differently.
    """
    items, size = bucket
    # Zeros, because checksums include the bytes between tensors.
    buffer = torch.zeros(size, dtype=torch.uint8) if into is None else into
    for (name, dtype, shape), offset in items:
        got_name, tensor = next(tensors, ("nothing more", torch.empty(0)))
        got = (got_name, tensor.dtype, tuple(tensor.shape))
        if got != (name, dtype, shape):
            raise ValueError(f"the weight source announced {(name, dtype, shape)} but yields {got}")
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        buffer[offset : offset + flat.numel()].copy_(flat)
    return buffer


def unpack(bucket: Bucket, buffer: Tensor) -> list[tuple[str, Tensor]]:
    """Named views into a received buffer."""
    return [
        (name, buffer[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape))
        for (name, dtype, shape), offset in bucket[0]
    ]
