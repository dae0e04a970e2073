"""How do low-rank adapters enter a model, reach an engine merged, and get switched off for the reference?"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl.config import Lora

NAME = "default"
"""PEFT's own name for a model's first adapter."""


def inject(hf: PreTrainedModel, lora: Lora) -> None:
    """Freeze a model and give each linear layer except the head an adapter that adds nothing yet.

    Stacked experts are no linear layers and stay frozen. Raises ImportError without PEFT, and ValueError for a model
    without linear layers, such as GPT-2.
    """
    head = hf.get_output_embeddings()
    linear = [name for name, module in hf.named_modules() if type(module) is nn.Linear and module is not head]
    if not linear:
        raise ValueError(
            f"trainer.lora: {hf.config.model_type} has no linear layers besides its lm_head, and only Linear is "
            "supported: set trainer.lora.rank=0"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("trainer.lora needs PEFT: python -m pip install 'peft>=0.21.2,<0.22'") from error
    alpha: Any = lora.alpha
    inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=linear), hf)


def adapted(hf: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by the name of the weight that it changes."""
    modules = {name: module for name, module in hf.named_modules() if hasattr(module, "base_layer")}
    return {f"{name}.weight": module for name, module in modules.items()}


def base_parameters(hf: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters without the adapters, by their names in the plain model."""
    return {n.replace(".base_layer.", "."): p for n, p in hf.named_parameters() if ".lora_" not in n}


def adapter_parameters(layer: Any) -> list[nn.Parameter]:
    """A and B of one layer."""
    return [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight]


def merged(layer: Any) -> Tensor:
    """W + alpha / rank * B A [out, in] of a layer, added in fp32, rounded to W's dtype. Needs gathered parameters."""
    weight = layer.base_layer.weight.detach()
    a, b = (p.detach().float() for p in adapter_parameters(layer))
    if not layer.scaling[NAME] or not b.any():
        return weight  # bit for bit: even adding 0 would lose the sign of a -0
    return torch.addmm(weight.float(), b, a, alpha=layer.scaling[NAME]).to(weight.dtype)


def as_engines_have_it(layer: Any) -> nn.Module:
    """The layer itself, or a plain layer with the merged weight. Needs gathered parameters."""
    if not hasattr(layer, "base_layer"):
        return layer
    weight = merged(layer)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.base_layer.bias
    return plain


@contextmanager
def switched_off(hf: nn.Module) -> Iterator[None]:
    """The model without its adapters: their output is multiplied by 0.

    They still run, because ZeRO-3 gathers weights in the order of the last pass. PEFT's own switch would also turn off
    their gradients.
    """
    layers = adapted(hf).values()
    for layer in layers:
        layer.set_scale(NAME, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(NAME, 1.0)


def save_adapter(hf: Any, base: str, folder: Path) -> None:
    """Write only the adapters, as PEFT loads them onto the model named `base`. Needs gathered parameters."""
    from safetensors.torch import save_file

    config = hf.peft_config[NAME]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    tensors = {name: p.detach().cpu() for name, p in hf.named_parameters() if ".lora_" in name}
    named = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": t for name, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
