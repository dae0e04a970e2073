"""Engines whose replies have the lengths that a bench asks for: of async_bench.py, and of rollouts.py."""

import math
import random
from typing import Any

from rl.types import Completion
from rollout.engine import Engine

MEDIAN, P99_OVER_MEDIAN = 24, 10.0


def length(seed: int, most: int) -> int:
    """Tokens of the reply with this seed, at most `most`: lognormal, the 99th percentile is ten times the median."""
    sigma = math.log(P99_OVER_MEDIAN) / 2.326
    return max(1, min(most, round(MEDIAN * math.exp(sigma * random.Random(seed).gauss(0, 1)))))


class HeavyTailed(Engine):
    """Every reply has exactly the length that its seed gives."""

    async def _complete(self, token_ids: list[int], *, seed: int | None, **sampling: Any) -> Completion:
        if seed is not None:
            sampling |= {"max_tokens": length(seed, sampling["max_tokens"]), "ignore_eos": True}
        return await super()._complete(token_ids, seed=seed, **sampling)


class Exact(Engine):
    """Every reply has exactly the length that is asked."""

    async def _complete(self, token_ids: list[int], **sampling: Any) -> Completion:
        return await super()._complete(token_ids, **sampling | {"ignore_eos": True})
