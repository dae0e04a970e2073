"""The loop, driven by fakes of its protocols: staleness, the ledger, and errors that reach the user as themselves."""

import asyncio
import math
import time
from collections import Counter
from dataclasses import replace
from threading import Barrier

import pytest

from log import Log
from rl.config import Config, Deadlines, RolloutConfig
from rl.filters import Difficulty, ZeroAdvantage
from rl.loop.loop import Loop
from rl.loop.progress import Progress
from rl.loop.stream import stream
from rl.protocols import EngineLost, StallError, SyncReport
from rl.rewards.score import RewardError, score, score_in_time
from rl.types import Completion, Data, Prompt

PROMPTS = [Prompt(ordinal=i, token_ids=[i], task={"index": i}) for i in range(5)]


class Engines:
    """Samples one group after the other, a token per turn of the event loop; stamps the version of that moment."""

    def __init__(self, tokens=3, broken=()):
        self.tokens, self.broken = tokens, set(broken)
        self.version, self.learning, self.sampled_while_learning, self.calls = 0, False, 0, 0
        self.one_at_a_time = asyncio.Lock()

    async def sample(self, token_ids, n, *, seed, temperature=None):
        call = self.calls
        self.calls += 1
        async with self.one_at_a_time:
            versions = []
            for _ in range(self.tokens):
                versions.append(self.version)
                self.sampled_while_learning += self.learning
                await asyncio.sleep(0)
        logprob = math.nan if call in self.broken else -1.0
        logprobs = [-1.0] * (self.tokens - 1) + [logprob]
        return [
            Completion(token_ids=[7] * self.tokens, logprobs=logprobs, versions=versions, finish_reason="stop")
            for _ in range(n)
        ]


class Trainer:
    """Learns for some turns of the event loop; remembers the batches, and how old their oldest token was."""

    def __init__(self, engines, turns=20, dies_at=None):
        self.engines, self.turns, self.dies_at = engines, turns, dies_at
        self.batches, self.ages, self.published = [], [], []

    overlaps = False

    async def step(self, batch):
        self.batches.append(batch)
        self.ages.append(self.engines.version - int(batch.versions[batch.mask].min()))
        if len(self.batches) == self.dies_at:
            raise FloatingPointError("the gradient norm is nan")
        self.engines.learning = True
        for _ in range(self.turns):
            await asyncio.sleep(0)
        # A test of the overlap waits for it: the rewards' threads take time, in which nothing may be sampled.
        waited = 0
        while self.overlaps and not self.engines.sampled_while_learning and waited < 500:
            await asyncio.sleep(0.01)
            waited += 1
        self.engines.learning = False
        return {"actor/grad_norm": 1.0}

    async def publish(self, version):
        await asyncio.sleep(0)
        self.engines.version = version
        self.published.append(version)
        return SyncReport(seconds=0.0, pause_seconds=0.0, bytes=0, verified=True)


async def at_once(reward, asked, ordinal, deadline_s):
    """Steps and replies take turns of the event loop here, so rewards do too: a thread of their own would be as late as
    the machine is busy, and their groups too old."""
    return score(reward, asked, ordinal)


def loop_of(engines, trainer, *, reward=lambda _: 1.0, score=at_once, set_aside=None, **settings):
    hooks = {name: settings.pop(name) for name in ("evaluate", "keep", "save", "progress") if name in settings}
    config = Config(
        **({"name": "t", "model": "m", "data": lambda: Data(train=[]), "reward": reward, "steps": 6} | settings),
        prompts_per_step=2,
        group_size=2,
    )

    def on_samples(step, trajectories):
        if step < 0 and set_aside is not None:
            set_aside.extend(trajectories)

    return Loop(
        config=config,
        rollouts=engines,
        learner=trainer,
        prompts=stream(PROMPTS, 0),
        decode=lambda ids: " ".join(map(str, ids)),
        tracker=Log(),
        score=score,
        on_samples=on_samples,
        **hooks,
    )


def run(loop):
    asyncio.run(asyncio.wait_for(loop.run(), 20))
    return loop


def balanced(loop):
    """Every ordinal that left the stream is in exactly one state, and the counts say the same."""
    ledger = loop.admission.ledger
    assert sorted(ledger.states) == list(range(len(ledger.states)))
    assert +ledger.counts == Counter(ledger.states.values())
    return {state: n for state, n in ledger.summary().items() if n}


def test_without_staleness_every_sample_is_from_the_policy_that_learns():
    engines = Engines()
    trainer = Trainer(engines)
    loop = run(loop_of(engines, trainer, max_staleness=0))
    assert trainer.ages == [0] * 6
    assert [row["staleness/max"] for row in loop.tracker.rows] == [0.0] * 6
    assert engines.sampled_while_learning == 0
    assert trainer.published == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("bound", [1, 3])
@pytest.mark.parametrize("tokens", [1, 4, 30])
def test_sampling_overlaps_learning_within_the_staleness_bound(bound, tokens):
    engines = Engines(tokens=tokens)
    trainer = Trainer(engines)
    trainer.overlaps = True
    loop = run(loop_of(engines, trainer, max_staleness=bound, steps=12))
    assert engines.sampled_while_learning > 0
    assert 0 < max(trainer.ages) <= bound
    assert [row["staleness/max"] for row in loop.tracker.rows] == trainer.ages


def test_fast_engines_use_the_whole_bound():
    engines = Engines(tokens=1)
    trainer = Trainer(engines, turns=200)
    run(loop_of(engines, trainer, max_staleness=3, steps=10))
    assert max(trainer.ages) == 3


@pytest.mark.parametrize("bound", [0, 2])
def test_every_prompt_ends_in_exactly_one_state(bound):
    engines = Engines()
    trainer = Trainer(engines)
    loop = run(loop_of(engines, trainer, max_staleness=bound))
    assert balanced(loop) == {"trained": 12}
    trained = [int(g) for batch in trainer.batches for g in batch.group_ids.unique()]
    assert sorted(trained) == [o for o, state in loop.admission.ledger.states.items() if state == "trained"]
    assert all(len(batch.rewards) == 4 for batch in trainer.batches)
    assert loop.trained_tokens == 12 * 2 * 3
    assert loop.tracker.rows[-1]["ledger/trained"] == 12.0


def test_rewards_reach_the_batch_of_their_own_prompt():
    engines = Engines()
    trainer = Trainer(engines)
    run(loop_of(engines, trainer, reward=lambda reply: {"index": reply.task["index"], "bonus": 0.5}))
    for batch in trainer.batches:
        # Right-padded one-token prompts: the first token names the prompt.
        assert batch.rewards.tolist() == [ids[0] + 0.5 for ids in batch.input_ids.tolist()]


def test_a_part_that_only_some_replies_have_is_averaged_over_those():
    engines = Engines()
    parts = {0: {"right": 1.0, "short": 0.5}}
    loop = run(loop_of(engines, Trainer(engines), reward=lambda reply: parts.get(reply.task["index"], {"right": 0.0})))
    assert {row["reward/short/mean"] for row in loop.tracker.rows if "reward/short/mean" in row} == {0.5}
    assert all("reward/right/mean" in row for row in loop.tracker.rows)


def test_a_reward_that_raises_ends_the_run_and_names_its_prompt():
    def reward(reply):
        if reply.task["index"] == 3:
            raise KeyError("answer")
        return 1.0

    engines = Engines()
    trainer = Trainer(engines)
    loop = loop_of(engines, trainer, reward=reward)
    with pytest.raises(RewardError, match=r"reward of prompt \d+ \(task \{'index': 3\}.*raised KeyError: 'answer'"):
        run(loop)
    assert all((batch.rewards == 1).all() for batch in trainer.batches), "an error must never become a reward of 0"
    assert balanced(loop)["pending"] >= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "1", {"a": 1.0, "b": math.nan}, {"a": None}, {}])
def test_a_reward_that_is_no_number_ends_the_run(bad):
    engines = Engines()
    trainer = Trainer(engines)
    with pytest.raises(RewardError, match=r"reward of prompt \d+ .*(return a finite float|raised)"):
        run(loop_of(engines, trainer, reward=lambda reply: bad))
    assert trainer.batches == []


def test_a_slow_reward_meets_its_deadline():
    engines = Engines()
    slow, deadlines = (lambda reply: time.sleep(0.4)), Deadlines(reward_s=0.05)
    loop = loop_of(engines, Trainer(engines), reward=slow, score=score_in_time, deadlines=deadlines)
    with pytest.raises(RewardError, match=r"reward of prompt \d+ took longer than 0\.05 s.*`deadlines\.reward_s`"):
        run(loop)


@pytest.mark.parametrize("bound", [0, 2])
def test_a_group_with_nan_logprobs_is_set_aside_and_replaced(bound):
    engines = Engines(broken={1, 4})
    trainer, set_aside = Trainer(engines), []
    loop = run(loop_of(engines, trainer, set_aside=set_aside, max_staleness=bound))
    assert balanced(loop) == {"trained": 12, "filtered(nonfinite_logprobs)": 2}
    filtered = {o for o, state in loop.admission.ledger.states.items() if state.startswith("filtered")}
    assert {t.group for t in set_aside} == filtered
    assert all(math.isnan(t.logprobs[-1]) for t in set_aside), "kept as it came, for inspection"
    assert all(batch.rollout_logprobs.isfinite().all() for batch in trainer.batches)
    assert max(trainer.ages) <= bound


def test_engines_that_say_nothing_but_nan_end_the_run_and_it_says_so():
    engines = Engines(broken=range(1000))
    trainer = Trainer(engines)
    with pytest.raises(StallError, match=r"^7 groups since the last step have log-probabilities that are NaN or inf"):
        run(loop_of(engines, trainer, max_filtered=3))
    assert trainer.batches == []


def test_a_group_of_which_a_reply_was_aborted_is_sampled_again():
    class Aborting(Engines):
        async def sample(self, token_ids, n, *, seed, temperature=None):
            call, said = self.calls, await super().sample(token_ids, n, seed=seed)
            return [*said[1:], replace(said[0], finish_reason="abort")] if call in (1, 4) else said

    engines, ends = Aborting(), set()
    loop = run(loop_of(engines, Trainer(engines), reward=lambda reply: float(ends.add(reply.finished) or 1.0)))
    assert balanced(loop) == {"trained": 12}
    assert ends == {True}


def test_the_replies_of_a_group_are_scored_at_the_same_time():
    meet = Barrier(2, timeout=10)  # of two threads, the replies of one group

    def reward(reply):
        meet.wait()
        return 1.0

    engines = Engines()
    loop = loop_of(engines, Trainer(engines), reward=reward, score=score_in_time, steps=1)
    assert balanced(run(loop))["trained"] == 2


def odd_prompts_tell_replies_apart():
    """A reward by which only the odd prompts' groups hold two rewards."""
    given = Counter()

    def reward(reply):
        index = reply.task["index"]
        given[index] += 1
        return float(index % 2 and given[index] % 2)

    return reward


@pytest.mark.parametrize("bound", [0, 2])
def test_a_filtered_group_is_counted_with_its_reason_and_replaced(bound):
    engines = Engines()
    trainer = Trainer(engines)
    reward = odd_prompts_tell_replies_apart()
    loop = run(loop_of(engines, trainer, reward=reward, filters=(ZeroAdvantage(),), max_staleness=bound))
    states = balanced(loop)
    assert states["trained"] == 12
    assert states["filtered(zero_advantage)"] >= 12, "three of five prompts are even"
    for batch in trainer.batches:
        for group in batch.group_ids.unique():
            assert batch.rewards[batch.group_ids == group].tolist() in ([1.0, 0.0], [0.0, 1.0])
    assert max(trainer.ages) <= bound
    for row in loop.tracker.rows:
        assert row["reward/frac_zero_std"] == 0.0
    # All groups count in the mean that does not hide what was filtered: 0.5 of those kept, 0 of the others.
    first = loop.tracker.rows[0]
    if bound == 0:
        assert first["filter/reward_mean"] == pytest.approx(0.5 * (1 - first["filter/taken_frac"]))
    assert 0 < sum(row["filter/taken_frac"] for row in loop.tracker.rows) / 6 < 1


def test_filters_that_take_everything_end_the_run_and_say_why():
    engines = Engines()
    trainer = Trainer(engines)
    filters = (Difficulty(high=0.9), ZeroAdvantage())
    loop = loop_of(engines, trainer, filters=filters, max_filtered=3)
    with pytest.raises(
        StallError,
        match=r"the filters took 7 groups.*\{'filtered\(too_easy\)': 7\}.*mean reward 1: .*raise `max_filtered`",
    ):
        run(loop)
    assert trainer.batches == []
    # One that was being settled when the seventh ended the run may be among them.
    assert balanced(loop)["filtered(too_easy)"] in (7, 8)


def test_a_run_without_filters_has_no_filter_metrics():
    engines = Engines()
    loop = run(loop_of(engines, Trainer(engines)))
    assert not [name for row in loop.tracker.rows for name in row if name.startswith("filter/")]


def test_engines_that_never_answer_stall_the_run_with_a_message():
    class Silent(Engines):
        async def sample(self, token_ids, n, *, seed, temperature=None):
            await asyncio.Event().wait()

    engines = Silent()
    loop = loop_of(engines, Trainer(engines), deadlines=Deadlines(sample_s=0.05))
    with pytest.raises(
        StallError, match=r"step 1 waited 0\.05 s for one more group: 0 of 2 groups are ready, 2 are being"
    ):
        run(loop)


def test_a_dying_learner_ends_the_run_with_its_own_exception():
    engines = Engines()
    trainer = Trainer(engines, dies_at=3)
    loop = loop_of(engines, trainer, max_staleness=1)
    with pytest.raises(FloatingPointError, match="the gradient norm is nan"):
        run(loop)
    assert balanced(loop)["trained"] == 4, "the step that died trained nobody"


def test_a_dying_engine_ends_the_run_with_its_own_exception():
    class Dying(Engines):
        async def sample(self, token_ids, n, *, seed, temperature=None):
            if self.calls == 5:
                raise ConnectionError("engine 1 is gone")
            return await super().sample(token_ids, n, seed=seed)

    engines = Dying()
    with pytest.raises(ConnectionError, match="engine 1 is gone"):
        run(loop_of(engines, Trainer(engines), max_staleness=1))


def test_evaluation_happens_between_steps_and_is_logged_with_its_step():
    kept = []

    async def measured():
        return {"eval/held/avg@1": float(engines.version)}

    async def keep(step, metrics):
        kept.append((step, metrics, engines.version))

    engines = Engines()
    due = lambda step: measured() if step in (2, 3, 6) else None  # noqa: E731
    loop = run(loop_of(engines, Trainer(engines), evaluate=due, keep=keep))
    logged = {row["step"]: row["eval/held/avg@1"] for row in loop.tracker.rows if "eval/held/avg@1" in row}
    assert logged == {2: 2.0, 3: 3.0, 6: 6.0}
    found = [(step, metrics["eval/held/avg@1"], version) for step, metrics, version in kept]
    assert found == [(step, float(step), step) for step in (2, 3, 6)], "of the model that has them"


class OneSlow(Engines):
    """The first group answers only when the engines hold version 1, and all others have long answered."""

    def __init__(self, turns):
        super().__init__()
        self.turns, self.cancelled = turns, False

    async def sample(self, token_ids, n, *, seed, temperature=None):
        first = self.calls == 0
        completions = await super().sample(token_ids, n, seed=seed, temperature=temperature)
        try:
            while first and self.version < 1:
                await asyncio.sleep(0)
            for _ in range(self.turns if first else 0):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return completions


def test_a_straggler_that_became_too_old_is_dropped_and_counted_and_no_step_waits():
    engines = OneSlow(turns=100_000)
    trainer = Trainer(engines, turns=3)
    loop = run(loop_of(engines, trainer, max_staleness=1, steps=8))
    assert balanced(loop) == {"trained": 16, "filtered(too_old)": 1}
    assert loop.admission.ledger.states[0] == "filtered(too_old)"
    assert engines.cancelled, "the engines go on with other work"
    assert max(trainer.ages) <= 1


def test_a_group_whose_engine_was_lost_is_sampled_again():
    class Flaky(Engines):
        async def sample(self, token_ids, n, *, seed, temperature=None):
            if self.calls in (1, 2, 5):
                self.calls += 1
                raise EngineLost("engine 0 is gone")
            return await super().sample(token_ids, n, seed=seed)

    engines = Flaky()
    trainer = Trainer(engines)
    assert balanced(run(loop_of(engines, trainer, max_staleness=1))) == {"trained": 12}
    assert max(trainer.ages) <= 1


def test_a_group_whose_engines_are_lost_too_often_counts_as_failed():
    class Cursed(Engines):
        async def sample(self, token_ids, n, *, seed, temperature=None):
            if token_ids == PROMPTS[3].token_ids:
                raise EngineLost("engine 0 is gone")
            return await super().sample(token_ids, n, seed=seed)

    engines = Cursed()
    loop = run(loop_of(engines, Trainer(engines), rollout=RolloutConfig(retries=2)))
    states = balanced(loop)
    assert states["trained"] == 12
    assert states["failed(engine_lost)"] >= 2


def test_a_step_may_wait_for_a_straggler_and_then_waits_until_it_is_as_old_as_the_bound_allows():
    engines = OneSlow(turns=300)
    trainer = Trainer(engines, turns=3)
    loop = run(loop_of(engines, trainer, max_staleness=1, steps=8, late_groups="wait"))
    # Step 1 went on without it, and step 2 waited for it: one version old, never two.
    assert 0 not in trainer.batches[0].group_ids
    assert 0 in trainer.batches[1].group_ids
    assert max(trainer.ages) == 1
    assert balanced(loop) == {"trained": 16}


def test_the_first_groups_are_sampled_beside_the_start_models_evaluation_and_none_is_trained_before_it_ends():
    engines, seen = Engines(), []
    trainer = Trainer(engines)

    async def evaluation(step):
        while engines.calls < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        seen.append((step, len(trainer.batches)))
        return {"eval/test/mean": 0.5}

    evaluate = lambda step: None if step else evaluation(step)  # noqa: E731
    loop = run(loop_of(engines, trainer, max_staleness=0, evaluate=evaluate, progress=Progress(owes_evaluation=True)))
    assert loop.done
    assert seen == [(0, 0)]
    assert loop.tracker.rows[0]["eval/test/mean"] == 0.5
    assert "timing_s/evaluate" in loop.tracker.rows[0]


def test_the_seconds_of_all_rows_add_up_to_those_of_the_run(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        clock[0] += seconds

    async def evaluation(step):
        takes(7.0)
        return {"eval/test/mean": 0.5}

    async def save(progress):
        takes(3.0)

    async def step(batch):
        takes(5.0)
        return {}

    engines = Engines()
    trainer = Trainer(engines)
    monkeypatch.setattr(trainer, "step", step)
    evaluate = lambda step: evaluation(step) if step % 2 == 0 else None  # noqa: E731
    loop = loop_of(engines, trainer, max_staleness=0, evaluate=evaluate, save=save, save_every=2, eval_every=2)
    log = loop.tracker.log
    monkeypatch.setattr(loop.tracker, "log", lambda *row: (takes(0.25), log(*row)))
    began = clock[0]
    run(loop)
    rows = loop.tracker.rows
    parts = ("timing_s/step", "timing_s/evaluate", "timing_s/between_steps")
    accounted = sum(row.get(part, 0.0) for row in rows for part in parts)
    assert [row.get("timing_s/evaluate") for row in rows] == [None, 7.0, None, 7.0, None, 7.0]
    assert [row["timing_s/between_steps"] for row in rows] == [0.0, 0.25, 3.25, 0.25, 3.25, 0.25]
    last_log_and_save = 3.25
    assert accounted + last_log_and_save == clock[0] - began
