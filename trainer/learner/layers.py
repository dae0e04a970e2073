"""Do an engine's layers compute what ours do? Our layers run on the inputs that `rollout/trace.py` recorded."""

from copy import copy
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl.parity.evidence import Kind, LayerError
from trainer.model.head import LogprobHead
from trainer.model.lora import as_engines_have_it

HEAD = "lm_head"


def layer_errors(
    hf: nn.Module, head: LogprobHead, trace: dict[str, Any], *, sharded: bool
) -> tuple[list[LayerError], list[str]]:
    """Compare every traced layer of one engine worker on the engine's own inputs, free of earlier layers' errors.

    Also returns the names of traced layers that the learner lacks. A collective over all ranks under ZeRO-3.
    """
    found, unknown = [], []
    modules = dict(hf.named_modules())
    for name, layer in trace.items():
        outputs = _tensor(layer["out"])
        for part in layer["parts"]:
            module = head if name == HEAD else modules.get(part)
            if module is None or getattr(module, "weight", None) is None:
                unknown.append(part)
                continue
            with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=sharded):
                module = as_engines_have_it(module)
                given = _tensor(layer["in"]).to(module.weight.device)
                mine, rounded = _apply(module, given), _apply(module, given, rounded=True)
            theirs, outputs = outputs[..., : mine.shape[-1]], outputs[..., mine.shape[-1] :]
            found.append(_error(part, _kind(module, name), theirs, mine.cpu(), rounded.cpu()))
    return found, unknown


def _apply(module: Any, given: Tensor, rounded: bool = False) -> Tensor:
    """A layer's output as fp32. `rounded`: its weight is cast to bf16 and back, and a head runs entirely in bf16."""
    weight = module.weight.bfloat16().to(module.weight.dtype) if rounded else module.weight
    if isinstance(module, LogprobHead):
        dtype = torch.bfloat16 if rounded else module.dtype
        out = module.logits(given, dtype)
    elif isinstance(module, nn.Linear):
        out = F.linear(given.to(weight.dtype), weight, module.bias)
    elif isinstance(module, nn.Embedding):
        out = F.embedding(given, weight)
    else:
        # `forward` of a copy, without a call: DeepSpeed's hooks on the module need the module's own parameters.
        stand_in = copy(module)
        stand_in._parameters = dict(module._parameters) | {"weight": nn.Parameter(weight, requires_grad=False)}
        out = stand_in.forward(given.to(weight.dtype))
    return out.float()


def _kind(module: nn.Module, name: str) -> Kind:
    if name == HEAD:
        return "head"
    if isinstance(module, nn.Linear):
        return "linear"
    return "embedding" if isinstance(module, nn.Embedding) else "norm"


def _error(name: str, kind: Kind, theirs: Tensor, mine: Tensor, rounded: Tensor) -> LayerError:
    size = mine.norm().clamp(min=1e-30)
    scale = float((theirs * mine).sum() / size**2)
    return LayerError(
        name=name,
        kind=kind,
        error=float((theirs - mine).norm() / size),
        scale=scale,
        scaled_error=float((theirs - scale * mine).norm() / size),
        bf16_error=float(min((theirs - r).norm() for r in (rounded, rounded.bfloat16().float())) / size),
    )


def _tensor(plain: tuple[list[int], bytes]) -> Tensor:
    shape, data = plain
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    count = 1
    for n in shape:
        count *= n
    return flat.view(torch.int64 if len(data) == 8 * count else torch.float32).view(shape)
