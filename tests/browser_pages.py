"""Pages of the viewer in headless Chromium, for tests: whatever goes wrong in one is noted."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PIXELS = """() => {
  const canvas = document.getElementById("view");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let [hash, seen] = [0, 0];
  for (let i = 0; i < data.length; i += 4 * 7) {
    hash = (Math.imul(hash, 31) + data[i] + 7 * data[i + 1] + 13 * data[i + 2]) | 0;
    seen += data[i + 3] > 0;
  }
  return [hash, seen];
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; the test is skipped where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium: `make chromium` installs Debian's")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Viewer:
    """A page, and all that must not happen on it.

    Attributes:
        page: of playwright.
        problems: errors in its console and its scripts.
        requests: addresses that it has asked for.
        received: (seconds, bytes) of each message over its WebSocket.
    """

    page: Page
    problems: list[str] = field(default_factory=list[str])
    requests: list[str] = field(default_factory=list[str])
    received: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    def watch(self) -> None:
        """Note what goes wrong from now on."""
        page = self.page
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        link = page.context.new_cdp_session(page)
        link.send("Network.enable")
        link.on("Network.webSocketFrameReceived", self._on_message)

    def _on_console(self, message: Any) -> None:
        ours = "willReadFrequently" in message.text  # PIXELS does, the page does not
        if message.type in ("error", "warning") and not ours:
            self.problems.append(f"{message.type}: {message.text}")

    def _on_message(self, event: dict[str, Any]) -> None:
        data = event["response"]["payloadData"]
        is_text = event["response"]["opcode"] == 1
        size = len(data.encode()) if is_text else len(base64.b64decode(data))
        self.received.append((time.monotonic(), size))

    def check(self, address: str, allowed: str = "") -> None:
        """Assert that nothing went wrong, and that nothing was asked of another machine.

        Args:
            address: host and port of the viewer.
            allowed: words of problems that belong to the test, such as a lost connection.
        """
        left = [p for p in self.problems if not (allowed and allowed in p)]
        assert not left, left
        assert self.requests
        for url in self.requests:
            assert urlsplit(url).netloc == address or url.startswith("data:"), url

    @property
    def pixels(self) -> tuple[int, int]:
        """A number that stands for the image's pixels, and how many there are."""
        found, seen = self.page.evaluate(PIXELS)
        return found, seen

    def until(self, condition: Callable[[], Any], what: str = "it", timeout_s: float = 15) -> Any:
        """Wait while the page goes on."""
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > end:
                words = self.page.locator("body").inner_text()
                raise AssertionError(f"{what} did not happen; {self.problems}\n{words}")
            self.page.wait_for_timeout(50)
        return value

    def changed(self, what: str, timeout_s: float = 15) -> None:
        """Wait until the image is another one than now."""
        before = self.pixels[0]
        self.until(lambda: self.pixels[0] != before, f"a change of the image ({what})", timeout_s)

    def steady(self) -> int:
        """Wait until the image has been the same for a while; the number that stands for it."""
        last, since = self.pixels[0], time.monotonic()
        while time.monotonic() - since < 1.0:
            self.page.wait_for_timeout(100)
            if self.pixels[0] != last:
                last, since = self.pixels[0], time.monotonic()
        return last

    def at(self, selector: str) -> Locator:
        """An element."""
        return self.page.locator(selector)

    def text(self, selector: str) -> str:
        """What an element says."""
        return self.page.locator(selector).inner_text()

    def pressed(self, selector: str) -> bool:
        """Whether a button is pressed."""
        return self.page.locator(selector).get_attribute("aria-pressed") == "true"

    def key(self, name: str) -> None:
        """Press a key where nothing has the focus."""
        self.page.evaluate("document.activeElement?.blur()")
        self.page.keyboard.press(name)

    def kilobytes_per_s(self, seconds: float) -> float:
        """What has come over the WebSocket, over so many seconds."""
        return sum(size for _, size in self.received) / seconds / 1e3


@contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[Viewer]:
    """A page in a browser profile of its own."""
    options = {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark", **context}
    profile = browser.new_context(**options)
    try:
        viewer = Viewer(profile.new_page())
        viewer.watch()
        viewer.page.goto(url)
        yield viewer
    finally:
        profile.close()
