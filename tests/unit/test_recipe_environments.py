"""The environments of the recipes: what they answer, what they pay, and that a perfect player gets all of it."""

import importlib.util
import re
from pathlib import Path

import pytest

from boxes import missing
from rl.environments import Episode, ToolError, Turn
from rl.environments.check import check_environment
from rl.sandbox import Ran
from rl.types import Call, Reply

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
    assert (len(data.train), len(data.evals["held_out"])) == (58, 32)
    asked = {example.task["order"] for example in data.train}
    assert not asked & {example.task["order"] for example in data.evals["held_out"]}
    for example in data.train:
        env, order = lookup.InText(example.task), example.task["order"]
        assert env.parse(f"FIND({order})") == [Call(name="find", arguments={"number": order})]
        shelf = int(env.find(order).removeprefix("Find "))
        colour = env.find(shelf).removeprefix("Answer ")
        assert env.reward(played(example.task, f" {colour}.\n")) == 1.0
        assert env.reward(played(example.task, str(shelf))) == 0.0
        assert env.reward(played(example.task, colour, ended="turns")) == 0.0
    shown = {int(number) for text in lookup.WORKED for number in re.findall(r"\d+", text)}
    assert not shown & {*lookup.SHELF_OF, *lookup.COLOUR_OF}, "the worked questions give nothing away"
    with pytest.raises(ToolError, match="There is no 7"):
        env.find(7)
    assert env.parse("FIND(" + "9" * 5000 + ")") == []


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
            low, high = (middle + 1, high) if step.observation.startswith("Higher") else (low, middle - 1)
        assert (step.done, paid) == (True, 1.0)
        assert env.reward(played(example.task, "")) == 0.0, "all of it is paid by turn"


def test_a_guess_that_the_hints_rule_out_costs_something_in_its_turn(monkeypatch):
    guess = recipe("guess_the_number", monkeypatch)
    steps = guesses(guess, {"low": 1, "number": 5}, ["8", "9", "3", "2", "5"])
    assert [step.observation for step in steps] == [
        "Lower: guess from 1 to 7",
        "Lower: guess from 1 to 7",
        "Higher: guess from 4 to 7",
        "Higher: guess from 4 to 7",
        "",
    ]
    assert [step.reward for step in steps] == [0.0, -0.25, 0.0, -0.25, 1.0]
    assert guesses(guess, {"low": 1, "number": 5}, ["16"])[0].reward == -0.25, "outside of what was asked for"


@pytest.mark.parametrize("text", ["", "five", "5.", "-5", "5 or 6", "²", "9" * 5000])
def test_what_is_no_number_is_worth_nothing(text, monkeypatch):
    (step,) = guesses(recipe("guess_the_number", monkeypatch), {"low": 1, "number": 5}, [text])
    assert step.reward <= 0.0
    assert step.done == (not text.isdecimal())


def test_the_worked_games_follow_their_own_hints(monkeypatch):
    guess = recipe("guess_the_number", monkeypatch)
    for low, number, said in ((1, 10, guess.WORKED[1:6]), (21, 24, guess.WORKED[7:])):
        steps = guesses(guess, {"low": low, "number": number}, said[::2])
        assert [step.observation for step in steps] == [*said[1::2], ""]
        assert sum(step.reward for step in steps) == 1.0


# -- with a sandbox ----------------------------------------------------------------------------------------------------

boxed = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a sandbox")


@boxed
def test_a_right_program_passes_the_hidden_tests_and_another_one_does_not(monkeypatch):
    small = recipe("sandbox/small_programs", monkeypatch)
    data = small.tasks()
    asked = {example.prompt[-1]["content"] for example in data.train}
    assert not asked & {example.prompt[-1]["content"] for example in data.evals["held_out"]}
    for example in data.evals["held_out"][:6]:
        formula = example.prompt[-1]["content"]

        def paid(text, finished=True, task=example.task):
            return small.reward(Reply(text=text, finished=finished, task=task, token_ids=[]))

        assert paid(f"n = int(input()); print({formula})") == 1.0
        assert paid(f"n = int(input()); print({formula})", finished=False) == 0.0
        assert paid(f"n = int(input()); print({formula}0)") == 0.0
    assert paid("def f(") == 0.0


class Late:
    """A sandbox in which every program takes too long."""

    def run(self, argv, **_):
        return Ran(stdout="", stderr="", code=137, timed_out=True)


@boxed
def test_the_python_tool_shows_output_and_errors_and_pays_for_the_answer(monkeypatch):
    tool = recipe("sandbox/python_tool", monkeypatch)
    data = tool.sums()
    assert (len(data.train), len(data.evals["held_out"])) == (320, 64)
    env = tool.PythonTool({"answer": "1096"})
    (call,) = env.parse(tool.WORKED[1])
    assert env.python(**call.arguments) == tool.WORKED[2]
    assert env.python("print(1/0)") == "Output: ZeroDivisionError: division by zero"
    assert env.parse(tool.WORKED[3]) == []
    assert env.reward(played(env.task, " 1096\n")) == 1.0
    assert env.reward(played(env.task, "1096", ended="turns")) == 0.0
    check_environment(tool.config.env)
    monkeypatch.setattr(tool, "BOX", Late())
    assert env.python("while True: pass") == "Output: too slow"
