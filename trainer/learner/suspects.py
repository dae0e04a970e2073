"""Which part of the trainer is at fault? Its parts are switched off one after the other."""

from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl.batch import take
from rl.parity.guesses.hypotheses import FITS, explain, judge
from rl.parity.guesses.told import Told
from rl.types import Batch
from trainer.learner.edits import edited
from trainer.learner.rank import Rank, switched
from trainer.model.head import watched
from trainer.model.lora import adapted, as_engines_have_it
from trainer.model.witness import Witness

HIDDEN = 1e-3
"""Largest relative error of the hidden states in fp32 at which the layers count as right."""


def trainer_fault(
    rank: Rank, part: Batch, witness: Witness, seen: Told, hidden: Tensor, limit: float
) -> tuple[str, str]:
    """Cause and text. `seen` has the witness's logits with the trainer's numbers, `hidden` [N, H] is the witness's."""
    expected = torch.zeros(part.mask.shape, device=part.mask.device).masked_scatter(part.mask, seen.expected)
    trainer = torch.zeros_like(expected).masked_scatter(part.mask, seen.reported)

    def off(logprobs: Tensor) -> float:
        return float((logprobs - expected)[part.mask].abs().mean())

    def passed() -> tuple[Tensor, Tensor]:
        """One pass over the whole part: log-probabilities, and what the head got."""
        with watched(rank.head) as got:
            return _pass(rank, part), got[-1].float()

    once, mine = passed()
    again, _ = passed()
    size = off(trainer)
    apart = float((once - again)[part.mask].abs().mean())
    if off(once) > limit and apart > limit:
        active = [n for n, m in rank.policy.named_modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]
        where = f": dropout is on in {active[0]!r}" if active else ": dropout or another random part is on"
        return "mode", f"two passes over the same rows differ by {apart:.1e}{where}"
    if off(once) <= limit:
        return "trainer_body", "whole rows agree, and the micro-batches of a step do not: look at how a batch is cut"
    error = float((mine - hidden).norm() / hidden.norm()) if mine.shape == hidden.shape else float("inf")
    if error <= HIDDEN:
        found = judge(explain(seen), size, limit)
        text = "its hidden states agree, and its log-probabilities do not"
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            own = witness.hf.get_output_embeddings()
            logits = rank.head.mapped.apply_(F.linear(hidden.to(dtype), own.weight.to(dtype)).float())
            left = replace(seen, logits=logits).remains(replace(seen, logits=logits).expected)
            if own.bias is None and left <= max(limit, FITS * size):
                return "head_dtype", f"{text}; its lm_head multiplies in {name} (leaves {left:.1e} nats)"
        # A trainer has no raw mode: it left the temperature out.
        cause = {"raw_logprobs": "temperature", "unexplained": "trainer_body"}.get(found.cause, found.cause)
        return cause, f"{text}; {found}"
    if other := other_adapter(rank, HIDDEN if limit < 1e-3 else 3e-2):
        return "lora_scale", other
    scale = float((mine * hidden).sum() / hidden.square().sum()) if mine.shape == hidden.shape else 1.0
    if abs(scale - 1) > 2e-3 and float((mine - scale * hidden).norm() / mine.norm()) < 0.05 * error:
        return "scale", f"its last hidden states are the model's own times {scale:.4g}"
    found = judge(sorted([*edited(witness, seen, part), *explain(seen)], key=lambda g: g.residual), size, limit)
    if found.fits:
        return found.cause, str(found)
    alone = torch.zeros_like(expected)
    for row in range(len(part.mask)):
        one = take(part, torch.tensor([row], device="cpu"))
        alone[row, : one.mask.shape[1]] = _pass(rank, one)[0]
    if off(alone) <= limit:
        if not rank.policy.packs:
            return "padding", "each row alone agrees, and rows with padding next to each other do not"
        with switched(rank.policy, "share_prompts", False):
            if rank.policy.share_prompts is False and off(_pass(rank, part)) <= limit:
                return "packing", "rows agree when the prompt that replies share is computed for each of them"
        return "packing", "each row alone agrees, and rows packed next to each other do not: one sees another"
    if rank.policy.packs:
        with switched(rank.policy, "packs", False):
            if off(_pass(rank, part)) <= limit:
                return "packing", "padded rows agree, and packed rows do not"
    plain = rank.engine(part.input_ids, part.mask, seen.temperature, plain=True).logprobs
    own = (seen.logits / seen.temperature).log_softmax(-1).gather(1, seen.targets[:, None])[:, 0]
    if float((plain[part.mask] - own).abs().mean()) <= limit:
        text = "the same modules agree in a plain pass: look at packing and attention of the policy's pass"
        return "trainer_body", text
    first = first_other(rank.policy.hf, witness.hf, part, HIDDEN if limit < 1e-3 else 3e-2)
    where = f"; the first module that computes otherwise on the same input is {first!r}" if first else ""
    return "trainer_body", f"its hidden states differ by {error:.1e} of their size{where}"


def other_adapter(rank: Rank, most: float) -> str:
    """The first layer whose adapter counts otherwise than its merged weight does, as a text; "" if none does."""
    for name, layer in adapted(rank.policy.hf).items():
        with deepspeed.zero.GatheredParameters(list(layer.parameters()), enabled=rank.weights.sharded):
            weight = layer.base_layer.weight
            x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
            ours, engines = layer.forward(x).float(), as_engines_have_it(layer)(x).float()
            base = layer.base_layer.forward(x).float()
        if float((ours - engines).norm()) > most * float(engines.norm()):
            added = engines - base
            times = float(((ours - base) * added).sum() / added.square().sum().clamp(min=1e-12))
            return f"the adapter of {name!r} counts {times:.3g} times, next to its merged weight"
    return ""


def _pass(rank: Rank, part: Batch) -> Tensor:
    c = rank.config
    return rank.engine(part.input_ids, part.mask, c.temperature, c.rollout.truncation, part.support).logprobs


@torch.no_grad()
def first_other(hf: Any, own: Any, part: Batch, most: float) -> str:
    """The first module, in the order of execution, whose output differs from that of the fresh copy by more than `most`
    of its size; "" if all agree.

    Both run the same short row, so that up to there their inputs are equal.
    """
    ids = part.input_ids[:1, : int(part.mask[0].nonzero()[-1]) + 1]
    runs: list[dict[str, Tensor]] = []
    for model in (own, hf):
        outputs: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _, args, out, name=name, kept=outputs: _keep(kept, name, out))
            for name, module in model.named_modules()
            if name and not name.endswith("lm_head")
        ]
        attention = getattr(model.config, "_attn_implementation", "eager")
        model.set_attn_implementation("eager")
        try:
            model.get_decoder()(input_ids=ids, use_cache=False)
        finally:
            model.set_attn_implementation(attention)
            for hook in hooks:
                hook.remove()
        runs.append(outputs)
    for name, output in runs[0].items():
        other = runs[1].get(name)
        if other is None or other.shape != output.shape:
            continue
        if float((other.float() - output).norm()) > most * float(output.norm().clamp(min=1e-12)):
            return name
    return ""


def _keep(kept: dict[str, Tensor], name: str, output: Any) -> None:
    """Modules end in the order of execution, the inner ones first."""
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Tensor):
        kept.setdefault(name, first.detach().float().clone())
