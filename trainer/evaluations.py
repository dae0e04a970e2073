"""How is a run evaluated? Its held-out sets when they are due, the best model, and what training has changed."""

import asyncio
from collections.abc import Awaitable, Container, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl.judges.agreement import agreements
from rl.loop.estimates import paired
from rl.loop.evaluate import AGAIN, EVALUATION, Evaluation, HeldOut, evaluate
from rl.typed import shortened
from trainer.cluster.cluster import Cluster
from trainer.cluster.fleet import Fleet
from trainer.cluster.remote import RemoteRollouts
from trainer.episodes import episodes_of, held_out_sets
from trainer.outcome import write_model
from trainer.plan.plan import Plan, make_plan
from trainer.prompts import Prepared, read
from trainer.runs import best
from trainer.runs.model_card import write_card
from trainer.runs.problems import problems_at
from trainer.tracking.terminal import status, working
from trainer.tracking.tracker import RunTracker


@dataclass(kw_only=True)
class Evaluations:
    """Those of one run."""

    cluster: Cluster
    rollouts: RemoteRollouts
    prepared: Prepared
    sets: Mapping[str, HeldOut]
    tracker: RunTracker
    summary: dict[str, Any]
    settings: dict[str, Any]

    def due(self, step: int) -> Awaitable[dict[str, float]] | None:
        """Evaluates the sets that are due after a step, and before the first one judges too; None: nothing is due."""
        steps = self.cluster.config.steps
        due = {name: each for name, each in self.sets.items() if each.due(step, steps)}
        if not step:
            return self._of_start_model(due)
        return self._measured(step, due) if due else None

    async def _of_start_model(self, due: Mapping[str, HeldOut]) -> dict[str, float]:
        """The start model's figures, and how far the judges agree with their labelled cases."""
        metrics = self.summary["eval_before"] = await self._measured(0, due) if due else {}
        return metrics | await agreements(self.cluster.config.judges)

    async def _measured(self, step: int, due: Mapping[str, HeldOut]) -> dict[str, float]:
        prepared = self.prepared
        config, total = self.cluster.config, sum(len(each.prompts) for each in due.values())
        with working(f"evaluating after step {step}" if step else "evaluating the start model", total) as done:
            found = await evaluate(config, self.rollouts, prepared.decode, due, prepared.means, done=done)
        self.tracker.problems(step, found.problems)
        return found.metrics

    @property
    def _metric(self) -> str:
        return f"eval/{self.cluster.config.keep_best}"

    async def keep(self, step: int, metrics: dict[str, float]) -> None:
        """Keep the learner's model if its evaluation is the highest so far. One that cannot be written is an alert."""
        run, history = self.tracker.folder, [*self.tracker.history, {"step": step, **metrics}]
        found = best.best(history, self._metric, {*best.kept(run), step})
        start_model = not step  # which is there already
        if start_model or self._metric not in metrics or found is None or found[0] != step:
            return
        config, tokenizer, summary = self.cluster.config, self.prepared.tokenizer, self.summary | best_of(step, metrics)
        try:
            await write_model(self.cluster, tokenizer, best.folder_of(run, step), config, summary, self.settings)
            best.prune(run, history, self._metric)
        except OSError as error:
            self.tracker.alert(step, "the best model could not be kept", f"{error}. The one before it is kept.")

    def outcome(self) -> dict[str, Any]:
        """Fields of the summary: the evaluation after training, its paired difference from the one before, and the best
        evaluation."""
        history, run = self.tracker.history, self.tracker.folder
        before, after = (problems_at(run, int(row["step"])) for row in (history[0], history[-1]))
        changes = {name: paired(before[name], after[name]) for name in before.keys() & after.keys()}
        fields: dict[str, Any] = {
            "eval_after": evaluation_in(history[-1]),
            "eval_change": {f"eval/{name}/{key}": v for name, each in changes.items() for key, v in each.items()},
        }
        models = best.kept(run)
        if found := best.best(history, self._metric, models):
            model = str(models[found[0]].relative_to(run)) if found[0] else self.cluster.config.model
            figure = self.cluster.config.keep_best
            fields["best"] = {"figure": figure, "step": found[0], "value": found[1], "model": model}
        return fields

    async def again(self) -> None:
        """Sample the best evaluation's set, or those of its mean, once more on its model, from disk and with other
        seeds: the highest of several figures is biased upward. It ends the run's actors first. If it fails, that is an
        alert: what was trained is saved already."""
        if not (found := self.summary.get("best")):
            return
        await self.cluster.aclose()
        try:
            await self._again(found)
        except Exception as error:  # an engine that does not start, a reward that fails, a full disk
            text = f"{type(error).__name__}: {shortened(str(error), 300)}. Its figure is still the chosen one, too high"
            self.tracker.alert(self.cluster.config.steps, "the best model could not be sampled again", text)

    async def _again(self, found: dict[str, Any]) -> None:
        config, run = self.cluster.config, self.tracker.folder
        model, name = str(run / found["model"]) if found["step"] else config.model, found["figure"].rpartition("/")[0]
        plan = make_plan(replace(config, model=model), learners=False)
        only = {each.rpartition("/")[0] for each in self.prepared.means.get(name, ())} or {name}
        with status(f"sampling {name!r} again, with other seeds, from {model}"):
            measured, _ = await evaluated_alone(plan, self.prepared, only=only, seeds=AGAIN)
        found["again"] = measured.metrics
        cards = {run / "model": self.summary}
        if found["step"]:
            row = next(row for row in self.tracker.history if row["step"] == found["step"])
            cards[Path(model)] = self.summary | best_of(found["step"], row)
        for folder, summary in cards.items():
            if folder.exists():
                write_card(folder, config, summary, self.settings)


async def evaluated_alone(
    plan: Plan, prepared: Prepared | None = None, *, only: Container[str] = (), seeds: int = EVALUATION
) -> tuple[Evaluation, dict[str, HeldOut]]:
    """The evaluation of a model by engines alone, and the sets; `only` names some of them. Raises ValueError when there
    is none."""
    config = plan.config
    async with aclosing(Cluster(config, plan.placement)) as cluster:
        cluster.boot()
        # Read and checked while the engines import vLLM.
        prepared = prepared or await asyncio.to_thread(read, plan)
        check_sets(prepared.evals)
        with status(f"starting {config.rollout.engines} engine(s) with {config.model}"):
            await cluster.start()
        fleet = Fleet(cluster)
        fleet.recover = lambda: restarted(fleet)
        rollouts = RemoteRollouts(cluster, fleet)
        sets = held_out_sets(config, rollouts, prepared, episodes_of(config, rollouts, prepared))
        sets = {name: each for name, each in sets.items() if not only or name in only}
        total = sum(len(each.prompts) for each in sets.values())
        with status(f"sampling {total} problems", total) as done:
            found = await evaluate(config, rollouts, prepared.decode, sets, prepared.means, seeds=seeds, done=done)
            return found, sets


async def restarted(fleet: Any) -> None:
    """Bring back lost engines. They read the model themselves, so they serve as soon as they have started."""
    while fleet.lost:
        await fleet.revive()
        await fleet.mark_serving()


def check_sets(sets: Mapping[str, Any]) -> None:
    """Raise ValueError, with the remedy, where there is nothing to evaluate on."""
    if not sets:
        raise ValueError(
            "the recipe's data has no held-out set: return Data(train=[...], evals={'held_out': [Example(...)]})"
        )


def best_of(step: int, row: Mapping[str, float]) -> dict[str, Any]:
    """What the summary of a run would be if it had ended at this step, for the model's card."""
    return {"steps": step, "eval_after": evaluation_in(row), "eval_change": {}}


def evaluation_in(row: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an evaluation in a row of metrics."""
    return {name: value for name, value in row.items() if name.startswith("eval/")}
