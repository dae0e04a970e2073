"""Which sampler explains the log-probabilities that an engine reported? Tried on the trainer's own logits."""

from typing import Any

import deepspeed
import torch
from torch import Tensor

from rl.batch import take
from rl.config import Config
from rl.parity.hypotheses import Hypothesis, explain, shifts
from rl.types import Batch
from trainer.model.head import LogprobHead

TOKENS = 256
"""At most so many sampled tokens have their full logits examined: [256, 150,000] in fp32 are 150 MB."""


def explain_batch(model: Any, head: LogprobHead, batch: Batch, config: Config, sharded: bool) -> list[Hypothesis]:
    """Hypotheses, best first; trying them takes several times as long as the forward pass.

    `model` runs the forward pass (a `Policy`, or DeepSpeed's engine around one). A collective under ZeRO-3.
    """
    counts = batch.mask.sum(dim=1).cumsum(dim=0)
    rows = torch.arange(max(1, int((counts <= TOKENS).sum())))
    part = take(batch, rows)
    truncation = config.rollout.truncation
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer = model(part.input_ids, part.mask, config.temperature, truncation, part.support).logprobs
    hook.remove()
    with deepspeed.zero.GatheredParameters(list(head.parameters()), enabled=sharded):
        logits, other = (head.logits(seen[0], dtype) for dtype in _dtypes(head))
    targets, rollout = part.input_ids[:, 1:][part.mask], part.rollout_logprobs[part.mask]
    guesses = explain(logits, targets, rollout, temperature=config.temperature, truncation=truncation)
    reported = (other / config.temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    cause = f"its lm_head is in {'bf16' if head.fp32 else 'fp32'}"
    guesses.append(Hypothesis(cause="head_dtype", text=cause, residual=float((reported - rollout).abs().mean())))
    guesses += shifts(trainer, part.rollout_logprobs, part.mask)
    return sorted(guesses, key=lambda g: g.residual)


def _dtypes(head: LogprobHead) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the head's product, and the one that the engine may have instead."""
    here, there = torch.float32, torch.bfloat16
    return (here, there) if head.fp32 else (there, here)
