"""What do the policy and the reference give for a batch? Forward passes, split over the ranks and merged again."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from rl.batch import integers, micro_batches, take, trained_rows
from rl.config import Config
from rl.types import Batch, PolicyOutput
from trainer.learner.deepspeed_engine import deepspeed_settings
from trainer.learner.rank import Rank
from trainer.model import lora
from trainer.model.answer import Answer
from trainer.model.policy import load


class Passes:
    """Forward passes over whole batches; every method is a collective over all ranks."""

    def __init__(self, rank: Rank, model: str) -> None:
        """`model` is the start model, of which the reference is a frozen copy."""
        self.rank = rank
        needed = rank.config.objective.needs_reference and not rank.config.trainer.lora.rank
        self.reference = load_reference(rank, model) if needed else None
        """A model of its own. With adapters it is None: the policy with its adapters off is the reference."""

    @torch.no_grad()
    def policy(self, batch: Batch, model: Any = None) -> PolicyOutput:
        """The current policy's output (or that of `model`) for every row: [B, T] on CPU, the same on all ranks."""
        r = self.rank
        model = r.engine if model is None else model
        out = {name: torch.zeros(batch.mask.shape) for name in ("logprobs", "entropy", "values")}
        for micro in own_micro_batches(r, batch, trained_rows(batch)):
            part = take(batch, micro).to_device(r.device)
            output: Answer = model(
                part.input_ids,
                part.mask,
                r.config.temperature,
                r.config.rollout.truncation,
                part.support,
                experts=part.experts,
            )
            for name, full in out.items():
                value = getattr(output, name)
                if value is not None and len(micro) and r.is_dp_leader:
                    full[micro, : value.shape[1]] = value.cpu()
        for full in out.values():
            # One rank filled in each row; the row is 0 on the other ranks.
            moved = full.to(r.device)
            dist.all_reduce(moved)
            full.copy_(moved)
        return PolicyOutput(**out)

    def own_routing(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """The policy's log-probabilities when every router chooses for itself, [B, T] in nats, and the `counts` of
        `RouterReplay`, over all ranks."""
        replay = self.rank.policy.replay
        assert replay is not None, "this family's routers are not known"
        replay.counts.zero_()
        with replay.counting():
            logprobs = self.policy(batch).logprobs
        dist.all_reduce(replay.counts)
        return logprobs, integers(replay.counts)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The frozen start model's log-probabilities: [B, T] in nats, on CPU."""
        if self.reference is not None:
            return self.policy(batch, self.reference).logprobs
        with lora.switched_off(self.rank.policy.hf):
            return self.policy(batch).logprobs


def own_micro_batches(rank: Rank, batch: Batch, rows: Tensor) -> list[Tensor]:
    """The micro-batches of `rows` (row indices) that this rank computes."""
    cut = micro_batches(
        batch,
        rows,
        ranks=rank.dp_size,
        budget=rank.config.trainer.tokens_per_pass(rank.device.type),
        share_prompts=rank.policy.share_prompts,
        packed=rank.policy.packs,
        features=rank.policy.hf.config.get_text_config().hidden_size,
    )
    return cut[rank.dp_rank]


def load_reference(rank: Rank, model: str) -> Any:
    """A frozen copy of the start model, with the policy's dtype, head and attention."""
    c = rank.config
    share_prompts = shares_prompts(c, rank.device.type)
    code = c.trust_remote_code
    policy = load(model, dtype=c.dtype, fp32_head=c.fp32_head, share_prompts=share_prompts, trust_remote_code=code)
    policy = policy.requires_grad_(False).eval()
    policy.ulysses, policy.forbidden = rank.policy.ulysses, rank.policy.forbidden
    if c.trainer.zero_stage == 3:
        # It was loaded in shards, like the policy; an engine without optimizer gathers them layer by layer.
        return deepspeed.initialize(model=policy, config=deepspeed_settings(c), dist_init_required=False)[0]
    return policy.to(rank.device)


def shares_prompts(config: Config, device: str) -> bool:
    """Whether a group's prompt is computed once. Default: on CPU only; CUDA's varlen kernel needs rows apart."""
    return device == "cpu" if config.trainer.share_prompts is None else config.trainer.share_prompts
