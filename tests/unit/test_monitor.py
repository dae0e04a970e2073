"""`/health` and `/metrics`: figures under our names, 503 when steps stop, a token where others can connect."""

import json
import re
from http.client import HTTPConnection
from pathlib import Path

import pytest

from rl.config import Config
from rl.types import Data
from trainer.tracking.monitor import Monitor

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^(# TYPE [a-zA-Z_][a-zA-Z0-9_]* gauge|[a-zA-Z_][a-zA-Z0-9_]*\{[^}]*\} \S+)$")


def get(monitor: Monitor, path: str, token: str = "") -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", monitor.port, timeout=10)
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture
def monitor(monkeypatch):
    monkeypatch.delenv("UNISON_METRICS_TOKEN", raising=False)
    one = Monitor("127.0.0.1", 0, deadline_s=60.0, name='a "run"')
    yield one
    one.close({})


def test_the_last_step_and_the_engines_are_served_as_prometheus_reads_them(monitor):
    monitor.log(3, {"reward/mean": 0.5, "loss": float("nan")})
    monitor.alert(3, "t", "x")
    monitor.engines = lambda: [{"samples": 4.0, "restarts": 0.0}, {"samples": 0.0, "restarts": 2.0}]
    status, text = get(monitor, "/metrics")
    assert status == 200
    assert all(LINE.match(line) for line in text.splitlines()), text
    assert 'unison_reward_mean{run="a \\"run\\""} 0.5' in text
    assert 'unison_engine_restarts{run="a \\"run\\"",engine="1"} 2.0' in text
    assert "unison_alerts" in text
    assert "unison_loss" not in text, "Prometheus has no use for a NaN"


def test_health_is_503_once_no_step_ends_within_the_deadline(monitor):
    assert get(monitor, "/health")[0] == 200
    monitor.at -= 61
    status, text = get(monitor, "/health")
    assert status == 503
    assert "deadline 60 s" in text
    monitor.log(1, {})
    assert get(monitor, "/health")[0] == 200
    assert get(monitor, "/else")[0] == 404


def test_beyond_loopback_a_token_is_needed(monkeypatch):
    monkeypatch.delenv("UNISON_METRICS_TOKEN", raising=False)
    one = Monitor("0.0.0.0", 0, deadline_s=60.0, name="r")
    try:
        assert one.made
        assert [get(one, "/metrics")[0], get(one, "/health", "wrong")[0], get(one, "/health", one.made)[0]] == [
            401,
            401,
            200,
        ]
    finally:
        one.close({})
    monkeypatch.setenv("UNISON_METRICS_TOKEN", "given")
    one = Monitor("127.0.0.1", 0, deadline_s=60.0, name="r")
    try:
        assert (one.made, get(one, "/metrics")[0], get(one, "/metrics", "given")[0]) == ("", 401, 200)
    finally:
        one.close({})


def test_it_listens_nowhere_unless_it_is_asked_to():
    config = Config(name="r", model="m", data=Data(train=[]), reward=lambda _: 0.0)
    assert (config.tracking.metrics_port, config.tracking.metrics_host) == (None, "127.0.0.1")


def test_the_dashboard_shows_metrics_that_exist():
    board = json.loads((ROOT / "docs" / "data" / "grafana.json").read_text())
    asked = set(re.findall(r"unison_\w+", json.dumps(board)))
    documented = set(re.findall(r"`([a-z_]+/[a-z_0-9@/]+|step)`", (ROOT / "docs" / "metrics.md").read_text()))
    known = {"unison_" + re.sub(r"[^a-zA-Z0-9_]", "_", name) for name in documented}
    known |= {f"unison_engine_{name}" for name in ("samples", "restarts", "lost")}
    assert asked <= known | {"unison_seconds_since_step", "unison_alerts", "unison_step"}
    assert len(board["panels"]) >= 8
