"""BFCL's tasks as environments: the right calls, played as a policy plays them, pass; others do not."""

import asyncio
import importlib
import random
import sys
from functools import partial

import pytest

from bfcl_wheel import bfcl_path
from episodes import Engine, prompt, stage
from rl.environments import Limits
from rl.environments.check import check_environment
from rl.environments.play import play
from rl.loop.stream import turn_seed
from rl.types import Call, Parsed

pytestmark = pytest.mark.slow  # 800 tasks are played
SEEDS = partial(turn_seed, 0, 0, 0)
CALLS = {"base": 1142, "miss_func": 1140, "miss_param": 1140, "long_context": 1203}


@pytest.fixture(scope="module")
def bfcl(tmp_path_factory):
    before = list(sys.path)
    sys.path[:0] = bfcl_path(tmp_path_factory.mktemp("bfcl"))
    yield importlib.import_module("bfcl_tasks")
    sys.path[:] = before
    sys.modules.pop("bfcl_tasks")


@pytest.fixture(scope="module")
def examples(bfcl):
    return {kind: bfcl.examples(kind) for kind in bfcl.KINDS}


def right(bfcl, example):
    """The right calls of each request."""
    simulators = bfcl.Simulators(example.task)
    return [
        [Call(name=n, arguments=a) for n, a in bfcl.right_calls(simulators, lines)] for lines in example.task["truth"]
    ]


def played(bfcl, example, requests):
    """The reward of a policy that makes these calls: for each request a list of turns, each a list of calls."""
    script = [said for turns in requests for said in [*filter(None, turns), []]]
    at = iter(range(len(script)))

    def parses(said):
        calls = script[int(said)]
        return Parsed(text="" if calls else "Done.", calls=tuple(calls))

    engine = Engine(lambda before, r: f"{next(at)}", parses)
    one = stage(engine, env=bfcl.Bfcl, limits=Limits(turns=60), max_model_len=10**7)
    asked = prompt(example.prompt[0]["content"], **example.task)
    (row,) = asyncio.run(play(one, asked, 0, SEEDS))
    return row.reward


def test_the_environment_is_one(bfcl):
    check_environment(bfcl.Bfcl)


@pytest.mark.parametrize("kind", CALLS)
def test_the_right_calls_pass_in_every_task(bfcl, examples, kind):
    turns = [right(bfcl, example) for example in examples[kind]]
    assert sum(len(calls) for task in turns for calls in task) == CALLS[kind]
    rewards = [
        played(bfcl, example, [[calls] for calls in task]) for example, task in zip(examples[kind], turns, strict=True)
    ]
    print(f"{kind}: {sum(rewards):g} of {len(rewards)} tasks pass with their {CALLS[kind]} right calls")
    assert rewards == [1.0] * 200


def test_a_task_without_one_of_its_calls_fails(bfcl, examples):
    """Calls that change and show nothing, such as opening a folder that is open, are not needed."""
    draw, passed = random.Random(0), []
    for example in examples["base"]:
        turns = right(bfcl, example)
        without = draw.choice([i for i, calls in enumerate(turns) if calls])
        cut = [[calls[:-1] if i == without else calls] for i, calls in enumerate(turns)]
        passed.append(played(bfcl, example, cut))
    print(f"base: {sum(passed):g} of 200 tasks pass without the last call of one of their requests")
    assert sum(passed) <= 4
    assert not any(played(bfcl, example, [[] for _ in example.task["truth"]]) for example in examples["base"])


def test_the_policy_reads_what_a_call_did_wrong(bfcl, examples):
    env = bfcl.Bfcl(examples["base"][0].task)
    for call in (("cd", {"folder": "nowhere", "more": 1}), ("format_disk", {}), ("_load_scenario", {})):
        with pytest.raises(bfcl.ToolError, match="Error during execution"):
            env.call(*call)
    math = next(e for e in examples["base"] if "MathAPI" in e.task["classes"])
    with pytest.raises(bfcl.ToolError, match="larger than 1000"):
        bfcl.Bfcl(math.task).call("power", {"base": 10**9, "exponent": 10**9})


def test_a_tool_that_is_missing_is_shown_by_a_later_message(bfcl, examples):
    example = examples["miss_func"][0]
    names = [tool["function"]["name"] for tool in example.tools]
    assert "sort" not in names
    assert len(names) + 1 == len(examples["base"][0].tools)
    news = example.task["users"][2][0]["content"]
    assert '"name": "sort"' in news
    assert "I have updated some more functions" in news


def test_schemas_are_json_schemas(bfcl, examples):
    def types(part):
        if isinstance(part, dict):
            own = [part["type"]] if isinstance(part.get("type"), str) else []
            return {*own, *(each for value in part.values() for each in types(value))}
        return {each for value in part for each in types(value)} if isinstance(part, list) else set()

    shown = {t["function"]["name"]: t["function"]["parameters"] for e in examples["base"] for t in e.tools}
    assert len(shown) == 128
    assert types(list(shown.values())) == {"object", "number", "array", "string", "integer", "boolean"}


def test_no_scenario_is_both_trained_on_and_held_out(bfcl):
    def numbers(examples):
        return {example.task["id"].rsplit("_", 1)[1] for example in examples}

    data = bfcl.tasks(train=bfcl.KINDS)
    sets = {name: list(each.examples) for name, each in data.sets.items()}
    assert len(data.train) == 640
    assert {name: len(each) for name, each in sets.items()} == dict.fromkeys(bfcl.KINDS, 40)
    assert not numbers(data.train) & numbers([each for some in sets.values() for each in some])
    assert [len(list(each.examples)) for each in bfcl.tasks(every=1).sets.values()] == [200] * 4


def test_too_many_turns_for_one_request_fail(bfcl, examples):
    example = examples["base"][0]
    first, *later = right(bfcl, example)
    looks = [Call(name="pwd", arguments={})]
    for count, reward in ((19, 1.0), (20, 0.0)):
        assert played(bfcl, example, [[*[looks] * count, first], *[[calls] for calls in later]]) == reward
