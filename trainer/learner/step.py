"""How does a batch become optimizer steps? Their sums are the same for every split over micro-batches and ranks."""

import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rl.batch import episodes, integers, take, trained_rows
from rl.episodes.joined import joined, layout
from rl.episodes.seen import Watching
from rl.loss import critic_alone, full_loss, prepare
from rl.objectives.adaptive import coefficients, next_objective
from rl.parity.mismatch import finish
from rl.reduce import Meter, Totals, loss_weights
from rl.types import Batch
from trainer.learner.hardware import peak_of
from trainer.learner.passes import Passes, own_micro_batches
from trainer.learner.rank import Rank
from trainer.model.answer import Answer


class Stepper:
    """Trains a rank's policy; what changes from step to step is the objective's coefficients."""

    def __init__(self, rank: Rank, passes: Passes) -> None:
        config = rank.config
        self.rank, self.passes = rank, passes
        self.objective = config.objective
        """With the current coefficients."""
        self.watching: Watching | None = None
        """What the passes of the last step gave, where the run records its rollouts."""
        self.old_logprobs: Literal["recompute", "rollout"] = (
            "recompute" if config.old_logprobs == "auto" else config.old_logprobs
        )

    def step(self, batch: Batch) -> dict[str, float]:
        """Take all optimizer steps of one batch. Returns its metrics, the same on every rank."""
        r, objective = self.rank, self.objective
        t = r.config.trainer
        several = t.epochs * t.minibatches > 1
        batch = self._with_start_of_step(batch, several)
        batch, advantages = prepare(objective, batch)
        if r.config.tracking.rollouts != "off":
            self.watching = Watching(batch.mask.shape, self.old_logprobs == "rollout")
        whole, meter, grad_norms = episodes(batch, trained_rows(batch)), Meter(), []
        parts = min(t.minibatches, len(whole))  # episodes that are not trained on may leave fewer than minibatches
        for epoch in range(t.epochs):
            n = len(whole)
            order = torch.randperm(n, generator=self._shuffle(epoch)) if several else torch.arange(n)
            for part in order.tensor_split(parts):
                chosen = [whole[i] for i in integers(part)]
                grad_norms.append(self._optimizer_step(batch, advantages, chosen, meter))
        for name, gib in r.memory.report().items():
            meter.merge_one(name, gib, 1)
        metrics = finish(merged(meter, r.ranks).means())
        trained = metrics.pop("perf/trained_tokens_count")
        metrics |= {"perf/trained_tokens": trained} | ideal_seconds(r, trained)
        rates = r.engine.get_lr()
        metrics |= {"actor/grad_norm": sum(grad_norms) / len(grad_norms), "actor/lr": rates[0]}
        if objective.uses_values:
            metrics["critic/lr"] = rates[-1]
        metrics |= {f"actor/{name}": coef for name, coef in coefficients(objective).items()}
        self.objective = next_objective(objective, metrics)
        return metrics

    def _with_start_of_step(self, batch: Batch, several: bool) -> Batch:
        """The batch with old and reference log-probabilities and values, as far as the objective reads them."""
        memory, objective = self.rank.memory, self.objective
        if self.old_logprobs == "rollout":
            batch = replace(batch, old_logprobs=batch.rollout_logprobs)
        reads_old = several or objective.needs_old_logprobs
        if objective.uses_values or (reads_old and self.old_logprobs == "recompute"):
            with memory.during("old_logprobs"):
                before = self.passes.policy(batch)
            if self.old_logprobs == "recompute":
                batch = replace(batch, old_logprobs=before.logprobs)
            batch = replace(batch, values=before.values)
        if objective.needs_reference:
            with memory.during("reference"):
                batch = replace(batch, ref_logprobs=self.passes.reference_logprobs(batch))
        return batch

    def _shuffle(self, epoch: int) -> torch.Generator:
        seed = self.rank.config.seed * 1_000_003 + self.rank.engine.global_steps * 101 + epoch
        return torch.Generator().manual_seed(seed)

    def _optimizer_step(self, batch: Batch, advantages: Tensor, chosen: list[Tensor], meter: Meter) -> float:
        """Take one step on the chosen episodes, each given by its rows."""
        r, objective = self.rank, self.objective
        c = r.config
        rows = torch.cat(chosen)
        totals = Totals(tokens=int(batch.mask[rows].sum()), sequences=len(chosen), horizon=c.horizon)
        r.policy.tokens.zero_()
        replay = r.policy.replay
        if replay is not None:
            replay.counts.zero_()
        live = rows
        if c.trainer.skip_zero_advantage and objective.may_skip:
            # The denominators still count these episodes, so leaving them out changes no gradient.
            live = torch.cat([of for of in chosen if advantages[of].any()] or chosen[:1])
        with r.memory.during("gradients"):
            for micro in own_micro_batches(r, batch, live):
                self._accumulate(batch, advantages, micro, totals, meter)
        meter.merge_one("actor/loss", 0.0, 1.0 / r.ranks)
        needed, computed = (float(n) for n in r.policy.tokens) if r.is_dp_leader else (0.0, 0.0)
        meter.merge_one("perf/useful_tokens_frac", needed, computed)
        meter.merge_one("perf/trained_tokens_count", needed, 1)
        if replay is not None and batch.experts is not None:
            moved, tokens, moved_pairs, pairs = map(float, integers(replay.counts))
            meter.merge_one("rollout_corr/rerouted_tokens_frac", moved, tokens)
            meter.merge_one("rollout_corr/rerouted_frac", moved_pairs, pairs)
        with r.memory.during("optimizer"):
            r.engine.step()
        grad_norm = float(r.engine.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm is {grad_norm} at optimizer step {r.engine.global_steps}: the weights can no "
                "longer be trusted. Look at rollout_corr/* and actor/* of the last steps; lower trainer.lr"
            )
        return grad_norm

    def _accumulate(self, batch: Batch, advantages: Tensor, micro: Tensor, totals: Totals, meter: Meter) -> None:
        """Add the gradient of a micro-batch's part of the step's loss."""
        r, objective = self.rank, self.objective
        c = r.config
        warming_up = r.engine.global_steps < objective.critic_warmup
        part = take(batch, micro).to_device(r.device)
        answer: Answer = r.engine(
            part.input_ids,
            part.mask,
            c.temperature,
            c.rollout.truncation,
            part.support,
            experts=part.experts,
            head_alone=warming_up,
        )
        policy = answer.output()
        watching = self.watching if r.is_dp_leader else None
        if watching and policy.logprobs.requires_grad:
            mask = part.mask
            policy.logprobs.register_hook(lambda gradient: watching.gradient(micro, mask, gradient))
        if warming_up:
            policy = critic_alone(policy)
        given = torch.zeros_like(policy.logprobs)
        given[: len(micro)] = advantages[micro, : part.mask.shape[1]].to(r.device)
        at = layout(part) if watching else None
        part, policy, given = joined(part, policy, given)
        old_is_rollout = self.old_logprobs == "rollout"
        loss, metrics = full_loss(objective, c.correction, policy, part, given, old_is_rollout=old_is_rollout)
        if watching:
            watching.add(micro, at, part, policy, given, metrics)
        weights = loss_weights(part.mask, objective.average_over, totals)
        # A bare product would carry an infinity from outside the mask as 0 * inf. DeepSpeed averages over ranks.
        total = torch.where(part.mask, loss * weights, 0.0).sum() * r.ranks
        r.engine.backward(total)
        if r.policy.replay is not None:
            r.policy.replay.begin(None)
        if r.is_dp_leader:
            meter.add(metrics, part.mask)
            # Each data-parallel group holds a part of the step's loss: the parts add up, and the weights of all ranks
            # (in `_optimizer_step`) add up to 1.
            meter.merge_one("actor/loss", float(total.detach()) / r.ranks, 0.0)


def merged(meter: Meter, ranks: int) -> Meter:
    """The meters of all ranks as one. A collective."""
    meters: list[Any] = [None] * ranks
    dist.all_gather_object(meters, meter)
    merged = Meter()
    for each in meters:
        merged.merge(each)
    return merged


def ideal_seconds(rank: Rank, tokens: float) -> dict[str, float]:
    """Seconds to learn from so many tokens at the accelerators' peak; empty where the peak is unknown.

    6 FLOPs per parameter and token (arXiv 2001.08361, section 2.1); an embedding table multiplies nothing.
    """
    peak = peak_of(rank.device)
    text = rank.policy.hf.config.get_text_config()
    table = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    parameters = sum(math.prod(m.shape) for m in rank.weights.metadata()) - table
    return {} if peak is None else {"perf/ideal_learn_s": 6.0 * parameters * tokens / (peak * rank.ranks)}
