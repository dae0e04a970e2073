"""The run in MLflow: at MLFLOW_TRACKING_URI, else in a file next to the runs."""

import json
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from trainer.tracking.backend import About, Rows, Values, scalars, texts

MOST, LONGEST = 100, 500
"""Settings in one call, and characters of one setting: limits of older servers."""
ENDS = {"finished": "FINISHED", "interrupted": "KILLED"}


class Run:
    """`Backend` of one MLflow run. MLflow has no histograms."""

    def begin(self, run: About) -> None:
        """Make the experiment and the run, or find the run by its id."""
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        home = run.folder.resolve().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self.client, config = MlflowClient(tracking_uri=uri or f"sqlite:///{home}/mlflow.db"), run.config
        kept = self.client.get_experiment_by_name(config.project)
        files = None if uri else f"file://{home}/mlflow"
        experiment = kept.experiment_id if kept else self.client.create_experiment(config.project, files)
        found = self.client.search_runs([experiment], f"tags.unison_id = '{run.id}'") if run.resumed else []
        labels = {"unison_id": run.id, "group": config.group, "mlflow.note.content": config.notes}
        tags = {name: text for name, text in labels.items() if text} | dict.fromkeys(config.tags, "true")
        made = found[0] if found else self.client.create_run(experiment, tags=tags, run_name=run.name)
        self.id: str = made.info.run_id
        if not found:
            from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

            settings = [Param(_name(n), text[:LONGEST]) for n, text in texts(run.settings).items()]
            for i in range(0, len(settings), MOST):
                self.client.log_batch(self.id, params=settings[i : i + MOST])

    def log(self, step: int, values: Values) -> None:
        """Record one step. MLflow's names have no @ and no brackets."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(1000 * time.time())
        found = {_name(n): v for n, v in scalars(values).items() if not math.isinf(v)}
        self.client.log_batch(self.id, metrics=[Metric(n, v, now, step) for n, v in found.items()])

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Keep a table as a file."""
        self.client.log_text(self.id, json.dumps(list(rows), default=str), f"{name}/step-{step:06d}.json")

    def alert(self, step: int, title: str, text: str) -> None:
        """Keep an alert as a tag."""
        self.client.set_tag(self.id, f"alert.{step}.{_name(title)}"[:250], text[:LONGEST])

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Keep the summary as a file, and end the run."""
        self.client.log_text(self.id, json.dumps(dict(summary), default=str), "summary.json")
        self.client.set_terminated(self.id, ENDS.get(status, "FAILED"))


def _name(name: str) -> str:
    return re.sub(r"[^\w\-./ ]", "_", name.replace("@", "_at_"))
