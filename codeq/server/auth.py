"""Who is calling: principals, and what each class of route asks of them.

A provider (providers.py, jwks.py) turns a token into a ``Principal`` or raises ``AuthError``, or
``KeysAwaited`` when it has to fetch keys first. ``Auth`` holds the provider of producer tokens and
that of worker tokens and answers for both edges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from codeq import errors
from codeq.errors import CodeqError, Refusal
from codeq.model import BLANKS, TENANT_PATTERN

SCOPE_CLAIM = "codeq:claim"
SCOPE_HEARTBEAT = "codeq:heartbeat"
SCOPE_ABANDON = "codeq:abandon"
SCOPE_NACK = "codeq:nack"
SCOPE_RESULT = "codeq:result"
SCOPE_SUBSCRIBE = "codeq:subscribe"
WORKER_SCOPES = frozenset(
    (SCOPE_CLAIM, SCOPE_HEARTBEAT, SCOPE_ABANDON, SCOPE_NACK, SCOPE_RESULT, SCOPE_SUBSCRIBE)
)
SCOPE_ADMIN = "codeq:admin"
SCOPE_OPERATOR = "codeq:operator"
WILDCARD = "*"

TENANT_CLAIMS = ("tid", "tenantId", "tenant_id", "organizationId", "organization_id")
_TENANT = re.compile(TENANT_PATTERN, re.ASCII)

#: How often one request or stream waits for keys before it is refused as unavailable: each of at
#: most two providers of four may have one set to fetch
KEY_WAITS_MAX = 8


class AuthError(CodeqError):
    """The caller is not let in. ``slug`` is unauthenticated, permission-denied or unavailable."""


class KeysAwaited(Exception):
    """Whether the caller is let in depends on keys that are being fetched. ``then(call)`` calls
    back when they have come, or have not; then the same question is to be asked again."""

    def __init__(self, then: Callable[[Callable[[], None]], None]) -> None:
        super().__init__("keys are being fetched")
        self.then = then


def unauthenticated(message: str) -> AuthError:
    """The refusal of a token, with the reason."""
    return AuthError("unauthenticated", message)


def refused(row: Refusal) -> AuthError:
    """The refusal of one row of the table."""
    return AuthError(row.slug, row.message)


class Principal:
    """A token's bearer, as one provider sees it. Made once per token, so all is worked out here.

    ``tenant`` is empty when the claims name none or contradict each other; ``Auth`` hands out no
    such principal. ``event_types`` are the commands the bearer may claim, trimmed UTF-8;
    ``any_command`` when the wildcard is among them. ``expires_ms`` is the end of the token in ms
    since the epoch, None if it has none.
    """

    __slots__ = (
        "any_command",
        "email",
        "event_types",
        "expires_ms",
        "has_event_types",
        "is_admin",
        "is_operator",
        "scopes",
        "subject",
        "tenant",
    )

    def __init__(
        self,
        subject: str,
        scopes: Iterable[str],
        event_types: Iterable[str],
        claims: dict[str, Any],
        *,
        email: str = "",
        expires_ms: int | None = None,
    ) -> None:
        self.subject = subject.strip(BLANKS)
        self.email = email
        self.expires_ms = expires_ms
        self.scopes = frozenset(scopes)
        names = [name.strip(BLANKS) for name in event_types]
        self.has_event_types = any(names)
        self.any_command = WILDCARD in names
        self.event_types = tuple(
            dict.fromkeys(name.encode() for name in names if name and name != WILDCARD)
        )
        self.tenant = tenant_of(claims, self.subject)
        role = claims.get("role")
        is_admin_role = isinstance(role, str) and role.strip(BLANKS).upper() == "ADMIN"
        self.is_operator = SCOPE_OPERATOR in self.scopes
        self.is_admin = SCOPE_ADMIN in self.scopes or self.is_operator or is_admin_role

    def as_worker(self) -> Principal:
        """The same bearer with the six worker scopes and every event type."""
        worker = Principal(
            self.subject,
            WORKER_SCOPES,
            (WILDCARD,),
            {},
            email=self.email,
            expires_ms=self.expires_ms,
        )
        worker.tenant = self.tenant
        return worker

    def may_claim(self, command: bytes) -> bool:
        """Whether the bearer may claim this command (trimmed)."""
        return self.any_command or command in self.event_types


def tenant_of(claims: dict[str, Any], subject: str) -> str:
    """The tenant named by the claims, else by the subject; empty when there is none to trust."""
    named = [claims[name] for name in TENANT_CLAIMS if name in claims]
    if not named:
        named = [subject]
    tenants = {value.strip(BLANKS) if isinstance(value, str) else "" for value in named}
    tenant = tenants.pop()
    return tenant if not tenants and is_tenant(tenant) else ""


def is_tenant(text: str) -> bool:
    """Whether this can be the name of a tenant. The layout of the store relies on it."""
    return _TENANT.fullmatch(text) is not None


def words(value: Any) -> list[str]:
    """Scopes of a claim: words of a text, or the texts of a list."""
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str)]
    return []


class Provider(Protocol):
    """Knows tokens."""

    def identify(self, token: str) -> Principal:
        """The bearer of a token; raises KeysAwaited, or AuthError with the reason: unauthenticated,
        or unavailable when nothing can be said of the token now."""


def bearer(header: bytes | None) -> str:
    """The token of an Authorization header; raises AuthError."""
    if header is None:
        raise refused(errors.HEADER_MISSING)
    parts = header.split()
    if len(parts) != 2 or parts[0].lower() != b"bearer":
        raise refused(errors.FORMAT_INVALID)
    try:
        return parts[1].decode()
    except UnicodeDecodeError:
        raise refused(errors.TOKEN_INVALID) from None


class Auth:
    """What each class of routes, and each stream, asks of a token. All raise AuthError or
    KeysAwaited."""

    def __init__(
        self,
        producers: Provider | None,
        workers: Provider | None,
        *,
        allow_producer_as_worker: bool = False,
    ) -> None:
        self._producers = producers
        self._workers = workers
        self._allow_producer_as_worker = allow_producer_as_worker

    @property
    def has_producers(self) -> bool:
        """Whether producer tokens can be accepted at all."""
        return self._producers is not None

    @property
    def has_workers(self) -> bool:
        """Whether worker tokens can be accepted at all."""
        return self._workers is not None or (
            self._allow_producer_as_worker and self._producers is not None
        )

    def producer(self, token: str) -> Principal:
        """A producer with a tenant."""
        if self._producers is None:
            raise refused(errors.PRODUCERS_OFF)
        return _with_tenant(self._producers.identify(token))

    def worker(self, token: str, scope: str | None = None) -> Principal:
        """A worker with subject, event types, scopes and tenant, and with this scope if one is
        given. With allowProducerAsWorker a token that only passes as producer passes too."""
        principal = self._worker_principal(token)
        if scope is not None and scope not in principal.scopes:
            raise refused(errors.SCOPE_DENIED)
        return principal

    def any(self, token: str) -> Principal:
        """A worker, else a producer; either with a tenant. A worker is no operator: a token that
        says so is asked for as a producer's, too."""
        if self._producers is None and self._workers is None:
            raise refused(errors.PRODUCERS_OFF)
        worker, no_word = _asked(self._workers, token)
        if worker is not None and worker.has_event_types:
            worker = _with_tenant(worker)
            if not worker.is_operator:
                return worker
        else:
            worker = None
        producer, no_later_word = _asked(self._producers, token)
        if producer is not None:
            return _with_tenant(producer)
        if worker is not None:
            return worker.as_worker()
        raise no_later_word or no_word or refused(errors.TOKEN_INVALID)

    def admin(self, token: str) -> Principal:
        """A producer who may administer the own tenant (operators: every tenant)."""
        principal = self.producer(token)
        if not principal.is_admin:
            raise refused(errors.ADMIN_ONLY)
        return principal

    def operator(self, token: str) -> Principal:
        """A producer who may do what concerns every tenant."""
        principal = self.producer(token)
        if not principal.is_operator:
            raise refused(errors.OPERATOR_ONLY)
        return principal

    def _worker_principal(self, token: str) -> Principal:
        if self._workers is None and self._producers is not None and self.has_workers:
            return _producer_at_work(self._producers.identify(token))
        try:
            if self._workers is None:
                raise refused(errors.WORKERS_OFF)
            principal = _complete_worker(self._workers.identify(token))
        except AuthError:
            producer = self._producer_as_worker(token)
            if producer is None:
                raise
            return producer
        return _with_tenant(principal)

    def _producer_as_worker(self, token: str) -> Principal | None:
        if not self._allow_producer_as_worker:
            return None
        principal = _identify(self._producers, token)
        return None if principal is None else _producer_at_work(principal)


def _identify(provider: Provider | None, token: str) -> Principal | None:
    """As ``identify``, with None for a token that is no good."""
    if provider is None:
        return None
    try:
        return provider.identify(token)
    except AuthError as error:
        if error.slug != "unauthenticated":
            raise
        return None


def _asked(provider: Provider | None, token: str) -> tuple[Principal | None, AuthError | None]:
    """As ``_identify``; the error of a provider that could not say is the second value."""
    try:
        return _identify(provider, token), None
    except AuthError as error:
        return None, error


def _with_tenant(principal: Principal) -> Principal:
    if not principal.tenant:
        raise refused(errors.TENANT_INVALID)
    return principal


def _with_subject(principal: Principal) -> Principal:
    """A lease is owned by a subject; without one it would be nobody's."""
    if not principal.subject:
        raise refused(errors.SUBJECT_MISSING)
    return principal


def _producer_at_work(principal: Principal) -> Principal:
    return _with_tenant(_with_subject(principal)).as_worker()


def _complete_worker(principal: Principal) -> Principal:
    _with_subject(principal)
    if not principal.has_event_types:
        raise refused(errors.EVENT_TYPES_MISSING)
    if not principal.scopes:
        raise refused(errors.SCOPES_MISSING)
    return principal
