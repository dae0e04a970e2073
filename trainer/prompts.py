"""Text to tokens and back: chat template, prompt length, and the tokenizer's own files for the export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl.config import Config
from rl.tokens import encode
from rl.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from a folder or the hub."""
    # Imported late: this takes seconds, in which the actors can start already.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def encode_all(tokenizer: PreTrainedTokenizerBase, examples: list[Example], config: Config, where: str) -> list[Prompt]:
    """Prompts of a set. Raises ValueError that names the first prompt which leaves no room for a completion."""
    r = config.rollout
    prompts = []
    for index, example in enumerate(examples):
        ids = encode(tokenizer, example.prompt, config.chat_template_kwargs)
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
