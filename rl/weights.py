"""What travels when the trainer's weights go to the engines: names, types, shapes, and digests that prove arrival."""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

SMALLEST_BUFFER = 256 << 20
"""Bytes of the buffers that weights are packed into on GPUs, at least. CUDA IPC sends no tensor that is larger than its
buffer, and each of NCCL's two grows by its last tensor."""
_CHUNK = 1 << 20
_PIECE = {"cpu": 1 << 18}
"""Values whose products are made together, where the memory of a chunk's would be too slow."""
_HORNER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


@dataclass(frozen=True, kw_only=True)
class TensorMeta:
    """One tensor on the wire: HF name, dtype name without `torch.`, full shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """The contents of one update, in the order of sending; `digests` by name, if requested."""

    version: int
    tensors: tuple[TensorMeta, ...]
    digests: dict[str, str]

    def total_bytes(self) -> int:
        """Bytes that each receiver gets."""
        return sum(t.nbytes for t in self.tensors)


@cache
def _weights(device: torch.device) -> Tensor:
    """Odd pseudo-random 64-bit multipliers, one for each position of a chunk."""
    i = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device)
    i.mul_(-7046029254386353131)  # Fibonacci hashing; then a finaliser constant of MurmurHash3's family
    return i.bitwise_xor_(i >> 29).mul_(-4658895280553007687).bitwise_or_(1)


def digest(tensor: Tensor) -> str:
    """64-bit digest of a tensor's dtype, shape and exact bits, equal on CPU and GPU.

    sum_i bits_i * mix(i) in wrapping 64-bit integers, with mix(i) a pseudo-random odd multiplier of the position: a
    changed, lost, swapped or shifted value changes it. It detects faults, not forgery. Values of 8 bytes count as two
    of 4, because an odd multiplier cannot distinguish the top bits of two 64-bit values.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}[flat.element_size()])
    weights, total, piece = _weights(flat.device), 0, _PIECE.get(flat.device.type, _CHUNK)
    for part in torch.split(bits, _CHUNK):
        pieces = zip(torch.split(part, piece), torch.split(weights, piece), strict=False)
        total = (total * _HORNER + sum(int((p * w[: p.numel()]).sum()) for p, w in pieces)) % 2**64
    return f"{str(tensor.dtype)[6:]}{list(tensor.shape)}:{total:016x}"


def check_complete(sent: set[str], expected: set[str], receiver: str) -> None:
    """Raise ValueError, before anything is sent, when an update lacks a tensor or has an unknown one."""
    missing, unknown = sorted(expected - sent), sorted(sent - expected)
    if missing or unknown:
        raise ValueError(
            f"the trainer's weights do not match what {receiver} loads: "
            f"{len(missing)} missing (first: {missing[:3]}), {len(unknown)} unknown (first: {unknown[:3]}). "
            "A fused weight that arrives in part gives wrong numbers without any error, so nothing was sent."
        )


def check_digests(sent: dict[str, str], received: dict[str, str], receiver: str) -> None:
    """Raise RuntimeError with the name of the first tensor whose bits differ between receiver and sender."""
    for name, want in sent.items():
        got = received.get(name, "nothing")
        if got != want:
            raise RuntimeError(f"weight {name!r} arrived at {receiver} as {got}, but {want} was sent")
