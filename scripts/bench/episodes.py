"""How much time of the driver does a turn of an episode take? 64 episodes of 8 turns each, on an engine that samples at
once: what is left is the driver's own work. docs/performance.md has the figures.

    python scripts/bench/episodes.py --rounds 5
"""

import argparse
import asyncio
import statistics
import time
from typing import Any

from rl.config import Config, RolloutConfig
from rl.environments.host import ThreadHost
from rl.environments.template import chat_of
from rl.environments.types import Episode, Limits, Step, Turn
from rl.loop.players import Episodes, stage_of
from rl.tokens import Rendering, encode
from rl.tools.methods import schemas
from rl.types import Call, Completion, Data, Prompt
from trainer.prompts import load_tokenizer

EPISODES, TURNS = 64, 8


class Adder:
    """One call in each turn."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def add(self, a: int, b: int) -> int:
        """Add two integers."""
        return a + b

    def parse(self, text: str) -> list[Call]:
        """Always the same call."""
        return [Call(name="add", arguments={"a": 1, "b": 2})]

    def reward(self, episode: Episode) -> float:
        """How many turns there were."""
        return float(len(episode.turns))


class Talker(Adder):
    """No calls; every turn is answered by an async method."""

    parse = None  # pyright: ignore[reportAssignmentType]

    async def reply(self, turn: Turn) -> Step:
        """Always the same words."""
        return Step(observation="go on")


class AtOnce:
    """`Rollouts` whose completion is ready."""

    def __init__(self, ids: list[int]) -> None:
        n = len(ids)
        self.completion = Completion(token_ids=ids, logprobs=[-1.0] * n, versions=[0] * n, finish_reason="stop")

    async def sample(self, token_ids: list[int], n: int, **_: Any) -> list[Completion]:
        """The same completion for every prompt."""
        return [self.completion] * n


def seconds_per_turn(env: type, model: str) -> float:
    """CPU seconds of the driver per turn."""
    config = Config(
        name="bench",
        model=model,
        data=lambda: Data(train=[]),
        env=env,
        limits=Limits(turns=TURNS),
        group_size=EPISODES,
        rollout=RolloutConfig(max_model_len=8192),
    )
    tokenizer = load_tokenizer(model)
    rendering = Rendering(tools=schemas(env))
    given = [{"role": "user", "content": "What is 1 + 2?"}]
    prompt = Prompt(ordinal=0, token_ids=encode(tokenizer, given, rendering), task={}, given=given)
    said = [*tokenizer.encode("I call add with 1 and 2.", add_special_tokens=False), tokenizer.eos_token_id]
    chat = chat_of(tokenizer, rendering, [tokenizer.eos_token_id])
    stage = stage_of(config, AtOnce(said), tokenizer.decode, chat, ThreadHost(env=env))
    episodes = Episodes(config=config, stage=stage)

    async def main() -> float:
        await episodes.play(prompt, EPISODES, seed=0)  # threads start, caches fill
        # CPU time of the whole process, threads included: other processes do not count.
        began = time.process_time()
        group = await episodes.play(prompt, EPISODES, seed=1)
        took = time.process_time() - began
        assert [row.reward for row in group.rows] == [float(TURNS)] * EPISODES
        return took / (EPISODES * TURNS)

    return asyncio.run(main())


def main() -> None:
    """Print milliseconds per turn: the median of several rounds, and the largest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="its tokenizer (default: models/smollm2-135m)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each environment (default: 5)")
    asked = parser.parse_args()
    for env in (Adder, Talker):
        found = [1000 * seconds_per_turn(env, asked.model) for _ in range(asked.rounds)]
        print(f"{env.__name__}: {statistics.median(found):.3f} ms a turn (largest of {asked.rounds}: {max(found):.3f})")


if __name__ == "__main__":
    main()
