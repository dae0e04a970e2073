"""The best model of a run: the first of the highest evaluations, kept apart from the newest, also after a resume."""

import asyncio
import json
import math
import random
from types import SimpleNamespace

import pytest

from rl.config import Config
from rl.loop.evaluate import AGAIN
from rl.protocols import EngineLost
from rl.types import Data
from trainer import evaluations
from trainer.evaluations import Evaluations
from trainer.runs import best
from trainer.runs.problems import problems_at

METRIC = "eval/held/avg@1"


def history(*values):
    return [{"step": float(step)} | ({} if value is None else {METRIC: value}) for step, value in enumerate(values)]


def test_the_first_of_equal_evaluations_is_the_best():
    assert best.best(history(0.1, 0.5, None, 0.5, 0.4), METRIC, range(9)) == (1, 0.5)
    assert best.best(history(0.5, 0.5, 0.4), METRIC, range(9)) == (0, 0.5), "the start model competes"
    assert best.best(history(None, math.nan), METRIC, range(9)) is None


def test_an_evaluation_whose_model_is_not_kept_is_no_candidate():
    assert best.best(history(0.1, 0.9, 0.5), METRIC, {2}) == (2, 0.5)
    assert best.best(history(0.1, 0.9), METRIC, ()) == (0, 0.1)


class Tracker:
    """The part of a tracker that keeping needs."""

    def __init__(self, folder, rows):
        self.folder, self.history, self.alerts = folder, rows, []

    def alert(self, step, title, text):
        self.alerts.append((step, title, text))


def keeper(folder, rows, monkeypatch, *, full=()):
    async def write_model(cluster, tokenizer, final, config, summary, settings):
        if summary["steps"] in full:
            raise OSError("no space left")
        final.mkdir(parents=True)
        (final / "weights").write_text(str(summary["steps"]))

    monkeypatch.setattr(evaluations, "write_model", write_model)
    config = Config(name="t", model="start", data=Data(train=[]), reward=len, keep_best="held/avg@1")
    tracker = Tracker(folder, rows)
    return Evaluations(
        cluster=SimpleNamespace(config=config),
        rollouts=None,
        prepared=SimpleNamespace(tokenizer=None, means={"all": {"easy/avg@1": 1.0, "hard/avg@1": 1.0}}),
        sets={},
        tracker=tracker,
        summary={},
        settings={},
    )


def evaluated(one, step, value):
    """A step with an evaluation, as the loop makes it: kept first, then logged."""
    asyncio.run(one.keep(step, {METRIC: value}))
    one.tracker.history.append({"step": float(step), METRIC: value})


def saved(folder, step):
    (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)


def test_only_a_higher_evaluation_replaces_the_best_model(tmp_path, monkeypatch):
    one = keeper(tmp_path, history(0.2), monkeypatch)
    for step, value in enumerate([0.1, 0.3, 0.3, 0.6, 0.5], 1):
        evaluated(one, step, value)
    assert [*best.kept(tmp_path)] == [4]
    assert one.outcome()["best"] == {"figure": "held/avg@1", "step": 4, "value": 0.6, "model": "best/step-000004"}


def test_without_progress_the_start_model_is_the_best(tmp_path, monkeypatch):
    one = keeper(tmp_path, history(0.6), monkeypatch)
    evaluated(one, 1, 0.6)
    assert best.kept(tmp_path) == {}
    assert one.outcome()["best"] == {"figure": "held/avg@1", "step": 0, "value": 0.6, "model": "start"}


def test_a_model_that_cannot_be_kept_is_an_alert_and_the_one_before_stays(tmp_path, monkeypatch):
    one = keeper(tmp_path, history(0.2), monkeypatch, full={2})
    evaluated(one, 1, 0.3)
    evaluated(one, 2, 0.9)
    assert [*best.kept(tmp_path)] == [1]
    assert one.tracker.alerts == [(2, "the best model could not be kept", "no space left. The one before it is kept.")]
    assert one.outcome()["best"]["step"] == 1


@pytest.mark.parametrize("seed", range(30))
def test_a_run_that_goes_back_to_any_checkpoint_finds_the_best_model_of_that_time(seed, tmp_path, monkeypatch):
    r = random.Random(seed)
    values = [r.randrange(6) / 5 for _ in range(12)]
    one = keeper(tmp_path, history(values[0]), monkeypatch)
    for step in range(1, 12):
        evaluated(one, step, values[step])
        if r.random() < 0.4:
            saved(tmp_path, step)
    points = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("*")) or [0]
    back = r.choice(points)
    best.rewind(tmp_path, back)
    again = keeper(tmp_path, one.tracker.history[: back + 1], monkeypatch)
    wanted = values[: back + 1].index(max(values[: back + 1]))
    assert again.outcome()["best"]["step"] == wanted, "the model of that time is still there"
    if wanted:
        assert (best.kept(tmp_path)[wanted] / "weights").read_text() == str(wanted)
    for step in range(back + 1, 12):
        evaluated(again, step, values[step])
    assert again.outcome()["best"]["step"] == values.index(max(values)), "as if nothing had happened"


def test_the_change_is_paired_and_none_where_the_last_evaluation_has_no_score(tmp_path, monkeypatch):
    rows = [
        {"step": 0, "set": "held", "problems": {"0": {"avg@1": 0.0}, "1": {"avg@1": 1.0}}},
        {"step": 0, "set": "hard", "problems": {"0": {"avg@1": 0.0}}},
        {"step": 1, "set": "held", "problems": {"0": {"avg@1": 0.0}, "1": {"avg@1": 0.0}}},
        {"step": 1, "set": "hard", "problems": {"0": {"avg@1": 1.0}}},
        {"step": 2, "set": "held", "problems": {"0": {"avg@1": 1.0}, "1": {"avg@1": 1.0}}},
    ]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = keeper(tmp_path, history(0.5, 0.0, 1.0), monkeypatch)
    assert one.outcome()["eval_change"] == {METRIC: 0.5, f"{METRIC}_se": 0.5}
    assert problems_at(tmp_path, 1)["hard"] == {0: {"avg@1": 1.0}}


class Closes:
    """The part of a cluster that evaluating again needs."""

    closed = False

    def __init__(self, config):
        self.config = config

    async def aclose(self):
        self.closed = True


def again(folder, monkeypatch, evaluated, figure="held/avg@1"):
    one = keeper(folder, history(0.1, 0.5), monkeypatch)
    one.cluster = Closes(one.cluster.config)
    one.summary |= {"best": {"figure": figure, "step": 1, "value": 0.5, "model": "best/step-000001"}}
    monkeypatch.setattr(evaluations, "make_plan", lambda config, learners: config)
    monkeypatch.setattr(evaluations, "evaluated_alone", evaluated)
    asyncio.run(one.again())
    assert one.cluster.closed
    return one


def test_the_sets_of_the_figure_are_sampled_again_on_the_best_model(tmp_path, monkeypatch):
    asked = []

    async def evaluated(plan, prepared, *, only, seeds):
        asked.append((plan.model, only, seeds))
        return SimpleNamespace(metrics={METRIC: 0.4}), {}

    one = again(tmp_path, monkeypatch, evaluated)
    assert one.summary["best"]["again"] == {METRIC: 0.4}
    again(tmp_path, monkeypatch, evaluated, figure="all/mean")
    assert asked == [(str(tmp_path / "best" / "step-000001"), sets, AGAIN) for sets in ({"held"}, {"easy", "hard"})]


def test_a_second_evaluation_that_fails_is_an_alert_and_the_run_has_finished(tmp_path, monkeypatch):
    async def evaluated(plan, prepared, **more):
        raise EngineLost("engine 0 did not start")

    one = again(tmp_path, monkeypatch, evaluated)
    assert "again" not in one.summary["best"]
    ((step, title, text),) = one.tracker.alerts
    assert (step, title) == (one.cluster.config.steps, "the best model could not be sampled again")
    assert text.startswith("EngineLost: engine 0 did not start. ")
