"""One call over HTTP: tokens, tries and refusals. What the calls mean is known to rest.py."""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from msgspec import Raw, Struct

from codeq.errors import SLUGS, CodeqError
from codeq.model import PREFIX

if TYPE_CHECKING:
    from codeq.client.stream import Token
    from codeq.client.tls import Tls

T = TypeVar("T")

#: The server ends idle connections after 75 s; ours are gone before, so no call meets that end.
IDLE_SECONDS = 30.0
KEPT_CONNECTIONS_MAX = 100
PAUSE_FIRST_SECONDS = 0.05
PAUSE_MAX_SECONDS = 2.0


class ErrorBody(Struct):
    """Any error of the server; ``status`` is that of a task that has not ended."""

    code: str
    message: str
    status: str = ""


class NotEnded(CodeqError):
    """The result of a task that has not ended was asked for."""


class Bearer:
    """A token as it is sent."""

    def __init__(self, token: Token) -> None:
        self._source = token
        self._text: str | None = None

    async def text(self) -> str:
        """The token; a function is asked when there is none, or the last one was refused."""
        if self._text is None:
            given: Any = self._source() if callable(self._source) else self._source
            text = (await given if inspect.isawaitable(given) else given).strip()
            if not (text.isascii() and text.isprintable()):
                raise CodeqError("unauthenticated", "a token has visible ASCII characters only")
            self._text = text
        return self._text

    def refused(self, text: str) -> bool:
        """The server did not take ``text``; returns whether there may be another."""
        if self._text == text:
            self._text = None
        return callable(self._source)


class Caller:
    """Calls to one server; see Client for what its arguments mean."""

    def __init__(
        self,
        base_url: str,
        credentials: Tls | None,
        timeout_seconds: float,
        retry_seconds: float,
    ) -> None:
        url = _url(base_url)
        self.base_url = str(url).rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._retry_seconds = retry_seconds
        name = "" if credentials is None else credentials.server_name
        self._extensions = {"sni_hostname": name} if name else {}
        self._http = httpx.AsyncClient(
            verify=_trust(url.scheme, credentials),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=KEPT_CONNECTIONS_MAX,
                keepalive_expiry=IDLE_SECONDS,
            ),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def call(self, kind: type[T], route: str, *names: str, **options: Any) -> T:
        """The body of the answer, as ``kind``; the rest as ``send``."""
        return read(kind, await self.send(route, *names, **options))

    async def send(
        self,
        route: str,
        *names: str,
        bearer: Bearer | None = None,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool | None = None,
        wait_seconds: float = 0,
    ) -> httpx.Response:
        """The answer, if its status is below 300.

        ``route``: method and path below the prefix (below the root after //), with {} for each of
        ``names``. ``repeatable``: whether it may be sent twice; None = when it reads.
        """
        method, path = route.split(" ")
        below = path[1:] if path.startswith("//") else PREFIX + path
        url = self.base_url + below.format(*map(_quoted, names))
        options: dict[str, Any] = {
            "params": {name: value for name, value in (query or {}).items() if value} or None,
            "content": None if body is None else msgspec.json.encode(members(body)),
            "timeout": httpx.Timeout(
                self._timeout_seconds, read=self._timeout_seconds + wait_seconds
            ),
            "extensions": self._extensions,
        }

        async def once(token: str) -> httpx.Response:
            authorization = {"authorization": f"Bearer {token}"} if token else {}
            sent = {**(headers or {}), **authorization}
            return await self._http.request(method, url, headers=sent, **options)

        return await self._repeat(
            once, bearer, repeatable=method == "GET" if repeatable is None else repeatable
        )

    async def _repeat(
        self,
        once: Callable[[str], Awaitable[httpx.Response]],
        bearer: Bearer | None,
        *,
        repeatable: bool,
    ) -> httpx.Response:
        """The answer of ``once(token)``, which is called again as the class says."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._retry_seconds
        pause_seconds = PAUSE_FIRST_SECONDS
        refreshed = False
        while True:
            token = "" if bearer is None else await bearer.text()
            try:
                answer = await once(token)
            except httpx.RequestError as error:
                refusal = _unanswered(self.base_url, error, repeatable=repeatable)
                wait_seconds = pause_seconds
            else:
                if answer.status_code < 300:
                    return answer
                if answer.status_code == 401 and not refreshed and bearer is not None:
                    refreshed = True
                    if bearer.refused(token):
                        continue
                refusal = _refusal(answer)
                wait_seconds = refusal.retry_after_seconds
            if not repeatable or not wait_seconds or loop.time() + wait_seconds > until:
                raise refusal
            await asyncio.sleep(wait_seconds)
            pause_seconds = min(2 * pause_seconds, PAUSE_MAX_SECONDS)


def _url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise CodeqError("validation-error", f"not http://HOST:PORT or https://HOST:PORT: {text!r}")
    return url


def _trust(scheme: str, credentials: Tls | None) -> ssl.SSLContext:
    if scheme == "http":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused; reading authorities takes long
    return ssl.create_default_context() if credentials is None else credentials.context()


def _quoted(name: str) -> str:
    """A part of a path; dots too, so that "." and ".." stay names."""
    if not name:
        raise CodeqError("validation-error", "a name or an id is empty")
    return quote(name, safe="").replace(".", "%2E")


def members(body: Any) -> Any:
    """The members of a Struct that are there; anything else as it is."""
    if not isinstance(body, Struct):
        return body
    pairs = zip(body.__struct_encode_fields__, msgspec.structs.astuple(body), strict=True)
    return {name: value for name, value in pairs if value not in (None, Raw())}


def read(kind: type[T], answer: httpx.Response) -> T:
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except msgspec.MsgspecError as error:
        text = f"{answer.url} did not answer as codeq does: {error}"
        raise CodeqError("internal", text) from None


def _refusal(answer: httpx.Response) -> CodeqError:
    """What an answer above 300 says."""
    after = answer.headers.get("retry-after", "")
    retry_after_seconds = int(after) if after.isascii() and after.isdecimal() else 0
    try:
        body = msgspec.json.decode(answer.content, type=ErrorBody)
    except msgspec.MsgspecError:
        slug = next((slug for slug, row in SLUGS.items() if row[0] == answer.status_code), None)
        slug = slug or ("unavailable" if answer.status_code >= 500 else "internal")
        text = f"{answer.url} answered {answer.status_code} {answer.reason_phrase}"
        return CodeqError(slug, text, retry_after_seconds)
    kind = NotEnded if body.status else CodeqError
    return kind(body.code, body.message, retry_after_seconds)


def _unanswered(base_url: str, error: httpx.RequestError, *, repeatable: bool) -> CodeqError:
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    unknown = "" if unsent or repeatable else " (nobody knows whether it was done)"
    why = str(error) or type(error).__name__
    return CodeqError("unavailable", f"{base_url} did not answer: {why}{unknown}")
