"""What every layer of an engine takes in and gives out, recorded during the forward passes of one short request.

The records show how the engine uses the weights that it loaded, and what it computes between them: attention, rotary
embedding, KV cache, residual stream. No digest can show this: on CPU the weights are packed, and a tied head, a norm or
a single shard may read other memory.
"""

import re
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor

HEAD = "lm_head"
Role = Literal["weights", "head", "attention", "layer"]
CALLS = 8
"""Forward passes that are recorded at most."""


class Tracer:
    """Hooks on a vLLM model, until `stop`. They do not run inside a compiled forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, _Record] = {}
        self.hooks: list[RemovableHandle] = []
        modules = dict(model.named_modules())
        attentions = {name for name, module in modules.items() if isinstance(module, Attention)}
        layers = {found[1] for name in attentions if (found := re.match(r"(.*?\.\d+)\.", name))}
        for name, module in modules.items():
            if isinstance(module, LogitsProcessor):
                self._watch(HEAD, module, "head")
            elif name in attentions:
                self._watch(name, module, "attention")
            elif name in layers:
                self._watch(name, module, "layer")
            elif any(True for _ in module.parameters(recurse=False)) and not name.endswith(HEAD):
                self._watch(name, module, "weights")

    def _watch(self, name: str, module: nn.Module, role: Role) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            record = self.seen.setdefault(name, _Record(role))
            if len(record.inputs) < CALLS:
                tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
                # The second input of the head is its bias. A norm may get the residual stream as its second input, or
                # its first input again, which it then leaves alone.
                kept = tensors[:1] if role == "head" else list({id(x): x for x in tensors}.values())
                # Cloned because vLLM's norms and rotary embeddings work in place.
                record.inputs.append([x.detach().clone() for x in kept])

        def after(_: nn.Module, args: Any, output: Any) -> None:
            record, output = self.seen[name], output[0] if isinstance(output, tuple) else output
            if role != "layer" and len(record.outputs) < len(record.inputs) and isinstance(output, Tensor):
                record.outputs.append(output.detach().clone())

        self.hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self.hooks.append(module.register_forward_hook(after))

    def stop(self, parts: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
        """Remove the hooks and return the records by module name, in the order of their first calls.

        `in` is a list of tensors, `out` one tensor or None for a decoder layer; the rows of all calls follow each
        other. `parts` are checkpoint names: those of the modules that were fused into this one, or its own. The
        argument `parts` maps a fused module's last name to theirs. A tensor is (dtype, shape, bytes).
        """
        for hook in self.hooks:
            hook.remove()
        return {
            name: {
                "role": record.role,
                "parts": [".".join([*name.split(".")[:-1], p]) for p in parts.get(name.split(".")[-1], [])] or [name],
                "in": [_plain(torch.cat(calls)) for calls in zip(*record.inputs, strict=False)],
                "out": _plain(torch.cat(record.outputs)) if record.outputs else None,
            }
            for name, record in self.seen.items()
            if record.is_whole
        }


class _Record:
    """The calls of one module."""

    def __init__(self, role: Role) -> None:
        self.role: Role = role
        self.inputs: list[list[Tensor]] = []
        self.outputs: list[Tensor] = []

    @property
    def is_whole(self) -> bool:
        """Whether each call has inputs, and an output unless it is a decoder layer."""
        return all(self.inputs) and (self.role == "layer" or len(self.outputs) == len(self.inputs))


def _plain(tensor: Tensor) -> tuple[str, list[int], bytes]:
    """A tensor as dtype, shape and bytes, which cross process borders without pickle."""
    if not tensor.is_floating_point():
        tensor = tensor.long()
    name = str(tensor.dtype).removeprefix("torch.")
    return name, list(tensor.shape), tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
