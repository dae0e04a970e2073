"""Which tokens does a run forbid? Found from the model's files, as vLLM finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl.config import Config
from rl.sampling.forbidden import Forbidden, word_ids
from trainer.model.files import listed_stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_forbidden(config: Config, model: str) -> Forbidden | None:
    """The same from a model's folder or hub name; loads its tokenizer only if the run forbids something."""
    if not (config.rollout.min_tokens or config.rollout.bad_words):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    return forbidden(config, model, tokenizer)


def forbidden(config: Config, model: str, tokenizer: PreTrainedTokenizerBase) -> Forbidden | None:
    """What a run may not sample; None if it may sample every token everywhere.

    Raises ValueError, with the remedy, for a bad word without tokens, and for a stop token outside of the vocabulary.
    """
    r = config.rollout
    if wrong := [token for token in r.stop_token_ids if token >= len(tokenizer)]:
        raise ValueError(
            f"rollout.stop_token_ids has {wrong[0]}, and the vocabulary of {model} ends at {len(tokenizer) - 1}"
        )
    if not (r.min_tokens or r.bad_words):
        return None
    stops = (
        {*listed_stop_ids(model, tokenizer, trust_remote_code=config.trust_remote_code), *r.stop_token_ids}
        if r.min_tokens
        else set[int]()
    )
    return Forbidden(min_tokens=r.min_tokens, stop_ids=tuple(sorted(stops)), words=word_ids(tokenizer, r.bad_words))
