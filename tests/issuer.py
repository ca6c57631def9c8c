"""An issuer of signed tokens for tests, and the places a server may fetch its keys from."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt

from codeq.engine.clock import FakeClock
from codeq.server.auth import WORKER_SCOPES, KeysAwaited, Principal
from codeq.server.jwks import JwksProvider, KeySource
from codeq.tokens import MAKERS, PrivateKey, public_jwk

ISSUER, AUDIENCE = "https://login.example", "codeq"


@lru_cache
def private_key(algorithm: str, number: int = 0) -> PrivateKey:
    """The same key each time; making one takes a while."""
    return MAKERS["RS256" if algorithm.startswith("RS") else algorithm]()


class Issuer:
    """Signs tokens with keys by id. ``claims`` are those of a worker with all rights."""

    def __init__(self, now_s: int, *, algorithm: str = "EdDSA") -> None:
        self.now_s = now_s
        self.algorithm = algorithm
        self.keys: dict[str, PrivateKey] = {}
        self.add("k1")

    def add(self, kid: str) -> None:
        self.keys[kid] = private_key(self.algorithm, len(self.keys))

    def claims(self, **more: Any) -> dict[str, Any]:
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "w1",
            "tenantId": "acme",
            "exp": self.now_s + 3600,
            "scope": " ".join(sorted(WORKER_SCOPES)),
            "eventTypes": ["*"],
            **more,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, kid: str | None = "k1", headers: Any = None, **claims: Any) -> str:
        """A token; claims given as None are left out."""
        key = self.keys.get(kid or "k1") or private_key(self.algorithm, 99)
        named = {} if kid is None else {"kid": kid}
        return jwt.encode(
            self.claims(**claims),
            key,
            algorithm=self.algorithm,
            headers={**named, **(headers or {})},
        )

    def jwk(self, kid: str, **more: Any) -> dict[str, Any]:
        return {**public_jwk(self.keys[kid]), "alg": self.algorithm, "kid": kid, **more}

    def document(self, *kids: str) -> bytes:
        """The set with these keys (default: all)."""
        return json.dumps({"keys": [self.jwk(kid) for kid in kids or self.keys]}).encode()


class Place:
    """A place of keys in a test's hand: ``answer`` ends the fetch under way."""

    def __init__(self) -> None:
        self.fetches = 0
        self._done: Callable[[bytes | Exception], None] | None = None

    def __call__(self, done: Callable[[bytes | Exception], None]) -> None:
        assert self._done is None, "two fetches at once"
        self.fetches += 1
        self._done = done

    @property
    def asked(self) -> bool:
        return self._done is not None

    def answer(self, outcome: bytes | Exception) -> None:
        assert self._done is not None
        done, self._done = self._done, None
        done(outcome)


class Desk:
    """One provider on a fake clock, a Place and an Issuer."""

    def __init__(self, *, skew_ms: int = 0, algorithm: str = "EdDSA") -> None:
        self.clock = FakeClock()
        self.issuer = Issuer(self.clock.now_ms() // 1000, algorithm=algorithm)
        self.place = Place()
        self.source = KeySource("jwksUrl", self.place, self.clock.now_ms)
        self.provider = JwksProvider(self.source, ISSUER, AUDIENCE, skew_ms, self.clock.now_ms)

    def identify(self, token: str | None = None) -> Principal:
        return self.provider.identify(self.issuer.token() if token is None else token)

    def fetched(self, document: bytes | Exception | None = None, token: str | None = None) -> None:
        """Asks, so that keys are fetched, and answers the fetch."""
        with suppress(KeysAwaited):
            self.identify(token)
        self.place.answer(self.issuer.document() if document is None else document)


class JwksServer:
    """A set of keys over HTTP on loopback. ``hold`` keeps answers back until it is set."""

    def __init__(self) -> None:
        self.document = b'{"keys": []}'
        self.status = 200
        self.headers: dict[str, str] = {}
        self.hits = 0
        self.asked = threading.Event()
        self.hold = threading.Event()
        self.hold.set()
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.hits += 1
        self.asked.set()
        self.hold.wait(30)
        request.send_response(self.status)
        for name, value in self.headers.items():
            request.send_header(name, value)
        request.send_header("content-length", str(len(self.document)))
        request.end_headers()
        request.wfile.write(self.document)


@contextmanager
def jwks_server() -> Iterator[JwksServer]:
    served = JwksServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):  # the client gave up
                served.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}/jwks.json"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield served
        finally:
            served.hold.set()
            server.shutdown()
            thread.join()
