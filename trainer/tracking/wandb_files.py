"""What has W&B besides numbers? The run's files, what it began with, and the page that W&B shows first."""

import re
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from trainer.tracking.backend import About

SMALL = ("config.json", "summary.json", "alerts.jsonl", "curves.png", "code.diff", "model/README.md")
VIEW = "unison overview 1"
"""Its name; the number grows with its panels, and a view that exists is left alone."""
SECTIONS = {
    "Learning": "reward/mean actor/entropy response_length/mean response_length/truncated_frac",
    "Agreement": "rollout_corr/logprob_abs_diff_mean rollout_corr/k3_kl rollout_corr/ess actor/clip_frac",
    "Time": "timing_s/step timing_s/wait_for_samples timing_s/learn perf/trainer_idle_frac",
    "Queues": "queue/sampling queue/scoring queue/ready staleness/max",
}


def link(run: Any, about: About) -> None:
    """Record the model and the data that the run began with, where it is online: W&B then shows its descent."""
    import wandb

    for kind, what in about.inputs.items() if about.config.artifacts != "none" and not run.offline else ():
        run.use_artifact(wandb.Artifact(_name(what), type=kind, metadata={kind: what}))


def send(run: Any, about: About) -> None:
    """Send the files that the user asked for."""
    import wandb

    wanted, folder = about.config.artifacts, about.folder
    if wanted != "none":
        files = wandb.Artifact(f"run-{about.id}", type="run")
        for path in (folder / name for name in SMALL if (folder / name).is_file()):
            files.add_file(str(path), name=path.name)
        run.log_artifact(files)
    if wanted == "model" and (folder / "model").is_dir():
        model = wandb.Artifact(_name(f"{about.name}-{about.id}"), type="model")
        model.add_dir(str(folder / "model"))
        run.log_artifact(model)


def make_view(run: Any, about: About) -> None:
    """Save the view in the project, once, if the run is online and the package for it is there. What fails here costs
    the view alone."""
    if run.offline or find_spec("wandb_workspaces") is None:
        return
    made = about.folder.resolve().parent / f".{_name(about.config.project)}-{_name(VIEW)}"
    with suppress(Exception):  # a preview of W&B's, which may change: a run without a view is whole
        made.touch(exist_ok=False)
        import wandb_workspaces.reports.v2 as panels  # pyright: ignore[reportMissingImports]
        import wandb_workspaces.workspaces as ws  # pyright: ignore[reportMissingImports]

        plots = {title: [panels.LinePlot(x="step", y=[n]) for n in names.split()] for title, names in SECTIONS.items()}
        sections = [ws.Section(name=title, panels=each, is_open=True) for title, each in plots.items()]
        ws.Workspace(name=VIEW, entity=run.entity, project=run.project, sections=sections).save()


def _name(text: str) -> str:
    return re.sub(r"[^\w\-.]", "-", text)[-128:]
