"""Weight updates while an engine samples, with vLLM's core as a thread, which is what runs on a CPU.

In a process of its own: vLLM and DeepSpeed each want the one group of a process. Whole runs have it in every test of
tests/e2e.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_all_that_holds_of_updates_holds_with_the_core_as_a_thread():
    updates = Path(__file__).with_name("test_update.py")
    command = [sys.executable, "-m", "pytest", str(updates), "-q", "-p", "no:cacheprovider", "-m", "not nightly"]
    done = subprocess.run(command, env=os.environ | {"UNISON_CORE": "thread"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
