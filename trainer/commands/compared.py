"""How is a comparison of objectives shown? As tables, JSON and a plot."""

import math
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from rl.contract.what_if import NUMBERS, ObjectiveReport, cosines


def table(verdicts: list[ObjectiveReport], title: str) -> Table:
    """One row per objective."""
    out = Table(title=escape(title), title_justify="left")
    for header in ("objective", "loss", "|gradient|", "clipped low", "clipped high", "ESS", "effective tokens"):
        out.add_column(header, justify="left" if header == "objective" else "right")
    for v in verdicts:
        clips = ("-" if math.isnan(clip) else f"{clip:.3f}" for clip in (v.clip_low, v.clip_high))
        out.add_row(
            escape(v.name), f"{v.loss:+.4g}", f"{v.grad_norm:.3g}", *clips, f"{v.ess:.3f}", f"{v.effective_tokens:.0f}"
        )
    return out


def agreement(verdicts: list[ObjectiveReport]) -> Table:
    """Cosine of each pair's gradients."""
    out = Table("cosine", *(escape(v.name) for v in verdicts), title="do their gradients agree?", title_justify="left")
    for v, row in zip(verdicts, cosines(verdicts).tolist(), strict=True):
        out.add_row(escape(v.name), *(f"{x:.3f}" for x in row))
    return out


def as_dict(verdicts: list[ObjectiveReport]) -> dict[str, object]:
    """Everything but the gradients, as JSON can hold it."""
    rows = {v.name: {n: float(getattr(v, n)) for n in NUMBERS} for v in verdicts}
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
