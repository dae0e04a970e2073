"""Puts the NCCL path on CPU in every process whose PYTHONPATH has this folder: vLLM's NCCL is replaced when imported.

A run on CPU then gets the weight channel of a run on several GPUs. Faults are planted by files: PLANTS/PHASE.RANK makes
the engine worker of this rank (from 1) fail once in this phase; the file is renamed to PHASE.RANK.done as it fails.
"""

import os
import signal
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

PLANTS = os.environ.get("UNISON_PLANTS", "")
BUFFER = int(os.environ.get("UNISON_BUFFER", "60000"))
"""Bytes of a packing buffer, so that a tiny model has many."""


def planted(phase: str, rank: int) -> bool:
    """Whether a fault was planted here; it is taken away."""
    plant = Path(PLANTS, f"{phase}.{rank}")
    if not PLANTS or not plant.exists():
        return False
    done = plant.rename(f"{plant}.done")
    done.touch()  # when it happened
    return True


def die(phase: str, rank: int) -> None:
    if planted(phase, rank):
        os.kill(os.getpid(), signal.SIGKILL)


def pynccl(module: Any) -> None:
    from pretend_nccl import PretendNccl

    def before(comm: PretendNccl, phase: str) -> None:
        if comm.rank and (phase == "join" or comm.count >= 2):
            die(phase, comm.rank)

    PretendNccl.before = before
    module.PyNcclCommunicator = PretendNccl


def packed_tensor(module: Any) -> None:
    from pretend_nccl import without_devices

    for (owner, name), replacement in without_devices(module).items():
        setattr(owner, name, replacement)


def vllm_sender(module: Any) -> None:
    module.SMALLEST_BUFFER = BUFFER


def vllm_receive(module: Any) -> None:
    """Phases of an engine's worker: it dies as an update begins or is committed, or cannot load what arrives."""
    start, finish = module.NCCLEngine.start_weight_update, module.NCCLEngine.finish_weight_update
    load = module.Arrivals.load_weights

    def starts(self: Any) -> None:
        die("begin", self.rank)
        start(self)

    def finishes(self: Any) -> None:
        die("commit", self.rank)
        finish(self)

    def loads(self: Any, weights: Any) -> Any:
        return load(self, out_of_memory() if planted("load", self.rank) else weights)

    module.NCCLEngine.rank = property(lambda self: self.model_update_group.rank)
    module.Arrivals.rank = property(lambda self: vllm_receive.engine.rank)
    init = module.NCCLEngine.init_transfer_engine

    def inits(self: Any, info: Any) -> None:
        vllm_receive.engine = self
        init(self, info)

    module.NCCLEngine.init_transfer_engine = inits
    module.NCCLEngine.start_weight_update, module.NCCLEngine.finish_weight_update = starts, finishes
    module.Arrivals.load_weights = loads


def out_of_memory() -> Any:
    """Weights that cannot be read. The error comes in the loading itself, where a model's own would."""
    raise MemoryError("no memory for the new weights (planted)")
    yield


def placement(module: Any) -> None:
    """On CPU the channel of a run is NCCL."""
    from dataclasses import replace

    place = module.place
    module.place = lambda *args, **kwargs: replace(place(*args, **kwargs), backend="nccl")


HOOKS = {
    "vllm.distributed.device_communicators.pynccl": pynccl,
    "vllm.distributed.weight_transfer.packed_tensor": packed_tensor,
    "rollout.weights.vllm_sender": vllm_sender,
    "rollout.weights.vllm_receive": vllm_receive,
    "trainer.cluster.placement": placement,
}


class Disguise(MetaPathFinder):
    """Lets the other finders find a module, and changes it once it has been executed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in HOOKS:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next(filter(None, specs))
        execute = spec.loader.exec_module

        def then_change(module: Any) -> None:
            execute(module)
            HOOKS[name](module)

        spec.loader.exec_module = then_change
        return spec


sys.meta_path.insert(0, Disguise())
