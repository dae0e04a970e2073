"""One DeepSpeed rank: turns a step's batch into an optimizer step that no split over ranks can change."""

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rl.batch import micro_batches, take
from rl.config import Config
from rl.evidence import LayerError
from rl.hypotheses import Hypothesis
from rl.loss import finish, full_loss
from rl.reduce import Meter, Totals, loss_weights
from rl.types import Batch, PolicyOutput
from rl.weights import WeightManifest, digest
from trainer.explain import explain_batch
from trainer.head import LogprobHead
from trainer.model import Policy, load
from trainer.trace import layer_errors
from trainer.weights import LearnerWeights


class Learner:
    """Hosted by one actor per rank; every method is called on all ranks at once."""

    def __init__(
        self, config: Config, *, rank: int, device: str, address: str, port: int, model: str, threads: int = 1
    ) -> None:
        self.config, self.rank, self.ranks = config, rank, config.trainer.ranks
        self.device = torch.device(device)
        if device == "cpu":
            torch.set_num_threads(threads)
        self.share_prompts = shares_prompts(config, device)
        torch.manual_seed(config.seed)
        join_group(rank, self.ranks, device, address, port, config.deadlines.start_s)
        self.engine = deepspeed_engine(config, model, device)
        self.policy: Policy = self.engine.module
        self.reference = self._reference(model) if config.objective.kl_coef else None
        self.weights = LearnerWeights(self.policy.hf, sharded=config.trainer.zero_stage == 3)
        self.head: LogprobHead = self.policy.hf.get_output_embeddings()
        self.old_logprobs = "recompute" if config.old_logprobs == "auto" else config.old_logprobs
        self.send: Callable[[int], None] | None = None
        """Sends `weights` as a version; set by whoever opens the weight channel."""

    def _reference(self, model: str) -> Any:
        c = self.config
        policy = load(model, dtype=c.dtype, fp32_head=c.fp32_head, share_prompts=self.share_prompts)
        policy = policy.requires_grad_(False).eval()
        if c.trainer.zero_stage == 3:
            import deepspeed

            # It was loaded in shards, like the policy; an engine without optimizer gathers them layer by layer.
            return deepspeed.initialize(model=policy, config=deepspeed_settings(c), dist_init_required=False)[0]
        return policy.to(self.device)

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> dict[str, float]:
        """All optimizer steps of one batch. Returns its metrics, the same on every rank."""
        c, objective = self.config, self.config.objective
        rows = torch.arange(len(batch.rewards))
        several = c.trainer.epochs * c.trainer.minibatches > 1
        if self.old_logprobs == "rollout":
            batch = replace(batch, old_logprobs=batch.rollout_logprobs)
        if objective.uses_values or (several and self.old_logprobs == "recompute"):
            before = self._forward_all(self.engine, batch, rows)
            if self.old_logprobs == "recompute":
                batch = replace(batch, old_logprobs=before.logprobs)
            batch = replace(batch, values=before.values)
        if self.reference is not None:
            batch = replace(batch, ref_logprobs=self._forward_all(self.reference, batch, rows).logprobs)
        advantages = objective.advantages(batch) * batch.mask
        meter, grad_norms = Meter(), []
        for epoch in range(c.trainer.epochs):
            order = rows if not several else rows[torch.randperm(len(rows), generator=self._shuffle(epoch))]
            for part in order.chunk(c.trainer.minibatches):
                grad_norms.append(self._optimizer_step(batch, advantages, part, meter))
        metrics = finish(self._merged(meter).means())
        metrics |= {"actor/grad_norm": sum(grad_norms) / len(grad_norms), "actor/lr": self.engine.get_lr()[0]}
        return metrics

    def _shuffle(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.engine.global_steps * 101 + epoch)

    def _optimizer_step(self, batch: Batch, advantages: Tensor, rows: Tensor, meter: Meter) -> float:
        c, objective = self.config, self.config.objective
        totals = Totals(tokens=int(batch.mask[rows].sum()), sequences=len(rows), horizon=c.rollout.max_tokens)
        live = rows
        if c.trainer.skip_zero_advantage and not (objective.kl_coef or objective.entropy_coef or objective.uses_values):
            # Their loss still counts in the denominators, so leaving the rows out changes no gradient.
            live = rows[advantages[rows].any(dim=1)]
            live = live if len(live) else rows[:1]
        for micro in self._mine(batch, live):
            part = take(batch, micro).to_device(self.device)
            policy = self.engine(part.input_ids, part.mask, c.temperature, c.rollout.truncation, part.support)
            part_advantages = torch.zeros_like(policy.logprobs)
            part_advantages[: len(micro)] = advantages[micro, : part.mask.shape[1]].to(self.device)
            engine_is_old = self.old_logprobs == "rollout"
            loss, metrics = full_loss(
                objective, c.correction, policy, part, part_advantages, engine_is_old=engine_is_old
            )
            weights = loss_weights(part.mask, objective.average_over, totals)
            # A bare product would carry an infinity from outside the mask as 0 * inf. DeepSpeed averages over ranks.
            total = torch.where(part.mask, loss * weights, 0.0).sum() * self.ranks
            self.engine.backward(total)
            meter.add(metrics, part.mask)
            # Each rank holds a part of the step's loss: the parts add up, and all ranks together count once.
            meter.merge_one("actor/loss", float(total.detach()) / self.ranks, 0.0)
        meter.merge_one("actor/loss", 0.0, 1.0 / self.ranks)
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm is {grad_norm} at optimizer step {self.engine.global_steps}: the weights are no "
                "longer to be trusted. Look at rollout_corr/* and actor/* of the last steps; lower trainer.lr"
            )
        return grad_norm

    def _mine(self, batch: Batch, rows: Tensor) -> list[Tensor]:
        budget = self.config.trainer.micro_batch_tokens
        cut = micro_batches(batch, rows, ranks=self.ranks, budget=budget, share_prompts=self.share_prompts)
        return cut[self.rank]

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
                if value is not None and len(micro):
                    full[micro, : value.shape[1]] = value.cpu()
        for full in out.values():
            # Each row was filled in by one rank and is 0 on the others.
            moved = full.to(self.device)
            dist.all_reduce(moved)
            full.copy_(moved)
        return PolicyOutput(**out)

    def logprobs(self, batch: Batch) -> Tensor:
        """What the trainer says now about a batch's tokens: [B, T] in nats, on CPU."""
        return self._forward_all(self.engine, batch, torch.arange(len(batch.rewards))).logprobs

    def logprobs_and_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same, and the entropy of the distribution at each token: [B, T] in nats each, on CPU."""
        said = self._forward_all(self.engine, batch, torch.arange(len(batch.rewards)))
        assert said.entropy is not None
        return said.logprobs, said.entropy

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
        """How far every layer of an engine is from ours: see `trainer.trace`."""
        with torch.no_grad():
            return layer_errors(self.policy.hf, self.head, trace, sharded=self.weights.sharded)

    @torch.no_grad()
    def explain(self, batch: Batch) -> list[Hypothesis]:
        """Guesses about an engine's sampler from what it said about a batch, best first: see `trainer.explain`."""
        batch, sharded = batch.to_device(self.device), self.weights.sharded
        return explain_batch(self.engine, self.head, batch, self.config, sharded)

    def disturb(self, bit: int) -> None:
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
        self.send(version)
        return self.weights.manifest(version)

    def export(self, folder: str) -> None:
        """Save the model as safetensors that transformers and vLLM load; the tokenizer is the driver's to add."""
        tensors = {name: tensor.cpu() for name, tensor in self.weights}
        if self.rank == 0:
            from safetensors.torch import save_file

            os.makedirs(folder, exist_ok=True)
            save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
            self.policy.hf.config.save_pretrained(folder)

    def peak_memory_gib(self) -> float:
        """Highest memory of this rank so far: of the GPU, or the process's resident set on CPU. GiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def shares_prompts(config: Config, device: str) -> bool:
    """Whether a group's prompt is computed once; by default on CPU, where it saves most and long masks are rare."""
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


def deepspeed_engine(config: Config, model: str, device: str) -> Any:
    """DeepSpeed around the policy, with the settings that agree with plain torch (stage 0 does not)."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    if device == "cpu":
        # Would compile a C++ operator for minutes that only inference uses; a killed compile leaves a lock that
        # hangs every later run. (`import deepspeed.comm.torch` would bind the real torch.)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    t = config.trainer
    settings = deepspeed_settings(config)
    sharding = HfDeepSpeedConfig(settings) if t.zero_stage == 3 else None
    policy = load(
        model,
        dtype=config.dtype,
        fp32_head=config.fp32_head,
        share_prompts=shares_prompts(config, device),
        with_values=config.objective.uses_values,
        checkpointing=t.gradient_checkpointing,
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=t.lr, betas=t.betas, weight_decay=t.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(config, step))
    engine, *_ = deepspeed.initialize(
        model=policy, optimizer=optimizer, lr_scheduler=scheduler, config=settings, dist_init_required=False
    )
    engine.hf_deepspeed_config = sharding  # transformers keeps only a weak reference
    return engine


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    t = config.trainer
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": t.max_grad_norm,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": t.zero_stage},
        "steps_per_print": 10**9,
    }
    if config.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True}
    if t.zero_stage == 3:
        # zero.Init would round the rotary embedding's inverse frequencies to bf16, without a word.
        settings["data_types"]["keep_in_fp32_modules"] = ["inv_freq"]
    return settings


def lr_factor(config: Config, step: int) -> float:
    """Learning rate over its peak at optimizer step `step` (from 0)."""
    t = config.trainer
    total = config.steps * t.epochs * t.minibatches
    if step < t.warmup_steps:
        return (step + 1) / t.warmup_steps
    done = min(1.0, (step - t.warmup_steps) / max(total - t.warmup_steps, 1))
    if t.lr_schedule == "linear":
        return 1.0 - done
    if t.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0
