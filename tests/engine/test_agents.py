"""A real engine gives a stock client what a learner can train on, and takes little time for it."""

import asyncio
import statistics
import time
from collections.abc import Callable

import aiohttp
import openai
import pytest
import torch

from live import engine_config
from pair import make_learner
from rl.agents.record import Opening
from rl.batch import collate
from rl.config import RolloutConfig
from rl.tokens import Rendering
from rl.types import Trajectory
from tiny_tokenizer import CHAT

EPISODES, TURNS = 4, 3


def opening(name: str, member: int = 0) -> Opening:
    return Opening(secret=name, seed=(0, 0, member), turns=100, tokens=None)


@pytest.fixture(scope="module")
def engine(live: Callable, tiny: Callable):
    rollout = RolloutConfig(max_tokens=12, max_model_len=512, max_num_seqs=64, kv_cache_gib=0.25)
    return live(engine_config(tiny(chat_template=CHAT), rollout=rollout))


def played(engine) -> list[Trajectory]:
    """Episodes of several turns, side by side."""

    async def one(member: int) -> list[Trajectory]:
        secret = f"episode{member}"
        address = await engine.engine.open_episode(opening(secret, member), Rendering())
        client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        messages = [{"role": "user", "content": "hello"}]
        for _ in range(TURNS):
            reply = await client.chat.completions.create(model="any", messages=messages)
            said = {"role": "assistant", "content": reply.choices[0].message.content}
            messages += [said, {"role": "user", "content": "and then?"}]
        record = await engine.engine.end_episode(secret)
        return record.tree().rows(group=0, episode=member, reward=float(member))

    async def all_of_them() -> list[list[Trajectory]]:
        return await asyncio.gather(*(one(member) for member in range(EPISODES)))

    return [row for rows in engine.wait(all_of_them()) for row in rows]


def test_the_learner_computes_what_the_agents_tokens_were_sampled_with(engine) -> None:
    rows = played(engine)
    assert len(rows) == EPISODES
    assert all(set(row.turns) == {-1, 0, 1, 2} for row in rows)
    batch = collate(rows)
    logprobs = make_learner(engine.config).logprobs(batch)
    for turn in range(TURNS):
        here = batch.mask & (batch.turns == turn)
        assert float((logprobs - batch.rollout_logprobs)[here].abs().mean()) <= 1e-5
    # The same requests have the same replies, in whatever order they were served.
    again = played(engine)
    assert [row.token_ids for row in again] == [row.token_ids for row in rows]


@pytest.mark.nightly
def test_an_endpoint_costs_little_beside_the_engine(engine) -> None:
    """Median seconds of a request with 64 episodes open, over the same request made to the engine itself."""

    async def measured() -> tuple[float, float]:
        addresses = [await engine.engine.open_episode(opening(f"e{i}", i), Rendering()) for i in range(64)]
        direct, served = [], []
        async with aiohttp.ClientSession() as session:
            for i in range(150):
                body = {"messages": [{"role": "user", "content": f"hello {i}"}], "max_tokens": 4}
                chat = engine.engine.endpoint.chat([])
                began = time.perf_counter()
                await engine.engine.sample(chat.prompt(body["messages"]), 1, i, None, 4)
                direct.append(time.perf_counter() - began)
                began = time.perf_counter()
                url = addresses[i % 64] + "/v1/chat/completions"
                async with session.post(url, json=body) as response:
                    await response.read()
                served.append(time.perf_counter() - began)
        for i in range(64):
            await engine.engine.end_episode(f"e{i}")
        return statistics.median(direct), statistics.median(served)

    direct, served = engine.wait(measured())
    print(f"direct {1e3 * direct:.2f} ms, through the endpoint {1e3 * served:.2f} ms")
    assert served - direct <= 3e-3
    assert torch.get_num_threads() == 1
