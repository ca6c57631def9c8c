"""A headless Chromium for the tests of the pages.

The browser is Debian's, by its path: what a test tool would download for itself is another one,
and needs a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from .conftest import Server

CHROMIUM = Path("/usr/bin/chromium")
QUIET = ("background-networking", "component-update", "sync", "quic", "gpu", "dev-shm-usage")
WAIT_MS = 10_000
PHONE = {"width": 375, "height": 740}


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, with an empty profile. As root it runs without its sandbox: it meets only pages
    of the server under test."""
    arguments = ["--no-first-run", *(f"--disable-{what}" for what in QUIET)]
    with sync_playwright() as tool:
        browser = tool.chromium.launch(
            executable_path=CHROMIUM, args=arguments, chromium_sandbox=os.getuid() != 0
        )
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page of its own, and what it did that it should not: errors, refused loads, dialogs,
    requests to another host than the server's."""

    def __init__(self, browser: Browser, server: Server, **options: Any) -> None:
        self.server = server
        self.faults: list[str] = []
        self.away = False  # whether requests may fail
        self.context: BrowserContext = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("console", lambda message: self._console(message.type, message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: self.faults.append(f"dialog {dialog.message}"))
        self.context.on("request", lambda request: self._request(request.url))

    def _console(self, kind: str, text: str) -> None:
        # A status of an error is logged by the browser itself, and shown by the page.
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.faults.append(f"{kind}: {text}")

    def _request(self, url: str) -> None:
        if not url.startswith(f"http://{self.server.http}/"):
            self.faults.append(f"asked for {url}")

    def open(self, token: str = "", place: str = "") -> Page:
        """The dashboard, signed in with this token if there is one."""
        self.page.goto(f"http://{self.server.http}/ui{place}")
        if token:
            self.sign_in(token)
            self.page.locator("#views").wait_for()
        return self.page

    def sign_in(self, token: str) -> None:
        self.page.get_by_label("Token").fill(token)
        self.page.get_by_role("button", name="Sign in").click()

    def close(self) -> None:
        self.context.close()
        assert self.faults == []
