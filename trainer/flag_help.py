"""What does `--help` of a recipe show? Its flags in groups, each with a sentence and the recipe's own value."""

import inspect
import shutil
import textwrap
import types
import typing
from typing import Any

from rl.config import Config
from rl.typed import hints_of, show
from trainer.flags import OPTIONS, Flag, docs_of, flags_of, is_code

GROUPS = {
    "The run": "name model steps seed device output-dir",
    "Sampling and learning": "prompts-per-step group-size temperature max-staleness late-groups max-filtered "
    "mask-truncated old-logprobs dtype fp32-head share-gpu chat-template-kwargs long-prompts "
    "trust-remote-code",
    "Episodes": "env-workers max-failed",
    "Evaluation": "eval-every eval-samples eval-temperature keep-best",
    "Checks, records and checkpoints": "doctor verify-every record-batches save-every keep-last save-final "
    "changed-at-resume export-dtype",
}
"""The flags of `Config` itself by subject; those of its parts have a group each."""
PARTS = ("limits", "objective", "correction", "rollout", "trainer", "trainer.lora", "deadlines", "tracking")
INDENT = 32


def help_text(config: Config, program: str, width: int | None = None) -> str:
    """The whole text, for a terminal of `width` columns (default: this one's)."""
    width = width or min(120, shutil.get_terminal_size().columns)
    flags = {flag.name: flag for flag in flags_of(config)}
    lines = [f"usage: python {program} [--dry-run] [--resume FOLDER] [--config FILE] [FLAGS]", ""]
    named = {"resume": "resume FOLDER", "config": "config FILE", "help": "help, -h"}
    for name, text in OPTIONS.items():
        lines += row(f"--{named.get(name, name)}", text, width)
    lines += ["", "Code, set in the recipe's file"]
    for name, value in code_of(config).items():
        lines += row(f"{name} = {value}", docs_of(Config)[name], width)
    top = {title: [flags.pop(name) for name in names.split()] for title, names in GROUPS.items()}
    parts = {part: [flags.pop(name) for name in list(flags) if name.rpartition(".")[0] == part] for part in PARTS}
    others = {"Others": list(flags.values())}
    for title, members in (top | {title_of(config, part): found for part, found in parts.items()} | others).items():
        if members:
            lines += ["", *textwrap.wrap(title, width)]
            for flag in members:
                lines += row(f"{names_of(flag)} {metavar(flag.hint)}".rstrip(), sentence(flag), width)
    return "\n".join(lines)


def code_of(config: Config) -> dict[str, str]:
    """Settings that are code, by the name of the function or class and never by an address."""
    hints = hints_of(Config)
    code = {name: short(getattr(config, name)) for name in hints if is_code(hints[name])}
    return code | {name: short(getattr(config, name)) for name in ("objective", "correction")}


def short(value: Any) -> str:
    """One function or object by its name."""
    if isinstance(value, tuple):
        return ", ".join(map(short, value)) or "none"
    if value is None:
        return "none"
    return show(value) if hasattr(value, "__qualname__") else type(value).__name__


def title_of(config: Config, part: str) -> str:
    """A group's title: the part, its class where that is a choice, and the first sentence about it."""
    value: Any = config
    for name in part.split("."):
        value = getattr(value, name)
    doc = " ".join(inspect.cleandoc(type(value).__doc__ or "").split("\n\n")[0].split())
    name = f"{part} {type(value).__name__}" if part in ("objective", "correction") else part
    return f"{name}: {doc}"


def sentence(flag: Flag) -> str:
    """Its help, and the value it has in this recipe unless the help names the default of None."""
    if flag.default is None and "Default:" in flag.help:
        return flag.help
    value = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
    return f"{flag.help} (default: {value})" if value not in ({}, "") else flag.help


def names_of(flag: Flag) -> str:
    """The spellings of a flag."""
    return ", ".join(f"--{spelling}" for spelling in flag.spellings)


def metavar(hint: Any) -> str:
    """What to type after a flag."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return ""
    if origin is typing.Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin in (typing.Union, types.UnionType):
        return "|".join("True|False" if arg is bool else metavar(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return " ".join(map(metavar, args))
    if origin is dict:
        return "KEY VALUE ..."
    return {int: "INT", float: "FLOAT", str: "TEXT"}.get(hint, "VALUE")


def row(name: str, text: str, width: int) -> list[str]:
    """A flag and its text in two columns; a long flag has a line of its own."""
    body = textwrap.wrap(text, max(30, width - INDENT)) or [""]
    if len(name) + 4 > INDENT:
        return [f"  {name}", *(" " * INDENT + line for line in body)]
    return [f"  {name}".ljust(INDENT) + body[0], *(" " * INDENT + line for line in body[1:])]
