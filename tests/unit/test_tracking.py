"""What a run writes down: W&B's mode, rows, samples, summary, plot, and the folder it all goes to."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import wandb

from rl.config import Config, RolloutConfig, TrackingConfig
from rl.filters import Difficulty
from rl.objectives import GRPO, GSPO
from rl.parity.watch import Watch
from rl.protocols import Tracker
from rl.types import Data, Trajectory
from trainer.pages.curves import plot
from trainer.runs.files import make_folder, write_json
from trainer.runs.settings import config_digest, resolved
from trainer.tracking.tracker import RunTracker
from trainer.tracking.wandb_mode import wandb_mode
from trainer.tracking.wandb_run import Run as WandbRun


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))


def test_auto_is_offline_without_a_key_and_online_with_one(monkeypatch, tmp_path):
    auto = TrackingConfig()
    assert wandb_mode(auto) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode(auto) == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine example.org login a password b\n")
    netrc.chmod(0o600)
    assert wandb_mode(auto) == "offline"
    netrc.write_text("machine api.wandb.ai login user password k\n")
    assert wandb_mode(auto) == "online"


def test_the_environment_decides_auto_and_a_setting_decides_over_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode(TrackingConfig()) == "disabled"
    assert wandb_mode(TrackingConfig(wandb="online")) == "online"
    assert wandb_mode(TrackingConfig(wandb="offline")) == "offline"
    assert wandb_mode(TrackingConfig(wandb="off")) == "disabled"


def test_a_key_of_the_server_in_use_counts_wherever_the_file_of_logins_is(monkeypatch, tmp_path):
    elsewhere = tmp_path / "logins"
    elsewhere.write_text("machine wandb.example.org login user password k\n")
    elsewhere.chmod(0o600)
    monkeypatch.setenv("NETRC", str(elsewhere))
    assert wandb_mode(TrackingConfig()) == "offline", "a key of another server"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/api")
    assert wandb_mode(TrackingConfig()) == "online"


def broken_netrc(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "not text":
        path.write_bytes(b"machine \xff\xfe login")
    elif kind == "no netrc":
        path.write_text("machine\n")
    else:
        path.symlink_to(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "not text", "no netrc", "circle"])
def test_a_file_of_logins_that_cannot_be_read_is_an_alert_and_no_key(tmp_path, kind):
    broken_netrc(tmp_path / "home" / ".netrc", kind)
    assert wandb_mode(TrackingConfig()) == "offline"
    tracker = RunTracker(folder=tmp_path / "run", config=TrackingConfig(wandb="auto"), name="t", settings={})
    tracker.close({})
    assert [alert["title"] for alert in tracker.alerts] == ["W&B is not online"]
    assert "~/.netrc cannot be read" in tracker.alerts[0]["text"]


def test_a_mode_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ValueError, match="WANDB_MODE='onlin' is not one of online, offline, disabled"):
        wandb_mode(TrackingConfig())


@pytest.fixture
def server_away(monkeypatch):
    """W&B's `init`, for a server that does not answer; the modes that it was asked for."""
    asked = []

    def init(*, mode, settings, **_):
        asked.append((mode, settings.init_timeout))
        if mode == "online":
            raise wandb.errors.CommError("Timed out\nConsider increasing init_timeout")
        return SimpleNamespace(
            offline=True,
            define_metric=lambda *_, **__: None,
            alert=lambda **_: None,
            summary={},
            finish=lambda exit_code: None,
        )

    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr(wandb, "init", init)
    return asked


def test_a_server_that_is_away_puts_auto_offline_within_10_seconds_with_an_alert(server_away, tmp_path, capsys):
    tracker = RunTracker(folder=tmp_path, config=TrackingConfig(), name="t", settings={})
    tracker.close({})
    assert [mode for mode, _ in server_away] == ["online", "offline"]
    assert server_away[0][1] <= 10
    assert [alert["title"] for alert in tracker.alerts] == ["W&B is not online"]
    printed = capsys.readouterr().out
    assert "(CommError: Timed out). Send it later: wandb sync" in printed


def test_a_server_that_is_away_ends_online_with_one_message(server_away, tmp_path):
    with pytest.raises(ValueError, match=r"W&B must be online .*: CommError: Timed out\. Use --tracking\.wandb auto"):
        RunTracker(folder=tmp_path, config=TrackingConfig(wandb="online"), name="t", settings={})
    assert [mode for mode, _ in server_away] == ["online"]


def test_wandb_that_cannot_even_begin_offline_is_an_alert(monkeypatch, tmp_path):
    def init(**_):
        raise PermissionError("wandb-core")

    monkeypatch.setattr(wandb, "init", init)
    for mode in ("auto", "offline"):
        tracker = RunTracker(folder=tmp_path / mode, config=TrackingConfig(wandb=mode), name="t", settings={})
        tracker.close({})
        assert [alert["title"] for alert in tracker.alerts] == ["wandb takes no more metrics"]
        assert "no W&B run could be begun (PermissionError: wandb-core)" in tracker.alerts[0]["text"]


def tracker_of(folder, **settings):
    config = TrackingConfig(wandb="off", **settings)
    return RunTracker(folder=folder, config=config, name="t", settings={})


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_each_step_is_a_row_of_json_at_once_with_null_for_nan(tmp_path):
    tracker = tracker_of(tmp_path)
    tracker.log(1, {"reward/mean": 0.5, "actor/entropy": math.nan})
    tracker.log(2, {"reward/mean": 0.75, "actor/entropy": math.inf})
    # Not closed yet: a killed run must leave its rows.
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1.0, "reward/mean": 0.5, "actor/entropy": None},
        {"step": 2.0, "reward/mean": 0.75, "actor/entropy": None},
    ]
    assert math.isnan(tracker.history[0]["actor/entropy"]), "memory keeps what the file cannot hold"
    tracker.close({"status": "finished"})


GAP = "rollout_corr/logprob_abs_diff_mean"


def test_an_alert_reaches_the_file_the_terminal_and_wandb(tmp_path, capsys):
    told = []

    class Wandb(WandbRun):
        def begin(self, run):
            self.run = SimpleNamespace(log=lambda row: None, alert=lambda **given: told.append(given))

        def end(self, status, summary):
            pass

    tracker = RunTracker(
        folder=tmp_path, config=TrackingConfig(to=()), name="t", settings={}, trackers={"wandb": Wandb}
    )
    tracker.watch = Watch(config_of(dtype="float32"))
    tracker.log(1, {GAP: 5e-6})
    assert not (tmp_path / "alerts.jsonl").exists()
    for step, gap in ((2, 0.25), (3, math.nan), (4, 0.0), (5, math.nan)):
        tracker.log(step, {GAP: gap})
    tracker.close({})
    rows = lines(tmp_path / "alerts.jsonl")
    assert rows == tracker.alerts
    assert [row["step"] for row in rows] == [2, 5]
    assert rows[0]["title"] == f"{GAP} left its range"
    assert rows[0]["text"].startswith("It is 0.25, above 1e-05.")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"alert at step {row['step']}: {row['title']}. {row['text']}" for row in rows]
    assert told == [{"title": r["title"], "text": f"Step {r['step']}: {r['text']}", "level": "WARN"} for r in rows]
    assert all(len(each["title"]) < 64 for each in told), "W&B's limit"


def test_the_tracker_of_a_run_has_the_calls_that_the_loop_makes(tmp_path):
    assert isinstance(tracker_of(tmp_path), Tracker)


def test_a_tracker_without_a_watch_raises_no_alert(tmp_path, capsys):
    tracker = tracker_of(tmp_path)
    tracker.log(1, {GAP: math.nan})
    assert tracker.alerts == []
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_wandb_takes_an_alert_offline(tmp_path):
    tracker = RunTracker(folder=tmp_path, config=TrackingConfig(wandb="offline"), name="t", settings={})
    tracker.alert(1, "rollout_corr/kl left its range", "It is nan, in no range.")
    tracker.close({"status": "finished"})
    assert len(lines(tmp_path / "alerts.jsonl")) == 1
    # W&B's own process writes the file, and on a busy machine it is not done when `finish` returns.
    deadline = time.monotonic() + 300
    while b"rollout_corr/kl left its range" not in recorded_by_wandb(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def recorded_by_wandb(folder):
    return b"".join(p.read_bytes() for p in (folder / "wandb").rglob("*.wandb"))


def trajectory(group, logprob=-1.0):
    return Trajectory(
        group=group,
        token_ids=[1, 2, 3, 4, 5],
        mask=[False, True, False, True, True],
        logprobs=[0.0, -0.5, 0.0, -0.25, logprob],
        versions=[-1, 3, -1, 4, 4],
        reward=0.5,
        finish_reason="length",
    )


def test_a_few_samples_of_each_step_are_kept_as_text(tmp_path):
    tracker = tracker_of(tmp_path, samples_per_step=2)
    tracker.samples(7, [trajectory(g) for g in (10, 11, 12)], lambda ids: "".join(map(str, ids)))
    rows = lines(tmp_path / "samples.jsonl")
    assert [row["prompt_ordinal"] for row in rows] == [10, 11]
    assert rows[0] == {
        "step": 7,
        "prompt_ordinal": 10,
        "prompt": "1",
        "reply": "2345",
        "reward": 0.5,
        "finish_reason": "length",
        "versions": [3, 4],
    }
    tracker.close({})


def test_every_broken_sample_is_kept_with_its_numbers(tmp_path):
    tracker = tracker_of(tmp_path, samples_per_step=1)
    tracker.samples(-1, [trajectory(10), trajectory(10, math.nan)], lambda ids: "")
    rows = lines(tmp_path / "samples.jsonl")
    assert [row["logprobs"][-1] for row in rows] == ["-1.0", "nan"]
    assert rows[0]["token_ids"] == [2, 4, 5]
    tracker.close({})


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"status": "failed"})
    with pytest.raises(TypeError):
        write_json(path, {"status": "finished", "bad": object()})
    assert json.loads(path.read_text()) == {"status": "failed"}
    write_json(path, {"status": "finished"})
    assert json.loads(path.read_text()) == {"status": "finished"}
    assert [p.name for p in tmp_path.glob("summary*")] == ["summary.json"]


@pytest.mark.slow
def test_the_curves_of_a_run_become_a_png(tmp_path):
    history = [{"step": 0.0, "eval/held/avg@1": 0.2, "eval/held/avg@1_se": 0.05}]
    history += [{"step": float(s), "reward/mean": 0.1 * s, "actor/entropy": math.nan} for s in (1, 2, 3)]
    plot(history, tmp_path / "curves.png", "title")
    drawn = (tmp_path / "curves.png").read_bytes()
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
    plot([{"step": 0.0}], tmp_path / "empty.png", "title")
    assert len(drawn) > len((tmp_path / "empty.png").read_bytes()) > 1000, "there are curves in it"


def config_of(**settings):
    return Config(name="t", model="m", data=make_data, reward=len, **settings)


def make_data():
    return Data(train=[])


def test_the_config_digest_differs_when_any_setting_does():
    base = config_of()
    variants = [
        base,
        replace(base, seed=1),
        replace(base, reward=sum),
        replace(base, objective=GRPO()),
        replace(base, objective=GSPO(kl_coef=0.1)),
        replace(base, rollout=RolloutConfig(max_tokens=255)),
    ]
    digests = [config_digest(resolved(c)) for c in variants]
    assert len(set(digests)) == len(variants)
    assert config_digest(resolved(config_of())) == digests[0]


def test_a_resolved_config_is_plain_json_with_functions_by_name():
    settings = resolved(config_of(objective=GSPO(clip_high=5e-4), filters=(Difficulty(low=0.2),)))
    assert json.loads(json.dumps(settings)) == settings
    assert settings["reward"] == "builtins.len"
    assert settings["data"].endswith(".make_data")
    assert settings["objective"]["type"] == "GSPO"
    assert settings["objective"]["clip_high"] == 5e-4
    assert settings["filters"] == [{"type": "Difficulty", "low": 0.2, "high": 0.9}]


def test_a_run_never_writes_into_the_folder_of_another(tmp_path):
    wanted, got = tmp_path / "runs" / "quick.start", []
    for _ in range(3):
        got.append(make_folder(wanted))
    assert [p.name for p in got] == ["quick.start", "quick.start-2", "quick.start-3"]
    assert {p.parent for p in got} == {tmp_path / "runs"}


def test_runs_of_one_name_that_start_at_once_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: make_folder(tmp_path / "runs" / "echo"), range(8)))
    assert len(set(folders)) == 8
    assert all(folder.is_dir() for folder in folders)
