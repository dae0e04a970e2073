"""The run in SwanLab: online if you are logged in, else in the run's folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.tracking.backend import About, Rows, Values, scalars, texts

ENDS = {"finished": "success", "interrupted": "aborted"}


class Run:
    """`Backend` of one SwanLab run. SwanLab has no histograms."""

    def begin(self, run: About) -> str | None:
        """Begin the run, or continue it by its id. It never asks for a key."""
        import swanlab  # pyright: ignore[reportMissingImports]

        self.swanlab, config, mode = swanlab, run.config, swanlab_mode()
        more: dict[str, Any] = {"mode": mode, "project": config.project, "workspace": config.entity or None}
        more |= {"name": run.name, "description": config.notes or None, "group": config.group or None}
        if mode == "online":
            more |= {"id": f"{run.id:0>21}", "resume": "allow"}
        folder = str(run.folder / "swanlog")
        self.run = swanlab.init(config=texts(run.settings), log_dir=folder, tags=list(config.tags) or None, **more)
        return None if mode == "online" else f"swanlab is not online: send it later with `swanlab sync {folder}/run-*`"

    def log(self, step: int, values: Values) -> None:
        """Record one step."""
        self.run.log(scalars(values), step=step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Show a table as text."""
        self.run.log({name: self.swanlab.Text(json.dumps(list(rows), default=str, indent=1))}, step=step)

    def alert(self, step: int, title: str, text: str) -> None:
        """Show an alert as text."""
        self.run.log({"alerts": self.swanlab.Text(f"{title}. {text}")}, step=step)

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Finish the run; SwanLab keeps no summary."""
        error = None if status in ENDS else str(summary.get("error", status))
        self.run.finish(ENDS.get(status, "crashed"), error=error)


def swanlab_mode() -> str:
    """SwanLab's own word: SWANLAB_MODE, else online where there is a key."""
    key = os.environ.get("SWANLAB_API_KEY") or (Path.home() / ".swanlab" / ".netrc").exists()
    return os.environ.get("SWANLAB_MODE") or ("online" if key else "offline")
