"""A headless Chromium that a test or a script drives over its own protocol: pages, keys, requests and pictures."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HANGS_S = 300


class Browser:
    """One page in one process."""

    def __init__(self, width: int = 1360, height: int = 900) -> None:
        from websockets.sync.client import connect

        assert CHROMIUM is not None
        self.home = tempfile.mkdtemp(prefix="chromium-")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += [f"--user-data-dir={self.home}", "--remote-debugging-port=0", f"--window-size={width},{height}"]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port = Path(self.home) / "DevToolsActivePort"
        deadline = time.monotonic() + HANGS_S
        while not (port.exists() and port.read_text().count("\n")):
            assert self.process.poll() is None, "Chromium does not start"
            assert time.monotonic() < deadline, "Chromium does not start"
            time.sleep(0.05)
        number, path = port.read_text().split("\n")[:2]
        self.socket = connect(f"ws://127.0.0.1:{number}{path}", max_size=None, proxy=None)
        self.number, self.session = 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.size(width, height)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            got = json.loads(self.socket.recv(timeout=HANGS_S))
            if got.get("id") == self.number:
                assert "error" not in got, got
                return got["result"]
            self.events.append(got)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the window's size and the scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def js(self, code: str) -> Any:
        """The value of an expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url: str) -> None:
        """Load a page, and wait until it shows its view."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait("document.body && document.body.dataset.shown != null")

    def go(self, view: str) -> None:
        """Go to a view of the page by what stands behind the # of its address."""
        self.js(f"delete document.body.dataset.shown; location.hash = {json.dumps(view)}; undefined")
        self.wait(f"document.body.dataset.shown === {json.dumps(view)}")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + HANGS_S
        while not self.js(condition):
            assert time.monotonic() < deadline, f"{condition} is never true: {self.text()[:500]}"
            time.sleep(0.02)

    def text(self) -> str:
        """What can be read on the page."""
        return self.js("document.body ? document.body.innerText : ''")

    def key(self, key: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if kind == "keyDown" else "")

    def requests(self) -> list[str]:
        """URLs that pages asked for so far."""
        self.js("1")
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Errors of scripts and of the policy so far."""
        self.js("1")
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        found = [json.dumps(e["params"]) for e in self.events if e.get("method") in kinds]
        return [text for text in found if '"level": "verbose"' not in text]

    def picture(self, path: Path) -> None:
        """Save what the window shows."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the process."""
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.home, ignore_errors=True)
