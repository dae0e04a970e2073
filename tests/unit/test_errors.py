"""What does an error end with? One bounded message; where it is the user's code, with the user's lines."""

import errno
import pickle

import jinja2
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError

from rl.judges.hearing import JudgeError
from rl.protocols import EngineLost, StallError, UpdateFailed
from rl.rewards.score import RewardError, score
from rl.tools.errors import ToolError
from rl.types import Reply
from trainer.cluster.start_error import StartError
from trainer.doctor.finding import ParityError
from trainer.errors import MOST, explained, readable_errors
from trainer.runs.summary import ending

OURS = (RewardError, JudgeError, ParityError, StallError, StartError, EngineLost, UpdateFailed)


def ended(error, capsys):
    with pytest.raises(SystemExit) as end, readable_errors():
        raise error
    return end.value.code, capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        OSError("no"),
        FloatingPointError("the gradient norm is inf"),
        pickle.PicklingError("no"),
        *(
            kind("why")
            for kind in (RewardError, JudgeError, ParityError, StallError, StartError, EngineLost, UpdateFailed)
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_user_can_fix_is_one_message_with_status_2(error, capsys):
    code, printed = ended(error, capsys)
    assert code == 2
    assert printed.startswith(f"{type(error).__name__}: {error}\n")
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("incomplete"),
        jinja2.UndefinedError("'content' is undefined"),
        KeyError("x"),
        RuntimeError(""),
        ToolError("of our packages, and for nobody outside"),
        ExceptionGroup("tasks", [ExceptionGroup("inner", [TypeError("one")]), ValueError("two")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_other_error_is_a_message_with_its_place_and_without_a_traceback(error, capsys):
    code, printed = ended(error, capsys)
    assert code == 1
    assert "Traceback" not in printed
    assert len(printed) < MOST + 500


def test_a_disk_that_is_full_is_named():
    assert "make space, then resume" in explained(OSError(errno.ENOSPC, "No space left on device", "a.json"))
    assert "a.json" in explained(OSError(errno.ENOSPC, "No space left on device", "a.json"))
    assert "make space" not in explained(OSError(errno.EACCES, "Permission denied", "a.json"))


def test_the_users_own_lines_are_shown_and_no_others():
    def reward(reply):
        return reply.task["answer"] + missing

    with pytest.raises(RewardError) as failed:
        score(reward, Reply(text="5", finished=True, task={"answer": 1}, token_ids=[7]), 3)
    text = explained(failed.value)
    assert "raised NameError: name 'missing' is not defined" in text
    assert "It was raised in your code:\n  " in text
    assert 'in reward: return reply.task["answer"] + missing' in text
    assert "rl/rewards/score.py" not in text


def test_lines_of_the_users_code_that_ran_in_an_actor_are_shown():
    report = RuntimeError(
        'ray::LearnerActor.call()\n  File "/home/me/mine.py", line 12, in loss\n    return ratio.bad()\n'
        f'  File "{pytest.__file__}", line 3, in library\n    pass\nAttributeError: bad'
    )
    error = AttributeError("'Tensor' object has no attribute 'bad'")
    error.__cause__ = report
    text = explained(error)
    assert "mine.py:12 in loss: return ratio.bad()" in text
    assert "in library" not in text


def test_an_error_of_megabytes_is_cut_in_the_message_and_in_the_summary():
    error = StallError("late. " + "a stack\n" * 10**5)
    assert len(explained(error)) < MOST + 100
    kept = ending(error, logs="/logs")["error"]
    assert len(kept) < MOST + 100
    assert kept.startswith("StallError: late. ")
    assert "characters left out" in kept


def test_errors_of_the_hub_are_messages():
    assert issubclass(HfHubHTTPError, OSError)
    assert issubclass(RepositoryNotFoundError, OSError)
