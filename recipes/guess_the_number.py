"""Episodes without tools: SmolLM2-135M-Instruct learns to halve the range in "higher, lower", on a laptop.

python recipes/guess_the_number.py --seed 1
"""

import random

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.environments import Episode, Limits, Step, Turn
from rl.objectives import GSPO
from rl.types import Data, Example
from trainer.launch import launch

SIZE = 15
"""Four guesses are enough for 15 numbers, if each halves what is left."""
# This model follows examples, and no description.
WORKED = ["Guess from 1 to 15", "8", "Higher: guess from 9 to 15", "12", "Lower: guess from 9 to 11", "10"]
WORKED += ["Guess from 21 to 35", "28", "Lower: guess from 21 to 27", "24"]


class Guess:
    def __init__(self, task):
        self.number, self.low, self.high = task["number"], task["low"], task["low"] + SIZE - 1

    def reply(self, turn: Turn) -> Step:
        text = turn.text.strip()
        if not text.isdecimal():
            return Step(done=True)
        guess = int(text[:9])
        if guess == self.number:
            return Step(reward=1.0, done=True)
        # A guess outside the range that the hints left costs 0.25, paid in its own turn.
        reward = 0.0 if self.low <= guess <= self.high else -0.25
        if guess < self.number:
            self.low = max(self.low, guess + 1)
        else:
            self.high = min(self.high, guess - 1)
        hint = "Higher" if guess < self.number else "Lower"
        return Step(observation=f"{hint}: guess from {self.low} to {self.high}", reward=reward)

    def reward(self, episode: Episode) -> float:
        return 0.0  # all of it is paid by turn


def games() -> Data:
    """240 games to train on, and 60 others, of other ranges, that are held out."""
    worked = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(WORKED)]
    examples: list[Example] = []
    for low in random.Random(0).sample(range(1, 41), 20):
        asked = {"role": "user", "content": f"Guess from {low} to {low + SIZE - 1}"}
        for number in range(low, low + SIZE):
            examples.append(Example(prompt=[*worked, asked], task={"low": low, "number": number}))
    return Data(train=examples[60:], evals={"held_out": examples[:60]})


config = Config(
    name="guess_the_number",
    model="models/smollm2-135m",
    data=games,
    env=Guess,
    limits=Limits(turns=4),
    objective=GSPO(),
    steps=12,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=8, max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5, zero_stage=0, micro_batch_tokens=512),
)

if __name__ == "__main__":
    launch(config)
