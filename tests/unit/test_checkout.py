"""Another package of the same name on the path is found out before anything runs."""

import os
import subprocess
import sys

import pytest

from rl import checkout


def import_rl(*path):
    """Import `rl` in a fresh interpreter with these folders first on its path."""
    return subprocess.run(
        [sys.executable, "-P", "-c", "import rl"],  # -P: not from the working directory
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["trainer", "rollout"])
def test_a_foreign_package_of_the_same_name_is_refused_by_name(tmp_path, name):
    foreign = tmp_path / name
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    done = import_rl(tmp_path, checkout.ROOT)
    assert done.returncode != 0
    assert f"ImportError: `import {name}` would load {foreign.resolve()}" in done.stderr
    assert "take it off PYTHONPATH" in done.stderr
    assert f"pip install -e {checkout.ROOT}" in done.stderr


def test_one_checkout_imports(tmp_path):
    done = import_rl(tmp_path, checkout.ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_digest_changes_with_any_source_file(tmp_path, monkeypatch):
    for name in checkout.PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    first = checkout.digest()
    assert checkout.digest() == first
    (tmp_path / "rollout" / "a.py").write_text("x = 2\n")
    edited = checkout.digest()
    (tmp_path / "rollout" / "a.py").rename(tmp_path / "rollout" / "b.py")
    renamed = checkout.digest()
    (tmp_path / "rollout" / "notes.txt").write_text("not code")
    assert checkout.digest() == renamed
    assert len({first, edited, renamed}) == 3
