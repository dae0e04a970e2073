"""Which actor gets which device: arithmetic on the config, checked against the GPUs that exist."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rl.config import Config
from rl.judges import RewardModel
from trainer.cluster.nodes.seats import packs

Device = Literal["cpu", "cuda"]
Backend = Literal["gloo", "nccl", "ipc"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Devices of one run, and the weight channel that follows from them."""

    device: Device
    backend: Backend
    engines: int
    learners: int
    gpus_per_engine: float
    gpus_per_learner: float
    reward_models: int = 0
    """Each has one GPU, or one CPU process."""
    sequence_parallel: int = 1
    """Ranks that must be on one node."""

    @property
    def units(self) -> list[float]:
        """GPUs that must be on one node each: an engine's, those of ranks that share rows, a judge's. Engine i and
        rank i may share one."""
        judges = [1.0] * self.reward_models if self.device == "cuda" else []
        if self.backend == "ipc":
            return [1.0] * self.engines + judges
        ranks = self.learners // self.sequence_parallel
        units = [self.gpus_per_engine] * self.engines + [self.gpus_per_learner * self.sequence_parallel] * ranks
        return units + judges

    @property
    def seats(self) -> list[int]:
        """The unit of each actor: engines, ranks, reward models."""
        groups = 0 if self.backend == "ipc" else self.engines
        ranks = [groups + i // self.sequence_parallel for i in range(self.learners)]
        return [*range(self.engines), *ranks, *range(len(self.units) - self.reward_models, len(self.units))]

    @property
    def gpus(self) -> float:
        """All GPUs of the run."""
        judges = self.reward_models if self.device == "cuda" else 0
        return self.engines * self.gpus_per_engine + self.learners * self.gpus_per_learner + judges

    @property
    def actors(self) -> int:
        """All actors of the run."""
        return self.engines + self.learners + self.reward_models

    def table(self) -> list[tuple[str, str]]:
        """Rows for the terminal."""

        def devices(gpus: float) -> str:
            return "1 CPU process" if self.device == "cpu" else f"{gpus:g} GPU{'s' if gpus > 1 else ''}"

        engine, learner = devices(self.gpus_per_engine), devices(self.gpus_per_learner)
        return [
            ("engines", f"{self.engines} x {engine}"),
            ("learner ranks", f"{self.learners} x {learner}"),
            *([("reward models", f"{self.reward_models} x {devices(1)}")] if self.reward_models else []),
            ("weight channel", "shared memory, or gloo" if self.device == "cpu" else self.backend),
        ]


def place(config: Config, *, cuda: bool, gpus: float = math.inf) -> Placement:
    """The placement of a run on a cluster with this many GPUs. Raises ValueError for impossible settings."""
    reward_models = len(reward_models_of(config))
    return replace(_engines_and_ranks(config, cuda=cuda, gpus=gpus - reward_models), reward_models=reward_models)


def _engines_and_ranks(config: Config, *, cuda: bool, gpus: float) -> Placement:
    device: Device = ("cuda" if cuda else "cpu") if config.device == "auto" else config.device
    engines, tp, ranks = config.rollout.engines, config.rollout.tensor_parallel, config.trainer.ranks
    for name, value in (("rollout.engines", engines), ("rollout.tensor_parallel", tp), ("trainer.ranks", ranks)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if device == "cpu":
        if tp > 1:
            raise ValueError(f"rollout.tensor_parallel={tp} needs GPUs; on CPU use rollout.engines to scale")
        if config.share_gpu:
            raise ValueError("share_gpu=True needs a GPU, and this run is on CPU: leave it off, or set device=cuda")
        if config.trainer.offload != "none":
            raise ValueError(
                f"trainer.offload={config.trainer.offload} frees a GPU, and this run is on CPU: leave it off"
            )
        return Placement(
            device="cpu", backend="gloo", engines=engines, learners=ranks, gpus_per_engine=0, gpus_per_learner=0
        )
    sp = config.trainer.sequence_parallel
    paired = engines == ranks and tp == sp == 1 and config.rollout.max_engines is None
    if config.share_gpu or (config.share_gpu is None and paired and ranks == gpus == 1):
        if not paired:
            raise ValueError(
                f"share_gpu=True is an engine and a rank on each GPU, but rollout.engines={engines}, "
                f"rollout.tensor_parallel={tp}, trainer.ranks={ranks}, trainer.sequence_parallel={sp}: set engines "
                "and ranks to the same number and the others to 1, or share_gpu=False"
            )
        return Placement(
            device="cuda", backend="ipc", engines=engines, learners=ranks, gpus_per_engine=0.5, gpus_per_learner=0.5
        )
    return Placement(
        device="cuda",
        backend="nccl",
        engines=engines,
        learners=ranks,
        gpus_per_engine=tp,
        gpus_per_learner=1,
        sequence_parallel=sp,
    )


def reward_models_of(config: Config) -> list[RewardModel]:
    """The judges of a run that need an engine."""
    return [judge for judge in config.judges if isinstance(judge, RewardModel)]


def engines_alone(placement: Placement, config: Config) -> Placement:
    """The engines of a placement without a learner: nothing shares their GPUs."""
    gpus = config.rollout.tensor_parallel if placement.device == "cuda" else 0
    backend: Backend = "gloo" if placement.device == "cpu" else "nccl"
    return replace(
        placement, backend=backend, learners=0, gpus_per_engine=gpus, gpus_per_learner=0, sequence_parallel=1
    )


def default_threads(config: Config, cores: int) -> int:
    """OpenMP threads of an actor on CPU: all cores when one engine and one rank take turns, else one.

    Actors that compute at the same time with two threads each are several times slower than with one.
    """
    alone = config.max_staleness == 0 and config.rollout.most_engines == config.trainer.ranks == 1
    return cores if alone else 1


def engine_threads(config: Config, cores: int) -> int:
    """OpenMP threads of an engine."""
    return config.rollout.threads or default_threads(config, cores)


def learner_threads(config: Config, cores: int) -> int:
    """OpenMP threads of a rank. On a GPU it computes nothing on the host, unless Adam is offloaded there."""
    shared = max(1, cores // config.trainer.ranks) if config.trainer.offload != "none" else None
    return config.trainer.threads or shared or default_threads(config, cores)


def check_fits(placement: Placement, *, gpus: float, nodes: Sequence[float] = ()) -> None:
    """Raise ValueError, naming both numbers, when a run asks for more GPUs than the cluster has, or than one node has
    for what may not be divided."""
    if placement.gpus > gpus:
        judges = f" + {placement.reward_models} reward models x 1" if placement.reward_models else ""
        raise ValueError(
            f"this run needs {placement.gpus:g} GPUs ({placement.engines} engines x {placement.gpus_per_engine:g} + "
            f"{placement.learners} learner ranks x {placement.gpus_per_learner:g}{judges}), but the cluster has "
            f"{gpus:g}. Lower rollout.engines, rollout.tensor_parallel or trainer.ranks; on one GPU use --share-gpu; "
            "add nodes with `unison cluster join`, or --nodes of `unison launch`"
        )
    if nodes and not packs(placement.units, nodes):
        raise ValueError(
            f"this run cannot be laid on nodes with {', '.join(f'{n:g}' for n in nodes)} GPUs: an engine "
            f"(rollout.tensor_parallel={placement.gpus_per_engine:g}) is on one node, and so are ranks that share rows "
            f"(trainer.sequence_parallel={placement.sequence_parallel}). Lower these, or take larger nodes"
        )


def check_shared(engines: Sequence[list[str]], ranks: Sequence[list[str]]) -> None:
    """Raise ValueError unless each engine has the node and the GPU of a rank, as CUDA IPC needs."""
    if sorted(engines) != sorted(ranks):
        raise ValueError(
            f"engines and learner were to share GPUs, but Ray gave (node, GPU) {[*engines]} to the engines and "
            f"{[*ranks]} to the ranks: start the run again, or set share_gpu=False"
        )
