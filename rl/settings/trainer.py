"""How does the learner train? Its part of the config."""

from dataclasses import dataclass, field
from typing import Literal

from rl.typed import Checked


@dataclass(frozen=True, kw_only=True)
class Lora(Checked):
    """Train low-rank adapters of every linear layer but the head (arXiv 2106.09685); engines get the merged weights.

    There is no dropout: with it, the trainer's log-probabilities would differ from the engine's.
    """

    rank: int = 0
    """Rank of the adapters. 0 is off: all weights are trained."""
    alpha: float = 32.0
    """Scale of the adapters: the weight of a layer is W + alpha / rank * B A."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Checked):
    """The learner: how DeepSpeed trains."""

    ranks: int = 1
    """Number of DeepSpeed ranks. Each is one Ray actor."""
    sequence_parallel: int = 1
    """Neighbouring ranks that share each packed row (DeepSpeed Ulysses), for rows too long for one GPU. It must divide
    `ranks` and the attention heads of the model. 1: every rank has its own rows."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over ranks. 0: nothing (float32 only). 1: optimizer states. 2: also gradients. 3: also
    weights."""
    offload: Literal["none", "optimizer"] = "none"
    """Keep master weights and Adam's moments in host memory, and step there. GPUs only."""
    lora: Lora = field(default_factory=Lora)
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    value_lr: float | None = None
    """Learning rate of the value head, with the same schedule. The head starts at zero, so use 10 times `lr` or more.
    Default: the same as `lr`."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warmup: constant, or from the peak down to 0 at the last step."""
    warmup_steps: int = 0
    """Optimizer steps from 0 up to the peak learning rate. Each step of the loop has epochs x minibatches of them."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay. 0 is off."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to this norm."""
    epochs: int = 1
    """Passes over the batch of each step."""
    minibatches: int = 1
    """Optimizer steps per pass."""
    micro_batch_tokens: int | None = None
    """Tokens of one forward pass: the length of its packed row. A shared prompt counts once. Default: 4096 on GPU; 512
    on CPU, where memory is short."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    skip_zero_advantage: bool = True
    """Leave out rows that cannot have a gradient: zero advantage, and no KL, no entropy bonus, no critic."""
    share_prompts: bool | None = None
    """Compute the prompt of a group once. Default: on for CPU, off for GPU, where one varlen kernel takes all rows."""
    threads: int | None = None
    """OpenMP threads of one rank on CPU. Default: all cores if engine and learner take turns, else 1."""

    def tokens_per_pass(self, device: str) -> int:
        """`micro_batch_tokens`, or its default on a device ("cpu" or "cuda")."""
        return self.micro_batch_tokens or (512 if device == "cpu" else 4096)
