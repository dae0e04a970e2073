"""The run in Trackio: `trackio show`."""

from collections.abc import Mapping
from typing import Any

from trainer.tracking.backend import About, Rows, Values, scalars


class Run:
    """`Backend` of one Trackio run, in Trackio's own folder, or at TRACKIO_SPACE_ID."""

    def begin(self, run: About) -> None:
        """Begin the run, or continue the one of the same id, which is part of its name."""
        import trackio  # pyright: ignore[reportMissingImports]

        config = run.config
        self.trackio, name = trackio, f"{run.name}-{run.id}"
        labels = {"tags": list(config.tags), "notes": config.notes}
        settings = {**run.settings, **{k: v for k, v in labels.items() if v}}
        self.run = trackio.init(
            config.project, name, group=config.group or None, config=settings, resume="allow", embed=False
        )

    def log(self, step: int, values: Values) -> None:
        """Record one step, and its histograms."""
        drawn = {n: self.trackio.Histogram(list(v)) for n, v in values.items() if not isinstance(v, int | float)}
        self.run.log(scalars(values) | drawn, step=step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Show a table of texts."""
        from pandas import DataFrame

        texts = [{key: str(value) for key, value in row.items()} for row in rows]
        self.run.log({name: self.trackio.Table(dataframe=DataFrame(texts))}, step=step)

    def alert(self, step: int, title: str, text: str) -> None:
        """Raise an alert, which Trackio also sends to its webhook where there is one."""
        self.run.alert(title=title, text=f"Step {step}: {text}")

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Record how the run ended, with the numbers of its summary, and finish it."""
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in scalars(summary).items())
        self.run.alert(title=status, text=numbers, level=self.trackio.AlertLevel.INFO)
        self.run.finish()
