"""The whole run as one value: every setting, its unit and its default."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from rl.corrections import Correction, Uncorrected
from rl.objectives import GSPO, Objective
from rl.rewards import Reward
from rl.truncation import Truncation
from rl.types import Data


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The engines."""

    engines: int = 1
    """How many vLLM engines sample; each is one Ray actor."""
    tensor_parallel: int = 1
    """GPUs of one engine."""
    max_tokens: int = 256
    """Most tokens of one completion."""
    max_model_len: int = 1024
    """Most tokens of prompt and completion together."""
    max_num_seqs: int = 64
    """Most sequences that one engine decodes at a time."""
    top_p: float = 1.0
    """Below 1, or top_k or min_p above 0: the trainer renormalises over the tokens that the engine kept."""
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    prefix_cache: bool = True
    """Share a group's prompt; entries are salted with the weight version, so that none outlives its weights."""
    recompute_kv: bool = False
    """At an update, compute the context of running requests anew with the new weights: their next tokens are then the
    new policy's alone, at the price of a prefill each. Off: they go on over the KV of the weights that wrote it."""
    async_scheduling: bool = False
    """vLLM's own default is on; it stays off until parity with it on has been shown on your platform."""
    enforce_eager: bool | None = None
    """Skip compilation and CUDA graphs. None: on CPU only."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory for one engine: weights and KV cache."""
    kv_cache_gib: float = 1.0
    """KV cache of one engine on CPU, GiB."""
    threads: int | None = None
    """OpenMP threads of one engine on CPU. None: all cores if it takes turns with the learner, else 1."""
    seeded: bool = True
    """Give every sample its own seed, so that its tokens do not depend on what else is in the batch."""
    retries: int = 3
    """How often a group is sampled again whose engine was lost, before it counts as failed."""
    restarts: int = 3
    """How often engines that were lost are started again in one run, before it ends."""

    @property
    def truncation(self) -> Truncation | None:
        """What top_p, top_k and min_p cut off; None when they keep the whole vocabulary."""
        wanted = Truncation(top_p=self.top_p, top_k=self.top_k, min_p=self.min_p)
        return None if wanted == Truncation() else wanted


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The learner."""

    ranks: int = 1
    """Data-parallel DeepSpeed ranks; each is one Ray actor."""
    zero_stage: Literal[1, 2, 3] = 1
    """What DeepSpeed shards: 1 optimizer states, 2 and gradients, 3 and weights. (0 is wrong with bf16.)"""
    lr: float = 1e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """From the peak to 0 over the run's steps."""
    warmup_steps: int = 0
    """Optimizer steps (epochs x minibatches of them in each step of the loop) up to the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    """Passes over each batch."""
    minibatches: int = 1
    """Optimizer steps per pass."""
    micro_batch_tokens: int = 4096
    """Tokens of one forward pass."""
    gradient_checkpointing: bool = False
    skip_zero_advantage: bool = True
    """Leave out rows that provably have no gradient (zero advantage, no KL, no entropy bonus, no critic)."""
    share_prompts: bool | None = None
    """Compute a group's prompt once, by a dense tree-shaped attention mask. None: on CPU, where it saves most."""
    threads: int | None = None
    """OpenMP threads of one rank on CPU. None: all cores if it takes turns with the engine, else 1."""


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long each wait may take, in seconds, before the run ends with a message that says who waited for whom."""

    start_s: float = 900.0
    sample_s: float = 1800.0
    reward_s: float = 60.0
    step_s: float = 1800.0
    sync_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the numbers go."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when you are logged in, else offline. Never a prompt for a key."""
    project: str = "unison-rl"
    samples_per_step: int = 4
    """Decoded trajectories kept in samples.jsonl per step."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Both sides of every decision that costs parity are set by one value here."""

    name: str
    """Folder of the run under `output_dir`, and its name in W&B."""
    model: str
    """Local folder or hub name of a causal language model."""
    data: Callable[[], Data]
    """Called once, on the driver."""
    reward: Reward
    objective: Objective = field(default_factory=GSPO)
    steps: int = 100
    prompts_per_step: int = 8
    group_size: int = 8
    """Completions of each prompt."""
    max_staleness: int = 0
    """Weight versions that a sample may be behind when its step begins. 0 is synchronous and on-policy."""
    late_groups: Literal["drop", "wait"] = "drop"
    """A group that is still being sampled when the next version makes it too old: drop it, count it and admit another,
    or let the step wait for it. Dropping never holds up a step, but where it happens often, long replies are lost."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """The proximal policy: the trainer's own log-probabilities at the start of the step, or the engine's. auto: the
    engine's where the doctor finds that noise alone would not clip them, else the trainer's."""
    correction: Correction = field(default_factory=Uncorrected)
    """Importance weight old / rollout on the policy loss, e.g. `TokenTIS(cap=2.0)` of rl/corrections.py."""
    doctor: Literal["short", "full", "off"] = "short"
    """Before the first step, check that the engines' log-probabilities mean what the loss thinks, and end the run with
    the cause and the remedy when not. full: with the ladder of `unison doctor`, which takes minutes."""
    temperature: float = 1.0
    """Of sampling, and of the trainer's log-probabilities."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the model body, in the engine and in the trainer (whose master weights are always fp32)."""
    fp32_head: bool = True
    """Compute logits in fp32, in the engine and in the trainer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    share_gpu: bool | None = None
    """Engine and learner share one GPU; weights travel by CUDA IPC instead of NCCL. None: when there is only one."""
    eval_every: int = 0
    """Steps between evaluations on the held-out sets; 0 evaluates before and after only."""
    eval_samples: int = 1
    """Completions per held-out problem."""
    eval_temperature: float | None = None
    """None: the run's temperature."""
    verify_every: int = 0
    """Steps between digest checks of every tensor at every engine; the first update is always checked."""
    save_final: bool = True
    """Export the trained model (safetensors and tokenizer) into the run's folder."""
    chat_template_kwargs: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    output_dir: str = "runs"
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    deadlines: Deadlines = field(default_factory=Deadlines)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def check(config: Config) -> None:
    """Raise ValueError, with the remedy, for settings that cannot work together. Starts and loads nothing."""
    r, t = config.rollout, config.trainer
    at_least_one = {
        "": (config, ("steps", "prompts_per_step", "group_size", "eval_samples")),
        "rollout.": (r, ("max_tokens", "max_num_seqs")),
        "trainer.": (t, ("epochs", "minibatches", "micro_batch_tokens")),
    }
    for prefix, (part, names) in at_least_one.items():
        for name in names:
            if getattr(part, name) < 1:
                raise ValueError(f"{prefix}{name}={getattr(part, name)} must be at least 1")
    for name in ("lr", "warmup_steps", "weight_decay"):
        if getattr(t, name) < 0:
            raise ValueError(f"trainer.{name}={getattr(t, name)} must not be negative")
    if config.max_staleness < 0:
        raise ValueError(f"max_staleness={config.max_staleness} must be at least 0 (0 is synchronous)")
    if config.temperature <= 0:
        raise ValueError(
            f"temperature={config.temperature}: greedy samples have no log-probability to learn from; use a "
            "temperature above 0 (eval_temperature may be 0)"
        )
    if config.objective.group_relative and config.group_size < 2:
        raise ValueError(
            f"group_size=1 gives {type(config.objective).__name__} only zero advantages, for it compares samples of "
            "one prompt: use group_size >= 2, or PPO, whose critic is the baseline"
        )
    if r.truncation:
        r.truncation.check()
    if r.max_tokens >= r.max_model_len:
        raise ValueError(f"rollout.max_tokens={r.max_tokens} leaves no room for a prompt in {r.max_model_len} tokens")
    rows = config.prompts_per_step * config.group_size
    if t.minibatches > rows:
        raise ValueError(f"trainer.minibatches={t.minibatches} exceeds the {rows} sequences of a step")
