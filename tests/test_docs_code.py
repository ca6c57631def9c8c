"""Every code block of these pages does what the page says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .code_blocks import ROOT, PageRun

#: Pages, and how many of their blocks are marked as not run
PAGES = {
    "README.md": 1,
    "docs/migration.md": 0,
    "docs/queues.md": 0,
    "docs/quickstart.md": 1,
    "docs/streams.md": 1,
}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize(("page", "left_out"), PAGES.items())
def test_T57_the_blocks_of_a_page_do_what_they_say(
    page: str, left_out: int, tmp_path: Path
) -> None:
    run = PageRun(ROOT / page, tmp_path)
    run.run()
    assert len(run.left_out) == left_out
