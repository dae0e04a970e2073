"""Which cases of a test run in the gate, and which only nightly."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def nightly_unless(in_gate: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """Parameters for pytest; a case that is a tuple has several values."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=() if in_gate(*row) else pytest.mark.nightly) for row in rows]
