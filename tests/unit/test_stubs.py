"""A remote call is written as an ordinary call: it is recorded, travels, is replayed, and pyright checks it."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.cluster.stubs import Call, recorded

ROOT = Path(__file__).parents[2]


class Adder:
    def add(self, a: int, b: int = 0) -> int:
        return a + b


def test_a_call_is_recorded_and_replayed_in_another_process():
    call = recorded(lambda adder: adder.add(2, b=3))
    assert call == Call("add", (2,), {"b": 3})
    assert pickle.loads(pickle.dumps(call)).on(Adder()) == 5


@pytest.mark.parametrize("ask", [lambda adder: adder.add, lambda adder: 5])
def test_what_makes_no_call_is_refused(ask):
    with pytest.raises(AssertionError, match="one call of one method"):
        recorded(ask)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("rollout/engine.py", "last_pause"),
        ("rollout/worker.py", "received_digests"),
        ("trainer/learner/learner.py", "names"),
    ],
)
def test_renaming_a_method_of_engine_worker_or_learner_makes_pyright_fail(tmp_path, file, method):
    for package in ("rl", "rollout", "trainer", "typings"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    changed = tmp_path / file
    text = changed.read_text()
    assert f"def {method}(self" in text
    changed.write_text(text.replace(f"def {method}(self", f"def other_{method}(self"))
    pyright = Path(sys.executable).with_name("pyright")
    done = subprocess.run([pyright, "rollout", "trainer/cluster"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f'"{method}"' in done.stdout, done.stdout[-2000:]
