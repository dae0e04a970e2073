"""The recipes that play games of TextArena and environments of OpenEnv, against stand-ins of the same interfaces, and
against the libraries where they are installed."""

import asyncio
import importlib
import importlib.util
import json
import random
import sys
import threading
import types
from functools import partial
from pathlib import Path

import pytest
from websockets.asyncio.server import serve

from episodes import Engine, prompt, stage
from rl.environments.check import check_environment
from rl.environments.group import play_group
from rl.environments.play import play
from rl.environments.types import Limits, Turn
from rl.loop.stream import turn_seed
from trainer.doctor.episodes.environment import environment_findings

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "environments"
SEEDS = partial(turn_seed, 0, 0, 0)


class Dice:
    """A game of TextArena: it seeds and reads the global generator, as all of them do."""

    def reset(self, num_players: int, seed: int) -> None:
        random.seed(seed)
        self.left, self.rewards = 3, None
        self.messages = [(-1, "Roll a die: write [roll]", 1)]

    def get_observation(self):
        told, self.messages = self.messages, []
        return 0, told

    def step(self, action: str):
        self.messages = [(0, action, 2), (-1, f"It shows {random.randint(1, 6)}", 3)]
        self.left -= 1
        if self.left == 0:
            self.rewards = {0: 1.0}
        return self.left == 0, {}

    def close(self):
        return self.rewards, {}


@pytest.fixture
def textarena(monkeypatch):
    made = types.ModuleType("textarena")
    made.make = lambda name: Dice()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "textarena", made)
    monkeypatch.syspath_prepend(str(RECIPES))
    yield importlib.import_module("textarena_game")
    sys.modules.pop("textarena_game")


def heard(game, seed, turns=2):
    """What a game tells, before and after each turn."""
    one = game({"game": "Dice", "seed": seed})
    yield one.start()
    for _ in range(turns):
        yield one.reply(Turn(text="[roll]")).observation


def test_games_that_are_played_at_once_are_those_that_are_played_alone(textarena):
    alone = [list(heard(textarena.Game, seed)) for seed in (1, 2)]
    at_once = [
        list(each) for each in zip(*zip(heard(textarena.Game, 1), heard(textarena.Game, 2), strict=True), strict=True)
    ]
    assert at_once == alone
    assert alone[0] != alone[1]


def test_a_game_is_an_environment_without_global_state(textarena):
    check_environment(textarena.Game)
    assert environment_findings(textarena.Game, [{"game": "Dice", "seed": 1}]) == []
    engine = Engine(lambda before, r: "[roll]")
    one = stage(engine, env=textarena.Game, limits=Limits(turns=5), max_model_len=10**5)
    (row,) = asyncio.run(play(one, prompt(game="Dice", seed=1), 0, SEEDS))
    assert row.reward == 1.0
    read = "".join(map(chr, row.token_ids))
    assert read.count("It shows") == 2
    assert read.count("[roll]") == 4, "a move is told again"
    cut = stage(Engine(lambda before, r: "[roll]"), env=textarena.Game, limits=Limits(turns=2), max_model_len=10**5)
    assert asyncio.run(play(cut, prompt(game="Dice", seed=1), 0, SEEDS))[0].reward == 0.0


@pytest.mark.skipif(not importlib.util.find_spec("textarena"), reason="textarena is not installed")
@pytest.mark.parametrize("game", ["GuessTheNumber-v0", "TowerOfHanoi-v0", "FrozenLake-v0"])
def test_a_real_game_is_played(monkeypatch, game):
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("textarena_game")
    engine = Engine(lambda before, r: f"[{r.randint(1, 20)}]")
    one = stage(engine, env=recipe.Game, limits=Limits(turns=6), max_model_len=10**6)
    starts = [recipe.Game({"game": game, "seed": 3}).start() for _ in range(2)]
    assert starts[0] == starts[1] != ""
    group = asyncio.run(play_group(4, lambda i: play(one, prompt(game=game, seed=i), i, SEEDS), 0))
    assert not group.error, group.error
    assert len(group.rows) == 4


# -- OpenEnv -----------------------------------------------------------------------------------------------------------


async def session(socket):
    """A session of an OpenEnv server: it pays the length of a message, and ends with the third."""
    steps = 0
    async for said in socket:
        asked = json.loads(said)
        if asked["type"] == "reset":
            answer = {"observation": {"echoed_message": f"seed {asked['data']['seed']}"}, "reward": None, "done": False}
        elif asked["data"]["message"] == "?":
            error = {"message": "a message must be a word", "code": "VALIDATION_ERROR"}
            await socket.send(json.dumps({"type": "error", "data": error}))
            continue
        elif asked["data"]["message"] == "break":
            error = {"message": "the disk is full", "code": "EXECUTION_ERROR"}
            await socket.send(json.dumps({"type": "error", "data": error}))
            continue
        else:
            steps += 1
            text = asked["data"]["message"]
            answer = {"observation": {"echoed_message": text}, "reward": float(len(text)), "done": steps == 3}
        await socket.send(json.dumps({"type": "observation", "data": answer}))


@pytest.fixture(scope="module")
def openenv():
    sys.path.insert(0, str(RECIPES))
    recipe = importlib.import_module("openenv_client")
    loop, up = asyncio.new_event_loop(), threading.Event()

    async def run():
        async with serve(session, "127.0.0.1", 0) as server:
            recipe.OpenEnv.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
            up.set()
            await asyncio.Future()

    threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True).start()
    assert up.wait(60)
    yield recipe
    sys.path.remove(str(RECIPES))


def episode(openenv, says):
    one = stage(Engine(says), env=openenv.OpenEnv, limits=Limits(turns=8), max_model_len=10**5)
    return asyncio.run(play_group(2, lambda i: play(one, prompt(seed=7), i, SEEDS), 0))


def test_a_session_pays_each_turn(openenv):
    check_environment(openenv.OpenEnv)
    group = episode(openenv, lambda before, r: "ab" if "seed 7" in before else "no seed")
    assert [row.reward for row in group.rows] == [6.0, 6.0]


def test_an_action_that_the_server_refuses_is_read_and_its_own_failure_is_no_reward(openenv):
    group = episode(openenv, lambda before, r: "abc" if "must be a word" in before else "?")
    assert [row.reward for row in group.rows] == [9.0, 9.0]
    group = episode(openenv, lambda before, r: "break")
    assert group.failed == "env_error"
    assert "the disk is full" in str(group.error)


@pytest.mark.usefixtures("unchecked_types")  # the check of types draws random numbers
def test_the_doctor_starts_and_ends_sessions(openenv):
    assert environment_findings(openenv.OpenEnv, [{"seed": 1}, {"seed": 2}]) == []


def test_an_adapter_is_shorter_than_fifty_lines():
    for name in ("textarena_game", "openenv_client"):
        lines = (RECIPES / f"{name}.py").read_text().splitlines()
        assert sum(bool(line.strip()) for line in lines) < 50, name
