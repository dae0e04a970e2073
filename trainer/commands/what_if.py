"""`unison what-if`: objectives side by side on recorded steps, as a table, a plot and JSON."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from rl.contract.what_if import evaluate_objective, over_steps
from rl.objectives import FAMILY, Objective
from trainer.commands.compared import agreement, as_dict, plot, table
from trainer.commands.load import load_objective, split_call
from trainer.runs.files import write_json
from trainer.runs.records import Record, load, spec_of
from trainer.tracking.terminal import console

DEFAULT = "grpo,dapo,gspo,cispo,sapo,gmpo,m2po"


def what_if(arguments: Sequence[str]) -> int:
    """Compare objectives on recorded steps."""
    parser = argparse.ArgumentParser(
        prog="unison what-if",
        description="Compare objectives on recorded steps (`--record-batches 1` records all): loss, gradient, "
        "clipping, and the cosine of their gradients. The run's own objective is always among them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "record",
        help="a file of the run's folder, such as runs/quickstart/batches/step-3.safetensors, or the folder for all",
    )
    parser.add_argument(
        "--objectives",
        default=DEFAULT,
        help="names, or FILE.py:CLASS, separated by commas, with settings if wanted: 'grpo(clip_high=0.28)' (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--out", help="folder for what-if-NAME.json and .png (default: the record's folder); nothing is overwritten"
    )
    asked = parser.parse_args(arguments)
    paths = records_in(Path(asked.record))
    compare(paths, separate(asked.objectives), Path(asked.out or paths[0].parent))
    return 0


def compare(paths: list[Path], objectives: list[str], folder: Path) -> None:
    """Evaluate records by every objective, the run's own included. Raises ValueError for one that does not exist."""
    records = {path.stem: load(path) for path in paths}
    named = labelled(objectives)
    for record in {record.spec: record for record in records.values()}.values():
        named = with_own(record, named)
    by_step = {
        step: [evaluate_objective(n, o, r.batch, r.policy, r.horizon) for n, o in named.items()]
        for step, r in records.items()
    }
    steps = list(by_step)
    if len(steps) == 1:
        name, verdicts = steps[0], by_step[steps[0]]
        found = as_dict(verdicts)
    else:
        name = f"{steps[0]}-to-{steps[-1]}"
        verdicts = [over_steps([*of_one]) for of_one in zip(*by_step.values(), strict=True)]
        found = as_dict(verdicts) | {"steps": {step: as_dict(each) for step, each in by_step.items()}}
    own = ", ".join(sorted({record.objective for record in records.values()}))
    what = paths[0].name if len(paths) == 1 else f"means over {len(paths)} steps, {paths[0].name} to {paths[-1].name}"
    console.print(table(verdicts, f"{what}, recorded with {own}"))
    console.print(agreement(verdicts))
    folder.mkdir(parents=True, exist_ok=True)
    stem = unused(folder / f"what-if-{name}")
    write_json(ending(stem, ".json"), found)
    plot(verdicts, ending(stem, ".png"))
    console.print(f"see {escape(str(ending(stem, '.png')))}", highlight=False)


def records_in(path: Path) -> list[Path]:
    """The record, or all of a folder (a run's, or its batches/) by step. Raises FileNotFoundError."""
    if not path.is_dir():
        return [path]
    folder = path / "batches" if (path / "batches").is_dir() else path
    found = sorted(folder.glob("step-*.safetensors"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.stem)])
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no step-N.safetensors; `--record-batches 1` keeps every step in runs/NAME/batches/"
        )
    return found


def separate(text: str) -> list[str]:
    """Objectives that commas separate; a comma inside of brackets belongs to one."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def labelled(objectives: list[str]) -> dict[str, Objective]:
    """Each objective by a label: its name, and its file too where two have the same name."""
    targets = dict.fromkeys(objectives)
    made = {target: by_name(target) for target in targets}
    # The shortest of these that no other target has: the class, the file's name, the whole path.
    forms = {t: (t[where_of(t) :], Path(t[: where_of(t)]).name + t[where_of(t) :], t) for t in targets}
    labels = {
        t: next(form for i, form in enumerate(mine) if sum(other[i] == form for other in forms.values()) == 1)
        for t, mine in forms.items()
    }
    return {labels[target]: objective for target, objective in made.items()}


def where_of(target: str) -> int:
    """Where the name of the class begins in "file.py:Class(alpha=0.5)"."""
    return split_call(target)[0].rfind(":") + 1


def with_own(record: Record, named: dict[str, Objective]) -> dict[str, Objective]:
    """The objectives with the run's own first, unless it is among them or cannot be made again."""
    try:
        own = load_objective(record.spec)
    except Exception as error:  # the file of a user's objective may have moved or changed in any way
        console.print(
            f"the run's own objective {escape(record.spec)} is left out: {escape(str(error))}", style="yellow"
        )
        return named
    if any(spec_of(each) == spec_of(own) for each in named.values()):
        return named
    return {f"{type(own).__name__} (the run's)": own} | named


def by_name(name: str) -> Objective:
    """One of the family by its name in any case, or one of the user's own from a file."""
    target, settings = split_call(name)
    if ":" in target:
        return load_objective(name)
    known = {each.__name__.lower(): each for each in FAMILY}
    if target.lower() not in known:
        raise ValueError(f"there is no objective {target!r}; there are {', '.join(sorted(known))}, and FILE.py:CLASS")
    return load_objective(known[target.lower()].__name__ + name[len(target) :]) if settings else known[target.lower()]()


def unused(stem: Path) -> Path:
    """The stem, or with a number after it, so that no earlier comparison is overwritten."""
    numbered = [stem, *(stem.with_name(f"{stem.name}-{n}") for n in range(2, 10_000))]
    return next(s for s in numbered if not any(ending(s, end).exists() for end in (".json", ".png")))


def ending(stem: Path, suffix: str) -> Path:
    """The stem with a suffix added; a dot in a name stays."""
    return stem.with_name(stem.name + suffix)
