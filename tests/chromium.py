"""A headless Chromium that tests drive through Playwright, without a browser of Playwright's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, Error, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Chromium:
    """One tab.

    Attributes:
        requests: addresses that pages asked for.
        complaints: what pages or the browser wrote to the console.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._page = context.pages[0]
        self._page.on("request", lambda request: self.requests.append(request.url))
        self._page.on("console", lambda message: self.complaints.append(message.text))
        self._page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self._protocol = context.new_cdp_session(self._page)

    def open(self, url: str, width: int = 1280, height: int = 800, *, dark: bool = False, ratio: float = 1) -> None:
        """Opens a page and waits until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=ratio, mobile=False
        )
        self._page.emulate_media(color_scheme="dark" if dark else "light")
        self._page.goto("about:blank")  # or an address that differs after its # alone loads nothing
        self.requests.clear()
        self.complaints.clear()
        self._page.goto(url)
        self.settle()

    def run(self, expression: str) -> Any:
        """Returns what a JavaScript expression gives, which must fit into JSON."""
        try:
            return self._page.evaluate(expression)
        except Error as error:
            raise AssertionError(error.message) from None

    def settle(self) -> None:
        """Waits until what was asked for before is on the screen."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def mouse(self, kind: str, x: float, y: float, **options: Any) -> None:
        """Sends ``mouseMoved``, ``mousePressed``, ``mouseReleased`` or ``mouseWheel`` at a place of the window."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **options)

    def click(self, x: float, y: float) -> None:
        """Clicks at a place of the window."""
        self._page.mouse.click(x, y)
        self.settle()

    def press(self, key: str) -> None:
        """Presses and releases a key, named as in ``KeyboardEvent.key``."""
        self._page.keyboard.press(key)
        self.settle()

    def write(self, text: str) -> None:
        """Writes into what has the focus."""
        self._page.keyboard.insert_text(text)
        self.settle()

    def picture(self, path: Path) -> None:
        """Saves the window as a PNG file."""
        self._page.screenshot(path=path)

    def call(self, method: str, **parameters: Any) -> Any:
        """Calls a method of the DevTools protocol and returns its result."""
        return self._protocol.send(method, parameters)


@contextmanager
def open_chromium(profile: Path) -> Iterator[Chromium]:
    """Starts Chromium with an empty profile in ``profile``, and ends it."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=list(_FLAGS), chromium_sandbox=False, no_viewport=True
        )
        try:
            yield Chromium(context)
        finally:
            context.close()
