"""The environments of the recipes: what they answer, what they pay, and that a perfect player gets all of it."""

import importlib.util
from pathlib import Path

import pytest

from rl.environments import Episode, ToolError, Turn
from rl.environments.check import check_environment
from rl.types import Call

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def recipe(name, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    spec = importlib.util.spec_from_file_location(f"environment_of_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def played(task, text, ended="done"):
    return Episode(task=task, turns=[Turn(text=text)], ended=ended)


def test_two_look_ups_answer_every_question_and_one_does_not(monkeypatch):
    lookup = recipe("lookup", monkeypatch)
    data = lookup.questions()
    assert (len(data.train), len(data.evals["held_out"])) == (96, 32)
    asked = {example.prompt[-1]["content"] for example in data.train}
    assert not asked & {example.prompt[-1]["content"] for example in data.evals["held_out"]}
    for example in data.train:
        env = lookup.InText(example.task)
        name = example.prompt[-1]["content"].split()[2]
        (call,) = env.parse(f"FIND({name})")
        assert call == Call(name="find", arguments={"name": name})
        city = env.find(name).split()[-1]
        land = env.find(city).split()[-1]
        assert env.reward(played(example.task, f" {land}.\n")) == 1.0
        assert env.reward(played(example.task, city)) == 0.0
        assert env.reward(played(example.task, land, ended="turns")) == 0.0
    with pytest.raises(ToolError, match="Nobody is unknown"):
        env.find("Nobody")


def test_native_calls_need_no_worked_example_and_no_parser_of_the_recipe(monkeypatch):
    qwen = recipe("lookup_qwen", monkeypatch)
    check_environment(qwen.config.env)
    assert not hasattr(qwen.config.env, "parse")
    assert qwen.config.rollout.tool_parser == "hermes"
    example = qwen.config.data().train[0]
    assert [message["role"] for message in example.prompt] == ["user"]


def guesses(guess, task, texts):
    env = guess.Guess(task)
    return [env.reply(Turn(text=text)) for text in texts]


def test_halving_the_range_finds_every_number_in_four_guesses(monkeypatch):
    guess = recipe("guess_the_number", monkeypatch)
    for example in [*guess.games().train, *guess.games().evals["held_out"]]:
        env, low = guess.Guess(example.task), example.task["low"]
        high, paid = low + guess.SIZE - 1, 0.0
        for _ in range(guess.config.limits.turns):
            middle = (low + high) // 2
            step = env.reply(Turn(text=str(middle)))
            paid += step.reward
            if step.done:
                break
            low, high = (middle + 1, high) if step.observation == "higher" else (low, middle - 1)
        assert (step.done, paid) == (True, 1.0)
        assert env.reward(played(example.task, "")) == 0.0, "all of it is paid by turn"


def test_a_guess_that_the_hints_rule_out_costs_something_in_its_turn(monkeypatch):
    guess = recipe("guess_the_number", monkeypatch)
    steps = guesses(guess, {"low": 1, "number": 5}, ["8", "9", "3", "2", "5"])
    assert [step.observation for step in steps] == ["lower", "lower", "higher", "higher", ""]
    assert [step.reward for step in steps] == [0.0, -0.25, 0.0, -0.25, 1.0]
    assert guesses(guess, {"low": 1, "number": 5}, ["16"])[0].reward == -0.25, "outside of what was asked for"


@pytest.mark.parametrize("text", ["", "five", "5.", "-5", "5 or 6", "²", "9" * 5000])
def test_what_is_no_number_is_worth_nothing(text, monkeypatch):
    (step,) = guesses(recipe("guess_the_number", monkeypatch), {"low": 1, "number": 5}, [text])
    assert step.reward <= 0.0
    assert step.done == (not text.isdecimal())


def test_the_worked_game_follows_its_own_hints(monkeypatch):
    guess = recipe("guess_the_number", monkeypatch)
    _, *said = guess.WORKED
    steps = guesses(guess, {"low": 1, "number": 9}, said[::2])
    assert [step.observation for step in steps] == [*said[1::2], ""]
    assert [step.reward for step in steps] == [0.0, 0.0, 0.0, 1.0]
