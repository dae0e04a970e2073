"""Tools of a real MCP server: listed, called, wrong calls, and a server that dies, hangs or cannot start."""

import asyncio
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from episodes import Engine, prompt, stage
from rl.config import Config
from rl.environments import EnvError, Limits, ToolError
from rl.environments.group import play_group
from rl.environments.play import play
from rl.environments.threads import Threads
from rl.environments.types import EnvLate
from rl.loop.stream import turn_seed
from rl.tokens import Rendering
from rl.tools import MCP, mcp
from rl.tools.mcp import Server, server_of
from rl.types import Call, Data, Parsed
from rl.validate import check
from trainer.data.sets import with_tools

# A server starts in 2 s. The types that users get wrong are checked by `MCP` itself.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked_types")]
SERVER = str(Path(__file__).parents[1] / "support" / "mcp_server.py")
COMMAND = (sys.executable, SERVER)
SHOP = MCP(command=COMMAND)
SECONDS = 60.0


def call(name, server=None, seconds=SECONDS, **arguments):
    """A call as an episode makes it."""
    server = server or server_of(SHOP)
    return asyncio.run(Threads().run(partial(server.call, Call(name=name, arguments=arguments)), seconds))


class Priced:
    """One tool of its own; the reward is 1 where the last turn repeats the result."""

    def __init__(self, task):
        self.task = task

    def double(self, number: int) -> int:
        """Twice a number."""
        return 2 * number

    def reward(self, episode):
        return float(bool(episode.turns[0].results) and episode.text == episode.turns[0].results[0])


def played(says, n=1, retries=0, env=Priced, **limits):
    """A group of episodes whose first turn makes a call, and whose second repeats the result."""

    def parses(said):
        name, _, argument = said.partition(" ")
        key = {"price": "thing", "die_once": "file", "wait_for": "file", "double": "number"}.get(name)
        if name not in ("price", "die_once", "process", "wait_for", "hang", "double", "steal"):
            return Parsed(text=said)
        value = int(argument) if argument.isdecimal() else argument
        return Parsed(text="", calls=(Call(name=name, arguments={key: value} if key else {}),))

    def speaks(before, r):
        return says if before.count("[assistant]") == 1 else re.split(r"\[tool\]|\[assistant\]", before)[-2]

    limits = {"tool_s": SECONDS} | limits
    one = stage(Engine(speaks, parses), env=env, tools=SHOP, max_tokens=400, limits=Limits(**limits))
    seeds = partial(turn_seed, 0, 0, 0)
    return asyncio.run(play_group(n, lambda index: play(one, prompt(), index, seeds), retries))


def config(**settings):
    return Config(**{"name": "t", "model": "m", "data": Data(train=[]), "env": Priced} | settings)


def test_prompts_show_the_tools_of_the_environment_and_of_its_server():
    shown = with_tools(Rendering(), config(tools=SHOP)).tools
    names = [tool["function"]["name"] for tool in shown]
    assert names == ["double", "price", "process", "variable", "die_once", "wait_for", "hang"]
    price = shown[1]["function"]
    assert price["description"] == "The price of things."
    assert price["parameters"]["properties"]["thing"]["type"] == "string"
    assert price["parameters"]["required"] == ["thing"]


def test_a_call_returns_text_and_what_the_tool_cannot_do_is_read_by_the_policy():
    assert call("price", thing="tea", count=2) == "6 euros"
    for arguments, says in (({"thing": "gold"}, "there is no gold"), ({"count": 2}, "thing"), ({"thing": 3}, "thing")):
        with pytest.raises(ToolError, match=says):
            call("price", **arguments)
    with pytest.raises(ToolError, match="there is no tool 'steal'; the server has: price, process"):
        call("steal")


def test_a_call_takes_milliseconds():
    async def seconds(count):
        server = server_of(SHOP)
        for _ in range(count):
            began = time.perf_counter()
            await server.call(Call(name="price", arguments={"thing": "tea"}))
            yield time.perf_counter() - began

    async def median(count):
        return statistics.median([each async for each in seconds(count)])

    async def at_once(count):
        began = time.perf_counter()
        await asyncio.gather(*(median(1) for _ in range(count)))
        return (time.perf_counter() - began) / count

    took, together = asyncio.run(median(200)), asyncio.run(at_once(64))
    print(f"a call: median {1000 * took:.1f} ms of 200, and {1000 * together:.1f} ms with 64 at once")
    assert max(took, together) < 0.2


def test_an_episode_calls_the_tools_of_both_and_reads_errors():
    for says in ("price tea", "price gold", "double 4", "steal tea"):
        assert [row.reward for row in played(says).rows] == [1.0], says


def test_a_server_that_dies_in_a_call_is_started_again_and_no_episode_is_lost(tmp_path):
    before = call("process")
    group = played(f"die_once {tmp_path / 'died'}", n=4, retries=1)
    assert [row.reward for row in group.rows] == [1.0] * 4
    assert 1 <= group.replayed <= 4
    assert call("process") != before


def test_a_server_that_is_killed_fails_the_episode_that_notices_it_and_the_next_has_another():
    before = int(call("process"))
    os.kill(before, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(before)] if psutil.pid_exists(before) else [], timeout=SECONDS)
    group = played("process", retries=0)
    assert (group.failed, "lost the MCP server" in str(group.error)) == ("env_error", True)
    assert int(call("process")) != before


def test_a_late_call_is_an_error_of_the_environment_and_its_server_stays_while_it_answers(tmp_path):
    before = call("process")
    group = played(f"wait_for {tmp_path / 'never'}", tool_s=0.2)
    assert (group.failed, type(group.error)) == ("deadline", EnvLate)
    assert call("process") == before
    (tmp_path / "never").touch()


def test_a_server_that_answers_nothing_any_more_is_replaced(monkeypatch):
    monkeypatch.setattr(mcp, "ANSWER_S", 0.5)
    before = call("process")
    assert type(played("hang", tool_s=0.2).error) is EnvLate
    assert call("process") != before
    psutil.wait_procs([psutil.Process(int(before))] if psutil.pid_exists(int(before)) else [], timeout=SECONDS)
    assert not psutil.pid_exists(int(before))


def test_a_server_gets_the_variables_that_are_named(monkeypatch):
    monkeypatch.setenv("SHOP_KEY", "secret")
    assert call("variable", key="SHOP_KEY") == "not set"
    server = Server(MCP(command=COMMAND, variables=("SHOP_KEY",)))
    assert call("variable", server, key="SHOP_KEY") == "secret"
    server.close()
    with pytest.raises(EnvError, match="the environment variable NO_SUCH is not set"):
        Server(MCP(command=COMMAND, variables=("NO_SUCH",))).schemas(SECONDS)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("no-such-program",), "cannot start the MCP server 'no-such-program'.*no-such-program"),
        ((sys.executable, "-c", "import no_such_module"), "ModuleNotFoundError: No module named 'no_such_module'"),
        (("python", "-c", "import sys; sys.exit(sys.executable)"), re.escape(sys.executable)),
    ],
)
def test_a_server_that_cannot_start_says_why(command, says):
    with pytest.raises(EnvError, match=says):
        with_tools(Rendering(), config(tools=MCP(command=command)))


def test_an_address_at_which_nobody_listens_is_named_with_the_cause():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}/mcp"
    with pytest.raises(EnvError, match=f"cannot reach the MCP server '{address}': ConnectError"):
        with_tools(Rendering(), config(tools=MCP(url=address)))


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return time.sleep(0.05)
    return True


def test_a_server_over_http_is_lost_when_it_ends():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*COMMAND, str(port)])
    try:
        while not listens(port):
            assert process.poll() is None
        server = Server(MCP(url=f"http://127.0.0.1:{port}/mcp"))
        assert len(server.schemas(SECONDS)) == 6
        assert call("price", server, thing="salt") == "4 euros"
    finally:
        process.kill()
        process.wait()
    with pytest.raises(EnvError):
        call("price", server, thing="salt")
    server.close()


def test_what_a_run_refuses():
    with pytest.raises(ValueError, match="give one of them"):
        MCP(command=("a",), url="b")
    with pytest.raises(ValueError, match=r"is text: write its parts, command=\['python', 'server.py'\]"):
        MCP(command="python server.py")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tools are for the episodes of an env, and this run has none"):
        check(config(env=None, reward=lambda reply: 1.0, tools=SHOP))
    with pytest.raises(ValueError, match="both have a tool 'price'"):
        with_tools(Rendering(), config(env=type("Env", (Priced,), {"price": Priced.double}), tools=SHOP))
