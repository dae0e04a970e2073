"""Which engine serves an agent's episode, and what if it cannot be reached?"""

import asyncio
import http.server
import threading
from types import SimpleNamespace

import pytest

from rl.agents.record import Opening, Record
from rl.protocols import EngineLost
from rl.tokens import Rendering
from trainer.cluster.remote import RemoteEndpoints
from trainer.machine import check_proxy

OPENING = Opening(secret="secret", seed=(0, 0, 0), turns=1, tokens=None)


class Fleet:
    """Two engines, of which the first may be lost."""

    def __init__(self, address: str, lost: bool = False) -> None:
        self.address, self.dead = address, lost
        self.restarts_of, self.marked = [0, 0], []
        self.cluster = SimpleNamespace(
            ask_engine=self.ask, config=SimpleNamespace(deadlines=SimpleNamespace(sample_s=5.0))
        )

    async def serving(self):
        return [0, 1]

    async def ask(self, engine, ask, *, deadline_s):
        class Recorder:
            def __getattr__(self, name):
                return lambda *arguments: name

        called = ask(Recorder())
        if self.dead:
            raise EngineLost("its process is gone")
        return {"open_episode": self.address, "end_episode": Record(), "alive": None}[called]

    def mark_lost(self, engine, restarts, cause):
        self.marked.append((engine, restarts))


def endpoints(fleet):
    rollouts = SimpleNamespace(load=[3, 1], fleet=fleet, cluster=fleet.cluster, called=lambda *_: None)
    return RemoteEndpoints(rollouts, Rendering()), rollouts


@pytest.fixture
def address():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.RequestHandlerClass.do_GET = lambda self: (self.send_response(200), self.end_headers())
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/e/secret"
    server.shutdown()
    server.server_close()


def test_the_engine_with_the_least_work_serves_an_episode_and_is_free_after_it(address):
    one, rollouts = endpoints(Fleet(address))

    async def main():
        engine, found = await one.open(OPENING)
        assert (engine, found, rollouts.load) == (1, address, [3, 2])
        await one.end(engine, "secret")
        assert rollouts.load == [3, 1]

    asyncio.run(main())


def test_an_engine_that_is_lost_is_marked_once(address):
    fleet = Fleet(address)
    one, rollouts = endpoints(fleet)

    async def main():
        engine, _ = await one.open(OPENING)
        fleet.dead = True
        with pytest.raises(EngineLost):
            await one.end(engine, "secret")
        assert (fleet.marked, rollouts.load) == ([(1, 0)], [3, 1])
        fleet.dead = False
        engine, _ = await one.open(OPENING)
        fleet.restarts_of[engine] = 1  # restarted meanwhile: what was sampled is gone
        with pytest.raises(EngineLost, match="restarted"):
            await one.end(engine, "secret")

    asyncio.run(main())


def test_an_engine_out_of_reach_is_named_with_the_remedy_and_a_dead_one_is_lost():
    one, _ = endpoints(Fleet("http://127.0.0.1:9/e/secret"))
    with pytest.raises(ValueError, match=r'engine 1 serves agents at http://127.0.0.1:9.*endpoint_host="0.0.0.0"'):
        asyncio.run(one.open(OPENING))
    fleet = Fleet("http://127.0.0.1:9/e/secret")
    ask = fleet.ask

    async def dies(engine, call, *, deadline_s):
        found = await ask(engine, call, deadline_s=deadline_s)
        fleet.dead = True
        return found

    fleet.cluster.ask_engine = dies
    one, _ = endpoints(fleet)
    fleet.cluster.ask_engine = one.rollouts.cluster.ask_engine = dies
    with pytest.raises(EngineLost):
        asyncio.run(one.open(OPENING))


def test_a_proxy_that_would_get_the_requests_of_agents_is_named(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ValueError, match="HTTP_PROXY is set"):
        check_proxy("127.0.0.1")
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    check_proxy("127.0.0.1")
