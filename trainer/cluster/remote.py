"""What the loop sees, over real processes: sampling spread over engines, agents' endpoints, verified weight updates."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.request import ProxyHandler, build_opener

from torch import Tensor

from rl.agents.record import Opening, Record
from rl.batch import collate, trajectory
from rl.episodes.seen import Seen
from rl.loop.speeds import Speeds
from rl.protocols import EngineLost, SyncReport, UpdateFailed
from rl.tokens import Rendering
from rl.types import Batch, Completion, PolicyOutput, Prompt
from rl.weights import WeightManifest, check_digests
from trainer.cluster.cluster import Cluster
from trainer.cluster.fleet import Fleet
from trainer.cluster.start_error import StartError

Asked = tuple[tuple[int, ...], int, int | None]  # a prompt's tokens, samples, seed
Span = tuple[str, float, float]
"""A phase of a rank, and when it began and ended: seconds since 1970."""

PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}
"""Mean |trainer - engine| in nats of the probe after a verified update; bf16 is noisy even against itself."""
PROBE_SAMPLES, PROBE_TOKENS = 4, 4
"""Samples of the probe, and tokens of each. Few decode steps, because each waits for the requests that run."""
REACH_S = 20.0
"""Seconds in which an engine must answer from where the agents run."""
UPDATE_RETRIES = 3
"""How often an update that every engine refused is sent again, over a new channel."""


class RemoteRollouts:
    """`rl.protocols.Rollouts` over the engines: each group goes to the engine with the fewest samples under way."""

    def __init__(self, cluster: Cluster, fleet: Fleet | None = None) -> None:
        self.cluster = cluster
        self.fleet = fleet or Fleet(cluster)
        self.load = self.fleet.load
        self.called: Callable[[int, int, float], None] = lambda engine, samples, began: None
        """Hears of each call of an engine when it ends, and when it began (seconds since 1970)."""
        self.speeds = Speeds(len(self.load))
        self.early: dict[Asked, list[Completion]] = {}
        """What the doctor has sampled of this run; each is given once."""

    async def sample(
        self,
        token_ids: list[int],
        n: int,
        *,
        seed: int | None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        engine: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Completion]:
        """n completions of one prompt. Raises EngineLost when the engine is gone before it answers."""
        asked = tuple(token_ids), n, seed
        if (temperature, max_tokens, tools) == (None, None, None) and asked in self.early:
            return self.early.pop(asked)
        serving = await self.fleet.serving()
        index = engine if engine in serving else min(serving, key=lambda i: self.load[i])
        restarts, tokens, began = self.fleet.restarts_of[index], 0, time.time()
        self.load[index] += n
        self.speeds.begin(index)
        try:
            deadline = self.cluster.config.deadlines.sample_s
            completions = await self.cluster.ask_engine(
                index, lambda e: e.sample(token_ids, n, seed, temperature, max_tokens, tools=tools), deadline_s=deadline
            )
            tokens = sum(len(completion.token_ids) for completion in completions)
            return [replace(completion, engine=index) for completion in completions]
        except EngineLost as error:
            self.fleet.mark_lost(index, restarts, str(error))
            raise
        finally:
            self.load[index] -= n
            self.speeds.end(index, tokens)
            self.called(index, n, began)

    def metrics(self) -> dict[str, float]:
        """Tokens per second of each engine since the last call; of a fleet that follows nodes, how many serve now."""
        return self.speeds.metrics() | ({"perf/engines": float(len(self.fleet.now()))} if self.fleet.elastic else {})

    def figures(self) -> list[dict[str, float]]:
        """Of each engine, also one that is not there now: samples under way, restarts, and 1 where it is lost."""
        fleet, now = self.fleet, self.fleet.now()
        return [
            {"samples": float(self.load[i]), "restarts": float(fleet.restarts_of[i]), "lost": float(i not in now)}
            for i in range(len(self.load))
        ]


class RemoteEndpoints:
    """`rl.agents.play.Endpoints` over the engines. An episode stays with one: its cache holds the history."""

    def __init__(self, rollouts: RemoteRollouts, rendering: Rendering) -> None:
        self.rollouts, self.rendering = rollouts, rendering
        self.restarts: dict[str, int] = {}
        """How often the engine of each open episode had been restarted when it was opened."""
        self.opened: dict[str, float] = {}
        self.reached: set[str] = set()
        """Addresses of engines that were reached from here."""

    async def open(self, opening: Opening) -> tuple[int, str]:
        """Serve an episode on the engine with the least work. Raises EngineLost."""
        load, fleet = self.rollouts.load, self.rollouts.fleet
        engine = min(await fleet.serving(), key=load.__getitem__)
        load[engine] += 1
        self.restarts[opening.secret], self.opened[opening.secret] = fleet.restarts_of[engine], time.time()
        try:
            ask, deadline = fleet.cluster.ask_engine, fleet.cluster.config.deadlines.sample_s
            address = await ask(engine, lambda e: e.open_episode(opening, self.rendering), deadline_s=deadline)
            if address.rpartition("/e/")[0] not in self.reached:
                await self._reach(engine, address)
            return engine, address
        except BaseException as error:
            self._left(engine, opening.secret, error)
            raise

    async def end(self, engine: int, secret: str) -> Record:
        """End it there. Raises EngineLost where that engine's process is gone, and with it what was sampled."""
        fleet, error = self.rollouts.fleet, None
        try:
            if fleet.restarts_of[engine] != self.restarts[secret]:
                raise EngineLost(f"engine {engine} was restarted while it served an episode")
            deadline = fleet.cluster.config.deadlines.sample_s
            return await fleet.cluster.ask_engine(engine, lambda e: e.end_episode(secret), deadline_s=deadline)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._left(engine, secret, error)

    async def _reach(self, engine: int, address: str) -> None:
        place = address.rpartition("/e/")[0]
        try:
            await asyncio.to_thread(reach, address)
        except OSError as error:
            # One that has just died is lost, and not out of reach.
            await self.rollouts.cluster.ask_engine(engine, lambda e: e.alive(), deadline_s=REACH_S)
            raise ValueError(
                f"engine {engine} serves agents at {place}, which this machine cannot reach ({error}): if it is on "
                'another node, set rollout.endpoint_host="0.0.0.0"'
            ) from error
        self.reached.add(place)

    def _left(self, engine: int, secret: str, error: BaseException | None) -> None:
        self.rollouts.load[engine] -= 1
        self.rollouts.called(engine, 1, self.opened.pop(secret))
        restarts = self.restarts.pop(secret)
        if isinstance(error, EngineLost):
            self.rollouts.fleet.mark_lost(engine, restarts, str(error))


class RemoteLearner:
    """`rl.protocols.Learner` over the ranks. `probe` is a prompt for checking engines after a verified update.

    `version` is the first that the engines get: 0, or where a checkpoint was.
    """

    def __init__(self, cluster: Cluster, *, probe: list[int], fleet: Fleet | None = None, version: int = 0) -> None:
        self.cluster = cluster
        self.fleet = fleet or Fleet(cluster)
        self.fleet.recover = self._recover
        self.probe = Prompt(ordinal=-1, token_ids=probe, task={})
        self.first = self.version = version
        self.published = asyncio.Lock()
        """Held from the start of a step to the end of its update: the learner's weights are not the published ones."""
        self.stepped = False
        """Whether a step holds it. An update without one, such as the first, takes it itself."""
        self.failed_updates = 0
        """Updates that every engine refused and that were sent again."""

    async def step(self, batch: Batch) -> dict[str, float]:
        """Train on one step's batch; all ranks return the same metrics. Only `publish` may follow."""
        await self.published.acquire()
        self.stepped = True
        if self.cluster.config.rollout.sleep:
            for error in await self.cluster.each_engine(lambda e: e.sleep()):
                if error and not isinstance(error, EngineLost):  # the update finds a lost one
                    raise error
        return (await self.cluster.ask_learners(lambda rank: rank.step(batch)))[0]

    async def told(self) -> list[tuple[Seen | None, list[Span]]]:
        """What the last step gave, of each rank."""
        return await self.cluster.ask_learners(lambda rank: rank.told())

    async def answer(self, batch: Batch) -> PolicyOutput:
        """The current policy's output for a batch: [B, T] each, on CPU; `values` is None without a critic."""
        return (await self.cluster.ask_learners(lambda rank: rank.answer(batch)))[0]

    async def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """The start model's log-probabilities [B, T] in nats, on CPU; None where the objective needs none."""
        return (await self.cluster.ask_learners(lambda rank: rank.reference_logprobs(batch)))[0]

    async def publish(self, version: int) -> SyncReport:
        """Send to all engines, each of which commits once all are ready. Verified for the start weights, the first
        update, and each `verify_every`."""
        if not self.stepped:
            await self.published.acquire()
        every = self.cluster.config.verify_every
        verify = version <= self.first + 1 or bool(every and version % every == 0)
        began, failed = time.perf_counter(), self.failed_updates
        manifest, pause, verify = await self._deliver(version, verify)
        seconds, self.version, self.stepped = time.perf_counter() - began, version, False
        if self.fleet.elastic:
            self.fleet.restarts = 0
        self.published.release()
        n, again = manifest.total_bytes(), self.failed_updates - failed
        return SyncReport(seconds=seconds, pause_seconds=pause, bytes=n, verified=verify, failed=again)

    async def _deliver(self, version: int, verify: bool) -> tuple[WeightManifest, float, bool]:
        """Send to every engine; returns manifest, pause in seconds, and whether the update was verified.

        Lost engines come back first, also those lost during the update; then it is always verified.
        """
        failures = 0
        while True:
            try:
                if self.fleet.lost:
                    verify = True
                    await self.fleet.revive()
                manifest, pause_seconds = await self.send(version, digesting=verify)
                if verify:
                    await self._verify(manifest)
            except StartError:
                raise
            except Exception as error:
                # When no engine is lost the error is one of its own, such as a tensor without a name.
                if await self.fleet.look_for_lost():
                    continue
                failures += isinstance(error, UpdateFailed)
                if not isinstance(error, UpdateFailed) or failures > UPDATE_RETRIES:
                    raise
                self.failed_updates += 1
                await self.cluster.open_channel()
            else:
                await self.fleet.mark_serving()
                return manifest, pause_seconds, verify

    async def _recover(self) -> None:
        """Bring back lost engines between two updates, with the published weights."""
        async with self.published:
            while self.fleet.lost:
                await self._deliver(self.version, True)

    async def send(self, version: int, *, digesting: bool) -> tuple[WeightManifest, float]:
        """Send the current weights to every engine; returns what was sent and the longest pause in seconds."""
        cluster = self.cluster
        await cluster.ask_engines(lambda e: e.listen_to_weights(digesting))
        deadline = cluster.config.deadlines.sync_s
        manifests = await cluster.ask_learners(lambda rank: rank.publish(version, digesting), deadline_s=deadline)
        if cluster.config.rollout.sleep:
            await cluster.ask_learners(lambda rank: rank.free_cache())
            await cluster.ask_engines(lambda e: e.wake())
        return manifests[0], max(await cluster.ask_engines(lambda e: e.last_pause()))

    async def _verify(self, manifest: WeightManifest) -> None:
        """Check that every tensor arrived bit for bit, and that each engine computes what the trainer computes.

        Digests show what arrived, not what packing on CPU made of it; the probe shows that, within PROBE_TOLERANCE.
        """
        cluster, config = self.cluster, self.cluster.config
        received = await cluster.ask_engines(lambda e: e.received_digests())
        for index, workers in zip(cluster.engines, received, strict=True):
            for digests in workers:
                check_digests(manifest.digests, digests, f"engine {index}")
        for index in cluster.engines:
            # It waits behind running requests, so it has their deadline.
            sampled = await cluster.ask_engine(
                index,
                lambda e: e.sample(self.probe.token_ids, PROBE_SAMPLES, 0, max_tokens=PROBE_TOKENS),
                deadline_s=config.deadlines.sample_s,
            )
            batch = collate([trajectory(self.probe, one, 0.0, {}) for one in sampled])
            trainer = (await cluster.ask_learners(lambda rank, batch=batch: rank.logprobs(batch)))[0]
            gap = float((trainer - batch.rollout_logprobs)[batch.mask].abs().mean())
            limit = PROBE_TOLERANCE[config.dtype]
            if not gap <= limit:
                raise RuntimeError(
                    f"after update {manifest.version}, engine {index} and the trainer disagree by {gap:.2e} nats on "
                    f"average about the engine's own tokens (limit {limit:g}), although every tensor arrived: the "
                    "engine did not load what it received"
                )


def reach(address: str) -> None:
    """Ask an episode's address for its models, without a proxy. Raises OSError."""
    build_opener(ProxyHandler({})).open(f"{address}/v1/models", timeout=REACH_S).close()
