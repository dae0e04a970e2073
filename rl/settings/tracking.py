"""Where do a run's numbers go? Its part of the config."""

from dataclasses import dataclass
from typing import Literal

from rl.typed import Checked

TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio", "swanlab")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Checked):
    """Where the metrics are written."""

    to: tuple[str, ...] = ("wandb",)
    """Trackers besides the files in the run's folder: wandb, tensorboard, mlflow, trackio, swanlab, or a class of yours
    as "module:Class". A tracker is imported only when it is named here, and none can stop or slow a run."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases. auto: online if you are logged in, else offline. It never asks for a key."""
    project: str = "unison-rl"
    """Project in the trackers."""
    entity: str = ""
    """Team or user in W&B, or workspace in SwanLab. Empty: your default one."""
    group: str = ""
    """Group of runs in the trackers, such as the name of an experiment."""
    tags: tuple[str, ...] = ()
    """Tags of the run in the trackers."""
    notes: str = ""
    """What you want to remember of this run, as text in the trackers."""
    upload_samples: bool = False
    """Send prompts and replies to the trackers too: a table of the shortest, the longest and the worst reply and one
    group of each step, and the doctor's tokens. Off: they stay in the run's folder."""
    artifacts: Literal["none", "small", "model"] = "none"
    """Files that W&B keeps with the run. small: settings, summary, curves, alerts and the changes of the code. model:
    also the exported model. Both record the model and the data that the run began with."""
    end_s: float = 60.0
    """Seconds that a tracker has after the last step to send what is left."""
    samples_per_step: int = 4
    """Decoded trajectories per step in samples.jsonl."""
    metrics_port: int | None = None
    """Port of the driver on which `/metrics` (Prometheus) and `/health` are served. 0: a free one. None: nothing is."""
    metrics_host: str = "127.0.0.1"
    """Address for `metrics_port`. Another one than loopback needs the token of UNISON_METRICS_TOKEN, or one that is
    made and printed."""
    rollouts: Literal["all", "some", "off"] = "all"
    """Episodes whose tokens are kept in the run's folder under rollouts/, for `unison view`. all: every trained,
    filtered and failed one, until the folder is full. some: of each step the one with the largest gap, the longest, and
    one group at random; steps with an alert stay whole."""
    rollouts_gib: float = 5.0
    """GiB that rollouts/ may fill. Above it the oldest steps are thinned as by `some`, and after that they go."""

    def __post_init__(self) -> None:
        for name in self.to:
            module, _, cls = name.partition(":")
            if name not in TRACKERS and not (module and cls.isidentifier()):
                raise ValueError(
                    f"tracking.to={name!r} is no tracker: use {', '.join(TRACKERS)}, or a class of yours as "
                    '"module:Class"'
                )
