"""A process without a home, a user name or a place for caches gets them, and so do its children."""

import getpass
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from trainer.home import FOLDERS, prepare_home


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """A home of this test's own; what is set here is taken back."""
    for name in (*FOLDERS, "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, "taken back")
        monkeypatch.delenv(name)
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_nothing_changes_where_nothing_is_lacking():
    before = dict(os.environ)
    assert prepare_home() == ""
    assert dict(os.environ) == before


def test_a_user_id_without_a_name_gets_one(monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert prepare_home() == ""
    assert getpass.getuser() == f"uid{os.getuid()}"


def test_a_process_without_a_home_gets_one_that_can_be_written(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert prepare_home().startswith("there is no home folder: HOME is ")
    assert Path.home() == tmp_path / f"unison-{os.getuid()}"
    assert os.access(Path.home(), os.W_OK)
    assert prepare_home() == "", "its children have a home"


def test_caches_that_cannot_be_written_go_elsewhere_and_those_that_were_named_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/proc")  # a file system where nobody can make a file
    monkeypatch.setenv("TRITON_CACHE_DIR", "/named/by/the/user")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert "caches cannot be written at /proc" in prepare_home()
    assert os.environ["TRITON_CACHE_DIR"] == "/named/by/the/user"
    assert "MPLCONFIGDIR" not in os.environ, "its default can be written"
    for name in ("VLLM_CACHE_ROOT", "WANDB_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "HF_MODULES_CACHE"):
        folder = Path(os.environ[name])
        assert folder.is_relative_to(tmp_path)
        (folder / "file").write_text("")
