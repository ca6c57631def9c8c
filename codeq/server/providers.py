"""Providers of tokens, as the settings want them: static, jwks, or several at once."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from codeq.config import Config, ConfigError
from codeq.engine.clock import Clock
from codeq.model import BLANKS, INT32_MAX, parse_duration_ns
from codeq.server.auth import Auth, AuthError, Principal, Provider, unauthenticated, words

if TYPE_CHECKING:
    from codeq.server.jwks import KeySource, Load

log = logging.getLogger("codeq.auth")

HTTP_TIMEOUT_MS = 5_000
HTTP_TIMEOUT_MS_MAX = 300_000
PROVIDERS_MIN, PROVIDERS_MAX = 2, 4
WELL_KNOWN = "/v1/.well-known/jwks.json"


class StaticProvider:
    """One token, from the settings."""

    def __init__(self, key: str, settings: Any) -> None:
        """``settings`` is the token or a mapping; a ConfigError names ``key``."""
        given = {"token": settings} if isinstance(settings, str) else settings
        if not isinstance(given, dict):
            raise ConfigError(key, "static needs a token")
        _known(key, given, "token", "subject", "email", "scopes", "eventTypes", "raw")
        self._token = _text(key, given, "token", "").strip(BLANKS).encode()
        if not self._token:
            raise ConfigError(f"{key}.token", "is missing")
        raw = given.get("raw") or {}
        if not isinstance(raw, dict):
            raise ConfigError(f"{key}.raw", "must be a mapping")
        self._principal = Principal(
            _text(key, given, "subject", "static"),
            [*_list(key, given, "scopes"), *words(raw.get("scope")), *words(raw.get("scopes"))],
            _list(key, given, "eventTypes") or _list(f"{key}.raw", raw, "eventTypes"),
            raw,
            email=_text(key, given, "email", ""),
        )

    def identify(self, token: str) -> Principal:
        """The one bearer; compared in constant time."""
        if hmac.compare_digest(token.strip(BLANKS).encode(), self._token):
            return self._principal
        raise unauthenticated("invalid token")


class MultiProvider:
    """Several providers, asked in order; the first to accept wins."""

    def __init__(self, providers: Sequence[Provider]) -> None:
        self._providers = tuple(providers)

    def identify(self, token: str) -> Principal:
        """The bearer. Unavailable, rather than refused, when a provider could not say."""
        slug = "unauthenticated"
        reasons: list[str] = []
        for provider in self._providers:
            try:
                return provider.identify(token)
            except AuthError as refused:
                reasons.append(refused.message)
                if refused.slug != "unauthenticated":
                    slug = refused.slug
        said = "; ".join(reasons)
        raise AuthError(slug, f"multi auth: token rejected by every provider: {said}")


def build_auth(config: Config, clock: Clock) -> Auth:
    """Both providers as the settings want them; raises ConfigError."""
    builder = Builder(config, clock)
    return Auth(
        builder.producers(),
        builder.workers(),
        allow_producer_as_worker=config.allow_producer_as_worker,
    )


class Builder:
    """Makes providers; those of one JWKS share its keys."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._sources: dict[tuple[str, int], KeySource] = {}

    def producers(self) -> Provider | None:
        """The provider of producer tokens; None when nothing is set."""
        config = self._config
        if config.producer_auth_provider:
            return self._make(
                config.producer_auth_provider, "producerAuthConfig", config.producer_auth_config
            )
        url, key = config.identity_jwks_url, "identityJwksUrl"
        if not url and config.identity_service_url:
            url = config.identity_service_url.rstrip("/") + WELL_KNOWN
            key = "identityServiceUrl"
        if not url:
            return None
        return self._default(key, url, "identity", config.identity_issuer, config.identity_audience)

    def workers(self) -> Provider | None:
        """The provider of worker tokens; None when nothing is set."""
        config = self._config
        if config.worker_auth_provider:
            return self._make(
                config.worker_auth_provider, "workerAuthConfig", config.worker_auth_config
            )
        url = config.worker_jwks_url
        if not url:
            return None
        return self._default(
            "workerJwksUrl", url, "worker", config.worker_issuer, config.worker_audience
        )

    def _make(self, kind: str, key: str, settings: Any) -> Provider:
        if kind == "static":
            return StaticProvider(key, settings)
        if kind == "jwks":
            return self._jwks(key, settings)
        return self._multi(key, settings)

    def _default(self, key: str, url: str, prefix: str, issuer: str, audience: str) -> Provider:
        """jwks from the keys of the top level."""
        for name, value in (("Issuer", issuer), ("Audience", audience)):
            if not value:
                raise ConfigError(f"{prefix}{name}", f"is missing, as {key} is set")
        return self._tokens_of(key, url, issuer, audience, self._skew_ms, HTTP_TIMEOUT_MS)

    def _jwks(self, key: str, given: Any) -> Provider:
        if not isinstance(given, dict):
            raise ConfigError(key, "jwks needs jwksUrl, issuer and audience")
        _known(key, given, "jwksUrl", "issuer", "audience", "clockSkew", "httpTimeout")
        url, issuer, audience = (
            _required(key, given, name) for name in ("jwksUrl", "issuer", "audience")
        )
        skew_ms = _duration_ms(key, given, "clockSkew", self._skew_ms)
        timeout_ms = _duration_ms(key, given, "httpTimeout", HTTP_TIMEOUT_MS)
        if not 1 <= timeout_ms <= HTTP_TIMEOUT_MS_MAX:
            raise ConfigError(f"{key}.httpTimeout", "must be from 1ms to 5m, such as 5s")
        return self._tokens_of(f"{key}.jwksUrl", url, issuer, audience, skew_ms, timeout_ms)

    def _multi(self, key: str, given: Any) -> Provider:
        if not isinstance(given, dict):
            raise ConfigError(key, "multi needs providers")
        _known(key, given, "providers")
        listed = given.get("providers")
        if not isinstance(listed, list) or not PROVIDERS_MIN <= len(listed) <= PROVIDERS_MAX:
            bounds = f"{PROVIDERS_MIN} to {PROVIDERS_MAX}"
            raise ConfigError(f"{key}.providers", f"must be a list of {bounds} providers")
        return MultiProvider(
            [self._part(f"{key}.providers[{at}]", part) for at, part in enumerate(listed)]
        )

    def _part(self, key: str, given: Any) -> Provider:
        if not isinstance(given, dict):
            raise ConfigError(key, "must have type and config")
        _known(key, given, "type", "config")
        kind = _required(key, given, "type")
        if kind == "multi":
            raise ConfigError(f"{key}.type", "multi cannot hold another multi")
        if kind not in ("static", "jwks"):
            raise ConfigError(f"{key}.type", f"unknown provider {kind!r}")
        return self._make(kind, f"{key}.config", given.get("config"))

    @property
    def _skew_ms(self) -> int:
        return self._config.allowed_clock_skew_seconds * 1000

    def _tokens_of(
        self, key: str, location: str, issuer: str, audience: str, skew_ms: int, timeout_ms: int
    ) -> Provider:
        # Only a server that is set so pays for the libraries of HTTP and of signatures.
        from codeq.server import jwks

        source = self._sources.get((location, timeout_ms))
        if source is None:
            source = jwks.KeySource(key, _loader(key, location, timeout_ms), self._clock.now_ms)
            self._sources[location, timeout_ms] = source
        return jwks.JwksProvider(source, issuer, audience, skew_ms, self._clock.now_ms)


def _loader(key: str, location: str, timeout_ms: int) -> Load:
    """What reads the keys of a URL, or of a file given by its path or a file:// URL. A file must
    be good at the start; a host may be away for a while."""
    from codeq.server import jwks

    try:
        parts = urlsplit(location)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(key, "is no URL") from None
    if parts.scheme in ("http", "https"):
        if not host:
            raise ConfigError(key, "names no host")
        if parts.scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
            log.warning("%s: keys are fetched in clear text; who can change them can log in", key)
        return jwks.Download(location, timeout_ms)
    if parts.scheme == "file" and host in (None, "localhost"):
        location = jwks.path_of(location)
    elif "://" in location:
        raise ConfigError(key, "must be a http, https or file URL, or a path")
    try:
        jwks.read_keys(jwks.read_file(location))
    except OSError as fault:
        raise ConfigError(key, f"{location} cannot be read: {fault.strerror}") from None
    except ValueError as fault:
        raise ConfigError(key, f"{location}: {fault}") from None
    return jwks.FileReader(location)


def _known(key: str, given: dict[str, Any], *names: str) -> None:
    for name in given:
        if name not in names:
            raise ConfigError(f"{key}.{name}", "unknown key")


def _text(key: str, given: dict[str, Any], name: str, default: str) -> str:
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ConfigError(f"{key}.{name}", "must be a text")
    return value


def _required(key: str, given: dict[str, Any], name: str) -> str:
    value = _text(key, given, name, "").strip()
    if not value:
        raise ConfigError(f"{key}.{name}", "is missing")
    return value


def _list(key: str, given: dict[str, Any], name: str) -> list[str]:
    value = given.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{key}.{name}", "must be a list of texts")
    return value


def _duration_ms(key: str, given: dict[str, Any], name: str, default_ms: int) -> int:
    """A duration as text (1m30s) or as a number of nanoseconds, in whole ms."""
    value = given.get(name)
    if value is None:
        return default_ms
    if isinstance(value, str):
        value = parse_duration_ns(value.strip())
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key}.{name}", "must be a duration such as 60s or 1m30s")
    if not 0 <= value <= INT32_MAX * 10**9:
        raise ConfigError(f"{key}.{name}", "is out of bounds")
    return value // 1_000_000
