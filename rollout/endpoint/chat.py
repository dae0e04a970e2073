"""OpenAI's Chat Completions: a request as `Asked`, and an answer as JSON or as events."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rl.environments.observations import call
from rl.typed import show
from rollout.endpoint.asked import Answer, Asked, Body, Refused, function, given, number, records, stops_of, text_of

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
Event = tuple[str, dict[str, Any] | str]
"""The name of a server-sent event, empty where the dialect has none, and its data."""


def read(body: Body) -> Asked:
    """The request. Raises Refused."""
    shown = body.get("tool_choice") != "none"
    return Asked(
        messages=[message(m, i) for i, m in enumerate(records(body, "messages", needed=True))],
        tools=[tool(each) for each in records(body, "tools")] if shown else [],
        max_tokens=number(body, "max_completion_tokens", "max_tokens"),
        seed=given(body, "seed", int),
        stop=stops_of(body),
        stream=bool(given(body, "stream", bool)),
    )


def tool(sent: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema. `strict` is left out: no grammar holds the policy to a schema."""
    made = sent.get("function")
    if sent.get("type") != "function" or not isinstance(made, dict):
        raise Refused(f"tools: {show(sent)} is no function", setting="tools")
    return function(made.get("name"), made.get("description"), made.get("parameters"))


def message(sent: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message with the fields that a chat template reads."""
    where, role = f"messages[{index}]", ROLES.get(str(sent.get("role")))
    if role is None:
        raise Refused(f"{where} has the role {show(sent.get('role'))}", setting="messages", code="invalid_value")
    if unread := [name for name in ("function_call", "audio") if sent.get(name)]:
        raise Refused(f"{where} has {unread[0]}, which the policy cannot read", setting="messages")
    if role != "assistant" and sent.get("content") is None:
        raise Refused(f"{where} has no content", setting="messages", code="invalid_value")
    made: dict[str, Any] = {"role": role, "content": text_of(sent.get("content"), where)}
    if role == "assistant" and (calls := records(sent, "tool_calls")):
        made["tool_calls"] = [call(str(c.get("id") or ""), *_called(c, where)) for c in calls]
    return made | {name: value for name in ("tool_call_id", "name") if (value := given(sent, name, str))}


def _called(given: Mapping[str, Any], where: str) -> tuple[str, Any]:
    made = given.get("function")
    if not isinstance(made, dict) or not isinstance(made.get("name"), str):
        raise Refused(f"{where} has the tool call {show(given)}", setting="messages", code="invalid_value")
    return made["name"], arguments_of(made.get("arguments"))


def arguments_of(given: Any) -> Any:
    """The arguments of a call: as an object where the text is one."""
    try:
        return json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError:
        return given


def write(answer: Answer, model: str) -> dict[str, Any]:
    """The answer as one object."""
    choice = {"index": 0, "message": _spoken(answer), "finish_reason": _reason(answer), "logprobs": None}
    return _head(answer, model, "chat.completion") | {"choices": [choice], "usage": usage(answer)}


def events(answer: Answer, model: str, body: Body) -> Iterator[Event]:
    """The answer as a stream."""
    head = _head(answer, model, "chat.completion.chunk")

    def chunk(delta: Mapping[str, Any], reason: str | None = None) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return "", head | {"choices": [choice]}

    said = _spoken(answer)
    yield chunk({"role": "assistant", "content": ""})
    for name in ("reasoning_content", "content"):
        if said.get(name):
            yield chunk({name: said[name]})
    if calls := said.get("tool_calls"):
        yield chunk({"tool_calls": [{"index": i, **each} for i, each in enumerate(calls)]})
    yield chunk({}, _reason(answer))
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        yield "", head | {"choices": [], "usage": usage(answer)}
    yield "", "[DONE]"


def error(refused: Refused) -> dict[str, Any]:
    """What a client raises its error from."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    told = {"message": str(refused), "type": kind, "param": refused.setting or None, "code": refused.code}
    return {"error": told}


def usage(answer: Answer) -> dict[str, Any]:
    """The tokens of a request."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _head(answer: Answer, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{answer.id}", "object": kind, "created": answer.created, "model": model}


def _spoken(answer: Answer) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if answer.calls else "")}
    if answer.reasoning:
        said["reasoning_content"] = answer.reasoning
    if answer.calls:
        said["tool_calls"] = [call(c.id, c.name, json.dumps(dict(c.arguments))) for c in answer.calls]
    return said


def _reason(answer: Answer) -> str:
    # A reply that was cut off has no calls, so it is never said to end with them.
    return "length" if not answer.finished else "tool_calls" if answer.calls else "stop"
