"""The whole run as one value: every setting, its unit and its default."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from rl.filters import GroupFilter, ZeroAdvantage
from rl.objectives import GSPO, M2PO, Objective
from rl.objectives.corrections import Correction, Uncorrected
from rl.rewards.score import Reward
from rl.rewards.shaping import SoftOverlong
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
    engine_class: str = "rollout.engine:Engine"
    """Class of the engines, "module:Class". An experiment may name its own, in a file next to its recipe."""

    @property
    def truncation(self) -> Truncation | None:
        """What top_p, top_k and min_p cut off; None when they keep the whole vocabulary."""
        wanted = Truncation(top_p=self.top_p, top_k=self.top_k, min_p=self.min_p)
        return None if wanted == Truncation() else wanted


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train low-rank adapters of every linear layer but the head (arXiv 2106.09685); engines get the merged weights.

    Without dropout: the trainer would not say what the engine sampled with.
    """

    rank: int = 0
    """0 is off: all weights are trained."""
    alpha: float = 32.0
    """A layer's weight is W + alpha / rank * B A."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The learner."""

    ranks: int = 1
    """DeepSpeed ranks; each is one Ray actor."""
    sequence_parallel: int = 1
    """Neighbouring ranks that share each packed row (DeepSpeed Ulysses), for rows too long for one GPU; it divides
    `ranks` and the model's heads. 1: every rank has rows of its own."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: 0 nothing (float32 only), 1 optimizer states, 2 and gradients, 3 and weights."""
    offload: Literal["none", "optimizer"] = "none"
    """Keep master weights and Adam's moments in the host's memory, and step there. GPUs only."""
    lora: Lora = field(default_factory=Lora)
    lr: float = 1e-6
    value_lr: float | None = None
    """Of the value head, with the schedule of `lr`; it starts from zero, so ten times `lr` and more is common. None: as
    `lr`."""
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
    micro_batch_tokens: int | None = None
    """Tokens of one forward pass: the length of its packed row, a shared prompt counted once. None: 4096 on GPUs, 512
    on CPU, where more is no faster and takes memory."""
    gradient_checkpointing: bool = False
    skip_zero_advantage: bool = True
    """Leave out rows that provably have no gradient (zero advantage, no KL, no entropy bonus, no critic)."""
    share_prompts: bool | None = None
    """Compute a group's prompt once. None: on CPU; on CUDA rows that share nothing go through one varlen kernel."""
    threads: int | None = None
    """OpenMP threads of one rank on CPU. None: all cores if it takes turns with the engine, else 1."""

    def tokens_per_pass(self, device: str) -> int:
        """`micro_batch_tokens`, or its default on a device ("cpu" or "cuda")."""
        return self.micro_batch_tokens or (512 if device == "cpu" else 4096)


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long each wait may take, in seconds, before the run ends with a message that says who waited for whom."""

    start_s: float = 900.0
    sample_s: float = 1800.0
    reward_s: float = 60.0
    step_s: float = 1800.0
    sync_s: float = 300.0
    stop_s: float = 30.0
    """From SIGTERM to the end of the checkpoint that it asks for; schedulers wait about as long before they kill."""


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
    eval_reward: Reward | None = None
    """For evaluations, where the one of training is shaped; None: `reward`. pass@k counts what is at least 1."""
    objective: Objective = field(default_factory=GSPO)
    steps: int = 100
    prompts_per_step: int = 8
    group_size: int = 8
    """Completions of each prompt."""
    filters: tuple[GroupFilter, ...] = ()
    """A group that one of them (rl/filters.py) gives a reason for is not trained on, and another is sampled instead:
    with `ZeroAdvantage()` the dynamic sampling of DAPO."""
    max_filtered: int = 10
    """Groups that the filters may take between two steps, as a multiple of `prompts_per_step`, before the run ends."""
    max_staleness: int = 0
    """Weight versions that a sample may be behind when its step begins. 0 is synchronous and on-policy."""
    late_groups: Literal["drop", "wait"] = "drop"
    """A group that is still being sampled when the next version makes it too old: drop it, count it and admit another,
    or let the step wait for it. Dropping never holds up a step, but where it happens often, long replies are lost."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """The proximal policy: the trainer's own log-probabilities at the start of the step, or the engine's. auto: the
    engine's where `max_staleness` is 0 and the doctor finds that noise alone would not clip, else the trainer's."""
    correction: Correction = field(default_factory=Uncorrected)
    """Importance weight old / rollout on the policy loss, e.g. `TokenTIS(cap=2.0)` of rl/objectives/corrections.py."""
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
    record_batches: int = 0
    """Steps between records of a whole step for `unison what-if`, in the run's folder under batches/; each costs two
    forward passes. 0 keeps none."""
    save_every: int = 20
    """Steps between checkpoints; 0 makes none. One takes about as long as a step, and 12 bytes per parameter: at 20
    that is about 5 % of the time, and a crash costs at most 20 steps. SIGTERM makes one more."""
    keep_last: int = 2
    """Checkpoints that are kept: one more than needed, for the newest may be found damaged."""
    save_final: bool = True
    """Export the trained model (safetensors and tokenizer) into the run's folder."""
    chat_template_kwargs: dict[str, bool | int | str] = field(default_factory=dict)
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
        "": (config, ("steps", "prompts_per_step", "group_size", "eval_samples", "max_filtered", "keep_last")),
        "rollout.": (r, ("max_tokens", "max_num_seqs")),
        "trainer.": (t, ("epochs", "minibatches", "micro_batch_tokens")),
    }
    for prefix, (part, names) in at_least_one.items():
        for name in names:
            value = getattr(part, name)
            if value is not None and value < 1:
                raise ValueError(f"{prefix}{name}={value} must be at least 1")
    for name in ("lr", "value_lr", "warmup_steps", "weight_decay"):
        if (getattr(t, name) or 0.0) < 0:
            raise ValueError(f"trainer.{name}={getattr(t, name)} must not be negative")
    _check_memory_settings(config)
    off = {
        "save_every": (config.save_every, "makes no checkpoint"),
        "eval_every": (config.eval_every, "evaluates at the start and the end only"),
        "verify_every": (config.verify_every, "looks at the first update only"),
        "record_batches": (config.record_batches, "keeps none"),
        "max_staleness": (config.max_staleness, "is synchronous"),
        "rollout.retries": (r.retries, "gives a group up with its engine"),
        "rollout.restarts": (r.restarts, "ends the run with an engine"),
    }
    for name, (value, meaning) in off.items():
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0 (0 {meaning})")
    if config.temperature <= 0:
        raise ValueError(
            f"temperature={config.temperature}: greedy samples have no log-probability to learn from; use a "
            "temperature above 0 (eval_temperature may be 0)"
        )
    _check_objective(config)
    if r.truncation:
        r.truncation.check()
    if r.max_tokens >= r.max_model_len:
        raise ValueError(f"rollout.max_tokens={r.max_tokens} leaves no room for a prompt in {r.max_model_len} tokens")
    rows = config.prompts_per_step * config.group_size
    if t.minibatches > rows:
        raise ValueError(f"trainer.minibatches={t.minibatches} exceeds the {rows} sequences of a step")


def _check_memory_settings(config: Config) -> None:
    t = config.trainer
    if t.zero_stage == 0 and config.dtype == "bfloat16":
        raise ValueError(
            "trainer.zero_stage=0 with dtype=bfloat16 has no fp32 gradients and starts Adam with a step too many (in "
            "DeepSpeed 0.19): use zero_stage=1, which is never larger, or dtype=float32"
        )
    if t.zero_stage == 0 and t.offload != "none":
        raise ValueError(f"trainer.offload={t.offload} needs DeepSpeed's own optimizer: use zero_stage 1, 2 or 3")
    if t.sequence_parallel < 1 or t.ranks % t.sequence_parallel:
        raise ValueError(f"trainer.sequence_parallel={t.sequence_parallel} must divide trainer.ranks={t.ranks}")
    if t.lora.rank < 0 or t.lora.alpha <= 0:
        raise ValueError(f"trainer.lora: rank={t.lora.rank} must be at least 0, and alpha={t.lora.alpha:g} above 0")


def _check_objective(config: Config) -> None:
    objective, t = config.objective, config.trainer
    name = type(objective).__name__
    if objective.group_relative and config.group_size < 2:
        raise ValueError(
            f"group_size=1 gives {name} only zero advantages, for it compares samples of "
            "one prompt: use group_size >= 2, or PPO, whose critic is the baseline"
        )
    if objective.uses_old_logprobs and config.old_logprobs == "rollout":
        raise ValueError(
            f"{name} compares the trainer's log-probabilities with the engine's, and old_logprobs='rollout' makes them "
            "the same: use old_logprobs='recompute' (or 'auto')"
        )
    if config.old_logprobs == "rollout" and not isinstance(config.correction, Uncorrected):
        raise ValueError(
            f"{type(config.correction).__name__} weighs by the trainer's log-probabilities against the engine's, and "
            "old_logprobs='rollout' makes them the same: use old_logprobs='recompute' (or 'auto')"
        )
    if isinstance(objective, M2PO) and not isinstance(config.correction, Uncorrected):
        raise ValueError(
            f"M2PO's ratio is policy / rollout already, so {type(config.correction).__name__} would count the mismatch "
            "twice: leave `correction` at its default"
        )
    if objective.kl_coef < 0 or objective.entropy_coef < 0:
        raise ValueError(
            f"kl_coef={objective.kl_coef:g} and entropy_coef={objective.entropy_coef:g} must not be negative: both are "
            "counted so that a larger one holds the policy closer, or keeps it more random"
        )
    if objective.kl_coef and (objective.kl_in, objective.kl_estimator) == ("loss", "k1"):
        raise ValueError(
            f"k1 in the loss has no gradient on average (rl/objectives/kl.py), so kl_coef={objective.kl_coef:g} would "
            f'do nothing: use {name}(kl_estimator="k2") or "k3+", or kl_in="reward"'
        )
    if config.group_size == 1 and any(isinstance(each, ZeroAdvantage) for each in config.filters):
        raise ValueError(
            "filters: the rewards of a group of one are all equal, so ZeroAdvantage would take every group: leave it "
            "out, or use group_size >= 2"
        )
    if isinstance(config.reward, SoftOverlong) and config.reward.max_tokens != config.rollout.max_tokens:
        raise ValueError(
            f"SoftOverlong(max_tokens={config.reward.max_tokens}) punishes by another limit than "
            f"rollout.max_tokens={config.rollout.max_tokens}: give both the same"
        )
    if objective.kl_target is not None and not (objective.kl_target > 0 and objective.kl_coef > 0):
        raise ValueError(
            f"kl_target={objective.kl_target:g} needs to be above 0, and a kl_coef above 0 to begin with: e.g. "
            f"{name}(kl_coef=0.01, kl_target=0.02)"
        )
    if objective.entropy_target is not None and objective.entropy_target <= 0:
        raise ValueError(
            f"entropy_target={objective.entropy_target:g} must be above 0 nats per token, e.g. "
            f"{name}(entropy_target=0.2)"
        )
    if t.value_lr is not None and not objective.uses_values:
        raise ValueError(
            f"trainer.value_lr={t.value_lr:g} has no value head to move: {name} has no critic; leave it out"
        )
    optimizer_steps = config.steps * t.epochs * t.minibatches
    if 0 < optimizer_steps <= objective.critic_warmup:
        raise ValueError(
            f"critic_warmup={objective.critic_warmup} covers all {optimizer_steps} optimizer steps of the run, so the "
            "policy would never learn: lower it, or raise `steps`"
        )
