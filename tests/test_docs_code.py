"""Every code block of these pages does what the page says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .code_blocks import ROOT, PageRun

#: Pages, and how many of their blocks are marked as not run
PAGES = {
    "README.md": 1,
    "docs/client.md": 0,
    "docs/configuration.md": 0,
    "docs/migration.md": 0,
    "docs/queues.md": 0,
    "docs/quickstart.md": 1,
    "docs/streams.md": 3,
    "docs/webhooks.md": 0,
}


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize(("page", "left_out"), PAGES.items())
def test_T57_the_blocks_of_a_page_do_what_they_say(
    page: str, left_out: int, tmp_path: Path
) -> None:
    run = PageRun(ROOT / page, tmp_path)
    run.run()
    assert len(run.left_out) == left_out


NO_SERVER = "It takes no `codeq serve --dev`.\n\n"
ID, OTHER_ID = (f"01a20c12-e697-7000-8000-00000000000{digit}" for digit in "12")


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("```console\n$ echo one\ntwo\n```\n", "not\ntwo"),
        ("```console\n$ echo one\n```\n", "it said\none"),
        ("```console\n$ echo none\none\n```\n", "it said\nnone"),
        ("```console\n$ echo one; echo two\ntwo\n```\n", "it said\none"),
        ("```console\n$ echo one; false\none\n```\n", "ended with 1"),
        ("```console\none\n```\n", "begins with a line after"),
        ("```python\nraise SystemExit(3)\n```\n", "ended with 3"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "it said\n1"),
        ("```yaml\nportt: 80\n```\n", "portt: unknown key"),
        ("```json\n{]\n```\n", "malformed|Expecting"),
        ("```\nwhat is this?\n```\n", "say what this block is"),
        (f"```console\n$ echo {ID}\n{ID}\n$ echo {OTHER_ID}\n{ID}\n```\n", "it said"),
    ],
)
def test_a_page_that_does_not_tell_the_truth_fails(page: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(NO_SERVER + page)
    with pytest.raises(AssertionError, match=why):
        PageRun(path, tmp_path).run()


def test_the_values_of_a_run_take_the_place_of_those_shown(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        f"""{NO_SERVER}
<!-- file: id.py -->
```python
print("made {OTHER_ID}")
```

```console
$ python id.py
made {ID}
$ test {ID} = {OTHER_ID} && echo the same
the same
$ printf 'a\\nb\\nc\\n'
a
...
c
```
"""
    )
    PageRun(path, tmp_path).run()
