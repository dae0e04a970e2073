"""Two lanes: which files come first, and how many seconds each file took."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network, and a hub that does not answer is asked again
SECONDS = Path(__file__).with_name("durations.json")
"""Seconds of each file in the last gate and the last nightly, written by `scripts/test --record`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-seconds", metavar="MODE", help="keep each file's seconds in tests/durations.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first, because the last one decides when the second lane ends."""
    seconds = json.loads(SECONDS.read_text())
    took = seconds.get("nightly", {}) | seconds.get("gate", {})
    items.sort(key=lambda item: -took.get(item.path.relative_to(SECONDS.parent).as_posix(), 0.0))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


class Seconds:
    """Adds up what each file's tests took, with their fixtures."""

    def __init__(self, mode: str) -> None:
        self.mode, self.of = mode, Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.of[report.nodeid.split("::")[0].removeprefix("tests/")] += report.duration

    def pytest_sessionfinish(self) -> None:
        kept = json.loads(SECONDS.read_text())
        files = kept.get(self.mode, {}) | {name: round(seconds, 1) for name, seconds in self.of.items()}
        there = {name: files[name] for name in sorted(files) if (SECONDS.parent / name).exists()}
        SECONDS.write_text(json.dumps(kept | {self.mode: there}, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    mode = config.getoption("--record-seconds")
    if mode and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Seconds(mode))


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """No types are checked, as in a user's process: the suite's own check would answer before the product does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
