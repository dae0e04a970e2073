"""Which tokens does a new message add to what the policy sampled?"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from rl.environments.observations import call
from rl.tokens import Rendering, plain_ids, render

Message = dict[str, Any]
ASKED: Message = {"role": "user", "content": "Question"}
WORDS = "Sentinel7Qx"
"""Stands for the policy's words; what the template writes after it belongs to the next messages."""
NAME, IDENTITY = "tool", "call00000"
"""Of a call whose result has no name or id. Some templates take ids of nine letters and digits only."""
MOST_KEPT = 256
"""Texts of turns that are kept, each some kB."""


class TemplateError(ValueError):
    """The chat template cannot write these messages."""


@dataclass
class Chat:
    """The chat template of a run, asked for what new messages add. What was sampled is never written again.

    `render(messages, tools, add_generation_prompt)` gives text, `encode` token ids without special tokens of its own,
    and `stop_ids` are the tokens that end a reply.
    """

    render: Callable[[list[Message], Sequence[Mapping[str, Any]], bool], str]
    encode: Callable[[str], list[int]]
    stop_ids: frozenset[int]
    tools: Sequence[Mapping[str, Any]] = ()
    _arguments_are_text: bool = field(default=False, init=False)
    _kept: dict[tuple[tuple[str, str], ...], tuple[str, list[int]]] = field(
        default_factory=dict, init=False, repr=False
    )

    def prompt(self, messages: list[Message], more: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The tokens of a conversation up to the words that the policy will say, with `more` tools shown."""
        chat = replace(self, tools=[*self.tools, *more]) if more else self
        return self.encode(chat.text(messages, True))

    def delta(self, messages: list[Message], after: Sequence[int]) -> list[int]:
        """The tokens that `messages` add after the sampled tokens `after`, with the next generation prompt.

        The messages are rendered after an assistant's turn of one word, and cut behind it. Where the policy ended its
        turn, its stop token stands for the template's, which is not repeated; where it was cut off, the template closes
        the turn. A message of the role "tool" should have the "name" and "tool_call_id" of the call that it answers.
        Raises TemplateError.
        """
        calls = [
            (str(m.get("name") or NAME), str(m.get("tool_call_id") or f"{IDENTITY[:-2]}{i:02d}"))
            for i, m in enumerate(messages)
            if m["role"] == "tool"
        ]
        alone, full = self.after_words(calls, []), self.after_words(calls, messages)
        close = self.close_of(alone)
        if close is None:
            # Such a template begins the next turn with what the policy stops at, or ends no turn at all.
            words = len(alone) - len(self._unclosed) if calls else 0
            rest = full[words:]
            return rest[1:] if after and after[-1] in self.stop_ids and rest[:1] == [after[-1]] else rest
        if full[:close] != alone[:close]:
            raise TemplateError("the chat template writes the end of a turn in another way when messages follow")
        rest = full[close if calls else 0 :]
        if not after or after[-1] not in self.stop_ids:
            return rest
        rest = full[close:]
        # A template may close a turn of the past with another token than the last one (harmony), or not at all.
        closed = rest[0] == alone[close] or rest[0] in self.stop_ids or rest[0] not in self._openers
        return rest[1:] if closed else rest

    def text(self, messages: list[Message], opens: bool) -> str:
        """The text of a conversation. Raises TemplateError for whatever the template raises."""
        try:
            return self.render(messages, self.tools, opens)
        except Exception as error:  # the template is other people's code, and may raise anything
            roles = ", ".join(str(message["role"]) for message in messages)
            raise TemplateError(f"the chat template cannot write the messages {roles}: {error}") from error

    def after_words(
        self,
        calls: Sequence[tuple[str, str]],
        messages: list[Message],
        before: Sequence[Message] = (ASKED,),
        thought: str = "",
    ) -> list[int]:
        """What the template writes after the last word of an assistant's turn that makes these calls (name, id):
        nothing follows it, or `messages` and the next generation prompt. Raises TemplateError."""
        usual = before == (ASKED,) and not thought
        alone, ids = self._alone(tuple(calls)) if usual else self._closed([*before], calls, thought)
        if not messages:
            return ids
        return self._behind(self.text([*before, self.turn(calls, thought), *messages], True), alone.count(WORDS))

    def _behind(self, text: str, said: int) -> list[int]:
        """The tokens behind the last of the policy's words, which a text has so often."""
        parts = text.split(WORDS, said)
        if len(parts) <= said:
            raise TemplateError("the chat template shows the assistant's turn only as long as nothing follows it")
        # Encoded together with a word in front: some tokenizers write the beginning of a text in another way.
        ids, n = self.encode(WORDS + parts[-1]), len(self._word)
        if ids[:n] != self._word:
            raise TemplateError("the tokenizer joins the end of a turn with what the chat template writes after it")
        return ids[n:]

    def _alone(self, calls: tuple[tuple[str, str], ...]) -> tuple[str, list[int]]:
        """What `_closed` returns; kept, because most turns of a run make calls of the same names."""
        if calls not in self._kept:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[calls] = self._closed([ASKED], calls)
        return self._kept[calls]

    def _closed(
        self, before: list[Message], calls: Sequence[tuple[str, str]], thought: str = ""
    ) -> tuple[str, list[int]]:
        """A conversation that ends with this turn, and its tokens behind the policy's words."""
        text = self._ended(before, calls, thought)
        if WORDS not in text:
            raise TemplateError("the chat template does not show the assistant's words")
        return text, self._behind(text, text.count(WORDS))

    def _ended(self, before: list[Message], calls: Sequence[tuple[str, str]], thought: str = "") -> str:
        try:
            return self.text([*before, self.turn(calls, thought)], False)
        except TemplateError:
            if not calls or self._arguments_are_text:
                raise
            # Templates that join the arguments to a text, instead of writing them as JSON.
            self._arguments_are_text = True
            with suppress(TemplateError):
                return self._ended(before, calls, thought)
            self._arguments_are_text = False
            raise

    def turn(self, calls: Sequence[tuple[str, str]], thought: str = "") -> Message:
        """An assistant's turn of one word, which makes these calls (name, id) after this reasoning."""
        said = {"role": "assistant", "content": WORDS} | ({"reasoning_content": thought} if thought else {})
        if not calls:
            return said
        arguments: Any = {"text": WORDS}
        given = json.dumps(arguments) if self._arguments_are_text else arguments
        return {**said, "tool_calls": [call(i, n, given) for n, i in calls]}

    def close_of(self, alone: list[int]) -> int | None:
        """Where the token that ends a reply stands in what the template writes after a last turn; None: nowhere."""
        return next((i for i, token in enumerate(alone) if token in self.stop_ids), None)

    @cached_property
    def _word(self) -> list[int]:
        return self.encode(WORDS)

    @cached_property
    def _unclosed(self) -> list[int]:
        """What a template without a close token still writes after a last turn."""
        return self.after_words([], [])

    @cached_property
    def _openers(self) -> frozenset[int]:
        """Tokens with which a message can begin."""
        closed, opened = self.text([ASKED], False), self.text([ASKED], True)
        asked = self.encode(closed.partition(str(ASKED["content"]))[0])
        return frozenset([*asked[:3], *self.encode(opened.removeprefix(closed))[:1]])


def chat_of(tokenizer: Any, rendering: Rendering, stop_ids: Sequence[int]) -> Chat:
    """The chat of a run. `tokenizer` is a Hugging Face tokenizer; the tools are those of `rendering`."""

    def written(messages: list[Message], tools: Sequence[Mapping[str, Any]], opens: bool) -> str:
        return render(tokenizer, messages, replace(rendering, tools=tools), opens=opens)

    return Chat(written, partial(plain_ids, tokenizer), frozenset(stop_ids), rendering.tools)
