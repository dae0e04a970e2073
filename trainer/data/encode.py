"""The examples of a set as prompts: which one cannot be one, and which are too long?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from rl.config import Config
from rl.data import Data, Example, Train, sized
from rl.environments.check import class_of
from rl.loop.stream import draws
from rl.tokens import Rendering, encode
from rl.typed import show
from rl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TEXT = 600
"""Characters of another library's error that are shown: some quote the whole prompt."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Makes prompts of one set, and remembers the long ones."""

    tokenizer: PreTrainedTokenizerBase
    config: Config
    rendering: Rendering
    where: str = "data.train"
    """The set's name in messages."""
    dropped: set[int] = field(default_factory=set)
    """Positions in the stream that were left out."""
    cut: set[int] = field(default_factory=set)

    def prompt(self, position: int, index: int, take: Callable[[], Any]) -> Prompt | None:
        """The prompt of an example, None for one that is dropped. Raises ValueError that names the example."""
        example = self._read(index, take)
        name = f"{self.where}[{index}]"
        if example.tools and not hasattr(self.config.env and class_of(self.config.env), "call"):
            raise ValueError(
                f"{name} has tools, and no environment that makes their calls: give env a method call(self, name, "
                "arguments)"
            )
        if example.tools and self.config.tools:
            raise ValueError(f"{name} has tools, and the run has an MCP server that gets their calls: use one of both")
        rendering = replace(self.rendering, tools=[*self.rendering.tools, *example.tools])
        try:
            ids = encode(self.tokenizer, example.prompt, rendering)
        except Exception as error:
            # The tokenizer and the template are other people's code, and may raise anything.
            kind = "" if type(error).__name__ in ("ValueError", "TemplateError") else f"{type(error).__name__}: "
            raise ValueError(f"{name} cannot be encoded: {kind}{str(error)[:MOST_TEXT]}. {_begin(example)}") from error
        if not ids:
            raise ValueError(f"{name} is an empty prompt")
        r = self.config.rollout
        room = r.max_model_len - r.max_tokens
        if len(ids) > room:
            if self.config.long_prompts == "drop":
                self.dropped.add(position)
                return None
            if self.config.long_prompts == "refuse":
                raise ValueError(
                    f"{name} has {len(ids)} prompt tokens, and with rollout.max_tokens={r.max_tokens} it does "
                    f"not fit rollout.max_model_len={r.max_model_len}: raise max_model_len to "
                    f"{len(ids) + r.max_tokens}, or set long_prompts='drop' or 'cut'. {_begin(example)}"
                )
            self.cut.add(position)
            front = ids[:1] if ids[0] == self.tokenizer.bos_token_id and room > 1 else []
            ids = front + ids[len(ids) - room + len(front) :]
        return Prompt(ordinal=index, token_ids=ids, task=example.task, given=example.prompt, tools=example.tools)

    def all(self, examples: list[Example]) -> list[Prompt]:
        """Prompts of a whole list. Raises ValueError also when all of them are too long."""
        made = (self.prompt(index, index, lambda each=each: each) for index, each in enumerate(examples))
        prompts = [prompt for prompt in made if prompt]
        if examples and not prompts:
            r = self.config.rollout
            raise ValueError(
                f"all {len(examples)} prompts of {self.where} are longer than {r.max_model_len - r.max_tokens} tokens: "
                "raise rollout.max_model_len"
            )
        return prompts

    def _read(self, index: int, take: Callable[[], Any]) -> Example:
        name = f"{self.where}[{index}]"
        try:
            example = take()
        except Exception as error:
            # The user's function, or a data set behind it.
            kind = type(error).__name__
            raise ValueError(f"{name} cannot be read: {kind}: {str(error)[:MOST_TEXT]}") from error
        if not isinstance(example, Example):
            raise ValueError(f"{name}={show(example)} {Data.right_form('train', example)}")
        return example


def _begin(example: Example) -> str:
    return f"It begins {show(example.prompt)}"


def peek(train: Train, count: int, encoder: Encoder) -> tuple[list[Prompt], Train]:
    """A few prompts of a training set that is read as needed, and the set, still with all of its examples.

    They are evenly spread where there is a length, else the first ones. Raises ValueError when none is left.
    """
    if sized(train):
        size: int = len(train)  # pyright: ignore[reportArgumentType]
        places = [i * size // count for i in range(min(count, size))]
        taken = [(i, lambda i=i: train[i]) for i in places]  # pyright: ignore[reportIndexIssue]
    elif isinstance(train, Iterator):
        head = [take() for _, take in _first(train, count)]
        train = chain(head, train)
        taken = [(i, lambda example=example: example) for i, example in enumerate(head)]
    else:
        taken = list(islice(draws(train, 0), count))
    found = [encoder.prompt(index, index, take) for index, take in taken]
    prompts = [prompt for prompt in found if prompt]
    if found and not prompts:
        raise ValueError(f"the first {len(found)} prompts of {encoder.where} are all too long: raise max_model_len")
    if not prompts:
        raise ValueError("the training data is empty: `Config.data()` returned no `train` examples")
    return prompts, train


def _first(train: Iterator[Any], count: int) -> Iterator[tuple[int, Callable[[], Any]]]:
    """At most `count` examples of an iterator that may hold fewer, and cannot begin again."""
    end = object()
    for index, (_, take) in zip(range(count), draws(chain(train, [end]), 0), strict=False):
        if (example := take()) is end:
            return
        yield index, lambda example=example: example
