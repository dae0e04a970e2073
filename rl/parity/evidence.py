"""What did an examination of engines and learner measure? Numbers only; `trainer.doctor.diagnosis` names causes."""

from dataclasses import dataclass, field
from typing import Any, Literal

from rl.parity.draws import Draws
from rl.parity.gap import Gap, NoiseClip
from rl.parity.guesses.guess import Hypothesis

Kind = Literal["linear", "norm", "embedding", "head"]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer of an engine against the same layer of the learner, both with the input that the engine's layer got."""

    name: str
    """Checkpoint name without `.weight`."""
    kind: Kind
    error: float
    """Norm of the difference of the outputs over the norm of the learner's output."""
    scale: float
    """The factor on the learner's output that fits the engine's output best; 1 where they agree."""
    fits: list[Hypothesis] = field(default_factory=list[Hypothesis])
    """What would explain an error, best first; tried where there is one."""
    place: int = 0
    """Its place in a forward pass, on one scale with `PartError.place`."""


Part = Literal["tokens", "positions", "layers", "embedding", "stream", "rotary", "attention", "input"]


@dataclass(frozen=True, kw_only=True)
class PartError:
    """What an engine computes between two layers that hold weights, against the learner, both with the same input."""

    name: str
    """Name of the layer that takes or makes the values."""
    part: Part
    """`stream`: the residual stream; `rotary`: queries and keys after it; `attention`: its output; `input`: what goes
    into a layer inside a block."""
    error: float
    """Norm of the difference over the norm of the learner's values, at the tokens of the prompt."""
    decode_error: float = 0.0
    """The same at the tokens that were sampled one by one."""
    fits: list[Hypothesis] = field(default_factory=list[Hypothesis])
    """What would explain an error, best first; tried where there is one."""
    place: int = 0


@dataclass(frozen=True, kw_only=True)
class Change:
    """The first module, in the order of execution, that took in or gave out something else for the same prompt."""

    name: str
    rows: int
    """At how many positions of the prompt."""
    of: int
    remembers: bool
    """Whether it is attention that took in the same and gave out something else. Nothing else in an engine keeps
    anything from one request to the next."""

    def __str__(self) -> str:
        return f"{self.name!r}, at {self.rows} of {self.of} positions"


@dataclass(frozen=True, kw_only=True)
class WeightEvidence:
    """One engine's weights against the learner's, after a published update."""

    engine: int
    version: int
    sent: dict[str, str]
    """Digest of every tensor when it was sent."""
    live: dict[str, str]
    """Digest of every tensor in the learner now."""
    received: list[dict[str, str]]
    """Digest of every tensor when it arrived, by worker."""
    layers: list[LayerError]
    between: list[PartError] = field(default_factory=list[PartError])
    """What lies between the layers, in the order of a forward pass."""
    changes: Change | None = None
    """The first module that computed something else when the engine was asked again."""
    uncovered: str = ""
    """Why layers could not be compared; empty if they were."""
    cached_after_update: int = 0
    """Prompt tokens that the prefix cache served right after the update, although older weights had computed them."""


@dataclass(frozen=True, kw_only=True)
class WitnessEvidence:
    """Both sides against a third one: a fresh copy of the model with the learner's weights, one sequence at a time, in
    plain fp32."""

    trainer: Gap
    """Trainer against the witness."""
    engine: Gap
    """Witness against the engine."""
    limit: float
    """Largest mean |d| in nats at which trainer and witness count as equal."""
    trainer_cause: str = ""
    """Where the trainer is at fault, as a key of `trainer.doctor.remedies`; empty if it is not."""
    trainer_text: str = ""
    """What shows it."""
    engine_guesses: list[Hypothesis] = field(default_factory=list[Hypothesis])
    """What would give the engine's numbers; only if they differ."""
    note: str = ""
    """What limits this evidence."""


@dataclass(frozen=True, kw_only=True)
class SamplerEvidence:
    """One engine's numbers against its own logits: a sampler's fault shows here exactly, whatever the body computes."""

    engine: int
    tokens: int
    error: float
    """Mean |d| in nats between what the engine handed on and what its logits give; NaN without logits."""
    handed_on: float
    """Mean |d| in nats between what the sampler returned and what the engine handed on."""
    other_tokens: int
    """Tokens that were handed on and are not those that the sampler returned."""
    settings: dict[str, Any]
    """As the sampler read them; empty where it does not show them."""
    guesses: list[Hypothesis]
    """What would give these numbers from these logits; only if they differ."""


@dataclass(frozen=True, kw_only=True)
class SampleEvidence:
    """Log-probabilities of one engine's samples against the trainer's."""

    engine: int
    gap: Gap
    surprise: float
    """`rl.parity.gap.surprise` of the sampled tokens under the trainer's distribution, in standard deviations."""
    nonfinite: int
    """Sampled tokens whose log-probability is missing or not finite."""
    ended: int
    """Replies that ended before `max_tokens`."""
    ended_without_stop_token: int
    """Those of them whose last sampled token is no stop token."""
    wrong_version: int
    """Sampled tokens with another version than the engine's."""
    forbidden: int = 0
    """Sampled tokens that the run forbids at their place, so that the trainer gives them the probability 0."""
    too_long: int = 0
    """Replies with more tokens than were asked for."""
    wrong_reason: int = 0
    """Replies that ended before the limit and count as cut off, or the other way round."""
    requests: float = 1.0
    """Requests that the engine served for each reply that it returned."""
    draws: Draws | None = None
    witness: WitnessEvidence | None = None
    """None where both sides agree in fp32."""
    sampler: SamplerEvidence | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All measurements of a run's engines and learner at one moment."""

    dtype: Literal["bfloat16", "float32"]
    engine_facts: list[dict[str, Any]]
    learner_facts: dict[str, Any]
    driver_facts: dict[str, Any]
    weights: list[WeightEvidence]
    samples: list[SampleEvidence]
    clip: NoiseClip | None
    notes: list[str] = field(default_factory=list[str])
    """What could not be measured, and why."""
