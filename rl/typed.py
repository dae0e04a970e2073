"""Does a value have the type that its field declares? Checked when the value is made, with the right form in the error.

Python alone, no library: beartype looks at one element of a list, takes True for an int, and its messages show types
instead of the line to write.
"""

import collections.abc
import dataclasses
import inspect
import itertools
import math
import numbers
import reprlib
import types
import typing
from functools import lru_cache
from typing import Any

_Hints = dict[str, Any]


class Checked:
    """A dataclass that inherits from this has its fields checked before its own `__post_init__` runs.

    Lossless conversions are made: int to a declared float, list to a declared tuple, tuple to a declared list. Raises
    ValueError for everything else. A class can add the right form to the message with `right_form`.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if own := cls.__dict__.get("__post_init__"):
            # Wrapped, because a user's `__post_init__` need not call ours, and must not see an unchecked value.
            def __post_init__(self: Any) -> None:
                check_fields(self)
                own(self)

            __post_init__.__doc__ = own.__doc__
            cls.__post_init__ = __post_init__

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def right_form(cls, field: str, value: Any) -> str | None:
        """What to write instead of `value`, as the end of a sentence; None: the general advice is enough."""
        return None

    def located(self, path: str) -> tuple[str, str]:
        """A wrong field as the user knows it, and where it is, as the end of a sentence."""
        name = type(self).__name__
        return path, "" if name == "Config" else f" (in {name})"


class Misfit(Exception):
    """A value that does not have its declared type: where it is, what it is, and what is wrong with it."""

    def __init__(self, path: str, value: Any, problem: str) -> None:
        super().__init__(path, value, problem)
        self.path, self.value, self.problem = path, value, problem


def check_fields(owner: Any) -> None:
    """Check every field of a dataclass, and convert what can be converted without loss. Raises ValueError."""
    cls = type(owner)
    lost(cls)
    for name, hint in hints_of(cls).items():
        value = getattr(owner, name)
        fitted = fit_field(owner, name, value, hint)
        if fitted is not value:
            object.__setattr__(owner, name, fitted)
        for above in declared_above(cls, name):
            # A subclass that declares `str` where its parent declares a few words must still use one of them.
            fit_field(owner, name, fitted, above)


@lru_cache(maxsize=1024)
def declared_above(cls: type, name: str) -> tuple[Any, ...]:
    """The other types that the parents of a class declare for a field."""
    own = hints_of(cls)[name]
    above = (hints_of(each).get(name, own) for each in cls.__mro__[1:] if dataclasses.is_dataclass(each))
    return tuple({repr(hint): hint for hint in above if hint != own}.values())


@lru_cache(maxsize=256)
def lost(cls: type) -> None:
    """Raise ValueError for a default that dataclasses drop silently: one without a type, or without the decorator."""
    known = {field.name for field in dataclasses.fields(cls)}
    for each in cls.__mro__:
        if each is Checked or not issubclass(each, Checked):
            continue
        own = inspect.get_annotations(each)
        fields = [name for name, hint in own.items() if not str(hint).removeprefix("typing.").startswith("ClassVar")]
        if fields and "__dataclass_fields__" not in each.__dict__:
            raise ValueError(
                f"{each.__name__} declares {fields[0]}, and is no dataclass: write "
                "@dataclass(frozen=True, kw_only=True) above the class"
            )
        for name in known - own.keys():
            if name in each.__dict__ and not callable(getattr(each.__dict__[name], "__get__", None)):
                value, hint = show(each.__dict__[name]), hints_of(cls).get(name, Any)
                kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                raise ValueError(
                    f"{name} = {value} in {each.__name__} has no type, so its parent's default would stay: write "
                    f"{name}: {kind} = {value}"
                )


def fit_field(owner: Any, name: str, value: Any, hint: Any) -> Any:
    """A value as a field of a dataclass must have it. Raises ValueError with the right form."""
    cls = type(owner)
    try:
        return fit(value, hint, name)
    except Misfit as error:
        advice = cls.right_form(name, error.value) or f"must be {described(hint)}{_example(cls, name)}"
        path, where = owner.located(error.path)
        raise ValueError(f"{path}={show(error.value)} {error.problem or advice}{where}") from None


@lru_cache(maxsize=256)
def hints_of(cls: type) -> _Hints:
    """Declared type by field. Empty for a class whose annotations exist for type checkers alone."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError:
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@lru_cache(maxsize=1024)
def parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Origin and arguments of a generic type; typing works both out anew at every call."""
    return typing.get_origin(hint), typing.get_args(hint)


def fit(value: Any, hint: Any, path: str) -> Any:
    """The value as its hint declares it. Raises Misfit; an unknown kind of hint accepts everything."""
    if hint is Any or (type(value) is hint and hint is not float):
        return value
    origin, args = parts(hint)
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, args, path)
    if origin is typing.Literal:
        if not any(value == each and type(value) is type(each) for each in args):
            raise Misfit(path, value, f"is not one of {', '.join(map(repr, args))}")
        return value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return _fit_sequence(value, origin, args, path)
    if origin in (dict, collections.abc.Mapping) and isinstance(value, collections.abc.Mapping):
        for key, each in value.items():
            fit(key, args[0], f"the key of {path}")
            fit(each, args[1], f"{path}[{key!r}]")
        return value
    if origin is collections.abc.Callable:
        if isinstance(value, type):
            raise Misfit(path, value, f"is a class: write {path}={value.__name__}(...)")
        return value if callable(value) else _refuse(path, value)
    return _fit_plain(value, origin or hint, path)


def _fit_union(value: Any, arms: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in arms:
        return None
    misfits: list[Misfit] = []
    for arm in arms:
        try:
            return fit(value, arm, path)
        except Misfit as misfit:
            misfits.append(misfit)
    # The arm that came furthest is the one that was meant.
    raise max(misfits, key=lambda misfit: (len(misfit.path), misfit.path, bool(misfit.problem)))


def _fit_sequence(value: Any, wanted: Any, args: tuple[Any, ...], path: str) -> Any:
    fixed = wanted is tuple and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise Misfit(path, value, f"must have {len(args)} values")
    each = args if fixed else (args[0],) * len(value)
    fitted = [fit(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, each, strict=True))]
    same = type(value) is wanted and all(a is b for a, b in zip(fitted, value, strict=True))
    return value if same else wanted(fitted)


def _fit_plain(value: Any, hint: Any, path: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if not math.isnan(value) else _refuse(path, value)
    if not isinstance(hint, type) or hint is type(None):
        return value if hint is not type(None) or value is None else _refuse(path, value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # numpy's integers
    if isinstance(value, type) and issubclass(value, hint):
        raise Misfit(path, value, f"is a class: write {path}={value.__name__}()")
    if isinstance(value, str) and hint is not type and (near := _named(hint, value)):
        raise Misfit(path, value, f"is text: write {path}={near}(), with `from {_home(near, hint)} import {near}`")
    if (
        isinstance(value, collections.abc.Mapping)
        and dataclasses.is_dataclass(hint)
        and value.keys() <= hints_of(hint).keys()
    ):
        fields = ", ".join(f"{key}={each!r}" for key, each in value.items())
        raise Misfit(path, value, f"is a dict: write {path}={hint.__name__}({fields})")
    return _refuse(path, value)


def _refuse(path: str, value: Any) -> Any:
    raise Misfit(path, value, "")


def _named(hint: type, name: str) -> str | None:
    """The subclass of `hint` that is called `name`, in any spelling."""
    wanted = name.replace("-", "").replace("_", "").lower()
    return next((cls.__name__ for cls in _subclasses(hint) if cls.__name__.lower() == wanted), None)


def _subclasses(cls: type) -> list[type]:
    return [each for sub in cls.__subclasses__() for each in (sub, *_subclasses(sub))]


def _home(name: str, hint: type) -> str:
    """The module to import a class from: its package where that exports it."""
    module = next(cls.__module__ for cls in _subclasses(hint) if cls.__name__ == name)
    package = module.rpartition(".")[0]
    return package if hasattr(__import__(package, fromlist=[name]), name) else module


def _example(cls: type, name: str) -> str:
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    given = isinstance(field.default, int | float | str | tuple) and not isinstance(field.default, bool)
    return f", such as {field.default!r}" if given and field.default not in ("", ()) else ""


def described(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(arg) for arg in args)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a tuple ({', '.join(described(arg) for arg in args)})"
    if origin in (list, tuple):
        return f"a {origin.__name__} of {described(args[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"a dict of {described(args[1])} by name"
    names = {int: "an integer", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    if origin is collections.abc.Callable:
        return "a function"
    return names.get(hint) or getattr(hint, "__name__", "a value")


def show(value: Any, most: int = 80) -> str:
    """A value in an error message: at most `most` characters, and without an address."""
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return str(value.__name__)
    text = _SHORT.repr(value)
    if text.startswith("<") and " at 0x" in text:
        return f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shortened(text: str, most: int) -> str:
    """A text of at most some `most` characters: its beginning and its end, and how much is left out between them."""
    if len(text) <= most:
        return text
    begin = 2 * most // 3
    return f"{text[:begin]} [... {len(text) - most:,} characters left out ...] {text[begin - most :]}"


class _Short(reprlib.Repr):
    """`repr` of the first items of a container, and of the start of a text: a value may have megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 40
        self.maxother = 400

    def repr_str(self, x: str | bytes, level: int) -> str:
        return repr(x[:200])

    repr_bytes = repr_str

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        # In the order of the dict, as `repr` has it; reprlib sorts.
        shown = [
            f"{self.repr1(k, level - 1)}: {self.repr1(x[k], level - 1)}" for k in itertools.islice(x, self.maxdict)
        ]
        return "{" + ", ".join([*shown, *(["..."] if len(x) > self.maxdict else [])]) + "}"


_SHORT = _Short()
