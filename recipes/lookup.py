"""Episodes: SmolLM2-135M-Instruct finds a country by two look-ups, the second for what the first returned, on a laptop.

python recipes/lookup.py --seed 1
"""

import random
import re

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.environments import Call, Episode, Limits, ToolError
from rl.objectives import GSPO
from rl.types import Data, Example
from trainer.launch import launch

BEGIN = ["Al", "Be", "Da", "El", "Fa", "Ga", "Is", "Ka", "Lu", "Ma", "No", "Pe", "Ro", "Sa", "Ti", "Va"]
NAMES = [begin + end for begin in BEGIN for end in ("bo", "dor", "la", "lin", "mir", "ra", "so", "ten")]
COUNTRIES = {"Lima": "Peru", "Oslo": "Norway", "Cairo": "Egypt", "Rome": "Italy", "Paris": "France", "Delhi": "India"}
COUNTRIES |= {"Quito": "Ecuador", "Accra": "Ghana", "Tokyo": "Japan", "Hanoi": "Vietnam", "Seoul": "Korea"}
# Where people live is drawn anew, so no model can know it.
HOMES = {name: random.Random(name).choice(sorted(COUNTRIES)) for name in NAMES}
# This model follows an example, and no description.
WORKED = ["Where does Anna live?", "FIND(Anna)", "Anna lives in Arica", "FIND(Arica)", "Arica is in Chile", "Chile"]


class Lookup:
    """For a model with native tool calls."""

    def __init__(self, task):
        self.task = task

    def find(self, name: str) -> str:
        """Look up in which city a person lives, or in which country a city is."""
        if name in HOMES:
            return f"{name} lives in {HOMES[name]}"
        if name not in COUNTRIES:
            raise ToolError(f"{name} is unknown")
        return f"{name} is in {COUNTRIES[name]}"

    def reward(self, episode: Episode) -> float:
        return float(episode.ended == "done" and episode.text.strip(" .\n") == self.task["answer"])


class InText(Lookup):
    """For a model that writes its calls as text."""

    def parse(self, text: str) -> list[Call]:
        return [Call(name="find", arguments={"name": name}) for name in re.findall(r"FIND\((\w+)\)", text)]


def questions(worked: list[str] = WORKED, asked: str = "Where does {} live?") -> Data:
    """96 people to train on, and 32 others that are held out."""
    before = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(worked)]
    examples = [
        Example(
            prompt=[*before, {"role": "user", "content": asked.format(name)}],
            task={"answer": COUNTRIES[HOMES[name]]},
        )
        for name in random.Random(0).sample(NAMES, len(NAMES))
    ]
    return Data(train=examples[32:], evals={"held_out": examples[:32]})


config = Config(
    name="lookup",
    model="models/smollm2-135m",
    data=questions,
    env=InText,
    limits=Limits(turns=4),
    objective=GSPO(),
    steps=8,
    eval_samples=4,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=16, max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5, zero_stage=0, micro_batch_tokens=512),
)

if __name__ == "__main__":
    launch(config)
