"""Is the run alive, and what are its figures now? `/health` and `/metrics`, for probes and for Prometheus."""

import hmac
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rl.config import Config
from trainer.tracking.terminal import console

TOKEN = "UNISON_METRICS_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Engines = Callable[[], list[dict[str, float]]]


class Monitor:
    """`rl.protocols.Tracker` that serves what it last got. It listens from the start; on another address than loopback
    it asks for the token of UNISON_METRICS_TOKEN, or one that it makes."""

    def __init__(self, host: str, port: int, *, deadline_s: float, name: str) -> None:
        """Raises OSError where it cannot listen. `deadline_s` is the time in which a step must end."""
        self.deadline_s, self.name = deadline_s, name
        self.row: dict[str, float] = {}
        self.alerts = 0
        self.at = time.monotonic()
        self.engines: Engines = list
        """Figures of each engine now."""
        given = os.environ.get(TOKEN, "")
        self.token = given or ("" if host in LOOPBACK else secrets.token_urlsafe(24))
        self.made = self.token if not given else ""
        self.server = ThreadingHTTPServer((host, port), type("Handler", (_Answer,), {"monitor": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, name="metrics", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.server_address[1]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A step has ended."""
        self.row, self.at = {"step": float(step), **metrics}, time.monotonic()

    def alert(self, step: int, title: str, text: str) -> None:
        """Count it."""
        self.alerts += 1

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Not served."""

    def samples(self, step: int, trajectories: Any, decode: Any) -> None:
        """Not served."""

    def close(self, summary: dict[str, Any]) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()

    def health(self) -> tuple[int, str]:
        """200 while steps end within their deadline, else 503; and since when none has."""
        seconds = time.monotonic() - self.at
        late = seconds > self.deadline_s
        return (503 if late else 200), f"the last step ended {seconds:.0f} s ago (deadline {self.deadline_s:g} s)\n"

    def metrics(self) -> str:
        """All figures of the last step, and of each engine now, as Prometheus reads them."""
        run = f'run="{_quoted(self.name)}"'
        lines = []
        now = {"seconds_since_step": time.monotonic() - self.at, "alerts": float(self.alerts), **self.row}
        for name, value in sorted(now.items()):
            if math.isfinite(value):
                lines += [f"# TYPE {_named(name)} gauge", f"{_named(name)}{{{run}}} {value!r}"]
        engines = self.engines()
        for name in sorted({name for each in engines for name in each}):
            lines.append(f"# TYPE {_named('engine/' + name)} gauge")
            lines += [f'{_named("engine/" + name)}{{{run},engine="{i}"}} {e[name]!r}' for i, e in enumerate(engines)]
        return "\n".join(lines) + "\n"


def monitor_of(config: Config) -> Monitor | None:
    """The monitor that a run asks for. Raises ValueError where it cannot listen."""
    wanted, deadlines = config.tracking, config.deadlines
    if wanted.metrics_port is None:
        return None
    # What is later than this has ended the run by itself, unless the driver hangs.
    longest = deadlines.sample_s + deadlines.step_s + deadlines.sync_s
    return serve(wanted.metrics_host, wanted.metrics_port, deadline_s=longest, name=config.name)


def serve(host: str, port: int, *, deadline_s: float, name: str) -> Monitor:
    """Begin to serve, and print where. Raises ValueError where it cannot listen."""
    try:
        monitor = Monitor(host, port, deadline_s=deadline_s, name=name)
    except OSError as error:
        raise ValueError(f"tracking.metrics_port={port} cannot be used on {host} ({error}): choose another") from error
    token = f", token {monitor.made}" if monitor.made else ""
    console.print(f"metrics: http://{host}:{monitor.port}/metrics, /health{token}", highlight=False, markup=False)
    return monitor


class _Answer(BaseHTTPRequestHandler):
    monitor: Monitor

    def do_GET(self) -> None:
        """Answer /health and /metrics."""
        wanted = f"Bearer {self.monitor.token}"
        given = self.headers.get("Authorization", "")
        if self.monitor.token and not hmac.compare_digest(given.encode(), wanted.encode()):
            self._send(401, "needs the header Authorization: Bearer TOKEN\n")
        elif self.path == "/health":
            self._send(*self.monitor.health())
        elif self.path == "/metrics":
            self._send(200, self.monitor.metrics())
        else:
            self._send(404, "there are /health and /metrics\n")

    def _send(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the terminal shows the run."""


def _named(metric: str) -> str:
    return "unison_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
