"""Do new messages add the tokens that the run's own chat template would write?"""

import pytest

from chats import FAMILIES, FOLDER, Tokenizer, chat_for, tokenizer_of
from rl.environments.template import ASKED, WORDS, TemplateError

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
MORE = {"role": "user", "content": "And then?"}
FIVE = {"role": "tool", "name": "add", "tool_call_id": "abcdefg00", "content": "five"}
SIX = {"role": "tool", "name": "add", "tool_call_id": "abcdefg01", "content": "six"}
NEXT = {"user": [MORE], "one result": [FIVE], "two results": [FIVE, SIX], "a result and words": [FIVE, MORE]}
REWRITTEN = {
    # The generation prompt has a think block that a finished turn has not, or writes in another way.
    *[(name, case) for name in ("deepseek_r1", "minimax_m2", "nemotron3") for case in NEXT],
    # A user's message takes the think block from the turn in front of it, or the tools from the first message.
    *[(name, case) for name in ("qwen3", "qwen3_5", "mistral") for case in ("user", "a result and words")],
    # The turn's last token is another one as soon as something follows; and the end of a text, which is never written.
    ("harmony", "user"),
    *[("falcon", case) for case in NEXT],
}
"""Where the template's own text of the past differs from what was sampled."""
OUTSIDE = [("harmony", "a result and words"), ("mistral", "a result and words")]


def possible() -> list[tuple[str, str]]:
    """Each family with the messages that its template can write."""
    results = {"user": 0, "one result": 1, "two results": 2, "a result and words": 1}
    return [
        (name, case)
        for name, family in FAMILIES.items()
        for case in NEXT
        if name != "vision" and family.results >= results[case] and (name, case) not in OUTSIDE
    ]


def calls_of(messages: list[dict]) -> list[tuple[str, str]]:
    return [(m["name"], m["tool_call_id"]) for m in messages if m["role"] == "tool"]


def stop_of(tokenizer: Tokenizer, name: str, messages: list[dict]) -> int:
    family = FAMILIES[name]
    return tokenizer.id_of(family.tool_stop if calls_of(messages) and family.tool_stop else family.stops[0])


def real(chat, messages: list[dict], words: str, *before: dict) -> tuple[str, list[int]]:
    """The template's own text of a whole conversation, and its tokens behind the assistant's last words."""
    turn = chat.turn(calls_of(messages))
    said = eval(repr(turn).replace(WORDS, words))
    ended, text = (chat.text([*before, ASKED, said, *more], opens) for more, opens in (([], False), (messages, True)))
    return text, chat.encode(text.split(words, ended.count(words))[-1])


@pytest.mark.parametrize(("name", "case"), possible())
def test_a_delta_is_what_the_template_itself_writes_after_the_turn(name, case):
    tokenizer, messages = tokenizer_of(name), NEXT[case]
    chat = chat_for(name, tools=[TOOL], tokenizer=tokenizer)
    stop = stop_of(tokenizer, name, messages)
    delta = chat.delta(messages, [ord("a"), stop])
    _text, tail = real(chat, messages, "Twelve apples")
    assert tail[len(tail) - len(delta) :] == delta
    # What stands in front of it is the rest of the words (of a call), and one token that closes the turn.
    rest = tokenizer.decode(tail[: len(tail) - len(delta)])
    closes = {"falcon": "", "harmony": "<|end|>" if case == "user" else "<|call|>"}.get(name, tokenizer.decode([stop]))
    assert rest.endswith(closes)
    assert rest.count("<|") <= 1 + rest.count("tool_call") + rest.count("END_") + rest.count("action_end")
    assert all(m["content"] in tokenizer.decode(delta) for m in messages)


@pytest.mark.parametrize(("name", "case"), possible())
def test_prompt_sampled_tokens_and_delta_are_the_whole_conversation(name, case):
    tokenizer, messages = tokenizer_of(name), NEXT[case]
    chat = chat_for(name, tools=[TOOL], tokenizer=tokenizer)
    stop, prompt = stop_of(tokenizer, name, messages), chat.prompt([ASKED])
    delta = chat.delta(messages, [stop])
    turn = chat.encode(chat.text([ASKED, chat.turn(calls_of(messages))], False))
    whole = chat.encode(chat.text([ASKED, chat.turn(calls_of(messages)), *messages], True))
    sampled = turn[len(prompt) :]
    sampled = [*sampled[: sampled.index(stop)], stop] if stop in sampled else [*sampled, stop]
    same = [*prompt, *sampled, *delta] == whole
    assert same == ((name, case) not in REWRITTEN)


@pytest.mark.parametrize(("name", "case"), [each for each in possible() if each[0] != "command_a" or each[1] == "user"])
def test_a_delta_does_not_depend_on_what_came_before(name, case):
    tokenizer, messages = tokenizer_of(name), NEXT[case]
    chat = chat_for(name, tools=[TOOL], tokenizer=tokenizer)
    delta = chat.delta(messages, [ord("a"), stop_of(tokenizer, name, messages)])
    earlier = [{"role": "user", "content": "First"}, {"role": "assistant", "content": "Done."}]
    _, tail = real(chat, messages, "Twelve apples", *earlier)
    assert tail[len(tail) - len(delta) :] == delta


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("vision", "falcon")])
def test_the_template_closes_a_turn_that_was_cut_off(name):
    tokenizer = tokenizer_of(name)
    chat = chat_for(name, tokenizer=tokenizer)
    cut, ended = chat.delta([MORE], [ord("a")]), chat.delta([MORE], [ord("a"), stop_of(tokenizer, name, [])])
    closing = tokenizer.decode(cut[: len(cut) - len(ended)])
    assert cut[len(cut) - len(ended) :] == ended
    written = {"harmony": "<|end|>", "llama2": " </s>", "command_a": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"}
    assert closing == written.get(name, FAMILIES[name].stops[0])
    assert chat.delta([MORE], []) == cut


def test_of_a_turn_without_a_close_token_only_the_same_opener_is_left_out():
    """GLM: the policy stops at the opener of the role that it expects, or at the end of the text."""
    tokenizer = tokenizer_of("glm4")
    chat = chat_for("glm4", tokenizer=tokenizer)

    def after(stop: str, messages: list[dict]) -> str:
        return tokenizer.decode(chat.delta(messages, [ord("a"), tokenizer.id_of(stop)]))

    assert after("<|user|>", [MORE]) == "\nAnd then?<|assistant|>\n"
    assert after("<|endoftext|>", [MORE]) == "<|user|>\nAnd then?<|assistant|>\n"
    assert after("<|observation|>", [FIVE]) == "\n<tool_response>\nfive\n</tool_response><|assistant|>\n"
    assert after("<|user|>", [FIVE]) == "<|observation|>\n<tool_response>\nfive\n</tool_response><|assistant|>\n"


def test_another_stop_token_stands_for_the_close_token():
    """Llama 3.1 stops at eom after a call; harmony writes end where the policy sampled return."""
    for name, stop in (("llama3_1", "<|eom_id|>"), ("harmony", "<|return|>"), ("phi3", "<|endoftext|>")):
        tokenizer = tokenizer_of(name)
        chat = chat_for(name, tokenizer=tokenizer)
        closed = chat.delta([MORE], [ord("a"), tokenizer.id_of(stop)])
        assert closed == chat.delta([MORE], [ord("a"), tokenizer.id_of(FAMILIES[name].stops[0])])
        assert chat.delta([MORE], [ord("a")])[1:] == closed


def test_a_template_that_closes_only_the_last_turn_loses_no_opener():
    source = "{% for m in messages %}<|{{ m.role }}_x|>{{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}<|assistant_x|>{% else %}<|im_end|>{% endif %}"
    tokenizer = tokenizer_of("yi", source)
    chat = chat_for("yi", tokenizer=tokenizer)
    assert tokenizer.decode(chat.delta([MORE], [tokenizer.id_of("<|im_end|>")])) == "<|user_x|>And then?<|assistant_x|>"


def test_the_words_of_a_message_may_be_anything():
    tokenizer = tokenizer_of("qwen2_5")
    chat = chat_for("qwen2_5", tokenizer=tokenizer, tools=[TOOL])
    for content in (f"{WORDS} {WORDS}", "", "</tool_response>", "{{ 7 * 7 }} {% raw %}", "a\nb \n"):
        delta = chat.delta([{**FIVE, "content": content}], [tokenizer.id_of("<|im_end|>")])
        assert f"<tool_response>\n{content}\n</tool_response>" in tokenizer.decode(delta)


def test_extra_arguments_of_the_template_reach_the_next_generation_prompt():
    tokenizer = tokenizer_of("qwen3")
    chat = chat_for("qwen3", tokenizer=tokenizer, enable_thinking=False)
    assert tokenizer.decode(chat.delta([MORE], [ord("a")])).endswith("assistant\n<think>\n\n</think>\n\n")


def test_the_prompt_shows_the_tools():
    tokenizer = tokenizer_of("qwen2_5")
    with_tools, without = (
        tokenizer.decode(chat_for("qwen2_5", tokenizer=tokenizer, tools=t).prompt([ASKED])) for t in ([TOOL], [])
    )
    assert '"name": "add"' in with_tools
    assert '"name": "add"' not in without


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("gemma2", [FIVE], "cannot write the messages user, assistant, tool: the role tool is not supported"),
        ("command_r", [FIVE], "only system, user and assistant"),
        ("llama3_1", [FIVE, SIX], "one call at a time"),
        ("mistral", [{**FIVE, "tool_call_id": "x"}], "an id must have nine characters"),
        ("vision", [MORE], "does not show the assistant's words"),
    ],
)
def test_what_a_template_cannot_write_is_an_error(name, messages, text):
    chat = chat_for(name, tools=[TOOL])
    with pytest.raises(TemplateError, match=text):
        chat.delta(messages, [ord("a")])


def test_every_template_says_in_one_line_what_is_special():
    sources = {path.stem: path.read_text() for path in FOLDER.glob("*.jinja")}
    assert sources.keys() == FAMILIES.keys()
    assert len(sources) >= 24
    for source in sources.values():
        assert source.startswith("{#- ")
        assert source.splitlines()[0].endswith(". -#}")


def test_a_refusal_does_not_change_how_later_calls_are_written():
    """Arguments are written as text only for a template that can join nothing else."""
    chat = chat_for("mistral", tools=[TOOL])
    usual = chat.delta([FIVE], [ord("a")])
    with pytest.raises(TemplateError):
        chat.delta([{**FIVE, "tool_call_id": "x"}], [])
    assert chat.delta([FIVE, SIX], [])[: len(usual)] == usual
    assert '{\\"' not in chat.text([ASKED, chat.turn([("add", "abcdefg00")])], False)
