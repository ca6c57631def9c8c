"""Providers from the settings: which one, with what, and what stops the start."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from codeq.config import ConfigError, load
from codeq.engine.clock import FakeClock
from codeq.model import parse_duration_ns
from codeq.server import providers
from codeq.server.auth import Auth, AuthError, KeysAwaited
from codeq.server.jwks import Download, KeySource
from codeq.server.providers import Builder, MultiProvider, StaticProvider, build_auth

from .issuer import AUDIENCE, ISSUER, Issuer
from .test_jwks import refused


class Site:
    """A folder with the keys of an issuer, and settings that name them."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.issuer = Issuer(self.clock.now_ms() // 1000)
        self.file = folder / "jwks.json"
        self.file.write_bytes(self.issuer.document())

    def jwks(self, **more: Any) -> dict[str, Any]:
        return {"jwksUrl": str(self.file), "issuer": ISSUER, "audience": AUDIENCE, **more}

    def auth(self, **flags: Any) -> Auth:
        return build_auth(load(flags=flags), self.clock)

    def producers(self, provider: str, config: Any, **flags: Any) -> Auth:
        named = {"producerAuthProvider": provider, "producerAuthConfig": config}
        return self.auth(**named, **flags)

    def bad_key(self, provider: str, config: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.producers(provider, config)
        assert "\n" not in str(caught.value)
        return caught.value.key


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


# --- jwks


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_a_set_in_a_file(site: Site, form: str) -> None:
    known = site.producers("jwks", site.jwks(jwksUrl=form.format(site.file)))
    assert known.producer(site.issuer.token()).tenant == "acme"


def test_a_path_may_be_percent_encoded(site: Site, tmp_path: Path) -> None:
    place = tmp_path / "a b.json"
    place.write_bytes(site.file.read_bytes())
    url = f"file://{tmp_path}/a%20b.json"
    assert site.producers("jwks", site.jwks(jwksUrl=url)).producer(site.issuer.token())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"jwksUrl": None}, "jwksUrl"),
        ({"jwksUrl": " "}, "jwksUrl"),
        ({"jwksUrl": "/no/such/file"}, "jwksUrl"),
        ({"jwksUrl": "file:///no/such/file"}, "jwksUrl"),
        ({"jwksUrl": "/"}, "jwksUrl"),
        ({"jwksUrl": "ftp://host/x"}, "jwksUrl"),
        ({"jwksUrl": "https:///x"}, "jwksUrl"),
        ({"jwksUrl": "https://host:port/x"}, "jwksUrl"),
        ({"jwksUrl": "https://[::1/x"}, "jwksUrl"),
        ({"issuer": ""}, "issuer"),
        ({"issuer": ["x"]}, "issuer"),
        ({"audience": None}, "audience"),
        ({"clockSkew": "60"}, "clockSkew"),
        ({"clockSkew": "-1s"}, "clockSkew"),
        ({"clockSkew": 1.5}, "clockSkew"),
        ({"clockSkew": True}, "clockSkew"),
        ({"clockSkew": "9999999999h"}, "clockSkew"),
        ({"clockSkew": 10**30}, "clockSkew"),
        ({"httpTimeout": 5}, "httpTimeout"),
        ({"httpTimeout": "1h"}, "httpTimeout"),
        ({"leeway": 5}, "leeway"),
    ],
)
def test_T62_bad_jwks_settings_name_their_key(site: Site, change: dict[str, Any], key: str) -> None:
    assert site.bad_key("jwks", site.jwks(**change)) == f"producerAuthConfig.{key}"
    part = {"type": "jwks", "config": site.jwks(**change)}
    parts = [{"type": "static", "config": "t"}, part]
    nested = f"producerAuthConfig.providers[1].config.{key}"
    assert site.bad_key("multi", {"providers": parts}) == nested


def test_T62_a_file_that_is_no_set_stops_the_start(site: Site) -> None:
    for content in (b"", b"[]", b'{"keys": 1}'):
        site.file.write_bytes(content)
        assert site.bad_key("jwks", site.jwks()) == "producerAuthConfig.jwksUrl"
    assert site.bad_key("jwks", "token") == "producerAuthConfig"
    assert site.bad_key("jwks", None) == "producerAuthConfig"


def test_the_skew_of_a_provider_is_its_own_or_that_of_all(site: Site) -> None:
    late = site.issuer.token(exp=site.issuer.now_s - 50)
    assert site.producers("jwks", site.jwks()).producer(late)
    for text in ("0", "49s", 49 * 10**9):
        known = site.producers("jwks", site.jwks(clockSkew=text))
        assert refused(partial(known.producer, late))[1] == "token expired"
    assert site.producers("jwks", site.jwks(clockSkew="51s"), allowedClockSkewSeconds=0)
    strict = site.producers("jwks", site.jwks(), allowedClockSkewSeconds=50)
    assert refused(lambda: strict.producer(late))[1] == "token expired"


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("60s", 60 * 10**9),
        ("1m30s", 90 * 10**9),
        ("1.5h", 5400 * 10**9),
        (".5s", 500_000_000),
        ("250ms", 250_000_000),
        ("3us", 3_000),
        ("3µs", 3_000),
        ("7ns", 7),
        ("0", 0),
        ("1h1h", 7200 * 10**9),
    ],
)
def test_durations(text: str, ns: int) -> None:
    assert parse_duration_ns(text) == ns


@pytest.mark.parametrize(
    "text", ["", "60", "s", "1", "1x", "-1s", "1 s", "1s ", "1.2.3s", "\u0661s", "s1"]
)
def test_texts_that_are_no_durations(text: str) -> None:
    assert parse_duration_ns(text) is None


# --- what stands for an empty provider


def test_empty_providers_mean_the_keys_of_the_top_level(site: Site) -> None:
    known = site.auth(
        identityJwksUrl=str(site.file),
        identityIssuer=ISSUER,
        identityAudience="producers",
        workerJwksUrl=str(site.file),
        workerIssuer=ISSUER,
    )
    producer = site.issuer.token(aud="producers")
    worker = site.issuer.token(aud="codeq-worker")
    assert known.producer(producer).tenant == known.worker(worker).tenant == "acme"
    assert refused(lambda: known.producer(worker))[1] == "invalid audience"
    assert refused(lambda: known.worker(producer))[1] == "invalid audience"
    assert not site.auth().has_producers and not site.auth().has_workers


def test_the_service_url_gives_the_place_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Noted(Download):
        def __init__(self, url: str, timeout_ms: int) -> None:
            asked.append(url)

    monkeypatch.setattr("codeq.server.jwks.Download", Noted)
    named = {"identityIssuer": ISSUER, "identityAudience": AUDIENCE}
    for url in ("https://id.example", "https://id.example/"):
        build_auth(load(flags={"identityServiceUrl": url, **named}), FakeClock())
    both = {"identityServiceUrl": "https://id.example", "identityJwksUrl": "https://keys.example/k"}
    build_auth(load(flags={**both, **named}), FakeClock())
    well_known = "https://id.example/v1/.well-known/jwks.json"
    assert asked == [well_known, well_known, "https://keys.example/k"]


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ({"identityJwksUrl": "https://id.example/k"}, "identityIssuer"),
        ({"identityServiceUrl": "https://id.example", "identityIssuer": "x"}, "identityAudience"),
        ({"workerJwksUrl": "https://id.example/k"}, "workerIssuer"),
        ({"workerJwksUrl": "x", "workerIssuer": "x", "workerAudience": ""}, "workerAudience"),
        ({"workerJwksUrl": "/no/such/file", "workerIssuer": "x"}, "workerJwksUrl"),
    ],
)
def test_T62_incomplete_keys_of_the_top_level(flags: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_auth(load(flags=flags), FakeClock())
    assert caught.value.key == key


def test_providers_of_one_place_share_its_keys(site: Site) -> None:
    flags = {
        "identityJwksUrl": str(site.file),
        "identityIssuer": ISSUER,
        "identityAudience": "p",
        "workerJwksUrl": str(site.file),
        "workerIssuer": ISSUER,
    }
    builder = Builder(load(flags=flags), site.clock)
    builder.producers()
    builder.workers()
    assert len(builder._sources) == 1


def test_keys_in_clear_text_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def warnings(url: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "codeq.auth"):
            providers._loader("workerJwksUrl", url, 1000)
        return [record.getMessage() for record in caplog.records]

    assert warnings("https://id.example/k") == warnings("http://127.0.0.1:1/k") == []
    (said,) = warnings("http://id.example/k")
    assert said.startswith("workerJwksUrl: ")


# --- multi


def test_the_first_provider_to_accept_wins(site: Site) -> None:
    parts = [
        {"type": "static", "config": {"token": "one", "subject": "first"}},
        {"type": "jwks", "config": site.jwks()},
        {"type": "static", "config": {"token": "one", "subject": "second"}},
        {"type": "static", "config": {"token": "two", "subject": "third"}},
    ]
    known = site.producers("multi", {"providers": parts})
    assert known.producer("one").subject == "first"
    assert known.producer("two").subject == "third"
    assert known.producer(site.issuer.token()).subject == "w1"
    refusal = "multi auth: token rejected by every provider: "
    reasons = "invalid token; invalid token; invalid token; invalid token"
    assert refused(lambda: known.producer("three")) == ("unauthenticated", refusal + reasons)
    late = site.issuer.token(exp=1)
    reasons = "invalid token; token expired; invalid token; invalid token"
    assert refused(lambda: known.producer(late)) == ("unauthenticated", refusal + reasons)
    assert refused(lambda: known.any("three")) == ("unauthenticated", "invalid token")


class Away:
    """A provider that cannot say anything now."""

    def identify(self, token: str) -> Any:
        raise AuthError("unavailable", "token keys cannot be fetched")


def test_a_provider_that_cannot_say_makes_the_refusal_unavailable() -> None:
    tokens = StaticProvider("c", {"token": "t", "subject": "acme", "eventTypes": ["*"]})
    several = MultiProvider([Away(), tokens])
    assert several.identify("t").subject == "acme"
    assert refused(lambda: several.identify("x"))[0] == "unavailable"
    for known in (Auth(Away(), tokens), Auth(tokens, Away())):
        assert known.any("t").tenant == "acme"
        assert refused(partial(known.any, "x"))[0] == "unavailable"
    either = Auth(Away(), tokens, allow_producer_as_worker=True)
    assert refused(lambda: either.worker("x"))[0] == "unavailable"
    as_worker = Auth(tokens, Away(), allow_producer_as_worker=True)
    assert as_worker.worker("t").tenant == "acme"


def test_keys_to_fetch_are_waited_for_whatever_the_class(site: Site) -> None:
    source = KeySource("key", lambda done: None, site.clock.now_ms)
    provider = providers.Builder(load(), site.clock)
    provider._sources["https://id.example/k", 5000] = source
    unfetched = provider._make("jwks", "c", site.jwks(jwksUrl="https://id.example/k"))
    static = StaticProvider("c", "t")
    token = site.issuer.token()
    several = MultiProvider([static, unfetched])
    for known in (Auth(unfetched, static), Auth(several, several), Auth(static, unfetched)):
        with pytest.raises(KeysAwaited):
            known.any(token)
    with pytest.raises(KeysAwaited):
        Auth(unfetched, static, allow_producer_as_worker=True).worker(token)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (None, ""),
        ("token", ""),
        ({}, ".providers"),
        ({"providers": []}, ".providers"),
        ({"providers": [{"type": "static", "config": "a"}]}, ".providers"),
        ({"providers": [{"type": "static", "config": "a"}] * 5}, ".providers"),
        ({"providers": ["a", "b"]}, ".providers[0]"),
        ({"providers": [{"type": "static", "config": "a"}, {}]}, ".providers[1].type"),
        ({"providers": [{"type": "magic"}] * 2}, ".providers[0].type"),
        ({"providers": [{"type": "multi", "config": {}}] * 2}, ".providers[0].type"),
        ({"providers": [{"type": "static"}] * 2}, ".providers[0].config"),
        ({"providers": [{"type": "static", "settings": "a"}] * 2}, ".providers[0].settings"),
        ({"providers": [{"type": "static", "config": "a"}] * 2, "first": 1}, ".first"),
        ({"providers": [{"type": "static", "config": {"tokn": "a"}}] * 2},
         ".providers[0].config.tokn"),
    ],
)  # fmt: skip
def test_T62_bad_multi_settings_name_their_key(site: Site, config: Any, key: str) -> None:
    assert site.bad_key("multi", config) == f"producerAuthConfig{key}"


def test_multi_from_the_environment(site: Site) -> None:
    parts = [{"type": "static", "config": "one"}, {"type": "jwks", "config": site.jwks()}]
    environ = {
        "WORKER_AUTH_PROVIDER": "multi",
        "WORKER_AUTH_CONFIG": json.dumps({"providers": parts}),
    }
    assert build_auth(load(environ=environ), site.clock).worker(site.issuer.token()).subject == "w1"
