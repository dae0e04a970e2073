"""Do an engine's layers compute what ours do? Our layers run on the inputs that `rollout/trace.py` recorded."""

from dataclasses import replace
from typing import Any

import deepspeed
import torch.nn.functional as F
from torch import Tensor, nn

from rl.parity.body import fits
from rl.parity.evidence import Kind, LayerError
from rl.parity.guesses.guess import Hypothesis
from trainer.learner.traced.layer_fits import apply, explain_layer, is_router
from trainer.learner.traced.records import HEAD, Record, Trace
from trainer.model.head import LogprobHead
from trainer.model.lora import as_engines_have_it

EXPLAINED = 3
"""So many layers that differ are explained, besides the lm_head."""


def layer_errors(
    hf: Any, head: LogprobHead, trace: Trace, places: dict[str, int], *, dtype: str, sharded: bool
) -> tuple[list[LayerError], list[str]]:
    """Compare every traced layer of one engine worker on the engine's own inputs, free of earlier layers' errors.

    Also returns the names of traced layers that the learner lacks. A collective over all ranks under ZeRO-3.
    """
    modules = dict(hf.named_modules())
    traced = [r for r in trace.records.values() if r.role in ("weights", "head")]
    parts = [(record, part) for record in traced for part in record.parts]
    whole: list[LayerError] = []
    unknown: list[str] = []
    starts: dict[str, int] = {}
    explained = 0
    for record, part in parts:
        module = head if record.role == "head" else modules.get(part)
        if module is None or getattr(module, "weight", None) is None or record.output is None:
            unknown.append(part)
            continue
        start = starts.get(record.name, 0)
        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=sharded):
            plain: Any = as_engines_have_it(module)
            given = record.given.to(plain.weight.device)
            mine = apply(plain, given)
            theirs = record.output.float()[..., start : start + mine.shape[-1]].to(mine.device)
            starts[record.name] = start + mine.shape[-1]
            kind = _kind(plain, record)
            found = LayerError(
                name=part,
                kind=kind,
                error=fits.error(theirs, mine),
                scale=fits.factor(theirs, mine),
                place=places.get(HEAD if kind == "head" else part, len(whole)),
            )
            guesses: list[Hypothesis] = []
            if fits.differs(found, dtype, fp32_head=head.fp32) and (kind == "head" or explained < EXPLAINED):
                explained += kind != "head"
                guesses += explain_layer(module, plain, kind, given, theirs, mine)
        if guesses:
            guesses += _as_others(hf, modules, record, part, plain, theirs, sharded)
        whole.append(replace(found, fits=fits.best(guesses, found.error)))
    return whole, unknown


def _as_others(
    hf: Any, modules: dict[str, nn.Module], record: Record, part: str, plain: Any, theirs: Tensor, sharded: bool
) -> list[Hypothesis]:
    """Does it compute with the weights of another layer: of its place in another decoder layer, or the embedding's?"""
    last = part.rsplit(".", 1)[-1]
    others = {n: m for n, m in modules.items() if n.rsplit(".", 1)[-1] == last and n != part}
    if record.role == "head":
        others = {"the embedding": hf.get_input_embeddings()}
    found = []
    for name, module in others.items():
        with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=sharded):
            other: Any = as_engines_have_it(module)
            if getattr(other, "weight", None) is None or other.weight is plain.weight:
                continue
            given = record.given.to(other.weight.device)
            if record.role == "head":
                out = F.linear(given.float(), other.weight.float())
            elif given.is_floating_point() and given.shape[-1] == other.weight.shape[-1]:
                out = apply(other, given)
            else:
                continue
        if out.shape == theirs.shape:
            cause = "head" if record.role == "head" else "tensor_loaded"
            text = f"it computes with the weight of {name}"
            found.append(Hypothesis(cause=cause, text=text, residual=fits.error(theirs, out)))
    return found


def _kind(module: nn.Module, record: Record) -> Kind:
    if record.role == "head":
        return "head"
    if isinstance(module, nn.Linear) or is_router(module):
        return "linear"
    return "embedding" if isinstance(module, nn.Embedding) else "norm"
