"""Nothing that a failed test started runs next to the following one; one finished run is read by several tests."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from models import make_model
from processes import assert_gone, marked
from runs import STARTED, Finished, finish, printed, start


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
def whole(echo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The echo recipe, left alone until its end. It keeps checkpoints, so a resumed run can be compared with it."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ("--save-every", "2", "--rollout.max-tokens", "4", "--old-logprobs", "recompute")
    process, mark = start(echo_model, folder, *flags)
    code, summary, rows = finish(process, folder)
    assert code == 0, printed(folder)
    assert_gone(mark)
    return Finished(flags, folder, summary, rows)
