"""Whatever clients ask: is each sampled token trained once or counted as dropped, and is each row what was asked?"""

import asyncio
import random
from collections import Counter
from typing import Any

import aiohttp
import pytest

from clients import ADD, endpoint, opening

PATHS = ("/v1/chat/completions", "/v1/messages")
REQUESTS = 25
"""Of one episode."""


class Agent:
    """Asks whatever an agent may ask, and much that none should."""

    def __init__(self, session: aiohttp.ClientSession, address: str, draw: random.Random) -> None:
        self.session, self.address, self.draw = session, address, draw
        self.histories: list[list[dict[str, Any]]] = [[{"role": "user", "content": "go"}]]
        self.answers = Counter[int]()
        self.kept: dict[str, Any] = {}

    async def ask(self, messages: list[dict[str, Any]], **more: Any) -> None:
        path = PATHS[0]
        body = {"messages": messages, **more}
        async with self.session.post(self.address + path, json=body) as response:
            self.answers[response.status] += 1
            answer = await response.json()
        if response.status == 200:
            said = answer["choices"][0]["message"]
            key = repr((messages, sorted(more.items(), key=str)))
            assert self.kept.setdefault(key, said) == said, "the same request had two replies"
            back = {k: v for k, v in said.items() if v is not None}
            results = [{"role": "tool", "tool_call_id": c["id"], "content": "5"} for c in said.get("tool_calls") or ()]
            self.histories.append([*messages, back, *(results or [{"role": "user", "content": self.word()}])])

    def word(self) -> str:
        return "".join(self.draw.choices("abcdefgh", k=4))

    async def act(self) -> None:
        draw, history = self.draw, self.draw.choice(self.histories[-4:])
        match draw.randrange(9):
            case 0 | 1:
                await self.ask(history)
            case 2:  # a retry, at the same time and later
                await asyncio.gather(self.ask(history), self.ask(history))
                await self.ask(history)
            case 3:  # sub-agents
                words = [[{"role": "user", "content": self.word()}] for _ in range(3)]
                await asyncio.gather(*(self.ask(each) for each in words))
            case 4:  # an edited past
                edited = [dict(m) for m in history]
                edited[draw.randrange(len(edited))]["content"] = self.word()
                await self.ask(edited)
            case 5:  # compaction
                await self.ask(history[-1:] if history[-1]["role"] == "user" else [*history[:1]])
            case 6:  # other tools, other limits, other seeds
                others = [{"tools": [ADD]}, {"max_tokens": draw.randrange(1, 9)}, {"seed": draw.randrange(3)}]
                await self.ask(history, **draw.choice(others))
            case 7:  # a client that leaves
                leaving = asyncio.create_task(self.ask(history))
                for _ in range(draw.randrange(6)):
                    await asyncio.sleep(0)
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
            case _:
                await self.wrong(history)

    async def wrong(self, history: list[dict[str, Any]]) -> None:
        match self.draw.randrange(4):
            case 0:
                await self.ask([{"role": "user", "content": "x" * 3000}])
            case 1:
                await self.ask(history, temperature=0.3)
            case 2:
                await self.ask([*history, {"role": "assistant", "content": "mine"}])
            case _:
                url = self.address[:-5] + "wrong" + PATHS[0]
                async with self.session.post(url, json={"messages": history}) as response:
                    self.answers[response.status] += 1


MANY = pytest.param(400, id="10,000 requests", marks=pytest.mark.nightly)


@pytest.mark.parametrize("episodes", [pytest.param(30, id="750 requests"), MANY])
def test_each_sampled_token_is_trained_once_or_dropped_with_a_reason(tmp_path, episodes):
    async def main():
        served, engine = endpoint(tmp_path, tool_parser="hermes")
        await served.start()
        asked = 0
        async with aiohttp.ClientSession() as session:
            for number in range(episodes):
                engine.asked.clear()
                draw = random.Random(number)
                address = served.open(opening("s" * 20, turns=60, member=number))
                agent = Agent(session, address, draw)
                while sum(agent.answers.values()) < REQUESTS:
                    await agent.act()
                late = asyncio.create_task(agent.ask([{"role": "user", "content": "late"}]))
                for _ in range(draw.randrange(8)):  # it ends while it is asked
                    await asyncio.sleep(0)
                record = await served.end("s" * 20)
                await late
                check(engine.asked, record)
                asked += sum(agent.answers.values())
                assert set(agent.answers) <= {200, 400, 404, 410}
        assert not engine.running
        await served.close()
        return asked

    assert asyncio.run(asyncio.wait_for(main(), 300)) >= episodes * REQUESTS


def check(asked, record) -> None:
    """Every completion of the engine is in the rows once, behind exactly the context that it was sampled from."""
    rows = record.tree().rows(group=0, episode=0, reward=1.0)
    # The engine numbers its completions by their log-probabilities.
    trained, begins = Counter[float](), {}
    for row in rows:
        for i, (sampled, logprob) in enumerate(zip(row.mask, row.logprobs, strict=True)):
            if sampled:
                trained[logprob] += 1
                begins.setdefault(logprob, [*row.token_ids[: i + 1]])
    dropped = 0
    for number, (context, done) in enumerate(asked):
        logprob, n = -1.0 - number, len(done.token_ids)
        if trained[logprob]:
            assert trained[logprob] == n, "a completion is trained in part, or twice"
            assert begins[logprob] == [*context, done.token_ids[0]], "the row is not what the engine was asked"
        else:
            dropped += n
    assert dropped == record.dropped.get("unread", 0)
    assert sum(trained.values()) == sum(len(done.token_ids) for _, done in asked) - dropped
