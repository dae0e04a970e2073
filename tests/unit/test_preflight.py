"""Bad input ends before anything expensive, with an error that names it and the remedy."""

import asyncio
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models import make_model
from rl.config import Config, Deadlines, RolloutConfig, TrainerConfig
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


def test_token_ids_are_a_prompt_as_they_are(model: str) -> None:
    prepared = prepare(config(model, data=Data(train=[Example(prompt=[5, 6, 7], task={"answer": "2"})])))
    assert prepared.train[0].token_ids == prepared.train[0].given == prepared.first_prompt == [5, 6, 7]
    size = len(prepared.tokenizer)
    with pytest.raises(ValueError, match=rf"data.train\[0\] .* from 5 to {size}, and the vocabulary .* to {size - 1}"):
        prepare(config(model, data=Data(train=[Example(prompt=[5, size])])))


def test_messages_that_the_chat_template_refuses_are_named(tmp_path: Path) -> None:
    model = str(make_model(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}"))
    chat = Data(train=[Example(prompt=[{"role": "system", "content": "1+1="}])])
    with pytest.raises(ValueError, match=r"data.train\[0\] cannot be encoded: roles must alternate. It begins"):
        prepare(config(model, data=chat))


def test_an_async_reward_is_tried_with_the_prompt_and_has_its_deadline(model: str) -> None:
    async def judge(reply: Reply) -> float:
        seen.append((reply.prompt, reply.prompt_token_ids, reply.text_with_special_tokens, reply.finished))
        return 0.0

    async def hangs(reply: Reply) -> float:
        await asyncio.sleep(60)
        return 0.0

    seen: list = []
    prepared = prepare(config(model, reward=judge))
    assert seen == [("1+1=", prepared.train[0].token_ids, "", finished) for finished in (False, True)]
    assert prepared.decode([1, 5]) != prepared.decode([1, 5], skip_special_tokens=False)
    with pytest.raises(RewardError, match=r"took longer than 0\.2 s"):
        prepare(config(model, reward=hangs, deadlines=Deadlines(reward_s=0.2)))


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
        (["--no-such-flag", "3"], "there is no flag --no-such-flag"),
        (["--group-size", "1"], "group_size=1 gives GSPO only zero advantages"),
        (["--model", "models/nowhere"], "there is no model in 'models/nowhere'"),
    ],
)
def test_the_command_line_shows_what_is_wrong_in_one_message(flags, message, monkeypatch, capsys) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.py"
    monkeypatch.setattr(sys, "argv", [str(recipe), *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(recipe), run_name="__main__")
    printed = "".join(capsys.readouterr())
    assert end.value.code == 2
    assert message in printed
    assert "Traceback" not in printed
