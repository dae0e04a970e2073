"""A prompt as tokens: one way for driver and engine, so that both can be asked and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from rl.data import Given
from rl.typed import show

RESERVED = {
    *("conversation", "messages", "tools", "documents", "strftime_now"),
    *("tokenize", "padding", "truncation", "max_length", "tokenizer_kwargs"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}
"""Arguments of `apply_chat_template` that a run sets by itself."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How a run writes its chat messages as text."""

    template: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Extra arguments of the chat template."""
    now: datetime = field(default_factory=datetime.now)
    """The date for templates that write one: the start of the run, also after midnight and in a resumed run."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Schemas of the tools that the template shows to the policy."""


def stop_ids(tokenizer: Any, generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """Every token id that ends a reply, in order: the tokenizer's EOS, and those that the model's files list.

    `generation` is generation_config.json and `config` is config.json, each as a dictionary; an entry is an id, a list
    of ids or None. An id above the model's vocabulary, which transformers gives the EOS of some tokenizers without one,
    can never be sampled and is left out. Empty: no reply can end before its limit.
    """
    text: Mapping[str, Any] = config.get("text_config") or {}
    listed: list[int | list[int] | None] = [tokenizer.eos_token_id]
    listed += [part.get("eos_token_id") for part in (generation, config, text)]
    found: set[int] = set()
    for ids in listed:
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    vocabulary: int | None = config.get("vocab_size") or text.get("vocab_size")
    return sorted(i for i in found if vocabulary is None or i < vocabulary)


def encode(tokenizer: Any, prompt: Given, rendering: Rendering) -> list[int]:
    """Token ids of a prompt. Chat messages go through the model's template; text and token ids are taken as they are.

    Text gets the special tokens that the tokenizer puts in front of a text, unless it begins with them, and none at its
    end: the reply continues it. `tokenizer` is a Hugging Face tokenizer. Raises ValueError for messages and ids that
    cannot be right; the tokenizer and the template may raise anything.
    """
    if isinstance(prompt, str):
        return _encode_text(tokenizer, prompt)
    ids = [token for token in prompt if isinstance(token, int)]
    if len(ids) == len(prompt):
        if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
            raise ValueError(
                f"the prompt has token ids from {min(ids)} to {max(ids)}, and the vocabulary of "
                f"{tokenizer.name_or_path} has ids from 0 to {len(tokenizer) - 1}: encode it with this tokenizer"
            )
        return ids
    # The template writes its own special tokens; adding them again would double the BOS.
    return plain_ids(tokenizer, render(tokenizer, [m for m in prompt if isinstance(m, dict)], rendering))


def render(tokenizer: Any, messages: list[dict[str, Any]], rendering: Rendering, *, opens: bool | None = None) -> str:
    """Chat messages as the text of the chat template.

    `opens` is whether the template opens the assistant's turn after them. None: a conversation that ends with the
    assistant's words is continued, and every other one opens the turn. Raises ValueError, and what the template raises.
    """
    template = rendering.template
    if not chat_template(tokenizer, rendering):
        raise ValueError(
            f"the data holds chat messages, but {tokenizer.name_or_path} has no chat template; give plain text prompts"
        )
    for index, message in enumerate(messages):
        _check_message(message, f"message {index} (role {show(message['role'])})")
    ending = {"add_generation_prompt": opens, "continue_final_message": False}
    arguments = {**template, **(_ending(messages, template) if opens is None else ending)}
    if rendering.tools:
        arguments["tools"] = [dict(tool) for tool in rendering.tools]
    if writes_date(tokenizer, rendering):
        arguments["strftime_now"] = rendering.now.strftime
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
    for index, message in enumerate(messages):
        if isinstance(message.get("content"), list) and str(message["content"]) in text:
            raise ValueError(
                f"message {index} has a list of parts, which this chat template writes as Python code: give its "
                "content as one text"
            )
    return text


def _ending(messages: list[dict[str, Any]], template: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the last message is continued, or the assistant's turn opened. Raises ValueError for a contradiction."""
    assistant_last = messages[-1]["role"] == "assistant"
    if template.get("continue_final_message") and not assistant_last:
        # It is about the conversations of the data set that end with the assistant.
        return {"add_generation_prompt": True, "continue_final_message": False}
    continued = template.get("continue_final_message", assistant_last)
    opened = template.get("add_generation_prompt", not continued)
    if continued and opened:
        raise ValueError(
            "chat_template_kwargs has add_generation_prompt, and the conversation ends with the assistant's words, "
            "which the reply continues: leave add_generation_prompt out, or set continue_final_message to False"
        )
    return {"add_generation_prompt": opened, "continue_final_message": continued}


def chat_template(tokenizer: Any, rendering: Rendering) -> str:
    """The source of the run's chat template; empty where there is none."""
    own, given = tokenizer.chat_template, rendering.template.get("chat_template")
    # A tokenizer may have several templates by name; transformers takes the one called tool_use where there are tools.
    named = _fields(own)
    return str(
        named.get(given or ("tool_use" if rendering.tools else "")) or given or named.get("default") or own or ""
    )


def writes_date(tokenizer: Any, rendering: Rendering) -> bool:
    """Whether the chat template can write today's date."""
    return "strftime_now" in chat_template(tokenizer, rendering)


def check_template(template: Mapping[str, Any]) -> None:
    """Raise ValueError for extra arguments of the chat template that a run sets by itself."""
    if wrong := [name for name in template if name in RESERVED]:
        raise ValueError(f"chat_template_kwargs has {wrong[0]!r}, which a run sets by itself: remove it")


def _check_message(message: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a message that templates write as something else than its text."""
    content = message.get("content")
    if not isinstance(message["role"], str):
        raise ValueError(f"{where}: a role must be text, such as 'user'")
    if message["role"] == "assistant" and message.get("tool_calls") and content is None:
        return
    if "content" not in message:
        raise ValueError(f"{where} has no 'content': write {{'role': 'user', 'content': 'What is 2 + 3?'}}")
    if content is None:
        raise ValueError(f"{where} has content None, which templates write as a word: write text, or leave it out")
    parts = cast(list[Any], content if isinstance(content, list) else [content])
    for part in parts:
        fields = _fields(part)
        text = fields.get("text") if fields and fields.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise ValueError(f"{where} has the content {show(part)}: only text can be trained on; write text")


def _fields(value: object) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    # Of an empty text one cannot see which special tokens stand in front.
    plain, full = plain_ids(tokenizer, text or "a"), list(tokenizer.encode(text or "a"))
    starts = [k for k in range(len(full) - len(plain) + 1) if full[k : k + len(plain)] == plain]
    if not starts:
        raise ValueError("the tokenizer splits this text in another way when it adds special tokens: give token ids")
    front = full[: starts[0]]
    if not text:
        return front
    written = next(n for n in range(len(front), -1, -1) if front[len(front) - n :] == plain[:n])
    return front[: len(front) - written] + plain


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without any that the tokenizer adds. Raises ValueError for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a surrogate pair, {text[error.start]!r}, at character {error.start}: repair it, as in "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None
    return list(tokenizer.encode(text, add_special_tokens=False))
