"""Inputs and outputs of every layer that holds weights, recorded during one short forward pass of an engine.

They show how the engine uses the weights that it loaded. No digest can show this: on CPU the weights are packed, and a
tied head, a norm or a single shard may read other memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.model_executor.layers.logits_processor import LogitsProcessor

HEAD = "lm_head"


class Tracer:
    """Hooks on a vLLM model, until `stop`. They do not run inside a compiled forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, dict[str, Tensor]] = {}
        self.hooks: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, LogitsProcessor):
                self._watch(HEAD, module)
            elif any(True for _ in module.parameters(recurse=False)) and not name.endswith(HEAD):
                self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            # Cloned because vLLM's norms work in place; summed because they take the residual as a second input. The
            # second input of the head is its bias.
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][: 1 if name == HEAD else None]
            if tensors and name not in self.seen:
                self.seen[name] = {"in": sum(tensors[1:], start=tensors[0].detach().clone())}

        def after(_: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if name in self.seen and "out" not in self.seen[name] and isinstance(output, Tensor):
                self.seen[name]["out"] = output.detach().clone()

        self.hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self.hooks.append(module.register_forward_hook(after))

    def stop(self, parts: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
        """Remove the hooks and return the records by module name.

        `in` and `out` are (shape, float32 or int64 bytes); `parts` are checkpoint names: those of the modules that were
        fused into this one, or its own. The argument `parts` maps a fused module's last name to theirs.
        """
        for hook in self.hooks:
            hook.remove()
        return {
            name: {
                "parts": [".".join([*name.split(".")[:-1], p]) for p in parts.get(name.split(".")[-1], [])] or [name],
                **{side: _shape_and_bytes(tensor) for side, tensor in sides.items()},
            }
            for name, sides in self.seen.items()
            if len(sides) == 2
        }


def _shape_and_bytes(tensor: Tensor) -> tuple[list[int], bytes]:
    """A tensor as shape and bytes, which cross process borders without pickle."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor.long()
    return list(tensor.shape), tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
