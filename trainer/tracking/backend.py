"""What must a tracker be able to do? Five calls."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from rl.settings.tracking import TRACKERS, TrackingConfig
from trainer.runs.resume import flat

Values = Mapping[str, float | Sequence[float]]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class About:
    """The run that a tracker is to record."""

    name: str
    id: str
    """Eight hexadecimal digits, the same when the run is resumed."""
    folder: Path
    config: TrackingConfig
    settings: Mapping[str, Any]
    """The resolved config of the run."""
    step: int = 0
    """The last step that is recorded already."""
    resumed: bool = False
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the run began with, by kind: model and data."""


class Backend(Protocol):
    """A place that a run's numbers go to. All calls come from one thread, `begin` first; any error ends it alone."""

    def begin(self, run: About) -> str | None:
        """Begin the record, or continue it. Returns what the user must know, as "title: text"."""
        ...

    def log(self, step: int, values: Values) -> None:
        """Record one step. A number is a metric, and may be NaN; a sequence has the values of a histogram."""
        ...

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Show rows, which have the same keys, as a table."""
        ...

    def alert(self, step: int, title: str, text: str) -> None:
        """Show the user what needs attention."""
        ...

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Finish the record. `status` is finished, failed or interrupted; the files in the folder are complete."""
        ...


def maker(name: str) -> Callable[[], Backend]:
    """What imports and makes the backend of this name. Raises ValueError where its package is not installed."""
    module, _, cls = name.partition(":")
    if name in TRACKERS:
        module, cls = f"trainer.tracking.{name}_run", "Run"
    needs = name if name in TRACKERS else module
    try:
        found = find_spec(needs)
    except (ImportError, ValueError):
        found = None
    if found is None:
        remedy = f"pip install {needs}" if name in TRACKERS else "put its file next to the recipe"
        raise ValueError(f"tracking.to names {name}, and there is no module {needs}: {remedy}, or leave it out")
    return lambda: cast(Backend, getattr(importlib.import_module(module), cls)())


def scalars(values: Values) -> dict[str, float]:
    """The metrics among the values."""
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text by their dotted names."""
    return {name: str(value) for name, value in flat(dict(settings)).items()}
