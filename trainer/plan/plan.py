"""What a run asks of its machines, worked out once. Run, dry run and doctor read the same value."""

from dataclasses import dataclass
from functools import cached_property

from rl.config import Config
from rl.validate import check
from trainer.cluster.placement import Placement, check_fits, place
from trainer.cluster.ray_session import cluster_gpus
from trainer.model.files import check_model_folder, model_config
from trainer.plan.memory import Memory, available_memory, required_memory, shape_of
from trainer.plan.rules import check_rows, check_truncation


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Placement and memory of one run."""

    config: Config
    placement: Placement
    gpus: float
    """GPUs that the machine or the cluster has."""

    def check_gpus(self) -> None:
        """Raise ValueError, naming both numbers, when there are too few GPUs. Takes no time."""
        check_fits(self.placement, gpus=self.gpus)

    @cached_property
    def memory(self) -> Memory:
        """GiB by place. Reads the model's config, which takes seconds. Raises OSError when there is none."""
        shape = shape_of(model_config(self.config.model, trust_remote_code=self.config.trust_remote_code))
        required = required_memory(self.config, self.placement, shape)
        return Memory(shape=shape, required=required, available=available_memory(self.config, self.placement))

    def check_model(self) -> None:
        """Raise ValueError where the model cannot run as the settings ask, or does not fit. Takes seconds."""
        check_rows(self.config)
        self.memory.check(self.config)


def make_plan(config: Config) -> Plan:
    """Check the settings and place the run; takes no time. Raises ValueError or FileNotFoundError, with the remedy."""
    check(config)
    check_model_folder(config.model)
    gpus = cluster_gpus() if config.device != "cpu" else 0.0
    placement = place(config, cuda=gpus > 0, gpus=gpus)
    check_truncation(config, placement.device)
    return Plan(config=config, placement=placement, gpus=gpus)
