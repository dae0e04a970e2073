"""The command line of a recipe: help for every flag, suggestions, settings from a file, and calls from a notebook."""

import asyncio
import builtins
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, replace

import pytest

from rl.config import Config, TrainerConfig
from rl.filters import ZeroAdvantage
from rl.objectives import FAMILY, GRPO, GSPO, PPO
from rl.objectives.corrections import MIS, GeometricMask, IcePop, SequenceTIS, TokenTIS
from rl.types import Data
from trainer import launch as launching
from trainer.config_file import from_file
from trainer.flag_help import GROUPS, help_text
from trainer.flags import OPTIONS, SYNONYMS, flags_of, override
from trainer.launch import configure, launch, run_in_thread
from trainer.runs.files import write_json
from trainer.runs.settings import resolved

# The suite checks arguments with beartype, which would answer before the product does.
pytestmark = pytest.mark.usefixtures("unchecked_types")


def questions() -> Data:
    return Data(train=[])


def right(reply) -> float:
    return 0.0


CONFIG = Config(name="t", model="m", data=questions, reward=right, filters=(ZeroAdvantage(),))
CORRECTIONS = [each() for each in (TokenTIS, SequenceTIS, MIS, IcePop, GeometricMask)]


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        *(replace(CONFIG, objective=each()) for each in FAMILY),
        *(replace(CONFIG, correction=each) for each in CORRECTIONS),
    ],
    ids=lambda config: f"{type(config.objective).__name__} {type(config.correction).__name__}",
)
def test_every_flag_has_a_full_sentence(config):
    for flag in flags_of(config):
        assert re.fullmatch(r"[A-Z0-9].{8,}[.)]", flag.help), f"--{flag.name}: {flag.help!r}"
    shown = help_text(config, "recipe.py", 100)
    for flag in flags_of(config):
        assert f"--{flag.name}" in shown


def test_every_flag_of_the_config_itself_is_in_a_group():
    top = [flag.name for flag in flags_of(CONFIG) if "." not in flag.name]
    assert sorted(top) == sorted(" ".join(GROUPS.values()).split())


def test_help_shows_code_by_name_options_and_the_recipes_own_values():
    shown = help_text(replace(CONFIG, steps=7), "recipes/mine.py", 100)
    assert "usage: python recipes/mine.py" in shown
    for expected in (
        *("data = questions", "reward = right", "filters = ZeroAdvantage", "objective = GSPO"),
        *("correction = Uncorrected", "--dry-run", "--resume FOLDER", "--config FILE", "(default: 7)"),
    ):
        assert expected in shown
    assert " at 0x" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "makes it too old. drop: count it, and admit another" in " ".join(shown.split())


def test_help_needs_no_network_and_starts_nothing(capsys):
    assert launch(CONFIG, args=["--steps", "3", "--help"]) == {}
    assert "--trainer.lr FLOAT" in capsys.readouterr().out


# -- flags that do not exist -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--learning-rate", "Did you mean --trainer.lr?"),
        ("--learning_rate=1e-5", "Did you mean --trainer.lr?"),
        ("--trainer.learning_rate", "Did you mean --trainer.lr?"),
        ("--trainer.learning-rate", "Did you mean --trainer.lr?"),
        ("--batch-size", "--trainer.micro-batch-tokens or --prompts-per-step or --group-size"),
        ("--num-generations", "Did you mean --group-size?"),
        ("--max-tokens", "Did you mean --rollout.max-tokens?"),
        ("--lr", "Did you mean --trainer.lr?"),
        ("--stepps", "Did you mean --steps?"),
        ("--rollout.engine", "Did you mean --rollout.engines?"),
        ("--beta", "Did you mean --objective.kl-coef?"),
        ("--resume-from-checkpoint", "Did you mean --resume?"),
        ("--objective", "set it in the recipe, as objective=...; its numbers are flags, such as --objective.kl-coef"),
        ("--data", "data is code or a group of settings: set it in the recipe, as data=..."),
        ("--mask-truncated-completions", "Did you mean --mask-truncated?"),
        ("--min-new-tokens", "Did you mean --rollout.min-tokens?"),
        ("--rollout.repetition-penalty", "a penalty changes every probability by what was sampled before"),
        ("--logit_bias", "the trainer does not repeat that"),
        ("--ignore-eos", "set --rollout.min-tokens to the value of rollout.max_tokens"),
        ("--zzzzzz", "there is no flag --zzzzzz. --help lists all flags"),
    ],
)
def test_a_mistyped_flag_gets_a_suggestion(flag, meant):
    with pytest.raises(ValueError, match=re.escape(meant)):
        override(CONFIG, [flag, "3"])


def test_the_table_of_synonyms_names_flags_that_exist():
    known = {flag.name for objective in (GSPO(), PPO()) for flag in flags_of(replace(CONFIG, objective=objective))}
    assert set(SYNONYMS) <= known | set(OPTIONS)


@pytest.mark.parametrize("words", ["--save-final False", "--save-final=True", "--no-save-final 0 --steps 3"])
def test_a_switch_with_a_value_says_how_it_is_turned_on_and_off(words):
    recipe = Config(name="x", model="m", data=lambda: Data(train=[]), reward=lambda reply: 0.0)
    with pytest.raises(ValueError, match="a switch has no value: --save-final turns it on, --no-save-final off"):
        override(recipe, words.split())
    assert not override(recipe, ["--no-save-final", "--steps", "3"]).save_final
    assert override(recipe, ["--name", "save-final=1"]).name == "save-final=1", "a value is no flag"


def test_flags_are_taken_with_dashes_and_underscores():
    config = override(CONFIG, ["--trainer.micro_batch_tokens=64", "--trainer.value-lr", "1e-3", "--no-save-final"])
    assert (config.trainer.micro_batch_tokens, config.trainer.value_lr, config.save_final) == (64, 1e-3, False)
    with_data = override(replace(CONFIG, data=Data(train=[])), ["--steps", "4"])
    assert (with_data.steps, with_data.data) == (4, Data(train=[]))


def test_several_texts_are_one_flag_and_read_back(tmp_path):
    changed = override(CONFIG, ["--rollout.stop", "</answer>", "\n\n", "--rollout.stop-token-ids", "3", "7"])
    assert (changed.rollout.stop, changed.rollout.stop_token_ids) == (("</answer>", "\n\n"), (3, 7))
    write_json(tmp_path / "config.json", resolved(changed))
    assert from_file(CONFIG, str(tmp_path / "config.json")).rollout == changed.rollout


def test_an_objective_of_the_users_own_has_its_flags():
    @dataclass(frozen=True, kw_only=True)
    class Mine(GRPO):
        strength: float = 0.5
        """How strong."""

    config = replace(CONFIG, objective=Mine())
    assert override(config, ["--objective.strength", "0.7"]).objective == Mine(strength=0.7)
    assert "How strong. (default: 0.5)" in help_text(config, "recipe.py", 100)


# -- settings from a file ----------------------------------------------------------------------------------------------


def test_the_settings_of_a_run_read_back(tmp_path):
    saved = replace(
        CONFIG,
        steps=7,
        eval_temperature=0.5,
        objective=GSPO(clip_low=1e-4, kl_target=0.1),
        correction=TokenTIS(cap=3.0),
        chat_template_kwargs={"enable_thinking": False},
        trainer=TrainerConfig(lr=1e-5, betas=(0.8, 0.9)),
    )
    write_json(tmp_path / "config.json", resolved(saved))
    recipe = replace(CONFIG, correction=TokenTIS())
    assert from_file(recipe, str(tmp_path / "config.json")) == saved
    config, flags = configure(recipe, ["--steps", "9", "--config", str(tmp_path / "config.json")])
    assert config == replace(saved, steps=9), "flags count more"
    assert flags == ["--config", str(tmp_path / "config.json"), "--steps", "9"]
    assert configure(recipe, flags)[0] == config, "a resumed run reads the same"


def test_yaml_reads_as_well_with_numbers_as_people_write_them(tmp_path):
    text = "steps: 7\nname: 1e-5\ntrainer: {lr: 1e-5, value_lr: 1e-4, betas: [0.8, 1]}\n"
    (tmp_path / "run.yaml").write_text(text)
    config = from_file(CONFIG, str(tmp_path / "run.yaml"))
    assert (config.steps, config.name, config.trainer.lr, config.trainer.value_lr) == (7, "1e-5", 1e-5, 1e-4)
    assert config.trainer.betas == (0.8, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": {"type": "GRPO", "clip_low": 0.1}}, "config.json has objective GRPO, and the recipe has GSPO"),
        ({"step": 3}, "config.json has a setting step, which does not exist; did you mean steps?"),
        (
            {"trainer": {"learning_rate": 1}},
            "which does not exist; did you mean trainer.lr?",
        ),
        (
            {"rollout": {"repetition_penalty": 1.1}},
            "rollout.repetition_penalty, which does not exist: a penalty changes",
        ),
        ({"dtype": "fp32"}, "config.json: dtype='fp32' is not one of 'bfloat16', 'float32'"),
        ({"trainer": {"lr": "fast"}}, "config.json: trainer.lr='fast' must be a number"),
        ([1], "holds no settings"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, settings, message):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=re.escape(message)):
        from_file(CONFIG, str(tmp_path / "config.json"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "half.json").write_text('{"steps": ')
    with pytest.raises(ValueError, match=r"half\.json is not valid JSON"):
        from_file(CONFIG, str(tmp_path / "half.json"))
    with pytest.raises(FileNotFoundError, match=r"--config: there is no file 'none\.json'"):
        from_file(CONFIG, "none.json")
    with pytest.raises(ValueError, match="--config needs a file"):
        configure(CONFIG, ["--config"])


# -- notebooks and scripts ---------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """Runs that end at once: each config, and whether it had a loop and a thread of its own."""
    seen = []

    async def run_async(config, *, resumed=None, flags=()):
        seen.append((config.steps, threading.current_thread() is threading.main_thread()))
        return {"steps": config.steps}

    monkeypatch.setattr("trainer.run.run_async", run_async)
    return seen


def test_launch_with_arguments_returns_the_summary_and_raises_errors(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "kernel.json"])
    assert launch(CONFIG, args=["--steps", "3"]) == {"steps": 3}
    assert launch(CONFIG, args=[]) == {"steps": 100}
    with pytest.raises(ValueError, match="no flag --stepps"):
        launch(CONFIG, args=["--stepps", "3"])
    assert runs == [(3, True), (100, True)]


def test_launch_in_a_notebook_leaves_its_arguments_alone_and_has_a_loop_of_its_own(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)

    async def cell():
        return launch(CONFIG)

    assert asyncio.run(cell()) == {"steps": 100}
    assert runs == [(100, False)]


def test_ctrl_c_in_a_notebook_waits_until_the_run_has_cleaned_up(monkeypatch):
    cleaned = []

    async def work():
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(True)

    def interrupted(self):
        time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in_thread(work())
    assert cleaned == [True]


def test_launch_while_a_recipe_is_imported_names_the_guard():
    with (
        launching.importing("mine.py"),
        pytest.raises(ValueError, match=r'mine\.py calls.*\n.*if __name__ == "__main__"'),
    ):
        launch(CONFIG)
