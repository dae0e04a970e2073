"""A loop that is killed at any moment and goes on from its last checkpoint: nobody lost, nobody trained twice, and
without staleness the same samples and the same weights as if nothing had happened."""

import asyncio
import hashlib
import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from orders import run_seeded
from rl.loop.ledger import Ledger
from rl.loop.loop import Loop
from rl.loop.progress import Progress, progress_of
from rl.loop.stream import stream
from rl.protocols import StallError
from rl.types import Completion
from tests.unit.test_orders import PROMPTS, World, check


class KilledError(Exception):
    """SIGKILL, between two events."""


class Durable(World):
    """A world whose disk outlives its processes. Samples and weights are functions of seeds, so that they can be
    compared; each life has delays and faults of its own."""

    def __init__(self, seed, life, disk, faults=True, **settings):
        super().__init__(seed)
        self.config = replace(self.config, save_every=self.random.randint(1, 3), **settings)
        if not faults:
            self.mortality = self.broken = 0.0
        self.random = random.Random(f"{seed}/{life}")
        self.disk, self.dead = disk, False
        kept = json.loads(disk[-1]) if disk else {"trained": [], "weights": "", "progress": None}
        self.progress = Progress.from_json(kept["progress"]) if disk else Progress()
        self.trained, self.weights = kept["trained"], kept["weights"]
        version = self.progress.version
        self.engines = [version] * len(self.engines)
        self.published, self.ages = list(range(1, version + 1)), [0] * version

    async def sample(self, token_ids, n, *, seed, temperature=None):
        completions = await super().sample(token_ids, n, seed=seed)
        drawn = random.Random(f"{seed}/{token_ids}")
        return [
            Completion(
                token_ids=[drawn.randrange(100) for _ in c.token_ids[:1]],
                logprobs=c.logprobs[-1:],
                versions=c.versions[:1],
                finish_reason="stop",
            )
            for c in completions
        ]

    async def step(self, batch):
        metrics = await super().step(batch)
        seen = f"{self.weights}/{batch.group_ids.tolist()}/{batch.input_ids.tolist()}"
        self.weights = hashlib.sha256(seen.encode()).hexdigest()
        return metrics

    async def save(self, progress):
        kept = {"trained": list(self.trained), "weights": self.weights, "progress": progress.to_json()}
        await self.delay()
        assert not self.dead
        self.disk.append(json.dumps(kept))


def live(seed, life, disk, *, kill_after=None, stop_after=None, loop_class=Loop, **settings):
    """One life of a run, which may be killed or told to stop after some events."""
    world = Durable(seed, life, disk, **settings)
    loop = loop_class(
        config=world.config,
        rollouts=world,
        learner=world,
        prompts=stream(PROMPTS, seed),
        decode=str,
        tracker=world,
        evaluate=world.evaluate,
        score=world.score,
        progress=world.progress,
        save=world.save,
    )
    events = 0

    def event():
        nonlocal events
        events += 1
        if events == stop_after:
            asyncio.get_running_loop().create_task(loop.stop())
        if events == kill_after:
            world.dead = True
            raise KilledError

    run_seeded(loop.run(), f"{seed}/{life}", event)
    return world, loop, events


def lives(seed, **settings):
    """A run that is killed again and again, each time after a seeded number of events, and at last lives on. Also how
    often it was killed, and how often it could go on from a checkpoint."""
    r, disk, kills, resumed = random.Random(f"kills {seed}"), [], 0, 0
    for life in range(4):
        try:
            world, loop, _ = live(seed, life, disk, kill_after=r.randint(1, 30) if life < 3 else None, **settings)
            return world, loop, kills, resumed
        except KilledError:
            kills += 1
            resumed += bool(disk)
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_however_often_a_run_is_killed_no_prompt_is_lost_or_trained_twice(block):
    kills, resumed, ends = 0, 0, Counter()
    for seed in range(50 * block, 50 * (block + 1)):
        try:
            world, loop, *killed = lives(seed)
            check(world, loop)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        kills, resumed = kills + killed[0], resumed + killed[1]
        ends.update(loop.admission.ledger.summary())
        if world.config.late_groups == "wait" and not (world.mortality or world.broken):
            # In each life and over all of them, the stream was used in order and without a gap.
            assert sorted(world.trained) == list(range(len(world.trained)))
    assert kills > 60
    assert resumed > 12, "most were killed before their first checkpoint"
    assert ends["trained"] > 150


def test_a_run_ends_with_a_checkpoint_of_its_last_step_made_once():
    last_steps = set()
    for seed in range(30):
        world, loop, _ = live(seed, "whole", disk := [], max_staleness=0, faults=False)
        versions = [Progress.from_json(json.loads(kept)["progress"]).version for kept in disk]
        assert versions == sorted(set(versions))
        assert versions[-1] == loop.admission.version
        last_steps.add(loop.admission.version % world.config.save_every)
    assert last_steps > {0}, "some ended between two checkpoints"


@pytest.mark.slow
def test_without_staleness_a_killed_run_ends_as_the_run_that_was_not():
    resumptions = 0
    for seed in range(60):
        settings = {"max_staleness": 0, "faults": False}
        killed, _, _, n = lives(seed, **settings)
        whole, _, _ = live(seed, "whole", [], **settings)
        assert killed.trained == whole.trained
        assert killed.weights == whole.weights, f"seed {seed}: the same prompts, but other samples"
        resumptions += n
    assert resumptions > 15


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_what_it_has_and_goes_on_to_the_same_end():
    stopped, owed = 0, 0
    for seed in range(80):
        settings = {"max_staleness": 0, "faults": False, "eval_every": 2}
        disk = []
        after = random.Random(seed).randint(1, 40)
        first, loop, events = live(seed, 0, disk, stop_after=after, **settings)
        if events < after or loop.done:
            continue
        version = loop.admission.version
        assert version == (json.loads(disk[-1])["progress"]["version"] if disk else 0), "a finished step was not saved"
        assert first.trained == (json.loads(disk[-1])["trained"] if disk else []), "a step was cut in half"
        second, loop, _ = live(seed, 1, disk, **settings)
        whole, _, _ = live(seed, "whole", [], **settings)
        assert loop.done
        assert second.weights == whole.weights
        stopped += version > 0
        owed += second.progress.owes_evaluation
    assert stopped > 15
    assert owed > 1, "also in an evaluation"


def test_an_evaluation_that_was_given_up_is_made_when_the_run_goes_on():
    class Rows(Durable):
        def log(self, step, metrics):
            self.rows.append((step, metrics))

        async def evaluated(self):
            return {"eval/held/avg@1": 0.5}

    world = Rows(0, 0, [], faults=False, max_staleness=0)
    world.rows = []
    steps = world.config.steps
    ends = dict.fromkeys(range(steps * world.config.prompts_per_step), "trained")
    loop = Loop(
        config=world.config,
        rollouts=world,
        learner=world,
        prompts=stream(PROMPTS, 0),
        decode=str,
        tracker=world,
        evaluate=world.evaluate,
        progress=Progress(version=steps, ends=ends, owes_evaluation=True),
    )
    assert not loop.done
    asyncio.run(loop.run())
    assert loop.done
    assert [(step, row["eval/held/avg@1"]) for step, row in world.rows] == [(steps, 0.5)]


class Forgetful(Loop):
    """Goes on with the next new prompt: pending ones are lost."""

    def __post_init__(self):
        super().__post_init__()
        first = max([*self.progress.ends, *self.progress.pending], default=-1) + 1
        self.groups.prompts = (p for p in self.prompts if p.ordinal >= first)


class Repeating(Loop):
    """Begins the stream anew."""

    def __post_init__(self):
        self.progress = replace(self.progress, ends={}, pending=frozenset())
        super().__post_init__()


@pytest.mark.parametrize("faulty", [Forgetful, Repeating])
def test_the_kills_find_a_planted_fault(faulty):
    with pytest.raises((AssertionError, StallError, ValueError)):
        all(check(*lives(seed, loop_class=faulty)[:2]) is None for seed in range(100))


def ledger_of(states):
    ledger = Ledger()
    for ordinal, state in enumerate(states):
        ledger.admit(ordinal)
        ledger.states[ordinal] = state
        ledger.counts["admitted"] -= 1
        ledger.counts[state] += 1
    return ledger


def test_progress_survives_json_with_every_prompt_in_its_state():
    states = ["trained", "trained", "filtered(too_old)", "trained", "sampling", "failed(engine_lost)", "ready"]
    progress = progress_of(3, ledger_of(states), 77, False)
    plain = json.loads(json.dumps(progress.to_json()))
    assert plain["ledger"] == {
        "pending": [[4, 4], [6, 6]],
        "trained": [[0, 1], [3, 3]],
        "filtered(too_old)": [[2, 2]],
        "failed(engine_lost)": [[5, 5]],
    }
    back = Progress.from_json(plain)
    assert back == progress
    assert back.ledger().summary() == {"pending": 0, "trained": 3, "filtered(too_old)": 1, "failed(engine_lost)": 1}
    assert [p.ordinal for p, _ in zip(back.remaining(stream(PROMPTS, 0)), range(4), strict=False)] == [4, 6, 7, 8]


@pytest.mark.parametrize(
    ("ledger", "says"),
    [
        ({"pending": [[1, 1]], "trained": [[0, 1]]}, "prompt 1 is both pending and trained"),
        ({"pending": [[3, 3]], "trained": [[0, 1]]}, "prompt 2 is in no state"),
    ],
)
def test_a_ledger_that_cannot_be_is_refused(ledger, says):
    plain = {"version": 1, "trained_tokens": 0, "owes_evaluation": False, "ledger": ledger}
    with pytest.raises(ValueError, match=says):
        Progress.from_json(plain)


def test_no_checkpoint_is_made_of_a_step_that_is_under_way():
    with pytest.raises(AssertionError, match="under way"):
        progress_of(0, ledger_of(["training"]), 0, False)
