"""One DeepSpeed rank: turns a step's batch into an optimizer step that no split over ranks can change."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from rl.batch import micro_batches, take
from rl.config import Config
from rl.loss import critic_alone, full_loss, prepare
from rl.objectives.adaptive import coefficients, next_objective
from rl.parity.evidence import LayerError
from rl.parity.hypotheses import Hypothesis
from rl.parity.mismatch import finish
from rl.reduce import Meter, Totals, loss_weights
from rl.types import Batch, PolicyOutput
from rl.weights import WeightManifest, digest
from trainer.learner import state
from trainer.learner.deepspeed_engine import deepspeed_engine, deepspeed_settings
from trainer.learner.explain import explain_batch
from trainer.learner.hardware import peak_of
from trainer.learner.layers import layer_errors
from trainer.learner.memory_meter import PeakMemory
from trainer.learner.weights import LearnerWeights
from trainer.model import lora
from trainer.model.attention import check_split
from trainer.model.head import LogprobHead
from trainer.model.policy import Policy, load
from trainer.model.ulysses import Ulysses


class Learner:
    """Hosted by one actor per rank; every method is called on all ranks at once."""

    def __init__(
        self, config: Config, *, rank: int, device: str, address: str, port: int, model: str, threads: int = 1
    ) -> None:
        self.config, self.rank, self.ranks = config, rank, config.trainer.ranks
        self.objective = config.objective
        """With the coefficients of now."""
        self.device = torch.device(device)
        torch.set_num_threads(threads)
        self.share_prompts = shares_prompts(config, device)
        self.memory = PeakMemory(self.device)
        torch.manual_seed(config.seed)
        join_group(rank, self.ranks, device, address, port, config.deadlines.start_s)
        self.engine = deepspeed_engine(config, model, device, share_prompts=self.share_prompts)
        self.policy: Policy = self.engine.module
        shared = config.trainer.sequence_parallel
        self.lots, self.lot = self.ranks // shared, rank // shared
        """Ranks that share their rows are one lot: they have the same micro-batches."""
        self.speaks = rank % shared == 0
        """Whether this rank counts for its lot."""
        if shared > 1:
            check_split(self.policy.hf.config, shared)
            self.policy.ulysses = Ulysses(rank=rank, ranks=self.ranks, size=shared)
        needed = config.objective.needs_reference and not config.trainer.lora.rank
        self.reference = self._reference(model) if needed else None
        """A model of its own; with adapters, the policy without them is one."""
        self.weights = LearnerWeights(self.policy.hf, sharded=config.trainer.zero_stage == 3)
        self.head: LogprobHead = self.policy.hf.get_output_embeddings()
        self.old_logprobs = "recompute" if config.old_logprobs == "auto" else config.old_logprobs
        self.send: Callable[[int], None] | None = None
        """Sends `weights` as a version; set by whoever opens the weight channel."""

    def _reference(self, model: str) -> Any:
        c = self.config
        policy = load(model, dtype=c.dtype, fp32_head=c.fp32_head, share_prompts=self.share_prompts)
        policy = policy.requires_grad_(False).eval()
        policy.ulysses = self.policy.ulysses
        if c.trainer.zero_stage == 3:
            # It was loaded in shards, like the policy; an engine without optimizer gathers them layer by layer.
            return deepspeed.initialize(model=policy, config=deepspeed_settings(c), dist_init_required=False)[0]
        return policy.to(self.device)

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> dict[str, float]:
        """All optimizer steps of one batch. Returns its metrics, the same on every rank."""
        c, objective = self.config, self.objective
        rows = torch.arange(len(batch.rewards))
        several = c.trainer.epochs * c.trainer.minibatches > 1
        if self.old_logprobs == "rollout":
            batch = replace(batch, old_logprobs=batch.rollout_logprobs)
        asked = several or objective.needs_old_logprobs
        if objective.uses_values or (asked and self.old_logprobs == "recompute"):
            with self.memory.during("old_logprobs"):
                before = self._forward_all(self.engine, batch, rows)
            if self.old_logprobs == "recompute":
                batch = replace(batch, old_logprobs=before.logprobs)
            batch = replace(batch, values=before.values)
        if objective.needs_reference:
            with self.memory.during("reference"):
                batch = replace(batch, ref_logprobs=self._ask_reference(batch, rows))
        batch, advantages = prepare(objective, batch)
        meter, grad_norms = Meter(), []
        for epoch in range(c.trainer.epochs):
            order = rows if not several else rows[torch.randperm(len(rows), generator=self._shuffle(epoch))]
            for part in order.tensor_split(c.trainer.minibatches):
                grad_norms.append(self._optimizer_step(batch, advantages, part, meter))
        for name, gib in self.memory.report().items():
            meter.merge_one(name, gib, 1)
        metrics = finish(self._merged(meter).means())
        trained = metrics.pop("perf/trained_tokens_count")
        metrics |= {"perf/trained_tokens": trained} | self._ideal(trained)
        rates = self.engine.get_lr()
        metrics |= {"actor/grad_norm": sum(grad_norms) / len(grad_norms), "actor/lr": rates[0]}
        if objective.uses_values:
            metrics["critic/lr"] = rates[-1]
        metrics |= {f"actor/{name}": coef for name, coef in coefficients(objective).items()}
        self.objective = next_objective(objective, metrics)
        return metrics

    def _shuffle(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.engine.global_steps * 101 + epoch)

    def _optimizer_step(self, batch: Batch, advantages: Tensor, rows: Tensor, meter: Meter) -> float:
        c, objective = self.config, self.objective
        totals = Totals(tokens=int(batch.mask[rows].sum()), sequences=len(rows), horizon=c.rollout.max_tokens)
        self.policy.tokens.zero_()
        live = rows
        if c.trainer.skip_zero_advantage and objective.may_skip:
            # Their loss still counts in the denominators, so leaving the rows out changes no gradient.
            live = rows[advantages[rows].any(dim=1)]
            live = live if len(live) else rows[:1]
        with self.memory.during("gradients"):
            for micro in self._mine(batch, live):
                self._accumulate(batch, advantages, micro, totals, meter)
        meter.merge_one("actor/loss", 0.0, 1.0 / self.ranks)
        needed, computed = self.policy.tokens.tolist() if self.speaks else (0, 0)
        meter.merge_one("perf/useful_tokens_frac", needed, computed)
        meter.merge_one("perf/trained_tokens_count", needed, 1)
        with self.memory.during("optimizer"):
            self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm is {grad_norm} at optimizer step {self.engine.global_steps}: the weights are no "
                "longer to be trusted. Look at rollout_corr/* and actor/* of the last steps; lower trainer.lr"
            )
        return grad_norm

    def _accumulate(self, batch: Batch, advantages: Tensor, micro: Tensor, totals: Totals, meter: Meter) -> None:
        """Add the gradient of a micro-batch's part of the step's loss."""
        c, objective = self.config, self.objective
        warming_up = self.engine.global_steps < objective.critic_warmup
        part = take(batch, micro).to_device(self.device)
        policy = self.engine(
            part.input_ids, part.mask, c.temperature, c.rollout.truncation, part.support, head_alone=warming_up
        )
        if warming_up:
            policy = critic_alone(policy)
        part_advantages = torch.zeros_like(policy.logprobs)
        part_advantages[: len(micro)] = advantages[micro, : part.mask.shape[1]].to(self.device)
        old_is_rollout = self.old_logprobs == "rollout"
        loss, metrics = full_loss(objective, c.correction, policy, part, part_advantages, old_is_rollout=old_is_rollout)
        weights = loss_weights(part.mask, objective.average_over, totals)
        # A bare product would carry an infinity from outside the mask as 0 * inf. DeepSpeed averages over ranks.
        total = torch.where(part.mask, loss * weights, 0.0).sum() * self.ranks
        self.engine.backward(total)
        if self.speaks:
            meter.add(metrics, part.mask)
            # Each lot holds a part of the step's loss: the parts add up, and all ranks together count once.
            meter.merge_one("actor/loss", float(total.detach()) / self.ranks, 0.0)

    def _ideal(self, tokens: float) -> dict[str, float]:
        """Seconds that learning from so many tokens would take at the accelerators' peak; nothing if that is unknown.

        6 FLOPs per parameter and token (arXiv 2001.08361, section 2.1); a table of embeddings multiplies nothing.
        """
        peak = peak_of(self.device)
        text = self.policy.hf.config.get_text_config()
        table = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
        parameters = sum(math.prod(m.shape) for m in self.weights.metadata()) - table
        return {} if peak is None else {"perf/ideal_learn_s": 6.0 * parameters * tokens / (peak * self.ranks)}

    def _mine(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        cut = micro_batches(
            batch,
            rows,
            ranks=self.lots,
            budget=self.config.trainer.micro_batch_tokens,
            share_prompts=self.policy.share_prompts,
            packed=self.policy.packs,
            features=self.policy.hf.config.get_text_config().hidden_size,
        )
        return cut[self.lot]

    def _merged(self, meter: Meter) -> Meter:
        meters: list[Any] = [None] * self.ranks
        dist.all_gather_object(meters, meter)
        merged = Meter()
        for each in meters:
            merged.merge(each)
        return merged

    # -- asking --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward_all(self, model: Any, batch: Batch, rows: Tensor) -> PolicyOutput:
        """A policy's answer to every row, [B, T] on CPU and the same on all ranks."""
        out = {name: torch.zeros(batch.mask.shape) for name in ("logprobs", "entropy", "values")}
        for micro in self._mine(batch, rows):
            part = take(batch, micro).to_device(self.device)
            answer: PolicyOutput = model(
                part.input_ids, part.mask, self.config.temperature, self.config.rollout.truncation, part.support
            )
            for name, full in out.items():
                value = getattr(answer, name)
                if value is not None and len(micro) and self.speaks:
                    full[micro, : value.shape[1]] = value.cpu()
        for full in out.values():
            # Each row was filled in by one rank and is 0 on the others.
            moved = full.to(self.device)
            dist.all_reduce(moved)
            full.copy_(moved)
        return PolicyOutput(**out)

    def _ask_reference(self, batch: Batch, rows: Tensor) -> Tensor:
        if self.reference is not None:
            return self._forward_all(self.reference, batch, rows).logprobs
        with lora.switched_off(self.policy.hf):
            return self._forward_all(self.engine, batch, rows).logprobs

    def logprobs(self, batch: Batch) -> Tensor:
        """What the trainer says now about a batch's tokens: [B, T] in nats, on CPU."""
        return self._forward_all(self.engine, batch, torch.arange(len(batch.rewards))).logprobs

    def logprobs_and_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same, and the entropy of the distribution at each token: [B, T] in nats each, on CPU."""
        said = self.answer(batch)
        assert said.entropy is not None
        return said.logprobs, said.entropy

    def answer(self, batch: Batch) -> PolicyOutput:
        """The policy's answer of now: [B, T] each, on CPU; `values` None without a critic."""
        said = self._forward_all(self.engine, batch, torch.arange(len(batch.rewards)))
        return said if self.objective.uses_values else replace(said, values=None)

    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """The frozen start model's log-probabilities [B, T] in nats, on CPU; None where the objective needs none."""
        rows = torch.arange(len(batch.rewards))
        return self._ask_reference(batch, rows) if self.objective.needs_reference else None

    # -- examining -----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What this learner really runs with."""
        hf = self.policy.hf
        return {
            "dtype": str(next(hf.get_decoder().parameters()).dtype).removeprefix("torch."),
            "head_dtype": "float32" if self.head.fp32 else str(self.head.weight.dtype).removeprefix("torch."),
            "tied": bool(hf.config.get_text_config().tie_word_embeddings),
            "temperature": self.config.temperature,
            "truncation": self.config.rollout.truncation,
        }

    def digests(self) -> dict[str, str]:
        """Digest of every weight as it is now, by name."""
        return {name: digest(tensor) for name, tensor in self.weights}

    def layer_errors(self, trace: dict[str, Any]) -> tuple[list[LayerError], list[str]]:
        """How far every layer of an engine is from ours: see `trainer.learner.layers`."""
        with torch.no_grad():
            return layer_errors(self.policy.hf, self.head, trace, sharded=self.weights.sharded)

    @torch.no_grad()
    def explain(self, batch: Batch) -> list[Hypothesis]:
        """Guesses about an engine's sampler from what it said about a batch, best first: `trainer.learner.explain`."""
        batch, sharded = batch.to_device(self.device), self.weights.sharded
        shared, self.policy.ulysses = self.policy.ulysses, None  # every rank by itself, for it needs all logits
        try:
            return explain_batch(self.engine, self.head, batch, self.config, sharded)
        finally:
            self.policy.ulysses = shared

    def perturb(self, bit: int) -> None:
        """Change a random half of all weights by 2^-bit of their size, for an update that shows; again undoes it."""
        self.weights.flip(bit)

    def use_old_logprobs(self, source: Literal["recompute", "rollout"]) -> None:
        """Settle `Config.old_logprobs="auto"`."""
        self.old_logprobs = source

    # -- weights -------------------------------------------------------------------------------------------------

    def names(self) -> set[str]:
        """Names that an update will bring."""
        return {m.name for m in self.weights.metadata()}

    def publish(self, version: int, digesting: bool) -> WeightManifest:
        """Send the weights of now to every engine."""
        assert self.send is not None, "the weight channel is not open"
        self.weights.digesting = digesting
        with self.memory.during("weight_sync"):
            self.send(version)
        return self.weights.manifest(version)

    def export(self, folder: str) -> None:
        """Save the model as safetensors that transformers and vLLM load; the tokenizer is the driver's to add."""
        # Every rank takes part in gathering; one keeps what is gathered.
        tensors = {name: tensor.cpu() for name, tensor in self.weights if self.rank == 0}
        if self.rank == 0:
            from safetensors.torch import save_file

            os.makedirs(folder, exist_ok=True)
            save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
            self.policy.hf.config.save_pretrained(folder)

        adapters = [p for layer in self.weights.adapted.values() for p in lora.adapter_parameters(layer)]
        with deepspeed.zero.GatheredParameters(adapters, enabled=self.weights.sharded):
            if adapters and self.rank == 0:
                lora.save_adapter(self.policy.hf, self.config.model, Path(folder, "adapter"))

    @cached_property
    def base(self) -> str:
        """What adapters belong to: a digest of all weights below them; "" where all weights are trained."""
        if not self.config.trainer.lora.rank:
            return ""
        with lora.switched_off(self.policy.hf):
            return sha256(json.dumps(self.digests()).encode()).hexdigest()

    def save_state(self, folder: str) -> None:
        """Write all that another learner needs to go on: see `trainer.learner.state`."""
        state.save(self.engine, Path(folder), coefs=coefficients(self.objective), base=self.base)

    def load_state(self, folder: str) -> None:
        """Go on where the learner that wrote it was."""
        saved = state.load(self.engine, Path(folder), base=self.base)
        moving = coefficients(self.objective)
        self.objective = replace(self.objective, **{name: saved.get(name, now) for name, now in moving.items()})

    def peak_memory_gib(self) -> float:
        """Highest memory of this rank so far: see `PeakMemory`. 0 where it is not known."""
        with self.memory.during("now"):
            return self.memory.highest


def shares_prompts(config: Config, device: str) -> bool:
    """Whether a group's prompt is computed once; by default on CPU, for CUDA's varlen kernel wants rows apart."""
    return device == "cpu" if config.trainer.share_prompts is None else config.trainer.share_prompts


def join_group(rank: int, ranks: int, device: str, address: str, port: int, timeout_s: float) -> None:
    """Set up torch.distributed ourselves: without `device_id`, which can hang beside a second group."""
    os.environ |= {
        "DS_ACCELERATOR": device,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
