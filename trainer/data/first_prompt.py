"""What does the model read first? The first prompt as tokens, with everything about it that is unusual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.text import Text

from rl.data import Given
from rl.tokens import Rendering, chat_template, render, writes_date
from rl.typed import show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 40
"""Tokens of each end of a long prompt that are shown."""


@dataclass(frozen=True, kw_only=True)
class FirstPrompt:
    """The first training prompt of a run."""

    token_ids: list[int]
    tokens: list[str]
    """The same as the tokenizer writes them."""
    oddities: list[str]
    """What is unusual about it, as sentences."""

    def ends(self) -> list[str]:
        """The tokens to show: all of them, or both ends of a long prompt."""
        if len(self.tokens) <= 2 * SHOWN:
            return self.tokens
        return [*self.tokens[:SHOWN], f"... {len(self.tokens) - 2 * SHOWN} more ...", *self.tokens[-SHOWN:]]

    def lines(self) -> list[Text]:
        """As lines for the terminal."""
        head = Text(f"the first prompt has {len(self.tokens)} tokens: ", "dim")
        for number, token in enumerate(self.ends()):
            head.append("|" * bool(number), "dim").append(token.replace("\n", "\\n"))
        return [head, *(Text(f"first prompt: {oddity}", "yellow") for oddity in self.oddities)]


def first_prompt(
    tokenizer: PreTrainedTokenizerBase, given: Given, token_ids: list[int], rendering: Rendering
) -> FirstPrompt:
    """The first prompt of a run, `given` as the data has it."""
    return FirstPrompt(
        token_ids=token_ids,
        tokens=[str(token) for token in tokenizer.convert_ids_to_tokens(token_ids)],
        oddities=[*_of_tokens(tokenizer, given, token_ids, rendering), *_of_text(tokenizer, given, rendering)],
    )


def _of_tokens(tokenizer: PreTrainedTokenizerBase, given: Given, ids: list[int], rendering: Rendering) -> Iterator[str]:
    bos, eos, unk, pad = (getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "unk", "pad"))
    if bos is not None and ids[:2] == [bos, bos]:
        yield f"it begins with {tokenizer.bos_token} twice"
    elif bos is not None and bos != eos and bos in ids[1:] and not _begins_turns(tokenizer, given, rendering):
        yield f"{tokenizer.bos_token} begins a text, and stands at token {ids.index(bos, 1)} too"
    usual = list(tokenizer.encode("a"))
    if bos is not None and usual[:1] == [bos] and ids[0] != bos:
        yield f"it does not begin with {tokenizer.bos_token}, which this tokenizer puts in front of every text"
    if eos is not None and ids[-1] == eos:
        yield f"it ends with {tokenizer.eos_token}, so the reply begins after the end of a text"
    elif eos is not None and eos in ids[1:] and not _ends_turns(tokenizer, given, rendering):
        yield f"{tokenizer.eos_token} ends a text, and stands at token {ids.index(eos, 1)}"
    for name, token in (("unknown", unk), ("padding", pad)):
        if token is not None and token not in (bos, eos) and token in ids:
            yield f"it has {ids.count(token)} {name} token(s), the first at {ids.index(token)}"


def _begins_turns(tokenizer: PreTrainedTokenizerBase, given: Given, rendering: Rendering) -> bool:
    """Whether the chat template writes the begin-of-sequence token at every turn, as that of SmolLM2, and nobody else
    wrote it."""
    source, bos = chat_template(tokenizer, rendering), str(tokenizer.bos_token)
    messages = [m for m in given if isinstance(m, dict)] if isinstance(given, list) else []
    in_template = bos in source or "bos_token" in source
    return bool(messages) and in_template and not any(bos in str(m.get("content")) for m in messages)


def _ends_turns(tokenizer: PreTrainedTokenizerBase, given: Given, rendering: Rendering) -> bool:
    """Whether the end-of-sequence token also ends a turn of a conversation, and nobody else wrote it."""
    source, eos = chat_template(tokenizer, rendering), str(tokenizer.eos_token)
    messages = [m for m in given if isinstance(m, dict)] if isinstance(given, list) else []
    return (eos in source or "eos_token" in source) and not any(eos in str(m.get("content")) for m in messages)


def _of_text(tokenizer: PreTrainedTokenizerBase, given: Given, rendering: Rendering) -> Iterator[str]:
    if isinstance(given, str):
        text = given
        if text.endswith(" "):
            yield "it ends with a space, and most tokenizers join a space with the word that follows"
    elif isinstance(given[0], int):
        return
    else:
        messages = [m for m in given if isinstance(m, dict)]
        text = render(tokenizer, messages, rendering)
        yield from _of_messages(tokenizer, messages, text, rendering)
    ids = tokenizer.encode(text, add_special_tokens=False)
    back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if back != text and tokenizer.unk_token_id not in ids:
        at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        yield f"the tokens do not give the text back: {text[at : at + 30]!r} became {back[at : at + 30]!r}"


def _of_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], text: str, rendering: Rendering
) -> Iterator[str]:
    if messages[-1]["role"] == "assistant":
        yield "it ends with the assistant's words, which the reply continues"
    else:
        closed = {"add_generation_prompt": False, "continue_final_message": False}
        if render(tokenizer, messages, replace(rendering, template={**rendering.template, **closed})) == text:
            yield "no generation prompt: the chat template writes the same without one. Is its end right?"
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and content.strip() not in text:
            yield f"message {index} (role {show(message['role'])}) does not stand in it as written"
    if writes_date(tokenizer, rendering):
        yield f"the chat template can write the date; until the end of this run it is {rendering.now:%Y-%m-%d}"
