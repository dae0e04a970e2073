"""Engines and tiny models for the tests that run a real vLLM."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from live import Live
from models import make_model
from rl.config import Config


@pytest.fixture(scope="module")
def live() -> Iterator[Callable[..., Live]]:
    """Start engines that end with the module."""
    started: list[Live] = []

    def start(config: Config, **overrides: Any) -> Live:
        started.append(Live(config, **overrides))
        return started[-1]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield start
    torch.set_num_threads(threads)
    for one in started:
        one.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models by their settings."""
    made: dict[Any, Path] = {}

    def get(**settings: Any) -> Path:
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp("model"), **settings)
        return made[key]

    return get
