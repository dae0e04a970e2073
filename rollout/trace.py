"""What every layer of an engine takes in and gives out, recorded during the forward passes of one short request.

The records show how the engine uses the weights that it loaded, and what it computes between them: attention, rotary
embedding, KV cache, residual stream. No digest can show this: on CPU the weights are packed, and a tied head, a norm or
a single shard may read other memory.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
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
        self.undo: list[Callable[[], None]] = []
        modules = dict(model.named_modules())
        attentions = {name for name, module in modules.items() if isinstance(module, Attention)}
        layers = {found[1] for name in modules if (found := re.match(r"(.*?\.\d+)\.", name))}
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
            record = self.seen[name]
            if isinstance(output, tuple):
                output, *more = output
                given = record.inputs[-1]
                # A residual that comes out as it went in was not added.
                if len(given) == 2 and more and isinstance(more[0], Tensor) and torch.equal(given[1], more[0]):
                    given.pop()
            if role != "layer" and len(record.outputs) < len(record.inputs) and isinstance(output, Tensor):
                record.outputs.append(output.detach().clone())

        if role == "attention":
            # Models of transformers call `forward` itself, which runs no hooks.
            forward = module.forward

            def traced(*args: Any, **kwargs: Any) -> Any:
                before(module, args, kwargs)
                output = forward(*args, **kwargs)
                after(module, args, output)
                return output

            own = "forward" in vars(module)
            self.undo.append(
                partial(setattr, module, "forward", forward) if own else partial(delattr, module, "forward")
            )
            module.forward = traced
            return
        self.undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self.undo.append(module.register_forward_hook(after).remove)

    def stop(self, parts: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
        """End recording and return the records by module name, in the order of their first calls.

        `in` is a list of tensors, `out` one tensor or None for a decoder layer; the rows of all calls follow each
        other. `parts` are checkpoint names: those of the modules that were fused into this one, or its own. The
        argument `parts` maps a fused module's last name to theirs. A tensor is (dtype, shape, bytes).
        """
        for undo in self.undo:
            undo()
        records = {name: record.rows() for name, record in self.seen.items()}
        return {
            name: {
                "role": self.seen[name].role,
                "parts": [".".join([*name.split(".")[:-1], p]) for p in parts.get(name.split(".")[-1], [])] or [name],
                "in": [_plain(x) for x in rows[0]],
                "out": None if rows[1] is None else _plain(rows[1]),
            }
            for name, rows in records.items()
            if rows
        }


class _Record:
    """The calls of one module."""

    def __init__(self, role: Role) -> None:
        self.role: Role = role
        self.inputs: list[list[Tensor]] = []
        self.outputs: list[Tensor] = []

    def rows(self) -> tuple[list[Tensor], Tensor | None] | None:
        """Inputs and output with the rows of all calls after each other. None where a call has no inputs, has no output
        although it is no decoder layer, or where rows do not fit together."""
        if not all(self.inputs) or (self.role != "layer" and len(self.outputs) != len(self.inputs)):
            return None
        inputs = [_joined(list(calls)) for calls in zip(*self.inputs, strict=False)]
        output = _joined(self.outputs) if self.outputs else None
        kept = [x for x in inputs if x is not None]
        return None if len(kept) < len(inputs) or (self.outputs and output is None) else (kept, output)


def _joined(calls: list[Tensor]) -> Tensor | None:
    """One tensor whose first dimension is tokens. Models of transformers have a batch dimension of 1 before it."""
    first = calls[0]
    if len(first) == 1 and first.dim() > (2 if first.is_floating_point() else 1):
        calls = [x[0] for x in calls]
    return torch.cat(calls) if len({x.shape[1:] for x in calls}) == 1 else None


def _plain(tensor: Tensor) -> tuple[str, list[int], bytes]:
    """A tensor as dtype, shape and bytes, which cross process borders without pickle."""
    if not tensor.is_floating_point():
        tensor = tensor.long()
    name = str(tensor.dtype).removeprefix("torch.")
    return name, list(tensor.shape), tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
