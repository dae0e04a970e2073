"""Which settings exist? Writes docs/reference/configuration.md from fields and docstrings.

python scripts/docs/config_reference.py             # write the page; --check: exit with 1 if it is out of date
"""

import ast
import re
import sys
from dataclasses import dataclass

from written import ROOT, only_check, write_or_check

SOURCES = ("rl/environments/types.py", "rl/settings/trainer.py", "rl/settings/tracking.py", "rl/config.py")
JUDGES = {"OpenAIJudge": "rl/judges/chat.py", "RewardModel": "rl/judges/reward_model.py", "Calls": "rl/judges/desk.py"}
"""Classes that are values of `judges` and of `calls`, and where they are."""
PAGE = ROOT / "docs" / "reference" / "configuration.md"
HEAD = """# Configuration

<!-- Written by scripts/docs/config_reference.py from the docstrings of the code. Change them, not this page. -->

A run is one `Config` value. This page lists every field with its type, its default and its meaning.

A field that is a number, a word or a switch is also a flag of the recipe: `trainer.micro_batch_tokens` is
`--trainer.micro-batch-tokens`, and a switch has a second form, `--trainer.no-gradient-checkpointing`. A field that is
code (data, reward, correction, filters) has no flag: set it in the recipe. The fields of the objective are flags too,
such as `--objective.clip-high`; the [objectives](../objectives.md) page explains them.

The defaults below are those of the class. A recipe sets its own, and `python recipes/NAME.py --help` shows them.
"""
CODE = ("Callable", "Reward", "GroupFilter", "Correction", "Objective", "Judge")
"""Types that a command line cannot hold."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a config class."""

    name: str
    type: str
    default: str
    meaning: str


def config_classes(source: str) -> dict[str, tuple[str, list[Setting]]]:
    """Docstring and fields of every dataclass in a module's source, by class name."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            found[node.name] = (ast.get_docstring(node) or "", list(_settings(node)))
    return found


def _settings(node: ast.ClassDef) -> list[Setting]:
    settings = []
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            settings.append(
                Setting(
                    name=statement.target.id,
                    type=ast.unparse(statement.annotation),
                    default=_default(statement.value),
                    meaning=" ".join(str(after.value.value).split()) if documented else "",
                )
            )
    return settings


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        for keyword in value.keywords:
            if keyword.arg == "default_factory":
                made = ast.unparse(keyword.value)
                return {"dict": "{}", "list": "[]"}.get(made, f"{made}()")
    return ast.unparse(value)


def source() -> str:
    """The modules whose classes are settings, as one."""
    return "\n".join((ROOT / name).read_text() for name in (*SOURCES, *JUDGES.values()))


def page(source: str) -> str:
    """The whole page as Markdown."""
    classes = config_classes(source)
    prefixes = {"Config": ""}
    for name in classes:
        _find_prefixes(name, classes, prefixes)
    parts = [HEAD]
    for name, prefix in (prefixes | {each: "" for each in JUDGES if each in classes}).items():
        doc, settings = classes[name]
        title = f"`{name}`" if not prefix else f"`{name}`: flags `--{prefix.replace('_', '-')}*`"
        parts.append(f"\n## {title}\n\n{doc}\n\n| field | type | default | meaning |\n|---|---|---|---|\n")
        parts += [_row(setting, prefix) for setting in settings]
    return "".join(parts)


def _find_prefixes(name: str, classes: dict[str, tuple[str, list[Setting]]], prefixes: dict[str, str]) -> None:
    if name not in prefixes:
        return
    for setting in classes[name][1]:
        if setting.type in classes:
            prefixes.setdefault(setting.type, f"{prefixes[name]}{setting.name}.")
            _find_prefixes(setting.type, classes, prefixes)


def _row(setting: Setting, prefix: str) -> str:
    kind = re.sub(r"^Literal\[(.*)\]$", r"\1", setting.type)
    meaning = setting.meaning or ("Set in the recipe." if any(word in kind for word in CODE) else "")
    cells = (f"`{prefix}{setting.name}`", f"`{kind}`", f"`{setting.default}`", meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    check = only_check(__doc__)
    sys.exit(write_or_check(PAGE, page(source()), check=check))
