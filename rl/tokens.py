"""A prompt as tokens: one way for driver and engine, so that both can be asked and compared."""

from collections.abc import Mapping
from typing import Any

from rl.types import Given


def stop_ids(tokenizer: Any, generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """Every token id that ends a reply, in order: the tokenizer's EOS, and those that the model's files list.

    `generation` is generation_config.json and `config` is config.json, each as a dictionary; an entry is an id, a list
    of ids or None. Empty: no reply can end before its limit.
    """
    text: Mapping[str, Any] = config.get("text_config") or {}
    listed: list[int | list[int] | None] = [tokenizer.eos_token_id]
    listed += [part.get("eos_token_id") for part in (generation, config, text)]
    found: set[int] = set()
    for ids in listed:
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return sorted(found)


def encode(tokenizer: Any, prompt: Given, template: Mapping[str, Any]) -> list[int]:
    """Token ids of a prompt. Chat messages go through the model's template; text and token ids are taken as they are.

    `tokenizer` is a Hugging Face tokenizer, `template` holds extra arguments of its chat template. Raises ValueError
    for messages when there is no chat template, and for ids outside of the vocabulary.
    """
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    ids = [token for token in prompt if isinstance(token, int)]
    if len(ids) == len(prompt):
        if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
            raise ValueError(
                f"the prompt has token ids from {min(ids)} to {max(ids)}, and the vocabulary of "
                f"{tokenizer.name_or_path} has ids from 0 to {len(tokenizer) - 1}: encode it with this tokenizer"
            )
        return ids
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the data holds chat messages, but {tokenizer.name_or_path} has no chat template; give plain text prompts"
        )
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template)
    # The template writes its own special tokens; adding them again would double the BOS.
    return list(tokenizer.encode(text, add_special_tokens=False))
