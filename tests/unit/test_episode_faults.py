"""A world that fails: a fifth of all calls raise, hang, die or return garbage, and no error becomes a reward."""

import asyncio
import json
import random
from collections import Counter
from statistics import fmean

import pytest

from cases import nightly_unless
from episodes import Calculator, Chat, Engine, InlineHost, prompt, solves, text
from log import Log
from orders import run_seeded
from rl.config import Config, RolloutConfig
from rl.data import Eval
from rl.environments.types import EnvError, Limits, Step
from rl.loop.evaluate import evaluate, held_out
from rl.loop.loop import Loop
from rl.loop.players import in_environment, stage_of
from rl.loop.progress import Progress
from rl.loop.stream import stream
from rl.protocols import EngineLost, SyncReport
from rl.types import Data

PROMPTS = [prompt(f"{a}*{a + 1}+{a}", ordinal=a, answer=str(a * (a + 1) + a)) for a in range(2, 9)]


# To check the types of every call takes half of the time.
pytestmark = pytest.mark.usefixtures("unchecked_types")


def sometimes(before, r):
    """A policy that solves about half of its tasks, by the seed of its turn alone."""
    said = solves(before, r)
    return said if said.startswith("CALC") or r.random() < 0.5 else "0"


async def forever():
    await asyncio.Event().wait()


KINDS = ("raise", "hang", "kill", "garbage", "oversized")
LARGE = "9" * 1000
"""Does not fit into what the engine can continue. From `start` that is an error; later it ends the episode."""
CUT = 0.25
"""The reward of an episode that ended so."""


def faulty(r, phase, share, kinds=KINDS):
    """A calculator of which this phase fails in a share of its calls."""

    async def fails(garbage, large=None):
        if r.random() >= share:
            return None
        kind = r.choice(kinds)
        if kind == "raise":
            raise KeyError("the database is gone")
        if kind == "kill":
            raise EnvError("lost its process")
        if kind == "hang":
            await forever()
        return garbage if kind == "garbage" or large is None else large

    class Faulty(Calculator):
        def __init__(self, task):
            super().__init__(task)
            if phase == "constructor" and r.random() < share:
                raise ConnectionError("no sandbox")

        async def start(self):
            large = [{"role": "user", "content": LARGE}]
            return await fails(3, large) if phase == "start" else None

        async def multiply(self, a: int, b: int) -> int:
            """Multiply two integers."""
            found = await fails(object(), LARGE) if phase == "tool" else None
            return a * b if found is None else found

        async def parse(self, text):
            found = await fails("CALC") if phase == "parse" else None
            return Calculator.parse(self, text) if found is None else found

        async def reply(self, turn):
            return await fails("more", Step(observation=LARGE)) if phase == "reply" else None

        async def reward(self, episode):
            if episode.ended == "length":
                return CUT
            found = await fails(float("nan")) if phase == "reward" else None
            return Calculator.reward(self, episode) if found is None else found

        async def close(self):
            if phase == "close":
                await fails(None)

    return Faulty


PHASES = ("constructor", "start", "parse", "tool", "reply", "reward", "close", "engine")


class World(Log):
    """Engines, a trainer and a disk; a policy whose words are functions of seeds."""

    def __init__(self, env, seed=0, disk=None, engine_faults=0.0, **settings):
        super().__init__()
        defaults = {"steps": 4, "prompts_per_step": 2, "group_size": 2, "max_failed": 0.9, "limits": Limits(tool_s=5.0)}
        self.config = Config(
            name="t",
            model="m",
            data=lambda: Data(train=[]),
            env=env,
            rollout=RolloutConfig(retries=6, max_tokens=40, max_model_len=400),
            **defaults | settings,
        )
        self.random, self.engine_faults = random.Random(seed), engine_faults
        self.engine = Engine(sometimes)
        kept = json.loads(disk[-1]) if disk else {"trained": [], "progress": None}
        self.disk, self.dead = disk, False
        self.progress = Progress.from_json(kept["progress"]) if disk else Progress()
        self.engine.version = self.progress.version
        self.batches, self.trained = [], kept["trained"]

    async def sample(self, token_ids, n, *, engine=None, **more):
        await asyncio.sleep(self.random.random())
        if self.random.random() < self.engine_faults:
            raise EngineLost("engine 0 is gone")
        return await self.engine.sample(token_ids, n, engine=engine, **more)

    async def step(self, batch):
        await asyncio.sleep(self.random.random())
        self.batches.append(batch)
        self.trained = [*self.trained, *(int(g) for g in batch.group_ids.unique())]
        return {"actor/grad_norm": 1.0}

    async def publish(self, version):
        await asyncio.sleep(self.random.random())
        self.engine.version = version
        return SyncReport(seconds=0.0, pause_seconds=0.0, bytes=0, verified=False)

    async def save(self, progress):
        kept = {"trained": self.trained, "progress": progress.to_json()}
        await asyncio.sleep(self.random.random())
        assert not self.dead
        if self.disk is not None:
            self.disk.append(json.dumps(kept))

    def player(self, host=None):
        host = host or InlineHost(self.config.env)
        stage = stage_of(self.config, self, text, Chat(), host)
        return in_environment(self.config, stage)

    def loop(self, host=None):
        return Loop(
            config=self.config,
            rollouts=self,
            learner=self,
            prompts=stream(PROMPTS, 0),
            decode=text,
            tracker=self,
            player=self.player(host),
            progress=self.progress,
            save=self.save,
        )


def lived(world, seed=0, idle=lambda: None):
    """The loop of a world, after its run on a clock that jumps."""
    loop = world.loop()
    run_seeded(loop.run(), seed, idle)
    return loop


def balanced(loop):
    ledger = loop.admission.ledger
    assert sorted(ledger.states) == list(range(len(ledger.states)))
    assert +ledger.counts == Counter(ledger.states.values())
    assert not loop.groups.in_flight.tasks
    return {state: n for state, n in ledger.summary().items() if n}


def rewards_of(world):
    """The rewards of each trained group."""
    found = {}
    for batch in world.batches:
        for group, reward in zip(batch.group_ids.tolist(), batch.rewards.tolist(), strict=True):
            found.setdefault(group, []).append(reward)
    return found


def pairs(one, other, group):
    """The rewards of the members of a group in two worlds."""
    return list(zip(one[group], other[group], strict=True))


@pytest.mark.parametrize(
    ("phase", "seed"), nightly_unless(lambda _, s: s == 0, [(p, s) for p in PHASES for s in range(4)])
)
def test_a_fifth_of_all_calls_fail_and_every_group_has_the_rewards_of_a_world_without_faults(phase, seed):
    whole = World(Calculator, seed, group_size=4)
    assert balanced(lived(whole, seed)) == {"trained": 8}
    env = faulty(random.Random(f"{phase}/{seed}"), phase, 0.2)
    world = World(env, seed, group_size=4, engine_faults=0.1 if phase == "engine" else 0.0)
    ends = balanced(lived(world, seed))
    assert ends["trained"] == 8
    assert set(ends) <= {"trained", "failed(env_error)", "failed(deadline)", "failed(engine_lost)"}
    expected, found = rewards_of(whole), rewards_of(world)
    both = set(expected) & set(found)
    assert len(both) >= 6
    # What was too large ended its own episode; nothing else is scored in another way.
    kept = [CUT if f == CUT and phase in ("tool", "reply") else e for g in both for e, f in pairs(expected, found, g)]
    assert kept == [f for g in both for _, f in pairs(expected, found, g)]
    assert len(kept) - kept.count(CUT) >= 16
    assert 0.1 < fmean(r for rewards in expected.values() for r in rewards) < 0.9, "the rewards can differ"
    assert sum(row.get("episodes/replayed", 0.0) for row in world.rows) > 0, "nothing failed"


@pytest.mark.parametrize("phase", ["start", "tool", "reply"])
def test_an_observation_that_is_too_large_ends_its_episode_alone(phase):
    whole, world = (
        World(Calculator, group_size=4),
        World(faulty(random.Random(2), phase, 0.2, ("oversized",)), group_size=4),
    )
    assert balanced(lived(whole)) == {"trained": 8}
    assert balanced(lived(world))["trained"] == 8
    expected, found = rewards_of(whole), rewards_of(world)
    both = [pair for group in set(expected) & set(found) for pair in pairs(expected, found, group)]
    assert {f for e, f in both if e != f} == (set() if phase == "start" else {CUT})
    cut = sum(row["response_length/truncated_frac"] > 0 for row in world.rows)
    assert (cut > 0) == (phase != "start"), "from `start` it is an error of the environment, and played again"


def test_limits_of_the_policy_are_scored_and_are_no_failure():
    class Floods(Calculator):
        async def multiply(self, a: int, b: int) -> str:
            """Multiply two integers."""
            return "9" * 1000

        def reward(self, episode):
            assert episode.ended == "length"
            return 0.25

    world = World(Floods)
    assert balanced(lived(world)) == {"trained": 8}
    assert {reward for rewards in rewards_of(world).values() for reward in rewards} == {0.25}
    assert [row["response_length/truncated_frac"] for row in world.rows] == [1.0] * 4


@pytest.mark.parametrize(("kinds", "end"), [(("raise",), "failed(env_error)"), (("hang",), "failed(deadline)")])
def test_a_group_whose_retries_are_used_up_fails_and_another_takes_its_place(kinds, end):
    world = World(faulty(random.Random(1), "tool", 0.85, kinds), limits=Limits(tool_s=5.0))
    ends = balanced(lived(world))
    assert ends["trained"] == 8
    assert ends[end] > 0
    assert set(ends) == {"trained", end}


def test_an_environment_that_always_fails_ends_the_run_with_its_first_error_and_the_prompt():
    def broken(self, text):
        raise KeyError("database")

    world = World(type("Broken", (Calculator,), {"parse": broken}), max_failed=0.1)
    with pytest.raises(EnvError) as raised:
        lived(world)
    message = str(raised.value)
    assert message.startswith("6 of the last 6 groups failed because of the environment (max_failed=0.1 of 50 groups)")
    assert "The first was prompt" in message
    assert "'answer'" in message
    assert "`parse` raised KeyError: 'database'" in message
    causes = []
    error = raised.value
    while error:
        causes.append(type(error))
        error = error.__cause__
    assert causes == [EnvError, EnvError, KeyError], "the user's own lines are shown"
    assert not world.batches


def test_a_late_group_is_cancelled_and_its_environments_are_closed():
    opened, closed = [], []

    class Slow(Calculator):
        def __init__(self, task):
            super().__init__(task)
            opened.append(self)
            self.slow = len(opened) in (3, 4)

        async def multiply(self, a: int, b: int) -> int:
            """Multiply two integers."""
            await asyncio.sleep(400.0 if self.slow else 0.1)
            return a * b

        def close(self):
            closed.append(self)

    world = World(Slow, max_staleness=1, limits=Limits(tool_s=500.0), steps=6)
    ends = balanced(lived(world))
    assert ends["filtered(too_old)"] >= 1
    assert ends["trained"] == 12
    assert len(opened) == len(closed)


def test_members_of_a_group_are_episodes_with_seeds_of_their_own():
    world = World(Calculator, steps=1)
    lived(world)
    asked = [(text(each["context"]), each["seed"]) for each in world.engine.asked]
    assert len(set(asked)) == len(asked)
    assert all(each["n"] == 1 for each in world.engine.asked)


def test_an_evaluation_plays_episodes_and_leaves_out_problems_that_fail():
    class Fails(Calculator):
        def reward(self, episode):
            if self.task["answer"] == PROMPTS[0].task["answer"]:
                raise KeyError("judge")
            return super().reward(episode)

    def measured(env, sets, **settings):
        world = World(env, eval_samples=2, **settings)
        found = []

        async def main():
            held = {n: held_out(world.config, Eval(examples=[]), p, world.player()) for n, p in sets.items()}
            found.append((await evaluate(world.config, world, text, held)).metrics)

        run_seeded(main(), 0)
        return found[0], world

    whole, _ = measured(Calculator, {"held": PROMPTS[1:]})
    part, _ = measured(Fails, {"held": PROMPTS})
    assert part == whole | {"eval/held/failed_frac": 1 / 7}
    assert 0.0 < whole["eval/held/avg@2"] < 1.0
    temperatures = {
        each["temperature"] for each in measured(Calculator, {"held": PROMPTS}, eval_temperature=0.5)[1].engine.asked
    }
    assert temperatures == {0.5}
    assert measured(Fails, {"held": PROMPTS}, max_failed=0.1)[0] == {"eval/held/failed_frac": 1 / 7}
    with pytest.raises(EnvError, match="every problem of the set 'held' failed"):
        measured(Fails, {"held": PROMPTS[:1]})


class KilledError(Exception):
    """SIGKILL, between two events."""


@pytest.mark.slow
@pytest.mark.parametrize("block", nightly_unless(lambda block: block < 1, range(4)))
def test_however_often_a_run_of_episodes_is_killed_no_prompt_is_lost_or_trained_twice(block):
    kills = resumed = 0
    for seed in range(60 * block, 60 * (block + 1)):
        r, disk = random.Random(f"kills {seed}"), []
        for life in range(4):
            after = r.randint(2, 60) if life < 3 else None
            env = faulty(random.Random(f"{seed}/{life}"), r.choice(PHASES), 0.1)
            settings = {"max_staleness": r.choice([0, 0, 1]), "save_every": 1, "steps": 4}
            world = World(env, f"{seed}/{life}", disk, **settings)
            events = 0

            def event(world=world, after=after):
                nonlocal events
                events += 1
                if events == after:
                    world.dead = True
                    raise KilledError

            resumed += life > 0 and bool(disk)
            try:
                loop = lived(world, f"{seed}/{life}", event)
                break
            except KilledError:
                kills += 1
        ends = balanced(loop)
        assert ends["trained"] == len(set(world.trained)) == len(world.trained) == 8, f"seed {seed}"
        assert "pending" not in ends, f"seed {seed}"
    assert kills >= 60
    assert resumed > 20


def rows_of(batch, group):
    """The tokens of a group, without what pads them."""
    return [[token for token in row if token] for row in batch.input_ids[batch.group_ids == group].tolist()]


def test_without_staleness_a_killed_run_of_episodes_ends_with_the_samples_of_one_that_was_not():
    whole = World(Calculator, save_every=1)
    lived(whole)
    rows = {g: rows_of(b, g) for b in whole.batches for g in b.group_ids.unique().tolist()}
    again = 0
    for kill in range(10, 70, 10):
        disk, events = [], 0

        def event(kill=kill):
            nonlocal events
            events += 1
            if events == kill:
                raise KilledError

        try:
            lived(World(Calculator, kill, disk, save_every=1), kill, event)
        except KilledError:
            world = World(Calculator, kill + 1, disk, save_every=1)
            lived(world, kill)
            for batch in world.batches:
                for group in batch.group_ids.unique().tolist():
                    found = batch.input_ids[batch.group_ids == group].tolist()
                    width = max(len(row) for row in rows[group])
                    assert [(row + [0] * width)[:width] for row in found] == [
                        (row + [0] * width)[:width] for row in rows[group]
                    ]
            again += bool(disk)
    assert again > 1
