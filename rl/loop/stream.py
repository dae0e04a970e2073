"""Which prompt comes next: an endless, seeded stream of ordinals over the training set."""

import random
from collections.abc import Iterator
from dataclasses import replace

from rl.types import Prompt


def stream(prompts: list[Prompt], seed: int) -> Iterator[Prompt]:
    """The given prompts epoch after epoch, each epoch in its own order, numbered by position in the stream.

    Raises ValueError for an empty list.
    """
    if not prompts:
        raise ValueError("the training data is empty: `Config.data()` returned no `train` examples")
    ordinal, epoch = 0, 0
    while True:
        order = random.Random(f"{seed}/{epoch}").sample(range(len(prompts)), len(prompts))
        for index in order:
            yield replace(prompts[index], ordinal=ordinal)
            ordinal += 1
        epoch += 1


def sample_seed(seed: int, ordinal: int) -> int:
    """Seed of a group's first sample, below 2^31; each further sample adds 1."""
    return random.Random(f"{seed}:{ordinal}").randrange(2**31 - 2**12)
