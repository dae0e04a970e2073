"""`unison check-objective` at the user's end: what it shows, and with which status it ends."""

import sys
from pathlib import Path

import pytest

from trainer.cli import main


def example_of_the_docs(folder, mistake=""):
    """The objective that docs/objectives.md shows, as a user's file."""
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert mistake in code
    path = folder / f"mine_{len(mistake)}.py"
    path.write_text(code.replace("return -ratio", "return ratio") if mistake else code)
    return path


def command(*arguments, monkeypatch):
    """The exit status of `unison ...`."""
    monkeypatch.setattr("sys.argv", ["unison", *arguments])
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_the_example_of_the_docs_is_short_and_keeps_the_contract(tmp_path, monkeypatch, capsys):
    path = example_of_the_docs(tmp_path)
    assert len(path.read_text().splitlines()) < 30
    assert command("check-objective", f"{path}:Bounded", monkeypatch=monkeypatch) == 0
    assert "Bounded keeps the contract" in capsys.readouterr().out


def test_the_command_ends_with_1_and_a_table_when_something_is_wrong(tmp_path, monkeypatch, capsys):
    path = example_of_the_docs(tmp_path, mistake="return -ratio")
    assert command("check-objective", f"{path}:Bounded", monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().out
    assert "Bounded breaks its contract" in said
    assert "loss is minimised" in " ".join(said.split())
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "def loss" in text)
    assert f"{path.name}, line" in " ".join(said.split())
    assert f" {line} " in said
    assert "how to fix it" in said


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing.py:Mine", "there is no file 'nothing.py'"),
        ("GRPPO", "GRPPO is no objective; rl.objectives has CISPO, DAPO"),
        ("rl.config:Config", "rl.config:Config is no objective; rl.config has GSPO, Objective"),
    ],
)
def test_what_cannot_be_checked_ends_with_2_and_the_reason(target, message, monkeypatch, capsys):
    assert command("check-objective", target, monkeypatch=monkeypatch) == 2
    assert message in " ".join(capsys.readouterr().out.split())
