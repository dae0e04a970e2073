"""A planted fault of a template, a parser or an environment is named before a run; clean ones have no finding."""

import json
import random
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch

from chats import FAMILIES, NOW, Tokenizer, chat_of, tokenizer_of
from rl.environments.types import EnvError
from rl.tokens import Rendering
from rl.types import Call, Parsed
from trainer.doctor.episodes.calls import parser_findings
from trainer.doctor.episodes.chat import template_findings
from trainer.doctor.episodes.environment import environment_findings
from trainer.doctor.episodes.examine import episode_findings

CLEAN = ("qwen2_5", "qwen3", "hermes", "kimi_k2", "internlm2", "glm4")


def examined(tokenizer: Tokenizer, name: str, *, native: bool = True, stops: tuple[str, ...] = ()) -> list[str]:
    ids = [tokenizer.id_of(stop) for stop in stops or FAMILIES[name].stops]
    chat, later = (chat_of(tokenizer, Rendering(now=now), ids) for now in (NOW, NOW + timedelta(days=40)))
    found = template_findings(chat, native=native, bos=tokenizer.id_of(FAMILIES[name].bos), redated=later)
    assert all(f.remedy and f.where == "chat template" for f in found)
    return [f.cause for f in found]


# -- templates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_template_has_no_finding(name):
    assert examined(tokenizer_of(name), name) == []
    assert examined(tokenizer_of(name), name, native=False) == []


UNTAUGHT = ["tools_not_shown", "calls_not_shown"]
SHOWN = {
    "command_a": ["delta_differs"],
    "command_r": [*UNTAUGHT, "template_refuses"],
    "deepseek_r1": [*UNTAUGHT, "results_not_shown", "prefilled"],
    "deepseek_v3": ["tools_not_shown"],
    "falcon": [*UNTAUGHT, "no_close_token"],
    "gemma2": [*UNTAUGHT, "template_refuses"],
    "granite": ["dated"],
    "harmony": ["one_call_a_turn", "close_differs", "dated"],
    "lfm2": ["calls_not_shown"],
    "llama2": [*UNTAUGHT, "template_refuses"],
    "llama3": UNTAUGHT,
    "llama3_1": ["one_call_a_turn", "dated"],
    "minimax_m2": ["prefilled"],
    "mistral": ["tools_move"],
    "nemotron3": ["prefilled"],
    "olmo2": [*UNTAUGHT, "results_not_shown"],
    "phi3": [*UNTAUGHT, "results_not_shown"],
    "phi4_mini": UNTAUGHT,
    "smollm2": UNTAUGHT,
    "smollm3": [*UNTAUGHT, "dated"],
    "vicuna": [*UNTAUGHT, "results_not_shown"],
    "vision": ["words_not_shown"],
    "yi": UNTAUGHT,
    "zephyr": [*UNTAUGHT, "results_not_shown"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_familys_template_drops_or_refuses_is_named(name):
    assert examined(tokenizer_of(name), name) == SHOWN.get(name, [])


def test_calls_as_text_need_no_template_that_knows_tools():
    for name in FAMILIES.keys() - {"vision"}:
        assert {*examined(tokenizer_of(name), name, native=False)} <= {
            "dated", "prefilled", "close_differs", "no_close_token"
        }  # fmt: skip


ASSISTANT_ENDS = "{{- '<|im_end|>\\n' }}\n    {%- elif m.role == 'tool'"
PLANTED = {
    "the tools are not written": ("{%- if tools %}", "{%- if false %}", "tools_not_shown"),
    "only the names of tools are written": ("tool | tojson", "tool.function.name", "tools_not_shown"),
    "a call is not written": ("in m.tool_calls or []", "in []", "calls_not_shown"),
    "results are not written": ("m.role == 'tool'", "m.role == 'nobody'", "results_not_shown"),
    "only the last result is written": (
        "elif m.role == 'tool'",
        "elif m.role == 'tool' and (loop.last or loop.nextitem.role != 'tool')",
        "results_not_shown",
    ),
    "the role tool is refused": (
        "{%- elif m.role == 'tool' %}",
        "{%- elif m.role == 'tool' %}{{ raise_exception('no tools here') }}",
        "template_refuses",
    ),
    "begin-of-text stands twice": ("{#- ChatML", "{{- bos_token ~ bos_token }}{#- ChatML", "bos_twice"),
    "the date is written": ("'\\n</tools>\\n", "strftime_now('%d %b %Y') ~ '\\n</tools>\\n", "dated"),
    "turns are numbered": ("<|im_start|>user\\n' ~ m", "<|im_start|>user\\n' ~ loop.index ~ m", "delta_differs"),
    "a turn with reasoning ends in another way": (
        ASSISTANT_ENDS,
        ASSISTANT_ENDS.replace("{{- '", "{{- (' ' if m.reasoning_content else '') ~ '"),
        "delta_differs",
    ),
    "the prompt begins the answer": (
        "'<|im_start|>assistant\\n' }}",
        "'<|im_start|>assistant\\n<think>' }}",
        "prefilled",
    ),
    "users' words are not written": ("user\\n' ~ m.content", "user\\n' ~ m.contents", "words_not_shown"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_of_a_template_is_named(fault):
    part, instead, cause = PLANTED[fault]
    clean = tokenizer_of("qwen2_5").chat_template
    assert part in clean
    assert examined(tokenizer_of("qwen2_5", clean.replace(part, instead)), "qwen2_5") == [cause]


def test_a_close_token_at_which_the_sampler_does_not_stop_is_named():
    assert examined(tokenizer_of("qwen2_5"), "qwen2_5", stops=("<|endoftext|>",)) == ["close_token"]
    assert examined(tokenizer_of("qwen2_5"), "qwen2_5", stops=("<|endoftext|>",), native=False) == ["close_token"]
    assert examined(tokenizer_of("harmony"), "harmony", stops=("<|return|>",))[-2:] == ["close_token", "dated"]


# -- parsers -----------------------------------------------------------------------------------------------------------


def hermes(tokenizer: Tokenizer, *, careless: bool = False) -> Any:
    def parse(ids: list[int], reason: str) -> Parsed:
        text = tokenizer.decode(ids).removesuffix("<|im_end|>")
        said, start, call = text.partition("<tool_call>")
        try:
            made = json.loads(call.split("</tool_call>")[0])
        except json.JSONDecodeError:
            return Parsed(text=said, malformed="" if careless or not start else "a call that is no JSON")
        return Parsed(text=said, calls=(Call(name=made["name"], arguments=made["arguments"]),))

    return parse


def test_a_parser_that_reads_the_templates_calls_has_no_finding():
    for name in ("qwen2_5", "qwen3", "hermes"):
        tokenizer = tokenizer_of(name)
        chat = chat_of(tokenizer, Rendering(now=NOW), [tokenizer.id_of("<|im_end|>")])
        assert parser_findings(chat, hermes(tokenizer)) == []


def test_a_parser_of_another_format_is_named():
    tokenizer = tokenizer_of("mistral")
    chat = chat_of(tokenizer, Rendering(now=NOW), [tokenizer.id_of("</s>")])
    assert [f.cause for f in parser_findings(chat, hermes(tokenizer))] == ["calls_not_parsed"]


def test_a_parser_that_takes_a_broken_call_for_an_answer_is_named():
    tokenizer = tokenizer_of("qwen3")
    chat = chat_of(tokenizer, Rendering(now=NOW), [tokenizer.id_of("<|im_end|>")])
    found = parser_findings(chat, hermes(tokenizer, careless=True))
    assert [f.cause for f in found] == ["broken_call_taken"]
    assert "became an answer" in found[0].evidence


def test_of_a_template_without_calls_no_parser_is_at_fault():
    tokenizer = tokenizer_of("yi")
    chat = chat_of(tokenizer, Rendering(now=NOW), [tokenizer.id_of("<|im_end|>")])
    assert parser_findings(chat, hermes(tokenizer)) == []


# -- environments ------------------------------------------------------------------------------------------------------


class Clean:
    def __init__(self, task):
        self.task, self.random = task, random.Random(task["seed"])

    def start(self):
        return [{"role": "user", "content": f"Guess {self.random.random()}"}]

    def guess(self, number: int) -> str:
        """Guess."""
        return str(number)

    def reward(self, episode):
        return 1.0


class Awaited(Clean):
    async def start(self):
        return super().start()

    async def close(self):
        return None


class Draws(Clean):
    def start(self):
        return [{"role": "user", "content": "x" * int(random.random() * 0)}]


class Seeds(Clean):
    def start(self):
        np.random.seed(1)
        return []


class DrawsFromTorch(Clean):
    def start(self):
        torch.rand(1)
        return []


class Differs(Clean):
    def start(self):
        return [{"role": "user", "content": str(random.Random().random())}]


class Changes(Clean):
    def start(self):
        self.task.setdefault("seen", 1)
        return []


class Raises(Clean):
    def start(self):
        raise KeyError("database")


class Untyped(Clean):
    def guess(self, number):
        return number


def seed_of(ordinal: int, episode: int, turn: int) -> int:
    return ordinal * 100 + episode * 10 + turn


def causes(environment: Any, **more: Any) -> list[str]:
    found = environment_findings(environment, [{"seed": 1}, {"seed": 2}], **{"seed_of": seed_of, **more})
    assert all(f.remedy and f.where == environment.__name__ for f in found)
    return [f.cause for f in found]


@pytest.mark.parametrize("environment", [Clean, Awaited])
def test_a_clean_environment_has_no_finding(environment):
    played: list[int] = []
    assert causes(environment, episodes=lambda: played.append(1)) == []
    assert played == [1]


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        (Draws, "global_random"),
        (Seeds, "global_random"),
        (DrawsFromTorch, "global_random"),
        (Differs, "start_differs"),
        (Changes, "task_changed"),
        (Raises, "environment_fails"),
        (Untyped, "tool_types"),
    ],
)
def test_a_planted_fault_of_an_environment_is_named(environment, cause):
    assert causes(environment) == [cause]


def test_episodes_that_fail_or_draw_are_named():
    def fails():
        raise EnvError("the tool guess raised ZeroDivisionError")

    assert causes(Clean, episodes=fails) == ["environment_fails"]
    assert causes(Clean, episodes=random.random) == ["global_random"]


def test_two_turns_with_one_seed_are_named():
    found = environment_findings(Clean, [], seed_of=lambda ordinal, episode, turn: ordinal * 10 + episode)
    assert [f.cause for f in found] == ["turn_seeds"]
    assert found[0].evidence == "(prompt, episode, turn) (0, 0, 1) and (0, 0, 0) have the seed 0"


class Text(Clean):
    def parse(self, text):
        return []


class Judge:
    """An environment without tools."""

    def __init__(self, task):
        self.task = task

    def reply(self, turn):
        return None


def test_native_calls_are_examined_only_where_an_environment_uses_them():
    tokenizer = tokenizer_of("yi")
    stops = [tokenizer.id_of("<|im_end|>")]

    def found(environment: Any, **more: Any) -> list[str]:
        return [
            f.cause for f in episode_findings(environment, [{"seed": 1}], tokenizer, Rendering(now=NOW), stops, **more)
        ]

    assert found(Clean) == UNTAUGHT
    assert found(Text) == found(Judge) == []
    assert found(Untyped) == ["tool_types"]
    assert found(Differs, seed_of=lambda *_: 3) == ["start_differs", "turn_seeds", *UNTAUGHT]
    tokenizer = tokenizer_of("mistral")
    stops = [tokenizer.id_of("</s>")]
    assert found(Clean, parse=hermes(tokenizer)) == ["tools_move", "calls_not_parsed"]
