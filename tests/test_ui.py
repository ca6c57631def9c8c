"""The dashboard in a real browser, against a real server."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright", reason="playwright is not installed (extra dev)")

from playwright.sync_api import Browser, Locator, Page, expect

from .browser import CHROMIUM, PHONE, WAIT_MS, Tab, chromium
from .conftest import PREFIX, Server, claim, create
from .guarded import ADMIN, OPERATOR, OTHER, PLAIN, WORKER, guarded_server

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}: apt-get install chromium, or ci/ui"
)
EVIL = "<img src=x onerror=alert(1)>"
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with guarded_server(tmp_path_factory.mktemp("guarded")) as server:
        yield server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """As ``guarded``, for one test alone."""
    with guarded_server(tmp_path) as server:
        yield server


@pytest.fixture
def open_tab(browser: Browser, guarded: Server) -> Iterator[Callable[..., Tab]]:
    """``open_tab(...)``: a tab that must not have done anything wrong when the test is over."""
    tabs: list[Tab] = []

    def opened(server: Server = guarded, **options: Any) -> Tab:
        tabs.append(Tab(browser, server, **options))
        return tabs[-1]

    yield opened
    for tab in tabs:
        tab.close()


@pytest.fixture
def tab(open_tab: Callable[..., Tab]) -> Tab:
    return open_tab()


@pytest.fixture
def producer(guarded: Server) -> httpx.Client:
    return guarded.client(ADMIN)


@pytest.fixture
def worker(guarded: Server) -> httpx.Client:
    return guarded.client(WORKER["acme"])


def dead_letters(producer: httpx.Client, worker: httpx.Client, command: str, count: int) -> None:
    for number in range(count):
        create(producer, command, payload={"number": number, "big": 2**60 + 1}, maxAttempts=1)
        task_id = claim(worker, command, workerId="w")["id"]
        body = {"workerId": "w", "reason": f"mail server said {EVIL}"}
        assert worker.post(f"/tasks/{task_id}/nack", json=body).json()["status"] == "dlq"


def agree(page: Page, name: str) -> str:
    """Says yes; the question."""
    dialog = page.get_by_role("dialog")
    question = dialog.get_by_role("heading").inner_text()
    dialog.get_by_role("button", name=name).click()
    expect(dialog).to_be_hidden()
    return question


def figure(page: Page, name: str) -> Locator:
    """The figure of a tile that is shown."""
    return page.locator(".tile:visible", has=page.get_by_text(name, exact=True)).locator("dd")


def poll(page: Page) -> None:
    """Has the page poll at once, as when it comes to the front."""
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def at_queue(tab: Tab, command: str) -> Page:
    page = tab.open(ADMIN, f"#queue?command={command}")
    expect(page.get_by_role("heading", name=command)).to_be_visible()
    return page


# --- signing in


def test_a_token_that_is_not_accepted_says_so_and_a_good_one_stays_in_the_tab(tab: Tab) -> None:
    page = tab.open()
    tab.sign_in("nonsense")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The token was not accepted:")
    tab.sign_in(PLAIN)
    expect(alert).to_contain_text("It needs the scope codeq:admin or codeq:operator.")
    assert page.evaluate("sessionStorage.length") == 0, "a refused token is not kept"
    tab.sign_in(ADMIN)
    expect(page.locator("#status")).to_have_text("Connected")
    expect(page.get_by_label("Token")).to_be_hidden()
    page.reload()
    expect(page.locator("#status")).to_have_text("Connected")
    assert page.evaluate("[localStorage.length, document.cookie, location.search]") == [0, "", ""]
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0


# --- tasks


def test_a_task_is_seen_to_move_through_its_states(
    tab: Tab, producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    payload = {"text": EVIL, "number": 12345678901234567890}
    task_id = create(producer, command, payload=payload)["id"]
    page = tab.open(ADMIN)
    page.get_by_role("link", name="Task").click()
    page.get_by_label("Task id").fill(f" {task_id} ")
    page.get_by_role("button", name="Find").click()
    state = page.locator(".state")
    expect(state).to_have_text("ready")
    expect(page.locator("pre")).to_contain_text('"number": 12345678901234567890')
    assert claim(worker, command, workerId="w-17")["id"] == task_id
    poll(page)
    expect(state).to_have_text("leased")
    expect(page.get_by_text("w-17")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel this task…")).to_be_hidden()
    result = '{"status":"COMPLETED","workerId":"w-17","result":{"exact":12345678901234567891}}'
    worker.post(f"/tasks/{task_id}/result", content=result)
    poll(page)
    expect(state).to_have_text("completed")
    expect(page.locator("pre").last).to_contain_text('"exact": 12345678901234567891')
    page.get_by_role("link", name="Its queue").click()
    expect(page.get_by_role("heading", name=command)).to_be_visible()
    page.get_by_label("Show").select_option("Completed")
    expect(page.locator("summary", has_text=task_id)).to_be_visible()


def test_a_waiting_task_is_cancelled_and_an_unknown_one_is_not_found(
    tab: Tab, producer: httpx.Client, command: str
) -> None:
    task_id = create(producer, command, delaySeconds=600)["id"]
    page = tab.open(ADMIN, f"#task?id={task_id}")
    expect(page.locator(".state")).to_have_text("delayed")
    page.get_by_role("button", name="Cancel this task…").click()
    page.get_by_role("button", name="Keep as it is").click()
    assert producer.get(f"/tasks/{task_id}").json()["status"] == "PENDING"
    page.get_by_role("button", name="Cancel this task…").click()
    assert task_id in agree(page, "Cancel the task")
    expect(page.locator(".state")).to_have_text("failed")
    expect(page.get_by_text("CANCELLED").first).to_be_visible()
    page.get_by_label("Task id").fill("no-such-task")
    page.get_by_role("button", name="Find").click()
    expect(page.get_by_text("no-such-task: not found")).to_be_visible()
    expect(page.locator(".state")).to_be_hidden()


# --- dead letters


def test_dead_letters_are_read_requeued_and_purged(
    tab: Tab, producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    dead_letters(producer, worker, command, 5)
    page = at_queue(tab, command)
    rows = page.locator(".tasks li")
    expect(rows).to_have_count(5)
    rows.first.locator("summary").click()
    expect(rows.first.locator("pre")).to_have_text(
        '{\n  "number": 0,\n  "big": 1152921504606846977\n}'
    )
    expect(rows.first).to_contain_text(f"mail server said {EVIL}")
    rows.nth(1).get_by_role("checkbox").check()
    page.get_by_role("button", name="Requeue chosen…").click()
    assert agree(page, "Requeue") == f"Requeue 1 dead letter of queue {command}?"
    expect(page.locator("#said")).to_have_text("1 dead letter requeued.")
    expect(rows).to_have_count(4)
    expect(figure(page, "Ready")).to_have_text("1")
    page.get_by_label("All of this page").check()
    rows.first.get_by_role("checkbox").uncheck()
    page.get_by_role("button", name="Purge chosen…").click()
    assert agree(page, "Purge") == f"Purge 3 dead letters of queue {command}?"
    expect(rows).to_have_count(1)
    expect(figure(page, "Dead letters")).to_have_text("1")
    page.get_by_role("button", name="Requeue all…").click()
    assert agree(page, "Requeue") == f"Requeue all 1 dead letter of queue {command}?"
    expect(rows).to_have_count(0)
    stats = producer.get(f"/admin/queues/{command}").json()
    assert (stats["ready"], stats["dlq"]) == (2, 0)
    assert claim(worker, command)["payload"] == '{"number":0,"big":1152921504606846977}'


def test_dead_letters_come_in_pages(
    tab: Tab, producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    tasks = [{"command": command, "payload": n, "maxAttempts": 1} for n in range(60)]
    producer.post("/tasks/batch", json=tasks)
    claims = {"commands": [command], "count": 60, "workerId": "w"}
    for task in worker.post("/tasks/claim/batch", json=claims).json()["tasks"]:
        worker.post(f"/tasks/{task['id']}/nack", json={"workerId": "w"})
    page = at_queue(tab, command)
    expect(page.get_by_text("50 tasks on this page, there are more.")).to_be_visible()
    page.get_by_role("button", name="Next page").click()
    expect(page.get_by_text("10 tasks on this page.")).to_be_visible()
    expect(page.get_by_role("button", name="Next page")).to_be_hidden()
    page.get_by_role("button", name="Previous page").click()
    expect(page.locator(".tasks li")).to_have_count(50)
    page.get_by_role("button", name="Purge all…").click()
    assert "all 60 dead letters" in agree(page, "Purge")
    expect(page.get_by_text("There are none.")).to_be_visible()


# --- queues


def test_a_queue_is_paused_resumed_and_purged_once_that_is_confirmed(
    tab: Tab, producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    for delay in (0, 0, 600):
        create(producer, command, delaySeconds=delay)
    page = at_queue(tab, command)
    page.get_by_role("button", name="Pause…").click()
    expect(page.get_by_role("dialog")).to_contain_text("its 2 ready tasks")
    expect(page.get_by_role("button", name="Keep as it is")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert claim(worker, command), "nothing was paused"
    page.get_by_role("button", name="Pause…").click()
    assert agree(page, "Pause") == f"Pause queue {command}?"
    expect(page.locator(".badge:visible")).to_have_text("paused")
    empty = worker.post("/tasks/claim", json={"commands": [command]})
    assert empty.status_code == 204
    page.get_by_role("button", name="Resume…").click()
    assert agree(page, "Resume") == f"Resume queue {command}?"
    expect(page.get_by_role("button", name="Pause…")).to_be_visible()
    page.get_by_label("Waiting tasks").select_option("delayed")
    page.get_by_role("button", name="Purge waiting…").click()
    assert agree(page, "Purge") == f"Purge 1 waiting task of queue {command}?"
    expect(figure(page, "Delayed")).to_have_text("0")
    expect(figure(page, "Ready")).to_have_text("1")


def test_of_ten_thousand_queues_all_can_be_found_and_few_are_drawn(
    open_tab: Callable[..., Tab], own_server: Server
) -> None:
    producer = own_server.client(ADMIN)
    for begin in range(0, 10_000, 1_000):
        tasks = [{"command": f"q{n:05}", "payload": 0} for n in range(begin, begin + 1_000)]
        assert producer.post("/tasks/batch", json=tasks).status_code == 200
    producer.post("/tasks/batch", json=[{"command": "q07777", "payload": 0}] * 3)
    page = open_tab(own_server).open(ADMIN)
    rows = page.locator("tbody:visible tr")
    expect(rows).to_have_count(200)
    expect(page.get_by_text("The first 200 of 10000 in this order are shown.")).to_be_visible()
    expect(page.get_by_text("9,000 more are listed with their depths.")).to_be_visible()
    page.get_by_role("columnheader", name="Ready", exact=True).get_by_role("button").click()
    expect(rows.first).to_contain_text("q07777")
    page.get_by_role("searchbox").fill("q0999")
    expect(rows).to_have_count(10)
    page.get_by_role("searchbox").fill("none such")
    expect(page.get_by_text("The filter fits none.")).to_be_visible()


def test_an_operator_sees_every_tenant_and_changes_the_one_that_is_meant(
    open_tab: Callable[..., Tab], guarded: Server, producer: httpx.Client, command: str
) -> None:
    other = guarded.client(OTHER)
    create(producer, command)
    task_id = create(other, command)["id"]
    create(other, command)
    page = open_tab().open(OPERATOR)
    page.get_by_role("searchbox").fill(command)
    rows = page.locator("tbody:visible tr")
    expect(rows).to_have_count(2)
    expect(rows.last).to_contain_text("globex")
    rows.last.get_by_role("link").click()
    expect(page.get_by_role("heading", name=f"{command} of globex")).to_be_visible()
    page.get_by_role("button", name="Purge waiting…").click()
    question = f"Purge 2 waiting tasks of queue {command} of tenant globex?"
    assert agree(page, "Purge") == question
    expect(figure(page, "Ready")).to_have_text("0")
    assert producer.get(f"/admin/queues/{command}").json()["ready"] == 1
    page.get_by_label("Show").select_option("Failed")
    page.locator("summary", has_text=task_id).click()
    expect(page.locator("li", has_text=task_id)).to_contain_text("CANCELLED")
    page.get_by_role("link", name="Follow this task").click()
    expect(page.locator(".state")).to_have_text("failed")
    expect(page.get_by_text("Result record")).to_be_visible()
    waiting = create(other, command)["id"]
    page.get_by_label("Task id").fill(waiting)
    page.get_by_role("button", name="Find").click()
    expect(page.get_by_text("not found in the tenant of this token")).to_be_visible()
    page.locator("#tenant").select_option("globex")
    page.get_by_role("button", name="Find").click()
    expect(page.locator(".state")).to_have_text("ready")
    page.get_by_role("button", name="Cancel this task…").click()
    agree(page, "Cancel the task")
    expect(page.locator(".state")).to_have_text("failed")
    page.get_by_role("link", name="Queues").click()
    expect(page.get_by_role("heading", name="Queues")).to_be_visible()
    page.get_by_role("searchbox").fill(command)
    expect(rows).to_have_count(1)
    ours = open_tab().open(ADMIN)
    expect(ours.locator("#tenant")).to_be_hidden()
    ours.get_by_role("searchbox").fill(command)
    expect(ours.locator("tbody:visible tr")).to_have_count(1)


# --- the server, its workers, and when it is away


def test_workers_and_server(
    tab: Tab, producer: httpx.Client, worker: httpx.Client, command: str
) -> None:
    name = f"w-{uuid.uuid4()}"
    for _ in range(3):
        create(producer, command)
        claim(worker, command, workerId=name)
    page = tab.open(ADMIN)
    page.get_by_role("link", name="Workers").click()
    expect(page.get_by_role("heading", name="Leases by worker")).to_be_visible()
    page.get_by_role("searchbox").fill(name)
    expect(page.locator("tbody:visible tr")).to_have_text(re.compile(rf"{name}\s*3"))
    page.get_by_role("link", name="Server").click()
    expect(page.get_by_text("off: this node is the only one")).to_be_visible()
    expect(page.get_by_text("None since the server started.")).to_be_visible()
    expect(figure(page, "Memory")).to_have_text(re.compile(r"\d+ MiB|\d\.\d GiB"))
    create(producer, command)
    expect(figure(page, "Commit p50")).to_have_text(re.compile(r"[<>]? ?[\d.]+ m?s"))


def test_the_page_outlives_a_kill_of_the_server(
    open_tab: Callable[..., Tab], own_server: Server
) -> None:
    for _ in range(2):
        create(own_server.client(ADMIN), "kept")
    page = open_tab(own_server).open(ADMIN)
    expect(figure(page, "Ready")).to_have_text("2")
    own_server.kill()
    status = page.locator("#status")
    expect(status).to_contain_text("The server does not answer. Trying again every")
    expect(figure(page, "Ready")).to_have_text("2")
    own_server.start()
    expect(status).to_have_text("Connected", timeout=40_000)  # its tries become rarer
    create(own_server.client(ADMIN), "kept")
    expect(figure(page, "Ready")).to_have_text("3")
    expect(figure(page, "Created /s")).to_have_text(re.compile(r"\d"))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "The token was not accepted: no."),
        (403, "This token may not see this page: no."),
        (429, "Too many requests: no. Trying again every 2 seconds."),
        (503, "The server refuses with 503: no."),
    ],
)
def test_a_refusal_is_shown_and_passes(tab: Tab, status: int, message: str) -> None:
    page = tab.open(ADMIN)
    body = '{"code":"x","message":"no","error":"no"}'
    headers = {"retry-after": "2"} if status == 429 else {}
    overview = f"**{PREFIX}/admin/overview*"
    page.route(overview, lambda one: one.fulfill(status=status, body=body, headers=headers))
    poll(page)
    expect(page.locator("#status")).to_contain_text(message)
    page.unroute(overview)
    poll(page)
    expect(page.locator("#status")).to_have_text("Connected")


# --- what a stranger sends, and how it looks


def test_what_others_sent_stays_text(
    tab: Tab, producer: httpx.Client, worker: httpx.Client
) -> None:
    command = f"{EVIL}&amp;/?#{uuid.uuid4()}"
    dead_letters(producer, worker, command, 1)
    create(producer, command, payload=EVIL)
    claim(worker, command, workerId=EVIL)
    page = tab.open(ADMIN)
    page.get_by_role("link", name=command).click()
    expect(page.get_by_role("heading", name=command)).to_be_visible()
    page.locator(".tasks summary").click()
    expect(page.locator(".tasks li")).to_contain_text(f"mail server said {EVIL}")
    page.get_by_role("link", name="Follow this task").click()
    expect(page.locator(".state")).to_have_text("dead letter")
    page.get_by_role("link", name="Workers").click()
    expect(page.locator("tbody:visible tr", has_text=EVIL)).to_have_count(1)
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    open_tab: Callable[..., Tab], producer: httpx.Client, worker: httpx.Client, scheme: str
) -> None:
    command = f"{scheme}-{'long' * 30}"
    dead_letters(producer, worker, command, 1)
    tab = open_tab(viewport=PHONE, color_scheme=scheme, is_mobile=True, has_touch=True)
    page = tab.open()

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]

    fits()
    tab.sign_in(ADMIN)
    page.get_by_role("link", name=command).wait_for()
    fits()
    page.get_by_role("link", name=command).tap()
    page.locator(".tasks summary").tap()
    fits()
    page.get_by_role("button", name="Purge all…").tap()
    fits()
    page.get_by_role("button", name="Keep as it is").tap()
    page.get_by_role("link", name="Follow this task").tap()
    page.locator(".state").wait_for()
    fits()
    for name in ("Workers", "Server"):
        page.get_by_role("link", name=name).tap()
        fits()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


# --- figures


def test_rates_and_percentiles_of_two_polls(tab: Tab) -> None:
    page = tab.open()
    found = page.evaluate(
        """async () => {
          const { History, percentile } = await import("/ui/history.js");
          const queue = { command: "a", ready: 4, delayed: 0, inProgress: 1, dlq: 0, claimed: 0,
            completed: 0, failed: 0, dead: 0, expiredLeases: 0, oldestReadySeconds: 1 };
          const times = { buckets: [{ le: 1, count: 0 }, { le: null, count: 0 }] };
          const history = new History();
          const poll = (second, up, created, latencyCounts) => history.add({
            at: new Date(1e12 + second * 1000).toISOString(), uptimeSeconds: up,
            queues: [{ ...queue, created, latencyCounts }], latencyBoundsSeconds: [1, 2],
            commits: times, syncs: times });
          poll(0, 100, 1000, [5, 5, 5]);
          const first = history.rates("/a");
          for (let second = 1; second <= 20; second += 1) {
            poll(second, 100 + second, 1000 + 30 * second, [5, 5 + second, 5]);
          }
          const rate = history.rates("/a").created;
          const counts = history.latency("/a").counts;
          const kept = history.over("/a", "rates").length;
          poll(21, 0.5, 7, undefined);
          const restarted = history.rates("/a");
          poll(22, 1.5, 17, [0, 0, 3]);
          const again = history.rates("/a").created;
          poll(700, 700, 17, [0, 0, 3]);
          const shares = [0.01, 0.5, 0.9, 0.999].map((share) =>
            percentile(share, [1, 2], [10, 80, 10]));
          return { first, rate, counts, kept, restarted, again, shares,
            left: history.over("/a", "rates").length, none: percentile(0.5, [1], [0, 0]) };
        }"""
    )
    assert found["first"] is None and found["rate"] == 30
    assert found["counts"] == [0, 20, 0]
    assert found["kept"] <= 6, "polls near to each other are thinned out"
    assert found["restarted"] is None and found["again"] == 10
    assert found["left"] == 1, "what is older than ten minutes is forgotten"
    below, middle, upper, above = found["shares"]
    assert below == {"seconds": 1, "kind": "below"}
    assert middle == {"seconds": 1.5, "kind": "in"} and upper["seconds"] == 2
    assert above == {"seconds": 2, "kind": "above"} and found["none"] is None


def test_json_is_indented_and_nothing_else_is_changed(tab: Tab) -> None:
    texts = ['{"a":[1.0,{}, [] ,"x,]\\"{"],"b":1e400}', "12", "no json {", '"<b>"', "[]", ""]
    shown = tab.open().evaluate(
        """async (texts) => {
          const { pretty } = await import("/ui/elements.js");
          return texts.map(pretty);
        }""",
        texts,
    )
    indented = '{\n  "a": [\n    1.0,\n    {},\n    [],\n    "x,]\\"{"\n  ],\n  "b": 1e400\n}'
    assert shown == [indented, *texts[1:]]
