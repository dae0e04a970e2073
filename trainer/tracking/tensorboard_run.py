"""The run in TensorBoard: `tensorboard --logdir runs`."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.tracking.backend import About, Rows, Values


class Run:
    """`Backend` that writes event files into the run's folder."""

    def begin(self, run: About) -> None:
        """Open a file of events; steps after the last recorded one, of a run before a kill, are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge = run.step + 1 if run.resumed else None
        self.writer, self.step = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge), run.step
        self._text("settings", f"```json\n{json.dumps(dict(run.settings), indent=2)}\n```", run.step)

    def log(self, step: int, values: Values) -> None:
        """Record one step, in full precision, and its histograms."""
        self.step = step
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step, new_style=True, double_precision=True)
            else:
                self.writer.add_histogram(name, np.asarray(value), step)
        self.writer.flush()

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Show a table as text."""
        head = list(rows[0])
        lines = [head, ["---"] * len(head), *([_cell(row[key]) for key in head] for row in rows)]
        self._text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def alert(self, step: int, title: str, text: str) -> None:
        """Show an alert as text."""
        self._text("alerts", f"**{title}** {text}", step)

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Write the summary, and close the file."""
        self._text("summary", f"```json\n{json.dumps({**summary, 'status': status}, default=str)}\n```", self.step)
        self.writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, text, step)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
