"""Which recipe or objective does a file hold?"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from rl.config import Config
from rl.objectives import Objective
from trainer.launch import importing


def load_objective(target: str) -> Objective:
    """An objective with its defaults, from "file.py:Class" or "module:Class". Raises ValueError when it is none."""
    where, _, name = target.rpartition(":")
    if name.endswith(".py"):
        raise ValueError(f"{target} is a file: name the objective in it, as in {target}:CLASS")
    module = load_file(where) if where.endswith(".py") else importlib.import_module(where or "rl.objectives")
    made = getattr(module, name, None)
    if isinstance(made, type) and issubclass(made, Objective):
        if missing := sorted(getattr(made, "__abstractmethods__", ())):
            raise ValueError(f"{target} lacks {' and '.join(missing)}: write both (docs/objectives.md, Your own)")
        try:
            made = made()
        except TypeError as error:
            raise ValueError(
                f"{target} cannot be made without arguments ({error}): give every field a default, or name an "
                "instance, as in mine = Mine(alpha=0.5) and FILE.py:mine"
            ) from error
    if not isinstance(made, Objective):
        near = [n for n, x in vars(module).items() if isinstance(x, type) and issubclass(x, Objective)]
        raise ValueError(
            f"{target} is no objective; {where or 'rl.objectives'} has {', '.join(sorted(near)) or 'none'}"
        )
    return made


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
    # Actors look there for what the recipe defines, as they do when it is run as a script.
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
