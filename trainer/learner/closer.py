"""The learner's closer look at sampled tokens: are they draws, and which of the two sides is at fault?"""

from collections.abc import Collection
from dataclasses import replace

import deepspeed
import torch
from torch import Tensor

from rl.batch import take, trained_rows
from rl.parity.draws import Draws, draws
from rl.parity.evidence import WitnessEvidence
from rl.parity.gap import finite_part, gap
from rl.parity.guesses.hypotheses import explain
from rl.parity.guesses.told import TOKENS, Told, told
from rl.sampling.truncation import Truncation
from rl.types import Batch, PolicyOutput
from trainer import machine
from trainer.learner.edits import edited
from trainer.learner.passes import Passes, own_micro_batches
from trainer.learner.rank import Rank, whole_rows
from trainer.learner.suspects import trainer_fault
from trainer.model.head import watched
from trainer.model.witness import in_fp32, make_witness

LIMIT = {"float32": 3e-5, "bfloat16": 6e-2}
"""Largest mean |d| in nats at which a side and the witness count as equal."""
NUMBERS = 4e7
"""About how many logits are looked at together."""
ROWS = 48
"""At most so many rows, because the witness computes them one after the other."""


def sampled(
    rank: Rank, passes: Passes, batch: Batch, stop_ids: Collection[int], cut: Truncation | None
) -> tuple[PolicyOutput, Draws | None]:
    """The policy's output for sampled tokens, and whether those that have a number are draws from its distribution;
    None where no token has one. A collective over all ranks."""
    with watched(rank.head) as seen:
        output = passes.policy(batch)
    clean = finite_part(batch, output.logprobs)
    if not clean.mask.any():
        return output, None
    rows = some(clean, rank.policy.hf.config.get_text_config().vocab_size)
    part = take(clean, rows).to_device(rank.device)
    if rank.ranks == 1:  # that pass had all tokens, in the order of its micro-batches
        order = torch.cat(own_micro_batches(rank, batch, trained_rows(batch)))
        mask = batch.mask[order]
        at = torch.zeros(batch.mask.shape, dtype=torch.long)
        at[order] = at[order].masked_scatter(mask, torch.arange(int(mask.sum())))
        hidden = torch.cat(seen)[at[rows][:, : part.mask.shape[1]].to(rank.device)[part.mask]]
    else:  # each rank has computed some of the rows
        with whole_rows(rank), watched(rank.head) as seen:
            rank.engine(part.input_ids, part.mask, rank.config.temperature, cut, part.support, experts=part.experts)
        hidden = seen[0]
    with deepspeed.zero.GatheredParameters(list(rank.head.parameters()), enabled=rank.weights.sharded):
        logits = rank.head.logits(hidden, rank.head.dtype)
    return output, draws(_told(rank, part, logits, part.rollout_logprobs, rank.config.temperature, cut), stop_ids)


def witnessed(
    rank: Rank, passes: Passes, model: str, batch: Batch, temperature: float, cut: Truncation | None
) -> WitnessEvidence:
    """Engine and trainer against a third side, with temperature and cuts as the run's settings have them.

    A collective over all ranks.
    """
    c, hf, sharded = rank.config, rank.policy.hf, rank.weights.sharded
    batch = replace(batch, experts=None)  # the witness routes by itself, so the trainer does too
    size = sum(getattr(p, "ds_numel", p.numel()) for p in hf.parameters())
    if 8 * size > 0.5 * machine.memory():
        return _without_copy(rank, passes, batch)
    part = take(batch, some(batch, hf.config.get_text_config().vocab_size)).to_device(rank.device)
    with whole_rows(rank):
        witness = make_witness(hf, model, device=rank.device, sharded=sharded, remote=c.trust_remote_code)
        logits, hidden = witness.rows(part)
        exact = c.dtype == "float32" or not (sharded or c.trainer.lora.rank)
        limit = LIMIT["float32" if exact else c.dtype]
        own = _told(rank, part, logits, part.rollout_logprobs, temperature, cut).expected
        expected = torch.zeros(part.mask.shape, device=own.device).masked_scatter(part.mask, own)
        with in_fp32(rank.policy) if exact else whole_rows(rank):
            trainer = passes.policy(replace(part)).logprobs.to(rank.device)
            ours = gap(trainer, expected, part.mask)
            cause, text = "", ""
            if not ours.mean_abs <= limit:
                seen = _told(rank, part, logits, trainer, temperature, cut)
                cause, text = trainer_fault(rank, part, witness, seen, hidden, limit)
    theirs = gap(expected, part.rollout_logprobs, part.mask)
    guesses = []
    if not theirs.mean_abs <= LIMIT[c.dtype] / 2:
        seen = _told(rank, part, logits, part.rollout_logprobs, temperature, cut)
        guesses = sorted([*explain(seen), *edited(witness, seen, part)], key=lambda g: g.residual)
    note = "" if exact else "the trainer was compared in bf16"
    return WitnessEvidence(
        trainer=ours,
        engine=theirs,
        limit=limit,
        trainer_cause=cause,
        trainer_text=text,
        engine_guesses=guesses,
        note=note,
    )


def _without_copy(rank: Rank, passes: Passes, batch: Batch) -> WitnessEvidence:
    """The same where a second copy does not fit: the model's own forward pass in the run's dtype."""
    part = take(batch, some(batch, rank.policy.hf.config.get_text_config().vocab_size)).to_device(rank.device)
    c = rank.config
    with whole_rows(rank):
        expected = rank.engine(part.input_ids, part.mask, c.temperature, plain=True).logprobs
        trainer = passes.policy(part).logprobs.to(rank.device)
    return WitnessEvidence(
        trainer=gap(trainer, expected, part.mask),
        engine=gap(expected, part.rollout_logprobs, part.mask),
        limit=LIMIT[c.dtype],
        trainer_cause="" if c.rollout.truncation or rank.policy.forbidden else "trainer_body",
        trainer_text="the policy's numbers are not those of the model's own forward pass",
        note="the model is too large to be loaded a second time",
    )


def some(batch: Batch, vocabulary: int) -> Tensor:
    """Rows with few enough logits: some of every group, and as many of each as there is room for."""
    most = max(TOKENS, min(1024, int(NUMBERS / vocabulary)))
    rows, groups = trained_rows(batch), batch.group_ids
    nth = torch.stack([(groups[:row] == groups[row]).sum() for row in rows])
    order = rows[nth.argsort(stable=True)][:ROWS]
    counts = batch.mask[order].sum(dim=1).cumsum(dim=0)
    kept = order[: max(1, int((counts <= most).sum()))]
    return kept.sort().values


def _told(
    rank: Rank, part: Batch, logits: Tensor, reported: Tensor, temperature: float, cut: Truncation | None
) -> Told:
    return told(part, logits, reported, temperature=temperature, truncation=cut, forbidden=rank.policy.forbidden)
