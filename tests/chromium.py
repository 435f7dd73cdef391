"""A headless Chromium that tests drive over a pipe, with the DevTools protocol as its own client speaks it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path
from select import select
from time import monotonic
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",  # which is small in containers
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PATIENCE = 60.0


class Chromium:
    """One tab.

    Attributes:
        requests: addresses that pages asked for.
        complaints: what pages or the browser wrote to the console.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, None
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, height: int = 800, *, dark: bool = False, ratio: float = 1) -> None:
        """Opens a page and waits until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=ratio, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._go("about:blank")  # or an address that differs after its # alone loads nothing
        self.requests.clear()
        self.complaints.clear()
        self._go(url)
        self.settle()

    def _go(self, url: str) -> None:
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._take(self._receive())

    def run(self, expression: str) -> Any:
        """Returns what a JavaScript expression gives, which must fit into JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"]["exception"].get("description", expression))
        return answer["result"].get("value")

    def settle(self) -> None:
        """Waits until what was asked for before is on the screen."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def mouse(self, kind: str, x: float, y: float, **options: Any) -> None:
        """Sends ``mouseMoved``, ``mousePressed``, ``mouseReleased`` or ``mouseWheel`` at a place of the window."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **options)

    def click(self, x: float, y: float) -> None:
        """Clicks at a place of the window."""
        self.mouse("mouseMoved", x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str) -> None:
        """Presses and releases a key, named as in ``KeyboardEvent.key``."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def write(self, text: str) -> None:
        """Writes into what has the focus."""
        self.call("Input.insertText", text=text)
        self.settle()

    def picture(self, path: Path) -> None:
        """Saves the window as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        with os.fdopen(os.dup(self._commands), "wb") as pipe:
            pipe.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._take(answer)

    def _receive(self) -> dict[str, Any]:
        end = monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select([self._answers], [], [], max(0.0, end - monotonic()))
            assert ready, f"Chromium said nothing for {_PATIENCE} seconds"
            received = os.read(self._answers, 2**16)
            assert received, "Chromium has ended"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _take(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(str([one.get("value", one.get("description")) for one in parameters["args"]]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(parameters["entry"]["text"])


@contextmanager
def open_chromium(profile: Path) -> Iterator[Chromium]:
    """Starts Chromium with an empty profile in ``profile``, and ends it."""
    (commands, to_browser), (from_browser, answers) = ([_high(end) for end in os.pipe()] for _ in range(2))
    # The browser reads file descriptor 3 and writes 4.
    plumbing = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
    command = ["bash", "-c", plumbing, str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
    os.close(commands)
    os.close(answers)
    try:
        yield Chromium(to_browser, from_browser)
    finally:
        os.close(to_browser)  # with which the browser ends
        os.close(from_browser)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _high(descriptor: int) -> int:
    """Moves a file descriptor out of the way of 3 and 4."""
    moved = fcntl(descriptor, F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
