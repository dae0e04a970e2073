"""The run in Weights & Biases."""

import sys
from collections.abc import Mapping
from typing import Any

from trainer.tracking.backend import About, Rows, Values
from trainer.tracking.wandb_files import link, make_view, send
from trainer.tracking.wandb_mode import INSIST_S, REACH_S, insists, reached

SUMMARIES = {"*": None, "reward/*": "max,last", "eval/*": "max,last", "rollout_corr/*": "max,last"}
"""What W&B keeps of a metric besides its last value."""


class Run:
    """`Backend` of one W&B run."""

    def begin(self, run: About) -> str:
        """Begin the run, or continue it; offline where the server does not answer. Raises ValueError where W&B must be
        online, and is not."""
        import wandb

        if "wandb.sdk.launch" not in sys.modules:
            # It looks for inputs that W&B Launch has prepared. Nobody has: that package is not loaded, and takes 1 s.
            wandb.Run._detect_and_apply_job_inputs = lambda self: None  # pyright: ignore[reportPrivateUsage]
        config, self.about, self.wandb = run.config, run, wandb
        more: dict[str, Any] = {name: getattr(config, name) or None for name in ("entity", "group", "tags", "notes")}
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INSIST_S if insists(config) else REACH_S,
            finish_timeout=config.end_s,
            finish_timeout_raises=True,
        )
        more |= {"name": run.name, "id": run.id, "resume": "allow" if run.resumed else None, "settings": settings}
        more |= {"project": config.project, "dir": str(run.folder), "config": dict(run.settings)}
        self.run, note = reached(run, lambda mode: wandb.init(mode=mode, **more))
        # W&B's own step drops what comes under an earlier one; with this, a resumed run may write its steps again.
        self.run.define_metric("step", hidden=True)
        for names, summary in SUMMARIES.items():
            self.run.define_metric(names, step_metric="step", summary=summary)
        make_view(self.run, run)
        link(self.run, run)
        return note

    def log(self, step: int, values: Values) -> None:
        """Record one step, and its histograms."""
        drawn = {n: self.wandb.Histogram(list(v)) for n, v in values.items() if not isinstance(v, int | float)}
        self.run.log({"step": step, **values, **drawn})

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Show a table of texts: W&B refuses a column of mixed types."""
        texts = [[str(value) for value in row.values()] for row in rows]
        self.run.log({"step": step, name: self.wandb.Table(columns=list(rows[0]), data=texts)})

    def alert(self, step: int, title: str, text: str) -> None:
        """Raise a W&B alert, which W&B sends to the user when it is online."""
        self.run.alert(title=title[:63], text=f"Step {step}: {text}", level="WARN")

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        """Finish the run with the summary's numbers and texts, and the files that were asked for."""
        self.run.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
        send(self.run, self.about)
        self.run.finish(exit_code=0 if status == "finished" else 1)
