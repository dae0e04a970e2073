"""Does an engine compute the same when it is asked twice?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl.parity.body.fits import LAYER_ERROR, error
from rl.parity.evidence import Change


def first_change(one: dict[str, Any], other: dict[str, Any], dtype: str) -> Change | None:
    """The first change between two traces of `rollout.trace`, None without one; rounding does not count."""
    count = len(one["prompt"])
    for name, record in one["layers"].items():
        again = other["layers"].get(name)
        if again is None:
            continue
        given = [_pair(a, b, count) for a, b in zip(record["in"], again["in"], strict=False)]
        made = [] if record["out"] is None or again["out"] is None else [_pair(record["out"], again["out"], count)]
        limit = LAYER_ERROR[dtype]
        if any(a.shape == b.shape and error(a, b) > limit for a, b in (*given, *made)):
            changed = torch.zeros(count, dtype=torch.bool)
            for a, b in (*given, *made):
                if a.shape == b.shape and len(a) == count:
                    apart = (a - b).square().reshape(count, -1).sum(dim=1)
                    changed |= apart > limit**2 * b.square().reshape(count, -1).sum(dim=1)
            took_the_same = all(a.shape == b.shape and error(a, b) <= limit for a, b in given)
            rows = int(changed.sum())
            remembers = record["role"] == "attention" and took_the_same
            return Change(name=name, rows=rows, of=count, remembers=remembers)
    return None


def _pair(a: Sequence[Any], b: Sequence[Any], count: int) -> tuple[Tensor, Tensor]:
    return _rows(a, count), _rows(b, count)


def _rows(plain: Sequence[Any], count: int) -> Tensor:
    dtype, shape, data = plain  # a list once it has travelled
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)
    return tensor[:count].float()
