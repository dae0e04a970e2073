"""What is wrong with the episodes of a run that is about to start: its environment, template and parser?"""

import asyncio
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rl.config import Config
from rl.environments.host import ThreadHost
from rl.environments.play import play
from rl.loop.players import stage_of
from rl.loop.stream import turn_seed
from rl.types import Completion, FinishReason, Parsed
from trainer.cluster.cluster import Cluster
from trainer.doctor.episodes.chat import TOOL
from trainer.doctor.episodes.examine import episode_findings
from trainer.doctor.finding import Finding
from trainer.prompts import Prepared

EPISODES = 20
"""Episodes with random replies: the environment must take whatever a policy says."""
TASKS = 3
"""Examples from which the environment is started twice."""


@dataclass
class RandomReplies:
    """`Rollouts` of a policy that draws tokens, some of which end a reply."""

    vocabulary: int
    stop_ids: list[int]
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    async def sample(self, token_ids: list[int], n: int, **settings: Any) -> list[Completion]:
        """n replies of at most `max_tokens` tokens."""
        return [self._reply(settings["max_tokens"]) for _ in range(n)]

    def _reply(self, most: int) -> Completion:
        length = self.draw.randint(1, max(1, min(most, 40)))
        ids = [self.draw.randrange(self.vocabulary) for _ in range(length)]
        ends = bool(self.stop_ids) and self.draw.random() < 0.8
        if ends:
            ids[-1] = self.stop_ids[0]
        reason: FinishReason = "stop" if ends else "length"
        return Completion(token_ids=ids, logprobs=[-1.0] * length, versions=[0] * length, finish_reason=reason)


async def examine_episodes(cluster: Cluster, prepared: Prepared) -> list[Finding]:
    """Examine a run's episodes before anything is sampled for them; nothing where it learns from single replies."""
    config = cluster.config
    if config.env is None:
        return []
    loop = asyncio.get_running_loop()

    def parse(ids: list[int], reason: FinishReason) -> Parsed:
        asked = cluster.ask_engine(0, lambda e: e.parse(ids, reason, [TOOL]), deadline_s=config.deadlines.sample_s)
        found = asyncio.run_coroutine_threadsafe(asked, loop).result()
        assert found is not None, "an engine of a run with a parser has one"
        return found

    examine = partial(
        episode_findings,
        config.env,
        [prompt.task for prompt in prepared.train[:TASKS]],
        prepared.tokenizer,
        prepared.rendering,
        prepared.stop_ids,
        parse=parse if config.rollout.tool_parser else None,
        seed_of=partial(turn_seed, config.seed),
        episodes=partial(play_at_random, config, prepared),
    )
    # In a thread, because environments may block.
    return await asyncio.to_thread(examine)


def play_at_random(config: Config, prepared: Prepared) -> None:
    """Play some episodes with random replies. Raises EnvError."""
    assert config.env is not None
    replies = RandomReplies(len(prepared.tokenizer), prepared.stop_ids)
    stage = stage_of(config, replies, prepared.decode, prepared.chat(config), ThreadHost(env=config.env))

    async def all_of_them() -> None:
        for index in range(EPISODES):
            await play(stage, prepared.train[index % len(prepared.train)], index, lambda turn: turn)

    asyncio.run(all_of_them())
