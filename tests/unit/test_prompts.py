"""What the model reads: text with the special tokens it needs and no others, the same on every day, and every prompt
that cannot be one is named before anything starts."""

import re
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest

from rl.config import Config, RolloutConfig
from rl.environments.template import chat_of
from rl.tokens import Rendering, encode, render
from rl.types import Data, Example
from rl.validate import check
from tiny_tokenizer import CHAT, make_tokenizer
from trainer.data.first_prompt import first_prompt
from trainer.prompts import load_tokenizer, prepare

USER = {"role": "user", "content": "1="}
BEGUN = {"role": "assistant", "content": "It is"}
TODAY = Rendering(now=datetime(2026, 3, 1, 23, 59))
DATED = "{{ strftime_now('%d %b %Y') }};" + CHAT


# The suite checks arguments with beartype, which would answer before the product does.
pytestmark = pytest.mark.usefixtures("unchecked_types")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def make(name, **more):
        return make_tokenizer(tmp_path_factory.mktemp(name), **more)

    return {
        "plain": make("plain"),
        "chat": make("chat", chat_template=CHAT),
        "bos": make("bos", bos=True, chat_template="<bos>" + CHAT),
        "no bos in template": make("nobos", bos=True, chat_template=CHAT),
        "both": make("both", bos=True, add_eos=True),
        "ends": make("ends", add_eos=True),
        "dated": make("dated", chat_template=DATED),
        "lower": make("lower", lower=True),
        "bare": make("bare", eos=None, pad=False, chat_template=CHAT),
        "eos turns": make("turns", chat_template=CHAT.replace("}};", "}}<eos>")),
        "strict": make(
            "strict", chat_template="{{ raise_exception('no system role') if messages[0].role == 'system' else 'x' }}"
        ),
        "drops": make("drops", chat_template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
    }


def config_of(model, train, **changes):
    base = Config(
        name="t",
        model=model,
        data=lambda: train if isinstance(train, Data) else Data(train=train),
        reward=lambda reply: 0.0,
        rollout=RolloutConfig(max_tokens=8, max_model_len=64),
    )
    return replace(base, **changes)


def text_of(model, prompt, **template):
    tokenizer = load_tokenizer(model)
    return tokenizer.decode(encode(tokenizer, prompt, Rendering(template=template)))


# -- special tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prompt", "text"),
    [
        ("bos", "1=", "<bos>1="),
        ("bos", "<bos>1=", "<bos>1="),
        ("bos", "<bos><bos>1=", "<bos><bos>1="),
        ("bos", "", "<bos>"),
        ("bos", [USER], "<bos>u:1=;a:"),
        ("no bos in template", [USER], "u:1=;a:"),
        ("ends", "1=", "1="),
        ("ends", "1=<eos>", "1=<eos>"),
        ("ends", "", ""),
        ("both", "1=", "<bos>1="),
        ("both", "<bos>1=", "<bos>1="),
        ("both", "", "<bos>"),
        ("plain", "<bos>1=", "<bos>1="),
        ("bare", "1=", "1="),
    ],
)
def test_a_prompt_has_one_bos_and_no_end(folders, kind, prompt, text):
    assert text_of(folders[kind], prompt) == text


def test_a_text_that_went_through_the_template_is_the_prompt_that_messages_are(folders):
    tokenizer = load_tokenizer(folders["bos"])
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert encode(tokenizer, text, TODAY) == encode(tokenizer, [USER], TODAY)


# -- conversations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "template", "text"),
    [
        ([USER], {}, "u:1=;a:"),
        ([USER, BEGUN], {}, "u:1=;a:It is"),
        ([USER, BEGUN, USER], {}, "u:1=;a:It is;u:1=;a:"),
        ([USER, {**BEGUN, "content": ""}], {}, "u:1=;a:"),
        ([USER, {**BEGUN, "content": "It is "}], {}, "u:1=;a:It is "),
        ([USER, BEGUN], {"continue_final_message": True}, "u:1=;a:It is"),
        ([USER, BEGUN], {"continue_final_message": True, "add_generation_prompt": False}, "u:1=;a:It is"),
        ([USER, BEGUN], {"continue_final_message": False}, "u:1=;a:It is;a:"),
        ([USER, BEGUN], {"continue_final_message": False, "add_generation_prompt": False}, "u:1=;a:It is;"),
        ([USER], {"add_generation_prompt": False}, "u:1=;"),
        ([USER], {"continue_final_message": True}, "u:1=;a:"),
        ([USER], {"continue_final_message": True, "add_generation_prompt": False}, "u:1=;a:"),
        ([USER], {"add_generation_prompt": True}, "u:1=;a:"),
        ([USER], {"chat_template": "{{ messages[0].content }}!"}, "1=!"),
    ],
)
def test_a_conversation_that_ends_with_the_assistant_is_continued(folders, messages, template, text):
    assert text_of(folders["chat"], messages, **template) == text


@pytest.mark.parametrize("more", [{}, {"continue_final_message": True}])
def test_arguments_that_contradict_a_conversation_are_refused(folders, more):
    data = [Example(prompt=[USER]), Example(prompt=[USER, BEGUN])]
    template = {"add_generation_prompt": True, **more}
    with pytest.raises(
        ValueError, match=r"data\.train\[1\] cannot be encoded: .*leave add_generation_prompt out, or set"
    ):
        prepare(config_of(folders["chat"], data, chat_template_kwargs=template))


@pytest.mark.parametrize("name", ["tokenize", "messages", "return_dict", "tools", "strftime_now"])
def test_an_argument_that_a_run_sets_itself_is_refused_at_once(name):
    config = config_of("m", [Example(prompt="1")], chat_template_kwargs={name: True})
    with pytest.raises(ValueError, match=f"chat_template_kwargs has '{name}', which a run sets by itself: remove it"):
        check(config)


# -- dates -------------------------------------------------------------------------------------------------------------


def test_a_template_that_writes_the_date_writes_that_of_the_runs_start(folders):
    tokenizer = load_tokenizer(folders["dated"])
    assert render(tokenizer, [USER], TODAY) == "01 Mar 2026;u:1=;a:"
    assert render(tokenizer, [USER, BEGUN], TODAY) == "01 Mar 2026;u:1=;a:It is"


def test_one_of_several_templates_is_chosen_by_its_name(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    tokenizer.chat_template = {"default": CHAT, "dated": DATED}
    assert render(tokenizer, [USER], TODAY) == "u:1=;a:"
    assert render(tokenizer, [USER], replace(TODAY, template={"chat_template": "dated"})).startswith("01 Mar 2026")


# -- tools and turns ---------------------------------------------------------------------------------------------------

TOOLED = "{{ tools | tojson if tools else 'none' }};" + CHAT
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_a_prompt_shows_the_tools_of_the_run(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    tokenizer.chat_template = {"default": "none;" + CHAT, "tool_use": DATED + TOOLED}
    assert render(tokenizer, [USER], TODAY) == "none;u:1=;a:"
    shown = render(tokenizer, [USER], replace(TODAY, tools=[ADD]))
    # The template for tools writes the date too, which is that of the run's start.
    assert shown.startswith("01 Mar 2026;")
    assert '"name": "add"' in shown


def test_the_caller_may_decide_whether_the_assistants_turn_is_opened(folders):
    tokenizer = load_tokenizer(folders["chat"])
    assert render(tokenizer, [USER], TODAY, opens=False) == "u:1=;"
    assert render(tokenizer, [USER, BEGUN], TODAY, opens=False) == "u:1=;a:It is;"
    assert render(tokenizer, [USER, BEGUN], TODAY, opens=True) == "u:1=;a:It is;a:"


def test_a_real_tokenizer_gives_the_same_delta_alone_as_in_the_whole_text(tmp_path):
    tokenizer = load_tokenizer(
        make_tokenizer(tmp_path, bos=True, chat_template="<bos>" + CHAT.replace("}};", "}}<eos>"))
    )
    chat = chat_of(tokenizer, TODAY, [tokenizer.eos_token_id])
    more = {"role": "user", "content": "2="}
    prompt, said = chat.prompt([USER]), [*tokenizer.encode("It is", add_special_tokens=False), tokenizer.eos_token_id]
    whole = chat.prompt([USER, BEGUN, more])
    assert [*prompt, *said, *chat.delta([more], said)] == whole
    assert [*prompt, *said[:-1], *chat.delta([more], said[:-1])] == whole
    assert whole.count(tokenizer.bos_token_id) == 1


def test_a_resumed_run_has_the_prompts_of_the_day_on_which_it_was_started(folders):
    config = config_of(folders["dated"], [Example(prompt=[USER])])
    yesterday = {**prepare(config).state(), "now": "2026-02-28T23:59:59"}
    resumed = prepare(config, yesterday)
    assert resumed.decode(resumed.train[0].token_ids) == "28 Feb 2026;u:1=;a:"
    assert resumed.state() == yesterday, "the next checkpoint keeps it"
    assert resumed.train[0].token_ids != prepare(config).train[0].token_ids


# -- what cannot be a prompt -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prompt", "message"),
    [
        ("chat", [{"role": "system", "content": None}, USER], "message 0 (role 'system') has content None"),
        ("chat", [{"role": "user"}], "message 0 (role 'user') has no 'content': write {'role': 'user', 'content': "),
        ("chat", [{"role": "user", "content": 5}], "has the content 5: only text can be trained on"),
        ("chat", [{"role": "user", "content": {"a": 1}}], "has the content {'a': 1}: only text"),
        ("chat", [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "has the content {'type': 'image'"),
        ("chat", [{"role": "user", "content": [{"type": "text", "text": "1="}]}], "writes as Python code: give its"),
        ("chat", [{"role": 7, "content": "1="}], "message 0 (role 7): a role must be text"),
        ("chat", [{"role": "user", "content": "\ud83d"}], "half a surrogate pair, '\\ud83d', at character 2"),
        ("chat", "1=\udc00", "half a surrogate pair, '\\udc00', at character 2: repair it"),
        ("strict", [{"role": "system", "content": "x"}, USER], "no system role. It begins [{'role': 'system'"),
        ("plain", [USER], "no chat template; give plain text prompts"),
        ("plain", [-1, 5], "has token ids from -1 to 5, and the vocabulary"),
        ("plain", [5, 10**6], "has token ids from 5 to 1000000"),
    ],
)
def test_a_prompt_that_cannot_be_one_is_named(folders, kind, prompt, message):
    data = Data(train=[Example(prompt="1=" if kind == "plain" else [USER])] * 5 + [Example(prompt=prompt)])
    with pytest.raises(ValueError, match=rf"data\.train\[5\] cannot be encoded: .*{re.escape(message)}"):
        prepare(config_of(folders[kind], data))
    held_out = Data(train=data.train[:1], evals={"hard": data.train[4:]})
    with pytest.raises(ValueError, match=rf"data\.evals\['hard'\]\[1\] cannot be encoded: .*{re.escape(message)}"):
        prepare(config_of(folders[kind], held_out))


def test_tools_may_be_called_without_words(tmp_path):
    model = make_tokenizer(tmp_path, chat_template=CHAT)
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    prepare(config_of(model, [Example(prompt=[USER, called, {"role": "tool", "content": "5"}])]))


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content + 5 }}", "{{ messages[0].a.b }}", "{% if %}", "{{ 1/0 }}"]
)
def test_whatever_a_template_raises_names_the_example(tmp_path, template):
    model = make_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match=r"data\.train\[0\] cannot be encoded: .*It begins \[{'role': 'user'"):
        prepare(config_of(model, [Example(prompt=[USER])]))


def test_an_error_of_a_huge_prompt_is_short(folders):
    huge = Data(train=[Example(prompt=[{"role": "user", "content": "1" * 300_000}], task={"cases": ["x"] * 10**5})])
    with pytest.raises(ValueError, match=r"data\.train\[0\] has 300005 prompt tokens") as refused:
        prepare(config_of(folders["chat"], huge))
    assert len(str(refused.value)) < 500
    with pytest.raises(ValueError, match="must be a dict") as refused:
        Example(prompt="1" * 10**6, task="x" * 10**6)
    assert len(str(refused.value)) < 500


def test_numpys_integers_are_token_ids(folders):
    example = Example(prompt=[np.int64(5), np.int32(6)])
    with pytest.raises(ValueError, match=r"is an array: write a list of token ids, prompt=ids\.tolist\(\)"):
        Example(prompt=np.array([5, 6]))
    assert [type(token) for token in example.prompt] == [int, int]
    assert prepare(config_of(folders["plain"], [example])).train[0].token_ids == [5, 6]


# -- the first prompt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prompt", "template", "oddities"),
    [
        ("bos", "1=", {}, []),
        ("bos", [USER], {}, []),
        ("chat", [USER], {}, []),
        ("bare", [USER], {}, []),
        ("bos", "<bos><bos>1=", {}, ["it begins with <bos> twice"]),
        ("bos", [5, 4, 6], {}, ["<bos> begins a text, and stands at token 1 too", "does not begin with <bos>"]),
        ("no bos in template", [USER], {}, ["it does not begin with <bos>, which this tokenizer puts in front"]),
        ("ends", "1=<eos>", {}, ["it ends with <eos>, so the reply begins after the end of a text"]),
        ("ends", "1<eos>2=", {}, ["<eos> ends a text, and stands at token 1"]),
        ("eos turns", [USER], {}, []),
        ("eos turns", [{"role": "user", "content": "<eos>="}], {}, ["<eos> ends a text, and stands at token 2"]),
        ("plain", "1é=", {}, ["it has 1 unknown token(s), the first at 1"]),
        ("plain", "1<pad>=", {}, ["it has 1 padding token(s), the first at 1"]),
        ("plain", "1 = ", {}, ["it ends with a space"]),
        ("lower", "Is it", {}, ["the tokens do not give the text back: 'Is it' became 'is it'"]),
        ("chat", [USER, BEGUN], {}, ["it ends with the assistant's words, which the reply continues"]),
        ("chat", [USER], {"add_generation_prompt": False}, ["no generation prompt"]),
        ("dated", [USER], {}, ["can write the date; until the end of this run it is 2026-03-01"]),
        ("drops", [{"role": "human", "content": "1="}, USER], {}, ["no generation prompt"]),
        ("drops", [{"role": "human", "content": "9="}, USER], {}, ["no generation prompt", "message 0 (role 'human')"]),
    ],
)  # fmt: skip
def test_the_first_prompt_shows_what_is_unusual_about_it(folders, kind, prompt, template, oddities):
    tokenizer, rendering = load_tokenizer(folders[kind]), replace(TODAY, template=template)
    first = first_prompt(tokenizer, prompt, encode(tokenizer, prompt, rendering), rendering)
    assert len(first.oddities) == len(oddities), first.oddities
    for shown, wanted in zip(first.oddities, oddities, strict=True):
        assert wanted in shown


def test_a_long_first_prompt_is_shown_by_its_ends(folders):
    tokenizer = load_tokenizer(folders["bos"])
    prompt = "12" + "3" * 200 + "4="
    lines = first_prompt(tokenizer, prompt, encode(tokenizer, prompt, TODAY), TODAY).lines()
    assert lines[0].plain.startswith("the first prompt has 205 tokens: <bos>|1|2|3|3")
    assert "|... 125 more ...|" in lines[0].plain
    assert lines[0].plain.endswith("|3|4|=")
