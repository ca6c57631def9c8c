"""The pages of the server: /openapi.json, /docs with its files, and the dashboard at /ui with its.

They ask no other host for anything and run no script but their own.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files

import msgspec

from codeq.config import Config
from codeq.server import openapi
from codeq.server.request import JSON_TYPE, Header, Reply
from codeq.server.routes import OPEN, TABLE, Open, Route

_CLOSED: tuple[Header, ...] = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        b" connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)
_SCRIPTS = (
    *("api", "chart", "dashboard", "elements", "figures", "history", "queue", "queues"),
    *("server", "task"),
)
_FILES = {
    "/docs": "docs.html",
    "/docs/docs.css": "docs.css",
    "/docs/docs.js": "docs.js",
    "/ui": "dashboard.html",
    "/ui/colors.css": "colors.css",
    "/ui/dashboard.css": "dashboard.css",
    "/ui/icon.svg": "icon.svg",
    **{f"/ui/{name}.js": f"{name}.js" for name in _SCRIPTS},
}
_MEDIA = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "svg": b"image/svg+xml",
}
_ROUTES_HERE = "<!-- routes -->"


def replies(config: Config) -> dict[bytes, Reply]:
    """The answers by path."""
    document = msgspec.json.encode(openapi.describe(config))
    found = {b"/openapi.json": Reply(200, document, (JSON_TYPE, *_CLOSED))}
    for path, name in _FILES.items():
        text = files("codeq.server").joinpath("ui", name).read_text("utf-8")
        body = text.replace(_ROUTES_HERE, _routes()).encode()
        media = _MEDIA[name.rpartition(".")[2]]
        found[path.encode()] = Reply(200, body, ((b"content-type", media), *_CLOSED))
    return found


def _routes() -> str:
    """The list of routes for a browser without scripts; the script fills in the rest."""
    every: tuple[Route | Open, ...] = (*TABLE, *OPEN)
    return "\n".join(
        f'<details id="{method.lower()}{escape(route.path)}" data-path="{escape(route.path)}"'
        f' data-method="{method.lower()}">'
        f'<summary><b class="{method.lower()}">{method}</b> <code>{escape(route.path)}</code>'
        f" <span>{escape(route.summary)}</span></summary>"
        f"<p>Token: {escape(openapi.token_of(route))}.</p></details>"
        for route in every
        for method in (openapi.method_of(route),)
    )
