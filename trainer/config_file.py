"""Reading settings back from a file: the config.json of a run, or YAML of the same form."""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from rl.config import Config
from rl.typed import hints_of
from trainer.flags import is_code, suggestions


def from_file(config: Config, path: str) -> Config:
    """The recipe's config with the settings of a file. Raises ValueError, naming the file, for what does not fit.

    Data, reward and filters are code and stay the recipe's. Hyper-parameters of objective and correction are read when
    the class is the recipe's.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--config: there is no file {path!r}; give the config.json of a run, or a YAML file")
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix in (".yaml", ".yml"):
            import yaml

            settings = yaml.safe_load(text)
        else:
            settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path} holds no settings: write one name and value per line, such as `steps: 20`")
    return _merged(config, settings, path, "")


def _merged(owner: Any, settings: Mapping[str, Any], path: str, prefix: str) -> Any:
    hints, cls = hints_of(type(owner)), type(owner).__name__
    if (kind := settings.get("type", cls)) != cls:
        field = prefix.rstrip(".")
        raise ValueError(
            f"{path} has {field} {kind}, and the recipe has {cls}: write {field}={kind}(...) in the recipe, or remove "
            f"{field} from the file"
        )
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "type":
            continue
        if name not in hints and name not in type(owner).__dataclass_fields__:
            known = [(prefix + each).replace("_", "-") for each in hints]
            near = suggestions((prefix + name).replace("_", "-"), known)
            meant = f"; did you mean {near[0].replace('-', '_')}?" if near else ""
            raise ValueError(f"{path} has a setting {prefix}{name}, which does not exist{meant}")
        if name not in hints or is_code(hints[name]):
            continue  # a constant of the class, or code
        now = getattr(owner, name)
        if is_dataclass(now) and isinstance(value, Mapping):
            changes[name] = _merged(now, value, path, f"{prefix}{name}.")
        else:
            changes[name] = _number(value, hints[name])
    try:
        return replace(owner, **changes)
    except ValueError as error:
        raise ValueError(f"{path}: {prefix}{error}") from error


def _number(value: Any, hint: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; where a number is declared, and no text, it is one."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not isinstance(value, str) or float not in arms or str in arms:
        return value
    try:
        return float(value)
    except ValueError:
        return value
