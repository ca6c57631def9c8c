"""The code shown in docs/ does what it says."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

from codeq.engine.clock import FakeClock

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
