"""Tiny random models of many families with a tokenizer, made from scratch: a few seconds, no network."""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""A chat template that closes every turn with what a reply ends with."""
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Llama": {"family": "llama"},
    "Llama, tied": {"family": "llama", "tied": True},
    "Mistral, window": {"family": "mistral", "sliding_window": 16},
    "Qwen2": {"family": "qwen2"},
    "Qwen2.5, tied, padded vocabulary": {"family": "qwen2", "tied": True, "padding": 25},
    "Qwen3": {"family": "qwen3", "head_dim": 32},
    "Qwen3-MoE": {
        "family": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "OLMoE": {"family": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "Gemma": {"family": "gemma", "tied": True, "peak": 1.0, "head_dim": 32, "stops": [1, 3]},
    "Gemma-2": {
        "family": "gemma2",
        "tied": True,
        "peak": 1.0,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "final_logit_softcapping": 3.0,
        "stops": [1, 3],
    },
    "Gemma-3": {
        "family": "gemma3_text",
        "tied": True,
        "peak": 1.0,
        "head_dim": 32,
        "sliding_window": 16,
        "stops": [1, 3],
    },
    "Phi-3": {"family": "phi3", "stops": [1, 3]},
    "OLMo-2": {"family": "olmo2"},
    "Granite": {
        "family": "granite",
        "tied": True,
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
    },
    "Cohere": {"family": "cohere", "tied": True, "logit_scale": 0.25},
    "SmolLM3": {"family": "smollm3", "tied": True},
    "GPT-NeoX": {"family": "gpt_neox", "num_key_value_heads": 4},
    "Arcee": {"family": "arcee"},
}
"""Arguments of `make_model` for each family that docs/models.md lists."""


def make_model(
    folder: Path,
    *,
    family: str = "qwen2",
    tied: bool = False,
    seed: int = 0,
    peak: float = 6.0,
    chat_template: str | None = None,
    padding: int = 0,
    experts: float = 1.0,
    stops: int | list[int] | None = None,
    **sizes: Any,
) -> Path:
    """A random character model in `folder`; `peak` scales its logits, `experts` the weights of its experts. Heads have
    32 features, vLLM-CPU's least.

    `padding` is the number of vocabulary entries above the tokenizer's, `stops` goes into generation_config.json.
    """
    tokens = ["<pad>", "<eos>", "<unk>", *string.printable]
    if stops:
        tokens[3] = "<end>"  # in place of the digit 0
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    special = {"vocab_size": len(tokens) + padding, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(family, tie_word_embeddings=tied, **SIZES | special | sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(peak)
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(3.0)
            elif ".experts." in name:
                parameter.mul_(experts)
    model.save_pretrained(folder)
    if stops:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder
