"""POSTs to URLs that strangers chose: signed, bounded, and never into a private network.

Every address is checked where a connection to it is made, whatever its name said before: a name is
asked once, all its addresses must be public, and the connection goes to one of those. Redirects are
not followed. How many run at a time is up to the places (``places.py``).
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import logging
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from codeq import __version__
from codeq.config import Config
from codeq.engine import targets
from codeq.engine.shard import Shard
from codeq.server.limits import Limits, Operation
from codeq.server.places import PLACE, Places
from codeq.server.request import settle

if TYPE_CHECKING:
    from codeq.server.tracing import Tracer

log = logging.getLogger("codeq.callbacks")

TRY_MS = 15_000
#: For so long a name is not asked again; its addresses are checked at each connection all the same
NAME_SECONDS = 10
IDLE_SECONDS = 5
#: What is read of an answer, so that its connection can be used again
ANSWER_BYTES_MAX = 64 << 10

#: Told of each try: kind, command, whether it was a success
Count = Callable[[str, str, bool], None]
Lookup = Callable[[str, int], list[tuple[Any, ...]]]


def host_of(url: str) -> str:
    """The host whose places a POST to the URL takes up."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


class Forbidden(OSError):
    """An address that is not of the public internet."""


class Guard(AbstractResolver):
    """Finds the addresses of names and makes the sockets; refuses those of private networks unless
    ``private``. ``lookup`` is asked on a thread of its own, which nothing can end: the try that it
    is made for keeps its place until then, so there are never more threads than places."""

    def __init__(self, *, private: bool, lookup: Lookup | None = None) -> None:
        self._private = private
        self._lookup = lookup or _look_up

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """All addresses of the name; raises Forbidden when one of them is."""
        looking = asyncio.ensure_future(_on_thread(lambda: self._lookup(host, port)))
        place = PLACE.get()
        if place is not None:
            place.lookups.append(looking)
        found = await looking
        results: list[ResolveResult] = []
        for kind, _, proto, _, address in found:
            self.check(address[0])
            results.append(
                ResolveResult(
                    hostname=host,
                    host=address[0],
                    port=port,
                    family=kind,
                    proto=proto,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        return results

    async def close(self) -> None:
        """Nothing to close; what is still being looked up is forgotten."""

    def connect(self, info: tuple[Any, ...]) -> socket.socket:
        """The socket for a connection to exactly this address, in the form of getaddrinfo."""
        family, kind, proto, _, address = info
        self.check(address[0])
        made = socket.socket(family, kind, proto)
        made.setblocking(False)
        return made

    def check(self, address: str) -> None:
        """Raises Forbidden unless the address may be reached."""
        if not self._private and not targets.is_public(address):
            raise Forbidden(errno.EACCES, f"{address} is not a public address")


def _look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))


async def _on_thread(work: Callable[[], list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    """The value of ``work``, done on a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[list[tuple[Any, ...]] | Exception] = loop.create_future()

    def run() -> None:
        try:
            outcome: list[tuple[Any, ...]] | Exception = work()
        except Exception as error:
            outcome = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, done, outcome)

    threading.Thread(target=run, name="codeq-name", daemon=True).start()
    outcome = await done
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class Callbacks:
    """What results and notifications have in common. Make it inside the loop; ``stop`` ends it.

    ``lookup`` stands in for the name service. With a ``tracer`` each try has a span, whose context
    goes with it.
    """

    def __init__(
        self,
        shard: Shard,
        config: Config,
        *,
        count: Count,
        limits: Limits,
        lookup: Lookup | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.places = Places(config.webhooks.concurrency, config.webhooks.per_host, shard.clock)
        self.limits = limits
        self.count = count
        self._shard = shard
        self._tracer = tracer
        secret = config.webhook_hmac_secret
        self._secret = secret.encode() if secret.strip() else b""
        guard = Guard(private=config.webhooks.allow_private_networks, lookup=lookup)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the places are the limit
                resolver=guard,
                ttl_dns_cache=NAME_SECONDS,
                socket_factory=guard.connect,
                keepalive_timeout=IDLE_SECONDS,
            ),
            timeout=aiohttp.ClientTimeout(),  # a try is ended by the clock of the shard
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"user-agent": f"codeq/{__version__}", "content-type": "application/json"},
            auto_decompress=False,
            trust_env=False,
        )

    async def stop(self) -> None:
        """Ends every try."""
        await self.places.stop()
        await self._session.close()

    async def post(
        self, operation: Operation, url: str, body: bytes, trace: tuple[str, str] = ("", "")
    ) -> str:
        """One try; empty when the answer was 2xx, else why it counts as a failure. ``trace`` is
        the trace parent and trace state of the task."""
        if self._tracer is None:
            return await self._try(url, body, {})
        span = self._tracer.webhook(operation.name, *trace)
        failure = "cut off"
        try:
            failure = await self._try(url, body, span.headers)
        finally:
            span.end(failure)
        return failure

    async def _try(self, url: str, body: bytes, trace: dict[str, str]) -> str:
        headers = {**trace, **self._signature(body)}
        clock = self._shard.clock
        place = PLACE.get()
        if place is not None:
            place.began_s = clock.monotonic_s()
        over = asyncio.Event()
        trying = asyncio.ensure_future(self._send(url, body, headers))
        stop_timer = self._shard.at(clock.now_ms() + TRY_MS, over.set)
        timing = asyncio.ensure_future(over.wait())
        try:
            await asyncio.wait((trying, timing), return_when=asyncio.FIRST_COMPLETED)
            failure = trying.result() if trying.done() else f"no answer within {TRY_MS // 1000} s"
        finally:
            stop_timer()
            timing.cancel()
            trying.cancel()
            await asyncio.gather(trying, timing, return_exceptions=True)
        if place is not None:
            place.failed = bool(failure)
        return failure

    async def _send(self, url: str, body: bytes, headers: dict[str, str]) -> str:
        try:
            target = URL(url, encoded=url.isascii())  # as it was given
            async with self._session.post(
                target, data=body, headers=headers, allow_redirects=False
            ) as answer:
                await answer.content.read(ANSWER_BYTES_MAX)
                return "" if 200 <= answer.status < 300 else f"status {answer.status}"
        except Exception as error:  # whatever it is, it must not lose the delivery
            return str(error) or type(error).__name__

    def _signature(self, body: bytes) -> dict[str, str]:
        if not self._secret:
            return {}
        timestamp = str(self._shard.clock.now_ms() // 1000)
        signed = hmac.new(self._secret, timestamp.encode() + b"." + body, hashlib.sha256)
        return {"X-CodeQ-Timestamp": timestamp, "X-CodeQ-Signature": signed.hexdigest()}
