"""A training set may be a list, a sequence, an iterable or a function: each is read as far as it is needed, resumed at
its position, and its mistakes name the example."""

import re
from dataclasses import replace
from itertools import islice

import pytest
from datasets import Dataset

from rl.config import Config, RolloutConfig
from rl.data import Rows
from rl.loop.progress import Progress
from rl.loop.stream import stream
from rl.types import Data, Example, Prompt
from tiny_tokenizer import make_tokenizer
from trainer.errors import explained
from trainer.prompts import prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("model"))


# The suite checks arguments with beartype, which would answer before the product does.
pytestmark = pytest.mark.usefixtures("unchecked_types")


def config_of(model, train, **changes):
    base = Config(
        name="t",
        model=model,
        data=lambda: Data(train=train() if changes.get("fresh") else train),
        reward=lambda reply: 0.0,
        rollout=RolloutConfig(max_tokens=8, max_model_len=16),
    )
    return replace(base, **{k: v for k, v in changes.items() if k != "fresh"})


def example(i):
    return Example(prompt=f"{i}=", task={"index": i})


class Counted:
    """Rows that count how often they are read."""

    def __init__(self, n):
        self.n, self.read = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read.append(i)
        return i


def generated():
    yield from map(example, range(30))


FORMS = {
    "list": lambda: [example(i) for i in range(30)],
    "rows": lambda: Rows(Counted(30), example),
    "hugging face": lambda: Rows(Dataset.from_dict({"n": list(range(30))}), lambda row: example(row["n"])),
    "iterable": lambda: map(example, range(30)),
    "generator": generated,
    "generator function": lambda: generated,
    "function of the position": lambda: example,
}
MIXED = ("list", "rows", "hugging face")


def indices(prompts, n):
    return [p.task["index"] for p in islice(prompts, n)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_examples_in_their_order_or_mixed(model, form):
    prepared = prepare(config_of(model, FORMS[form](), seed=3))
    seen = list(islice(prepared.stream(3), 30))
    assert [p.ordinal for p in seen] == list(range(30))
    order = [p.task["index"] for p in seen]
    if form in MIXED:
        assert order == indices(stream([Prompt(ordinal=0, token_ids=[1], task={"index": i}) for i in range(30)], 3), 30)
        assert sorted(order) == list(range(30))
    else:
        assert order == list(range(30))
    assert [prepared.decode(p.token_ids) for p in seen] == [f"{i}=" for i in order]
    assert seen[0].given == f"{order[0]}="


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ended", [{}, {0: "trained", 1: "trained", 3: "trained", 11: "filtered(x)"}])
def test_a_resumed_run_reads_the_prompts_that_the_first_one_would_have_read(model, form, ended):
    whole = list(islice(prepare(config_of(model, FORMS[form]())).stream(0), 25))
    first = prepare(config_of(model, FORMS[form]()))
    assert list(islice(first.stream(0), 12))
    resumed = prepare(config_of(model, FORMS[form]()), first.state())
    progress = Progress(ends=ended)
    again = list(islice(progress.remaining(resumed.stream(0, ended)), 25 - len(ended)))
    assert again == [p for p in whole if p.ordinal not in ended]


@pytest.mark.slow
def test_a_large_set_is_read_as_the_run_needs_it(model):
    rows = Counted(1_000_000)
    prepared = prepare(config_of(model, Rows(rows, example)))
    assert len(rows.read) == 8
    list(islice(prepared.stream(0), 5))
    assert len(rows.read) == 13
    rows.read.clear()
    resumed = prepare(config_of(model, Rows(rows, example)), prepared.state())
    list(islice(resumed.stream(0, range(1000)), 2))
    assert len(rows.read) == 10, "what has ended is not read again"


def test_a_function_is_called_for_the_positions_that_are_needed(model):
    called = []

    def at(position):
        called.append(position)
        return example(position)

    prepared = prepare(config_of(model, at))
    called.clear()
    assert indices(prepared.stream(0, range(5000)), 3) == [5000, 5001, 5002]
    assert called == [5000, 5001, 5002]


def test_what_can_be_read_again_begins_again_and_what_cannot_ends_with_the_remedy(model):
    assert indices(prepare(config_of(model, generated)).stream(0), 65)[58:62] == [28, 29, 0, 1]
    prepared = prepare(config_of(model, generated()))
    with pytest.raises(ValueError, match="can be read only once: give the function that makes it, train=examples with"):
        indices(prepared.stream(0), 31)
    short = prepare(config_of(model, map(example, range(3))))
    assert indices(short.stream(0), 3) == [0, 1, 2]


LONG = [Example(prompt="1" * n + "=", task={"index": n}) for n in (3, 12, 5, 7, 8, 30, 1)]
"""Room is for 8 tokens: 12, 8 and 30 are too long."""


@pytest.mark.parametrize("lazy", [False, True])
def test_long_prompts_are_dropped_and_counted(model, lazy):
    train = (lambda i: LONG[i % 7]) if lazy else list(LONG)
    prepared = prepare(config_of(model, train, long_prompts="drop"))
    seen = indices(prepared.stream(0), 8)
    if lazy:
        assert seen == [3, 5, 7, 1, 3, 5, 7, 1]
    assert set(seen) == {3, 5, 7, 1}
    assert prepared.long == (6 if lazy else 3)
    assert prepared.metrics() == {"data/long_prompts": prepared.long}
    assert prepared.lines()[0] == "data.train: 3 of 7 long prompts dropped" or lazy


def test_a_resumed_run_drops_the_same_positions_without_reading_them(model):
    config = config_of(model, lambda i: LONG[i % 7], long_prompts="drop")
    first = prepare(config)
    whole = list(islice(first.stream(0), 12))
    resumed = prepare(config, first.state())
    assert first.state()["long_prompts"] == {
        "dropped": [[1, 1], [4, 5], [8, 8], [11, 12], [15, 15], [18, 19]],
        "cut": [],
    }
    assert list(islice(resumed.stream(0, range(5)), 7)) == whole[5:]
    assert resumed.long == first.long


def test_long_prompts_are_cut_at_their_beginning_and_keep_their_bos(model, tmp_path):
    prompts = [Example(prompt="0123456789="), Example(prompt="1=")]
    prepared = prepare(config_of(model, prompts, long_prompts="cut"))
    assert [prepared.decode(p.token_ids) for p in prepared.train] == ["3456789=", "1="]
    assert prepared.lines()[0] == "data.train: 1 of 2 long prompts cut at their beginning"
    with_bos = prepare(config_of(make_tokenizer(tmp_path, bos=True), prompts, long_prompts="cut"))
    text = with_bos.decode(with_bos.train[0].token_ids, skip_special_tokens=False)
    assert text == "<bos>456789="
    room_for_one = RolloutConfig(max_tokens=15, max_model_len=16)
    assert prepare(config_of(model, prompts, long_prompts="cut", rollout=room_for_one)).decode([5]) is not None


def test_held_out_sets_have_their_own_counts(model):
    data = Data(train=LONG[:1], evals={"hard": LONG, "easy": (e for e in LONG[2:4])})
    prepared = prepare(config_of(model, None, data=data, long_prompts="drop"))
    assert {name: len(prompts) for name, prompts in prepared.evals.items()} == {"hard": 4, "easy": 2}
    assert prepared.lines()[0] == "data.evals['hard']: 3 long prompts dropped"
    assert prepared.metrics() == {"data/long_prompts": 0.0}


def test_a_set_of_long_prompts_alone_is_refused(model):
    with pytest.raises(ValueError, match=r"all 2 prompts of data\.train are longer than 8 tokens: raise rollout\.max"):
        prepare(config_of(model, [LONG[1], LONG[5]], long_prompts="drop"))
    with pytest.raises(ValueError, match=r"first 8 prompts of data\.train are all too long"):
        prepare(config_of(model, lambda i: LONG[1], long_prompts="drop"))
    with pytest.raises(ValueError, match="10000 prompts in a row were left out"):
        next(stream(example, 0, prompt=lambda *_: None))


def test_a_long_prompt_is_refused_by_name_with_the_ways_out(model):
    with pytest.raises(
        ValueError, match=r"data\.train\[1\] has 13 prompt tokens.* to 21, or set long_prompts='drop' or"
    ):
        prepare(config_of(model, LONG))
    prepared = prepare(config_of(model, lambda i: LONG[0] if i < 20 else LONG[1]))
    with pytest.raises(ValueError, match=r"data\.train\[20\] has 13 prompt tokens"):
        list(islice(prepared.stream(0), 30))


def broken(at):
    def rows():
        for i in range(30):
            if i == at:
                raise KeyError("question")
            yield example(i)

    return rows


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            [{"prompt": "1=", "answer": "1"}],
            "data.train[0]={'prompt': '1=', 'answer': '1'} has the columns prompt, answer",
        ),
        ([example(0), "1="], "data.train[1]='1=' must be a list of Example"),
        ([example(0), None], "data.train[1]=None must be"),
        (lambda: iter([{"prompt": "1="}]), "data.train[0]={'prompt': '1='} has the columns prompt: make an Example"),
        (lambda i: {"prompt": "1="}, "data.train[0]={'prompt': '1='} has the columns prompt"),
        (lambda i: None, "data.train[0]=None must be"),
        (lambda: None, "returned a NoneType: `yield` each Example"),
        (lambda: example(0), "returned a Example: `yield` each Example"),
        (Rows([{"a": 1}], lambda row: Example(prompt=row["q"])), "data.train[0] cannot be read: KeyError: 'q'"),
        (lambda i: example(1 // (2 - i)), "data.train[2] cannot be read: ZeroDivisionError"),
        (broken(4), "data.train[4] cannot be read: KeyError: 'question'"),
        (broken(4)(), "data.train[4] cannot be read: KeyError: 'question'"),
        ([], "the training data is empty"),
        (Rows([], example), "the training data is empty"),
        (lambda: iter(()), "the training data is empty"),
        (iter([]), "the training data is empty"),
        (5, "train=5 must be a list of Example"),
        ("data.json", "train='data.json' must be a list of Example"),
        (None, "train=None must be a list of Example"),
        (Rows, "train=Rows"),
    ],
)
def test_what_is_no_training_set_is_named_before_the_start(model, train, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(config_of(model, train))


def test_a_mistake_further_down_a_stream_ends_the_run_by_name(model):
    prepared = prepare(config_of(model, broken(20)))
    with pytest.raises(ValueError, match=r"data\.train\[20\] cannot be read: KeyError: 'question'"):
        indices(prepared.stream(0), 30)


def test_the_task_of_a_wrong_example_names_its_prompt():
    with pytest.raises(
        ValueError, match=r"task='5' must be a dict .*write task={'answer': '5'} \(in the Example with prom"
    ):
        Example(prompt="2+3=", task="5")


def test_a_file_that_is_looked_for_in_another_folder_is_explained(model, tmp_path, monkeypatch):
    def data():
        return Data(train=[Example(prompt=line) for line in open("prompts.txt")])

    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data reads 'prompts\.txt', and there is no such file in .*relative"):
        prepare(config_of(model, None, data=data))


def test_an_error_in_a_stream_shows_the_users_line(model):
    rows = Rows([{"a": 1}], lambda row: Example(prompt=row["q"]))
    with pytest.raises(ValueError, match="cannot be read: KeyError: 'q'") as refused:
        prepare(config_of(model, rows))
    assert 'row["q"]' in explained(refused.value)
