"""What can be typed? Writes docs/reference/command-line.md from the `--help` of `unison` and of its commands.

python scripts/docs/command_line.py                 # write the page; --check: exit with 1 if it is out of date
"""

import io
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout

from written import ROOT, only_check, write_or_check

PAGE = ROOT / "docs" / "reference" / "command-line.md"
HEAD = """# Command line

<!-- Written by scripts/docs/command_line.py from the --help texts. Change the texts in trainer/, not this page. -->

There are two ways to start something:

- `python recipes/NAME.py --flags` starts a run. Each recipe has the same flags; [configuration](configuration.md) lists
  them. Four flags are not settings:

| flag | effect |
|---|---|
| `--help` | shows every setting with the recipe's own default, and starts nothing |
| `--dry-run` | shows the settings, the placement and the memory that the run needs, and starts nothing |
| `--resume FOLDER` | continues the run in `FOLDER` from its last checkpoint, with its flags; `auto`: its newest |
| `--config FILE` | takes the settings from the `config.json` of a run, or from YAML; flags override it |

- `unison COMMAND` does everything that is not a run. The program is `.venv/bin/unison`.

Environment variables:

| variable | effect |
|---|---|
| `UNISON_TRACEBACK=1` | shows the Python traceback of an error |
| `UNISON_IGNORE_MEMORY=1` | starts a run that the memory estimate refuses |
| `RAY_ADDRESS=auto` | uses a Ray cluster that is already running |
"""


def help_of(*words: str) -> tuple[int, str]:
    """Exit status and text of `unison WORDS --help`."""
    from trainer.cli import main

    out, arguments, status = io.StringIO(), sys.argv, 0
    sys.argv = ["unison", *words, "--help"]
    try:
        with redirect_stdout(out), redirect_stderr(out):
            main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = arguments
    return status, "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def page() -> str:
    """The whole page as Markdown: the overview, then each command that has a help text of its own."""
    _, overview = help_of()
    parts = [HEAD, f"\n## unison\n\n```text\n{overview}\n```\n"]
    words = {path.stem.replace("_", "-") for path in (ROOT / "trainer" / "commands").glob("*.py")}
    for word in sorted(words & set(re.findall(r"[a-z]+(?:-[a-z]+)*", overview))):
        status, text = help_of(word)
        if status == 0 and text != overview:
            parts.append(f"\n## unison {word}\n\n```text\n{text}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    check = only_check(__doc__)
    sys.exit(write_or_check(PAGE, page(), check=check))
