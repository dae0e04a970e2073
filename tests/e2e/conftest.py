"""Nothing that a failed test started runs next to the following one; runs share a model."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from models import CHAT, make_model
from processes import assert_gone, marked
from runs import STARTED


@pytest.fixture(autouse=True)
def no_run_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        mark = STARTED.pop()
        for process, _ in marked(mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert_gone(mark)


@pytest.fixture(scope="session")
def echo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("echo"), peak=1.0)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The echo model with a chat template."""
    return make_model(tmp_path_factory.mktemp("chat"), peak=1.0, chat_template=CHAT)
