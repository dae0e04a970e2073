"""Which model of a run is the best so far, and which may go? In `best` there is a folder for each step that is kept."""

import math
from collections.abc import Container, Sequence
from pathlib import Path

from trainer.runs.checkpoint import discard, finished

BEST = "best"
Rows = Sequence[dict[str, float]]


def folder_of(run: Path, step: int) -> Path:
    """Where the model of a step is kept."""
    return run / BEST / f"step-{step:06d}"


def kept(run: Path) -> dict[int, Path]:
    """The models that are kept, by step."""
    return {int(path.name.removeprefix("step-")): path for path in finished(run / BEST)}


def best(history: Rows, metric: str, steps: Container[int]) -> tuple[int, float] | None:
    """Step and value of the highest evaluation, the earlier of equal ones; None without any.

    It is one of `steps`, whose models are kept, or of the start model (step 0). By the history alone, so a resumed run
    finds what it knew at its checkpoint.
    """
    known = [(row[metric], -int(row["step"])) for row in history if math.isfinite(row.get(metric, math.nan))]
    value, step = max((each for each in known if not each[1] or -each[1] in steps), default=(math.nan, 1))
    return None if step > 0 else (-step, value)


def prune(run: Path, history: Rows, metric: str) -> None:
    """Delete every model that is neither the best, nor was at a checkpoint to which the run may go back."""
    models = kept(run)
    points = [int(path.name.removeprefix("step-")) for path in finished(run / "checkpoints")]
    wanted = [best([row for row in history if row["step"] <= p], metric, models) for p in [*points, math.inf]]
    for step in models.keys() - {found[0] for found in wanted if found}:
        discard(models[step])


def rewind(run: Path, step: int) -> None:
    """Delete the models of later steps, which a resumed run makes again."""
    for later, path in kept(run).items():
        if later > step:
            discard(path)
