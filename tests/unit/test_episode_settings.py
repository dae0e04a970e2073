"""Settings of a run with an environment: what is refused before anything starts, and what to write instead."""

from functools import partial

import pytest

from episodes import Calculator
from rl.config import Config, RolloutConfig
from rl.environments.types import EnvError, Limits, Step
from rl.types import Data, Example
from rl.validate import check
from tiny_tokenizer import CHAT, make_tokenizer
from trainer.cluster.process_env import without_functions
from trainer.config_file import from_file
from trainer.errors import can_be_fixed, explained
from trainer.flags import override
from trainer.prompts import prepare
from trainer.runs.own_code import code_digests

# The types that users get wrong are checked by `Config` itself.
pytestmark = pytest.mark.usefixtures("unchecked_types")


ASKED = [{"role": "user", "content": "2*3+4"}]


def config(env=Calculator, prompt=ASKED, **settings):
    data = Data(train=[Example(prompt=prompt, task={"answer": "10"})])
    return Config(**{"name": "t", "model": "m", "data": data, "env": env} | settings)


def test_a_run_has_either_a_reward_or_an_environment():
    with pytest.raises(ValueError, match="this one has none: write reward=a_function"):
        config(env=None)
    with pytest.raises(ValueError, match="this one has reward and env"):
        config(reward=lambda reply: 1.0)
    with pytest.raises(ValueError, match="eval_reward scores single replies"):
        config(eval_reward=lambda reply: 1.0)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (Calculator({}), "must be the class of an environment: write env=Calculator, without brackets"),
        ("Calculator", "must be the class of an environment"),
    ],
)
def test_an_environment_is_a_class(env, says):
    with pytest.raises(ValueError, match=says):
        config(env=env)


def without(name):
    return type("Env", (Calculator,), {name: None})


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (lambda task: Calculator(task), "must be a class, because its methods are the tools"),
        (type("Env", (Calculator,), {"__init__": lambda self: None}), "Env must be made of a task: write def __init__"),
        (without("reward"), r"Env has no reward: write def reward\(self, episode\)"),
        (type("Env", (Calculator,), {"reward": lambda self: 1.0}), r"Env\.reward must be a method: write def reward\("),
        (type("Env", (Calculator,), {"start": lambda self, task: ""}), r"write def start\(self\): \.\.\."),
        (type("Env", (Calculator,), {"parse": lambda self: []}), r"write def parse\(self, text\)"),
        (type("Env", (Calculator,), {"reply": lambda self: None}), r"write def reply\(self, turn\)"),
        (type("Env", (Calculator,), {"close": lambda self, now: None}), r"write def close\(self\)"),
        (type("Env", (Calculator,), {"look": lambda self, where: ""}), "argument 'where' of the tool Env.look has no"),
    ],
)
def test_what_is_no_environment_is_refused_with_the_line_to_write(env, says):
    with pytest.raises(ValueError, match=says):
        check(config(env))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_failed": 1.5}, "max_failed=1.5 must be a share"),
        ({"env_workers": -1}, "env_workers=-1 must be at least 0"),
        ({"rollout": RolloutConfig(min_tokens=3)}, "rollout.min_tokens=3 with episodes"),
        ({"env": None, "reward": lambda reply: 1.0, "env_workers": 2}, "env_workers=2 has no environment to host"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        check(config(**settings))


def test_limits_are_checked_and_are_flags():
    check(config(partial(Calculator)))
    for wrong in ({"turns": 0}, {"tokens": 0}, {"seconds": 0.0}, {"tool_s": -1.0}):
        with pytest.raises(ValueError, match=f"limits.{next(iter(wrong))}="):
            Limits(**wrong)
    flags = ["--limits.turns", "3", "--limits.tokens", "90", "--limits.tool-s", "2", "--env-workers", "4"]
    found = override(config(), flags)
    assert found.limits == Limits(turns=3, tokens=90, tool_s=2.0)
    assert (found.env_workers, found.env) == (4, Calculator)


def test_settings_of_a_file_leave_the_environment_to_the_recipe(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"env": "x.Other", "reward": null, "limits": {"type": "Limits", "turns": 3}}')
    found = from_file(config(), str(file))
    assert (found.env, found.reward, found.limits.turns) == (Calculator, None, 3)


def test_the_environment_stays_on_the_driver():
    assert not hasattr(without_functions(config(type("Local", (Calculator,), {"lock": object()}))).env, "lock")


def test_a_step_holds_text_or_messages_and_a_number():
    for wrong in ({"observation": 3}, {"reward": "1"}, {"reward": True}):
        with pytest.raises(ValueError, match="Step: "):
            Step(**wrong)


class Early:
    def __init__(self, task):
        self.task = task

    def reward(self, episode):
        return 1.0


class Later(Early):
    def reward(self, episode):
        return 0.5


def test_the_code_of_the_environment_is_in_the_digest():
    (early,), (later,) = (code_digests(config(env, objective=config().objective)) for env in (Early, Later))
    assert early.startswith("env ")
    assert early != later


def tokenized(tmp_path, env=Calculator, prompt=ASKED):
    model = make_tokenizer(tmp_path, chat_template=CHAT)
    settings = RolloutConfig(max_tokens=8, max_model_len=200)
    return config(env, prompt, model=model, rollout=settings)


def test_an_environment_is_tried_on_the_first_prompt(tmp_path):
    prepared = prepare(tokenized(tmp_path))
    assert [tool["function"]["name"] for tool in prepared.rendering.tools] == ["multiply", "add"]
    assert prepared.decode(prepared.chat(config()).delta([{"role": "user", "content": "6"}], [1])) == ";u:6;a:"


@pytest.mark.parametrize("method", ["__init__", "start", "reward", "close"])
def test_an_environment_that_fails_on_the_first_prompt_is_named_with_its_lines(tmp_path, method):
    def broken(self, *_):
        raise KeyError("answers")

    with pytest.raises(EnvError, match="raised KeyError: 'answers'") as raised:
        prepare(tokenized(tmp_path, type("Env", (Calculator,), {method: broken})))
    assert can_be_fixed(raised.value)
    assert "in broken: raise KeyError" in explained(raised.value)


@pytest.mark.parametrize("prompt", ["2*3+4", [5, 6, 7]])
def test_an_environment_needs_chat_messages(tmp_path, prompt):
    with pytest.raises(ValueError, match="env needs prompts that are chat messages"):
        prepare(tokenized(tmp_path, prompt=prompt))
