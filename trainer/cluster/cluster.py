"""The actors of one run: start engines and learner ranks, call them, connect them, end them."""

import asyncio
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rl import checkout
from rl.config import Config
from rl.errors import first_error
from rl.protocols import EngineLost
from rl.weights import check_complete
from rollout.settings import engine_env
from trainer import machine
from trainer.cluster.actors import engine_process, learner_process
from trainer.cluster.calls import answer, gather_answers, started
from trainer.cluster.engine_client import EngineClient
from trainer.cluster.nodes.code import pinned
from trainer.cluster.nodes.folder import answer_word, judge, write_word
from trainer.cluster.nodes.gcs import drained_nodes
from trainer.cluster.nodes.seats import in_order, own_node, own_seat
from trainer.cluster.placement import Placement, check_shared, engine_threads, learner_threads
from trainer.cluster.process_env import learner_env, memory_kept, python_path, travelling, without_functions
from trainer.cluster.ray_session import log_folder, start_ray
from trainer.cluster.reward_models import RewardModels
from trainer.cluster.stubs import AskEngine, AskLearner, EngineProcess, LearnerProcess, recorded

R = TypeVar("R")
LEARNER = "trainer.learner.learner:Learner"
"""What a learner's process hosts."""


class Cluster:
    """The actors of one run."""

    def __init__(self, config: Config, placement: Placement) -> None:
        self.config, self.placement = config, placement
        self.engines: dict[int, EngineProcess] = {}
        self.starting: dict[int, EngineProcess] = {}
        """Further ones, until the fleet takes them in."""
        self.building: list[Any] = []
        self.learners: list[LearnerProcess] = []
        self.reward_models = RewardModels(config)
        self.address = ""
        """Where learner rank 0 is found, by the other ranks and by the engines."""
        self.group: Any = None
        """The GPUs that are reserved for the actors."""
        self.started_ray = False
        self.model, self.revision = config.model, None
        """On a cluster: what every node takes, and the commit of a hub's model, "" for a folder."""
        self.logs = ""
        """Folder of the actors' output."""
        self.answered: dict[tuple[int, str], float] = {}
        """When an engine last answered a call of a method, on the event loop's clock."""

    def boot(self) -> None:
        """Start Ray, the actors' processes and the engines in them, which take longest. Waits for none of them."""
        c, p = self.config, self.placement
        self.started_ray = start_ray(p)
        self.logs = log_folder()
        self.sources = checkout.digest()
        if not self.started_ray:
            self.model, self.revision = pinned(c.model)
        options = self._actor_options()
        # Of Ray that was there before, the workers know neither this process's modules nor its settings.
        there = {"PYTHONPATH": python_path()} | memory_kept(p.device) | travelling(os.environ)
        # What LD_PRELOAD loads reads its settings before an actor can set them itself.
        by_ray = not self.started_ray or "LD_PRELOAD" in os.environ
        where: dict[str, Any] = {"runtime_env": {"env_vars": there}} if by_ray else {}
        more = where | {"max_concurrency": 4096}
        cores = machine.cores()
        self.engine_env = engine_env(device=p.device, backend=p.backend, threads=engine_threads(c, cores))
        self.learner_threads = learner_threads(c, cores)
        # What starts later takes what is free then.
        later = {"num_cpus": 1, "num_gpus": p.gpus_per_engine}
        self.engine_options = [
            one | more for one in [*options[: p.engines], *([later] * (c.rollout.most_engines - p.engines))]
        ]
        # The ranks first: an engine that had taken the driver's last CPU would keep rank 0 from its node.
        env = learner_env(self.learner_threads, p.device)
        self.learners += [learner_process(one | where, env) for one in options[p.engines : p.engines + p.learners]]
        booted = [self._boot_engine(index) for index in range(p.engines)]
        self.engines = {index: engine for index, (engine, _) in enumerate(booted)}
        self.building = [building for _, building in booted]
        # One thread: a reward model computes while engines and ranks do.
        env = engine_env(device=p.device, backend=p.backend, threads=1)
        self.reward_models.boot([one | more for one in options[p.engines + p.learners :]], env, self.sources, p.device)

    def _boot_engine(self, index: int) -> tuple[EngineProcess, Any]:
        engine = engine_process(self.engine_options[index], self.engine_env)
        settings = self._common() | {"backend": self.placement.backend}
        if not self.placement.learners:
            # Nobody will send weights: the engine reads the model's own.
            settings |= {"version": 0, "overrides": {"load_format": "auto"}}
        return engine, engine.build(self.config.rollout.engine_class, self.sources, settings)

    async def restart_engine(self, index: int) -> None:
        """Replace the process of an engine. The new one holds no weights, and no channel leads to it yet."""
        self.engines[index].kill()
        if self.placement.backend == "ipc":
            # vLLM wants its share of the GPU free, and torch keeps what the learner has freed.
            await self.ask_learners(lambda rank: rank.free_cache())
        self.engines[index], building = self._boot_engine(index)
        await started(f"engine {index}", building, self.config.deadlines.start_s)
        await self.ask_engine(index, lambda e: e.start(), deadline_s=self.config.deadlines.sync_s)

    async def drained_engines(self) -> set[int]:
        """Engines whose node is asked to leave the cluster."""
        drained, found = await asyncio.to_thread(drained_nodes), set[int]()
        for index, engine in list(self.engines.items()) if drained else []:
            with suppress(RayError):  # whoever samples finds that it is lost
                found |= {index} if (await engine.gpus())[0] in drained else set()
        return found

    async def start_engine(self, index: int) -> None:
        """Start another engine once a node has room for it. No channel leads to it yet."""
        engine, building = self._boot_engine(index)
        self.starting[index] = engine
        waits, late = self.config.deadlines, f"the driver waited {{s}} s for engine {index} to start"
        try:
            await answer(engine.gpus(), late, math.inf)
            await started(f"engine {index}", building, waits.start_s)
            await answer(engine.ask(lambda e: e.start()), late, waits.sync_s, engine)
        except BaseException:
            if self.starting.pop(index, None):
                engine.kill()
            raise

    def _common(self) -> dict[str, Any]:
        """What engines and ranks are built from alike."""
        pin = {"revision": self.revision} if self.revision is not None else {}
        return {"config": without_functions(self.config), "model": self.model, "device": self.placement.device} | pin

    async def start(self, folder: Path | None = None, idle: Callable[[], None] = lambda: None) -> None:
        """Build every rank, wait for the engines, and open the weight channel between them.

        `idle` is called when a rank is built, and so has a core to spare until the engines are. On a cluster the ranks
        are first numbered by node and device, and must see the run's folder. Raises ValueError.
        """
        deadline, p = self.config.deadlines.start_s, self.placement
        if self.group is not None:
            late = f"the driver waited {{s}} s for {p.gpus:g} free GPUs, see `ray status`"
            await answer(self.group.ready(), late, deadline)
        port = 0
        if not self.started_ray:
            await self._take_seats(folder)
        if self.learners:
            late = "the driver waited {s} s for the process of learner rank 0 to start"
            address, port = await answer(self.learners[0].listen(), late, deadline)
            self.address = "127.0.0.1" if self.started_ray else address
        rank = self._common() | {"address": self.address, "port": port, "threads": self.learner_threads}
        try:
            async with asyncio.TaskGroup() as building:
                engines = [started(f"engine {i}", ref, deadline) for i, ref in enumerate(self.building)]
                engines = [building.create_task(engine) for engine in engines]
                building.create_task(self.reward_models.start())
                if p.backend != "gloo":
                    # While the engines start there is time to import DeepSpeed, and vLLM for this side of the channel.
                    for learner in self.learners:
                        for module in (LEARNER.split(":")[0], "rollout.weights.vllm_sender"):
                            learner.preload(module)
                if p.backend == "ipc":
                    # vLLM measures how much of the GPU is free, so nothing else may allocate meanwhile.
                    await asyncio.wait(engines)
                    if self.config.rollout.sleep:
                        await self.ask_engines(lambda e: e.sleep())
                for i, learner in enumerate(self.learners):
                    ref = learner.build(LEARNER, self.sources, rank | {"rank": i})
                    making = building.create_task(started(f"learner rank {i}", ref, deadline))
                    making.add_done_callback(lambda _: idle())
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        await self.ask_engines(lambda e: e.start())
        await self.open_channel()

    async def _take_seats(self, folder: Path | None) -> None:
        deadline, driver = self.config.deadlines.start_s, ray.get_runtime_context().get_node_id()
        late = "the driver waited {s} s for the process of learner rank {i} to start"
        seats = await gather_answers([one.run(own_seat) for one in self.learners], late, deadline, self.learners)
        self.learners = [self.learners[i] for i in in_order(seats, driver, self.placement.sequence_parallel)]
        if folder is None:
            return
        word = write_word(folder)
        asked = [one.run(answer_word, str(folder.resolve()), i) for i, one in enumerate(self.learners)]
        answers = await gather_answers(asked, late.replace("to start", "to read the run's folder"), 60, self.learners)
        if wrong := [text for text in judge(folder.resolve(), word, answers) if text]:
            raise ValueError(wrong[0])

    def _actor_options(self) -> list[dict[str, Any]]:
        p = self.placement
        if p.device == "cpu":
            options: list[dict[str, Any]] = [{"num_cpus": 1}] * p.actors
            if p.learners and not self.started_ray:
                near = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
                options[p.engines] = {"num_cpus": 1, "scheduling_strategy": near}
            return options
        gpus = [p.gpus_per_engine] * p.engines + [p.gpus_per_learner] * p.learners + [1.0] * p.reward_models
        # A bundle lies on one node: an engine's GPUs are one, those of ranks that share rows, and a shared GPU.
        bundles = [{"GPU": n, "CPU": float(p.seats.count(i))} for i, n in enumerate(p.units)]
        if p.learners and not self.started_ray and (here := own_node(p.sequence_parallel)):
            # Rank 0 writes checkpoints and the model, next to what the driver writes.
            bundles[p.seats[p.engines]][here] = 0.001
        self.group = group = placement_group(bundles, strategy="PACK")
        return [
            {"num_cpus": 1, "num_gpus": n, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, i)}
            for n, i in zip(gpus, p.seats, strict=True)
        ]

    async def open_channel(self) -> None:
        """Open the weight channel from the ranks to all engines; a second one replaces the first.

        Without ranks there is none.
        """
        if not self.learners:
            return
        c, p = self.config, self.placement
        names = (await self.ask_learners(lambda rank: rank.names()))[0]
        asked = await self.ask_engines(lambda e: e.expected_weights(names))
        for index, expected in zip(self.engines, asked, strict=True):
            check_complete(names, expected, f"engine {index}")
        if p.backend == "ipc":
            check_shared(*[[await one.gpus() for one in side] for side in (self.engines.values(), self.learners)])
        client = EngineClient(self.engines, c.rollout.tensor_parallel, c.deadlines.sync_s, patient=p.backend == "ipc")
        channel = {
            "backend": p.backend,
            "expected": names,
            "address": self.address,
            "world_size": 1 + len(self.engines) * c.rollout.tensor_parallel,
            "timeout_s": c.deadlines.sync_s,
        }
        await gather_answers(
            [rank.connect(client, channel) for rank in self.learners],
            "the driver waited {s} s for learner rank {i} to open the weight channel",
            c.deadlines.start_s,
            self.learners,
        )

    async def aclose(self) -> None:
        """End every actor, and Ray if this run started it. Safe at any moment, also twice. Its steps are bounded, and
        it never suspends, so no signal can interrupt it and leave processes behind."""
        scorers, self.reward_models.engines = self.reward_models.close(), []
        closing: list[Any] = [engine.ask(lambda e: e.close()) for engine in self.engines.values()]
        if closing := closing + [scorer.ask(lambda s: s.close()) for scorer in scorers]:
            ray.wait(closing, num_returns=len(closing), timeout=15)
        for process in [*self.engines.values(), *self.starting.values(), *self.learners, *scorers]:
            process.kill()
        self.engines, self.starting, self.learners = {}, {}, []
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None
        if self.started_ray:
            ray.shutdown()
            self.started_ray = False

    async def ask_engine(self, index: int, ask: AskEngine[R], *, deadline_s: float) -> R:
        """Call one engine; StallError when it is late, EngineLost when its process is gone.

        It is late when it has answered no call of this method for so long: of many calls, the last ones wait for the
        first ones.
        """
        ref, call = self.engines[index].ask(ask), (index, recorded(ask).method)
        try:
            late = f"the driver waited {{s}} s for engine {index} to {call[1]}"
            result = await answer(
                ref, late, deadline_s, self.engines[index], progress=lambda: self.answered.get(call, 0.0)
            )
            self.answered[call] = asyncio.get_running_loop().time()
            return result
        except (RayActorError, ObjectLostError) as error:  # the second where its node is lost with a large answer
            raise EngineLost(f"the process of engine {index} is gone ({str(error).splitlines()[0]})") from None
        except asyncio.CancelledError:
            # The engine has other work: vLLM ends the requests of a cancelled call.
            ray.cancel(ref)
            raise

    async def ask_engines(self, ask: AskEngine[R], *, deadline_s: float | None = None) -> list[R]:
        """Call every engine; StallError names the first that is late, EngineLost one that is gone."""
        deadline_s = deadline_s or self.config.deadlines.sync_s
        asking = [self.ask_engine(i, ask, deadline_s=deadline_s) for i in self.engines]
        return await asyncio.gather(*asking)

    async def each_engine(self, ask: AskEngine[R]) -> list[R | BaseException]:
        """Call every engine, and wait for all of them: each one's answer or error."""
        asking = [self.ask_engine(i, ask, deadline_s=self.config.deadlines.sync_s) for i in self.engines]
        return await asyncio.gather(*asking, return_exceptions=True)

    async def ask_learners(self, ask: AskLearner[R], *, deadline_s: float | None = None) -> list[R]:
        """Call every learner rank; StallError names the first that is late."""
        deadline_s = deadline_s or self.config.deadlines.step_s
        late = f"the driver waited {{s}} s for learner rank {{i}} to {recorded(ask).method}"
        return await gather_answers(LearnerProcess.ask_all(self.learners, ask), late, deadline_s, self.learners)
