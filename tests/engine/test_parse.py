"""vLLM's own parsers read replies, and a call that cannot be read is never taken for an answer."""

import asyncio
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from chats import FOLDER
from episodes import stage
from live import engine_config
from rl.config import RolloutConfig
from rl.environments.play import play
from rl.environments.template import chat_of
from rl.environments.types import Limits
from rl.tokens import Rendering
from rl.tools.methods import schemas
from rl.types import Call, Completion, Parsed, Prompt
from rollout.parse import Parser, Parsers
from tiny_tokenizer import make_tokenizer
from trainer.doctor.episodes.calls import parser_findings
from trainer.doctor.episodes.chat import TOOL

GOOD = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
XML = "<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\n3\n</parameter>\n</function>\n"
ADD = Call(name="add", arguments={"a": 2, "b": 3})
SCHEMA = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tiny")))
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def hermes(tokenizer):
    return Parser(tokenizer, [1, 3], tool_parser="hermes", tools=[SCHEMA])


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def read(parser: Parser, text: str, reason="stop", prompt: str = "") -> Parsed:
    tokens = [ids(parser.tokenizer, each) for each in (prompt, text)]
    return parser.parse(*tokens, reason)


def test_an_answer_is_an_answer(hermes):
    assert read(hermes, "It is 5.<eos>") == Parsed(text="It is 5.")
    assert read(hermes, "It is 5", "length") == Parsed(text="It is 5")
    assert read(hermes, "") == Parsed(text="")


def test_calls_are_read_in_their_order(hermes):
    other = GOOD.replace("add", "mul")
    both = read(hermes, f"Two calls. {GOOD}\n{other}<end>")
    assert both == Parsed(text="Two calls.", calls=(ADD, Call(name="mul", arguments=ADD.arguments)))


def test_an_id_that_the_parser_has_drawn_is_left_out(hermes):
    """It would differ in a run that is resumed, and some templates write it."""
    assert read(hermes, GOOD).calls[0].id == ""


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": }}\n</tool_call>',
        '<tool_call>\n{"name": "add"}\n</tool_call>',
        "<tool_call>add(2, 3)</tool_call>",
        "<tool_call>",
        '<tool_call>\n{"name": "add", "argum',
        f'{GOOD}\n<tool_call>{{"name": ',
        '<tool_call>\n{"name": "add", "arguments": [2, 3]}\n</tool_call>',
        '{"name": "add", "arguments": {"a": 2, "b": 3}}',
    ],
)
def test_a_call_that_cannot_be_read_is_malformed(hermes, text):
    parsed = read(hermes, text)
    assert parsed.malformed
    assert parsed.calls == ()


@pytest.mark.parametrize("text", [GOOD, GOOD.removesuffix("</tool_call>"), GOOD[:30], f"{GOOD} and then"])
def test_a_reply_that_was_cut_off_makes_no_call(hermes, text):
    parsed = read(hermes, text, "length")
    assert "cut off" in parsed.malformed
    assert parsed.calls == ()


def test_reasoning_is_separated(tokenizer):
    parser = Parser(tokenizer, [1], tool_parser="hermes", reasoning_parser="deepseek_r1")
    parsed = read(parser, f"<think>2 and <tool_call> 3</think>Now: {GOOD}<eos>")
    assert parsed == Parsed(text="Now:", reasoning="2 and  3", calls=(ADD,))
    # The prompt has begun it, after an earlier turn in which it has ended.
    parsed = read(parser, "hm</think>It is 5.<eos>", prompt="a:<think>x</think>y<eos>u:1=;a:<think>")
    assert parsed == Parsed(text="It is 5.", reasoning="hm")
    # The prompt has switched it off.
    assert read(parser, "It is 5.<eos>", prompt="a:<think></think>") == Parsed(text="It is 5.")
    assert read(parser, "<think>on and", "length") == Parsed(text="", reasoning="on and")


def test_the_newer_kind_of_vllms_parsers_is_read_too(tokenizer):
    parser = Parser(tokenizer, [1], tool_parser="qwen3_xml", reasoning_parser="qwen3", tools=[SCHEMA])
    call = f"<tool_call>\n{XML}</tool_call>"
    parsed = read(parser, f"<think>hm</think>{call}<eos>", prompt="a:")
    assert (parsed.calls, parsed.malformed, parsed.reasoning) == ((ADD,), "", "hm")
    assert read(parser, f"<think>hm</think>{call[:60]}", "length", "a:").calls == ()
    assert "cut off" in read(parser, f"<think>hm</think>{call[:60]}", "length", "a:").malformed
    broken = read(parser, "<think>hm</think><tool_call>nothing</tool_call><eos>", prompt="a:")
    assert broken.malformed
    unfinished = read(parser, f"<think>hm</think>{call[:60]}<eos>", prompt="a:")
    assert unfinished.malformed
    assert unfinished.calls == ()


def test_a_completion_is_read_with_its_prompt(hermes):
    tokens = ids(hermes.tokenizer, GOOD + "<eos>")
    zeros = [0] * len(tokens)
    done = Completion(token_ids=tokens, logprobs=[0.0] * len(tokens), versions=zeros, finish_reason="stop")
    assert hermes([], done).calls == (ADD,)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tool_parser": "hermess"}, "rollout.tool_parser='hermess' is no parser of vLLM: did you mean 'hermes'?"),
        ({"reasoning_parser": "?"}, "rollout.reasoning_parser='[?]' is no parser of vLLM: it has .*deepseek_r1"),
    ],
)
def test_a_parser_that_vllm_does_not_have_is_an_error(tokenizer, settings, text):
    with pytest.raises(ValueError, match=text):
        Parser(tokenizer, [1], **settings)


def test_a_parser_that_needs_other_tokens_is_an_error(tmp_path):
    plain = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="'deepseek_r1' does not fit this model's tokenizer"):
        Parser(plain, [1], reasoning_parser="deepseek_r1")


def test_a_run_without_parsers_has_none(tokenizer):
    assert Parsers(RolloutConfig(), tokenizer, [1]).of([SCHEMA]) is None
    with pytest.raises(ValueError, match="did you mean 'hermes'"):
        Parsers(RolloutConfig(tool_parser="hermess"), tokenizer, [1])


class Adds:
    def __init__(self, task):
        self.task = task

    def add(self, a: int, b: int) -> int:
        """Add."""
        return a + b

    def reward(self, episode):
        return float(episode.turns[0].results[0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3_coder", f"<tool_call>\n{XML}</tool_call>"),
        ("qwen3_xml", f"<tool_call>\n{XML}</tool_call>"),
        (
            "glm45",
            "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>b</arg_key>\n"
            "<arg_value>3</arg_value>\n</tool_call>",
        ),
    ],
)
def test_a_parser_that_needs_the_types_of_the_arguments_gets_the_tools_of_the_prompt(tmp_path, name, said):
    source = (FOLDER / "qwen3_5.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path, chat_template=source))
    added = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens([*added, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"], special_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    parsers = Parsers(RolloutConfig(tool_parser=name), tokenizer, [end])

    class Says:
        """What an engine does with the tools that it is given."""

        async def sample(self, token_ids, n, *, tools=None, **_):
            tokens = [*ids(tokenizer, said), end]
            zeros = [0] * len(tokens)
            done = Completion(token_ids=tokens, logprobs=[0.0] * len(tokens), versions=zeros, finish_reason="stop")
            return [replace(done, parsed=parsers.of(tools)(token_ids, done))]

    chat = chat_of(tokenizer, Rendering(tools=schemas(Adds)), [end])
    acting = stage(Says(), env=Adds, chat=chat, limits=Limits(turns=1))
    given = [{"role": "user", "content": "2+3?"}]
    one = Prompt(ordinal=0, token_ids=chat.prompt(given), task={}, given=given)
    (row,) = asyncio.run(play(acting, one, 0, lambda turn: 0))
    assert row.reward == 5


def test_an_engine_reads_its_own_replies(live, tiny):
    """Random words of an untrained model hold no call; every completion has what was read, with its own text."""
    rollout = RolloutConfig(max_tokens=8, max_model_len=64, max_num_seqs=4, kv_cache_gib=0.25, tool_parser="hermes")
    engine = live(engine_config(tiny(), rollout=rollout))
    assert [done.parsed for done in engine.sample([10, 11, 12], 2, 3)] == [None, None]
    for done in engine.sample([10, 11, 12], 2, 3, tools=[SCHEMA]):
        ids = [i for i in done.token_ids if i not in engine.engine.stop_ids]
        assert done.parsed is not None
        assert done.parsed.text == engine.engine.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert not done.parsed.calls


@pytest.mark.parametrize(("family", "name", "finds"), [
    ("qwen2_5", "hermes", []),
    ("qwen3", "hermes", []),
    ("qwen3_5", "qwen3_xml", []),
    ("qwen2_5", "pythonic", ["calls_not_parsed"]),
    ("mistral", "hermes", ["calls_not_parsed"]),
])  # fmt: skip
def test_the_doctor_knows_which_parser_reads_a_template(tmp_path, family, name, finds):
    source = (FOLDER / f"{family}.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path, chat_template=source))
    tokens = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens(tokens, special_tokens=True)
    stops = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    parser = Parser(tokenizer, stops, tool_parser=name, tools=[TOOL])
    chat = chat_of(tokenizer, Rendering(), stops)
    assert [f.cause for f in parser_findings(chat, lambda ids, reason: parser.parse([], ids, reason))] == finds
