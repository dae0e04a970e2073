"""The one line that a user needs is found in what a failed actor left behind."""

from pathlib import Path

from trainer.cluster.start_error import root_cause

RAY = """ray::EngineActor.build() (pid=417, ip=10.0.0.1, actor_id=1, repr=<trainer.cluster.actors.EngineActor>)
  File "engine.py", line 39, in __init__
    self.llm = AsyncLLM.from_engine_args(args)
"""


def test_the_last_error_of_a_traceback_is_named_with_its_continuation() -> None:
    text = RAY + "KeyError: 'foo'\n\nDuring handling of it:\n\n" + RAY
    text += "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, no such model\n"
    assert root_cause(text, "") == "ValidationError: 1 validation error for ModelConfig Value error, no such model"


def test_the_cause_of_a_dead_core_process_is_found_in_the_output_of_its_own_actor(tmp_path: Path) -> None:
    (tmp_path / "worker-a-01-417.err").write_text(
        "(EngineCore pid=9) ERROR 11-22 05:57:02 [core.py:1510] ValueError: No available memory for the cache blocks.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    (tmp_path / "worker-b-01-418.err").write_text("ValueError: of another actor\n")
    text = RAY + "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    assert root_cause(text, str(tmp_path)) == "ValueError: No available memory for the cache blocks."


def test_without_any_error_line_the_last_line_is_given() -> None:
    assert root_cause("something\nThe actor died: out of memory\n", "") == "The actor died: out of memory"
