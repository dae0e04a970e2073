"""What an examination of engines and learner found out, before anyone judges it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from rl.parity.gap import Gap, NoiseClip
from rl.parity.hypotheses import Hypothesis

Kind = Literal["linear", "norm", "embedding", "head"]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer of an engine, given the very input that the engine gave it, against the learner's layer."""

    name: str
    """Checkpoint name without `.weight`."""
    kind: Kind
    error: float
    """Norm of the difference of the outputs over the norm of the learner's output."""
    scale: float
    """The factor on the learner's output that explains the engine's best; 1 where they agree."""
    scaled_error: float
    """What is left of `error` once that factor is applied."""
    bf16_error: float
    """The same against the learner's layer with its weight and output rounded to bf16."""


@dataclass(frozen=True, kw_only=True)
class WeightEvidence:
    """One engine's weights against the learner's, after a published update."""

    engine: int
    version: int
    sent: dict[str, str]
    """Digest of every tensor as it left."""
    live: dict[str, str]
    """Digest of every tensor as the learner holds it now."""
    received: list[dict[str, str]]
    """Digest of every tensor as it arrived, by worker."""
    layers: list[LayerError]
    uncovered: str = ""
    """Why layers could not be compared, if so."""
    cached_after_update: int = 0
    """Prompt tokens served from the prefix cache right after the update, although only older weights computed them."""


@dataclass(frozen=True, kw_only=True)
class SampleEvidence:
    """Log-probabilities of one engine's samples against the trainer's."""

    engine: int
    gap: Gap
    hypotheses: list[Hypothesis]
    surprise: float
    """How many standard deviations the sampled tokens are less likely than draws from the trainer's distribution."""
    nonfinite: int
    """Sampled tokens whose log-probability is missing or not finite."""
    ended: int
    """Replies that ended by themselves."""
    ended_without_stop_token: int
    """Those whose last sampled token is not one that ends a reply."""
    wrong_version: int
    """Sampled tokens that carry another version than the one the engine holds."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything about one run's engines and learner at one moment."""

    dtype: Literal["bfloat16", "float32"]
    engine_facts: list[dict[str, Any]]
    learner_facts: dict[str, Any]
    driver_facts: dict[str, Any]
    weights: list[WeightEvidence]
    samples: list[SampleEvidence]
    clip: NoiseClip | None
    notes: list[str] = field(default_factory=list)
    """What could not be covered, and why."""
