"""Environments in processes of their own: calls, errors, and a process that dies in the middle of an episode."""

import asyncio
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray

from episodes import Calculator, Engine, prompt, solves, stage
from rl.environments.group import play_group
from rl.environments.play import play
from rl.environments.types import EnvError, EnvLate, Limits, ToolError
from rl.loop.stream import turn_seed
from rl.tools import MCP
from rl.types import Call, Parsed
from trainer.cluster.env_workers import EnvWorkers
from trainer.cluster.process_env import ray_environment

SEEDS = partial(turn_seed, 0, 0, 0)


@pytest.fixture(scope="module", autouse=True)
def session():
    with ray_environment():
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Elsewhere(Calculator):
    """What a call does depends on the task."""

    def multiply(self, a: int, b: int) -> str:
        """Multiply two integers."""
        does = self.task["does"]
        if does == "die once" and not os.path.exists(self.task["file"]):
            open(self.task["file"], "w").close()
            os._exit(1)
        if does == "die":
            os._exit(1)
        if does == "hang":
            time.sleep(1000)
        if does == "raise":
            raise KeyError("database")
        if does == "refuse":
            raise ToolError("not today")
        return str(os.getpid())

    def reward(self, episode):
        results = episode.turns[0].results[0]
        return float(results == "not today" or int(results) != self.task["driver"])

    def close(self):
        if self.task["does"] == "close":
            raise OSError("cannot close")


def played(workers, does, n=1, retries=0, **task):
    task |= {"does": does, "driver": os.getpid()}

    def says(before, r):
        return "CALC(2*3)" if before.count("[assistant]") == 1 else "6"

    one = stage(Engine(says), workers, limits=Limits(tool_s=60.0 if does != "hang" else 1.0))
    return asyncio.run(play_group(n, lambda i: play(one, prompt(**task), i, SEEDS), retries))


def test_environments_in_other_processes(tmp_path):
    workers = EnvWorkers(Elsewhere, 2)
    group = played(workers, "work", n=8)
    assert [row.reward for row in group.rows] == [1.0] * 8, "a call ran in the driver"
    assert played(workers, "refuse").rows[0].reward == 1.0
    assert workers.load == [0, 0]
    for does, says in (
        ("raise", "the tool multiply raised KeyError: 'database'"),
        ("close", "`close` raised OSError: cannot close"),
        ("die", "the tool multiply lost its process, environment worker"),
    ):
        failed = played(workers, does)
        assert failed.failed == "env_error"
        assert says in str(failed.error)
    late = played(workers, "hang")
    assert (late.failed, type(late.error)) == ("deadline", EnvLate)
    assert workers.load == [0, 0]
    again = played(workers, "die once", retries=2, file=str(tmp_path / "died"))
    assert ([row.reward for row in again.rows], again.replayed) == ([1.0], 1)
    assert isinstance(failed.error, EnvError)


def test_solving_is_the_same_in_another_process():
    one = stage(Engine(solves), EnvWorkers(Calculator, 1))
    (row,) = asyncio.run(play(one, prompt(), 0, SEEDS))
    assert (row.reward, row.mask.count(True)) == (1.0, 20)


class Shopping:
    """Pays for a call that the MCP server of its own process has answered."""

    def __init__(self, task):
        self.task = task

    def reward(self, episode):
        (result,) = episode.turns[0].results
        return float(result == "alive" or psutil.Process(int(result)).ppid() == os.getpid() != self.task["driver"])


@pytest.mark.nightly
def test_each_worker_calls_an_mcp_server_of_its_own(tmp_path):
    def parses(said):
        name, _, file = said.partition(" ")
        return Parsed(text="", calls=(Call(name=name, arguments={"file": file} if file else {}),))

    workers = EnvWorkers(Shopping, 2)
    shop = MCP(command=(sys.executable, str(Path(__file__).parents[1] / "support" / "mcp_server.py")))

    def shopping(calls, n, retries=0):
        one = stage(Engine(lambda before, r: calls, parses), workers, tools=shop, limits=Limits(turns=1, tool_s=60.0))
        acting = partial(play, replace(one, max_tokens=400), prompt(driver=os.getpid()))
        return asyncio.run(play_group(n, lambda i: acting(i, SEEDS), retries))

    assert [row.reward for row in shopping("process", n=8).rows] == [1.0] * 8
    died = shopping(f"die_once {tmp_path / 'died'}", n=1, retries=1)
    assert ([row.reward for row in died.rows], died.replayed) == ([1.0], 1)
    refused = shopping("steal", n=1)
    assert "steal" in str(refused.error), "a tool that no server has is read by the policy, and is no process number"
