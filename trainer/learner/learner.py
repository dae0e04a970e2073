"""What an actor hosts: one DeepSpeed rank of the learner, put together from its parts."""

import os
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rl.config import Config, Deadlines
from rl.episodes.seen import Seen
from rl.objectives.adaptive import coefficients
from rl.parity.draws import Draws
from rl.parity.evidence import LayerError, PartError, WitnessEvidence
from rl.sampling.truncation import Truncation
from rl.types import Batch, PolicyOutput
from rl.weights import WeightManifest
from trainer.learner import closer, examine, export, state
from trainer.learner.deepspeed_engine import OnHost, deepspeed_engine
from trainer.learner.memory_meter import PeakMemory, Span
from trainer.learner.passes import Passes, shares_prompts
from trainer.learner.rank import make_rank
from trainer.learner.step import Stepper
from trainer.model.forbidden import load_forbidden
from trainer.model.own_forward import check_own_forward

# MKL chooses its kernels at a process's first call, which must be made by one thread: see rollout/worker.py.
torch.ones(1).cos()


class Sender(Protocol):
    """The trainer's end of the weight channel, on every rank."""

    def send(self, version: int) -> None:
        """Give every engine the learner's current weights as `version`. A collective over all ranks."""
        ...


class Learner:
    """One rank. Every method is called on all ranks at once."""

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        device: str,
        address: str,
        port: int,
        model: str,
        threads: int = 1,
        listener: int | None = None,
    ) -> None:
        """The ranks meet at rank 0's `address` and `port`, where its socket `listener` (a file descriptor, which the
        learner takes over) listens already. Without a listener rank 0 binds `port`; 0 means a free one."""
        torch.set_num_threads(threads)
        memory = PeakMemory(torch.device(device))
        torch.manual_seed(config.seed)
        join_group(rank, config.trainer.ranks, device, address, port, config.deadlines, listener)
        engine = deepspeed_engine(config, model, device, share_prompts=shares_prompts(config, device))
        self.parts = make_rank(config, rank=rank, engine=engine, memory=memory)
        check_own_forward(self.parts.policy, engine, name=config.model, dtype=config.dtype, device=self.parts.device)
        self.parts.policy.forbidden = load_forbidden(config, model)
        self.passes = Passes(self.parts, model)
        self.stepper = Stepper(self.parts, self.passes)
        self.config, self.rank, self.weights, self.model = config, rank, self.parts.weights, model
        self.sender: Sender | None = None
        self.states = OnHost(engine) if config.rollout.sleep else nullcontext()

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> dict[str, float]:
        """Take all optimizer steps of one batch. Returns its metrics, the same on every rank."""
        with self.states:
            return self.stepper.step(batch)

    def told(self) -> tuple[Seen | None, list[Span]]:
        """What the last step's passes gave on this rank, and how long its phases took; None where nothing is kept."""
        watching, self.stepper.watching = self.stepper.watching, None
        return watching.seen() if watching else None, self.parts.memory.take_spans()

    def use_old_logprobs(self, source: Literal["recompute", "rollout"]) -> None:
        """Decide what `Config.old_logprobs="auto"` means."""
        self.stepper.old_logprobs = source

    def peak_memory_gib(self) -> float:
        """Highest memory of this rank so far: see `PeakMemory`. 0 where it is not known."""
        with self.parts.memory.during("now"):
            return self.parts.memory.highest

    def free_cache(self) -> None:
        """Give the GPU memory back that torch keeps for later."""
        torch.cuda.empty_cache()

    # -- forward passes ------------------------------------------------------------------------------------------

    def logprobs(self, batch: Batch) -> Tensor:
        """The current policy's log-probabilities of a batch's tokens: [B, T] in nats, on CPU."""
        return self.passes.policy(batch).logprobs

    def answer(self, batch: Batch) -> PolicyOutput:
        """The current policy's output: [B, T] each, on CPU; `values` is None without a critic."""
        output = self.passes.policy(batch)
        return output if self.stepper.objective.uses_values else replace(output, values=None)

    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """The frozen start model's log-probabilities [B, T] in nats, on CPU; None where the objective needs none."""
        return self.passes.reference_logprobs(batch) if self.stepper.objective.needs_reference else None

    # -- the doctor's questions ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The settings that this learner computes log-probabilities with."""
        return examine.describe(self.parts)

    def digests(self) -> dict[str, str]:
        """Digest of every current weight by name."""
        return examine.digests(self.weights)

    def compare_layers(self, trace: dict[str, Any]) -> tuple[list[LayerError], list[PartError], list[str]]:
        """Errors of an engine's layers and between them, and the layers that the learner lacks."""
        return examine.compare_layers(self.parts, trace)

    def own_routing(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """Log-probabilities when every router chooses for itself, and how often it chooses otherwise than the engine's:
        tokens, of how many, pairs of token and router, of how many."""
        return self.passes.own_routing(batch)

    @torch.no_grad()
    def sampled(self, batch: Batch, stop_ids: list[int], cut: Truncation | None) -> tuple[Tensor, Tensor, Draws | None]:
        """Log-probabilities and entropy of sampled tokens, [B, T] in nats each, on CPU, and whether the tokens are
        draws from this learner's distribution."""
        output, drawn = closer.sampled(self.parts, self.passes, batch, stop_ids, cut)
        assert output.entropy is not None
        return output.logprobs, output.entropy, drawn

    @torch.no_grad()
    def witness(self, batch: Batch, temperature: float, cut: Truncation | None) -> WitnessEvidence:
        """Which side is at fault? Temperature and cuts come from the run's settings, not from this learner's."""
        return closer.witnessed(self.parts, self.passes, self.model, batch, temperature, cut)

    def perturb(self, bit: int) -> None:
        """Change a random half of all weights by 2^-bit of their size; calling it again restores them exactly."""
        self.weights.flip(bit)

    # -- weights -------------------------------------------------------------------------------------------------

    def connect(self, sender: Sender) -> None:
        """Take the open weight channel, which `publish` sends through."""
        self.sender = sender

    def names(self) -> set[str]:
        """Names of the tensors that an update brings."""
        return {m.name for m in self.weights.metadata()}

    def publish(self, version: int, digesting: bool) -> WeightManifest:
        """Send the current weights to every engine."""
        assert self.sender is not None, "the weight channel is not open"
        self.weights.digesting = digesting
        with self.parts.memory.during("weight_sync"):
            self.sender.send(version)
        return self.weights.manifest(version)

    def export(self, folder: str) -> None:
        """Save the model as safetensors that transformers and vLLM load; the driver adds the tokenizer."""
        export.export(self.parts, folder)

    @cached_property
    def base(self) -> str:
        """Digest of the weights below the adapters; "" where all weights are trained."""
        return export.base_digest(self.parts)

    def save_state(self, folder: str) -> None:
        """Write all that another learner needs to continue: see `trainer.learner.state`."""
        coefs = coefficients(self.stepper.objective)
        state.save(self.parts.engine, Path(folder), coefs=coefs, base=self.base)

    def load_state(self, folder: str) -> None:
        """Continue from the state that another learner wrote."""
        saved = state.load(self.parts.engine, Path(folder), base=self.base)
        current = coefficients(self.stepper.objective)
        restored = {name: saved.get(name, value) for name, value in current.items()}
        self.stepper.objective = replace(self.stepper.objective, **restored)


def join_group(
    rank: int, ranks: int, device: str, address: str, port: int, deadlines: Deadlines, listener: int | None = None
) -> None:
    """Set up torch.distributed ourselves: without `device_id`, which can hang next to a second group."""
    timeout = timedelta(seconds=deadlines.start_s)
    store = dist.TCPStore(address, port, ranks, is_master=rank == 0, timeout=timeout, master_listen_fd=listener)
    os.environ |= {
        "DS_ACCELERATOR": device,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(store.port),
    }
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=ranks,
        # After this torch ends the process, so the driver's own deadlines, which say what is late, come first.
        timeout=timedelta(seconds=60 + max(deadlines.start_s, deadlines.step_s, deadlines.sync_s)),
    )
