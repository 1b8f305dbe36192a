"""A real browser for tests: headless Chromium, driven over the DevTools protocol.

    with Browser(find(), tmp_path) as browser:
        page = browser.open(file, width=390, height=844, dark=True)
        assert page.problems == [] and page.requests == [file.as_uri()]

Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from itertools import count
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60  # for any one answer: a busy machine starts a browser slowly
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",  # any free one
)
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
_KEYS["ArrowDown"] = 40


def find() -> str | None:
    """The browser on PATH."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One process with a profile of its own. It ends with the `with` block."""

    def __init__(self, executable: str, folder: Path) -> None:
        self._profile = folder / "profile"
        self._log = (folder / "chromium.log").open("w+")
        command = [executable, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self._serial = count(1)
        self._pages: dict[str, Page] = {}
        self._tab = ""

    def __enter__(self) -> Browser:
        try:
            port, path = self._address()
            # No origin: the browser answers only to those that it knows.
            self._socket = websocket.create_connection(
                f"ws://127.0.0.1:{port}{path}", timeout=_SECONDS, suppress_origin=True
            )
        except BaseException:
            self._process.kill()
            raise
        return self

    def _address(self) -> list[str]:
        file, end = self._profile / "DevToolsActivePort", time.monotonic() + _SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            found = file.read_text().split() if file.exists() else []
            if len(found) == 2:
                return found
            time.sleep(0.05)
        self._log.seek(0)
        raise RuntimeError(f"{self._process.args[0]} did not start:\n{self._log.read()[-2000:]}")  # type: ignore[index]

    def __exit__(self, *error: object) -> None:
        try:
            self.send("Browser.close")  # so that it clears away its temporary files
            self._process.wait(10)
        finally:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            self._log.close()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to one command; events that come before it go to the pages they belong to."""
        serial = next(self._serial)
        message = {"id": serial, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._socket.send(json.dumps(message))
        while True:
            received = self._receive()
            if received.get("id") == serial:
                if "error" in received:
                    raise RuntimeError(f"{method}: {received['error']['message']}")
                result: dict[str, Any] = received["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        received: dict[str, Any] = json.loads(self._socket.recv())
        if "method" in received and received.get("sessionId") in self._pages:
            self._pages[received["sessionId"]].note(received["method"], received["params"])
        return received

    def open(
        self, file: Path, *, width: int = 1120, height: int = 900, dark: bool = False, scripts: bool = True
    ) -> Page:
        """The file in a new tab, loaded; the tab before it closes, as nothing moves in one that is not seen.

        Up to 640 wide it is a phone.
        """
        if self._tab:
            self.send("Target.closeTarget", targetId=self._tab)
        target = self._tab = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        page.send("Emulation.setDeviceMetricsOverride", **size, mobile=width <= 640)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        page.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        page.send("Page.navigate", url=file.as_uri())
        while not page.loaded:
            self._receive()
        return page


class Page:
    """A tab. `problems`: errors and warnings on its console; `requests`: every address that it asked for."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.loaded = False

    def note(self, method: str, params: dict[str, Any]) -> None:
        """Take an event."""
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(part.get("value", part)) for part in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression (of its promise), as plain data."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def settle(self) -> None:
        """Wait until the page has been drawn twice, so that all it does by itself is done."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def move(self, x: float, y: float) -> None:
        """The pointer goes to a place in the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            params = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]} | (
                text if kind == "keyDown" else {}
            )
            self.send("Input.dispatchKeyEvent", type=kind, **params)
        self.settle()

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is in the window, after it was scrolled into sight."""
        script = "{ element.scrollIntoView({block: 'center', behavior: 'instant'});"
        script += " return element.getBoundingClientRect().toJSON(); }"
        found: dict[str, float] = self.run(f"(element => {script})(document.querySelector({json.dumps(selector)}))")
        return found

    def screenshot(self, file: Path) -> None:
        """The whole page, as PNG."""
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=True, optimizeForSpeed=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(picture["data"]))
