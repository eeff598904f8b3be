"""A real headless Chromium, where one is installed: Debian's package, driven by Playwright."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Ours to name where it lies elsewhere; then the usual names.
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
WHY_NOT = "no Chromium here (apt-get install chromium)" if CHROMIUM is None else "playwright is not installed"
IS_MISSING = CHROMIUM is None or not HAS_PLAYWRIGHT

WAIT_MS = 30_000.0  # for what a page should show soon; the machine may be busy
# Root has no user namespaces to build a sandbox of; a container's /dev/shm is small.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]


@contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One page in a context of its own, with all that went wrong on it: `problems` has to be empty at the end.

    Args:
        expected: problems with this in their text are meant to be there.
    """

    def __init__(
        self, browser: Browser, *, width: int = 1280, height: int = 860, expected: str = "", **options: Any
    ) -> None:
        self._expected = expected
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.context.set_default_timeout(WAIT_MS)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self._heard(message.type, message.text))
        self.page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(f"{kind}: {text}")

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # a stopped answer, a reload
            self.problems.append(f"{request.url}: {request.failure}")

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        wide: int = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return wide

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.context.close()
        problems = [text for text in self.problems if not self._expected or self._expected not in text]
        assert kind is not None or not problems, problems
