"""Does the run fit? Required and available memory by component, in GiB."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rl.config import Config
from rl.weights import SMALLEST_BUFFER
from trainer import machine
from trainer.cluster.placement import Placement, reward_models_of
from trainer.model.head import chunk_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
PROCESS = {"cpu": {"learner rank": 0.4, "engine": 1.4}, "cuda": {"learner rank": 0.8, "engine": 1.2}}
"""Libraries and working memory, on a GPU also its context, before any weight. Those of CPU were measured with
scripts/bench/peak_memory.py; those of CUDA are guesses."""
NCCL = 1.0
"""Buffers of NCCL in each process, on several GPUs; a guess, too."""
REDUCED = 500_000_000
"""Most elements that DeepSpeed sums over the ranks at a time, in a buffer that it has under ZeRO 1 and 2."""
BESIDE = "engine, next to its share of the GPU"
"""A place: `gpu_memory_utilization` does not hold what an update needs."""
SAMPLING, UPDATING = "learner rank, while the engine samples", "GPU, in an update"
"""Places of a run whose engine and learner take turns. Asleep, an engine keeps its process."""
DRIVER = 1.0
"""The driver, Ray's own processes, and pages of files; measured in the same way."""
Needs = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model that decide its memory."""

    parameters: int
    layers: int
    hidden: int
    inner: int
    """Features inside an MLP."""
    vocabulary: int
    adapted: int
    """Parameters of adapters of rank 1: inputs plus outputs of every linear layer except the head."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one run needs and what there is: GiB by place ("learner rank", "engine", "host")."""

    shape: Shape
    required: Needs
    available: dict[str, float]

    def check(self, config: Config) -> None:
        """Raise ValueError, with what would help, for the first place that is too small."""
        if os.environ.get("UNISON_IGNORE_MEMORY"):
            return
        for place, parts in self.required.items():
            if sum(parts.values()) <= self.available[place]:
                continue
            # On GPUs an update needs room on both sides; where they share one, all of it is the learner's.
            shared = "weights under way" in self.required.get("learner rank", {}) and BESIDE not in self.required
            helps = remedies(config, place, shared=shared)
            listed = ", ".join(f"{what} {gib:.2f}" for what, gib in sorted(parts.items(), key=lambda p: -p[1]))
            raise ValueError(
                f"this run does not fit: the {place} needs {sum(parts.values()):.1f} GiB ({listed}), and "
                f"{self.available[place]:.1f} are available. What would help: {'; '.join(helps)}. "
                "UNISON_IGNORE_MEMORY=1 starts the run without this check"
            )

    def rows(self) -> list[tuple[str, str]]:
        """For the terminal: each place with its sum, then its components."""
        lines = []
        for place, parts in self.required.items():
            of = f" of {self.available[place]:.1f}" if math.isfinite(self.available[place]) else ""
            lines.append((f"memory: {place}", f"{sum(parts.values()):.2f}{of} GiB"))
            lines += [(f"  {what}", f"{gib:.2f}") for what, gib in parts.items()]
        return lines


def shape_of(model: "PreTrainedModel") -> Shape:
    """Sizes of a model, which may be without weights."""
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=max((m.out_features for m in linear), default=4 * text.hidden_size),
        vocabulary=text.vocab_size,
        adapted=sum(m.in_features + m.out_features for m in linear),
    )


def add_reward_models(needs: Needs, config: Config, device: str, parameters: Mapping[str, int]) -> None:
    """Add the GiB of each reward model, given its parameters by name; on CPU those of the host too."""
    for judge in reward_models_of(config):
        own = {"weights": {"bfloat16": 2, "float32": 4}[judge.dtype] * parameters[judge.label] / GIB}
        own |= {"KV cache": judge.kv_cache_gib} if device == "cpu" else {}
        own |= {"process": PROCESS[device]["engine"]}
        needs[f"reward model {judge.label}"] = own
        needs["host"][f"reward model {judge.label}"] = sum(own.values()) if device == "cpu" else own["process"]


def required_memory(config: Config, placement: Placement, shape: Shape) -> Needs:
    """GiB by place and component; on CPU those of the host are the sum over all processes.

    Activations: size * tokens * layers * (12 hidden + 4 inner), or with gradient checkpointing size * tokens * hidden
    for each layer and one layer in full; tokens are `longest_pass`, over the ranks that share a row. Head: two
    [chunk, vocabulary] in fp32, the head's weight in fp32 and its gradient; in bf16 on a GPU no copy of the weight, but
    the chunk's gradient as two bf16 tensors.
    """
    t, size, s = config.trainer, {"bfloat16": 2, "float32": 4}[config.dtype], shape
    optimizer, gradients, weights = (t.ranks if t.zero_stage >= stage else 1 for stage in (1, 2, 3))
    adapters = t.lora.rank * s.adapted
    trained, offloaded = adapters or s.parameters, t.offload == "optimizer"
    # Without shards torch's Adam works on the fp32 weights; bf16 gradients are kept next to their fp32 sums.
    states, sums = (12 if t.zero_stage else 8) * trained, (6 if size == 2 and t.zero_stage == 1 else 4) * trained
    # With offload DeepSpeed keeps fp32 gradients and a copy of the weights there, too.
    copies = 8 if t.zero_stage == 3 else 4 + size + (4 if size == 4 and t.zero_stage == 2 else 0)
    layer = 12 * s.hidden + 4 * s.inner
    kept = s.layers * s.hidden + layer if t.gradient_checkpointing else s.layers * layer
    tokens = -(-longest_pass(config, placement.device) // t.sequence_parallel)
    sampled = config.prompts_per_step * config.group_size * config.horizon
    chunk = min(chunk_of(placement.device), tokens, sampled)
    tensor_cores = placement.device == "cuda" and size == 2
    learner = {
        "weights": size * (s.parameters + adapters) / weights,
        "gradients": sums / gradients,
        "gradients again, flat, for the step": 4 * trained / optimizer
        if t.zero_stage in (1, 2) and not offloaded
        else 0,
        "masters and Adam": 0 if offloaded else states / optimizer,
        "reference model": size * s.parameters / weights if config.objective.needs_reference and not adapters else 0,
        "head": 4 * s.vocabulary * ((3 * chunk + s.hidden) if tensor_cores else 2 * (chunk + s.hidden)),
        "activations": size * tokens * kept,
    }
    engine = {"weights": size * s.parameters / config.rollout.tensor_parallel}
    host = {"offloaded masters, gradients and Adam": states + copies * trained if offloaded else 0}
    if config.save_every:
        host["checkpoint, a layer at a time"] = 12 * max(s.vocabulary * s.hidden, trained // s.layers)
    if placement.device == "cpu":
        engine |= {"weights of an update": size * s.parameters, "KV cache": config.rollout.kv_cache_gib * GIB}
        host["weights under way"] = size * s.parameters
    places = {"learner rank": learner, "engine": engine, "host": host}
    if placement.device == "cuda":
        learner["DeepSpeed's reduce bucket"] = {1: 4, 2: size}.get(t.zero_stage, 0) * min(REDUCED, trained)
        embedding = size * s.vocabulary * s.hidden
        nccl = placement.backend == "nccl"
        # Both ends lie on a shared GPU, and the engine copies what it reads.
        under_way = 2 * (SMALLEST_BUFFER + embedding if nccl else max(SMALLEST_BUFFER, embedding))
        channel = {"weights under way": under_way, "NCCL": NCCL * GIB * (nccl or placement.learners > 1)}
        if config.rollout.sleep:
            both = {"processes": sum(PROCESS["cuda"].values()) * GIB, "weights of the engine": engine["weights"]}
            stays = {"weights": learner["weights"], "process": PROCESS["cuda"]["learner rank"] * GIB}
            places |= {SAMPLING: stays | {"NCCL": channel["NCCL"]}}
            places |= {UPDATING: channel | both | {"weights of the learner": learner["weights"]}}
            host["gradients, masters and Adam, while the engine samples"] = sums + states
        else:
            learner |= channel
            aside = {"weights of an update": engine["weights"] * config.rollout.receive_while_sampling}
            places |= {BESIDE: channel | aside} if nccl else {}
        host["the model, before it goes to the GPUs"] = size * s.parameters * placement.learners
    found = {place: {what: n / GIB for what, n in parts.items() if n} for place, parts in places.items()}
    process = PROCESS[placement.device]
    for place, gib in process.items():
        found[place]["process"] = gib
    found["host"]["driver and Ray"] = DRIVER
    for place, count in (("learner rank", placement.learners), ("engine", placement.engines)):
        own = found[place] if placement.device == "cpu" else {"process": process[place]}
        found["host"][f"{count} x {place}"] = count * sum(own.values())
    return found


def longest_pass(config: Config, device: str) -> int:
    """Most tokens of one forward pass: a row or an episode that is longer than `micro_batch_tokens` is not cut.

    An episode is one row as long as its history only grows; one whose history is edited has several, and needs more.
    """
    return max(config.trainer.tokens_per_pass(device), config.rollout.max_model_len)


def engines_memory(config: Config, placement: Placement, shape: Shape) -> Needs:
    """GiB by place and component of engines alone, which read the model themselves and get no update."""
    size = {"bfloat16": 2, "float32": 4}[config.dtype]
    engine = {"weights": size * shape.parameters / config.rollout.tensor_parallel / GIB}
    if placement.device == "cpu":
        engine["KV cache"] = config.rollout.kv_cache_gib
    engine["process"] = PROCESS[placement.device]["engine"]
    each = sum(engine.values()) if placement.device == "cpu" else engine["process"]
    return {
        "engine": engine,
        "host": {"driver and Ray": DRIVER, f"{placement.engines} x engine": placement.engines * each},
    }


def available_memory(config: Config, placement: Placement) -> dict[str, float]:
    """GiB that each place may use; infinite where this machine cannot know, as for other nodes of a cluster."""
    judges = {f"reward model {judge.label}": math.inf for judge in reward_models_of(config)}
    limits = dict.fromkeys(("learner rank", "engine", BESIDE, SAMPLING, UPDATING, "host"), math.inf) | judges
    if os.environ.get("RAY_ADDRESS") or (placement.device == "cuda" and not torch.cuda.is_available()):
        return limits
    limits["host"] = machine.memory() / GIB
    if placement.device == "cuda":
        gpu = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / GIB
        limits |= memory_of_gpus(config, placement, gpu)
    return limits


def memory_of_gpus(config: Config, placement: Placement, gpu: float) -> dict[str, float]:
    """GiB that each place may use on GPUs of `gpu` GiB."""
    share = config.rollout.gpu_memory_utilization
    judges = {f"reward model {judge.label}": judge.gpu_memory_utilization * gpu for judge in reward_models_of(config)}
    learner = gpu * (1 - share if placement.backend == "ipc" else 1)
    learner = gpu - PROCESS["cuda"]["engine"] if config.rollout.sleep else learner
    rest = dict.fromkeys((BESIDE, SAMPLING), (1 - share) * gpu)
    return judges | rest | {"engine": share * gpu, "learner rank": learner, UPDATING: gpu}


def remedies(config: Config, place: str, *, shared: bool = False) -> list[str]:
    """Settings that lower the memory of a place and are not set yet. `shared`: engine and learner share a GPU."""
    t, r = config.trainer, config.rollout
    rows = r.max_model_len >= t.tokens_per_pass("cpu" if config.device == "cpu" else "cuda")
    learner = {
        f"trainer.zero_stage={t.zero_stage + 1} or more": t.zero_stage < 3 and t.ranks > 1,
        f"trainer.sequence_parallel={2 * t.sequence_parallel}": t.ranks % (2 * t.sequence_parallel) == 0,
        "trainer.gradient_checkpointing": not t.gradient_checkpointing,
        "trainer.micro_batch_tokens=256": t.micro_batch_tokens is None or t.micro_batch_tokens > 256,
        f"rollout.max_model_len below {r.max_model_len}, the longest row": rows,
        "trainer.lora.rank, e.g. 16": not t.lora.rank,
        "trainer.offload=optimizer": place == "learner rank" and t.offload == "none" and t.zero_stage > 0,
        "dtype=bfloat16": config.dtype == "float32",
    }
    share = {f"rollout.gpu_memory_utilization below {r.gpu_memory_utilization:g}": place == BESIDE or shared}
    share |= {"rollout.receive_while_sampling=False": place == BESIDE and r.receive_while_sampling}
    engine = {
        f"rollout.kv_cache_gib below {r.kv_cache_gib:g}": place == "host",
        "fewer rollout.engines": place == "host" and r.engines > 1,
        "rollout.tensor_parallel": place == "engine",
    }
    smaller = {"a smaller model": True}
    places = {
        "learner rank": share | learner | smaller,
        "engine": engine | smaller,
        BESIDE: share | smaller,
        SAMPLING: {f"rollout.gpu_memory_utilization below {r.gpu_memory_utilization:g}": True} | smaller,
        UPDATING: smaller,
        "host": engine | learner | smaller,
    }
    options = places.get(place, {"a smaller reward model, or one behind a URL": True})
    return [remedy for remedy, helps in options.items() if helps]
