"""The one line that a user needs is found in what a failed actor left behind."""

import asyncio
from pathlib import Path

import pytest

from trainer.cluster.nodes import logs
from trainer.cluster.start_error import root_cause

RAY = """ray::EngineActor.build() (pid=417, ip=10.0.0.1, actor_id=1, repr=<trainer.cluster.actors.EngineActor>)
  File "engine.py", line 39, in __init__
    self.llm = AsyncLLM.from_engine_args(args)
"""


def test_the_last_error_of_a_traceback_is_named_with_its_continuation() -> None:
    text = RAY + "KeyError: 'foo'\n\nDuring handling of it:\n\n" + RAY
    text += "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, no such model\n"
    assert root_cause(text, "") == "ValidationError: 1 validation error for ModelConfig Value error, no such model"


def test_the_cause_of_a_dead_core_process_is_found_in_the_output_of_its_actor() -> None:
    output = (
        "(EngineCore pid=9) ERROR 11-22 05:57:02 [core.py:1510] ValueError: No available memory for the cache blocks.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    text = RAY + "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    assert root_cause(text, output) == "ValueError: No available memory for the cache blocks."


def test_the_output_of_an_actor_on_this_node_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker-a-01-417.err").write_text("of the actor\n")
    (tmp_path / "worker-b-01-418.err").write_text("of another actor\n")
    monkeypatch.setattr(logs, "log_folder", lambda: str(tmp_path))
    assert logs.read(417) == (str(tmp_path), "of the actor\n")


def test_the_output_of_an_actor_on_another_node_is_read_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Ray itself is replaced: where the read runs is what its options say."""
    asked = {}

    class Context:
        def get_node_id(self):
            return "here"

    class Remote:
        def options(self, **options):
            asked.update(options)
            return self

        async def remote(self, pid):
            return "/logs", f"of {pid}"

    ids = ("cd" * 28, "ab" * 28)
    alive = [{"NodeManagerAddress": f"10.0.0.{i}", "NodeID": name, "Alive": True} for i, name in enumerate(ids)]
    monkeypatch.setattr(logs.ray, "nodes", lambda: alive)
    monkeypatch.setattr(logs.ray, "get_runtime_context", Context)
    monkeypatch.setattr(logs.ray, "remote", lambda function: Remote())
    assert asyncio.run(logs.output(RAY)) == ("10.0.0.1:/logs", "of 417")
    assert (asked["scheduling_strategy"].node_id, asked["num_cpus"]) == (ids[1], 0)


def test_without_any_error_line_the_last_line_is_given() -> None:
    assert root_cause("something\nThe actor died: out of memory\n", "") == "The actor died: out of memory"
