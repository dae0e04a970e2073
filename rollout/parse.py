"""What did the policy say: reasoning, calls, and an answer? Read by vLLM's parsers from the sampled tokens."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from rl.config import RolloutConfig
from rl.types import Call, Completion, FinishReason, Parsed

STARTS = re.compile(r"^(tool_calls?_start_token|bot_token|bot_string|tc_start)$")
ENGINE_STARTS = ("TOOL_SECTION_START", "TOOL_START", "TOOL_CALLS", "TOOL_TOKEN")
"""Where vLLM's parsers, of the older and the newer kind, keep the text with which calls begin."""
BARE = re.compile(r'\s*\[?\s*\{\s*"(name|function|type)"')
"""The beginning of a call in JSON alone."""
MOST_TOOLS = 64
"""Sets of tools for which a parser is kept."""
CUT = "the reply was cut off inside a call, or behind one, so no call is made"


class Parser:
    """Reads replies. Names are those of vLLM; an empty one is off. `tools` are the schemas of the run's tools.

    Raises ValueError for a name that vLLM does not know, or a parser that cannot work with this tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Sequence[int],
        *,
        tool_parser: str = "",
        reasoning_parser: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        # Imported late: this takes seconds and 0.5 GB, which engines without a parser do not need.
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        self.tokenizer, self.stop_ids = tokenizer, frozenset(stop_ids)
        self.special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        schemas = [dict(tool) for tool in tools] or None
        self.request: Any = ChatCompletionRequest.model_validate({"messages": [], "model": "", "tools": schemas})
        tool, reason = ToolParserManager, ReasoningParserManager
        self.tool: Any = _made("tool_parser", tool_parser, tool.get_tool_parser, tool.list_registered, tokenizer,
                               self.request.tools)  # fmt: skip
        self.reasoning: Any = _made("reasoning_parser", reasoning_parser, reason.get_reasoning_parser,
                                    reason.list_registered, tokenizer)  # fmt: skip
        self.starts, self.pair = tuple(_starts(self.tool)), tuple(_terminals(self.tool, "TOOL_START", "TOOL_END"))

    def __call__(self, prompt: Sequence[int], completion: Completion) -> Parsed:
        """What the parsers find in a completion of this prompt."""
        return self.parse(prompt, completion.token_ids, completion.finish_reason)

    def parse(self, prompt: Sequence[int], token_ids: Sequence[int], finish_reason: FinishReason) -> Parsed:
        """What the parsers find in a reply. A call that cannot be read is malformed, and so is every call of a reply
        that was cut off: then no call is made."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        said: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        try:
            reasoning, answer = self._split(prompt, said)
            text, calls, malformed = self._calls(answer) if self.tool else (answer, (), "")
        except Exception as error:  # vLLM's parsers raise anything on texts of a policy, which then reads the reason
            return Parsed(text=self._plain(said), malformed=f"it cannot be read: {error}")
        if finish_reason != "stop" and (calls or malformed):
            text, calls, malformed = answer, (), CUT
        return Parsed(text=self._plain(text), reasoning=self._plain(reasoning), calls=calls, malformed=malformed)

    def _split(self, prompt: Sequence[int], said: str) -> tuple[str, str]:
        """Reasoning and the rest."""
        if not self.reasoning:
            return "", said
        # Reasoning of earlier turns has ended, whatever this turn does.
        ends = [i for i, token in enumerate(prompt) if token in self.stop_ids]
        turn = list(prompt[ends[-1] + 1 if ends else 0 :])
        if self.reasoning.is_reasoning_end(turn):
            return "", said
        reasoning, answer = self.reasoning.extract_reasoning(said, self.request)
        return reasoning or "", answer or ""

    def _calls(self, answer: str) -> tuple[str, tuple[Call, ...], str]:
        """The text without calls, the calls, and why they cannot be read."""
        found = self.tool.extract_tool_calls(answer, self.request)
        calls: list[Call] = []
        for each in found.tool_calls if found.tools_called else []:
            try:
                arguments = json.loads(each.function.arguments or "{}")
            except json.JSONDecodeError:
                arguments = None
            if not isinstance(arguments, dict):
                return answer, (), f"the arguments of {each.function.name} are not a JSON object"
            # An id that the parser has drawn would differ in a run that is resumed.
            own = each.id if each.id and each.id in answer else ""
            calls.append(Call(name=each.function.name, arguments=cast(dict[str, Any], arguments), id=own))
        # vLLM returns a call that it cannot read as an answer, or leaves it out.
        begun = max((answer.count(start) for start in self.starts), default=0) or int(bool(BARE.match(answer)))
        if begun > len(calls):
            return answer, (), f"{begun - len(calls)} of {begun} calls cannot be read as a call"
        if len(self.pair) == 2 and answer.count(self.pair[0]) > answer.count(self.pair[1]):
            # The newer parsers finish such a call themselves.
            return answer, (), f"a call does not end with {self.pair[1]}"
        return found.content or "" if calls else answer, tuple(calls), ""

    def _plain(self, text: str) -> str:
        for token in self.special:
            text = text.replace(token, "")
        return text.strip()


class Parsers:
    """The parser of a run for each set of tools. Raises ValueError at once for settings that make no `Parser`."""

    def __init__(self, rollout: RolloutConfig, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        self.rollout, self._kept = rollout, dict[str, Parser]()
        self._make = partial(Parser, tokenizer, [*stop_ids, *rollout.stop_token_ids])
        self.of([])

    def of(self, tools: Sequence[Mapping[str, Any]], *, calls: bool = True) -> Parser | None:
        """The one that reads replies where these tools were shown; None where the run has none. Without `calls` it
        reads reasoning alone."""
        names = {
            "tool_parser": self.rollout.tool_parser if calls else "",
            "reasoning_parser": self.rollout.reasoning_parser,
        }
        if not any(names.values()):
            return None
        key = json.dumps([calls, *tools])
        if key not in self._kept:
            if len(self._kept) >= MOST_TOOLS:
                self._kept.clear()
            self._kept[key] = self._make(tools=tools, **names)
        return self._kept[key]


def _made(
    setting: str, name: str, get: Callable[[str], Any], known: Callable[[], Iterable[str]], *arguments: Any
) -> Any:
    """vLLM's parser of this name; None without a name."""
    if not name:
        return None
    names = sorted(known())
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        which = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
        raise ValueError(f"rollout.{setting}={name!r} is no parser of vLLM: {which}")
    try:
        return get(name)(*arguments)
    except Exception as error:  # a parser that needs tokens which this model has not
        raise ValueError(f"rollout.{setting}={name!r} does not fit this model's tokenizer: {error}") from error


def _starts(parser: Any) -> set[str]:
    """The texts with which calls of a parser begin."""
    names = [name for name in dir(parser) if STARTS.match(name)]
    found = [getattr(parser, name) for name in names]
    return {each for each in [*found, *_terminals(parser, *ENGINE_STARTS)] if isinstance(each, str) and each}


def _terminals(parser: Any, *names: str) -> list[str]:
    """These texts of a parser of the newer kind, where it has them."""
    engine = getattr(parser, "_parser_engine", None)
    terminals = engine.parser_engine_config.terminals if engine else {}
    spelled = [terminals[name] for name in names if name in terminals]
    return [each if isinstance(each, str) else each[0] for each in spelled]
