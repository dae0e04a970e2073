"""How is one episode played? Turns of the policy, calls of its tools, and which error is whose.

An error of the policy is something that it reads. An error of the environment is raised, and never becomes a reward. A
limit ends the episode, which is scored as it stands.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from rl.environments import host as methods
from rl.environments.host import Host, Instance, Work
from rl.environments.observations import as_calls, as_messages, as_text, fault, spoken, user
from rl.environments.tree import Node, Tree
from rl.environments.types import Ended, EnvError, EnvLate, Episode, Limits, Messages, Step, ToolError, Turn
from rl.judges.hearing import hear
from rl.protocols import EngineLost, Rollouts
from rl.rewards.result import NoScore, finite, points
from rl.tools import MCP
from rl.typed import show
from rl.types import Completion, Prompt, Trajectory

CLOSE_S = 10.0
"""Most seconds for `close`: it may run while a run ends."""
LONGEST_TOKEN = 1000
"""No token has more characters, so a longer text cannot fit and need not be encoded."""


@runtime_checkable
class Chat(Protocol):
    """The run's chat template (`rl.environments.template`)."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """The schemas of the run's tools."""
        ...

    def prompt(self, messages: Messages, more: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation in which nothing was sampled yet, with the opening of the policy's turn. `more` are
        tools that it shows besides those of the run."""
        ...

    def delta(self, messages: Messages, after: list[int]) -> list[int]:
        """Tokens that messages add after sampled tokens, with the opening of the next turn."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What all episodes of a run share."""

    host: Host
    rollouts: Rollouts
    chat: Chat
    decode: Callable[..., str]
    limits: Limits
    max_tokens: int
    """Most tokens of one turn."""
    max_model_len: int
    """Most tokens of a turn and of what it continues together."""
    reward_s: float
    """Seconds for `reward`."""
    mask_truncated: bool = False
    """Do not train on episodes that a limit ended."""
    temperature: float | None = None
    tools: MCP | None = None
    """A server of more tools."""


async def play(stage: Stage, prompt: Prompt, member: int, seed: Callable[[int], int | None]) -> list[Trajectory]:
    """Play one episode; `seed` gives the seed of each turn. Returns its rows; none where the reward does not apply.

    Raises EnvError for a fault of the environment, EnvLate when the episode's time is over and it waits for anything
    but a tool, and EngineLost. The environment is closed in every case, also when the episode is cancelled.
    """
    try:
        instance = await stage.host.make(prompt.task, stage.limits.tool_s)
    except Exception as error:  # the constructor is the user's code; EnvError is what may be played again
        raise fault("the environment's constructor", error) from error
    one, failed = _Play(stage, prompt, instance), True
    try:
        with hear() as heard:
            rows = await one.rows(member, seed)
        failed = False
        return [replace(row, verdicts=tuple(heard.verdicts)) for row in rows] if heard.verdicts else rows
    finally:
        try:
            await instance.close(min(CLOSE_S, stage.limits.tool_s))
        except Exception as error:  # the user's code; of two errors the first is the one to report
            if not failed:
                raise fault("`close`", error) from error


@dataclass
class _Play:
    """One episode while it is played."""

    stage: Stage
    prompt: Prompt
    env: Instance
    tree: Tree = field(default_factory=Tree)
    turns: list[Turn] = field(default_factory=list[Turn])
    messages: Messages = field(default_factory=Messages)
    context: list[int] = field(default_factory=list[int])
    """What the next turn continues."""
    node: Node | None = None
    """The last turn."""
    in_tool: bool = False
    """Whether it waits for a tool that the policy called."""
    waits_for: str = ""

    async def rows(self, member: int, seed: Callable[[int], int | None]) -> list[Trajectory]:
        """The rows of the episode, played and scored."""
        limits = self.stage.limits
        try:
            async with asyncio.timeout(limits.seconds) as clock:
                await self._start()
                while (ended := await self._turn(seed(len(self.turns)))) is None:
                    pass
        except TimeoutError:
            if not clock.expired():
                raise
            if not self.in_tool:
                raise EnvLate(
                    f"limits.seconds={limits.seconds:g} were over while the episode waited for {self.waits_for}"
                ) from None
            ended = "deadline"
        return await self._scored(ended, member)

    async def _start(self) -> None:
        given = self.prompt.given
        self.messages = [dict(m) for m in given if isinstance(m, dict)] if isinstance(given, list) else []
        self.context = self.prompt.token_ids
        if "start" in self.env.offers:
            more = await self._ask("`start`", methods.start)
            if more:
                self.messages += as_messages(more, "`start`")
                self.context = self._encoded(
                    "`start`", lambda: self.stage.chat.prompt(self.messages, self.prompt.tools)
                )
        if len(self.context) >= self.stage.max_model_len:
            raise EnvError(
                f"the prompt with the messages of `start` has {len(self.context)} tokens, which leaves no room in "
                f"rollout.max_model_len={self.stage.max_model_len}"
            )

    async def _turn(self, seed: int | None) -> Ended | None:
        """One turn and what follows from it; None if another turn may follow."""
        stage, limits = self.stage, self.stage.limits
        room = min(stage.max_tokens, stage.max_model_len - len(self.context))
        if limits.tokens is not None:
            room = min(room, limits.tokens - sum(len(turn.token_ids) for turn in self.turns))
        if room < 1:
            return "length"
        self.waits_for = "the engine"
        (completion,) = await stage.rollouts.sample(
            self.context,
            1,
            seed=seed,
            temperature=stage.temperature,
            max_tokens=room,
            # The engine that has the history in its cache.
            engine=self.node.completion.engine if self.node else None,
            tools=[*stage.chat.tools, *self.prompt.tools],
        )
        if completion.finish_reason == "abort":
            raise EngineLost("vLLM aborted a request")
        self.node = self.tree.add(self.context, completion, len(self.turns), self.node)
        turn = self._read(completion)
        messages = await self._answer(turn)
        if messages is None:
            return "done" if turn.finished else "length"
        self.messages += messages
        if len(self.turns) == limits.turns:
            return "turns"
        if sum(len(str(m.get("content", ""))) for m in messages) > LONGEST_TOKEN * stage.max_model_len:
            return "length"
        delta = self._encoded("an observation", lambda: stage.chat.delta(messages, [*completion.token_ids]))
        self.context = [*self.context, *completion.token_ids, *delta]
        return None

    def _read(self, completion: Completion) -> Turn:
        """The turn as the environment sees it. A turn that was cut off has no calls."""
        parsed, finished = completion.parsed, completion.finish_reason == "stop"
        token_ids = [*completion.token_ids]
        text = parsed.text if parsed else self.stage.decode(token_ids)
        calls = parsed.calls if parsed and finished else ()
        malformed = parsed.malformed if parsed and finished else ""
        turn = Turn(
            text=text,
            reasoning=parsed.reasoning if parsed else "",
            calls=calls,
            malformed=malformed,
            finished=finished,
            token_ids=token_ids,
        )
        self.turns.append(turn)
        self.messages.append(spoken(turn.text, turn.calls, turn.reasoning))
        return turn

    async def _answer(self, turn: Turn) -> Messages | None:
        """What the policy reads next; None if its turn was the last."""
        if not turn.finished:
            return None
        native = bool(turn.calls)
        try:
            if not native and not turn.malformed and "parse" in self.env.offers:
                found = await self._ask("`parse`", partial(methods.parse, text=turn.text))
                self._now(calls=as_calls(found))
        except ToolError as error:
            self._now(malformed=str(error))
        if self.turns[-1].malformed:
            return user(f"The call was not understood: {self.turns[-1].malformed}")
        if self.turns[-1].calls:
            return await self._results(native)
        return await self._reply() if "reply" in self.env.offers else None

    async def _results(self, native: bool) -> Messages:
        """Make the calls of the last turn, one after the other."""
        messages: Messages = []
        for call in self.turns[-1].calls:
            self.in_tool = True
            try:
                what = f"the tool {call.name}"
                result = as_text(await self._ask(what, partial(methods.use, call=call, more=self.stage.tools)), what)
            except ToolError as error:
                result = str(error)
            self.in_tool = False
            self._now(results=(*self.turns[-1].results, result))
            messages.append({"role": "tool", "name": call.name, "tool_call_id": call.id, "content": result})
        return messages if native else user("\n".join(self.turns[-1].results))

    async def _reply(self) -> Messages | None:
        try:
            step = await self._ask("`reply`", partial(methods.reply, turn=self.turns[-1]))
        except ToolError as error:
            return user(str(error))
        if step is None:
            return None
        if not isinstance(step, Step):
            raise EnvError(f"`reply` returned {show(step)}: return Step(observation='...'), or None to end the episode")
        if not math.isfinite(step.reward):
            raise EnvError(f"`reply` returned the reward {step.reward}, which is not finite")
        self._now(reward=float(step.reward))
        assert self.node is not None
        self.node.paid = float(step.reward)
        return None if step.done else as_messages(step.observation, "`reply`")

    async def _scored(self, ended: Ended, member: int) -> list[Trajectory]:
        """The rows with the episode's reward."""
        episode = Episode(task=self.prompt.task, turns=tuple(self.turns), ended=ended, messages=self.messages)
        try:
            result = await self._ask("`reward`", partial(methods.reward, episode=episode), self.stage.reward_s)
            reward, parts = points(result)
            by_turn = sum(turn.reward for turn in self.turns)
            total = None if reward is None else finite(reward + by_turn, " with those of the turns")
        except ToolError as error:
            raise fault("`reward`", error) from error
        except NoScore as error:
            raise EnvError(f"`reward` returned a value that {error}") from error
        if total is None:
            return []
        cut = ended != "done"
        return self.tree.rows(
            group=self.prompt.ordinal,
            episode=member,
            reward=total,
            reward_parts=parts | ({"turns": by_turn} if any(turn.reward for turn in self.turns) else {}),
            finish_reason="length" if cut else "stop",
            trained=not (self.stage.mask_truncated and cut),
        )

    async def _ask(self, what: str, work: Work, seconds: float | None = None) -> Any:
        """Call a method of the environment. Raises ToolError, and EnvError for everything else."""
        self.waits_for = what
        try:
            return await self.env.run(work, self.stage.limits.tool_s if seconds is None else seconds)
        except ToolError:
            if what == "`start`":
                raise EnvError("`start` raised ToolError, and there is no turn yet that it could answer") from None
            raise
        except Exception as error:  # the user's code may raise anything, and none of it may become a reward
            raise fault(what, error) from error

    def _encoded(self, what: str, encode: Callable[[], list[int]]) -> list[int]:
        try:
            return encode()
        except Exception as error:  # template and tokenizer are other people's code, and the text is the environment's
            raise fault(f"the chat template, given {what},", error) from error

    def _now(self, **changes: Any) -> None:
        """What is known of the last turn now."""
        self.turns[-1] = replace(self.turns[-1], **changes)
