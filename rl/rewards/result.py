"""What did a reward return? A number, named parts, or that it does not apply; anything else is refused."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any, SupportsFloat

import numpy as np
from torch import Tensor

from rl.typed import show


class NotApplicable:
    """What a reward returns where it does not apply to a reply: `return NOT_APPLICABLE`."""

    def __repr__(self) -> str:
        return "NOT_APPLICABLE"


NOT_APPLICABLE = NotApplicable()
"""Returned by a reward that does not apply to a reply. As a part it is left out of the sum; as the whole it takes the
sample out of training and out of its group's statistics. It is never a 0. (None is refused: a function that forgot its
`return` gives None too.)"""
Part = SupportsFloat | NotApplicable


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A reward whose parts do not add up to it, such as a weighted sum: `parts` are only logged."""

    reward: Part
    parts: Mapping[str, Part] = field(default_factory=dict[str, Part])


Score = SupportsFloat | NotApplicable | Mapping[str, Part] | Scored
"""A number (numpy and torch scalars too), named parts that are added up, both, or NOT_APPLICABLE."""
Points = tuple[float | None, dict[str, float]]
"""The reward, None where none applies, and those of its parts that apply."""
RIGHT_FORM = "return a finite float, or a dict of finite floats (NOT_APPLICABLE where it does not apply)"
LARGEST = float(np.finfo(np.float32).max)
"""Rewards become float32: above this they would be infinite."""


def number(value: Any) -> float | None:
    """A Python, numpy or torch number as a float; None for everything else. One element of a tensor is a number."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        size = value.numel() if isinstance(value, Tensor) else value.size
        value = value.item() if size == 1 else None
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


class NoScore(ValueError):
    """A reward returned something that is no score; the message is the end of a sentence about the reward."""


def points(result: Any) -> Points:
    """A reward's result as numbers. Raises NoScore for everything that is no score."""
    if applies_not(result):
        return None, {}
    if isinstance(result, Scored):
        parts = parts_of(result.parts)
        return None if applies_not(result.reward) else finite(result.reward, ""), parts
    if not isinstance(result, Mapping):
        return finite(result, ""), {}
    parts = parts_of(result)
    if not result:
        raise NoScore("is {}")
    return finite(sum(parts.values()), " as a sum") if parts else None, parts


def parts_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Named parts as floats, without those that do not apply. Raises NoScore for a part that is no number."""
    return {str(name): finite(part, f" in the part {name!r}") for name, part in result.items() if not applies_not(part)}


def applies_not(result: Any) -> bool:
    """Whether a result is NOT_APPLICABLE, or its class."""
    return isinstance(result, NotApplicable) or result is NotApplicable


def finite(value: Any, where: str) -> float:
    """A number that float32 can hold, as a float. Raises NoScore for everything else."""
    found = number(value)
    if found is None or not abs(found) <= LARGEST:
        beyond = ", which is infinite in float32" if found is not None and not math.isnan(found) else ""
        raise NoScore(f"is {show(value)}{where}{beyond}")
    return found


def rows_of(result: Any, replies: int) -> list[Any]:
    """The scores of a whole group, one for each reply. Raises NoScore where their number differs."""
    if isinstance(result, np.ndarray | Tensor):
        result = list(result)
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise NoScore(f"is {show(result)}, not a list with one score for each of {replies} replies")
    if len(result) != replies:
        raise NoScore(f"has {len(result)} scores for {replies} replies")
    return list(result)
