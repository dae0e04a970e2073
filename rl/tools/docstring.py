"""What does a method's docstring say about it, and about each of its arguments?"""

import re

SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields?|Examples?|Notes?)\s*:\s*$")
ARGUMENT = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
ABOUT_ARGUMENTS = {"Args", "Arguments", "Parameters"}


def described(docstring: str) -> tuple[str, dict[str, str]]:
    """The text in front of the sections, and the text of each argument; Google's style, without its indentation."""
    summary: list[str] = []
    about: dict[str, list[str]] = {}
    section, indent, name = "", None, ""
    for line in docstring.splitlines():
        stripped = line.strip()
        if found := SECTION.match(line):
            section, indent, name = found[1], None, ""
        elif not section:
            summary.append(stripped)
        elif section in ABOUT_ARGUMENTS and stripped:
            depth = len(line) - len(line.lstrip())
            indent = depth if indent is None else indent
            argument = ARGUMENT.match(stripped) if depth <= indent else None
            if argument:
                name = argument[1]
                about[name] = [argument[2]] if argument[2] else []
            elif name:
                about[name].append(stripped)
    return " ".join(" ".join(summary).split()), {name: " ".join(lines) for name, lines in about.items()}
