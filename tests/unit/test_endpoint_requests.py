"""Requests that stock clients and agent libraries send: each is served as it is meant, or refused by name."""

import asyncio
import gzip
import json

import aiohttp
import anthropic
import openai
import pytest

from clients import ADD, endpoint, opening
from rollout.endpoint import server

ASK = {"role": "user", "content": "hello"}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
MADE = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "5"}
USE = {"name": "add", "input_schema": {"type": "object"}}
FUNCTION = {"type": "function", "name": "add", "parameters": None, "strict": True, "description": None}
CACHED = {"cache_control": {"type": "ephemeral"}}


def said(*messages, **settings):
    return {"messages": list(messages), **settings}


def items(*given, **settings):
    return {"input": list(given), **settings}


def uses(*ids):
    return {"role": "assistant", "content": [{"type": "tool_use", "id": i, "name": "add", "input": {}} for i in ids]}


def run(work, folder, **settings):
    async def main():
        served, engine = endpoint(folder, tool_parser="hermes", **settings)
        await served.start()
        try:
            return await work(served.open(opening()), engine)
        finally:
            await served.close()

    return asyncio.run(main())


async def ask(address, path, body, method="POST"):
    async with aiohttp.ClientSession() as session, session.request(method, address + path, json=body) as response:
        return response.status, json.loads(await response.text() or "null")


SERVED = [
    (CHAT, said({"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]}),
     "user:hello<end>"),
    (CHAT, said({"role": "developer", "content": "be"}, ASK), "system:be<end>user:hello<end>"),
    (CHAT, said(ASK, {"role": "assistant", "content": None, "tool_calls": [MADE]}, RESULT, tools=[ADD]),
     'tools add<end>user:hello<end>assistant:CALL add {"a": 2}<end>tool:5<end>'),
    (CHAT, said(ASK, {"role": "assistant", "tool_calls": [MADE]},
                {**RESULT, "content": [{"type": "text", "text": "5"}]}),
     'user:hello<end>assistant:CALL add {"a": 2}<end>tool:5<end>'),
    (CHAT, said(ASK, {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "audio": None,
                      "function_call": None, "annotations": []}, ASK),
     "user:hello<end>assistant:hi<end>user:hello<end>"),
    (CHAT, said(ASK, tools=[ADD], tool_choice="none"), "user:hello<end>"),
    (CHAT, said(ASK, tools=[ADD], tool_choice="auto", parallel_tool_calls=True), "tools add<end>user:hello<end>"),
    (CHAT, said(ASK, metadata={"a": "b"}, user="u", store=False, service_tier="auto", prompt_cache_key="k",
                stream_options={"include_usage": True}, functions=[], stop=[], tools=None, logit_bias=None),
     "user:hello<end>"),
    (CHAT, said({**ASK, "name": "bob"}, max_completion_tokens=3, logprobs=False, top_logprobs=None, n=1),
     "user:hello<end>"),
    (MESSAGES, said(ASK, system=[{"type": "text", "text": "be", **CACHED}], max_tokens=5, metadata={"user_id": "x"},
                    **CACHED), "system:be<end>user:hello<end>"),
    (MESSAGES, said(ASK, uses("t1", "t2"),
                    {"role": "user", "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": "1"},
                        {"type": "tool_result", "tool_use_id": "t2", "is_error": True,
                         "content": [{"type": "text", "text": "2", **CACHED}]},
                        {"type": "text", "text": "go"}]}, tools=[{**USE, **CACHED}], max_tokens=5,
                    tool_choice={"type": "auto", "disable_parallel_tool_use": False}),
     "tools add<end>user:hello<end>assistant:CALL add {}CALL add {}<end>tool:1<end>tool:2<end>user:go<end>"),
    (MESSAGES, said(ASK, uses("t1"), {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]},
                    max_tokens=5), "user:hello<end>assistant:CALL add {}<end>tool:<end>"),
    (MESSAGES, said(ASK, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"},
                                                           {"type": "text", "text": "hi"}]}, ASK, max_tokens=5),
     "user:hello<end>assistant:hi<end>user:hello<end>"),
    (RESPONSES, items({"role": "developer", "content": "be"},
                      {"role": "user", "content": [{"type": "input_text", "text": "hello"}]}, reasoning={},
                      include=["reasoning.encrypted_content"], text={"format": {"type": "text"}}, background=False),
     "system:be<end>user:hello<end>"),
    (RESPONSES, items(ASK, {"type": "reasoning", "id": "r", "summary": []},
                      {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
                      {"type": "function_call", "call_id": "d", "name": "add", "arguments": "{}"},
                      {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "5"}]},
                      {"type": "function_call_output", "call_id": "d", "output": "6"}, tools=[FUNCTION]),
     "tools add<end>user:hello<end>assistant:CALL add {}CALL add {}<end>tool:5<end>tool:6<end>"),
]  # fmt: skip


def test_what_is_served_is_what_the_engine_is_asked(tmp_path):
    async def work(address, engine):
        found = []
        for path, body, _ in SERVED:
            engine.asked.clear()
            # Another seed is another draw, where a request means the same as an earlier one.
            more = {} if path != CHAT else {"seed": len(found)}
            status, answer = await ask(address, path, body | more)
            found.append(engine.tokenizer.decode(engine.asked[0][0]) if status == 200 else (body, answer))
        return found

    assert run(work, tmp_path) == [f"{shown}assistant:" for *_, shown in SERVED]


REFUSED = [
    (CHAT, said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}), "messages"),
    (CHAT, said({"role": "user", "content": None}), "messages"),
    (CHAT, said({"role": "user"}), "messages"),
    (CHAT, said({"role": "function", "name": "add", "content": "5"}), "messages"),
    (CHAT, said(ASK, {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": ""}}, ASK),
     "messages"),
    (CHAT, said(ASK, {"role": "tool", "tool_call_id": {"a": 1}, "content": "5"}), "tool_call_id"),
    (CHAT, said({"role": "user", "content": "\ud800"}), "messages"),
    (CHAT, said(), "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, said(ASK, functions=[{"name": "add"}]), "functions"),
    (CHAT, said(ASK, tools=[{"type": "custom", "custom": {"name": "x"}}]), "tools"),
    (CHAT, said(ASK, tools=[{"type": "function", "function": {"name": "f", "parameters": "x"}}]), "tools"),
    (CHAT, said(ASK, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}),
     "tool_choice"),
    (CHAT, said(ASK, response_format={"type": "json_schema", "json_schema": {}}), "response_format"),
    (CHAT, said(ASK, reasoning_effort="low"), "reasoning_effort"),
    (CHAT, said(ASK, web_search_options={}), "web_search_options"),
    (CHAT, said(ASK, stop="x"), "stop"),
    (CHAT, said(ASK, seed="5"), "seed"),
    (CHAT, said(ASK, seed=True), "seed"),
    (CHAT, said(ASK, stream="false"), "stream"),
    (CHAT, said(ASK, max_tokens=0), "max_tokens"),
    (CHAT, said(ASK, temperature=float("nan")), "temperature"),
    (RESPONSES, items({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}), "input"),
    (RESPONSES, items({"type": "item_reference", "id": "x"}), "input"),
    (RESPONSES, items(ASK, tools=[{"type": "web_search"}]), "tools"),
    (RESPONSES, items(ASK, reasoning={"effort": "low"}), "reasoning"),
    (RESPONSES, items(ASK, previous_response_id="resp_x"), "previous_response_id"),
    (RESPONSES, items(), "input"),
]  # fmt: skip
REFUSED_BY_ANTHROPIC = [
    (said({"role": "system", "content": "x"}, ASK), "messages[0] has the role 'system'"),
    (said({"role": "user", "content": [{"type": "image", "source": {}}]}), "the policy reads text"),
    (said(ASK, {"role": "assistant", "content": "{"}), "the last message is the assistant's"),
    (said(ASK, stop_sequences=["x"]), "stop_sequences="),
    (said(ASK, thinking={"type": "enabled", "budget_tokens": 1024}), "thinking="),
    (said(ASK, tool_choice={"type": "any"}), "tool_choice="),
    (said(ASK, tool_choice={"type": "auto", "disable_parallel_tool_use": True}), "tool_choice="),
    (said(ASK, tools=[{"type": "web_search_20250305", "name": "web_search"}]), "a tool of Anthropic's own"),
    (said(ASK, output_config={"effort": "low"}), "output_config="),
]


def test_what_is_refused_has_the_name_of_the_field_in_the_form_of_its_client(tmp_path):
    async def work(address, engine):
        for path, body, name in REFUSED:
            status, answer = await ask(address, path, body)
            assert (status, answer.get("error", {}).get("param")) == (400, name), (body, answer)
        for body, says in REFUSED_BY_ANTHROPIC:
            status, answer = await ask(address, MESSAGES, body | {"max_tokens": 5})
            assert (status, answer["type"], answer["error"]["type"]) == (400, "error", "invalid_request_error"), body
            assert says in answer["error"]["message"]
        return engine.asked

    assert run(work, tmp_path) == []


@pytest.mark.parametrize(("path", "name"), [(CHAT, "stop"), (MESSAGES, "stop_sequences")])
def test_the_texts_that_end_the_replies_of_the_run_may_be_repeated_and_are_not_shown(tmp_path, path, name):
    async def work(address, engine):
        for other in ("Observation:", ["<", "Observation:", "x"]):
            assert (await ask(address, path, said(ASK, max_tokens=9, **{name: other})))[0] == 400
        asked = said(ASK, max_tokens=30, **{name: ["<", "Observation:"]})
        status, answer = await ask(address, path, asked)
        assert status == 200
        shown = answer["content"][0]["text"] if path == MESSAGES else answer["choices"][0]["message"]["content"]
        more = said(ASK, {"role": "assistant", "content": shown}, ASK, max_tokens=30, **{name: ["<", "Observation:"]})
        assert (await ask(address, path, more))[0] == 200
        return shown, answer, engine

    says = ["look Observation:", "more"]
    shown, answer, engine = run(work, tmp_path, says=says, stop=("Observation:", "<"))
    assert shown == "look "
    if path == MESSAGES:
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "Observation:")
    # What was sampled stays, and the next turn goes on from it.
    assert "assistant:look Observation:<end>user:hello<end>" in engine.tokenizer.decode(engine.asked[1][0])


def test_stock_clients_raise_their_own_errors(tmp_path):
    async def work(address, engine):
        api = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        other = anthropic.AsyncAnthropic(base_url=address, api_key="any", max_retries=0)
        with pytest.raises(openai.BadRequestError) as refused:
            await api.chat.completions.create(model="m", messages=[ASK], n=2)
        assert (refused.value.param, refused.value.code) == ("n", "unsupported_value")
        with pytest.raises(openai.NotFoundError, match="POST embeddings: Not Found; served are POST chat/completions"):
            await api.embeddings.create(model="m", input="x")
        with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
            await other.messages.count_tokens(model="m", messages=[ASK])
        assert (await api.models.retrieve("tiny")).id == "tiny"
        # Beta clients add a query.
        reply = await other.beta.messages.create(model="m", max_tokens=5, messages=[ASK], betas=["x"])
        assert reply.type == "message"
        assert [(await ask(address, CHAT, None, method))[0] for method in ("GET", "HEAD", "OPTIONS")] == [405] * 3
        assert (await ask(address, "/v1/models", None, "HEAD"))[0] == 200
        # Whatever a client calls its body, JSON is read.
        body = json.dumps(said(ASK)).encode()
        async with aiohttp.ClientSession() as session:
            for data, headers in ((body, {"Content-Type": "text/plain"}),
                                  (gzip.compress(body), {"Content-Encoding": "gzip"})):  # fmt: skip
                async with session.post(address + CHAT, data=data, headers=headers) as response:
                    assert response.status == 200

    run(work, tmp_path)


def test_tools_that_the_parser_cannot_have_are_refused_before_anything_is_sampled(tmp_path):
    async def work(address, engine):
        return await ask(address, CHAT, said(ASK, tools=[ADD | {"function": ADD["function"] | {"description": 5}}]))

    class Strict:
        def of(self, tools, *, calls):
            if any(tool["function"]["description"] == 5 for tool in tools):
                raise ValueError("description: Input should be a valid string")

    async def main():
        served, engine = endpoint(tmp_path, tool_parser="hermes")
        served.parsers = Strict()
        await served.start()
        try:
            return await work(served.open(opening()), engine), engine.asked
        finally:
            await served.close()

    (status, answer), asked = asyncio.run(main())
    assert (status, answer["error"]["param"], asked) == (400, "tools", [])
    assert "the parser hermes cannot have these tools: description" in answer["error"]["message"]


def test_a_client_that_leaves_is_no_fault_of_the_server(caplog):
    async def leaves(request):
        raise ConnectionResetError("Cannot write to closing transport")

    with pytest.raises(ConnectionResetError):
        asyncio.run(server._in_the_clients_form(None, leaves))
    assert not caplog.text


def test_a_fault_of_the_server_is_an_answer_too_and_is_logged(tmp_path, caplog):
    async def main():
        served, _ = endpoint(tmp_path)

        async def breaks(*_, **__):
            raise RuntimeError("a fault of ours")

        served._sample = breaks
        await served.start()
        try:
            return await ask(served.open(opening()), CHAT, said(ASK))
        finally:
            await served.close()

    status, answer = asyncio.run(main())
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (500, "server_error", "server_error")
    assert "a fault of ours" in answer["error"]["message"]
    assert "a request failed" in caplog.text
