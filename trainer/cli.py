"""The `unison` command: what is not a run. Each word is a thin door to a module that can be imported."""

import sys
from collections.abc import Callable

from trainer.commands.check_objective import check_objective
from trainer.commands.doctor import doctor
from trainer.commands.what_if import what_if
from trainer.launch import readable_errors, relax_gc

USAGE = """unison doctor RECIPE.py [--short] [--FLAGS of the recipe]

  Check that engines and trainer mean the same by a log-probability, and name the cause when they do not: the recipe's
  own engines, learner and prompts, then the ladder of precisions. --short leaves the ladder out. Writes doctor.json and
  doctor.html; the exit status is 1 when a fault was found.

unison check-objective FILE.py:CLASS | MODULE:CLASS

  Check that an objective of your own keeps the contract: gradients, masks, micro-batches, ranks, groups, extremes.
  Needs no model. The exit status is 1 when it does not, with what is wrong and how to mend it.

unison what-if BATCH.safetensors [--objectives gspo,grpo,cispo] [--out FOLDER]

  Compare objectives on one recorded step (`--record-batches 1`): loss, gradient, clipping, and how much their gradients
  agree."""


def main() -> None:
    """Entry point of the console script."""
    relax_gc()
    word, *rest = sys.argv[1:] or [""]
    words: dict[str, Callable[[str, list[str]], None]] = {
        "doctor": doctor,
        "check-objective": check_objective,
        "what-if": what_if,
    }
    if word not in words or not rest or rest[0].startswith("-"):
        wants_help = bool({"-h", "--help"} & {word, *rest})
        if word not in words and word and not wants_help:
            print(f"unknown command {word!r}\n", file=sys.stderr)
        print(USAGE, file=sys.stdout if wants_help else sys.stderr)
        sys.exit(0 if wants_help else 2)
    with readable_errors():
        words[word](rest[0], rest[1:])
