"""Faults of bookkeeping: the engine is right, and its numbers or replies are handed on as something else."""

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch

from live import Live
from rl.types import Completion

ALONE_S = 5.0
"""After so many seconds a prompt is alone: no other is sampled at the same time."""
Change = Callable[[Completion], Completion]


def numbers(change: Callable[[list[float]], list[float]]) -> Change:
    """The log-probabilities of a reply become other numbers."""
    return lambda c: replace(c, logprobs=change(c.logprobs))


def each(change: Callable[[float], float]) -> Change:
    """The same, number by number."""
    return numbers(lambda all_of_them: [change(x) for x in all_of_them])


def running_mean(x: list[float]) -> list[float]:
    return [total / (i + 1) for i, total in enumerate(accumulate(x))]


def whole_mean(x: list[float]) -> list[float]:
    return [sum(x) / len(x)] * len(x)


def in_bf16(x: float) -> float:
    return float(torch.tensor(x).bfloat16())


LOG2, LOG10 = each(lambda x: x / math.log(2)), each(lambda x: x / math.log(10))
SIGN, PROBABILITIES = each(lambda x: -x), each(math.exp)
SUMS, RUNNING_MEAN, MEAN = numbers(lambda x: list(accumulate(x))), numbers(running_mean), numbers(whole_mean)
TWO_DIGITS, BF16 = each(lambda x: round(x, 2)), each(in_bf16)
CLIPPED, NAN_AT_FIRST = each(lambda x: max(x, -1.0)), numbers(lambda x: [math.nan, *x[1:]])
INFINITE = numbers(lambda x: [*x[:-1], -math.inf])
FIRST_MISSING, LAST_MISSING = numbers(lambda x: [0.0, *x[1:]]), numbers(lambda x: [*x[:-1], 0.0])
LATE, EARLY = numbers(lambda x: [x[0], *x[:-1]]), numbers(lambda x: [*x[1:], x[-1]])
LATE_BY_TWO, REVERSED = numbers(lambda x: [x[0], x[0], *x[:-2]][: len(x)]), numbers(lambda x: x[::-1])
AHEAD: Change = lambda c: replace(c, versions=[v + 1 for v in c.versions])  # noqa: E731
BEHIND: Change = lambda c: replace(c, versions=[v - 1 for v in c.versions])  # noqa: E731


def kept(c: Completion, n: int, **changes: Any) -> Completion:
    """The first n tokens of a reply."""
    return replace(c, token_ids=c.token_ids[:n], logprobs=c.logprobs[:n], versions=c.versions[:n], **changes)


def without_its_end(c: Completion) -> Completion:
    """The token that ended the reply is not handed on."""
    return kept(c, len(c.token_ids) - 1) if c.finish_reason == "stop" and len(c.token_ids) > 1 else c


def cut_by_three(c: Completion) -> Completion:
    """The reply is shortened after the fact, and keeps its reason of ending."""
    return kept(c, max(1, len(c.token_ids) - 3))


def always_stop(c: Completion) -> Completion:
    """Every reply is reported to have ended by itself."""
    return replace(c, finish_reason="stop")


def always_length(c: Completion) -> Completion:
    """Every reply is reported to have been cut."""
    return replace(c, finish_reason="length")


def encoded_again(tokenizer: Any) -> Change:
    """Tokens become text without special tokens, and the text becomes tokens again; numbers stay where they were."""

    def change(c: Completion) -> Completion:
        text = tokenizer.decode(c.token_ids, skip_special_tokens=True)
        ids = list(tokenizer.encode(text, add_special_tokens=False)) or c.token_ids[:1]
        return replace(kept(c, len(ids)), token_ids=ids)

    return change


@contextmanager
def in_completions(live: Live, change: Change) -> Iterator[None]:
    """What the engine sampled is handed on otherwise."""
    engine = live.engine
    one = engine._complete

    async def changed(token_ids: list[int], **sampling: Any) -> Completion:
        return change(await one(token_ids, **sampling))

    with patch.object(engine, "_complete", changed):
        yield


@contextmanager
def in_groups(live: Live, change: Callable[[list[Completion]], list[Completion]]) -> Iterator[None]:
    """The samples of one prompt are handed on otherwise."""
    engine = live.engine
    one = engine.sample

    async def changed(*args: Any, **kwargs: Any) -> list[Completion]:
        return change(await one(*args, **kwargs))

    with patch.object(engine, "sample", changed):
        yield


def numbers_rotated(group: list[Completion]) -> list[Completion]:
    """Each reply has the numbers of the next one of its group, filled with 0 or cut to its own length."""
    others = [*group[1:], group[0]]
    return [replace(c, logprobs=padded(o.logprobs, len(c.token_ids))) for c, o in zip(group, others, strict=True)]


def padded(x: list[float], n: int) -> list[float]:
    return [*x, *[0.0] * n][:n]


@contextmanager
def between_prompts(
    live: Live, change: Callable[[list[Completion], list[Completion]], list[Completion]]
) -> Iterator[None]:
    """Two prompts that are sampled at the same time get `change(their own samples, the other's)`."""
    engine = live.engine
    one, waiting = engine.sample, []

    async def changed(token_ids: list[int], n: int, *args: Any, **kwargs: Any) -> list[Completion]:
        mine = await one(token_ids, n, *args, **kwargs)
        if n == 1:
            return mine  # a probe, alone
        if not waiting:
            other = asyncio.get_running_loop().create_future()
            waiting.append((mine, other))
            try:
                return change(mine, await asyncio.wait_for(other, ALONE_S))
            except TimeoutError:
                waiting.clear()
                return mine
        theirs, other = waiting.pop()
        other.set_result(mine)
        return change(mine, theirs)

    with patch.object(engine, "sample", changed):
        yield


def take_numbers(mine: list[Completion], theirs: list[Completion]) -> list[Completion]:
    return [replace(c, logprobs=padded(o.logprobs, len(c.token_ids))) for c, o in zip(mine, theirs, strict=True)]


def take_replies(mine: list[Completion], theirs: list[Completion]) -> list[Completion]:
    return theirs
