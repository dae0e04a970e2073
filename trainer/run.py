"""One run from config to summary: start, evaluate, train, export, and a readable folder however it ends."""

import asyncio
import math
import time
from pathlib import Path
from typing import Any

from rl.config import Config
from rl.data import stream
from rl.diagnosis import ParityError
from rl.loop import Loop
from rl.watch import Watch
from trainer import report
from trainer.checkup import checkup
from trainer.cluster import Cluster
from trainer.doctor_report import save, show, token_table
from trainer.evaluate import evaluate
from trainer.fleet import Fleet
from trainer.placement import Placement
from trainer.preflight import Prepared, place, prepare
from trainer.remote import RemoteLearner, RemoteRollouts
from trainer.terminal import Progress, closing_table, status
from trainer.tracking import RunTracker


def run(config: Config) -> dict[str, Any]:
    """Train, and return the summary that is also saved as summary.json."""
    return asyncio.run(_run(config, place(config)))


async def _run(config: Config, placement: Placement) -> dict[str, Any]:
    began = time.perf_counter()
    cluster = Cluster(config, placement)
    try:
        # The actors import vLLM and DeepSpeed, which takes longest, while the data is read and checked here.
        reading = asyncio.create_task(asyncio.to_thread(prepare, config))
        cluster.boot()
        prepared = await reading
        with Run(config, cluster, prepared) as one:
            with status(f"starting {config.rollout.engines} engine(s) and {config.trainer.ranks} learner rank(s)"):
                await cluster.start()
            one.summary["start_seconds"] = time.perf_counter() - began
            await one.train()
            return one.summary
    finally:
        # A second Ctrl-C while this runs would leave processes behind; its steps are bounded, so it may wait.
        await asyncio.shield(cluster.close())


class Run:
    """The record of one run. Leaving it, in whatever way, writes what is known."""

    def __init__(self, config: Config, cluster: Cluster, prepared: Prepared) -> None:
        self.config, self.cluster, self.prepared = config, cluster, prepared
        self.folder = fresh_folder(Path(config.output_dir) / config.name)
        settings = report.resolved(config)
        self.folder.mkdir(parents=True)
        report.write_json(self.folder / "config.json", settings)
        self.tracker = RunTracker(
            folder=self.folder,
            config=config.tracking,
            name=config.name,
            settings=settings,
            show=Progress(config),
            watch=Watch(config),
        )
        self.loop: Loop | None = None
        self.fleet: Fleet | None = None
        self.summary: dict[str, Any] = {
            "name": config.name,
            "status": "failed",
            "seed": config.seed,
            "config_digest": report.config_digest(settings),
            "stack": report.stack_versions(),
        }

    async def train(self) -> None:
        """Evaluate, train, evaluate, export."""
        config, cluster, summary, tokenizer = self.config, self.cluster, self.summary, self.prepared.tokenizer
        self.fleet = fleet = Fleet(cluster)
        rollouts = RemoteRollouts(cluster, fleet)
        learner = RemoteLearner(cluster, probe=self.prepared.train[0].token_ids, fleet=fleet)
        await self._check(learner)

        async def evaluated() -> dict[str, float]:
            return await evaluate(config, rollouts, self.prepared.decode, self.prepared.evals)

        self.loop = Loop(
            config=config,
            rollouts=rollouts,
            learner=learner,
            prompts=stream(self.prepared.train, config.seed),
            decode=self.prepared.decode,
            tracker=self.tracker,
            evaluate=evaluated,
            on_samples=lambda step, trajectories: self.tracker.samples(step, trajectories, tokenizer.decode),
        )
        with status("evaluating the start model"):
            summary["eval_before"] = await evaluated()
        self.tracker.log(0, dict(summary["eval_before"]))
        began = time.perf_counter()
        await self.loop.run()
        summary["train_seconds"] = time.perf_counter() - began
        summary["eval_after"] = {k: v for k, v in self.tracker.history[-1].items() if k.startswith("eval/")}
        summary["learner_peak_gib"] = await cluster.ask_learners("peak_memory_gib")
        if config.save_final:
            with status("exporting the model"):
                await cluster.ask_learners("export", str((self.folder / "model").resolve()))
                tokenizer.save_pretrained(self.folder / "model")
        summary["engines"] = await fleet.counters()
        summary["status"] = "finished"

    async def _check(self, learner: RemoteLearner) -> None:
        """Give the engines their first weights, and see that both sides mean the same. Raises ParityError."""
        config, cluster = self.config, self.cluster
        if config.doctor == "off":
            await learner.publish(0)
            return
        with status("checking that engines and trainer agree"):
            report = await checkup(cluster, learner, self.prepared)
        show(report, self.prepared.tokenizer.decode)
        save(report, self.folder, self.prepared.tokenizer.decode)
        self.tracker.table("doctor", token_table(report, self.prepared.tokenizer.decode))
        self.summary["doctor"] = report.verdict
        if report.faults:
            raise ParityError(report.message())
        source, _ = report.old_logprobs
        self.summary["old_logprobs"] = source
        await cluster.ask_learners("use_old_logprobs", source)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        summary, loop = self.summary, self.loop
        if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
            summary["status"] = "interrupted"
        elif error is not None:
            summary |= {"error": f"{type(error).__name__}: {error}", "logs": self.cluster.logs}
        rows = [row for row in self.tracker.history if "reward/mean" in row]
        gaps = [row["rollout_corr/logprob_abs_diff_mean"] for row in rows]
        summary |= {
            "steps": len(rows),
            "tokens": loop.trained_tokens if loop else 0,
            "weight_version": loop.flow.version if loop else 0,
            "engines_lost": self.fleet.causes if self.fleet else [],
            "ledger": loop.flow.ledger.summary() if loop else {},
            "reward_first": rows[0]["reward/mean"] if rows else None,
            "reward_last": rows[-1]["reward/mean"] if rows else None,
            "alerts": len(self.tracker.alerts),
            "worst_logprob_gap": max(gaps, key=lambda gap: (math.isnan(gap), gap), default=None),
        }
        report.write_json(self.folder / "summary.json", summary)
        if rows:
            report.plot(self.tracker.history, self.folder / "curves.png", summary["name"])
        self.tracker.close(summary)
        closing_table(summary, self.folder)


def fresh_folder(wanted: Path) -> Path:
    """The wanted folder, or the first of wanted-2, wanted-3, ... that does not exist: no run overwrites another."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
