"""Signed tokens: what is accepted, with which keys, and for how long."""

from __future__ import annotations

import asyncio
import json
from base64 import urlsafe_b64encode
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes, hmac, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from codeq.server import jwks
from codeq.server.auth import AuthError, KeysAwaited
from codeq.server.jwks import (
    KEPT_MS,
    OUTAGE_MS,
    RENEWED_MS,
    RETRY_MS,
    Download,
    FileReader,
    KeySource,
    read_keys,
)

from .issuer import AUDIENCE, ISSUER, Desk, Issuer, JwksServer, jwks_server, private_key

DOWN = OSError("no route to host")
UNAVAILABLE = ("unavailable", "token keys cannot be fetched")


def ready(**options: Any) -> Desk:
    """A desk whose keys are there."""
    desk = Desk(**options)
    desk.fetched()
    return desk


def refused(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(AuthError) as caught:
        call()
    return caught.value.slug, caught.value.message


def reason(desk: Desk, token: str) -> str:
    slug, message = refused(lambda: desk.identify(token))
    assert slug == "unauthenticated"
    return message


def base64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def unsigned(header: dict[str, Any], claims: Any, signature: bytes = b"") -> str:
    return ".".join(
        [
            base64(json.dumps(header).encode()),
            base64(json.dumps(claims).encode()),
            base64(signature),
        ]
    )


# --- what is accepted


@pytest.mark.parametrize("algorithm", ["RS256", "RS384", "RS512", "ES256", "EdDSA"])
def test_tokens_of_each_algorithm(algorithm: str) -> None:
    desk = ready(algorithm=algorithm)
    token = desk.issuer.token(scopes=["codeq:admin"], email="w@acme.example", role="admin")
    principal = desk.identify(token)
    assert (principal.subject, principal.tenant, principal.email) == (
        "w1",
        "acme",
        "w@acme.example",
    )
    assert {"codeq:claim", "codeq:admin"} < principal.scopes
    assert principal.any_command and principal.is_admin
    assert principal.expires_ms == desk.clock.now_ms() + 3_600_000
    header, _, signature = token.split(".")
    other = base64(json.dumps(desk.issuer.claims(sub="root")).encode())
    assert reason(desk, f"{header}.{other}.{signature}") == "invalid signature"
    assert reason(desk, token[:-8] + "AAAAAAAA") == "invalid signature"


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ({"iss": "https://login.example/"}, "invalid issuer"),
        ({"iss": None}, "invalid issuer"),
        ({"iss": [ISSUER]}, "invalid issuer"),
        ({"aud": "codeq-worker"}, "invalid audience"),
        ({"aud": ["a", "b"]}, "invalid audience"),
        ({"aud": f"{AUDIENCE} "}, "invalid audience"),
        ({"aud": {AUDIENCE: 1}}, "invalid audience"),
        ({"aud": None}, "invalid audience"),
        ({"exp": None}, "missing exp"),
        ({"exp": "tomorrow"}, "invalid token"),
        ({"exp": True}, "invalid token"),
        ({"exp": -(10**15)}, "token expired"),
        ({"nbf": "yesterday"}, "invalid token"),
        ({"nbf": 10**15}, "token not valid yet"),
    ],
)
def test_T41_claims_that_are_refused(claims: dict[str, Any], text: str) -> None:
    desk = ready()
    payload = {name: value for name, value in desk.issuer.claims().items() if name not in claims}
    payload |= {name: value for name, value in claims.items() if value is not None}
    signed = jwt.PyJWS().encode(
        json.dumps(payload).encode(), desk.issuer.keys["k1"], "EdDSA", headers={"kid": "k1"}
    )
    assert reason(desk, signed) == text


def test_audiences_and_far_ends() -> None:
    desk = ready()
    assert desk.identify(desk.issuer.token(aud=["x", AUDIENCE])).subject == "w1"
    assert desk.identify(desk.issuer.token(exp=2**62, nbf=0.5)).subject == "w1"
    assert desk.identify(desk.issuer.token(sub=None, eventTypes="*")).has_event_types is False


def test_T41_skew_to_the_millisecond() -> None:
    desk = ready(skew_ms=60_000)
    now_s = desk.issuer.now_s
    late, early = desk.issuer.token(exp=now_s - 59), desk.issuer.token(nbf=now_s + 60)
    assert desk.identify(late).expires_ms == desk.clock.now_ms() + 1_000
    assert desk.identify(early).subject == "w1"
    assert reason(desk, desk.issuer.token(nbf=now_s + 60.001)) == "token not valid yet"
    assert reason(desk, desk.issuer.token(exp=now_s - 60)) == "token expired"
    desk.clock.advance(999)
    assert desk.identify(late).subject == "w1"
    desk.clock.advance(1)
    assert reason(desk, late) == "token expired"


# --- algorithms and forged headers


def test_T41_tokens_without_a_key_id_are_refused() -> None:
    desk = ready()
    for kid in (None, ""):
        assert reason(desk, desk.issuer.token(kid)) == "missing kid"
    assert desk.place.fetches == 1


@pytest.mark.parametrize("algorithm", ["none", "None", "HS256", "HS512", "PS256", "RS1", "", None])
def test_T41_algorithms_that_are_never_accepted(algorithm: Any) -> None:
    desk = ready(algorithm="RS256")
    token = unsigned({"alg": algorithm, "kid": "k1"}, desk.issuer.claims())
    assert reason(desk, token) == "invalid alg"


def test_T41_a_public_key_is_no_shared_secret() -> None:
    """The classic: the public key, which anyone has, as the key of an HMAC."""
    desk = ready(algorithm="RS256")
    public = desk.issuer.keys["k1"].public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for name in ("HS256", "RS256", "ES256", "EdDSA"):
        head = unsigned({"alg": name, "kid": "k1"}, desk.issuer.claims()).rsplit(".", 1)[0]
        code = hmac.HMAC(pem, hashes.SHA256())
        code.update(head.encode())
        token = f"{head}.{base64(code.finalize())}"
        assert reason(desk, token) in ("invalid alg", "invalid signature")


def test_T41_the_type_of_the_key_decides_the_algorithm() -> None:
    desk = Desk(algorithm="RS256")
    edwards = Issuer(desk.issuer.now_s, algorithm="EdDSA")
    keys = [
        desk.issuer.jwk("k1"),
        {**edwards.jwk("k1"), "kid": "k2", "alg": "RS256"},
        {"kty": "oct"},
    ]
    desk.fetched(json.dumps({"keys": [*keys, {"kty": "oct", "kid": "k3", "k": "AAAA"}]}).encode())
    assert desk.identify().subject == "w1"
    for algorithm in ("RS384", "RS512"):
        assert reason(desk, _signed(desk.issuer, algorithm)) == "invalid alg", "the key names RS256"
    assert reason(desk, _signed(edwards, "EdDSA")) == "invalid alg", "k1 is a key of RSA"
    assert reason(desk, edwards.token("k2")) == "unknown kid", "its alg does not fit its type"


def _signed(issuer: Issuer, algorithm: str) -> str:
    headers = {"kid": "k1"}
    return jwt.encode(issuer.claims(), issuer.keys["k1"], algorithm=algorithm, headers=headers)


def test_headers_that_bring_their_own_key_are_passed_over() -> None:
    desk = ready()
    desk.issuer.keys["k1"] = private_key("EdDSA", 50)
    mine = {
        "jwk": desk.issuer.jwk("k1"),
        "jku": "http://evil.example",
        "x5u": "http://evil.example",
    }
    assert reason(desk, desk.issuer.token(headers=mine)) == "invalid signature"
    assert reason(desk, desk.issuer.token(headers={"crit": ["exp"]})) == "invalid token"


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c",
        "x" * 50_000,
        "a.b.c.d",
        "\u0000",
        "ü.ü.ü",
        "e30.e30.",
        "W10.e30.",
    ],
)
def test_texts_that_are_no_tokens(token: str) -> None:
    desk = Desk()
    assert reason(desk, token) in ("invalid token", "invalid alg")
    assert desk.place.fetches == 0


def test_claims_that_are_no_object() -> None:
    desk = ready()
    for claims in ([], "x", None, 5):
        assert reason(desk, unsigned({"alg": "EdDSA", "kid": "k1"}, claims)) == "invalid token"
    deep = ".".join([base64(b'{"alg":"EdDSA","kid":"k1"}'), base64(b"[" * 5000), ""])
    assert reason(desk, deep) == "invalid token"


# --- keys: when they are fetched


def test_T41_a_thousand_unknown_kids_make_one_fetch() -> None:
    desk = ready()
    storm = [desk.issuer.token(f"unknown-{number}") for number in range(1000)]
    desk.clock.advance(RETRY_MS)
    told: list[str] = []

    def note(token: str) -> None:
        told.append(reason(desk, token))

    for token in storm:
        with pytest.raises(KeysAwaited) as awaited:
            desk.identify(token)
        awaited.value.then(partial(note, token))
    assert desk.place.fetches == 2
    assert desk.identify().subject == "w1", "others go on meanwhile"
    desk.place.answer(desk.issuer.document())
    assert told == ["unknown kid"] * 1000
    desk.clock.advance(RETRY_MS - 1)
    assert reason(desk, desk.issuer.token("unknown")) == "unknown kid"
    assert desk.place.fetches == 2
    desk.clock.advance(1)
    with pytest.raises(KeysAwaited):
        desk.identify(desk.issuer.token("unknown"))
    assert desk.place.fetches == 3


def test_T41_a_new_key_is_found_through_its_unknown_kid() -> None:
    desk = ready()
    desk.issuer.add("k2")
    new = desk.issuer.token("k2")
    desk.clock.advance(RETRY_MS)
    desk.fetched(token=new)
    assert desk.identify(new).subject == "w1"
    assert desk.identify().subject == "w1"


def test_T41_withdrawn_keys_die_with_the_tokens_they_signed() -> None:
    desk = Desk()
    desk.issuer.add("k2")
    desk.fetched()
    old, new = desk.issuer.token("k1"), desk.issuer.token("k2")
    for token in (old, new):
        assert desk.identify(token) is desk.identify(token)
    desk.clock.advance(KEPT_MS)
    with pytest.raises(KeysAwaited):
        desk.identify(old)
    desk.place.answer(desk.issuer.document("k2"))
    assert reason(desk, old) == "unknown kid"
    assert desk.identify(new).subject == "w1"


def test_T41_another_key_of_the_same_id_replaces_the_first() -> None:
    desk = ready()
    old = desk.issuer.token()
    assert desk.identify(old).subject == "w1"
    desk.issuer.keys["k1"] = private_key("EdDSA", 51)
    desk.clock.advance(KEPT_MS)
    desk.fetched()
    assert reason(desk, old) == "invalid signature"
    assert desk.identify().subject == "w1"


def test_an_empty_set_withdraws_all_keys() -> None:
    desk = ready()
    desk.clock.advance(KEPT_MS)
    desk.fetched(b'{"keys": []}')
    assert reason(desk, desk.issuer.token()) == "unknown kid"


def test_keys_are_renewed_beside_the_work_before_they_are_old() -> None:
    desk = ready()
    desk.clock.advance(RENEWED_MS - 1)
    desk.identify()
    assert not desk.place.asked
    desk.clock.advance(1)
    assert desk.identify().subject == "w1"
    assert desk.place.asked
    desk.clock.advance(KEPT_MS - RENEWED_MS - 1)
    assert desk.identify().subject == "w1"
    desk.place.answer(desk.issuer.document())
    desk.clock.advance(RENEWED_MS - 1)
    desk.identify()
    assert not desk.place.asked


def test_T41_a_short_outage_locks_nobody_out() -> None:
    desk = ready()
    token = desk.issuer.token(exp=desk.issuer.now_s + 10**6)
    desk.identify(token)
    desk.clock.advance(KEPT_MS)
    desk.fetched(DOWN)
    fetches = desk.place.fetches
    since_ms = KEPT_MS
    while since_ms + RETRY_MS < OUTAGE_MS:
        assert desk.identify(token).subject == "w1"
        assert desk.identify().subject == "w1", "a token that was not seen before"
        desk.clock.advance(RETRY_MS)
        since_ms += RETRY_MS
        assert desk.identify(token).subject == "w1", "nobody waits for the next failure"
        desk.place.answer(DOWN)
    assert desk.place.fetches - fetches == (OUTAGE_MS - KEPT_MS) // RETRY_MS - 1
    desk.clock.advance(OUTAGE_MS - since_ms - 1)
    assert desk.identify(token).subject == "w1"
    desk.clock.advance(1)
    with pytest.raises(KeysAwaited):
        desk.identify(token)
    desk.place.answer(DOWN)
    assert refused(lambda: desk.identify(token)) == UNAVAILABLE
    desk.clock.advance(RETRY_MS)
    desk.fetched(token=token)
    assert desk.identify(token).subject == "w1"


def test_no_keys_at_all_is_unavailable_and_not_a_bad_token() -> None:
    desk = Desk()
    desk.fetched(DOWN)
    for _ in range(2):
        assert refused(desk.identify) == UNAVAILABLE
    assert desk.place.fetches == 1
    desk.clock.advance(RETRY_MS)
    desk.fetched()
    assert desk.identify().subject == "w1"


def test_an_unknown_kid_during_an_outage_is_unavailable() -> None:
    desk = ready()
    desk.clock.advance(RETRY_MS)
    new = desk.issuer.token("k2")
    desk.fetched(DOWN, token=new)
    assert refused(lambda: desk.identify(new)) == UNAVAILABLE
    assert desk.identify().subject == "w1"


@pytest.mark.parametrize(
    "document", [b"", b"{", b"[]", b"{}", b'{"keys": {}}', b"[" * 100_000, b"\xff", b"null"]
)
def test_what_is_no_set_of_keys_counts_as_an_outage(document: bytes) -> None:
    desk = ready()
    desk.clock.advance(KEPT_MS)
    desk.fetched(document)
    assert desk.identify().subject == "w1"


def test_tokens_for_others_ask_for_no_keys() -> None:
    desk = Desk()
    for claims in ({"iss": "else"}, {"aud": "else"}, {"exp": 1}, {"nbf": 2**40}):
        reason(desk, desk.issuer.token(**claims))
    assert desk.place.fetches == 0


# --- verified tokens


def test_a_token_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = ready()
    token = desk.issuer.token()
    first = desk.identify(token)
    monkeypatch.setattr(jwks, "_jws", None)
    assert desk.identify(token) is first
    monkeypatch.undo()
    desk.clock.advance(3_600_000)
    desk.fetched(token=desk.issuer.token(exp=desk.issuer.now_s + 10**6))
    assert reason(desk, token) == "token expired"


def test_remembered_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "TOKENS_MAX", 3)
    desk = ready()
    for number in range(10):
        assert desk.identify(desk.issuer.token(sub=f"w{number}")).subject == f"w{number}"
        assert len(desk.provider._verified) <= 3
    desk.identify(desk.issuer.token(padding="x" * jwks.REMEMBERED_CHARS_MAX))
    assert len(desk.provider._verified) == 3


# --- sets


def test_keys_that_cannot_be_used_are_passed_over() -> None:
    issuer = Issuer(0, algorithm="ES256")
    good = issuer.jwk("k1")
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()
    bad: list[Any] = [
        None,
        "key",
        {},
        {**good, "kid": ""},
        {**good, "kid": 5},
        {**good, "kid": "enc", "use": "enc"},
        {**good, "kid": "ops", "key_ops": ["sign"]},
        {**good, "kid": "kty", "kty": ["EC"]},
        {**good, "kid": "crv", "crv": "P-384"},
        {**good, "kid": "x", "x": "AAAA"},
        {**good, "kid": "y", "y": None},
        {**good, "kid": "alg", "alg": "HS256"},
        {**good, "kid": "private", "d": "AAAA"},
        {**jwt.algorithms.RSAAlgorithm.to_jwk(short, as_dict=True), "kid": "short"},
    ]
    _, keys = read_keys(json.dumps({"keys": [*bad, good, {**good, "x": good["y"]}]}).encode())
    assert list(keys) == [("k1", "ES256")]
    assert list(read_keys(json.dumps({"keys": [{**good, "key_ops": ["verify"]}]}).encode())[1])


def test_keys_of_a_file_are_read_again(tmp_path: Path) -> None:
    desk = Desk()
    file = tmp_path / "jwks.json"
    file.write_bytes(desk.issuer.document())
    desk.provider._source = KeySource("key", FileReader(str(file)), desk.clock.now_ms)
    assert desk.identify().subject == "w1"
    desk.issuer.add("k2")
    file.write_bytes(desk.issuer.document("k2"))
    assert reason(desk, desk.issuer.token("k2")) == "unknown kid"
    desk.clock.advance(RETRY_MS)
    assert desk.identify(desk.issuer.token("k2")).subject == "w1"
    assert reason(desk, desk.issuer.token("k1")) == "unknown kid"
    file.unlink()
    desk.clock.advance(KEPT_MS)
    assert desk.identify(desk.issuer.token("k2")).subject == "w1"
    with pytest.raises(FileNotFoundError):
        jwks.read_file(str(file))


# --- over HTTP


def fetched(server: JwksServer, timeout_ms: int = 20_000) -> bytes | Exception:
    """What a download brings."""

    async def fetch() -> bytes | Exception:
        come: asyncio.Future[bytes | Exception] = asyncio.get_running_loop().create_future()
        Download(server.url, timeout_ms)(come.set_result)
        return await come

    return asyncio.run(fetch())


def test_a_set_over_http() -> None:
    with jwks_server() as server:
        assert fetched(server) == server.document
        for status in (404, 500, 204):
            server.status = status
            server.document = b""
            assert str(fetched(server)) == f"HTTP status {status}"
        server.status, server.headers = 302, {"location": server.url}
        assert str(fetched(server)) == "HTTP status 302"
        assert server.hits == 5, "a redirect is not followed"
        server.status, server.headers = 200, {}
        server.document = b" " * (jwks.SET_BYTES_MAX + 1)
        assert "more than" in str(fetched(server))


def test_a_host_that_says_nothing_or_is_not_there() -> None:
    with jwks_server() as server:
        server.hold.clear()
        assert str(fetched(server, timeout_ms=50)) == "no answer within 0.05 s"
    assert isinstance(fetched(server), Exception)
