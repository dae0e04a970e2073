"""What does one learner rank consist of? The parts that its steps, forward passes, examinations and exports share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rl.config import Config
from trainer.learner.memory_meter import PeakMemory
from trainer.learner.weights import LearnerWeights
from trainer.model.attention import check_split
from trainer.model.head import LogprobHead
from trainer.model.policy import Policy
from trainer.model.ulysses import Ulysses


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank of a learner, after its process group was joined."""

    config: Config
    rank: int
    device: torch.device
    engine: Any
    """DeepSpeed's engine around `policy`."""
    policy: Policy
    weights: LearnerWeights
    memory: PeakMemory

    @property
    def ranks(self) -> int:
        """All ranks of the learner."""
        return self.config.trainer.ranks

    @property
    def dp_size(self) -> int:
        """Data-parallel groups. The ranks of a group (sequence parallel) have the same micro-batches."""
        return self.ranks // self.config.trainer.sequence_parallel

    @property
    def dp_rank(self) -> int:
        """This rank's data-parallel group."""
        return self.rank // self.config.trainer.sequence_parallel

    @property
    def is_dp_leader(self) -> bool:
        """Whether this rank reports the results of its data-parallel group."""
        return self.rank % self.config.trainer.sequence_parallel == 0

    @property
    def head(self) -> LogprobHead:
        """The policy's lm_head."""
        head: Any = self.policy.hf.get_output_embeddings()
        return head


@contextmanager
def switched(thing: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value until the end."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


def whole_rows(rank: Rank) -> AbstractContextManager[None]:
    """Until the end every rank computes whole rows by itself: all logits are needed."""
    return switched(rank.policy, "ulysses", None)


def make_rank(config: Config, *, rank: int, engine: Any, memory: PeakMemory) -> Rank:
    """Put the parts together. A collective over all ranks where they share rows.

    Raises ValueError where a model's rows cannot be shared by so many ranks.
    """
    policy: Policy = engine.module
    size = config.trainer.sequence_parallel
    if size > 1:
        check_split(policy.hf.config, size)
        policy.ulysses = Ulysses(rank=rank, ranks=config.trainer.ranks, size=size)
    weights = LearnerWeights(policy.hf, sharded=config.trainer.zero_stage == 3)
    return Rank(
        config=config, rank=rank, device=memory.device, engine=engine, policy=policy, weights=weights, memory=memory
    )
