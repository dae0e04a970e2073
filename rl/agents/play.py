"""How is one episode of an agent played? It is given an address, and what was sampled there becomes its rows.

The agent's own errors are faults of the environment: the episode is played again, and never gets a reward. An agent
that raises because a request met a limit has ended by that limit, with the reward 0.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from rl.agents.command import run_command
from rl.agents.context import Agent, Context
from rl.agents.record import Opening, Record
from rl.environments.host import Host
from rl.environments.observations import fault, user
from rl.environments.types import Ended, EnvError, EnvLate, Limits, Messages
from rl.judges.hearing import hear
from rl.protocols import EngineLost
from rl.rewards.result import NoScore, points
from rl.types import Prompt, Trajectory

KEY = "unison"
"""A key for clients that ask for one. The secret is in the address."""


@runtime_checkable
class Endpoints(Protocol):
    """The engines' HTTP servers."""

    async def open(self, opening: Opening) -> tuple[int, str]:
        """Serve an episode; returns its engine, and its address without /v1. Raises EngineLost."""
        ...

    async def end(self, engine: int, secret: str) -> Record:
        """Refuse further requests of it; returns what was sampled. Raises EngineLost."""
        ...


@dataclass
class Hosted:
    """An agent as the host of environments holds it: one per episode."""

    agent: Agent | list[str]
    task: Mapping[str, Any]

    def play(self, context: Context) -> Any:
        """Its reward, or a coroutine of it."""
        return run_command(self.agent, context) if isinstance(self.agent, list) else self.agent(context)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all episodes of a run share."""

    host: Host
    """Of `Hosted`."""
    endpoints: Endpoints
    limits: Limits
    model: str
    mask_truncated: bool = False
    counts: dict[str, float] = field(default_factory=dict[str, float])
    """Metrics since they were last taken."""


async def play_agent(
    stage: Stage, prompt: Prompt, member: int, seed: int, temperature: float | None
) -> list[Trajectory]:
    """Play one episode; `seed` is the run's. Returns its rows; none where the reward does not apply.

    Raises EnvError for a fault of the agent, EnvLate when the episode's time is over, and EngineLost.
    """
    limits = stage.limits
    opening = Opening(
        secret=secrets.token_urlsafe(24),
        seed=(seed, prompt.ordinal, member),
        turns=limits.turns,
        tokens=limits.tokens,
        temperature=temperature,
    )
    engine, address = await stage.endpoints.open(opening)
    context = Context(
        base_url=f"{address}/v1",
        anthropic_url=address,
        api_key=KEY,
        model=stage.model,
        task=prompt.task,
        messages=messages_of(prompt),
        seconds=limits.seconds,
    )
    result, error = None, None
    with hear() as heard:
        try:
            result = await _reward(stage, prompt, context)
        except Exception as raised:  # the user's code may raise anything, and none of it may become a reward
            error = raised
        finally:
            # Also where the episode is cancelled: its requests must not go on.
            record = await stage.endpoints.end(engine, opening.secret)
    if record.lost:
        raise EngineLost(record.lost)
    ended: Ended = record.limit or "done"
    if isinstance(error, EnvLate):
        raise EnvLate(f"limits.seconds={limits.seconds:g} were over while the agent ran") from error
    if error is not None and record.limit is None:
        raise fault("the agent", error) from error
    _count(stage.counts, record)
    if not record.sampled:
        raise EnvError("the agent returned without a reply of the policy, so there is nothing to train on")
    try:
        reward, parts = points(result if error is None else 0.0)
    except NoScore as no_score:
        raise EnvError(f"the agent returned a reward that {no_score}") from no_score
    if reward is None:
        return []
    cut = ended != "done"
    return record.tree().rows(
        group=prompt.ordinal,
        episode=member,
        reward=reward,
        reward_parts=parts,
        finish_reason="length" if cut else "stop",
        trained=not (stage.mask_truncated and cut),
        verdicts=tuple(heard.verdicts),
    )


async def _reward(stage: Stage, prompt: Prompt, context: Context) -> Any:
    instance = await stage.host.make(prompt.task, stage.limits.tool_s)
    try:
        return await instance.run(partial(Hosted.play, context=context), stage.limits.seconds)
    finally:
        await instance.close(stage.limits.tool_s)


def messages_of(prompt: Prompt) -> Messages:
    """The prompt of an example as chat messages."""
    given = prompt.given
    if isinstance(given, str):
        return user(given)
    return [dict(m) for m in given if isinstance(m, dict)]


def _count(counts: dict[str, float], record: Record) -> None:
    found: dict[str, float] = {"agent/requests": len(record.sampled)}
    for kind in ("branches", "refused", "dropped"):
        found |= {f"agent/{kind}/{reason}": n for reason, n in getattr(record, kind).items()}
    for name, n in found.items():
        counts[name] = counts.get(name, 0.0) + n
