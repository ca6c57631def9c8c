"""What the command says: tables for people, JSON for programs, one line on standard error when
something is wrong, and the exit code."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from codeq.errors import CodeqError, StoreError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_UNREACHABLE = 4
EXIT_INTERRUPTED = 130
EXIT_CODES = (
    "Exit codes: 0 done; 1 refused or failed; 2 wrong use; 3 not found; 4 no answer, or the server"
    " is not ready; 130 interrupted."
)
#: Of a table that goes to a file: lines are as long as they need to be
FILE_COLUMNS = 10_000
MASK = "***"


def exit_code(error: CodeqError) -> int:
    """That of a command which ended with this refusal."""
    if isinstance(error, StoreError):
        return EXIT_FAILED
    return {"not-found": EXIT_NOT_FOUND, "unavailable": EXIT_UNREACHABLE}.get(
        error.slug, EXIT_FAILED
    )


def complain(message: str) -> None:
    """One line on standard error."""
    print(f"codeq: {clean(' '.join(message.split()))}", file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """The text without what a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(
        f"\\x{ord(char):02x}" if unicodedata.category(char) in ("Cc", "Cf") else char
        for char in text
    )


def refuse(message: str) -> int:
    """Complains about how the command was used; returns the exit code."""
    complain(message)
    return EXIT_USAGE


def print_json(body: Any, *, line: bool = False) -> None:
    """The body as JSON, on one line or laid out."""
    import msgspec

    text = msgspec.json.encode(body)
    print((text if line else msgspec.json.format(text, indent=2)).decode(), flush=line)


def console(**options: Any) -> Console:
    """Standard output; without colours when it is no terminal or NO_COLOR is set."""
    from rich.console import Console

    if not sys.stdout.isatty():
        options = {"width": FILE_COLUMNS, "color_system": None, **options}
    return Console(highlight=False, **options)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], **options: Any) -> Table:
    """Columns whose cells are all numbers stand on the right."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), **options)
    lines = [tuple(row) for row in rows]
    for place, name in enumerate(columns):
        numbers = bool(lines) and all(isinstance(row[place], int | float) for row in lines)
        made.add_column(name, justify="right" if numbers else "left")
    for row in lines:
        made.add_row(*(cell if isinstance(cell, Text) else Text(_cell(cell)) for cell in row))
    return made


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else clean(str(value))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table, or its head alone when there are no rows."""
    _print(table(columns, rows))


def print_fields(pairs: Iterable[tuple[str, object]]) -> None:
    """One thing, a line for each of its members that is not empty."""
    lines = [(name, _cell(value)) for name, value in pairs if value not in ("", None)]
    _print(table(("", ""), lines, show_header=False))


def _print(what: RenderableType) -> None:
    out = console()
    if sys.stdout.isatty():
        out.print(what)
        return
    with out.capture() as captured:
        out.print(what, soft_wrap=True)
    for line in captured.get().splitlines():
        print(line.rstrip())


def print_text(text: str) -> None:
    """A line for people."""
    print(clean(text), flush=True)


def laid_out(text: str | bytes) -> str:
    """JSON on several lines; other text as it is."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        return text if isinstance(text, str) else text.decode("utf-8", "replace")
