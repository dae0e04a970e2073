"""A prompt as tokens: one way for driver and engine, so that both can be asked and compared."""

from collections.abc import Mapping
from typing import Any


def encode(tokenizer: Any, prompt: str | list[dict[str, str]], template: Mapping[str, Any]) -> list[int]:
    """Token ids of a prompt. Chat messages go through the model's template, plain text is taken as it is.

    `tokenizer` is a Hugging Face tokenizer, `template` holds extra arguments of its chat template. Raises ValueError
    for messages when there is no chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the data holds chat messages, but {tokenizer.name_or_path} has no chat template; give plain text prompts"
        )
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template)
    # The template writes its own special tokens; adding them again would double the BOS.
    return list(tokenizer.encode(text, add_special_tokens=False))
