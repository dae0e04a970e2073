"""The echo recipe as an environment: the policy writes, reads one message, and writes again."""

from dataclasses import replace

from echo import config as echo

from rl.environments import Episode, Limits, Step, Turn
from rl.types import Data, Example
from trainer.launch import launch


class TwoTurns:
    """Asks a second time; what counts is how many lower-case letters both turns have."""

    def __init__(self, task):
        self.task, self.asked = task, 0

    def reply(self, turn: Turn) -> Step | None:
        self.asked += 1
        return Step(observation=f"{self.task['digit']}+", reward=0.25) if self.asked == 1 else None

    def reward(self, episode: Episode) -> float:
        said = "".join(turn.text for turn in episode.turns)
        return sum(letter.islower() for letter in said) / max(len(said), 1)


def digits() -> Data:
    """Six digits."""
    examples = [Example(prompt=[{"role": "user", "content": f"{d}="}], task={"digit": str(d)}) for d in range(6)]
    return Data(train=examples, evals={"digits": examples})


config = replace(
    echo,
    data=digits,
    reward=None,
    env=TwoTurns,
    limits=Limits(turns=3),
    steps=3,
    prompts_per_step=2,
    group_size=4,
    max_staleness=1,
    rollout=replace(echo.rollout, max_tokens=100),
)

if __name__ == "__main__":
    launch(config)
