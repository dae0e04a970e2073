"""`unison what-if`: objectives side by side on one recorded step, as a table, a plot and JSON."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rl.contract.what_if import ObjectiveReport, cosines, evaluate_objective
from rl.objectives import FAMILY, Objective
from trainer.runs.files import write_json
from trainer.runs.records import load
from trainer.tracking.terminal import console

DEFAULT = "grpo,dapo,gspo,cispo,sapo,gmpo,m2po"


def what_if(arguments: Sequence[str]) -> int:
    """Compare objectives on a recorded step."""
    parser = argparse.ArgumentParser(
        prog="unison what-if",
        description="Compare objectives on one recorded step (`--record-batches 1` records all): loss, gradient, "
        "clipping, and the cosine of their gradients.",
        allow_abbrev=False,
    )
    parser.add_argument("record", help="a file of the run's folder, such as runs/quickstart/batches/step-3.safetensors")
    parser.add_argument(
        "--objectives", default=DEFAULT, help="names, or FILE.py:CLASS, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--out", help="folder for what-if-NAME.json and .png (default: the record's folder)")
    asked = parser.parse_args(arguments)
    compare(Path(asked.record), asked.objectives.split(","), Path(asked.out or Path(asked.record).parent))
    return 0


def compare(path: Path, objectives: Sequence[str], folder: Path) -> None:
    """Evaluate a record by every objective. Raises ValueError for an objective that does not exist."""
    record = load(path)
    named = {n.rpartition(":")[2]: by_name(n) for n in objectives}
    verdicts = [evaluate_objective(n, o, record.batch, record.policy, record.horizon) for n, o in named.items()]
    folder.mkdir(parents=True, exist_ok=True)
    console.print(table(verdicts, f"{path.name}, recorded with {record.objective}"))
    console.print(agreement(verdicts))
    stem = folder / f"what-if-{path.stem}"
    write_json(stem.with_suffix(".json"), as_dict(verdicts))
    plot(verdicts, stem.with_suffix(".png"))
    console.print(f"see {stem.with_suffix('.png')}", highlight=False)


def by_name(name: str) -> Objective:
    """One of the family by its name in any case, or one of the user's own from a file."""
    if ":" in name:
        from trainer.commands.load import load_objective

        return load_objective(name)
    known = {each.__name__.lower(): each for each in FAMILY}
    if name.lower() not in known:
        raise ValueError(f"there is no objective {name!r}; there are {', '.join(sorted(known))}, and FILE.py:CLASS")
    return known[name.lower()]()


def table(verdicts: list[ObjectiveReport], title: str) -> Table:
    """One row per objective."""
    out = Table(title=title, title_justify="left")
    for header in ("objective", "loss", "|gradient|", "clipped low", "clipped high", "ESS", "effective tokens"):
        out.add_column(header, justify="left" if header == "objective" else "right")
    for v in verdicts:
        clips = ("-" if math.isnan(clip) else f"{clip:.3f}" for clip in (v.clip_low, v.clip_high))
        out.add_row(v.name, f"{v.loss:+.4g}", f"{v.grad_norm:.3g}", *clips, f"{v.ess:.3f}", f"{v.effective_tokens:.0f}")
    return out


def agreement(verdicts: list[ObjectiveReport]) -> Table:
    """Cosine of each pair's gradients."""
    out = Table("cosine", *(v.name for v in verdicts), title="do their gradients agree?", title_justify="left")
    for v, row in zip(verdicts, cosines(verdicts).tolist(), strict=True):
        out.add_row(v.name, *(f"{x:.3f}" for x in row))
    return out


def as_dict(verdicts: list[ObjectiveReport]) -> dict[str, object]:
    """Everything but the gradients, as JSON can hold it."""
    names = ("loss", "grad_norm", "clip_low", "clip_high", "ess", "effective_tokens")
    rows = {v.name: {n: float(getattr(v, n)) for n in names} for v in verdicts}
    return {"objectives": rows, "cosine": cosines(verdicts).tolist()}


def plot(verdicts: list[ObjectiveReport], path: Path) -> None:
    """Two panels: how much the gradients agree, and how each spreads over the tokens, largest first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    names, similar = [v.name for v in verdicts], cosines(verdicts)
    left.imshow(similar, vmin=-1, vmax=1, cmap="RdBu")
    left.set_xticks(range(len(names)), names, rotation=45, ha="right")
    left.set_yticks(range(len(names)), names)
    for i, row in enumerate(similar.tolist()):
        for j, x in enumerate(row):
            left.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=8)
    left.set_title("cosine of the gradients")
    for v in verdicts:
        size = v.gradient.abs().flatten().sort(descending=True).values
        right.plot((size.cumsum(0) / size.sum().clamp(min=1e-30)).tolist(), label=v.name)
    right.set_xlabel("tokens, largest gradient first")
    right.set_ylabel("share of the gradient")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
