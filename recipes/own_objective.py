"""An objective of your own: the quickstart's run with a loss that is written in this file.

    python recipes/own_objective.py
    .venv/bin/unison check-objective recipes/own_objective.py:NearOldPolicy    # seconds, without a model

Copy this file and change the two methods. docs/tutorials/your-objective.md explains each line.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float
from quickstart import config as quickstart
from torch import Tensor

from rl.objectives import Objective
from rl.objectives.advantages import spread
from rl.types import Batch, Metrics, PolicyOutput, Step
from trainer.launch import launch


@dataclass(frozen=True, kw_only=True)
class NearOldPolicy(Objective):
    """REINFORCE on the reward minus the step's mean reward, with a quadratic penalty on the distance to the old policy.

    loss = -A log pi + penalty (log pi - log old)^2
    """

    penalty: float = 0.1
    """Weight of the squared distance (nats^2) between the current and the old log-probability of a token."""

    # The baseline is the mean of the step, so a group of one also has a signal.
    group_relative: ClassVar[bool] = False
    # The penalty acts on every token, so the trainer must not leave out rows with zero advantage.
    skippable: ClassVar[bool] = False

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        return spread(batch.rewards - batch.rewards.mean(), batch.mask)

    def loss(
        self, policy: PolicyOutput, batch: Step, advantages: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Metrics]:
        move = policy.logprobs - batch.old_logprobs
        loss = -advantages * policy.logprobs + self.penalty * move**2
        return loss, {"actor/move": move.abs().detach()}


config = replace(quickstart, name="own_objective", objective=NearOldPolicy())

if __name__ == "__main__":
    launch(config)
