"""The pictures of docs/dashboard.md: the dashboard over a server that is at work.

python -m tests.ui_screenshots [--seconds 115]

A few producers and workers keep a real server busy for so long, then the pictures are taken.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from playwright.sync_api import Browser

from .browser import PHONE, Tab, chromium
from .conftest import ROOT, Server
from .guarded import ADMIN, OPERATOR, WORKER, guarded_server

DOCS = ROOT / "docs"
STEP_MS = 250
BATCH = "/tasks/batch"
#: by queue: tasks a second, the part of them that fails, and how many workers there are
WORK = {
    "mail.send": (24, 0.02, 3),
    "image.resize": (16, 0.01, 4),
    "invoice.render": (7, 0.03, 2),
    "report.nightly": (2, 0.0, 1),
    "search.index": (11, 0.0, 2),
    "webhook.retry": (3, 0.1, 1),
}
ERRORS = (
    "smtp: 550 5.1.1 mailbox unavailable",
    "timeout after 30 s: images.internal",
    "KeyError: 'customerId'",
    "status 502 from payments",
)


class Load:
    """Producers and workers of one tenant, a step at a time."""

    def __init__(self, server: Server, dice: random.Random) -> None:
        self.producer = server.client(ADMIN)
        self.worker = server.client(WORKER["acme"])
        self.dice = dice
        self.held: list[tuple[float, str, str, str]] = []  # until, queue, worker, id

    def step(self, now_s: float) -> None:
        """What happens within STEP_MS."""
        wave = 1 + 0.5 * math.sin(now_s / 9)
        for command, (rate, _, workers) in WORK.items():
            self._create(command, rate * wave * STEP_MS / 1000)
            for number in range(workers):
                self._claim(now_s, command, f"{command.partition('.')[0]}-{number + 1}")
        self._finish(now_s)

    def _create(self, command: str, expected: float) -> None:
        count = int(expected + self.dice.random())
        delays = [self.dice.choice((0,) * 29 + (60,)) for _ in range(count)]
        tasks = [
            {
                "command": command,
                "payload": {"customer": f"c-{self.dice.randrange(9000)}", "locale": "en"},
                "maxAttempts": 1,
                "delaySeconds": delay,
            }
            for delay in delays
        ]
        if tasks:
            self.producer.post(BATCH, json=tasks)

    def _claim(self, now_s: float, command: str, name: str) -> None:
        body = {"commands": [command], "workerId": name, "count": 2, "leaseSeconds": 300}
        answer = self.worker.post("/tasks/claim/batch", json=body)
        if answer.status_code == 200:
            for task in answer.json()["tasks"]:
                self.held.append((now_s + self.dice.expovariate(1.2), command, name, task["id"]))

    def _finish(self, now_s: float) -> None:
        due = [one for one in self.held if one[0] <= now_s]
        self.held = [one for one in self.held if one[0] > now_s]
        results = []
        for _, command, name, task_id in due:
            if self.dice.random() < WORK[command][1]:
                body = {"workerId": name, "reason": self.dice.choice(ERRORS)}
                self.worker.post(f"/tasks/{task_id}/nack", json=body)
            else:
                result = {"taskId": task_id, "workerId": name, "status": "COMPLETED", "result": {}}
                results.append(result)
        if results:
            self.worker.post("/tasks/batch/results", json={"results": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=115, help="of work before the pictures")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder, guarded_server(Path(folder)) as server:
        load = Load(server, random.Random(7))
        producer: httpx.Client = load.producer
        producer.post("/admin/queues/report.nightly/pause")
        with chromium() as browser:
            take(browser, server, load, seconds)


def take(browser: Browser, server: Server, load: Load, seconds: int) -> None:
    """All pictures, after so many seconds of work."""
    light = Tab(browser, server, viewport={"width": 1180, "height": 760}, color_scheme="light")
    dark = Tab(browser, server, viewport={"width": 1180, "height": 760}, color_scheme="dark")
    phone = Tab(browser, server, viewport=PHONE, color_scheme="light", device_scale_factor=1.5)
    for tab in (light, dark, phone):
        tab.open(OPERATOR if tab is dark else ADMIN)
    began_s = time.monotonic()
    while (now_s := time.monotonic() - began_s) < seconds:
        load.step(now_s)
        light.page.wait_for_timeout(STEP_MS)

    def shoot(tab: Tab, name: str, look: Callable[[], None] = lambda: None) -> None:
        look()
        path = DOCS / f"dashboard-{name}.png"
        tab.page.screenshot(path=path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")

    def dead_letters() -> None:
        page = dark.page
        page.get_by_role("link", name="mail.send").click()
        page.locator(".tasks summary").first.click()
        page.locator(".tasks input").nth(1).check()
        page.locator(".tasks").scroll_into_view_if_needed()
        page.get_by_role("heading", name="Tasks").evaluate("(one) => one.scrollIntoView()")

    shoot(light, "light")
    shoot(phone, "phone")
    shoot(dark, "dark", dead_letters)
    for tab in (light, dark, phone):
        tab.close()


if __name__ == "__main__":
    main()
