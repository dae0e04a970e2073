"""What a run asks of its machines, worked out once. Run, dry run and doctor read the same value."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rl.config import Config
from rl.validate import check
from trainer.cluster.placement import Placement, check_fits, engines_alone, place, reward_models_of
from trainer.cluster.ray_session import LEAST_STORE, gpus_of_nodes, object_store_bytes
from trainer.machine import shared_memory
from trainer.model.files import check_model_folder, model_config, scoring_parameters, without_weights
from trainer.plan.memory import (
    GIB,
    Memory,
    add_reward_models,
    available_memory,
    engines_memory,
    required_memory,
    shape_of,
)
from trainer.plan.rules import (
    check_aside,
    check_build,
    check_experts_reported,
    check_router,
    check_rows,
    check_shared_memory,
    check_truncation,
    check_turns,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Placement and memory of one run."""

    config: Config
    placement: Placement
    gpus: float
    """GPUs that the machine or the cluster has."""
    nodes: Sequence[float] = ()
    """Those of each node."""

    def check_gpus(self) -> None:
        """Raise ValueError, with the remedy, when there are too few GPUs or none that this environment can use."""
        if not os.environ.get("RAY_ADDRESS"):
            check_build(self.placement.device)
            check_shared_memory(self.placement)
        self.check_fits()

    def check_fits(self) -> None:
        """Raise ValueError, with the remedy, when the nodes have too few GPUs."""
        check_fits(self.placement, gpus=self.gpus, nodes=self.nodes)

    @cached_property
    def skeleton(self) -> "PreTrainedModel":
        """The model without weights. Reads the model's config, which takes seconds. Raises OSError when there is none,
        and ValueError for another kind of model."""
        allowed = self.config.trust_remote_code
        return without_weights(model_config(self.config.model, trust_remote_code=allowed), trust_remote_code=allowed)

    @cached_property
    def reward_models(self) -> dict[str, int]:
        """Parameters of each reward model. Raises OSError where it is missing, ValueError for another kind of model."""
        allowed = self.config.trust_remote_code
        return {
            judge.label: scoring_parameters(judge.model, trust_remote_code=allowed)
            for judge in reward_models_of(self.config)
        }

    @cached_property
    def memory(self) -> Memory:
        """GiB by place. Raises as `skeleton`."""
        shape = shape_of(self.skeleton)
        needs = required_memory if self.placement.learners else engines_memory
        required = needs(self.config, self.placement, shape)
        add_reward_models(required, self.config, self.placement.device, self.reward_models)
        return Memory(shape=shape, required=required, available=available_memory(self.config, self.placement))

    def notes(self) -> list[str]:
        """What is slower here than it need be. Reads the model's config."""
        if os.environ.get("RAY_ADDRESS") or self.placement.device != "cpu" or not self.placement.learners:
            return []
        free, weights = shared_memory(), int(self.memory.required["host"]["weights under way"] * GIB)
        store = object_store_bytes(free)
        slow = [] if store else ["Ray keeps its objects in files"]
        if weights > free - (store or 0):
            slow.append("weights travel by sockets")
        if not slow:
            return []
        return [
            f"/dev/shm has {free / GIB:.2f} GiB free, so {' and '.join(slow)}, which is slower. Give it "
            f"{(2 * LEAST_STORE + 2 * weights) / GIB:.1f} GiB or more, in Docker with --shm-size"
        ]

    def check_model(self) -> None:
        """Raise ValueError where the model cannot run as the settings ask, or does not fit. Takes seconds."""
        self.check_rules()
        self.memory.check(self.config)

    def check_rules(self) -> None:
        """Raise ValueError where the model cannot run as the settings ask, on whatever machine."""
        if self.placement.learners:
            # Imported late: transformers takes seconds, and --help needs no model.
            from trainer.model.measure import measure

            check_rows(self.config)
            check_router(self.config)
            measure(self.skeleton)


def make_plan(config: Config, *, learners: bool = True, nodes: Sequence[float] | None = None) -> Plan:
    """Check the settings and place the run; takes no time. Raises ValueError or FileNotFoundError, with the remedy.

    Without learners it is an evaluation: engines alone, which read the model themselves. `nodes` are the GPUs of each
    node where the run will be; by default they are counted here.
    """
    check(config)
    for model in (config.model, *(judge.model for judge in reward_models_of(config))):
        check_model_folder(model)
    nodes = (gpus_of_nodes() if nodes is None else nodes) if config.device != "cpu" else ()
    gpus = float(sum(nodes))
    placement = place(config, cuda=gpus > 0, gpus=gpus)
    placement = placement if learners else engines_alone(placement, config)
    check_truncation(config, placement.device)
    check_experts_reported(config, placement.device)
    if learners:
        check_turns(config, placement)
        check_aside(config, placement)
    return Plan(config=config, placement=placement, gpus=gpus, nodes=nodes)
