"""Does an endpoint give stock clients what the policy sampled, and keep exactly that?"""

import asyncio
import json

import aiohttp
import anthropic
import openai
import pytest

from clients import ADD, END, endpoint, opening
from rl.agents.record import Record

ASK = [{"role": "user", "content": "hello"}]
SECRET = "s" * 24


def run(work, *made_of, **settings):
    """What `work(endpoint, engine, address)` returns."""

    async def main():
        served, engine = endpoint(*made_of, **settings)
        await served.start()
        try:
            return await work(served, engine, served.open(opening()))
        finally:
            await served.close()

    return asyncio.run(main())


def rows_of(record: Record):
    return record.tree().rows(group=0, episode=0, reward=1.0)


def client(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


async def post(address: str, path: str = "/v1/chat/completions", **body):
    async with aiohttp.ClientSession() as session, session.post(address + path, json=body) as response:
        return response.status, await response.json()


def test_a_conversation_of_a_stock_client_is_one_row_of_what_was_sampled(tmp_path):
    async def work(served, engine, address):
        api, messages = client(address), list(ASK)
        for text in ("more", "and more", ""):
            reply = await api.chat.completions.create(model="any", messages=messages)
            messages += [reply.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": text}]
        return await served.end(SECRET), engine

    record, engine = run(work, tmp_path)
    (row,) = rows_of(record)
    assert len(engine.asked) == 3
    for context, done in engine.asked:
        assert [*row.token_ids[: len(context)]] == context
        end = len(context) + len(done.token_ids)
        assert [*row.token_ids[len(context) : end]] == done.token_ids
        assert all(row.mask[len(context) : end])
        assert [*row.logprobs[len(context) : end]] == done.logprobs
        assert [*row.versions[len(context) : end]] == done.versions
    assert sum(row.mask) == sum(len(done.token_ids) for _, done in engine.asked)
    text = engine.tokenizer.decode(row.token_ids[: len(engine.asked[2][0])])
    assert text.startswith("user:hello<end>assistant:")
    assert text.count("<end>user:") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_their_results_travel_through_the_chat_api(tmp_path, stream):
    async def work(served, engine, address):
        api, messages = client(address), list(ASK)
        if stream:
            async with api.chat.completions.stream(model="any", messages=messages, tools=[ADD]) as events:
                final = await events.get_final_completion()
            message, reason = final.choices[0].message, final.choices[0].finish_reason
        else:
            reply = await api.chat.completions.create(model="any", messages=messages, tools=[ADD])
            message, reason = reply.choices[0].message, reply.choices[0].finish_reason
        (call,) = message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments), reason) == ("add", {"a": 2}, "tool_calls")
        sent = {"role": "assistant", "content": message.content, "tool_calls": [call.to_dict()]}
        for each in sent["tool_calls"]:
            for extra in ("parsed_arguments", "index"):
                each.pop(extra, None)
                each["function"].pop(extra, None)
        messages += [sent, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
        reply = await api.chat.completions.create(model="any", messages=messages, tools=[ADD])
        assert reply.choices[0].message.content == "it is 5"
        return await served.end(SECRET), engine

    record, engine = run(work, tmp_path, says=['CALL add {"a": 2}', "it is 5"], tool_parser="hermes")
    assert not record.branches
    assert len(rows_of(record)) == 1
    assert "tool:5<end>assistant:" in engine.tokenizer.decode(engine.asked[1][0])


def test_the_responses_api_goes_on_by_items_and_by_the_id_of_a_response(tmp_path):
    tool = {"type": "function", "name": "add", "description": "Adds.", "parameters": {}}

    async def work(served, engine, address):
        api = client(address)
        first = await api.responses.create(model="any", input="hello", tools=[tool])
        (call,) = [item for item in first.output if item.type == "function_call"]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
        items = [{"role": "user", "content": "hello"}, *[i.to_dict() for i in first.output], result]
        second = await api.responses.create(model="any", input=items, tools=[tool])
        assert second.output_text == "it is 5"
        third = await api.responses.create(model="any", input="sure?", previous_response_id=second.id, tools=[tool])
        same = {"model": "any", "input": "sure?", "previous_response_id": second.id, "tools": [tool]}
        async with api.responses.stream(**same) as events:
            again = await events.get_final_response()
        assert third.output_text == again.output_text == "yes"
        return await served.end(SECRET), engine

    record, engine = run(work, tmp_path, says=['CALL add {"a": 2}', "it is 5", "yes"], tool_parser="hermes")
    assert len(engine.asked) == 3
    assert (len(rows_of(record)), dict(record.branches)) == (1, {})


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_their_results_travel_through_the_messages_api(tmp_path, stream):
    tool = {"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}

    async def work(served, engine, address):
        api = anthropic.AsyncAnthropic(base_url=address, api_key="any", max_retries=0)
        asked = {"model": "any", "max_tokens": 32, "system": "be kind", "tools": [tool]}
        messages = list(ASK)
        if stream:
            async with api.messages.stream(**asked, messages=messages) as events:
                reply = await events.get_final_message()
        else:
            reply = await api.messages.create(**asked, messages=messages)
        assert reply.stop_reason == "tool_use"
        (use,) = reply.content
        assert (use.name, use.input) == ("add", {"a": 2})
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "5"}
        said = [block.to_dict() for block in reply.content]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
        reply = await api.messages.create(**asked, messages=messages)
        assert (reply.content[0].text, reply.stop_reason) == ("it is 5", "end_turn")
        return await served.end(SECRET), engine

    record, engine = run(work, tmp_path, says=['CALL add {"a": 2}', "it is 5"], tool_parser="hermes")
    assert (len(rows_of(record)), dict(record.branches)) == (1, {})
    assert engine.tokenizer.decode(engine.asked[1][0]).startswith("tools add<end>system:be kind<end>user:hello<end>")


def test_a_reply_that_a_limit_cut_off_is_never_called_a_tool_call(tmp_path):
    async def work(served, engine, address):
        reply = await client(address).chat.completions.create(model="m", messages=ASK, tools=[ADD], max_tokens=20)
        return reply.choices[0]

    choice = run(work, tmp_path, says=['CALL add {"a": 2} and a long explanation'], tool_parser="hermes")
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("n", 2),
        ("temperature", 0.2),
        ("top_p", 0.9),
        ("top_k", 5),
        ("min_p", 0.1),
        ("frequency_penalty", 0.5),
        ("presence_penalty", 1),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"5": 3}),
        ("response_format", {"type": "json_object"}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "add"}}),
        ("parallel_tool_calls", False),
        ("stop", ["x"]),
        ("logprobs", True),
        ("guided_json", {}),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_what_would_change_the_distribution_is_refused_by_name(tmp_path, setting, value):
    async def work(served, engine, address):
        status, answer = await post(address, messages=ASK, **{setting: value})
        return status, answer["error"], engine.asked, await served.end(SECRET)

    status, error, asked, record = run(work, tmp_path)
    assert (status, error["param"], asked) == (400, setting, [])
    assert setting in error["message"]
    assert record.refused == {setting: 1}


def test_values_that_change_nothing_are_taken(tmp_path):
    neutral = {"n": 1, "temperature": 1, "top_p": 1.0, "top_k": -1, "stop": None, "logit_bias": {}, "user": "me"}
    neutral |= {"response_format": {"type": "text"}, "tool_choice": "auto", "seed": 3, "max_completion_tokens": 5}

    async def work(served, engine, address):
        return await post(address, messages=ASK, **neutral)

    assert run(work, tmp_path)[0] == 200


def test_the_same_request_has_the_same_reply_also_while_it_is_sampled(tmp_path):
    async def work(served, engine, address):
        engine.gate = asyncio.Event()
        asking = [asyncio.create_task(post(address, messages=ASK)) for _ in range(3)]
        while not engine.running:
            await asyncio.sleep(0)
        engine.gate.set()
        answers = [await task for task in asking] + [await post(address, messages=ASK)]
        return answers, engine.asked, await served.end(SECRET)

    answers, asked, record = run(work, tmp_path)
    assert len(asked) == len(record.sampled) == 1
    assert all(answer == answers[0] for answer in answers)


def test_another_seed_of_a_request_is_another_draw_and_each_episode_draws_its_own(tmp_path):
    async def work(served, engine, address):
        for seed in (1, 2, None):
            await post(address, messages=ASK, seed=seed)
        await post(served.open(opening("t" * 24, member=1)), messages=ASK)
        return engine.seeds

    seeds = run(work, tmp_path)
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: [{"role": "user", "content": "HELLO"}, *m[1:]], "edited"),
        (lambda m: [{"role": "user", "content": "another question"}], "new"),
        (lambda m: m[2:], "dropped"),
        (lambda m: [m[0], {"role": "assistant", "content": "rewritten"}, m[2]], "edited"),
    ],
)
def test_an_edited_history_is_a_branch_with_its_reason(tmp_path, change, reason):
    async def work(served, engine, address):
        reply = (await post(address, messages=ASK))[1]["choices"][0]["message"]
        longer = [*ASK, {"role": "assistant", "content": reply["content"]}, {"role": "user", "content": "more"}]
        await post(address, messages=longer)
        await post(address, messages=change(longer))
        return await served.end(SECRET)

    record = run(work, tmp_path)
    assert record.branches == {reason: 1}
    assert len(rows_of(record)) == 2


def test_other_tools_are_another_branch(tmp_path):
    async def work(served, engine, address):
        reply = (await post(address, messages=ASK, tools=[ADD]))[1]["choices"][0]["message"]
        longer = [*ASK, {"role": "assistant", "content": reply["content"]}, {"role": "user", "content": "more"}]
        await post(address, messages=longer)
        return await served.end(SECRET)

    assert run(work, tmp_path, tool_parser="hermes").branches == {"tools": 1}


def test_limits_refuse_and_say_which(tmp_path):
    async def work(served, engine, address):
        found = []
        for limits in ({"turns": 1}, {"tokens": 3}):
            own = served.open(opening("u" * 24, **limits))
            for text in ("a", "b"):
                status, answer = await post(own, messages=[{"role": "user", "content": text * 20}])
            found.append((status, answer["error"]["param"], (await served.end("u" * 24)).limit))
        long = await post(address, messages=[{"role": "user", "content": "x" * 3000}])
        return found, long, await served.end(SECRET)

    found, (status, answer), record = run(work, tmp_path)
    assert found == [(400, "limits.turns", "turns"), (400, "limits.tokens", "length")]
    assert (status, answer["error"]["code"], record.limit) == (400, "context_length_exceeded", "length")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/v1/messages"])
def test_a_wrong_secret_an_ended_episode_and_what_is_no_request_are_refused(tmp_path, path):
    async def work(served, engine, address):
        wrong = address.replace(SECRET, "x" * 24)
        async with aiohttp.ClientSession() as session:
            async with session.post(address + path, data=b"no json") as response:
                garbage = response.status
            async with session.post(address + path, data=b"[" * 100_000) as response:
                deep = response.status
            async with session.post(address + path, data=b'{"a": "' + b"x" * 17 * 2**20 + b'"}') as response:
                huge = response.status
        bad = await post(address, path, messages=ASK), await post(wrong, path, messages=ASK, input="x")
        nothing = await post(address, path)
        await served.end(SECRET)
        late = await post(address, path, messages=ASK, input="x")
        return garbage, deep, huge, bad[1][0], nothing[0], late[0], engine.asked

    assert run(work, tmp_path)[:3] == (400, 400, 413)
    assert run(work, tmp_path)[3:6] == (404, 400, 404)


def test_what_is_sampled_when_the_episode_ends_is_given_up_and_counted(tmp_path):
    async def work(served, engine, address):
        await post(address, messages=ASK)
        engine.gate = asyncio.Event()
        asking = asyncio.create_task(post(address, messages=[{"role": "user", "content": "slow"}]))
        while not engine.running:
            await asyncio.sleep(0)
        record = await served.end(SECRET)
        return record, engine.running, await asking

    record, running, (status, _) = run(work, tmp_path)
    assert (running, status, len(record.sampled)) == (0, 410, 1)
    assert record.dropped == {"in_flight_requests": 1}


def test_a_reply_that_no_client_received_is_not_trained_on(tmp_path):
    async def work(served, engine, address):
        await post(address, messages=ASK)
        engine.gate = asyncio.Event()
        async with aiohttp.ClientSession() as session:
            slow = {"messages": [{"role": "user", "content": "slow"}]}
            asking = asyncio.create_task(session.post(f"{address}/v1/chat/completions", json=slow))
            while not engine.running:
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        server = served._runner.server
        while any(c.transport is not None for c in server.connections):  # until it knows that the client has left
            await asyncio.sleep(0)
        (reply,) = [reply for reply in served.episodes[SECRET].replies.values() if reply.node is None]
        engine.gate.set()
        await reply.answering
        for _ in range(20):  # the handler's turn to send it
            await asyncio.sleep(0)
        return await served.end(SECRET), engine.asked

    record, asked = run(work, tmp_path)
    assert record.dropped == {"unread": len(asked[1][1].token_ids)}
    assert len(record.sampled) == 1


def test_a_lost_engine_is_an_error_of_the_server_and_the_record_says_so(tmp_path):
    async def work(served, engine, address):
        engine.lost = True
        return await post(address, messages=ASK), await served.end(SECRET)

    (status, _), record = run(work, tmp_path)
    assert (status, record.lost) == (503, "its process has ended")


def test_tools_need_a_parser(tmp_path):
    async def work(served, engine, address):
        return await post(address, messages=ASK, tools=[ADD])

    status, answer = run(work, tmp_path)
    assert status == 400
    assert "set rollout.tool_parser" in answer["error"]["message"]


def test_the_model_is_listed_and_only_loopback_is_served(tmp_path):
    async def work(served, engine, address):
        return [model.id async for model in await client(address).models.list()], address

    models, address = run(work, tmp_path)
    assert models == ["tiny"]
    assert address.startswith("http://127.0.0.1:")
    assert END == 3


def test_episodes_that_open_at_the_same_time_share_one_server(tmp_path):
    async def main():
        served, _ = endpoint(tmp_path)
        await asyncio.gather(*(served.start() for _ in range(5)))
        address = served.address
        assert address
        await served.start()
        assert served.address == address
        await served.close()

    asyncio.run(main())
