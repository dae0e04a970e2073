"""`unison view`: a run in the browser, from its curves down to each token and why it did not learn."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from trainer.record import timeline
from trainer.runs.files import write_json
from trainer.tracking.terminal import console
from trainer.view.answers import Answers
from trainer.view.server import export, serve


def view(arguments: Sequence[str]) -> int:
    """Show a run, or two side by side."""
    parser = argparse.ArgumentParser(
        prog="unison view",
        description="Show a run in the browser: curves, groups, episodes, every token with the reason why it did not "
        "learn, times, and the doctor's report. The run may be going on. Ctrl-C ends it.",
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", help="the run's folder (default: the newest in runs/)")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs' folders, to see where they differ")
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="write one file instead: .html is the page with its data, which may be sent to "
        "others; .json is the timeline for https://ui.perfetto.dev. It holds prompts and replies",
    )
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    asked = parser.parse_args(arguments)
    if asked.compare and asked.run:
        raise ValueError("--compare names both runs: leave RUN out")
    first, second = asked.compare or (asked.run or newest(Path("runs")), None)
    answers = Answers(Path(first), Path(second) if second else None)
    if asked.export is None:
        serve(answers, asked.port, lambda url: console.print(f"open {url} (Ctrl-C ends it)", highlight=False))
        return 0
    file = Path(asked.export)
    if file.suffix == ".json":
        write_json(file, timeline.trace(timeline.read(Path(first))))
    elif file.suffix == ".html":
        file.write_text(export(answers), encoding="utf-8")
    else:
        raise ValueError(f"--export {file}: the file's name must end in .html (the page) or .json (the timeline)")
    console.print(f"wrote {escape(str(file))} ({file.stat().st_size / 2**20:.1f} MiB)", highlight=False)
    return 0


def newest(folder: Path) -> Path:
    """The run that wrote its metrics last. Raises FileNotFoundError where there is none."""
    found = sorted(folder.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"there is no run in {folder}/: give a run's folder, as in unison view runs/quickstart")
    return found[-1].parent
