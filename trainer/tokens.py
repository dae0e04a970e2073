"""Text to tokens and back: chat template, prompt length, and the tokenizer's own files for the export."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rl.config import Config
from rl.types import Example, Prompt


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from a folder or the hub."""
    return AutoTokenizer.from_pretrained(path)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, template: Mapping[str, Any]) -> list[int]:
    """Token ids of an example's prompt. Chat messages go through the model's template, plain text is taken as it is.

    Raises ValueError for messages when the model has no chat template.
    """
    if isinstance(example.prompt, str):
        return list(tokenizer.encode(example.prompt))
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the data holds chat messages, but {tokenizer.name_or_path} has no chat template; give plain text prompts"
        )
    text = tokenizer.apply_chat_template(example.prompt, tokenize=False, add_generation_prompt=True, **template)
    # The template writes its own special tokens; adding them again would double the BOS.
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_all(tokenizer: PreTrainedTokenizerBase, examples: list[Example], config: Config, where: str) -> list[Prompt]:
    """Prompts of a set. Raises ValueError that names the first prompt which leaves no room for a completion."""
    r = config.rollout
    prompts = []
    for index, example in enumerate(examples):
        ids = encode(tokenizer, example, config.chat_template_kwargs)
        if len(ids) + r.max_tokens > r.max_model_len:
            raise ValueError(
                f"{where}[{index}] has {len(ids)} prompt tokens, and with rollout.max_tokens={r.max_tokens} it does "
                f"not fit rollout.max_model_len={r.max_model_len}: drop it, or raise max_model_len to "
                f"{len(ids) + r.max_tokens}. It begins {str(example.prompt)[:80]!r}"
            )
        if not ids:
            raise ValueError(f"{where}[{index}] is an empty prompt")
        prompts.append(Prompt(ordinal=index, token_ids=ids, task=example.task))
    return prompts
