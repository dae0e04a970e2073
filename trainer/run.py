"""One run from config to summary: start, evaluate, train, export, and a readable folder however it ends."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from threading import Event
from typing import Any

from rl.config import Config
from rl.loop.loop import Loop
from rl.loop.progress import Progress
from rl.parity.advice import advise
from rl.parity.watch import Watch
from trainer.cluster.cluster import Cluster
from trainer.cluster.fleet import Fleet
from trainer.cluster.remote import RemoteLearner, RemoteRollouts
from trainer.doctor.check import by_settings
from trainer.doctor.doctor import examine_engines
from trainer.doctor.finding import ParityError
from trainer.doctor.report import show, write
from trainer.episodes import episodes_of, held_out_sets
from trainer.evaluations import Evaluations, evaluation_in
from trainer.outcome import export_model, how_to_resume, leave
from trainer.plan.plan import Plan, make_plan
from trainer.prompts import Prepared, read
from trainer.record.recorder import Recorded, RunRecord
from trainer.runs import checkpoint
from trainer.runs.code_state import keep_code
from trainer.runs.files import Reserve, make_folder, write_json
from trainer.runs.records import recorded
from trainer.runs.resume import Resumed, data_digest, state_of, write_history
from trainer.runs.settings import config_digest, resolved, stack_versions
from trainer.runs.summary import ending, summarise
from trainer.stop import Stop, run_stoppable, stoppable
from trainer.tracking.monitor import Monitor, monitor_of
from trainer.tracking.terminal import Lines, console, status, working
from trainer.tracking.tracker import RunTracker


def run(config: Config, *, resumed: Resumed | None = None, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Train, and return the summary that is also saved as summary.json.

    `flags` is the command line that made the config of the recipe's, for checkpoints to remember.
    """
    return run_stoppable(run_async(config, resumed=resumed, flags=flags))


async def run_async(config: Config, *, resumed: Resumed | None = None, flags: Sequence[str] = ()) -> dict[str, Any]:
    """`run` for a running event loop, as in a notebook: `summary = await run_async(config)`. Cancelling it ends it."""
    plan = make_plan(config)
    plan.check_gpus()
    with stoppable(config.deadlines.stop_s) as stop:
        return await _run(plan, stop, resumed, flags)


async def _run(plan: Plan, stop: Stop, resumed: Resumed | None, flags: Sequence[str]) -> dict[str, Any]:
    config, began = plan.config, time.perf_counter()
    async with aclosing(Cluster(config, plan.placement)) as cluster:
        cluster.boot()
        stop.listen()
        # While the actors import, and not while Ray starts: its processes need the cores, and the engines wait for it.
        prepared = await asyncio.to_thread(read, plan, resumed.data if resumed else None)
        for note in plan.notes():
            console.print(note, style="yellow", markup=False, highlight=False)
        with Run(config, cluster, prepared, stop=stop, resumed=resumed, flags=flags) as one:
            with status(f"starting {config.rollout.engines} engine(s) and {config.trainer.ranks} learner rank(s)"):
                await cluster.start(one.folder, one.go.set)
            one.summary["start_seconds"] = time.perf_counter() - began
            await one.train()
            await one.evaluations.again()
            one.summary["status"] = "finished"
            return one.summary


class Run:
    """The record of one run. Leaving it, in whatever way, writes what is known."""

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        prepared: Prepared,
        *,
        stop: Stop,
        resumed: Resumed | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self.config, self.cluster, self.prepared, self.stop = config, cluster, prepared, stop
        self.resumed, self.flags = resumed, list(flags)
        self.settings = resolved(config)
        self.data = data_digest(prepared.train)
        changed: list[str] = []
        if resumed:
            changed = resumed.check_data(self.data, prepared.fingerprint, accept=config.changed_at_resume == "report")
            self.folder = resumed.run
            self.lock = checkpoint.lock(self.folder)
            resumed.rewind()
        else:
            self.folder = make_folder(Path(config.output_dir) / config.name)
            self.lock = checkpoint.lock(self.folder)
        self.reserve = Reserve(self.folder)
        self.watch, self.go = Watch(config), Event()
        self.progress = resumed.progress if resumed else Progress(owes_evaluation=True)
        for change in changed:
            self.tracker.alert(self.progress.version, "the run was changed", f"It has other {change}.")
        for line in prepared.lines():
            console.print(line)
        self.began = 0.0
        """When training began, less what it had taken before."""
        self.loop: Loop | None = None
        self.fleet: Fleet | None = None
        self.monitor: Monitor | None = None
        self.record: RunRecord | None = None
        self.writing: asyncio.Task[None] | None = None
        """The doctor's report."""
        self.evaluations: Evaluations
        self.summary: dict[str, Any] = {
            "name": config.name,
            "status": "failed",
            "seed": config.seed,
            "config_digest": config_digest(self.settings),
            "stack": stack_versions(),
        }
        try:
            write_json(self.folder / "config.json", self.settings)
            self.summary["code"] = keep_code(self.folder)
            self.tracker = self._tracker()
        except BaseException as error:
            self.reserve.free()
            write_json(self.folder / "summary.json", self.summary | ending(error, logs=cluster.logs))
            raise

    def _tracker(self) -> RunTracker:
        self.monitor = monitor_of(self.config)
        return RunTracker(
            trackers=[self.monitor] if self.monitor else [],
            folder=self.folder,
            config=self.config.tracking,
            name=self.config.name,
            settings=self.settings | {"code": self.summary["code"]},
            show=Lines(self.config.steps),
            watch=self.watch,
            inputs={"model": self.config.model, "dataset": self.data},
            id=self.resumed.saved("wandb_id") if self.resumed else None,
            history=self.resumed.history if self.resumed else [],
            go=self.go,
        )

    async def train(self) -> None:
        """Evaluate, train, evaluate, export."""
        config, cluster, summary, tokenizer = self.config, self.cluster, self.summary, self.prepared.tokenizer
        self.fleet = fleet = Fleet(cluster)
        rollouts, probe = RemoteRollouts(cluster, fleet), self.prepared.train[0].token_ids
        learner = RemoteLearner(cluster, probe=probe, fleet=fleet, version=self.progress.version)
        if self.resumed:
            with status(f"resuming from {self.resumed.checkpoint.folder}"):
                state = self.resumed.learner
                await cluster.ask_learners(lambda rank: rank.load_state(state))
        await self._check(learner, rollouts)
        fleet.follow()
        if self.monitor:
            self.monitor.engines = rollouts.figures
        alert, alerts, after = self.tracker.alert, self.tracker.alerts, self.progress.version
        record = RunRecord(self.folder, config, tokenizer=tokenizer, after=after, alert=alert, alerts=alerts)
        self.record, rollouts.called = record, record.called
        player = episodes_of(config, rollouts, self.prepared)
        self.evaluations = evaluations = Evaluations(
            cluster=cluster,
            rollouts=rollouts,
            prepared=self.prepared,
            sets=held_out_sets(config, rollouts, self.prepared, player),
            tracker=self.tracker,
            summary=summary,
            settings=self.settings,
        )
        self.loop = Loop(
            config=config,
            rollouts=rollouts,
            learner=Recorded(recorded(learner, self.folder, config, self.tracker.alert), learner, record),
            prompts=self.prepared.stream(config.seed, self.progress.ends),
            data_metrics=lambda: self.prepared.metrics() | rollouts.metrics() | (player.metrics() if player else {}),
            decode=self.prepared.decode,
            tracker=self.tracker,
            evaluate=lambda step: record.timed("evaluation", evaluations.due(step)),
            keep=evaluations.keep,
            player=player,
            on_samples=lambda step, of: self.tracker.samples(step, of, tokenizer.decode, record.trained(step, of)),
            on_left=record.ended,
            on_move=record.moved,
            progress=self.progress,
            save=lambda progress: record.timed("checkpoint", self._save(progress)),
        )
        if self.tracker.history:
            summary["eval_before"] = evaluation_in(self.tracker.history[0])
        self.began = time.perf_counter() - (self.resumed.saved("train_seconds") if self.resumed else 0.0)
        self.stop.gently = self.loop.stop
        await self.loop.run()
        if self.writing:
            await self.writing
        self.stop.saved()
        if not self.loop.done:
            raise asyncio.CancelledError("stopped by SIGTERM")
        summary["train_seconds"] = time.perf_counter() - self.began
        summary["long_prompts"] = self.prepared.long
        summary |= evaluations.outcome()
        summary["learner_peak_gib"] = await cluster.ask_learners(lambda rank: rank.peak_memory_gib())
        if config.save_final:
            with status("exporting the model"):
                await export_model(cluster, tokenizer, self.folder, config, summary, self.settings)
        summary["engines"] = await fleet.counters()

    async def _save(self, progress: Progress) -> None:
        """Make a checkpoint. One that cannot be written is an alert, and no reason to lose the run."""
        began = time.perf_counter()
        state = state_of(
            progress,
            self.settings,
            flags=self.flags,
            data=self.data,
            prepared=self.prepared.state(),
            fingerprint=self.prepared.fingerprint,
            cwd=str(Path.cwd()),
            wandb_id=self.tracker.id,
            old_logprobs=self.summary.get("old_logprobs"),
            train_seconds=began - self.began,
            stack=self.summary["stack"],
        )
        try:
            with working(f"saving the checkpoint of step {progress.version}"):
                draft = checkpoint.draft(self.folder, progress.version)
                write_history(draft, self.tracker.history)
                target = str((draft / "learner").resolve())
                await self.cluster.ask_learners(lambda rank: rank.save_state(target))
                # In a thread: it reads every byte again, and the engines are spoken to meanwhile.
                keep = self.config.keep_last
                done = await asyncio.to_thread(checkpoint.commit, draft, progress.version, state, keep_last=keep)
        except OSError as error:
            checkpoint.sweep(self.folder)  # the draft may be what fills the disk
            self.tracker.alert(progress.version, "no checkpoint could be made", f"{error}. The last good one is kept.")
        else:
            console.print(f"[dim]{done} ({time.perf_counter() - began:.1f} s)[/]", highlight=False)

    async def _check(self, learner: RemoteLearner, rollouts: RemoteRollouts) -> None:
        """Give the engines their first weights, and see that both sides mean the same. Raises ParityError."""
        config, cluster, version = self.config, self.cluster, self.progress.version
        before = self.resumed.saved("old_logprobs") if self.resumed and not by_settings(config) else None
        if config.doctor == "off":
            await learner.publish(version)
            if before:
                await self._settle(before)
            return
        with status("checking that engines and trainer agree"):
            report = await examine_engines(cluster, learner, self.prepared, version, None if self.resumed else rollouts)
        show(report, self.prepared.tokenizer.decode)
        writing = write(report, self.folder, self.prepared.tokenizer.decode, self.tracker, version)
        self.writing = asyncio.create_task(writing)  # while the engines sample already
        self.summary["doctor"] = report.verdict
        if report.faults:
            await self.writing
            raise ParityError(report.message())
        # What noise decided on the start model holds for the whole run.
        await self._settle(before or report.old_logprobs[0])

    async def _settle(self, source: str) -> None:
        """What `old_logprobs="auto"` comes to."""
        self.summary["old_logprobs"] = source
        self.watch.settle(source)
        await self.cluster.ask_learners(lambda rank: rank.use_old_logprobs(source))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        summary, loop = self.summary, self.loop
        self.go.set()
        if self.record:
            self.record.close()
        summary |= ending(error, logs=self.cluster.logs)
        summary |= summarise(
            self.tracker.history,
            tokens=loop.trained_tokens if loop else 0,
            weight_version=loop.admission.version if loop else 0,
            ledger=loop.admission.ledger.summary() if loop else {},
            alerts=len(self.tracker.alerts),
            engines_lost=(self.fleet.causes if self.fleet else []) + self.cluster.reward_models.causes,
            resume=how_to_resume(self.folder) if summary["status"] != "finished" else None,
        )
        summary["advice"] = [advice.text for advice in advise(self.tracker.history, self.settings)]
        leave(self.folder, summary, self.tracker, self.reserve)
        self.lock.close()
