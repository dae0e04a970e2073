"""Anthropic's Messages: a request as `Asked`, and an answer as JSON or as events."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rl.environments.observations import call
from rl.environments.types import Messages
from rl.typed import show
from rollout.endpoint.asked import Answer, Asked, Body, Refused, function, given, number, records, stops_of, text_of
from rollout.endpoint.chat import Event

KINDS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
"""Of errors, by their status."""


def read(body: Body) -> Asked:
    """The request. Raises Refused."""
    messages: Messages = []
    if body.get("system"):
        messages.append({"role": "system", "content": text_of(body["system"], "system")})
    for index, sent in enumerate(records(body, "messages", needed=True)):
        messages += _messages(sent, f"messages[{index}]")
    choice = body.get("tool_choice")
    shown = not (isinstance(choice, dict) and choice.get("type") == "none")
    return Asked(
        messages=messages,
        tools=[_tool(each) for each in records(body, "tools")] if shown else [],
        max_tokens=number(body, "max_tokens"),
        stop=stops_of(body),
        stream=bool(given(body, "stream", bool)),
    )


def _tool(sent: Mapping[str, Any]) -> dict[str, Any]:
    if sent.get("type") not in (None, "custom"):
        raise Refused(f"tools: {show(sent)} is a tool of Anthropic's own", setting="tools")
    return function(sent.get("name"), sent.get("description"), sent.get("input_schema"))


def _messages(sent: Mapping[str, Any], where: str) -> Messages:
    """A message as one of OpenAI's, or as several: each result of a tool is a message there."""
    role, content = sent.get("role"), sent.get("content")
    if role not in ("user", "assistant"):
        raise Refused(f"{where} has the role {show(role)}", setting="messages", code="invalid_value")
    if not isinstance(content, list):
        return [{"role": role, "content": text_of(content, where)}]
    blocks = records(sent, "content")
    said = [b for b in blocks if b.get("type") not in ("tool_use", "tool_result", "thinking", "redacted_thinking")]
    results: Messages = [
        {"role": "tool", "tool_call_id": str(b.get("tool_use_id")), "content": text_of(b.get("content"), where)}
        for b in blocks
        if b.get("type") == "tool_result"
    ]
    calls = [
        call(str(b.get("id")), str(b.get("name")), b.get("input") or {}) for b in blocks if b.get("type") == "tool_use"
    ]
    own: dict[str, Any] = {"role": role, "content": text_of(said, where)} | ({"tool_calls": calls} if calls else {})
    return results + ([own] if said or calls or not results else [])


def write(answer: Answer, model: str) -> dict[str, Any]:
    """The answer as one object."""
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": _blocks(answer),
        "stop_reason": _reason(answer),
        "stop_sequence": answer.stop,
        "usage": _usage(answer),
    }


def events(answer: Answer, model: str, body: Body) -> Iterator[Event]:
    """The answer as a stream."""
    del body

    def event(kind: str, **data: Any) -> Event:
        return kind, {"type": kind, **data}

    begun = write(answer, model) | {"content": [], "stop_reason": None}
    yield event("message_start", message=begun | {"usage": _usage(answer) | {"output_tokens": 0}})
    for index, block in enumerate(_blocks(answer)):
        if block["type"] == "text":
            empty, delta = block | {"text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty = block | {"input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        yield event("content_block_start", index=index, content_block=empty)
        yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    ended = {"stop_reason": _reason(answer), "stop_sequence": answer.stop}
    yield event("message_delta", delta=ended, usage={"output_tokens": answer.completion_tokens})
    yield event("message_stop")


def error(refused: Refused) -> dict[str, Any]:
    """What a client raises its error from."""
    kind = KINDS.get(refused.status, "invalid_request_error" if refused.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(refused)}}


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    text = [{"type": "text", "text": answer.text}] if answer.text or not answer.calls else []
    return text + [{"type": "tool_use", "id": c.id, "name": c.name, "input": dict(c.arguments)} for c in answer.calls]


def _reason(answer: Answer) -> str:
    ended = "stop_sequence" if answer.stop else "end_turn"
    return "max_tokens" if not answer.finished else "tool_use" if answer.calls else ended


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "input_tokens": answer.prompt_tokens - answer.cached_tokens,
        "cache_read_input_tokens": answer.cached_tokens,
        "output_tokens": answer.completion_tokens,
    }
