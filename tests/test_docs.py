"""What the documents say is there. Their code blocks: test_docs_code.py."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from codeq import config, errors
from codeq.engine.clock import Clock, FakeClock
from codeq.server.auth import SCOPE_RESULT
from codeq.server.providers import build_auth

from .conftest import ROOT
from .receiver import receiver, sender


def snippet(document: str) -> dict[str, Any]:
    """What the Python code of a document defines."""
    text = (ROOT / "docs" / document).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_shown_check_of_a_signature_takes_what_codeq_sends(tmp_path: Path) -> None:
    is_from_codeq = snippet("webhooks.md")["is_from_codeq"]

    async def run() -> None:
        clock = FakeClock(now_ms=int(time.time() * 1000))
        async with receiver() as hook, sender(tmp_path, clock, webhookHmacSecret="s") as node:
            await node.end(hook.url())
            got = await hook.next()
            headers = {
                name: got.headers[name.lower()]
                for name in ("X-CodeQ-Timestamp", "X-CodeQ-Signature")
            }
            assert is_from_codeq("s", headers, got.body)
            assert not is_from_codeq("t", headers, got.body)
            assert not is_from_codeq("s", headers, got.body + b" ")
            assert not is_from_codeq("s", headers, got.body, age_max_s=-1)
            assert not is_from_codeq("s", {}, got.body)

    asyncio.run(run())


def test_T56_T57_the_settings_shown_load_and_their_tokens_share_a_tenant() -> None:
    settings = config.load(str(ROOT / "examples/codeq.yaml"))
    auth = build_auth(settings, Clock())
    producer = auth.producer("change-me-producer")
    worker = auth.worker("change-me-worker", SCOPE_RESULT)
    assert producer.tenant == worker.tenant == "acme"
    assert worker.may_claim(b"anything")


PAGES = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "examples/README.md"))


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    tokens = MarkdownIt().parse(page.read_text())
    texts = (after.content for token, after in pairwise(tokens) if token.type == "heading_open")
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in texts}


def links(page: Path) -> Iterator[str]:
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                yield str(target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in headings(there), target


def test_the_readme_leads_to_every_page() -> None:
    readme = ROOT / "README.md"
    there = {(ROOT / target.partition("#")[0]).resolve() for target in links(readme)}
    assert [page.name for page in PAGES if page != readme and page not in there] == []


#: Refusals of the engine that no event of a stream can have
REST_ONLY = {
    errors.BODY_INVALID,
    errors.PRIORITY_INVALID,
    errors.ERROR_REQUIRED,
    errors.ARTIFACT_INVALID,
    errors.NOT_PENDING,
    errors.WORKER_ID_INVALID,
}


def test_the_refusals_of_the_streams_page_are_those_of_the_server() -> None:
    text = (ROOT / "docs/streams.md").read_text()
    listed: set[str] = set()
    for begin in ("Refusals of a create: ", "Refusals: "):
        listed |= set(re.findall("`([^`]+)`", text.partition(begin)[2].partition(". ")[0]))
    # the text of a bad status goes on with what was sent
    known = {row.stream_message for row in errors.BY_NUMBER.values() if row not in REST_ONLY}
    known -= {errors.STATUS_INVALID.stream_message}
    assert {one for one in listed if not one.startswith("invalid status (")} == known
