"""What does a run with a problem look like? Makes such a run, and the pictures of docs/tutorials/reading-a-run.md.

python scripts/docs/reading_a_run.py run                   # the quickstart with an engine that uses stale KV
python scripts/docs/reading_a_run.py pictures FOLDER       # docs/images/view-*.png; needs Chromium
"""

import argparse
import sys
import threading
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in (ROOT, ROOT / "recipes", ROOT / "tests" / "support"):
    sys.path.insert(0, str(folder))
PICTURES = ROOT / "docs" / "images"


def main() -> None:
    """Make the run, or its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="run|pictures")
    parts.add_parser("run", help="make the run; other flags are a run's", add_help=False).set_defaults(made=run)
    of = parts.add_parser("pictures", help="make the pictures of a run")
    of.add_argument("folder", type=Path, help="folder of the run")
    of.add_argument("step", nargs="?", default="", help="default: that of the row with the largest gap")
    of.set_defaults(made=None)
    asked, flags = parser.parse_known_args()
    if asked.made:
        return run(*flags)
    return pictures(asked.folder, asked.step)


def run(*flags: str) -> None:
    """The quickstart on eight prompts, one step behind, with an engine whose prefix cache ignores updates, but
    not the first two, which a run verifies."""
    from quickstart import config, products

    from rl.objectives import GRPO
    from rl.types import Data
    from trainer.launch import launch

    def eight() -> Data:
        return Data(train=products().train[:8])

    faulty = replace(config.rollout, engine_class="stale_engine:StalePrefixes", max_tokens=24)
    objective = GRPO()
    planted = replace(config, name="reading", data=eight, rollout=faulty, objective=objective, max_staleness=1)
    launch(replace(planted, doctor="off", steps=5, eval_every=0, save_every=0, save_final=False), args=[*flags])


def pictures(folder: Path, at: str) -> None:
    """One picture of each page, for the row of a step with the largest gap."""
    from browser import Browser
    from trainer.view.answers import Answers
    from trainer.view.server import server

    answers = Answers(folder)
    made, url = server(answers)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    asked = {"sort": "gap_max", "falling": "1", "limit": "1"} | ({"step": at} if at else {})
    rows = answers.answer("rows", asked)["rows"]
    step, group, episode, row = (rows[0][name] for name in ("step", "group", "episode", "row"))
    PICTURES.mkdir(exist_ok=True)
    browser = Browser(1360, 860)
    try:
        browser.open(url)
        views = {"run": "#/run", "step": f"#/step/{step}", "group": f"#/group/{step}/{group}", "time": "#/time"}
        for name, view in views.items():
            browser.go(view)
            browser.picture(PICTURES / f"view-{name}.png")
        browser.size(1360, 760)
        browser.go(f"#/row/{step}/{group}/{episode}/{row}/{rows[0]['prompt_tokens']}")
        browser.js("scrollTo(0, 0)")
        browser.picture(PICTURES / "view-row.png")
        browser.size(1360, 760, dark=True)
        browser.picture(PICTURES / "view-dark.png")
    finally:
        browser.close()
        made.shutdown()


if __name__ == "__main__":
    main()
