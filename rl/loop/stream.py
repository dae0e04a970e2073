"""Which prompt comes next: an endless stream of ordinals over the training set."""

import inspect
import random
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

from rl.data import Train, sized
from rl.types import Prompt

Take = Callable[[], Any]
"""Reads an example of the training set."""
MOST_DROPPED = 10_000
"""Prompts in a row that may be left out before the run ends: it would search forever."""


def stream(
    train: Train | list[Prompt],
    seed: int,
    *,
    prompt: Callable[[int, int, Take], Prompt | None] = lambda position, index, take: take(),
    ended: Container[int] = (),
    dropped: Container[int] = (),
) -> Iterator[Prompt]:
    """The prompts of a training set, numbered in the order in which they come.

    `prompt(position, index, take)` makes a prompt of the example that `take()` reads, or None to leave it out; `index`
    is its place in the training set, and `position` counts the examples that were drawn. A resumed run names the
    ordinals that have `ended`, which are not read again, and the positions that were `dropped`. Raises ValueError for
    an empty training set, and for one that ends and cannot begin again.
    """
    ordinal = in_a_row = 0
    for position, (index, take) in enumerate(draws(train, seed)):
        if position in dropped:
            continue
        if ordinal not in ended:
            made = prompt(position, index, take)
            if made is None:
                in_a_row += 1
                if in_a_row == MOST_DROPPED:
                    raise ValueError(f"{in_a_row} prompts in a row were left out: raise rollout.max_model_len")
                continue
            in_a_row = 0
            yield replace(made, ordinal=ordinal)
        ordinal += 1


def draws(train: Train | list[Prompt], seed: int) -> Iterator[tuple[int, Take]]:
    """Each example's place in the training set, and how to read it. What has a length is mixed in every epoch anew,
    everything else has its own order."""
    if sized(train):
        return _mixed(train, seed)
    function: Any = train
    if callable(train):
        return _again(function) if _takes_nothing(function) else _by_position(function)
    return _again(lambda: function)


def _mixed(train: Any, seed: int) -> Iterator[tuple[int, Take]]:
    if not len(train):
        raise ValueError("the training data is empty: `Config.data()` returned no `train` examples")
    epoch = 0
    while True:
        for index in random.Random(f"{seed}/{epoch}").sample(range(len(train)), len(train)):
            yield index, lambda index=index: train[index]
        epoch += 1


def _by_position(example: Callable[[int], Any]) -> Iterator[tuple[int, Take]]:
    position = 0
    while True:
        yield position, lambda position=position: example(position)
        position += 1


def _again(examples: Callable[[], Any]) -> Iterator[tuple[int, Take]]:
    """An iterable from its start, again and again; each of its examples is read, needed or not."""
    epoch = 0
    while True:
        index, iterator = 0, _begun(examples)
        while True:
            try:
                example = next(iterator)
            except StopIteration:
                break
            except Exception as error:  # the user's iterable may raise anything
                raise ValueError(f"data.train[{index}] cannot be read: {type(error).__name__}: {error}") from error
            yield index, lambda example=example: example
            index += 1
        if not index and epoch:
            raise ValueError(
                "the training data ended, and it can be read only once: give the function that makes it, "
                "train=examples without brackets, or a list"
            )
        if not index:
            raise ValueError("the training data is empty: `Config.data()` returned no `train` examples")
        epoch += 1


def _begun(examples: Callable[[], Any]) -> Iterator[Any]:
    made: Any = examples()
    if not isinstance(made, Iterable):
        raise ValueError(
            f"data.train is a function without arguments and returned a {type(made).__name__}: `yield` each Example, "
            "or take the position as argument"
        )
    return iter(cast(Iterable[Any], made))


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:
        return True  # a function of C code
    return True


def sample_seed(seed: int, ordinal: int) -> int:
    """Seed of a group's first sample, below 2^31; each further sample adds 1."""
    return random.Random(f"{seed}:{ordinal}").randrange(2**31 - 2**12)


def turn_seed(seed: int, ordinal: int, member: int, turn: int) -> int:
    """Seed of one turn of an episode, below 2^31. The first has that of a single reply; no two turns have the same, for
    equal seeds would correlate their noise."""
    if turn == 0:
        return sample_seed(seed, ordinal) + member
    return random.Random(f"{seed}:{ordinal}:{member}:{turn}").randrange(2**31 - 2**12)
