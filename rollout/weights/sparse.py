"""Lossless updates of 16-bit weights that send only what changed.

After one optimizer step at the learning rates of RL, most bf16 values are unchanged, bit for bit. An update is coded as
the gaps between changed positions and the differences of the bit patterns, each close to its entropy. Gaps are
geometric, so their low bits are noise and are sent raw; everything else goes through zlib's Huffman coder.
"""

import math
import zlib

import numpy as np
import torch
from torch import Tensor

_ESCAPE = 255
_MEAN_QUOTIENT = 32
_COUNTS = 7
_FAR = 3
"""Most steps are -1, 1 or -2. They are coded in two bits each, four in a byte, before the Huffman coder. Without this,
the coder, which spends at least one whole bit per symbol and one to end its block, would need half as much again."""


def encode(old: Tensor, new: Tensor) -> Tensor:
    """The changes from `old` to `new` (both flat int16), as flat uint8. Raises ValueError for other types or sizes."""
    if old.dtype != torch.int16 or new.dtype != torch.int16 or old.shape != new.shape or old.dim() != 1:
        raise ValueError(
            "encode takes two flat int16 tensors of one size, not "
            f"{old.dtype} {list(old.shape)} and {new.dtype} {list(new.shape)}"
        )
    changed = _changed(old, new)
    gaps = changed.diff(prepend=torch.tensor([-1])).sub_(1).numpy()
    steps = (new[changed] - old[changed]).numpy()
    low = _low_bits(len(changed), new.numel())
    codes = _zigzag(steps) - 1
    near = np.minimum(codes, _FAR)
    parts = [*_bytes(gaps >> low), _raw_bits(gaps, low), _huffman(_fours(near)), *_bytes(codes[near == _FAR])]
    head = np.array([new.numel(), len(changed), *(len(p) for p in parts[:5])], dtype=np.int64)
    return torch.frombuffer(bytearray(b"".join([head.tobytes(), *parts])), dtype=torch.uint8)


def apply(payload: Tensor, image: Tensor) -> int:
    """Change `image` (flat int16, the `old` of `encode`) to the new values in place; returns how many changed."""
    data = payload.numpy().tobytes()
    numel, count, *sizes = np.frombuffer(data[: 8 * _COUNTS], dtype=np.int64).tolist()
    if numel != image.numel():
        raise ValueError(f"a sparse update of {numel} values cannot change {image.numel()}")
    cuts = np.cumsum([8 * _COUNTS, *sizes]).tolist()
    quotients, far_gaps, raw, near, far, farther = (data[a:b] for a, b in zip(cuts, [*cuts[1:], None], strict=True))
    low = _low_bits(count, numel)
    gaps = (_values(quotients, far_gaps) << low) | _from_raw_bits(raw, low, count)
    positions = torch.from_numpy(np.cumsum(gaps + 1) - 1)
    codes = _from_fours(_unhuffman(near), count)
    codes[codes == _FAR] = _values(far, farther)
    z = codes + 1
    image[positions] += torch.from_numpy(((z >> 1) ^ -(z & 1)).astype(np.int16))
    return count


def _changed(old: Tensor, new: Tensor) -> Tensor:
    """Positions that differ, in order. Most values are equal, so four at a time are compared first."""
    whole = old.numel() // 4 * 4
    words = (old[:whole].view(torch.int64) != new[:whole].view(torch.int64)).nonzero()
    near = (words * 4 + torch.arange(4)).view(-1)
    rest = torch.arange(whole, old.numel())
    near = torch.cat([near, rest])
    return near[old[near] != new[near]]


def _low_bits(count: int, numel: int) -> int:
    """The number of low bits of a gap that are sent raw, chosen so that the rest is small on average."""
    return max(0, math.ceil(math.log2(numel / count / _MEAN_QUOTIENT))) if count else 0


def _zigzag(steps: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    wide = steps.astype(np.int32)
    return (wide << 1) ^ (wide >> 31)


def _bytes(values: np.ndarray) -> tuple[bytes, bytes]:
    """Non-negative values as Huffman-coded bytes, and in full those that do not fit into a byte."""
    small = np.minimum(values, _ESCAPE).astype(np.uint8)
    return _huffman(small.tobytes()), values[values >= _ESCAPE].astype(np.uint32).tobytes()


def _values(small: bytes, far: bytes) -> np.ndarray:
    """The inverse of `_bytes`."""
    values = _unhuffman(small).astype(np.int64)
    values[values == _ESCAPE] = np.frombuffer(far, dtype=np.uint32)
    return values


def _huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(level=1, wbits=-15, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def _unhuffman(data: bytes) -> np.ndarray:
    return np.frombuffer(zlib.decompress(data, wbits=-15), dtype=np.uint8)


def _fours(codes: np.ndarray) -> bytes:
    """Two-bit values, four in a byte."""
    padded = np.zeros(-(-len(codes) // 4) * 4, dtype=np.uint8)
    padded[: len(codes)] = codes
    return (padded.reshape(-1, 4) << np.array([0, 2, 4, 6], dtype=np.uint8)).sum(1, dtype=np.uint8).tobytes()


def _from_fours(data: np.ndarray, count: int) -> np.ndarray:
    return ((data[:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8)) & 3).reshape(-1)[:count].astype(np.int64)


def _raw_bits(gaps: np.ndarray, low: int) -> bytes:
    if not low:
        return b""
    bits = (gaps[:, None] >> np.arange(low)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _from_raw_bits(raw: bytes, low: int, count: int) -> np.ndarray:
    if not low:
        return np.zeros(count, dtype=np.int64)
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=low * count).reshape(count, low)
    return bits.astype(np.int64) @ (1 << np.arange(low))
