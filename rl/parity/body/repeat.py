"""Does an engine compute the same when it is asked twice?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl.parity.body.fits import LAYER_ERROR, error


def first_change(one: dict[str, Any], other: dict[str, Any], dtype: str) -> str:
    """The first module, in the order of execution, that took in or gave out something else for the same prompt; "" if
    none did. Both are traces of `rollout.trace`; rounding does not count."""
    rows = len(one["prompt"])
    for name, record in one["layers"].items():
        again = other["layers"].get(name)
        if again is None:
            continue
        sides = [*zip(record["in"], again["in"], strict=False)]
        if record["out"] is not None and again["out"] is not None:
            sides.append((record["out"], again["out"]))
        pairs = [(_rows(a, rows), _rows(b, rows)) for a, b in sides]
        if any(a.shape == b.shape and error(a, b) > LAYER_ERROR[dtype] for a, b in pairs):
            return name
    return ""


def _rows(plain: Sequence[Any], count: int) -> Tensor:
    dtype, shape, data = plain  # a list once it has travelled
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)
    return tensor[:count].float()
