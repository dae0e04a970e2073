"""What does a request ask for, and which requests are refused? The same for every dialect of clients.

A setting that would change what the policy is likely to sample is refused by its name: the trainer computes the
probabilities of the run's own settings, and would not know of any other. A setting that nobody here knows may be one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from rl.environments.types import Messages
from rl.typed import show
from rl.types import Call

Body = Mapping[str, Any]
T = TypeVar("T")
SAME = ("temperature", "top_p", "top_k", "min_p")
"""Settings that a request may repeat, and not change."""
AUTO = {"type": "auto"}
STOPS = ("stop", "stop_sequences")
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}}, {}),
    "tool_choice": (
        "auto",
        "none",
        {"type": "auto"},
        {"type": "auto", "disable_parallel_tool_use": False},
        {"type": "none"},
    ),
    "parallel_tool_calls": (True,),
    "thinking": ({"type": "disabled"},),
    "reasoning": ({},),
    "modalities": (["text"],),
    "background": (False,),
    "truncation": ("disabled",),
}
"""Values that change nothing, of settings that may not be used."""
HARMLESS = {
    *("model", "messages", "input", "system", "instructions", "previous_response_id", "tools", "include"),
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "stream", "stream_options", "seed"),
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prompt_cache_options", "cache_control", "inference_geo", "user_profile_id", "workspace_id"),
}


class Refused(Exception):
    """A request that cannot be answered; `setting` names what is wrong with it."""

    def __init__(self, message: str, *, setting: str = "", status: int = 400, code: str = "unsupported_value") -> None:
        super().__init__(message)
        self.setting, self.status, self.code = setting, status, code


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, in the words of OpenAI's chat messages."""

    messages: Messages
    tools: Sequence[Mapping[str, Any]] = ()
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the reply, and are no part of what the client gets."""
    stream: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the policy said to a request."""

    id: str
    """Letters and digits, the same whenever the same is asked again."""
    created: int
    """Seconds since 1970."""
    text: str
    reasoning: str
    calls: tuple[Call, ...]
    """With an id each."""
    finished: bool
    """False: a limit of tokens cut it off, and it has no calls."""
    stop: str | None
    """The text of the request's `stop` that ended it."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    messages: Messages = field(default_factory=Messages)
    """The conversation with this reply."""


def check_settings(body: Body, run: Mapping[str, Any]) -> None:
    """Raise Refused for the first setting that would change the distribution. `run` has the values of `SAME`, and the
    texts of `stop`."""
    for name, value in body.items():
        if name in HARMLESS or value is None or value == []:
            continue
        if name in SAME:
            off = name == "top_k" and value in (0, -1) and run[name] in (0, -1)
            if value != run[name] and not off:
                raise Refused(
                    f"{name}={show(value)}: this run samples with {name}={run[name]:g}, and is trained on that; leave "
                    "it out, or change the run",
                    setting=name,
                )
        elif name in STOPS and run.get("stop") and {*stops_of(body)} == {*run["stop"]}:
            continue
        elif value not in NEUTRAL.get(name, ()):
            raise Refused(
                f"{name}={show(value)} is not served here: it may change what the policy samples, and a trainer would "
                "not know of it. Leave it out",
                setting=name,
            )


def number(body: Body, *names: str) -> int | None:
    """The first of these settings that is there, a whole number above 0. Raises Refused for another value."""
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise Refused(f"{name}={show(value)} must be a whole number above 0", setting=name, code="invalid_value")
        return value
    return None


def given(body: Body, name: str, kind: type[T]) -> T | None:
    """A setting of this type, where it is there. Raises Refused for another type: `"false"` is no False."""
    value = body.get(name)
    if value is not None and type(value) is not kind:
        raise Refused(f"{name}={show(value)} must be of type {kind.__name__}", setting=name, code="invalid_type")
    return value


def stops_of(body: Body) -> tuple[str, ...]:
    """The texts at which a client wants its reply to end. Raises Refused for what is no text."""
    value: Any = next((body[name] for name in STOPS if body.get(name)), [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise Refused(f"stop={show(value)} must be a text, or a list of texts", setting="stop", code="invalid_type")
    return tuple(texts)


def records(body: Body, name: str, *, needed: bool = False) -> list[dict[str, Any]]:
    """A list of objects. Raises Refused for anything else."""
    value = body.get(name)
    if value is None and not needed:
        return []
    items = cast(list[Any], value) if isinstance(value, list) else []
    if (needed and not items) or value is None or not all(isinstance(each, dict) for each in items):
        raise Refused(f"{name}={show(value)} must be a list of objects", setting=name, code="invalid_type")
    return items


def text_of(content: Any, where: str, kinds: Iterable[str] = ("text",)) -> str:
    """The text of a message: a text, or a list of parts of these kinds. Raises Refused for what a text model cannot
    read."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = cast(list[Any], content) if isinstance(content, list) else [content]
    texts = [each.get("text") if isinstance(each, dict) and each.get("type") in kinds else None for each in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Refused(f"{where} has {show(content)}, and the policy reads text", setting=where.partition("[")[0])
    return "".join(cast(list[str], texts))


def function(name: Any, description: Any, parameters: Any, setting: str = "tools") -> dict[str, Any]:
    """A tool's schema in OpenAI's form. Raises Refused for one without a name."""
    if not isinstance(name, str) or not name:
        raise Refused(f"{setting}: a tool has the name {show(name)}", setting=setting, code="invalid_value")
    if not isinstance(parameters, dict | None):
        raise Refused(f"{setting}: {name} has the schema {show(parameters)}", setting=setting, code="invalid_type")
    told = {"description": description} if description else {}
    return {"type": "function", "function": {"name": name, **told, "parameters": parameters or {"type": "object"}}}
