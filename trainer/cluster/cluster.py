"""Everything that knows Ray: starts engines and learner ranks as actors, and speaks for them in the loop's terms."""

import asyncio
import gc
import importlib
import os
import socket
import sys
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rl import checkout
from rl.config import Config
from rl.loop.loop import StallError, first_error
from rl.protocols import EngineLost
from rl.weights import check_complete
from rollout import process as forkserver
from rollout.settings import engine_env
from trainer.cluster.placement import Placement, engine_threads, learner_threads
from trainer.cluster.process_env import learner_env, ray_environment, without_functions
from trainer.cluster.stacks import Heartbeat, stacks
from trainer.cluster.start_error import StartError, root_cause


class Host:
    """One actor process. Builds its object there, so that the driver imports neither vLLM nor DeepSpeed."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()
        self.calls: set[Any] = set()  # coroutines under way

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it."""
        with socket.socket() as s:
            s.bind(("", 0))
            return ray.util.get_node_ip_address(), s.getsockname()[1]

    def preload(self, module: str) -> None:
        """Import what will be needed, while there is time."""
        importlib.import_module(module)

    def build(self, target: str, sources: str, kwargs: dict[str, Any]) -> None:
        """Make the hosted object: `target` is "module:Class". Raises ImportError when this node runs other code."""
        if checkout.digest() != sources:
            raise ImportError(
                f"node {socket.gethostname()} runs other sources of unison-rl ({checkout.ROOT}) than the driver: "
                "put the same checkout there, and leave it as it is while a run lasts"
            )
        module, name = target.split(":")
        # An import leaves no garbage, and looking for it takes a tenth of the time.
        gc.disable()
        hosted = getattr(importlib.import_module(module), name)
        gc.enable()
        self.object = hosted(**kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the hosted object."""
        result = getattr(self.object, method)(*args, **kwargs)
        self.heartbeat.beat(method)
        return result

    @ray.method(concurrency_group="watch")
    def stacks(self) -> str:
        """Where this process is, told by a thread of its own."""
        return f"{self.heartbeat}\n{stacks(list(self.calls))}"

    def connect(self, client: "EngineClient", **channel: Any) -> None:
        """On a learner rank: open the weight channel. Here, because only this file may hand rollout to trainer."""
        from rollout.weights.sender import open_sender

        weights, rank = self.object.weights, self.object.rank
        sender = open_sender(weights=weights, rank=rank, client=client, **channel)

        def send(version: int) -> None:
            client.version = version
            sender.send_weights()

        self.object.send = send


class AsyncHost(Host):
    """The same for an engine, whose methods are coroutines."""

    def build(self, target: str, sources: str, kwargs: dict[str, Any]) -> None:
        """Make the engine; on CPU vLLM is imported for its own process at the same time as here."""
        if kwargs["device"] == "cpu":
            forkserver.start()
        super().build(target, sources, kwargs)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Await a method of the hosted object."""
        call = getattr(self.object, method)(*args, **kwargs)
        self.calls.add(call)
        try:
            result = await call
        finally:
            self.calls.discard(call)
        self.heartbeat.beat(method)
        return result


def actor_of(host: type) -> Any:
    """An actor class with a thread beside its work, which says where it is stuck."""
    return ray.remote(concurrency_groups={"watch": 1})(host)


class EngineClient:
    """vLLM's four control calls, to all engines at once, with a deadline; used on learner rank 0."""

    def __init__(self, engines: list[Any], workers_per_engine: int, deadline_s: float) -> None:
        self.engines, self.workers, self.deadline_s = engines, workers_per_engine, deadline_s
        self.version = 0

    def _all(self, method: str, *args: Any) -> None:
        refs = [engine.call.remote(method, *args) for engine in self.engines]
        self._wait(refs, method)

    def _wait(self, refs: list[Any], what: str) -> None:
        try:
            ray.get(refs, timeout=self.deadline_s)
        except ray.exceptions.GetTimeoutError:
            _, late = ray.wait(refs, num_returns=len(refs), timeout=0)
            names = [i for i, ref in enumerate(refs) if ref in late]
            raise StallError(
                f"the learner waited {self.deadline_s:g} s for engines {names} to {what} (version {self.version})"
            ) from None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine gets a rank range of its own (vLLM's Ray client gives all of them the same)."""
        refs = []
        for index, engine in enumerate(self.engines):
            mine = dict(init_info)
            if "rank_offset" in mine:
                mine["rank_offset"] = 1 + index * self.workers
            refs.append(engine.call.remote("init_weight_transfer_engine", mine))
        self._wait(refs, "join the weight channel")

    def stage_weights(self, version: int) -> None:
        """Receive beside the live weights (CPU)."""
        self._all("stage_weights", version)

    def start_weight_update(self) -> None:
        """Pause and begin."""
        self._all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive."""
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Commit as the version that `publish` set (vLLM's own senders give none), and resume."""
        self._all("finish_weight_update", self.version)


class Cluster:
    """The actors of one run."""

    engine = "rollout.engine:Engine"
    """Class of the hosted engines. An experiment may name its own, in a file beside its script."""

    def __init__(self, config: Config, placement: Placement) -> None:
        self.config, self.placement = config, placement
        self.engines: list[Any] = []
        self.building: list[Any] = []
        self.learners: list[Any] = []
        self.group: Any = None
        """The GPUs that are set aside for the actors."""
        self.started_ray = False
        self.logs = ""
        """Folder of the actors' output."""

    def boot(self) -> None:
        """Start Ray, the actors' processes, and in theirs the engines, which take longest; waits for none of them."""
        c, p = self.config, self.placement
        self.started_ray = start_ray(p)
        self.logs = log_folder()
        self.sources = checkout.digest()
        options = self._actor_options()
        # What the driver can import, the actors can: an objective may live in a file beside its recipe.
        env = {"PYTHONPATH": os.pathsep.join([str(checkout.ROOT), *filter(None, sys.path)])}
        cores = os.cpu_count() or 1
        engine_vars = env | engine_env(device=p.device, backend=p.backend, threads=engine_threads(c, cores))
        self.learner_threads = learner_threads(c, cores)
        learner_vars = env | learner_env(self.learner_threads)
        more = {"max_concurrency": 4096, "runtime_env": {"env_vars": engine_vars}}
        self.engine_options = [one | more for one in options[: p.engines]]
        booted = [self._boot_engine(index) for index in range(p.engines)]
        self.engines, self.building = [engine for engine, _ in booted], [building for _, building in booted]
        for one in options[p.engines :]:
            self.learners.append(actor_of(Host).options(**one, runtime_env={"env_vars": learner_vars}).remote())

    def _boot_engine(self, index: int) -> tuple[Any, Any]:
        engine = actor_of(AsyncHost).options(**self.engine_options[index]).remote()
        settings = self._common() | {"backend": self.placement.backend}
        return engine, engine.build.remote(self.engine, self.sources, settings)

    async def restart_engine(self, index: int) -> None:
        """Put a new process in the place of an engine; it holds no weights, and no channel leads to it yet."""
        ray.kill(self.engines[index])
        self.engines[index], building = self._boot_engine(index)
        await started(f"engine {index}", building, self.config.deadlines.start_s)
        await self.ask_engine(index, "start", deadline_s=self.config.deadlines.sync_s)

    def _common(self) -> dict[str, Any]:
        """What engines and ranks are built from alike."""
        return {"config": without_functions(self.config), "model": self.config.model, "device": self.placement.device}

    async def start(self) -> None:
        """Build every rank, wait for the engines, and open the weight channel between them."""
        deadline, p = self.config.deadlines.start_s, self.placement
        if self.group is not None:
            late = f"the driver waited {{s}} s for {p.gpus:g} free GPUs, see `ray status`"
            await answer(self.group.ready(), late, deadline)
        address, ports = await self._addresses()
        rank = self._common() | {"address": address, "port": ports[0], "threads": self.learner_threads}
        try:
            async with asyncio.TaskGroup() as building:
                engines = [started(f"engine {i}", ref, deadline) for i, ref in enumerate(self.building)]
                engines = [building.create_task(engine) for engine in engines]
                if p.backend == "ipc":
                    # vLLM measures how much of the GPU is free, and nobody else may change that meanwhile.
                    await asyncio.wait(engines)
                for i, learner in enumerate(self.learners):
                    ref = learner.build.remote("trainer.learner.learner:Learner", self.sources, rank | {"rank": i})
                    building.create_task(started(f"learner rank {i}", ref, deadline))
                    if p.backend != "gloo":
                        # This side of the channel imports vLLM, for which there is time while the engines start.
                        learner.preload.remote("rollout.weights.vllm_sender")
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        await self.ask_engines("start")
        await self.open_channel()

    def _actor_options(self) -> list[dict[str, Any]]:
        p = self.placement
        if p.device == "cpu":
            return [{"num_cpus": 1}] * (p.engines + p.learners)
        gpus = [p.gpus_per_engine] * p.engines + [p.gpus_per_learner] * p.learners
        if p.backend == "ipc":
            bundles, index = [{"GPU": 1.0, "CPU": 2.0}], [0, 0]
        else:
            bundles, index = [{"GPU": n, "CPU": 1.0} for n in gpus], list(range(len(gpus)))
        self.group = group = placement_group(bundles, strategy="PACK")
        return [
            {"num_cpus": 1, "num_gpus": n, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, i)}
            for n, i in zip(gpus, index, strict=True)
        ]

    async def _addresses(self) -> tuple[str, list[int]]:
        """Where learner rank 0 is found: its address, and two free ports."""
        late = "the driver waited {s} s for the process of learner rank 0 to start"
        found = [await answer(self.learners[0].address.remote(), late, 300) for _ in range(2)]
        return ("127.0.0.1" if self.started_ray else found[0][0]), [port for _, port in found]

    async def open_channel(self) -> None:
        """Open the weight channel from the ranks to all engines; a second one replaces the first."""
        c, p = self.config, self.placement
        address, (port, _) = await self._addresses()
        names = (await self.ask_learners("names"))[0]
        for index, expected in enumerate(await self.ask_engines("expected_weights")):
            check_complete(names, expected, f"engine {index}")
        client = EngineClient(self.engines, c.rollout.tensor_parallel, c.deadlines.sync_s)
        channel = {
            "backend": p.backend,
            "expected": names,
            "address": address,
            "port": port,
            "world_size": 1 + p.engines * c.rollout.tensor_parallel,
            "timeout_s": c.deadlines.sync_s,
        }
        await gather_answers(
            [a.connect.remote(client, **channel) for a in self.learners],
            "the driver waited {s} s for learner rank {i} to open the weight channel",
            c.deadlines.start_s,
            self.learners,
        )

    async def close(self) -> None:
        """End every actor, and Ray if this run started it. Safe to call at any moment, also twice."""
        if closing := [e.call.remote("close") for e in self.engines]:
            ray.wait(closing, num_returns=len(closing), timeout=15)
        for actor in [*self.engines, *self.learners]:
            ray.kill(actor)
        self.engines, self.learners = [], []
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None
        if self.started_ray:
            ray.shutdown()
            self.started_ray = False

    async def ask_engine(self, index: int, method: str, *args: Any, deadline_s: float) -> Any:
        """Call one engine; StallError when it is late, EngineLost when its process is gone."""
        ref = self.engines[index].call.remote(method, *args)
        try:
            late = f"the driver waited {{s}} s for engine {index} to {method}"
            return await answer(ref, late, deadline_s, self.engines[index])
        except ray.exceptions.RayActorError as error:
            raise EngineLost(f"the process of engine {index} is gone ({str(error).splitlines()[0]})") from None
        except asyncio.CancelledError:
            # The engine has other work: vLLM ends the requests of a cancelled call.
            ray.cancel(ref)
            raise

    async def ask_engines(self, method: str, *args: Any, deadline_s: float | None = None) -> list[Any]:
        """Call every engine; StallError names the first that is late, EngineLost one that is gone."""
        deadline_s = deadline_s or self.config.deadlines.sync_s
        asking = [self.ask_engine(i, method, *args, deadline_s=deadline_s) for i in range(len(self.engines))]
        return await asyncio.gather(*asking)

    async def ask_learners(self, method: str, *args: Any, deadline_s: float | None = None) -> list[Any]:
        """Call every learner rank; StallError names the first that is late."""
        deadline_s = deadline_s or self.config.deadlines.step_s
        late = f"the driver waited {{s}} s for learner rank {{i}} to {method}"
        return await gather_answers(
            [a.call.remote(method, *args) for a in self.learners], late, deadline_s, self.learners
        )


async def answer(ref: Any, late: str, deadline_s: float, actor: Any = None) -> Any:
    """Await one actor's answer; StallError with `late` ({s} is the deadline) when it does not come in time."""
    try:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
        async with asyncio.timeout(deadline_s):
            return await _unwrapped(ref)
    except TimeoutError:
        where = f"\nIt is here:\n{await _where(actor)}" if actor else ""
        raise StallError(
            f"{late.replace('{s}', f'{deadline_s:g}')}. Logs of all actors: {log_folder()}{where}"
        ) from None


async def _where(actor: Any) -> str:
    try:
        async with asyncio.timeout(10):
            return await actor.stacks.remote()
    except (TimeoutError, ray.exceptions.RayError) as error:
        return f"it does not say ({type(error).__name__}): its process is stopped, gone, or has the interpreter's lock"


async def started(who: str, ref: Any, deadline_s: float) -> None:
    """Await an actor's object; StartError with the root cause when it cannot be built."""
    try:
        await answer(ref, f"the driver waited {{s}} s for {who} to start", deadline_s)
    except ray.exceptions.RayError as error:
        cause = root_cause(str(error), log_folder())
        raise StartError(f"{who} did not start. {cause}\nOutput of all actors: {log_folder()}") from None


async def gather_answers(refs: list[Any], late: str, deadline_s: float, actors: list[Any]) -> list[Any]:
    """Await the same question to several actors; in `late`, {i} is the index of the one that is late."""
    asking = [answer(r, late.replace("{i}", str(i)), deadline_s, actors[i]) for i, r in enumerate(refs)]
    return await asyncio.gather(*asking)


async def _unwrapped(ref: Any) -> Any:
    try:
        return await ref
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None


def start_ray(placement: Placement) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; returns whether it was started."""
    if os.environ.get("RAY_ADDRESS"):
        join_ray()
        return False
    with ray_environment():
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            num_cpus=max(os.cpu_count() or 1, placement.engines + placement.learners),
            _node_ip_address="127.0.0.1",
        )
    return True


def join_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names; again is no error, for counting its GPUs comes first."""
    ray.init(log_to_driver=False, logging_level="warning", ignore_reinit_error=True)


def cluster_gpus() -> float:
    """GPUs of the cluster that RAY_ADDRESS names, else of this machine."""
    if not os.environ.get("RAY_ADDRESS"):
        return float(torch.cuda.device_count())
    join_ray()
    return ray.cluster_resources().get("GPU", 0.0)


def log_folder() -> str:
    """Where Ray keeps the output of every actor of this session."""
    node = ray.worker.global_worker.node
    return f"{node.get_session_dir_path()}/logs" if node else "Ray's session folder"
