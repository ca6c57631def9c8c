"""Signed tokens (JWT) and the sets of public keys (JWKS) that tell whether a signature is good.

A ``KeySource`` holds the keys of one URL or file and renews them; a ``JwksProvider`` checks tokens
against them. Nothing here waits: who needs keys that are not there gets ``KeysAwaited``, and every
one that asks meanwhile shares the fetch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import jwt
import msgspec
from jwt.api_jws import PyJWS

from codeq import errors
from codeq.model import BLANKS
from codeq.server.auth import (
    AuthError,
    KeysAwaited,
    Principal,
    refused,
    unauthenticated,
    words,
)

log = logging.getLogger("codeq.auth")

#: How long fetched keys are used without asking again
KEPT_MS = 300_000
#: Age at which a request that needs them has them renewed beside its work
RENEWED_MS = 240_000
#: From the end of one fetch to the next, whatever asks for it
RETRY_MS = 10_000
#: How long the last keys serve while fetches fail
OUTAGE_MS = 3_600_000
SET_BYTES_MAX = 1 << 20
TOKEN_CHARS_MAX = 16_384
#: Verified tokens that one provider remembers, and the longest of them
TOKENS_MAX = 4096
REMEMBERED_CHARS_MAX = 4096
RSA_BITS_MIN = 2048
TIME_MS_MAX = 2**53

#: The type of a key alone decides what may be signed with it
ALGORITHMS: dict[tuple[Any, Any], tuple[str, ...]] = {
    ("RSA", None): ("RS256", "RS384", "RS512"),
    ("EC", "P-256"): ("ES256",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
SIGNED_WITH = frozenset(name for names in ALGORITHMS.values() for name in names)

Keys = dict[tuple[str, str], jwt.PyJWK]
#: Starts to read a set of keys; calls back with its bytes or with what went wrong
Load = Callable[[Callable[[bytes | Exception], None]], None]

_jws = PyJWS(algorithms=sorted(SIGNED_WITH))


# --- sets of keys


def read_keys(document: bytes) -> tuple[dict[tuple[str, str], dict[str, Any]], Keys]:
    """The keys of a JWKS by key id and algorithm, as written and ready for use. What cannot verify
    a token is passed over. Raises ValueError when it is no JWKS."""
    try:
        tree = msgspec.json.decode(document)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    listed = tree.get("keys") if isinstance(tree, dict) else None
    if not isinstance(listed, list):
        raise ValueError("no set of keys (JWKS)")
    written: dict[tuple[str, str], dict[str, Any]] = {}
    keys: Keys = {}
    for at, jwk in enumerate(listed):
        for algorithm in _algorithms(jwk):
            name = (jwk["kid"], algorithm)
            key = _usable(jwk, algorithm)
            if key is None:
                log.warning("key %d of the set cannot be used", at)
            elif name not in keys:
                keys[name], written[name] = key, jwk
    return written, keys


def _algorithms(jwk: Any) -> tuple[str, ...]:
    """What may be signed with a key; nothing with one that is not for signatures."""
    if not isinstance(jwk, dict) or not isinstance(jwk.get("kid"), str) or not jwk["kid"]:
        return ()
    operations = jwk.get("key_ops")
    if jwk.get("use", "sig") != "sig":
        return ()
    if operations is not None and not (isinstance(operations, list) and "verify" in operations):
        return ()
    kind = (jwk.get("kty"), jwk.get("crv"))
    allowed = ALGORITHMS.get(kind, ()) if all(isinstance(x, str | None) for x in kind) else ()
    named = jwk.get("alg")
    return allowed if named is None else tuple(name for name in allowed if name == named)


def _usable(jwk: dict[str, Any], algorithm: str) -> jwt.PyJWK | None:
    """The key, None for one that is malformed, too short, or no secret any more."""
    if "d" in jwk:
        return None
    try:
        key = jwt.PyJWK(jwk, algorithm=algorithm)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    short = algorithm.startswith("RS") and key.key.key_size < RSA_BITS_MIN
    return None if short else key


class KeySource:
    """The keys of one place, fetched when they are needed and old.

    A key that a later set lacks is gone. While fetches fail the last keys serve up to an hour.
    ``generation`` changes with the keys. ``name`` is the setting that names the place.
    """

    def __init__(self, name: str, load: Load, now_ms: Callable[[], int]) -> None:
        self.generation = 0
        self._name = name
        self._load = load
        self._now_ms = now_ms
        self._written: Mapping[tuple[str, str], dict[str, Any]] = {}
        self._keys: Keys = {}
        self._ids: frozenset[str] = frozenset()
        self._fetched_ms: int | None = None
        self._tried_ms: int | None = None
        self._failed = False
        self._waiting: list[Callable[[], None]] | None = None  # None: no fetch is under way

    def find(self, kid: str, algorithm: str) -> jwt.PyJWK:
        """The key of this id, if such a signature may be made with it. An id that is not known has
        the set fetched, not more often than every RETRY_MS."""
        self.check()
        if kid not in self._ids:
            self._renew()
            self._await()
        key = self._keys.get((kid, algorithm))
        if key is not None:
            return key
        if kid in self._ids:
            raise unauthenticated("invalid alg")
        # The set that would have it may be the one that could not be fetched.
        raise self._unavailable() if self._failed else unauthenticated("unknown kid")

    def check(self) -> None:
        """Has old keys renewed; raises KeysAwaited or AuthError while they are too old to use."""
        age_ms = self._age_ms()
        if age_ms < RENEWED_MS:
            return
        self._renew()
        if age_ms < KEPT_MS or self._age_ms() < KEPT_MS:
            return
        usable = age_ms < OUTAGE_MS
        if not (usable and self._failed):  # in an outage nobody waits for the next failure
            self._await()
        if not usable:
            raise self._unavailable()

    def _age_ms(self) -> int:
        return TIME_MS_MAX if self._fetched_ms is None else self._now_ms() - self._fetched_ms

    def _renew(self) -> None:
        """Starts a fetch unless one is under way or was a moment ago."""
        tried_ms = self._tried_ms
        if self._waiting is None and (tried_ms is None or self._now_ms() - tried_ms >= RETRY_MS):
            self._waiting = []
            self._load(self._loaded)

    def _await(self) -> None:
        if self._waiting is not None:
            raise KeysAwaited(self._then)

    def _then(self, call: Callable[[], None]) -> None:
        if self._waiting is None:
            call()
        else:
            self._waiting.append(call)

    def _loaded(self, outcome: bytes | Exception) -> None:
        self._tried_ms = self._now_ms()
        if isinstance(outcome, bytes):
            try:
                self._replace(*read_keys(outcome))
            except ValueError as fault:
                outcome = fault
        self._failed = isinstance(outcome, Exception)
        if self._failed:
            serve = "" if self._age_ms() >= OUTAGE_MS else "; the last ones serve"
            reason = str(outcome) or type(outcome).__name__
            log.warning("%s: the keys cannot be fetched: %s%s", self._name, reason, serve)
        waiting, self._waiting = self._waiting or [], None
        for call in waiting:
            try:
                call()
            except Exception:
                log.exception("a fault after keys were fetched")

    def _replace(self, written: dict[tuple[str, str], dict[str, Any]], keys: Keys) -> None:
        self._fetched_ms = self._now_ms()
        if written == self._written:
            return
        self._written, self._keys = written, keys
        self._ids = frozenset(kid for kid, _ in keys)
        self.generation += 1

    def _unavailable(self) -> AuthError:
        return refused(errors.KEYS_UNAVAILABLE)


# --- where keys come from


def path_of(url: str) -> str:
    """The path of a file:// URL."""
    return unquote(urlsplit(url).path)


def read_file(path: str) -> bytes:
    """The bytes of a set in a file; raises OSError, or ValueError when it is too large."""
    with Path(path).open("rb") as file:
        document = file.read(SET_BYTES_MAX + 1)
    return _bounded(document)


def _bounded(document: bytes) -> bytes:
    if len(document) > SET_BYTES_MAX:
        raise ValueError(f"more than {SET_BYTES_MAX} bytes")
    return document


class FileReader:
    """Reads a set from a file, at once: a local file is quicker than a thread for it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, done: Callable[[bytes | Exception], None]) -> None:
        try:
            outcome: bytes | Exception = read_file(self._path)
        except (OSError, ValueError) as fault:
            outcome = fault
        done(outcome)


class Download:
    """Fetches a set over HTTP on the running loop, in ``timeout_ms`` all in all. Redirects are not
    followed: the place of the keys is a matter of the settings."""

    def __init__(self, url: str, timeout_ms: int) -> None:
        self._url = url
        self._timeout_s = timeout_ms / 1000
        # Made once, because it reads all certificates; connections are not kept.
        self._client = httpx.AsyncClient(
            timeout=self._timeout_s,
            headers={"accept": "application/json"},
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self._task: asyncio.Task[None] | None = None

    def __call__(self, done: Callable[[bytes | Exception], None]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(done))

    async def _run(self, done: Callable[[bytes | Exception], None]) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                outcome: bytes | Exception = await self._get()
        except TimeoutError:
            outcome = ValueError(f"no answer within {self._timeout_s:g} s")
        except Exception as fault:
            outcome = fault
        done(outcome)

    async def _get(self) -> bytes:
        async with self._client.stream("GET", self._url) as answer:
            if answer.status_code != 200:
                raise ValueError(f"HTTP status {answer.status_code}")
            document = b""
            async for part in answer.aiter_bytes():
                document = _bounded(document + part)
            return document


# --- tokens


class JwksProvider:
    """Accepts tokens signed with a key of the source, for one issuer and audience."""

    def __init__(
        self,
        source: KeySource,
        issuer: str,
        audience: str,
        skew_ms: int,
        now_ms: Callable[[], int],
    ) -> None:
        self._source = source
        self._issuer = issuer
        self._audience = audience
        self._skew_ms = skew_ms
        self._now_ms = now_ms
        self._verified: dict[str, Principal] = {}
        self._generation = source.generation

    def identify(self, token: str) -> Principal:
        """The bearer named by the claims. A token is verified once, until it or its key ends."""
        known = self._verified.get(token)
        if known is not None:
            self._source.check()
            if self._generation == self._source.generation and self._lives(known):
                return known
        return self._verify(token)

    def _lives(self, principal: Principal) -> bool:
        return principal.expires_ms is None or self._now_ms() < principal.expires_ms

    def _verify(self, token: str) -> Principal:
        """Looks at the claims first: a token that is not meant for here asks for no keys."""
        text = token.strip(BLANKS)
        header, claims = _parts(text)
        principal = self._principal(claims)
        key = self._source.find(header["kid"], header["alg"])
        try:
            _jws.decode_complete(text, key, algorithms=[header["alg"]])
        except jwt.InvalidSignatureError:
            raise unauthenticated("invalid signature") from None
        except jwt.PyJWTError:
            raise unauthenticated("invalid token") from None
        self._remember(token, principal)
        return principal

    def _remember(self, token: str, principal: Principal) -> None:
        if self._generation != self._source.generation:
            self._verified.clear()
            self._generation = self._source.generation
        if len(token) > REMEMBERED_CHARS_MAX:
            return
        self._verified.pop(token, None)
        if len(self._verified) >= TOKENS_MAX:
            del self._verified[next(iter(self._verified))]
        self._verified[token] = principal

    def _principal(self, claims: dict[str, Any]) -> Principal:
        """The bearer, if the claims are for this audience and time. ``expires_ms`` includes the
        skew: it is the time from which on the token is refused."""
        if claims.get("iss") != self._issuer:
            raise unauthenticated("invalid issuer")
        audience = claims.get("aud")
        if self._audience not in (audience if isinstance(audience, list) else [audience]):
            raise unauthenticated("invalid audience")
        expires_ms = self._end_ms(claims)
        email, subject = claims.get("email"), claims.get("sub")
        event_types = claims.get("eventTypes")
        return Principal(
            subject if isinstance(subject, str) else "",
            [*words(claims.get("scope")), *words(claims.get("scopes"))],
            words(event_types) if isinstance(event_types, list) else [],
            claims,
            email=email if isinstance(email, str) else "",
            expires_ms=expires_ms,
        )

    def _end_ms(self, claims: dict[str, Any]) -> int:
        now_ms = self._now_ms()
        if "exp" not in claims:
            raise unauthenticated("missing exp")
        end_ms = _time_ms(claims["exp"]) + self._skew_ms
        if now_ms >= end_ms:
            raise unauthenticated("token expired")
        if claims.get("nbf") is not None and now_ms + self._skew_ms < _time_ms(claims["nbf"]):
            raise unauthenticated("token not valid yet")
        return end_ms


def _parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(header, claims) of a token whose signature has yet to be looked at."""
    if len(token) > TOKEN_CHARS_MAX:
        raise unauthenticated("invalid token")
    try:
        parts = _jws.decode_complete(token, options={"verify_signature": False})
        header, claims = parts["header"], msgspec.json.decode(parts["payload"])
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise unauthenticated("invalid token") from None
    if not isinstance(claims, dict) or "crit" in header:
        raise unauthenticated("invalid token")
    if not isinstance(header.get("alg"), str) or header["alg"] not in SIGNED_WITH:
        raise unauthenticated("invalid alg")
    if not header.get("kid"):
        raise unauthenticated("missing kid")
    return header, claims


def _time_ms(value: Any) -> int:
    """Milliseconds of a claim in seconds, which may have a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise unauthenticated("invalid token")
    bound_s = TIME_MS_MAX / 1000
    return int(max(-bound_s, min(value, bound_s)) * 1000)
