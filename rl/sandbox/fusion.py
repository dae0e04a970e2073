"""How does a program run on a server of SandboxFusion? One POST for each run, repeated while the server is busy."""

import base64
import http.client
import json
import random
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl.environments.types import EnvError
from rl.sandbox.files import Held, encoded, words
from rl.sandbox.types import Content, Files, Ran

ANSWER, FIRST_PAUSE_S, LONGEST_PAUSE_S = 16 << 20, 0.25, 8.0
JITTER = random.Random()
"""Its own, because the global random numbers are the run's."""


@dataclass(frozen=True, kw_only=True)
class SandboxFusion(Held):
    """A server with `POST /run_code`, such as github.com/bytedance/SandboxFusion. It keeps nothing between two runs."""

    url: str
    """Such as http://sandbox:8080."""
    patience_s: float = 120.0
    """Seconds of one run, with all tries, beyond the program's own. After that it is an EnvError."""

    def run(
        self, argv: Sequence[str], *, stdin: Content = "", files: Files | None = None, timeout: float = 10.0
    ) -> Ran:
        """Run a program there. A busy or failing server (429, 5xx, no connection) is asked again."""
        sent = self.placed({**self.files, **(files or {})})
        body = {
            "language": "bash",
            "code": shlex.join(words(argv, "python")),
            "stdin": encoded(stdin).decode(errors="replace"),
            "run_timeout": timeout,
            "files": {path: base64.b64encode(content).decode() for path, content in sent.items()},
        }
        until, pause = time.monotonic() + timeout + self.patience_s, FIRST_PAUSE_S
        while True:
            try:
                return self._ask(body, until - time.monotonic())
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code != 429 and error.code < 500:
                    raise EnvError(f"the sandbox at {self.url} refuses the request: {error}") from error
                wait = pause * JITTER.uniform(0.5, 1.5)
                if time.monotonic() + wait >= until:
                    raise EnvError(f"the sandbox at {self.url} failed for {self.patience_s:g} s: {error}") from error
                time.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _ask(self, body: dict[str, Any], seconds: float) -> Ran:
        """One try. Raises ValueError for an answer that is none."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url.rstrip('/')}/run_code", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=max(seconds, 0.1)) as response:
            answer: Any = json.loads(response.read(ANSWER))
        try:
            ran: dict[str, Any] = answer["run_result"]
            late = ran["status"] == "TimeLimitExceeded"
            if answer["status"] == "SandboxError" or (ran["return_code"] is None and not late):
                raise KeyError("status")
        except (KeyError, TypeError) as error:
            raise ValueError(f"the server reports {str(answer)[:200]}") from error
        code: Any = 137 if late else ran["return_code"]
        return Ran(stdout=ran.get("stdout") or "", stderr=ran.get("stderr") or "", code=code, timed_out=late)
