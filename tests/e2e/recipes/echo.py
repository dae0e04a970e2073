"""A user's recipe: its own task, reward and objective, the framework untouched."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rl.config import Config, RolloutConfig, TrackingConfig, TrainerConfig
from rl.objectives import Objective
from rl.objectives.advantages import spread
from rl.types import Batch, Data, Example, Metrics, PolicyOutput, Reply
from trainer.launch import launch


@dataclass(frozen=True, kw_only=True)
class BestOfGroup(Objective):
    """REINFORCE on reward minus the step's mean reward, kept near the old policy by a quadratic penalty."""

    penalty: float = 0.1

    group_relative: ClassVar[bool] = False  # its baseline is the step's
    skippable: ClassVar[bool] = False  # the penalty acts on every token

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        return spread(batch.rewards - batch.rewards.mean(), batch.mask)

    def loss(
        self, policy: PolicyOutput, batch: Batch, advantages: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Metrics]:
        move = policy.logprobs - batch.old_logprobs
        loss = -advantages * policy.logprobs + self.penalty * move**2
        return loss, {"actor/move": move.abs().detach()}


def digits() -> Data:
    """Eight digits to echo."""
    examples = [Example(prompt=f"{d}=", task={"digit": str(d)}) for d in range(8)]
    return Data(train=examples, evals={"digits": examples})


def echoes(reply: Reply) -> float:
    """1 if the reply begins with the digit."""
    return float(reply.text.startswith(reply.task["digit"]))


config = Config(
    name="echo",
    model="set by --model",
    data=digits,
    reward=echoes,
    objective=BestOfGroup(),
    steps=40,
    prompts_per_step=8,
    group_size=16,
    eval_samples=4,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=1, max_model_len=256, max_num_seqs=128, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-3),
    tracking=TrackingConfig(wandb="offline"),
)

if __name__ == "__main__":
    launch(config)
