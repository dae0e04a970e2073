"""How is an argument's type written as JSON schema, and does a value have it?"""

import collections.abc
import enum
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, cast

from rl.tools.errors import ToolError
from rl.typed import show

WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
KINDS = "str, int, float, bool, list[...], tuple[..., ...], dict[str, ...], Literal[...], an Enum, or several with |"


def schema_of(hint: Any, where: str) -> dict[str, Any]:
    """JSON schema of a declared type. Raises ValueError for a type that JSON does not have."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is typing.Annotated:
        texts = [each for each in args[1:] if isinstance(each, str)]
        return schema_of(args[0], where) | ({"description": texts[0]} if texts else {})
    if origin in (typing.Union, types.UnionType):
        arms = [schema_of(arm, where) for arm in args if arm is not type(None)]
        if len(arms) == 1:
            return arms[0] | {"nullable": True}
        return {"anyOf": arms} | ({"nullable": True} if type(None) in args else {})
    if origin is typing.Literal:
        return _choices(list(args))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choices([member.value for member in hint])
    if hint in WORDS:
        return {"type": WORDS[hint]}
    kind = origin or hint
    if kind in (list, tuple, collections.abc.Sequence):
        if kind is tuple and args[1:] != (...,) and args:
            fixed = [schema_of(each, where) for each in args]
            return {"type": "array", "prefixItems": fixed, "minItems": len(fixed), "maxItems": len(fixed)}
        return {"type": "array"} | ({"items": schema_of(args[0], where)} if args else {})
    if kind in (dict, collections.abc.Mapping) and (not args or args[0] is str):
        return {"type": "object"} | ({"additionalProperties": schema_of(args[1], where)} if args else {})
    raise ValueError(f"{where} has the type {show(hint)}, which JSON does not have: write {KINDS}")


def _choices(values: list[Any]) -> dict[str, Any]:
    kinds = {WORDS.get(type(value), "string") for value in values}
    return ({"type": kinds.pop()} if len(kinds) == 1 else {}) | {"enum": values}


def fit(value: Any, hint: Any, where: str) -> Any:
    """The value as its type is declared. Raises ToolError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Annotated:
        return fit(value, args[0], where)
    if origin in (typing.Union, types.UnionType):
        return _fit_one(value, args, where)
    if origin is typing.Literal:
        return _chosen(value, {each: each for each in args}, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _chosen(value, {member.value: member for member in hint}, where)
    kind = origin or hint
    if kind in (list, tuple, collections.abc.Sequence) and isinstance(value, list | tuple):
        return _fit_items(cast(list[Any], value), kind, args, where)
    if kind in (dict, collections.abc.Mapping) and isinstance(value, Mapping):
        items = cast(Mapping[str, Any], value)
        return {key: fit(each, args[1] if args else Any, f"{show(key)} in {where}") for key, each in items.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):
        return float(value)
    if kind is int and number and math.isfinite(value) and value == int(value):
        return int(value)
    if kind in (str, bool, type(None)) and isinstance(value, kind):
        return value
    raise ToolError(f"the argument {where} must be {_in_words(hint)}, not {show(value)}")


def _fit_one(value: Any, arms: tuple[Any, ...], where: str) -> Any:
    """The value as one of several types: the type that it has, else the first that it can become."""
    own = [arm for arm in arms if type(value) is arm]
    for arm in [*own, *arms]:
        try:
            return fit(value, arm, where)
        except ToolError:
            continue
    words = " or ".join(dict.fromkeys(_in_words(arm) for arm in arms))
    raise ToolError(f"the argument {where} must be {words}, not {show(value)}")


def _fit_items(value: list[Any], kind: Any, args: tuple[Any, ...], where: str) -> Any:
    fixed = kind is tuple and bool(args) and args[1:] != (...,)
    if fixed and len(value) != len(args):
        raise ToolError(f"the argument {where} must have {len(args)} values, not {len(value)}")
    each = args if fixed else (args[0] if args else Any,) * len(value)
    fitted = [fit(v, h, f"item {i} of {where}") for i, (v, h) in enumerate(zip(value, each, strict=True))]
    return tuple(fitted) if kind is tuple else fitted


def _chosen(value: Any, choices: Mapping[Any, Any], where: str) -> Any:
    for key, chosen in choices.items():
        if key == value and isinstance(key, bool) == isinstance(value, bool):
            return chosen
    raise ToolError(f"the argument {where} must be one of {', '.join(map(show, choices))}, not {show(value)}")


def _in_words(hint: Any) -> str:
    """A type in the words of JSON."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _in_words(args[0])
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(repr(member.value) for member in hint)}"
    kind = origin or hint
    names = {str: "a text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    names |= {list: "a list", tuple: "a list", collections.abc.Sequence: "a list"}
    return names.get(kind, "an object")
