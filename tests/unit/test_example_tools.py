"""Tools of one example: its prompt shows them, and their calls go to the environment's `call`."""

import asyncio
from functools import partial

import pytest

from episodes import Engine, prompt, stage
from rl.config import Config, RolloutConfig
from rl.environments.check import check_environment
from rl.environments.host import ThreadHost
from rl.environments.play import play
from rl.loop.players import stage_of
from rl.loop.stream import turn_seed
from rl.tokens import Rendering
from rl.tools import MCP
from rl.tools.methods import bind
from rl.types import Call, Completion, Data, Example, Parsed
from tiny_tokenizer import CHAT, make_tokenizer
from trainer.data.encode import Encoder
from trainer.prompts import prepare

# The types that users get wrong are checked by `Example` itself.
pytestmark = pytest.mark.usefixtures("unchecked_types")
SEEDS = partial(turn_seed, 0, 0, 0)
TOOLED = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + CHAT


def schema(name):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


class Door:
    """Has one tool of its own, and calls all others by name."""

    def __init__(self, task):
        self.task, self.made = task, []

    def look(self, far: bool = False) -> str:
        """Look."""
        return "a door"

    def call(self, name, arguments):
        self.made.append((name, arguments))
        return f"{name} was made"

    def reward(self, episode):
        return float(self.made == [("open", {"key": 3})])


class Starts(Door):
    def start(self):
        return "Begin."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tooled"), chat_template=TOOLED)


ASKED = [{"role": "user", "content": "Go"}]
EXAMPLES = [
    Example(prompt=ASKED, tools=[schema("open")]),
    Example(prompt=ASKED, tools=[schema("shut"), schema("lock")]),
]


def config(model, examples=EXAMPLES, **settings):
    rollout = RolloutConfig(max_tokens=8, max_model_len=128)
    data = Data(train=examples, evals={"held_out": examples})
    return Config(**{"name": "t", "model": model, "data": data, "env": Door, "rollout": rollout} | settings)


def test_each_prompt_shows_its_own_tools_after_those_of_the_run(model):
    prepared = prepare(config(model))
    shown = [prepared.decode(each.token_ids) for each in prepared.train]
    assert shown == ["<look><open>u:Go;a:", "<look><shut><lock>u:Go;a:"]
    assert [prepared.decode(each.token_ids) for each in prepared.evals["held_out"]] == shown
    assert "<open>" in "".join(prepared.first.tokens)


def test_a_prompt_that_start_goes_on_with_still_shows_them(model):
    class Silent:
        asked: list[list[int]] = []

        async def sample(self, token_ids, n, **_):
            self.asked.append(token_ids)
            return [Completion(token_ids=[1], logprobs=[0.0], versions=[0], finish_reason="stop")]

    one = config(model, env=Starts)
    prepared, engine = prepare(one), Silent()
    acting = stage_of(one, engine, prepared.decode, prepared.chat(one), ThreadHost(env=Starts))
    asyncio.run(play(acting, prepared.train[1], 0, SEEDS))
    assert prepared.decode(engine.asked[0]) == "<look><shut><lock>u:Go;u:Begin.;a:"


def test_their_calls_go_to_the_environment_by_name(model):
    def parses(said):
        return (
            Parsed(text="", calls=(Call(name="open", arguments={"key": 3}),)) if said == "call" else Parsed(text=said)
        )

    engine = Engine(lambda before, r: "call" if before.count("[assistant]") == 1 else "done", parses)
    (row,) = asyncio.run(play(stage(engine, env=Door), prompt(), 0, SEEDS))
    assert row.reward == 1.0
    assert "open was made" in "".join(map(chr, row.token_ids))
    assert bind(Door({}), Call(name="look", arguments={}))() == "a door"


def test_an_environment_that_calls_no_tools_by_name_cannot_have_them(model):
    plain = type("Plain", (), {"__init__": Door.__init__, "reward": Door.reward})
    with pytest.raises(ValueError, match=r"data.train\[0\] has tools, and no environment that makes their calls"):
        prepare(config(model, env=plain))
    with pytest.raises(ValueError, match=r"data.train\[0\] has tools, and no environment"):
        prepare(config(model, env=None, reward=lambda reply: 1.0))
    with pytest.raises(ValueError, match=r"data.train\[0\] has tools, and the run has an MCP server"):
        Encoder(tokenizer=None, config=config(model, tools=MCP(url="x")), rendering=Rendering()).all(EXAMPLES)
    with pytest.raises(ValueError, match="must be a list of schemas"):
        Example(prompt=ASKED, tools="open")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"Door.call must be a method: write def call\(self, name, arguments\)"):
        check_environment(type("Door", (Door,), {"call": lambda self, name: ""}))


def test_a_resumed_run_notices_other_tools(model):
    other = [Example(prompt=ASKED, tools=[schema("open")]), Example(prompt=ASKED, tools=[schema("shut")])]
    digests = [prepare(config(model, each)).fingerprint["texts"] for each in (EXAMPLES, EXAMPLES, other)]
    assert digests[0] == digests[1] != digests[2]
