"""How does the page reach a browser? A server on the loopback interface whose URL has a secret, or one file."""

import base64
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from trainer.view.answers import Answers

HERE = Path(__file__).parent
FILES = {"": ("page.html", "html"), "view.js": ("view.js", "javascript"), "view.css": ("view.css", "css")}
POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; script-src 'self'; style-src 'self'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
ENOUGH = 24 << 20
"""Bytes of an export, from which on no more tokens are added."""


def server(answers: Answers, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server that is not started yet, and the URL of its page."""
    secret = secrets.token_urlsafe(18)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionError):  # the browser has gone on to another page
                super().handle()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            _, given, *rest = url.path.split("/")
            # Another name for this host is a page of somebody else's that asks through the user's browser.
            at_home = self.headers.get("Host") in hosts
            if not at_home or not secrets.compare_digest(given.encode(), secret.encode()):
                return self._send(404, b"use the address that unison view printed\n")
            path = "/".join(rest)
            if path in FILES:
                name, kind = FILES[path]
                return self._send(200, (HERE / name).read_bytes(), f"text/{kind}")
            try:
                value = answers.answer(path, dict(parse_qsl(url.query)))
            except KeyError:
                return self._send(404, b"there is no such answer\n")
            except (ValueError, OSError) as error:
                return self._send(400, str(error).encode())
            return self._send(200, json.dumps(value).encode(), "application/json")

        def _send(self, status: int, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            more = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
            for name, value in {**HEADERS, **more}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the terminal shows the address alone."""

    made = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    hosts = {f"{name}:{made.server_port}" for name in ("127.0.0.1", "localhost")}
    return made, f"http://127.0.0.1:{made.server_port}/{secret}/"


def export(answers: Answers) -> str:
    """The page with its answers in one file, which needs no server: newest steps first, tokens as far as there is
    room."""
    held: dict[str, Any] = {}

    def keep(path: str, query: Mapping[str, Any]) -> int:
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        value = answers.answer(path, {name: str(each) for name, each in query.items()})
        held[f"{path}?{asked}" if asked else path] = value
        return len(json.dumps(value))

    for path in ("run", "time", "doctor", *(["compare"] if answers.other else [])):
        keep(path, {})
    room = ENOUGH
    for step, *_ in reversed(held["run"]["steps"]):
        room -= keep("rows", {"step": step, "limit": 5000})
        for group in dict.fromkeys(row["group"] for row in held[f"rows?step={step}&limit=5000"]["rows"]):
            if room > 0:
                room -= keep("sequences", {"step": step, "group": group})
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("view.js", "view.css"))
    policy = f"{POLICY.partition('; frame')[0]}; script-src '{digest(script)}'; style-src '{digest(style)}'"
    # In a script element only the letter < could end it.
    data = json.dumps(held).replace("<", "\\u003c")
    page = (HERE / "page.html").read_text(encoding="utf-8")
    page = page.replace('<link rel="stylesheet" href="view.css">', f"<style>{style}</style>")
    page = page.replace("<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{policy}">')
    data_and_script = f'<script type="application/json" id="data">{data}</script><script>{script}</script>'
    return page.replace('<script src="view.js"></script>', data_and_script)


def digest(text: str) -> str:
    """How a policy names a script that stands in the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def serve(answers: Answers, port: int, show: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. `show` gets the URL."""
    made, url = server(answers, port)
    with made, suppress(KeyboardInterrupt):
        show(url)
        made.serve_forever()
