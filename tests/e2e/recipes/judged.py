"""The echo recipe with a reward model, in the folder next to the policy's."""

import sys
from dataclasses import replace
from pathlib import Path

from echo import config as echo

from rl.judges import Preference, RewardModel
from rl.types import Reply
from trainer.launch import launch

MODEL = Path(sys.argv[sys.argv.index("--model") + 1])


def pairs() -> list[Preference]:
    """Two replies to each of three prompts."""
    return [Preference(prompt=f"{d}=", chosen="abc", rejected="...") for d in range(3)]


judge = RewardModel(
    model=str(MODEL / "scorer"), name="scorer", dtype="float32", max_model_len=300, kv_cache_gib=0.05, labelled=pairs
)


async def reward(reply: Reply) -> float:
    """The score of the reward model."""
    return await judge(reply.prompt, reply.text)


config = replace(
    echo, reward=reward, judges=(judge,), steps=2, prompts_per_step=2, group_size=2, rollout=replace(echo.rollout)
)

if __name__ == "__main__":
    launch(config)
