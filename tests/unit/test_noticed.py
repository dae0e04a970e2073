"""A resumed run notices what is not as it was: prompts, answers, held-out sets, code, the model's files, and where it
was started; each is named, with the way to continue."""

import functools
import json
import sys
from dataclasses import dataclass, replace

import pytest

from rl.config import Config, RolloutConfig
from rl.loop.progress import Progress
from rl.objectives import GRPO
from rl.types import Data, Example
from tiny_tokenizer import CHAT, make_tokenizer
from trainer.commands.load import load_file
from trainer.data.fingerprint import model_digest
from trainer.prompts import prepare
from trainer.runs import checkpoint
from trainer.runs.checkpoint import CheckpointError
from trainer.runs.own_code import code_digests
from trainer.runs.resume import data_digest, resume, state_of, write_history
from trainer.runs.settings import config_digest, plain, resolved

# The suite checks arguments with beartype, which would answer before the product does.
pytestmark = pytest.mark.usefixtures("unchecked_types")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    make_tokenizer(folder, chat_template=CHAT)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    return folder


def examples(n=4, answer="1"):
    return [Example(prompt=[{"role": "user", "content": f"{i}="}], task={"answer": answer, "i": i}) for i in range(n)]


def config_of(model, **changes):
    data = Data(train=examples(), evals={"hard": examples(2)})
    base = Config(name="t", model=str(model), data=data, reward=lambda reply: 0.0, steps=4, prompts_per_step=1)
    return replace(base, rollout=RolloutConfig(max_tokens=8, max_model_len=32), **changes)


def saved(config, run):
    """A checkpoint of a run with this config, as `trainer.run` makes it."""
    prepared = prepare(config)
    progress = Progress(version=1, ends={0: "trained"})
    draft = checkpoint.draft(run, 1)
    write_history(draft, [])
    (draft / "learner" / "a.safetensors").write_bytes(b"weights")
    state = state_of(
        progress,
        resolved(config),
        flags=[],
        data=data_digest(prepared.train),
        prepared=prepared.state(),
        fingerprint=dict(prepared.fingerprint),
        cwd=str(run.parent),
    )
    checkpoint.commit(draft, 1, state, keep_last=1)
    return resume(run)


def noticed(resumed, config, accept=False):
    prepared = prepare(config, resumed.data)
    return resumed.check_data(data_digest(prepared.train), prepared.fingerprint, accept=accept)


def test_nothing_is_noticed_where_nothing_changed(model, tmp_path):
    config = config_of(model)
    assert noticed(saved(config, tmp_path / "run"), config) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Data(train=examples(answer="2"), evals={"hard": examples(2)}),
            "other answers (`task`) of the training exampl",
        ),
        (Data(train=examples(), evals={"hard": examples(3)}), "other examples in the held-out set 'hard'"),
        (Data(train=examples(), evals={"hard": examples(2, "2")}), "other examples in the held-out set 'hard'"),
        (Data(train=examples()), "other examples in the held-out set 'hard'"),
        (Data(train=examples(), evals={"hard": examples(2), "new": examples(1)}), "held-out sets: 'new' is new"),
    ],
)
def test_changed_data_is_named_and_may_be_accepted(model, tmp_path, data, message):
    resumed = saved(config_of(model), tmp_path / "run")
    with pytest.raises(CheckpointError) as refused:
        noticed(resumed, config_of(model, data=data))
    assert message in str(refused.value)
    assert "--changed-at-resume report" in str(refused.value)
    assert str(tmp_path / "run" / "checkpoints") in str(refused.value)
    (told,) = noticed(resumed, config_of(model, data=data), accept=True)
    assert told in str(refused.value)


def test_other_prompts_are_refused_in_any_case(model, tmp_path):
    resumed = saved(config_of(model), tmp_path / "run")
    for train in (examples(5), examples(4)[::-1]):
        with pytest.raises(CheckpointError, match="over other training prompts"):
            noticed(resumed, config_of(model, data=Data(train=train)), accept=True)


def test_the_same_texts_with_other_tokens_are_named_as_such(model, tmp_path):
    resumed = saved(config_of(model), tmp_path / "run")
    with pytest.raises(
        CheckpointError, match="the same texts and other tokens: put the model's tokenizer and chat temp"
    ):
        noticed(resumed, config_of(model, chat_template_kwargs={"add_generation_prompt": False}), accept=True)
    make_tokenizer(model, chat_template=CHAT.replace(";", "!"))
    with pytest.raises(CheckpointError, match="the same texts and other tokens"):
        noticed(resumed, config_of(model))


def test_a_set_that_is_read_as_needed_is_known_by_its_start_and_its_size(model, tmp_path):
    def many(i):
        return examples(20)[i % 20]

    resumed = saved(config_of(model, data=Data(train=many)), tmp_path / "run")
    assert noticed(resumed, config_of(model, data=Data(train=many))) == []
    with pytest.raises(CheckpointError, match="over other training prompts"):
        noticed(resumed, config_of(model, data=Data(train=lambda i: examples(20)[19 - i % 20])))


def test_a_model_with_other_weights_is_noticed_and_a_copy_of_it_is_not(model, tmp_path):
    resumed = saved(config_of(model), tmp_path / "run")
    before = model_digest(str(model))
    model.rename(tmp_path / "elsewhere")
    assert model_digest(str(tmp_path / "elsewhere")) == before
    assert model_digest("no/such-model") == model_digest("..") == ""
    weights = tmp_path / "elsewhere" / "model.safetensors"
    weights.write_bytes(bytes(255 - b for b in weights.read_bytes()))
    with pytest.raises(CheckpointError, match="other files of the model"):
        noticed(resumed, config_of(tmp_path / "elsewhere"))


def test_a_checkpoint_of_an_older_version_has_nothing_to_compare(model, tmp_path):
    resumed = saved(config_of(model), tmp_path / "run")
    for name in ("fingerprint", "prepared", "cwd"):
        del resumed.checkpoint.state[name]
    assert noticed(resumed, config_of(model, data=Data(train=examples(answer="9")))) == []


# -- code --------------------------------------------------------------------------------------------------------------

RECIPE = """
import re
from rl.objectives import GRPO
from dataclasses import dataclass
from checks import is_right

LIMIT = 3
WORD = re.compile("a+")

def helper(text):
    return len(text) < LIMIT

def reward(reply):
    '''Right or wrong.'''
    return float(helper(reply.text) and is_right(reply.text))  # a comment

class Judge:
    bonus = 1
    def __call__(self, reply):
        return self.bonus * float(bool(WORD.match(reply.text)))

@dataclass(frozen=True, kw_only=True)
class Mine(GRPO):
    def loss(self, policy, batch, advantages):
        return super().loss(policy, batch, advantages)
"""
CHECKS = "def is_right(text):\n    return text == '5'\n"


def digests(folder, recipe=RECIPE, checks=CHECKS, pick=lambda m: {"reward": m.reward}):
    (folder / "checks.py").write_text(checks)
    (folder / "recipe_of_test.py").write_text(recipe)
    for name in ("checks", "recipe_of_test"):
        sys.modules.pop(name, None)
    path = list(sys.path)
    try:
        module = load_file(str(folder / "recipe_of_test.py"))
        return code_digests(replace(config_of("m"), **pick(module)))
    finally:
        sys.path[:] = path


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (("# a comment", ""), True),
        (("Right or wrong.", "True or false."), True),
        (("def reward", "\n\n\ndef reward"), True),
        (("class Judge", "class Judges"), True),
        (("reply.text) and", "reply.text) or"), False),
        (("LIMIT = 3", "LIMIT = 4"), False),
        (("len(text) <", "len(text) <="), False),
    ],
)
def test_the_digest_of_a_reward_follows_what_it_does(fresh, change, kept):
    before, after = digests(fresh), digests(fresh, RECIPE.replace(*change))
    assert list(before) == list(after)
    assert len(before) == 1
    assert (before == after) == kept


def test_a_file_that_a_reward_imports_counts_too(fresh):
    assert digests(fresh) != digests(fresh, checks=CHECKS.replace("5", "6"))


@pytest.mark.parametrize(
    ("pick", "change"),
    [
        (lambda m: {"reward": m.Judge()}, ("bonus = 1", "bonus = 2")),
        (lambda m: {"reward": m.Judge()}, ('"a+"', '"b+"')),
        (lambda m: {"reward": m.Judge().__call__}, ("self.bonus *", "self.bonus +")),
        (lambda m: {"reward": functools.partial(m.reward)}, ("LIMIT = 3", "LIMIT = 4")),
        (lambda m: {"eval_reward": m.reward}, ("LIMIT = 3", "LIMIT = 4")),
        (lambda m: {"objective": m.Mine()}, ("super().loss(policy", "super().loss(policy or policy")),
        (lambda m: {"reward": lambda reply: m.reward(reply)}, ("LIMIT = 3", "LIMIT = 4")),
    ],
)
def test_objects_partials_methods_closures_and_objectives_are_followed(fresh, pick, change):
    def of(recipe):
        return {k: v for k, v in digests(fresh, recipe, pick=pick).items() if "test_noticed.config_of" not in k}

    before = of(RECIPE)
    assert before == of(RECIPE)
    assert before
    assert before != of(RECIPE.replace(*change))


def test_changed_code_of_the_same_name_is_refused_and_another_name_is_a_changed_setting(model, tmp_path, fresh):
    def at(limit):
        return digests(fresh, RECIPE.replace("LIMIT = 3", f"LIMIT = {limit}"))

    first = {"answers": "", "evals": {}, "model": "", "size": 4, "texts": "", "code": at(3)}
    resumed = saved(config_of(model), tmp_path / "run")
    resumed.checkpoint.state["fingerprint"] = first
    digest = resumed.saved("data")
    assert resumed.check_data(digest, first) == []
    with pytest.raises(
        CheckpointError, match=r"other code of reward recipe_of_test\.reward .*--changed-at-resume repor"
    ):
        resumed.check_data(digest, {**first, "code": at(4)})
    renamed = {name.replace(".reward", ".other"): digest for name, digest in at(4).items()}
    assert resumed.check_data(digest, {**first, "code": renamed}) == []


def test_our_own_code_has_a_version_instead_of_a_digest():
    assert not any("objective" in name for name in code_digests(config_of("m", objective=GRPO())))


# -- where -------------------------------------------------------------------------------------------------------------


def test_a_relative_model_in_another_folder_is_explained(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resumed = saved(config_of("model"), tmp_path / "run")
    assert resumed.check(resolved(config_of("model")), 4) == []
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(CheckpointError, match=rf"relative to {tmp_path}, where this run .* --model {tmp_path}/model"):
        resumed.check(resolved(config_of("model")), 4)


def test_a_moved_run_is_resumed_from_where_it_is(model, tmp_path):
    config = config_of(model)
    saved(config, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    resumed = resume(tmp_path / "moved")
    assert resumed.check(resolved(config), 4) == noticed(resumed, config) == []
    assert str(tmp_path / "moved") in resumed.learner
    with pytest.raises(CheckpointError, match=r"no run in .*run: .* moved is resumed from where it is now"):
        resume(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=rf"step-000001 is a checkpoint: give the folder of its run, {tmp_path}/mov"
    ):
        resume(tmp_path / "moved" / "checkpoints" / "step-000001")


def test_a_config_file_that_is_gone_is_asked_for(model, tmp_path):
    resumed = saved(config_of(model), tmp_path / "run")
    resumed.checkpoint.state["flags"] = ["--config", str(tmp_path / "gone.json"), "--steps", "3"]
    with pytest.raises(
        CheckpointError, match=r"--config .*gone\.json.*give --config again, such as --config .*run/conf"
    ):
        resumed.check_flags(["--steps", "5"])
    resumed.check_flags([f"--config={model / 'config.json'}"])


# -- names without addresses -------------------------------------------------------------------------------------------


class Held:
    def __init__(self, words):
        self.words, self._cache = words, {}

    def __call__(self, reply):
        return 0.0

    def method(self, reply):
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Odd(GRPO):
    values: object = None


def test_settings_have_no_memory_addresses_and_can_always_be_written(tmp_path):
    import torch

    def make():
        values = {"set": {3, 1, 2}, "path": tmp_path, "one": torch.tensor(2.0), "many": torch.zeros(2, 3), 5: object()}
        return config_of(
            "m",
            reward=functools.partial(Held(["a"]).method, None),
            eval_reward=Held(["b"]),
            filters=(lambda group: None,),
            objective=Odd(values=values),
        )

    first, second = resolved(make()), resolved(make())
    assert first == second
    assert config_digest(first) == config_digest(second)
    text = json.dumps(first)
    assert "0x" not in text
    here = "tests.unit.test_noticed" if "tests.unit" in Held.__module__ else Held.__module__
    assert first["eval_reward"] == {"type": f"{here}.Held", "words": ["b"]}
    assert first["reward"]["of"] == {"type": f"{here}.Held.method", "of": {"type": f"{here}.Held", "words": ["a"]}}
    assert first["objective"]["values"] == {
        "set": [1, 2, 3],
        "path": str(tmp_path),
        "one": 2.0,
        "many": first["objective"]["values"]["many"],
        "5": {"type": "builtins.object"},
    }
    assert first["objective"]["values"]["many"].startswith("Tensor of shape [2, 3], ")
    assert plain(Held(["c"])) != plain(Held(["d"]))


def test_an_object_with_much_in_it_does_not_fill_the_config():
    endless = []
    endless.append(endless)
    text = json.dumps(plain({"held": Held(list(range(10**6))), "endless": endless}))
    assert len(text) < 1000
    assert "list of 1000000" in text
