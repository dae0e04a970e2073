"""A server that answers OpenAI's chat completions as a test decides, on a port of its own."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | tuple[int, dict[str, str], str]
"""The text of a verdict, "<hang>", "<close>", or status, headers and body."""


class Server(ThreadingHTTPServer):
    """`requests` are the bodies it got, `headers` those of the last one; `answer` decides by body and number."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.ended = answer, threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.headers = dict(self.headers)
        answer = self.server.answer(body, number)
        if answer == "<hang>":
            self.server.ended.wait(60)
        if answer in ("<hang>", "<close>"):
            self.close_connection = True
            return
        status, headers, text = (200, {}, completion(answer)) if isinstance(answer, str) else answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


def completion(text: str | None, reason: str = "stop") -> str:
    """A chat completion as the API sends it."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]})


@contextmanager
def judge_server(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Server]:
    """A server that runs meanwhile."""
    server = Server(answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
