"""A headless Chromium, driven by its DevTools protocol through two pipes: no port, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 60.0  # for the next thing that the browser says
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
# Chromium reads descriptor 3 and writes descriptor 4.
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


def where() -> str | None:
    """Return the browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Page:
    """A page of the browser, and what it was told of it."""

    _send: Any
    _messages: Iterator[dict[str, Any]]
    requests: list[str] = field(default_factory=list)
    said: list[Any] = field(default_factory=list)  # on the console, by scripts or the browser
    dialogs: list[str] = field(default_factory=list)
    loads: int = 0
    _session: str | None = None
    _count: int = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._send(message | ({"sessionId": self._session} if self._session else {}))
        answer = self._until(lambda each: each.get("id") == self._count)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _until(self, wanted: Any) -> dict[str, Any]:
        for message in self._messages:
            self._note(message)
            if wanted(message):
                return message
        raise RuntimeError("the browser has gone, or says nothing any more")

    def _note(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])
            case "Log.entryAdded" | "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.said.append(told)
            case "Page.loadEventFired":
                self.loads += 1
            case "Page.javascriptDialogOpening":
                self.dialogs.append(told["message"])

    def open(self) -> None:
        """Make the page and listen to it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def show(self, file: Path, width: int, height: int = 900, scheme: str = "light") -> None:
        """Load a file in a window of a size, in a light or dark scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        before = self.loads
        self.call("Page.navigate", url=file.resolve().as_uri())
        while self.loads == before:
            self._until(lambda _: True)

    def value(self, expression: str) -> Any:
        """Return what an expression is on the page; the test asks, the page has no script."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def picture(self, whole: bool = False) -> bytes:
        """Return a PNG of what is seen, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])


@contextmanager
def browser() -> Iterator[Page]:
    """Yield an empty page of a browser that ends with the block."""
    path = where()
    assert path is not None, "ask `where` first"
    to_read, writing = _pipe()
    reading, to_write = _pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        started = [sys.executable, "-c", _START, str(to_read), str(to_write), path]
        process = subprocess.Popen(
            [*started, *_OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            os.close(to_read)
            os.close(to_write)
            page = Page(lambda message: _write(writing, message), _messages(reading))
            page.open()
            yield page
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(writing)
            os.close(reading)


def _pipe() -> tuple[int, int]:
    """Return the ends of a pipe, none of them a descriptor that the browser uses."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


def _write(descriptor: int, message: dict[str, Any]) -> None:
    content = json.dumps(message).encode() + b"\0"
    while content:
        content = content[os.write(descriptor, content) :]


def _messages(descriptor: int) -> Iterator[dict[str, Any]]:
    held = b""
    while select.select([descriptor], [], [], PATIENCE_S)[0]:
        if not (content := os.read(descriptor, 1 << 20)):
            return
        *whole, held = (held + content).split(b"\0")
        yield from map(json.loads, whole)
