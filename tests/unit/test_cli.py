"""The `unison` command: version, help of each command, and what a mistyped word may have meant."""

import subprocess
import sys

import pytest

from trainer.cli import COMMANDS, main


def unison(*arguments, monkeypatch, capsys):
    """Exit status and what was printed."""
    monkeypatch.setattr("sys.argv", ["unison", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    return end.value.code, " ".join((printed.out + printed.err).split())


@pytest.fixture
def answer(monkeypatch, capsys):
    return lambda *arguments: unison(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_the_version_names_the_libraries_that_decide_the_numbers(answer):
    code, printed = answer("--version")
    assert code == 0
    assert printed.startswith("unison-rl ")
    assert "torch 2." in printed


def test_help_lists_every_command_and_each_has_its_own(answer):
    code, printed = answer("--help")
    assert code == 0
    for name, (_, sentence) in COMMANDS.items():
        assert f"{name} {sentence}" in printed
    own = {"doctor": "--short", "check-objective": "FILE.py:CLASS", "what-if": "--objectives"}
    assert set(own) <= set(COMMANDS)
    for name, option in own.items():
        code, printed = answer(name, "--help")
        assert (code, option in printed, f"usage: unison {name}" in printed) == (0, True, True)


def test_a_word_that_is_no_command_gets_a_suggestion(answer):
    code, printed = answer("docter")
    assert code == 2
    assert printed.startswith("unknown command 'docter': did you mean doctor?")
    assert answer("zzz")[1].startswith("unknown command 'zzz' usage:")
    assert answer()[0] == 2


def test_what_a_command_lacks_or_cannot_use_is_named(answer):
    assert answer("check-objective")[0] == 2
    assert "the following arguments are required: record" in answer("what-if")[1]
    assert "unrecognized arguments: --fast" in answer("check-objective", "GSPO", "--fast")[1]


def test_a_recipe_without_a_guard_gets_one_clear_message(answer, tmp_path, monkeypatch):
    recipe = tmp_path / "unguarded.py"
    recipe.write_text(
        "from rl.config import Config\nfrom rl.types import Data\nfrom trainer.launch import launch\n"
        "config = Config(name='t', model='m', data=Data(train=[]), reward=lambda reply: 0.0)\nlaunch(config)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, printed = answer("doctor", str(recipe))
    assert code == 2
    assert "unguarded.py calls launch(config) while it is imported" in printed
    assert 'if __name__ == "__main__": launch(config)' in printed


def test_a_flag_of_the_recipe_that_does_not_exist_is_named_by_the_doctor(answer):
    code, printed = answer("doctor", "recipes/quickstart.py", "--stepps", "3")
    assert (code, "Did you mean --steps?" in printed) == (2, True)


def test_the_commands_of_a_node_need_no_torch():
    """Importing it takes 9 to 19 s on a busy node, and a wrong token is to be named in less than 10 s."""
    modules = "trainer.cli, trainer.commands.cluster, trainer.errors, trainer.cluster.nodes.gcs"
    code = f"import sys, {modules}; print({{'ray', 'torch', 'transformers', 'numpy', 'vllm'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'ray'}"
