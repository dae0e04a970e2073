"""Which values of a model's config decide what it computes?"""

import json
from collections.abc import Mapping
from typing import Any

IGNORED = (
    "dtype",
    "torch_dtype",
    "head_dtype",
    "transformers_version",
    "transformers.js_config",
    "architectures",
    "use_cache",
    "id2label",
    "label2id",
    "tie_word_embeddings",  # compared by itself
    "problem_type",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "torchscript",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
)
"""What changes no number, or is compared elsewhere."""


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as plain values, without names, token ids and settings of a run."""
    kept = {
        name: value
        for name, value in config.items()
        if name not in IGNORED and not name.startswith("_") and "token_id" not in name and value is not None
    }
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values that both have and that are not equal."""
    return {name: (one[name], other[name]) for name in one if name in other and one[name] != other[name]}
