"""OpenAI's Responses: a request as `Asked`, and an answer as JSON or as events."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rl.environments.observations import call
from rl.environments.types import Messages
from rl.typed import show
from rollout.endpoint.asked import Answer, Asked, Body, Refused, function, given, number, records, text_of
from rollout.endpoint.chat import ROLES, Event, arguments_of
from rollout.endpoint.chat import error as error

TEXT = ("input_text", "output_text", "text")


def read(body: Body, earlier: Messages) -> Asked:
    """The request. `earlier` is the conversation with the reply of `previous_response_id`. Raises Refused."""
    messages: Messages = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": text_of(body["instructions"], "instructions")})
    # Instructions are those of this request alone.
    messages += earlier[earlier[:1] != [] and earlier[0]["role"] == "system" and bool(messages) :]
    asked = body.get("input")
    if isinstance(asked, str):
        messages.append({"role": "user", "content": asked})
    else:
        for index, item in enumerate(records(body, "input", needed=True)):
            _add(messages, item, f"input[{index}]")
    shown = body.get("tool_choice") != "none"
    return Asked(
        messages=messages,
        tools=[_tool(each) for each in records(body, "tools")] if shown else [],
        max_tokens=number(body, "max_output_tokens"),
        stream=bool(given(body, "stream", bool)),
    )


def _tool(sent: Mapping[str, Any]) -> dict[str, Any]:
    if sent.get("type") != "function":
        raise Refused(f"tools: {show(sent)} is no function", setting="tools")
    return function(sent.get("name"), sent.get("description"), sent.get("parameters"))


def _add(messages: Messages, item: Mapping[str, Any], where: str) -> None:
    """Add an item. Calls belong to the assistant's message before them."""
    kind = item.get("type", "message")
    if kind == "reasoning":
        return
    if kind == "function_call_output":
        content = text_of(item.get("output"), where, TEXT)
        messages.append({"role": "tool", "tool_call_id": str(item.get("call_id")), "content": content})
    elif kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        made = call(str(item.get("call_id")), str(item.get("name")), arguments_of(item.get("arguments")))
        messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", []), made]}
    elif kind == "message" and (role := ROLES.get(str(item.get("role")))):
        messages.append({"role": role, "content": text_of(item.get("content"), where, TEXT)})
    else:
        raise Refused(f"{where} is {show(item)}, which the policy cannot read", setting="input")


def write(answer: Answer, model: str) -> dict[str, Any]:
    """The answer as one object."""
    cut = None if answer.finished else {"reason": "max_output_tokens"}
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "status": "completed" if answer.finished else "incomplete",
        "incomplete_details": cut,
        "error": None,
        "model": model,
        "output": _items(answer),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "instructions": None,
        "metadata": {},
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    }


def events(answer: Answer, model: str, body: Body) -> Iterator[Event]:
    """The answer as a stream."""
    del body
    whole, count = write(answer, model), 0

    def event(kind: str, **data: Any) -> Event:
        nonlocal count
        count += 1
        return kind, {"type": kind, "sequence_number": count - 1, **data}

    begun = whole | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield event("response.created", response=begun)
    for index, item in enumerate(whole["output"]):
        at = {"output_index": index, "item_id": item["id"]}
        if item["type"] == "function_call":
            empty = item | {"arguments": "", "status": "in_progress"}
            yield event("response.output_item.added", output_index=index, item=empty)
            yield event("response.function_call_arguments.delta", **at, delta=item["arguments"])
            yield event("response.function_call_arguments.done", **at, arguments=item["arguments"], name=item["name"])
        else:
            part, empty = item["content"][0], item | {"content": [], "status": "in_progress"}
            yield event("response.output_item.added", output_index=index, item=empty)
            yield event("response.content_part.added", **at, content_index=0, part=part | {"text": ""})
            yield event("response.output_text.delta", **at, content_index=0, delta=part["text"], logprobs=[])
            yield event("response.output_text.done", **at, content_index=0, text=part["text"], logprobs=[])
            yield event("response.content_part.done", **at, content_index=0, part=part)
        yield event("response.output_item.done", output_index=index, item=item)
    yield event("response.completed" if answer.finished else "response.incomplete", response=whole)


def _items(answer: Answer) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    status = "completed" if answer.finished else "incomplete"
    if answer.text or not answer.calls:
        part = {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}
        own = {"type": "message", "id": f"msg_{answer.id}", "role": "assistant", "status": status, "content": [part]}
        items.append(own)
    for index, each in enumerate(answer.calls):
        made = {"call_id": each.id, "name": each.name, "arguments": json.dumps(dict(each.arguments))}
        items.append({"type": "function_call", "id": f"fc_{answer.id}{index}", "status": status, **made})
    return items
