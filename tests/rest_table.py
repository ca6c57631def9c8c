"""The tables of docs/rest.md, made from the table of routes.

python -m tests.rest_table

writes them anew between their markers.
"""

from __future__ import annotations

from collections.abc import Iterable

from codeq.errors import Refusal
from codeq.model import PREFIX
from codeq.server.openapi import method_of, text_of, token_of
from codeq.server.routes import ACCESSES, OPEN, TABLE, Open, Route, refusals_of

from .conftest import ROOT

DOCUMENT = ROOT / "docs/rest.md"
BEGIN, END = "<!-- routes: begin -->\n", "<!-- routes: end -->\n"


def said(rows: Iterable[Refusal]) -> str:
    """The texts of refusals by status."""
    by_status: dict[int, list[str]] = {}
    for row in sorted(rows, key=lambda row: row.http):
        texts = by_status.setdefault(row.http, [])
        text = f"`{text_of(row)}`"
        if text not in texts:
            texts.append(text)
    return "<br>".join(f"{status}: {', '.join(texts)}" for status, texts in by_status.items())


def rows_of_tokens() -> Iterable[str]:
    yield "| Token | Refused with |"
    yield "|---|---|"
    for access in ACCESSES:
        yield f"| {access.name} | {said(access.refusals)} |"


def rows_of_routes() -> Iterable[str]:
    yield "| Route | Token | Done | Refused with | Also |"
    yield "|---|---|---|---|---|"
    every: tuple[Route | Open, ...] = (*TABLE, *OPEN)
    for route in every:
        path = route.path.removeprefix(PREFIX)
        done = ", ".join(str(answer.status) for answer in route.answers)
        common = {row.http for row in refusals_of(route) if row not in route.refusals}
        also = " ".join(map(str, sorted(common)))
        cells = (f"{method_of(route)} {path}", token_of(route), done, said(route.refusals), also)
        yield f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("  ", " ")


def tables() -> str:
    return "\n".join((*rows_of_tokens(), "", *rows_of_routes(), ""))


def with_tables(text: str) -> str:
    """The document with the tables as they are now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{tables()}{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
