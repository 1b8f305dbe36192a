"""A real browser for tests: the Chromium on PATH, driven by playwright.

with chromium(find()) as browser:
    page = visit(browser, file, width=390, height=844, dark=True)
    assert page.problems == [] and page.requests == [file.as_uri()]
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    """The browser on PATH."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def chromium(executable: str) -> Iterator[Browser]:
    """One process without a profile. It ends with the `with` block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page that was opened. `problems`: errors and warnings on its console; `requests`: what it asked for."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, as plain data."""
        return self.page.evaluate(script)

    def move(self, x: float, y: float) -> None:
        """The pointer goes to a place in the window."""
        self.page.mouse.move(x, y)

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def box(self, selector: str) -> dict[str, float]:
        """Where an element is in the window, after it was scrolled into sight: x, y, width, height."""
        found = self.page.locator(selector).first
        found.evaluate("one => one.scrollIntoView({ block: 'center', behavior: 'instant' })")
        box = found.bounding_box()
        assert box is not None, f"{selector} is not seen"
        return dict(box)

    def screenshot(self, file: Path) -> None:
        """The whole page, as PNG."""
        self.page.screenshot(path=file, full_page=True)


def visit(
    browser: Browser, file: Path, *, width: int = 1120, height: int = 900, dark: bool = False, scripts: bool = True
) -> Visit:
    """The file in a new window, loaded; windows before it close. Up to 640 wide it is a phone."""
    for context in browser.contexts:
        context.close()
    page = browser.new_page(
        viewport={"width": width, "height": height},
        is_mobile=width <= 640,
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        java_script_enabled=scripts,
    )
    found = Visit(page)
    page.on("console", lambda said: found.problems.append(said.text) if said.type in _BAD else None)
    page.on("pageerror", lambda error: found.problems.append(f"{error.name}: {error.message}"))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(file.as_uri())
    return found


_BAD = ("error", "warning", "assert")
