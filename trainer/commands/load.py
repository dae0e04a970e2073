"""Which recipe or objective does a file hold?"""

import ast
import importlib.util
import itertools
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from rl.config import Config
from rl.objectives import Objective
from trainer.launch import importing


def load_objective(target: str) -> Objective:
    """An objective from "file.py:Class" or "module:Class", with its defaults or as "file.py:Class(alpha=0.5)".

    Raises ValueError when it is none.
    """
    given, (target, settings) = target, split_call(target)
    where, _, name = target.rpartition(":")
    if name.endswith(".py"):
        raise ValueError(f"{target} is a file: name the objective in it, as in {target}:CLASS")
    with importing(where):
        module = load_file(where) if where.endswith(".py") else importlib.import_module(where or "rl.objectives")
    made = getattr(module, name, None)
    if isinstance(made, type) and issubclass(made, Objective):
        if missing := sorted(getattr(made, "__abstractmethods__", ())):
            raise ValueError(f"{target} lacks {' and '.join(missing)}: write both (docs/objectives.md, Your own)")
        known = {f.name for f in fields(made) if f.init}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"{given}: {made.__name__} has no {unknown[0]}; it has {', '.join(sorted(known))}")
        try:
            made = made(**settings)
        except TypeError as error:
            raise ValueError(
                f"{target} cannot be made without arguments ({error}): give every field a default, or name an "
                "instance, as in mine = Mine(alpha=0.5) and FILE.py:mine"
            ) from error
    elif settings and isinstance(made, Objective):
        raise ValueError(f"{given}: {name} is made already, so it takes no settings")
    if not isinstance(made, Objective):
        near = [n for n, x in vars(module).items() if isinstance(x, type) and issubclass(x, Objective)]
        raise ValueError(
            f"{target} is no objective; {where or 'rl.objectives'} has {', '.join(sorted(near)) or 'none'}"
        )
    return made


def split_call(target: str) -> tuple[str, dict[str, Any]]:
    """A target without its settings, and the settings: `grpo(clip_high=0.28)`. Raises ValueError for another form."""
    call = re.fullmatch(r"(.*?\w)\((.*)\)", target, re.DOTALL)
    if not call:
        return target, {}
    try:
        parsed = ast.parse(f"f({call[2]})", mode="eval").body
        if isinstance(parsed, ast.Call) and not parsed.args:
            return call[1], {k.arg or "**": ast.literal_eval(k.value) for k in parsed.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"{target}: write settings by name, as plain values: {call[1]}(clip_high=0.28)")


def load_recipe(path: str) -> Config:
    """The `config` of a recipe file. Raises ValueError when the file has none, or starts its run while it is read."""
    with importing(path):
        config = getattr(load_file(path), "config", None)
    if not isinstance(config, Config):
        raise ValueError(f"{path} defines no `config = Config(...)`, so it is no recipe")
    return config


def load_file(path: str) -> ModuleType:
    """A Python file as a module that other modules can import."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {path!r}; give the path of a Python file such as recipes/quickstart.py"
        )
    if file.suffix != ".py":
        raise ValueError(f"{path} is no Python file; a recipe is one, such as recipes/quickstart.py")
    # Actors look there for what the recipe defines, as they do when it is run as a script.
    sys.path.insert(0, str(file.resolve().parent))
    # Two files of one name are two modules; the first keeps the name by which actors import it.
    names = itertools.chain([file.stem], (f"{file.stem}_{i}" for i in itertools.count(2)))
    name = next(n for n in names if _free(n, file.resolve()))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _free(name: str, file: Path) -> bool:
    """Whether no other file holds this name."""
    holder = sys.modules.get(name)
    return holder is None or Path(getattr(holder, "__file__", None) or "/").resolve() == file
