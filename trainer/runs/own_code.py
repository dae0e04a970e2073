"""Has the code of a reward, an environment or an objective changed? A digest of it, and of what it uses.

It covers the user's own files. Best effort: it sees functions, classes, constants and what they name, not what they
read at run time.
"""

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from rl import checkout
from rl.config import Config
from rl.data import Eval
from trainer.runs.settings import name_of, plain

CONSTANTS = (bool, int, float, complex, str, bytes, tuple, frozenset, list, dict, set, re.Pattern, type(None))
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def code_digests(config: Config, sets: Mapping[str, Eval] | None = None) -> dict[str, str]:
    """Digest of the user's own code by what it is for and its name."""
    parts = {"reward": config.reward, "env": config.env, "agent": config.agent, "eval_reward": config.eval_reward}
    parts |= {"objective": config.objective}
    parts |= {"correction": config.correction} | {f"filters[{i}]": each for i, each in enumerate(config.filters)}
    for name, each in (sets or {}).items():
        parts |= {f"evals[{name!r}].{part}": getattr(each, part) for part in ("reward", "env", "answer")}
    found: dict[str, str] = {}
    for role, value in parts.items():
        seen: dict[int, Any] = {}
        pieces = list(_pieces(value, seen)) if value is not None else []
        if pieces:
            digest = hashlib.blake2b(json.dumps([PYTHON, *pieces]).encode(), digest_size=16).hexdigest()
            # Python's version decides the bytecode, so digests of two versions are not compared.
            found[f"{role} {_name(value)} (Python {PYTHON})"] = digest
    return found


def _name(value: Any) -> str:
    value = getattr(value, "func", value) if isinstance(value, partial) else value
    return name_of(value if hasattr(value, "__qualname__") else type(value))


def _pieces(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Texts that change with the code of a value; nothing for installed code and for what was seen."""
    if isinstance(value, partial):
        yield from _all([value.func, *value.args, *value.keywords.values()], seen)
        return
    if inspect.ismethod(value):
        yield from _all([value.__func__, type(value.__self__)], seen)
        return
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, CONSTANTS):
        yield json.dumps(plain(value))
        return
    if id(value) in seen:
        return
    seen[id(value)] = value
    if not isinstance(value, FunctionType | type | ModuleType):
        yield from _of_object(value, seen)
        return
    if not _own(value):
        return
    if isinstance(value, FunctionType):
        yield from _of_function(value, seen)
    elif isinstance(value, type):
        yield name_of(value)
        for name, member in vars(value).items():
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(member, FunctionType | type) or (isinstance(member, CONSTANTS) and not name.startswith("__")):
                yield name
                yield from _pieces(member, seen)
        yield from _all(value.__bases__, seen)


def _all(values: Any, seen: dict[int, Any]) -> Iterator[str]:
    for value in values:
        yield from _pieces(value, seen)


def _of_object(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """The class of an object, and the functions in its fields; config.json shows their values."""
    yield from _pieces(type(value), seen)
    for each in getattr(value, "__dict__", {}).values():
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, list | tuple) else [each]
        for one in inner:
            code = isinstance(one, FunctionType | partial | type) or inspect.ismethod(one)
            if code or _own(type(one)) or is_dataclass(one):
                yield from _pieces(one, seen)


def _of_function(function: FunctionType, seen: dict[int, Any]) -> Iterator[str]:
    found: list[str] = []
    names = list(dict.fromkeys(_of_bytes(function.__code__, function.__doc__, found)))
    yield from found
    yield from _all([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()], seen)
    scope = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            scope[name] = cell.cell_contents
        except ValueError:
            continue  # a name that is not bound yet
    for value in scope.values():
        if isinstance(value, ModuleType) and _own(value):
            # The names are also those of attributes: `checks.is_right` is `checks` and `is_right`.
            yield from _all([vars(value)[n] for n in names if n in vars(value)], seen)
        else:
            yield from _pieces(value, seen)


def _of_bytes(code: CodeType, doc: str | None, found: list[str]) -> Iterator[str]:
    """Global names that a code uses; what it does is appended to `found`."""
    found.append(code.co_code.hex())
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _of_bytes(const, None, found)
        elif const is None or const != doc:
            found.append(json.dumps(plain(const)))
    found += code.co_names


def _own(value: Any) -> bool:
    """Whether code is the user's: neither ours nor installed."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    if str(name).partition(".")[0] in (*checkout.PACKAGES, "builtins", "None"):
        return False
    file = getattr(sys.modules.get(str(name)), "__file__", None)
    return file is None or not checkout.is_installed(Path(file).resolve())
