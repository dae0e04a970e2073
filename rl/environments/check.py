"""Is this an environment? Its methods, their arguments and its tools, seen before anything starts."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from rl.tools.methods import tools_of
from rl.typed import show

METHODS = {"start": "", "parse": "text", "call": "name, arguments", "reply": "turn", "reward": "episode", "close": ""}
"""What each method of an environment is given."""


def class_of(env: type | Callable[..., Any]) -> type:
    """The class of the environments that `env` makes. Raises ValueError for anything but a class or a partial of it."""
    made = env.func if isinstance(env, partial) else env
    if not isinstance(made, type):
        raise ValueError(
            f"env={show(env)} must be a class, because its methods are the tools; to give its constructor more than "
            "the task, write env=partial(Calculator, digits=3)"
        )
    return made


def check_environment(cls: type) -> None:
    """Raise ValueError, with the line to write, for a class that is no environment."""
    name = cls.__name__
    if not takes(cls, 1):
        raise ValueError(f"{name} must be made of a task: write def __init__(self, task): self.task = task")
    if not callable(getattr(cls, "reward", None)):
        raise ValueError(
            f"{name} has no reward: write def reward(self, episode): return float(episode.text == self.task['answer'])"
        )
    for method, given in METHODS.items():
        found = inspect.getattr_static(cls, method, None)
        if found is None:
            continue
        arguments = ["self", *filter(None, given.split(", "))]
        function = getattr(found, "__func__", found)
        if not callable(function) or not takes(function, len(arguments)):
            raise ValueError(f"{name}.{method} must be a method: write def {method}({', '.join(arguments)}): ...")
    if not tools_of(cls) and hasattr(cls, "parse") and not hasattr(cls, "call"):
        raise ValueError(f"{name} has parse, and no tool that it could call: a tool is a public method")


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True  # a function of C code
    return True
