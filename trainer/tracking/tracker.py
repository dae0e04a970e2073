"""Where do a run's numbers go? Files in its folder, the terminal, and trackers such as Weights & Biases."""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from rl.config import TrackingConfig
from rl.loop.estimates import Problems
from rl.parity.watch import Alert
from rl.types import Trajectory
from trainer.runs.files import Rows
from trainer.runs.problems import rows_of
from trainer.tracking.backend import About, Backend, maker
from trainer.tracking.guard import Call, Guard
from trainer.tracking.samples import histograms, parts, worth_a_look
from trainer.tracking.terminal import alert_line
from trainer.tracking.wandb_mode import INSIST_S, insists, wandb_mode


@dataclass(kw_only=True)
class RunTracker:
    """`rl.protocols.Tracker` that writes files at once, and passes everything on to the trackers that `config` names.

    `close` may be called at any moment and leaves readable files. A resumed run brings its `history` and its `id`, and
    its files keep what they hold. A full disk, or a tracker that fails, is an alert and ends no run.
    """

    folder: Path
    config: TrackingConfig
    name: str
    settings: dict[str, Any]
    show: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    watch: Callable[[dict[str, float]], list[Alert]] = lambda metrics: []
    """Gives the alerts of each step."""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    id: str | None = None
    """The run's id in the trackers; a new run makes one."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What the run begins with, by kind: model and data."""
    trackers: Mapping[str, Callable[[], Backend]] = field(default_factory=dict)
    """More trackers than those of `config`, by name."""
    go: Event | None = None
    """The trackers begin when it is set; without one at once, as one does that the user insists on."""
    _full: set[str] = field(default_factory=set)
    """Files that could not be written, each of which was reported."""
    _histograms: dict[str, list[float]] = field(default_factory=dict)
    """Those of the step that is logged next."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = self.folder / "alerts.jsonl"
        self.alerts += [json.loads(line) for line in earlier.read_text().splitlines()] if earlier.exists() else []
        self.files = {name: Rows(self.folder / f"{name}.jsonl") for name in ("metrics", "samples")}
        for row in self.history:
            self.watch(row)  # it must not repeat earlier alerts
        self.id = self.id or secrets.token_hex(4)
        about = About(
            name=self.name,
            id=self.id,
            folder=self.folder,
            config=self.config,
            settings=self.settings,
            step=self._step,
            resumed=bool(self.history),
            inputs=self.inputs,
        )
        off = "wandb" if wandb_mode(self.config) == "disabled" else ""
        makers = {name: maker(name) for name in self.config.to if name != off} | dict(self.trackers)
        self.guards = [Guard(n, make, about, None if insists(self.config) else self.go) for n, make in makers.items()]
        for guard in self.guards:
            if guard.name == "wandb" and insists(self.config):
                guard.begun.wait(INSIST_S + 10)
                if guard.error:
                    raise guard.error

    @property
    def _step(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step everywhere. A NaN is written as null, which JSON can hold."""
        row = {"step": float(step), **metrics}
        self.history.append(row)
        self._write("metrics", row, step)
        values, self._histograms = {**metrics, **self._histograms}, {}
        self._tell(lambda tracker: tracker.log(step, values))
        self.show(step, metrics)
        for alert in self.watch(metrics):
            self.alert(step, alert.title, alert.text)
        self._report()

    def alert(self, step: int, title: str, text: str) -> None:
        """Show the user what needs attention: on the terminal, in alerts.jsonl, and in every tracker."""
        row = {"step": step, "title": title, "text": text}
        self.alerts.append(row)
        alert_line(step, title, text)
        self._write("alerts", row, step)
        self._tell(lambda tracker: tracker.alert(step, title, text))

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Show rows of tokens or texts, which have the same keys, in the trackers where the user wants that. No file is
        written."""
        if rows and self.config.upload_samples:
            step = self._step
            self._tell(lambda tracker: tracker.table(step, name, rows))

    def samples(
        self, step: int, trajectories: list[Trajectory], decode: Callable[[list[int]], str], gaps: Sequence[float] = ()
    ) -> None:
        """Keep a few trajectories as text; all of them when step is -1 (set aside as broken).

        `gaps` has the largest |trainer - engine| of each in nats, NaN where it is not known, or is empty.
        """
        kept = trajectories if step < 0 else trajectories[: self.config.samples_per_step]
        for t in kept:
            prompt, reply = parts(t)
            row = {
                "step": step,
                "prompt_ordinal": t.group,
                "prompt": decode(prompt),
                "reply": decode(reply),
                "reward": t.reward,
                "finish_reason": t.finish_reason,
                "versions": sorted({v for v, m in zip(t.versions, t.mask, strict=True) if m}),
            }
            if t.verdicts:
                row["verdicts"] = [{"judge": v.judge, "score": v.score, "raw": v.raw} for v in t.verdicts]
            if step < 0:
                sampled = [i for i, m in zip(t.token_ids, t.mask, strict=True) if m]
                row |= {"token_ids": sampled, "logprobs": [repr(x) for x in t.logprobs]}
            self._write("samples", row, step)
        if step < 0 or not self.guards:
            return
        self._histograms = histograms(step, trajectories, gaps)
        if self.config.upload_samples:
            rows = worth_a_look(step, trajectories, decode, gaps)
            self._tell(lambda tracker: tracker.table(step, "samples", rows))

    def problems(self, step: int, measured: Mapping[str, Problems]) -> None:
        """Keep the figures of every held-out problem, for comparisons."""
        for row in rows_of(step, measured):
            self._write("evaluations", row, step)

    def write_waiting(self) -> None:
        """Write the rows that waited for space, before anything larger takes it."""
        for rows in self.files.values():
            with suppress(OSError):  # they wait on, and `close` reports them
                rows.write()

    def close(self, summary: dict[str, Any]) -> None:
        """Close every tracker with the summary, and the files. Waits `tracking.end_s` seconds at most for a tracker."""
        told = dict(summary)
        if "error" in told and not self.config.upload_samples:
            told["error"] = str(told["error"]).partition(":")[0]  # the message may quote a prompt
        status = str(summary.get("status", "failed"))
        for guard in self.guards:
            guard.end(lambda tracker: tracker.end(status, told))
        for guard in self.guards:
            guard.wait()
        self._report()
        for rows in self.files.values():
            try:
                rows.close()
            except OSError as error:
                alert_line(self._step, f"{rows.path.name} lacks its last rows", str(error))

    def _write(self, name: str, row: dict[str, Any], step: int) -> None:
        """Append a row to a file. The first one of a file that cannot be written is an alert."""
        if name not in self.files:
            self.files[name] = Rows(self.folder / f"{name}.jsonl")
        try:
            self.files[name].append(row)
        except OSError as error:
            if name not in self._full:
                self._full.add(name)
                text = f"{error}. Its rows are kept in memory, and written when there is space again."
                self.alert(step, f"{name}.jsonl cannot be written", text)

    def _tell(self, call: Call) -> None:
        for guard in self.guards:
            guard.tell(call)

    def _report(self) -> None:
        """Show what happened to the trackers since the last step."""
        for title, text in [problem for guard in self.guards for problem in guard.problems()]:
            self.alert(self._step, title, text)
