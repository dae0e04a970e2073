"""Character tokenizers of every habit, without a model: milliseconds each."""

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<unk>", "<end>", "<bos>"]
CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
CHAT += "{% if add_generation_prompt %}a:{% endif %}"


def make_tokenizer(
    folder: Path,
    *,
    bos: bool = False,
    add_eos: bool = False,
    eos: str | None = "<eos>",
    pad: bool = True,
    lower: bool = False,
    chat_template: str | None = None,
) -> str:
    """Write a tokenizer of one token per character: ids of `SPECIAL` in their order, then those of printable ASCII."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    if bos or add_eos:
        single = "<bos> $A" if bos else "$A"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single + " <eos>" * add_eos, special_tokens=[("<bos>", 4), ("<eos>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<pad>" if pad else None,
        bos_token="<bos>" if bos else None,
        additional_special_tokens=["<end>", "<bos>", "<eos>"],
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    # Of a family without a tokenizer of its own, which transformers would take instead.
    (Path(folder) / "config.json").write_text('{"model_type": "gpt_neox"}')
    (Path(folder) / "generation_config.json").write_text('{"eos_token_id": 1}')
    return str(folder)
