"""Chat templates in the form of public families, and a tokenizer that has the special tokens of all of them."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rl.environments.template import Chat, chat_of
from rl.tokens import Rendering

FOLDER = Path(__file__).parent / "templates"
NOW = datetime(2026, 3, 1)
SPECIAL = re.compile(
    r"<\|[A-Za-z_]\w*\|>|<\|/tool\|>|\]~!b\[|\]~b\]|\[e~\[|<s>|</s>|<bos>|<eos>|<sop>|\[gMASK\]|</?think>"
    r"|<(?:start|end)_of_turn>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS)\]|\[TOOL_CALLS\]|</?tool_call>"
)
"""All special tokens of the templates in `FOLDER`."""
WORDS_ONLY = {"zephyr", "olmo2"}
"""Families whose `<|role|>` are plain words for the tokenizer."""


class Tokenizer:
    """One token per character, and per special token; with a chat template as transformers renders it."""

    name_or_path = "characters"

    def __init__(self, template: str, *, bos: str, eos: str, plain_roles: bool = False) -> None:
        self.chat_template, self.bos_token, self.eos_token = template, bos, eos
        self.bos_token_id = None
        self.plain_roles = plain_roles
        self.ids: dict[str, int] = {}

    def __len__(self) -> int:
        return 1_200_000

    def id_of(self, token: str) -> int:
        return self.ids.setdefault(token, 1_150_000 + len(self.ids))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids, at = [], 0
        for found in SPECIAL.finditer(text):
            if self.plain_roles and re.fullmatch(r"<\|(system|user|assistant)\|>", found[0]):
                continue
            ids += [*map(ord, text[at : found.start()]), self.id_of(found[0])]
            at = found.end()
        return [*ids, *map(ord, text[at:])]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        names = {} if skip_special_tokens else {i: token for token, i in self.ids.items()}
        return "".join(names.get(i, "") if i >= 1_150_000 else chr(i) for i in ids)

    def apply_chat_template(self, messages: list[dict], tokenize: bool = False, tools: Any = None, **more: Any) -> str:
        assert not tokenize
        assert not more.pop("continue_final_message", False), "not needed here"
        named = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return compiled(self.chat_template).render(messages=messages, tools=tools, **named, **more)


@cache
def compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(template)


@dataclass(frozen=True)
class Family:
    """What a test knows of one family."""

    stops: tuple[str, ...]
    """The tokens at which its sampler stops; the first is the one that a usual reply ends with."""
    bos: str = "<s>"
    finds: tuple[str, ...] = ()
    """What the doctor must find in it, with tools."""
    tool_stop: str = ""
    """Ends a turn with calls, if another token does."""
    results: int = 2
    """How many results a turn can have; 0: none is possible."""
    text_finds: tuple[str, ...] = ()
    """What the doctor must find in it without tools."""


IM = ("<|im_end|>", "<|endoftext|>")
UNTAUGHT = ("tools_not_shown", "calls_not_shown")
FAMILIES = {
    "command_a": Family(("<|END_OF_TURN_TOKEN|>",)),
    "command_r": Family(("<|END_OF_TURN_TOKEN|>",), results=0),
    "deepseek_r1": Family(("<|end_of_sentence|>",), results=0),
    "deepseek_v3": Family(("<|end_of_sentence|>",)),
    "falcon": Family(("<|endoftext|>",)),
    "gemma2": Family(("<end_of_turn>", "<eos>"), bos="<bos>", results=0),
    "glm4": Family(("<|user|>", "<|observation|>", "<|endoftext|>"), tool_stop="<|observation|>"),
    "granite": Family(("<|end_of_text|>",)),
    "harmony": Family(("<|return|>", "<|call|>"), tool_stop="<|call|>", results=1),
    "hermes": Family(IM),
    "internlm2": Family(IM),
    "kimi_k2": Family(("<|im_end|>",)),
    "lfm2": Family(IM),
    "llama2": Family(("</s>",), results=0),
    "llama3": Family(("<|eot_id|>", "<|end_of_text|>")),
    "llama3_1": Family(("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), results=1),
    "minimax_m2": Family(("[e~[",)),
    "mistral": Family(("</s>",)),
    "nemotron3": Family(IM),
    "olmo2": Family(("<|endoftext|>",), bos="<|endoftext|>", results=0),
    "phi3": Family(("<|end|>", "<|endoftext|>", "<|assistant|>"), results=0),
    "phi4_mini": Family(("<|end|>", "<|endoftext|>")),
    "qwen2_5": Family(IM),
    "qwen3": Family(IM),
    "qwen3_5": Family(IM),
    "smollm2": Family(IM, bos="<|im_start|>"),
    "smollm3": Family(IM),
    "vicuna": Family(("</s>",), results=0),
    "vision": Family(IM),
    "yi": Family(IM),
    "zephyr": Family(("</s>",), results=0),
}


def tokenizer_of(name: str, template: str = "") -> Tokenizer:
    family = FAMILIES[name]
    source = template or (FOLDER / f"{name}.jinja").read_text()
    # The last listed stop token is the end of a text, where a family has one.
    return Tokenizer(
        source,
        bos=family.bos,
        eos=family.stops[-1] if name == "phi3" else family.stops[0],
        plain_roles=name in WORDS_ONLY,
    )


def chat_for(
    name: str, *, tools: Any = (), template: str = "", tokenizer: Tokenizer | None = None, **more: Any
) -> Chat:
    tokenizer = tokenizer or tokenizer_of(name, template)
    stops = [tokenizer.id_of(stop) for stop in FAMILIES[name].stops]
    return chat_of(tokenizer, Rendering(now=NOW, tools=tools, template=more), stops)
