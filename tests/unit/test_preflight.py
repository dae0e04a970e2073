"""Bad input ends before anything expensive, with an error that names it and the remedy."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models import make_model
from rl.config import Config, RolloutConfig, TrainerConfig
from rl.rewards.score import RewardError
from rl.types import Data, Example, Reply
from trainer.plan.plan import make_plan
from trainer.plan.rules import check_rows
from trainer.prompts import prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model")))


def config(model: str, **changes) -> Config:
    base = Config(
        name="t",
        model=model,
        data=lambda: Data(train=[Example(prompt="1+1=", task={"answer": "2"})]),
        reward=lambda reply: float(reply.text == reply.task["answer"]),
        rollout=RolloutConfig(max_tokens=8, max_model_len=16),
    )
    return replace(base, **changes)


def test_good_input_passes(model: str) -> None:
    assert make_plan(config(model)).placement.backend == "gloo"
    prepared = prepare(config(model))
    assert prepared.decode(prepared.train[0].token_ids) == "1+1="


def test_a_missing_model_folder_names_the_folder_and_the_setup_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model in .*nowhere.*\./scripts/setup"):
        make_plan(config(str(tmp_path / "nowhere")))


def test_more_gpus_than_there_are_names_both_numbers(model: str) -> None:
    many = config(model, device="cuda", rollout=RolloutConfig(engines=3), trainer=TrainerConfig(ranks=2))
    with pytest.raises(ValueError, match=r"needs 5 GPUs .* the cluster has 0"):
        make_plan(many).check_gpus()


def test_rows_that_cannot_be_shared_as_asked_are_refused(model: str, tmp_path: Path) -> None:
    ranks = TrainerConfig(ranks=4, sequence_parallel=4)
    with pytest.raises(ValueError, match=r"must divide the model's attention heads \(4\) and key-value heads \(2\)"):
        check_rows(config(model, trainer=ranks))
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(ValueError, match="rows of gemma stay padded: leave it unset"):
        check_rows(config(str(tmp_path), trainer=TrainerConfig(share_prompts=True)))
    check_rows(config(model, trainer=TrainerConfig(ranks=2, sequence_parallel=2, share_prompts=True)))
    check_rows(config(str(tmp_path)))


def test_a_prompt_longer_than_the_context_is_named(model: str) -> None:
    long = [Example(prompt="short"), Example(prompt="much too long for this")]
    with pytest.raises(ValueError, match=r"data.train\[1\] has 18 prompt tokens.*raise max_model_len to 26"):
        prepare(config(model, data=lambda: Data(train=long)))


def test_messages_for_a_model_without_chat_template_are_refused(model: str) -> None:
    chat = [Example(prompt=[{"role": "user", "content": "1+1="}])]
    with pytest.raises(ValueError, match="no chat template; give plain text prompts"):
        prepare(config(model, data=lambda: Data(train=chat)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(train=[]), "the training data is empty"),
        (Data(train=[Example(prompt="1")], evals={"hard": []}), "the evaluation set 'hard' is empty"),
        (Data(train=[Example(prompt="")]), r"data.train\[0\] is an empty prompt"),
    ],
)
def test_empty_data_is_refused(model: str, data: Data, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(config(model, data=lambda: data))


def test_a_reward_that_cannot_work_is_found_before_anything_starts(model: str) -> None:
    def wrong_key(reply: Reply) -> float:
        return float(reply.task["solution"])

    with pytest.raises(RewardError, match=r"prompt 0 \(task {'answer': '2'}.*raised KeyError"):
        prepare(config(model, reward=wrong_key))
    with pytest.raises(RewardError, match="is nan; return a finite float"):
        prepare(config(model, reward=lambda reply: float("nan")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag", "3"], "no-such-flag"),
        (["--group-size", "1"], "group_size=1 gives GSPO only zero advantages"),
        (["--model", "models/nowhere"], "there is no model in 'models/nowhere'"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_message(flags: list[str], message: str) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.py"
    done = subprocess.run([sys.executable, str(recipe), *flags], capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 2
    assert message in said
    assert "Traceback" not in said
