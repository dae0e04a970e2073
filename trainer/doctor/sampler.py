"""Does an engine's sampler give the numbers that its own logits call for?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl.batch import collate, trajectory
from rl.config import Config
from rl.parity.evidence import SamplerEvidence
from rl.parity.guesses.hypotheses import explain
from rl.parity.guesses.told import Told, told
from rl.sampling.forbidden import Forbidden
from rl.types import Completion, Prompt
from trainer.doctor.numbers import limit_of

Traced = tuple[Prompt, Completion, list[dict[str, Any]]]
"""A prompt, one reply, and what each worker's sampler recorded (`rollout.sampler_trace`)."""


def sampler_evidence(
    engine: int, config: Config, forbidden: Forbidden | None, traced: Sequence[Traced]
) -> SamplerEvidence | None:
    """Compare; None where no worker shows its logits for each token."""
    looked = [(_one(config, forbidden, prompt, reply, traces), reply, traces) for prompt, reply, traces in traced]
    seen = [(one, reply, traces) for one, reply, traces in looked if one is not None]
    if not seen:
        return None
    gaps = torch.cat([(one.expected - one.reported).abs() for one, _, _ in seen])
    returned = [pairs for _, reply, traces in seen if (pairs := _returned(reply, traces))]
    numbers = [abs(a - b) for _, ours, theirs in returned for (_, a), b in zip(ours, theirs, strict=True)]
    others = sum(a != b for tokens, ours, _ in returned for (a, _), b in zip(ours, tokens, strict=True))
    # In every dtype, because both sides start at the same logits. Not <=: a NaN is counted elsewhere.
    off = float(gaps.mean()) > limit_of("float32", config.temperature)
    longest, _, _ = max(seen, key=lambda s: len(s[0].reported))
    return SamplerEvidence(
        engine=engine,
        tokens=len(gaps),
        error=float(gaps.mean()),
        handed_on=sum(numbers) / len(numbers) if numbers else 0.0,
        other_tokens=others,
        settings=next((t["settings"] for _, _, traces in seen for t in traces if t["settings"]), {}),
        guesses=explain(longest) if off else [],
    )


def _one(
    config: Config, forbidden: Forbidden | None, prompt: Prompt, reply: Completion, traces: list[dict[str, Any]]
) -> Told | None:
    count = len(reply.token_ids)
    logits = next((x for t in traces if len(x := _tensor(t["logits"])) >= count), None)
    if logits is None or not count:
        return None
    batch = collate([trajectory(prompt, reply, 0.0, {})])
    return told(
        batch,
        logits[:count],
        batch.rollout_logprobs,
        temperature=config.temperature,
        truncation=config.rollout.truncation,
        forbidden=forbidden,
    )


def _returned(
    reply: Completion, traces: list[dict[str, Any]]
) -> tuple[list[int], list[tuple[int, float]], list[float]] | None:
    """Tokens handed on, tokens and numbers that the sampler returned, numbers handed on."""
    count = len(reply.token_ids)
    pairs = next((t["returned"] for t in traces if len(t["returned"]) >= count), None)
    return None if pairs is None else ([*reply.token_ids], [tuple(p) for p in pairs[:count]], [*reply.logprobs])


def _tensor(value: tuple[list[int], bytes]) -> Tensor:
    shape, data = value
    if not data:
        return torch.zeros(0, 0)
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)
