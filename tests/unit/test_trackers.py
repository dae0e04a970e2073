"""Trackers: one recorded run through all of them is read back equal, and none can harm a run."""

import errno
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from full_disk import full_beyond
from rl.config import TrackingConfig
from rl.types import Trajectory
from trainer.tracking import guard as guards
from trainer.tracking import tracker as trackers
from trainer.tracking.backend import maker
from trainer.tracking.tracker import RunTracker

STEPS = [
    (0, {"eval/held_out/avg@4": 0.125, "eval/held_out/avg@4_se": math.nan}),
    (1, {"reward/mean": 0.1, "rollout_corr/logprob_abs_diff_mean": 1.23456789012345e-7, "ledger/filtered(too_old)": 0}),
    (2, {"reward/mean": -7.5, "rollout_corr/logprob_abs_diff_mean": 3e-8, "actor/entropy": math.nan}),
    (3, {"reward/mean": 1e12, "eval/held_out/avg@4": 1 / 3, "staleness/frac_at_0": 1.0}),
]
"""The recorded run: no number is round in float32, some are NaN, and names have odd characters."""
WHAT = {"begin", "log", "table", "alert", "end"}


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the package {package} is not installed")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No account, no home and no server of the machine's user."""
    for name in [n for n in os.environ if n.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "SWANLAB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def trajectory(group, tokens, reward=0.5, version=3):
    n = tokens + 2
    return Trajectory(
        group=group,
        token_ids=list(range(n)),
        mask=[False, False, *[True] * tokens],
        logprobs=[0.0, 0.0, *[-0.5] * tokens],
        versions=[-1, -1, *[version] * tokens],
        reward=reward,
    )


def decode(ids):
    return " ".join(f"t{i}" for i in ids)


@pytest.fixture
def patient(monkeypatch):
    """What a real tracker holds is compared, and not how fast this machine is."""
    monkeypatch.setattr(guards, "CALL_S", 300.0)


def record(folder, *, to=(), trackers=None, status="finished", settings=None, end_s=300.0, **config):
    """The recorded run, with samples at step 2, a table, and an alert at step 1; its tracker."""
    tracker = RunTracker(
        folder=folder,
        config=TrackingConfig(to=to, end_s=end_s, **config),
        name="t",
        settings=settings or {"seed": 1, "rollout": {"top_p": 0.5}},
        trackers=trackers or {},
    )
    for step, metrics in STEPS:
        if step == 2:
            tracker.samples(2, [trajectory(7, 3), trajectory(8, 1, version=0)], decode)
        tracker.log(step, dict(metrics))
        if step == 1:
            tracker.alert(1, "a title", "a text")
    tracker.table("doctor", [{"token": "a", "d": 0.5}, {"token": 3, "d": None}])
    tracker.close({"status": status, "steps": 3, "error": "RewardError: it said SECRET"})
    return tracker


def same(found, wanted=None):
    """Whether steps by number hold the recorded metrics, to the last digit."""
    for step, metrics in STEPS:
        for name, value in (wanted or (lambda m: m))(metrics).items():
            got = found[step][name]
            assert got == value or (math.isnan(value) and (got is None or math.isnan(got))), (step, name, got)


class Everything:
    """A tracker of the user's own, as docs/how-to/trackers.md has it."""

    made = []

    def __init__(self):
        self.calls = []
        Everything.made.append(self)

    def begin(self, run):
        self.calls.append(("begin", run.name, run.step))

    def log(self, step, values):
        self.calls.append(("log", step, dict(values)))

    def table(self, step, name, rows):
        self.calls.append(("table", step, name, rows))

    def alert(self, step, title, text):
        self.calls.append(("alert", step, title, text))

    def end(self, status, summary):
        self.calls.append(("end", status, dict(summary)))


# -- a class of the user's own, and what every tracker gets ------------------------------------------------------------


def test_a_class_of_the_users_own_gets_the_whole_run_in_order_without_prompts_and_replies(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_tracker", sys.modules[__name__])
    monkeypatch.setattr("trainer.tracking.backend.find_spec", lambda name: name == "my_tracker")
    record(tmp_path, to=("my_tracker:Everything",))
    calls = Everything.made[-1].calls
    assert [c[:2] for c in calls] == [
        ("begin", "t"),
        ("log", 0),
        ("log", 1),
        ("alert", 1),
        ("log", 2),
        ("log", 3),
        ("end", "finished"),
    ]
    same({c[1]: c[2] for c in calls if c[0] == "log"})
    assert calls[4][2]["histogram/length"] == [3.0, 1.0]
    assert calls[4][2]["histogram/age"] == [-2.0, 1.0]
    assert "histogram/length" not in calls[5][2], "they are those of one step"
    told = repr(calls)
    assert "t2" not in told
    assert "SECRET" not in told, "the message of an error may quote a prompt"
    assert calls[-1][2]["error"] == "RewardError"


def test_prompts_and_replies_are_sent_only_where_the_flag_says_so(tmp_path):
    record(tmp_path, trackers={"mine": Everything}, upload_samples=True)
    calls = Everything.made[-1].calls
    (name, rows), (doctor, _) = [(c[2], c[3]) for c in calls if c[0] == "table"]
    assert (name, doctor) == ("samples", "doctor")
    assert [row["why"] for row in rows][:2] == ["shortest", "longest"]
    assert rows[0]["reply"] == "t2"
    assert rows[1]["reply"] == "t2 t3 t4"
    assert all(isinstance(value, str) for row in rows for value in row.values()), "W&B refuses mixed types"
    assert {tuple(row) for row in rows} == {tuple(rows[0])}, "the columns never change"
    assert calls[-1][2]["error"].endswith("SECRET")


def test_the_rows_worth_a_look_hold_the_extremes_and_one_whole_group(tmp_path):
    from trainer.tracking.samples import worth_a_look

    rows = [trajectory(group, tokens) for group, tokens in [(1, 5), (1, 9), (2, 4), (2, 6), (3, 7), (3, 8)]]
    for step in range(20):
        found = worth_a_look(step, rows, decode, gaps=[0.1, 0.2, 0.3, math.inf, 0.1, 0.0])
        assert [(r["why"], r["tokens"]) for r in found[:3]] == [("shortest", "4"), ("longest", "9"), ("worst gap", "6")]
        assert len(found) == 5
        assert len({r["group"] for r in found[3:]}) == 1
    groups = {worth_a_look(step, rows, decode)[-1]["group"] for step in range(20)}
    assert groups == {"1", "2", "3"}, "every group has its turn"
    assert worth_a_look(1, [], decode) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("wandbb", "is no tracker: use wandb, tensorboard"), (":A", "is no tracker"), ("a:b.c", "is no tracker")],
)
def test_a_tracker_that_does_not_exist_is_refused_with_the_names_that_do(name, message):
    with pytest.raises(ValueError, match=message):
        TrackingConfig(to=(name,))


def test_a_tracker_whose_package_is_missing_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("trainer.tracking.backend.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="no module mlflow: pip install mlflow, or leave it out"):
        maker("mlflow")
    with pytest.raises(ValueError, match="no module mine: put its file next to the recipe"):
        maker("mine:Tracker")


@pytest.mark.slow
def test_no_tracker_is_imported_before_it_is_named(tmp_path):
    program = (
        "import sys; from pathlib import Path; from rl.config import TrackingConfig\n"
        "from trainer.tracking.tracker import RunTracker\n"
        "config = TrackingConfig(to=())\n"
        f"RunTracker(folder=Path({str(tmp_path)!r}), config=config, name='t', settings={{}}).close({{}})\n"
        "print(sorted({'wandb', 'mlflow', 'trackio', 'swanlab', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- failures ----------------------------------------------------------------------------------------------------------


def failing(call, how):
    """A class of trackers whose `call` fails."""

    def fails(self, *_, **__):
        if how == "raises":
            raise RuntimeError("gone")
        if how == "exits":
            sys.exit("no key")
        if how == "disk full":
            raise OSError(errno.ENOSPC, "No space left on device")
        threading.Event().wait(60)

    return type("Failing", (Everything,), {call: fails})


@pytest.mark.parametrize("how", ["raises", "exits", "disk full", "hangs"])
@pytest.mark.parametrize("call", sorted(WHAT))
def test_a_tracker_that_fails_costs_one_warning_and_the_others_go_on(tmp_path, call, how):
    trackers = {"bad": failing(call, how), "good": Everything}
    began = time.perf_counter()
    # A hanging `begin` or `end` costs the seconds that the setting gives to it, after the last step.
    tracker = record(tmp_path, trackers=trackers, upload_samples=True, end_s=0.8)
    seconds = time.perf_counter() - began
    assert [a["title"] for a in tracker.alerts if a["title"] != "a title"] == ["bad takes no more metrics"]
    good = [c for c in Everything.made[-1].calls if c[:3] != ("alert", 3, "bad takes no more metrics")]
    assert [c[0] for c in good if c[0] != "alert"] == ["begin", "log", "log", "table", "log", "log", "table", "end"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [0.0, 1.0, 2.0, 3.0]
    assert seconds < 10, "a hang lasts 60 s"


@pytest.mark.serial
@pytest.mark.parametrize("how", ["raises", "disk full", "hangs"])
@pytest.mark.parametrize("call", sorted(WHAT))
def test_a_tracker_that_fails_costs_at_most_one_second(tmp_path, call, how):
    began, end_s = time.perf_counter(), 0.8 if call in ("begin", "end") else 60.0
    record(tmp_path, trackers={"bad": failing(call, how)}, upload_samples=True, end_s=end_s)
    assert time.perf_counter() - began <= 1.0


def test_steps_never_wait_for_a_tracker_that_hangs(tmp_path):
    go = threading.Event()

    class Slow(Everything):
        def begin(self, run):
            go.wait()

    tracker = RunTracker(folder=tmp_path, config=TrackingConfig(to=()), name="t", settings={}, trackers={"slow": Slow})
    for step in range(5):
        tracker.log(step, {"a": 0.0})
    assert Everything.made[-1].calls == []
    go.set()
    tracker.close({"status": "finished"})
    assert [c[0] for c in Everything.made[-1].calls] == ["log"] * 5 + ["end"], "what had waited arrives"
    assert tracker.alerts == []


def test_trackers_begin_when_they_may_and_one_that_is_insisted_on_at_once(tmp_path, monkeypatch):
    made, go = threading.Event(), threading.Event()

    class Late(Everything):
        def __init__(self) -> None:
            super().__init__()
            made.set()

    def tracker(**config):
        config = TrackingConfig(to=(), **config)
        return RunTracker(folder=tmp_path, config=config, name="t", settings={}, trackers={"late": Late}, go=go)

    one = tracker()
    one.log(1, {"a": 0.0})
    assert one.guards[0]._thread.is_alive()
    assert not made.is_set()
    go.set()
    one.close({"status": "finished"})
    assert [c[0] for c in Everything.made[-1].calls] == ["begin", "log", "end"]
    made.clear()
    go.clear()
    monkeypatch.setattr(trackers, "insists", lambda _: True)
    two = tracker()
    assert made.wait(60)
    two.close({})


def test_a_hang_is_reported_during_the_run_and_costs_nothing_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "SLOW_S", 0.0)
    tracker = RunTracker(
        folder=tmp_path, config=TrackingConfig(to=()), name="t", settings={}, trackers={"bad": failing("log", "hangs")}
    )
    step = 0
    while not tracker.alerts:
        tracker.log(step := step + 1, {"a": 0.0})
        assert step < 1_000_000
    assert "has not returned for" in tracker.alerts[0]["text"]
    tracker.close({})
    assert len(tracker.alerts) == 1


def test_a_tracker_that_is_too_slow_keeps_a_bounded_number_of_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "MOST_WAITING", 10)
    tracker = RunTracker(
        folder=tmp_path,
        config=TrackingConfig(to=()),
        name="t",
        settings={},
        trackers={"bad": failing("begin", "hangs")},
    )
    for step in range(30):
        tracker.log(step, {"a": 0.0})
    assert [a["title"] for a in tracker.alerts] == ["bad takes no more metrics"]
    assert "10 calls wait for it" in tracker.alerts[0]["text"]
    assert tracker.guards[0]._calls.qsize() == 10
    tracker.close({})


PACKAGES = {
    "wandb": ("wandb", "init"),
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter"),
    "mlflow": ("mlflow", "MlflowClient"),
    "trackio": ("trackio", "init"),
    "swanlab": ("swanlab", "init"),
}
"""By tracker: what is imported to begin, and what is called first."""


@pytest.mark.serial
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_cannot_be_imported_costs_one_warning_and_at_most_one_second(tmp_path, monkeypatch, name):
    monkeypatch.setattr("trainer.tracking.backend.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, PACKAGES[name][0], None)
    began = time.perf_counter()
    tracker = record(tmp_path, to=(name,), upload_samples=True, end_s=0.8)
    assert time.perf_counter() - began <= 1.0
    assert [a["title"] for a in tracker.alerts if a["title"] != "a title"] == [f"{name} takes no more metrics"]
    assert "ModuleNotFoundError" in tracker.alerts[-1]["text"] + tracker.alerts[0]["text"]


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("how", ["raises", "exits", "disk full", "hangs"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in PACKAGES])
def test_a_real_package_that_fails_costs_one_warning_and_at_most_one_second(tmp_path, monkeypatch, name, how):
    package, first = PACKAGES[name]
    monkeypatch.setattr(importlib.import_module(package), first, failing("fails", how)().fails)
    began = time.perf_counter()
    tracker = record(tmp_path, to=(name,), wandb="offline", upload_samples=True, end_s=0.8)
    assert time.perf_counter() - began <= 1.0
    assert [a["title"] for a in tracker.alerts if a["title"] != "a title"] == [f"{name} takes no more metrics"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    same({int(row["step"]): row for row in rows})


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in PACKAGES])
def test_a_disk_that_fills_up_under_a_real_tracker_costs_one_warning_at_most(tmp_path, name):
    folder = tmp_path / "run"
    tracker = RunTracker(
        folder=folder, config=TrackingConfig(to=(name,), upload_samples=True), name="t", settings={"a": 1}
    )
    tracker.log(1, {"reward/mean": 0.5})
    (guard,) = tracker.guards
    assert guard.begun.wait(300)
    while guard._calls.qsize() or guard._running:
        time.sleep(0.01)
    with full_beyond(max(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())):
        began = time.perf_counter()
        for step in range(2, 200):
            tracker.log(step, {f"a/{i}": float(i) for i in range(40)})
        seconds = time.perf_counter() - began
        tracker.close({"status": "finished"})
    titles = [a["title"] for a in tracker.alerts if "jsonl" not in a["title"]]
    titles = [title for title in titles if "is not online" not in title]  # it says so here, with or without a disk
    assert titles in ([], [f"{name} takes no more metrics"]), tracker.alerts
    assert seconds < 10
    tracker.write_waiting()
    assert len(tracker.history) == 199


# -- the same run through every tracker --------------------------------------------------------------------------------


def test_the_files_hold_the_run(tmp_path):
    record(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    same({int(row["step"]): row for row in rows})


def records_of_wandb(path):
    """The records in W&B's file: blocks of 32 KiB, in which each piece has a checksum, a length and a kind (whole,
    first, middle, last) in front; as in the log of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            item = wandb_internal_pb2.Record()
            item.ParseFromString(parts)
            parts = b""
            yield item


@pytest.mark.slow
def test_wandb_offline_holds_the_run(tmp_path, patient):
    tracker = record(
        tmp_path,
        to=("wandb",),
        wandb="offline",
        upload_samples=True,
        artifacts="small",
        group="g",
        tags=("x",),
        notes="n",
    )
    assert [a["title"] for a in tracker.alerts] == ["a title"], tracker.alerts
    (path,) = (tmp_path / "wandb").rglob("*.wandb")
    # W&B's own process writes the file, and on a busy machine it is not done when `finish` returns.
    deadline = time.monotonic() + 300
    while "exit" not in (kinds := [item.WhichOneof("record_type") for item in records_of_wandb(path)]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rows, items = {}, list(records_of_wandb(path))
    for item in items:
        values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in item.history.item}
        if "step" in values:
            rows.setdefault(int(values["step"]), {}).update(values)
    same({step: {k: math.nan if v == "NaN" else v for k, v in row.items()} for step, row in rows.items()})
    assert [item.alert.title for item in items if item.HasField("alert")] == ["a title"]
    run = next(item.run for item in items if item.HasField("run"))
    assert (run.run_group, list(run.tags), run.notes, run.run_id) == ("g", ["x"], "n", tracker.id)
    metrics = {item.metric.glob_name: item.metric for item in items if item.HasField("metric")}
    assert metrics["*"].step_metric == "step"
    assert metrics["reward/*"].summary.max
    assert rows[2]["histogram/length/_type"] == "histogram", rows[2].keys()
    assert rows[2]["samples/_type"] == "table-file"
    assert rows[2]["samples/nrows"] == 3
    assert "artifact" in kinds


class OnlineWandb:
    """What `wandb.init` returns, for a server that takes everything."""

    offline, entity, project = False, "me", "p"

    def __init__(self):
        self.summary, self.used, self.kept, self.ended = {}, [], [], []

    def define_metric(self, *names, **more):
        pass

    def log(self, row):
        pass

    def alert(self, **more):
        pass

    def use_artifact(self, artifact):
        self.used.append((artifact.type, artifact.name, dict(artifact.metadata)))

    def log_artifact(self, artifact):
        self.kept.append((artifact.type, sorted(artifact.manifest.entries)))

    def finish(self, exit_code):
        self.ended.append(exit_code)


@pytest.mark.slow
@pytest.mark.parametrize("artifacts", ["none", "small", "model"])
def test_wandb_online_keeps_the_files_that_were_asked_for_and_what_the_run_began_with(
    tmp_path, monkeypatch, patient, artifacts
):
    import wandb

    online, views = OnlineWandb(), []
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr(wandb, "init", lambda **given: online)
    fakes = {name: ModuleType(f"wandb_workspaces{name}") for name in ("", ".workspaces", ".reports", ".reports.v2")}
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, f"wandb_workspaces{name}", module)
    fakes[".reports.v2"].LinePlot = fakes[".workspaces"].Section = lambda **given: given
    fakes[".workspaces"].Workspace = lambda **given: SimpleNamespace(save=lambda: views.append(given))
    monkeypatch.setattr("trainer.tracking.wandb_files.find_spec", lambda name: True)
    for number in (1, 2):
        folder = tmp_path / f"run{number}"
        (folder / "model").mkdir(parents=True)
        for name in ("config.json", "summary.json", "model/README.md", "model/model.safetensors", "samples.jsonl"):
            (folder / name).write_text(name)
        tracker = RunTracker(
            folder=folder,
            config=TrackingConfig(to=("wandb",), artifacts=artifacts, end_s=300.0),
            name="t",
            settings={},
            inputs={"model": "models/a b", "dataset": "0123"},
        )
        tracker.close({"status": "failed", "reward_last": 0.5})
        assert tracker.alerts == []
    small = ("run", ["README.md", "config.json", "summary.json"])
    model = ("model", ["README.md", "model.safetensors"])
    wanted = {"none": [], "small": [small], "model": [small, model]}[artifacts]
    assert online.kept == wanted * 2
    used = [("model", "models-a-b", {"model": "models/a b"}), ("dataset", "0123", {"dataset": "0123"})]
    assert online.used == (used * 2 if wanted else [])
    assert online.ended == [1, 1]
    assert online.summary["reward_last"] == 0.5
    assert [(v["name"], v["entity"], v["project"]) for v in views] == [("unison overview 1", "me", "p")], "made once"


@needs("tensorboard")
@pytest.mark.slow
def test_tensorboard_holds_the_run(tmp_path, patient):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    record(tmp_path, to=("tensorboard",), upload_samples=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0, "histograms": 0}).Reload()
    rows = {}
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            value = tensor_util.make_ndarray(event.tensor_proto)
            rows.setdefault(event.step, {})[tag.removesuffix("/text_summary")] = (
                value.item() if value.size == 1 else value
            )
    same(rows)
    assert rows[1]["alerts"] == b"**a title** a text"
    assert rows[2]["samples"].count(b"\n") == 4, "a head, its line, and 3 rows"
    assert [h.histogram_value.num for h in events.Histograms("histogram/length")] == [2.0]


@needs("mlflow")
@pytest.mark.slow
def test_mlflow_holds_the_run_and_continues_it(tmp_path, patient):
    from mlflow import MlflowClient

    def at(name):
        return name.replace("@", "_at_").replace("(", "_").replace(")", "_")

    tracker = record(tmp_path / "run", to=("mlflow",), upload_samples=True)
    assert [a["title"] for a in tracker.alerts] == ["a title"], tracker.alerts
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'unison-rl'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params["rollout.top_p"]) == ("FINISHED", "0.5")
    rows = {}
    for name in run.data.metrics:
        for m in client.get_metric_history(run.info.run_id, name):
            rows.setdefault(m.step, {})[name] = m.value
    same(rows, lambda metrics: {at(name): value for name, value in metrics.items()})
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"samples", "doctor", "summary.json"}
    assert any(text == "a text" for text in run.data.tags.values())
    again = RunTracker(
        folder=tmp_path / "run",
        config=TrackingConfig(to=("mlflow",)),
        name="t",
        settings={},
        id=tracker.id,
        history=[{"step": 3.0}],
    )
    again.log(4, {"reward/mean": 0.5})
    again.close({"status": "finished"})
    assert len(client.search_runs([experiment.experiment_id])) == 1
    assert client.get_metric_history(run.info.run_id, "reward/mean")[-1].step == 4


@needs("trackio")
@pytest.mark.slow
def test_trackio_holds_the_run(tmp_path):
    # In a process of its own: Trackio decides where its files are when it is imported.
    program = (
        f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
        "import json, pathlib, test_trackers as t\n"
        "t.guards.CALL_S = 300.0\n"
        f"tracker = t.record(pathlib.Path({str(tmp_path / 'run')!r}), to=('trackio',), upload_samples=True)\n"
        "assert [a['title'] for a in tracker.alerts] == ['a title'], tracker.alerts\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "rows = SQLiteStorage.get_logs('unison-rl', f't-{tracker.id}')\n"
        "alerts = SQLiteStorage.get_alerts('unison-rl')\n"
        "print('ROWS' + json.dumps([rows, alerts], default=str))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=os.path.dirname(__file__)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logs, alerts = json.loads(done.stdout.partition("ROWS")[2])
    rows = {}
    for row in logs:
        values = {k: {"NaN": math.nan}.get(v, v) if isinstance(v, str) else v for k, v in row.items()}
        rows.setdefault(row["step"], {}).update(values)
    same(rows)
    assert {a["title"] for a in alerts} == {"a title", "finished"}
    assert rows[2]["samples"]["_type"] == "trackio.table"


def fake_swanlab(calls):
    def init(**given):
        calls.append(("init", given))
        run = SimpleNamespace(
            log=lambda values, step: calls.append(("log", step, values)),
            finish=lambda state, error=None: calls.append(("finish", state, error)),
        )
        return run

    return SimpleNamespace(init=init, Text=lambda text: ("text", text))


@pytest.mark.parametrize(
    ("status", "end"), [("finished", "success"), ("failed", "crashed"), ("interrupted", "aborted")]
)
def test_swanlab_holds_the_run_and_asks_for_no_key(tmp_path, monkeypatch, status, end):
    calls = []
    monkeypatch.setitem(sys.modules, "swanlab", fake_swanlab(calls))
    monkeypatch.setattr("trainer.tracking.backend.find_spec", lambda name: True)
    tracker = record(tmp_path, to=("swanlab",), status=status, upload_samples=True)
    assert sorted(a["title"] for a in tracker.alerts) == ["a title", "swanlab is not online"]
    rows = {}
    for _, step, values in (c for c in calls if c[0] == "log"):
        rows.setdefault(step, {}).update(values)
    same(rows)
    assert rows[1]["alerts"] == ("text", "a title. a text")
    assert "t2 t3 t4" in rows[2]["samples"][1]
    assert calls[0][1]["mode"] == "offline"
    assert calls[0][1]["config"]["rollout.top_p"] == "0.5"
    assert calls[-1][1] == end
    monkeypatch.setenv("SWANLAB_API_KEY", "k")
    record(tmp_path / "2", to=("swanlab",))
    online = [c for c in calls if c[0] == "init"][-1][1]
    assert (online["mode"], len(online["id"]), online["resume"]) == ("online", 21, "allow")


@needs("swanlab")
@pytest.mark.slow
def test_swanlab_itself_takes_the_run_offline(tmp_path, patient):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    tracker = record(tmp_path, to=("swanlab",), upload_samples=True)
    assert sorted(a["title"] for a in tracker.alerts) == ["a title", "swanlab is not online"]
    (path,) = (tmp_path / "swanlog").rglob("*.swanlab")
    reader, rows, texts = DataStoreReader(), {}, set()
    reader.open(path)
    for data in reader:
        item = Record()
        item.ParseFromString(data)
        if item.HasField("scalar"):
            rows.setdefault(item.scalar.step, {})[item.scalar.key] = item.scalar.value.number
        elif item.HasField("media"):
            texts.add((item.media.step, item.media.key))
    same(rows)
    assert texts >= {(1, "alerts"), (2, "samples"), (3, "doctor")}
