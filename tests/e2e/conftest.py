"""Nothing that a failed test started runs beside the next one."""

from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

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
