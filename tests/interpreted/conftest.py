"""Tests of vLLM's Model Runner V2, the GPU's, on CPU. `scripts/interpreted` sets up what they need and runs them."""

import os
from importlib.util import find_spec

import pytest

from engine_fixtures import live as live
from engine_fixtures import tiny as tiny

WANTED = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = all(os.environ.get(name) == value for name, value in WANTED.items())
    if here and find_spec("triton") and find_spec("triton_interpreted"):
        return
    reason = "needs vLLM's Model Runner V2, through Triton's interpreter: run scripts/interpreted"
    for item in items:
        if "tests/interpreted/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=reason))
