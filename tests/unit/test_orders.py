"""The asynchronous loop under thousands of seeded orders: engines that are slow, die and come back, slow rewards, and
updates that reach engines one by one, between any two events."""

import asyncio
import math
import random
from collections import Counter
from dataclasses import fields

import pytest

from cases import nightly_unless
from orders import DeadlockError, run_seeded
from rl.config import Config, RolloutConfig
from rl.loop.admission import Admission
from rl.loop.groups import Groups
from rl.loop.loop import Loop
from rl.loop.stream import stream
from rl.protocols import EngineLost, StallError, SyncReport, Tracker
from rl.types import Completion, Data, Prompt

SEEDS = 5400
PROMPTS = [Prompt(ordinal=i, token_ids=[i], task={}) for i in range(7)]


# Orders are what is explored here; to check the types of every call as well takes half of the time.
pytestmark = pytest.mark.usefixtures("unchecked_types")


class World(Tracker):
    """Engines, a reward and a trainer whose every delay and fault is drawn from one seed."""

    def __init__(self, seed):
        self.random = r = random.Random(seed)
        self.config = Config(
            name="t",
            model="m",
            data=lambda: Data(train=[]),
            reward=lambda reply: 1.0,
            steps=r.randint(1, 6),
            prompts_per_step=r.randint(1, 3),
            group_size=r.randint(1, 2),
            max_staleness=r.choice([0, 0, 1, 1, 2, 4]),
            late_groups=r.choice(["drop", "wait"]),
            rollout=RolloutConfig(retries=r.randint(0, 3)),
        )
        self.engines = [0] * r.randint(1, 3)
        """Weight version of each engine."""
        self.gone = [asyncio.Event() for _ in self.engines]
        self.mortality = r.choice([0.0, 0.0, 0.15])
        self.broken = r.choice([0.0, 0.0, 0.1])
        self.slow = r.choice([1.0, 10.0, 100.0])
        """How much longer a slow one takes than a usual one."""
        self.ages, self.trained, self.published, self.waits = [], [], [], 0

    async def delay(self):
        await asyncio.sleep(self.random.choice([0.0, 0.1, 1.0, 1.0, self.slow]) * self.random.random())

    async def sample(self, token_ids, n, *, seed, temperature=None):
        engine = self.random.randrange(len(self.engines))
        versions, life = [], self.gone[engine]
        for _ in range(self.random.randint(1, 4)):
            await self.delay()
            if self.random.random() < self.mortality and not life.is_set():
                life.set()
                self.gone[engine] = asyncio.Event()
            if life.is_set():
                raise EngineLost(f"engine {engine} is gone")
            versions.append(self.engines[engine])
        logprob = math.nan if self.random.random() < self.broken else -1.0
        tokens = len(versions)
        completion = Completion(
            token_ids=[7] * tokens,
            logprobs=[-1.0] * (tokens - 1) + [logprob],
            versions=versions,
            finish_reason="stop",
        )
        return [completion] * n

    async def score(self, reward, reply, ordinal, deadline_s):
        await self.delay()
        return 1.0, {}

    async def step(self, batch):
        await self.delay()
        self.ages.append(len(self.published) - int(batch.versions[batch.mask].min()))
        groups = batch.group_ids.unique().tolist()
        assert len(batch.rewards) == len(groups) * self.config.group_size
        self.trained += [int(g) for g in groups]
        return {"actor/grad_norm": 1.0}

    async def publish(self, version):
        self.published.append(version)
        for engine in self.random.sample(range(len(self.engines)), len(self.engines)):
            await self.delay()
            self.engines[engine] = version
        return SyncReport(seconds=0.0, pause_seconds=0.0, bytes=0, verified=False)

    def log(self, step, metrics):
        assert metrics["staleness/max"] == self.ages[-1]

    def evaluate(self, step):
        every, steps = self.config.eval_every, self.config.steps
        return self.evaluated() if step == steps or (every and step % every == 0) else None

    async def evaluated(self):
        await self.delay()
        return {}


def live(seed, loop_class=Loop):
    """One run in the world of a seed; returns both. Between any two events it checks that no step waits for nothing."""
    world = World(seed)
    loop = loop_class(
        config=world.config,
        rollouts=world,
        learner=world,
        prompts=stream(PROMPTS, seed),
        decode=str,
        tracker=world,
        evaluate=world.evaluate,
        score=world.score,
    )

    def nobody_waits_for_nothing():
        waiting = loop.admission.ledger.count("training") == 0 and len(world.published) == loop.admission.version
        evaluating = loop.admission.version == world.config.steps
        enough = loop.admission.ledger.count("ready") >= world.config.prompts_per_step
        assert not (waiting and enough and not evaluating and world.config.late_groups == "drop"), "a step is held up"

    run_seeded(loop.run(), seed, nobody_waits_for_nothing)
    return world, loop


def check(world, loop):
    """What must hold at the end of every run."""
    config, admission = world.config, loop.admission
    assert len(world.ages) == config.steps
    assert max(world.ages) <= config.max_staleness, "staleness above its bound"
    assert world.published == list(range(1, config.steps + 1))
    assert len(set(world.trained)) == len(world.trained) == config.steps * config.prompts_per_step, "trained twice"
    states = admission.ledger.states
    assert sorted(states) == list(range(len(states))), "a prompt of the stream is nowhere"
    assert {o for o, state in states.items() if state == "trained"} == set(world.trained)
    assert +admission.ledger.counts == Counter(states.values())
    assert admission.ledger.pending() == 0, "a group was lost"
    assert config.late_groups == "drop" or not admission.ledger.counts["filtered(too_old)"], "thrown away for its age"
    assert not loop.groups.ready
    assert not loop.groups.in_flight.tasks


@pytest.mark.slow
@pytest.mark.parametrize("block", nightly_unless(lambda block: block < 1, range(6)))
def test_no_order_of_events_loses_a_group_trains_it_twice_or_makes_it_too_old(block):
    ends = Counter()
    for seed in range(block * SEEDS // 6, (block + 1) * SEEDS // 6):
        try:
            world, loop = live(seed)
            check(world, loop)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        ends.update(loop.admission.ledger.summary())
        ends["restarts"] += sum(event.is_set() for event in world.gone)
    # The worlds are as bad as they are meant to be.
    assert ends["filtered(too_old)"] > 20
    assert ends["failed(engine_lost)"] > 20
    assert ends["filtered(nonfinite_logprobs)"] > 20


class TooManyAdmitted(Admission):
    def room(self):
        self.max_staleness += 1
        try:
            return super().room()
        finally:
            self.max_staleness -= 1


class NewestFirst(Admission):
    def step(self):
        ready = [o for o in self.born if self.ledger.states[o] == "ready"]
        enough = super().step() is not None
        return sorted(ready, key=lambda o: -self.born[o])[: self.prompts_per_step] if enough else None


class KeepsTheLate(Admission):
    def publish(self):
        bound, self.max_staleness = self.max_staleness, 10**6
        try:
            return super().publish()
        finally:
            self.max_staleness = bound


class WaitsForStragglers(Admission):
    def step(self):
        under_way = self.ledger.count("admitted", "sampling", "scoring")
        return None if under_way else super().step()


class ForgetsTheLost(Admission):
    def move(self, ordinal, state):
        super().move(ordinal, state)
        if state == "admitted":
            self.ledger.states.pop(ordinal)


@pytest.mark.parametrize(
    ("admission", "says"),
    [
        (TooManyAdmitted, "thrown away for its age|step . waited"),
        (NewestFirst, "thrown away for its age"),
        (KeepsTheLate, "staleness above its bound"),
        (WaitsForStragglers, "a step is held up"),
        (ForgetsTheLost, "prompt .* is unknown|KeyError"),
    ],
)
def test_the_orders_find_a_planted_fault(admission, says):
    class Faulty(Loop):
        def __post_init__(self):
            super().__post_init__()
            fine = self.admission
            self.groups.admission = admission(
                prompts_per_step=fine.prompts_per_step,
                max_staleness=fine.max_staleness,
                steps=fine.steps,
                late=fine.late,
            )

    with pytest.raises(Exception, match=says):
        all(check(*live(seed, Faulty)) is None for seed in range(600))


def test_a_loop_that_forgets_to_notify_is_found_asleep():
    class SilentGroups(Groups):
        async def process(self, prompt):
            changed, self._changed = self._changed, asyncio.Condition()
            try:
                await super().process(prompt)
            finally:
                self._changed = changed

    class Silent(Loop):
        def __post_init__(self):
            super().__post_init__()
            self.groups = SilentGroups(**{f.name: getattr(self.groups, f.name) for f in fields(Groups) if f.init})

    with pytest.raises((DeadlockError, StallError)):
        all(live(seed, Silent) for seed in range(20))
