"""Does a served model answer any client, with the settings that the client chooses, and nobody without the key?"""

import asyncio
import json

import openai
import pytest

from clients import ADD, public
from trainer.commands.serve import settings_of

ASK = [{"role": "user", "content": "hello"}]


def run(work, folder, *, key="", **settings):
    async def main():
        served, engine = public(folder, **settings)
        address = await served.serve("127.0.0.1", 0, key)
        try:
            return await work(openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=key or "any", max_retries=0), engine)
        finally:
            await served.close()

    return asyncio.run(main())


def test_a_request_chooses_how_it_is_sampled(tmp_path):
    async def work(client, engine):
        more = {"top_k": 5, "min_p": 0.1}
        reply = await client.chat.completions.create(
            model="any", messages=ASK, temperature=0.0, top_p=0.9, max_tokens=5, stop=["b"], extra_body=more
        )
        return reply.choices[0].message.content, engine

    text, engine = run(work, tmp_path, says=["aab"])
    assert text == "aa"
    assert engine.temperatures == [0.0]
    assert engine.more == {
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "stop": ["b"],
        "detokenize": True,
        "skip_special_tokens": False,
    }


def test_requests_are_independent_and_draw_anew(tmp_path):
    async def work(client, engine):
        for _ in range(3):
            await client.chat.completions.create(model="any", messages=ASK)
        return engine

    engine = run(work, tmp_path)
    assert len(engine.asked) == 3
    assert len(set(engine.seeds)) == 3


def test_a_request_with_a_seed_is_repeatable(tmp_path):
    async def work(client, engine):
        return [await client.chat.completions.create(model="any", messages=ASK, seed=4) for _ in range(2)]

    first, second = run(work, tmp_path)
    assert first.choices == second.choices


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -1), ("temperature", "hot"), ("top_p", 2), ("stop", [3]), ("stop", 3), ("n", 2)],
)
def test_a_setting_that_cannot_be_is_refused_by_name(tmp_path, setting, value):
    async def work(client, engine):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="any", messages=ASK, extra_body={setting: value})
        return refused.value.param

    assert run(work, tmp_path) == setting


def test_nobody_is_served_without_the_key(tmp_path):
    async def work(client, engine):
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="another").chat.completions.create(model="any", messages=ASK)
        with pytest.raises(openai.AuthenticationError):
            [model async for model in await client.with_options(api_key="another").models.list()]
        reply = await client.chat.completions.create(model="any", messages=ASK, tools=[ADD])
        return reply.choices[0].message.tool_calls[0].function.name

    assert run(work, tmp_path, key="the key", says=['CALL add {"a": 2}'], tool_parser="hermes") == "add"


def test_a_finished_run_is_served_with_its_own_settings(tmp_path):
    run_folder = tmp_path / "run"
    (run_folder / "model").mkdir(parents=True)
    (run_folder / "metrics.jsonl").touch()
    rollout = {"max_model_len": 77, "top_p": 0.9, "top_k": 3, "min_p": 0.0, "tool_parser": "hermes"}
    rollout |= {"reasoning_parser": "", "kv_cache_gib": 0.5, "engines": 4}
    saved = {"rollout": rollout, "dtype": "float32", "fp32_head": True, "temperature": 0.7, "chat_template_kwargs": {}}
    (run_folder / "config.json").write_text(json.dumps(saved))
    found = settings_of(str(run_folder))
    assert (found.model, found.dtype, found.temperature) == (str(run_folder / "model"), "float32", 0.7)
    assert (found.rollout.max_model_len, found.rollout.tool_parser, found.rollout.engines) == (77, "hermes", 1)
    (run_folder / "model").rmdir()
    with pytest.raises(ValueError, match="has no model yet"):
        settings_of(str(run_folder))


def test_a_run_that_is_not_there_is_no_name_of_the_hub(tmp_path):
    for target in ("runs/no_such_run", str(tmp_path / "no_such_run")):
        with pytest.raises(ValueError, match=f"there is no folder {target}: train the run first"):
            settings_of(target)


def test_a_model_is_served_by_the_defaults():
    assert settings_of("some/model").model == "some/model"
