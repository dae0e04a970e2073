"""The toy task of the GPU check and the benchmarks: a small random model learns to echo a digit eight times."""

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rl.types import Data, Example, Reply

REPLY_TOKENS = 8


def make_model(
    folder: Path,
    *,
    hidden: int,
    inner: int,
    layers: int,
    vocabulary: int = 14,
    nats: float = 0.0,
    device: str = "cpu",
) -> str:
    """Save a random bf16 Qwen2 (tied embeddings, heads of 64) with a character tokenizer of ten digits and "=".

    With `nats`, the final norm, which scales a tied head's logits, is set to that mean entropy after random tokens.
    After the model's own tokens, which repeat themselves, the entropy is about a third of it. Large models are made
    faster on a GPU (`device`). Returns the folder.
    """
    words = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789="])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ids = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    config = Qwen2Config(**shape, **heads, **ids)
    with torch.no_grad(), torch.device(device):
        model, scale, entropy = Qwen2ForCausalLM(config), 1.0, math.inf
        logits = model(torch.randint(vocabulary, (4, 32))).logits if nats else None
        while nats and entropy > nats:
            scale *= 1.05
            log_p = (logits * scale).log_softmax(-1)
            entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
        model.model.norm.weight.mul_(scale)
    model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def digits() -> Data:
    """Ten prompts: "7=" asks for "77777777"."""
    return Data(train=[Example(prompt=f"{d}=", task={"digit": str(d)}) for d in range(10)])


def share_of_echoes(reply: Reply) -> float:
    """Share of the `REPLY_TOKENS` positions that hold the digit."""
    return reply.text.count(reply.task["digit"]) / REPLY_TOKENS
