"""What do the record of a run and its page cost? Measured in real Chromium, and in CPU seconds.

    python scripts/docs/watching.py page                  # a group of 8 x 4,096 tokens, from a server and from a file
    python scripts/docs/watching.py million               # 1,000,000 sequences of 350 tokens: 2 GB below --folder
    python scripts/docs/watching.py record --kept pairs.jsonl  # steps of the quickstart's shape, with and without it

`page` and `million` start `unison view` as its user does. A time ends with the frame that shows the answer, as the
page's own clock has it. `record` runs everything in one process with one thread and counts CPU seconds, so what else
runs on the machine has little influence; pairs alternate. 60 pairs take ten minutes: with --kept they can be continued.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
for place in (ROOT, ROOT / "scripts" / "docs", ROOT / "tests" / "support"):
    sys.path.insert(0, str(place))


def main() -> None:
    """Measure one part, print its figures, and end with status 1 where a bound is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("page", "million", "record"))
    parser.add_argument(
        "--folder", type=Path, help="where the runs of `page` and `million` are written (default: /tmp)"
    )
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=350)
    parser.add_argument(
        "--pairs", type=int, default=60, help="steps of a learner with and without; 0: the record alone"
    )
    parser.add_argument(
        "--kept", type=Path, help="file of the pairs that are measured already: `record` adds the others"
    )
    asked = parser.parse_args()
    # Imported late: --help needs none of them.
    from costs.million import million
    from costs.page import page
    from costs.record import record

    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        if asked.part == "page":
            found = page(Path(folder))
        elif asked.part == "million":
            found = million(Path(folder), asked.sequences, asked.tokens)
        else:
            found = record(asked.pairs, asked.kept or Path(folder) / "pairs.jsonl")
    passed = {name: min(values) <= most for name, (values, most) in found.items() if most is not None}
    for name, (values, most) in found.items():
        print(
            json.dumps({"what": name, "value": [round(x, 4) for x in values], "bound": most, "held": passed.get(name)})
        )
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
