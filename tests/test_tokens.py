"""``codeq token``, and the page on authentication: its settings load, its lines work."""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from codeq import cli, config, tokens
from codeq.engine.clock import Clock
from codeq.server.auth import SCOPE_NACK, Auth
from codeq.server.jwks import read_keys
from codeq.server.providers import build_auth
from codeq.tokens import Claims, TokenError, make_key, sign

from .conftest import ANY_PORT, ROOT, Server, claimed

PAGE = (ROOT / "docs/authentication.md").read_text()
WORKER = Claims("w1", "dev", "codeq-worker", "acme", tokens.WORKER_SCOPES, ("*",))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def workers(jwks: Path) -> Auth:
    """A server's view of worker tokens signed with a key of the set."""
    flags = {"workerJwksUrl": str(jwks), "workerIssuer": "dev", "allowedClockSkewSeconds": 0}
    return build_auth(config.load(flags=flags), Clock())


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says which cannot do what it was asked."""
    assert cli.run(["token", *arguments]) != 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("codeq: ") and said.err.count("\n") == 1
    return said.err


# --- keys


@pytest.mark.parametrize("algorithm", list(tokens.MAKERS))
def test_a_key_signs_what_its_set_accepts(tmp_path: Path, algorithm: str) -> None:
    made = make_key(algorithm, tmp_path / "key.pem")
    assert stat.S_IMODE(made.private.stat().st_mode) == 0o600
    assert made.jwks == tmp_path / "key.jwks.json"
    written, _ = read_keys(made.jwks.read_bytes())
    assert list(written) == [(made.kid, algorithm)]
    assert "PRIVATE" not in made.jwks.read_text() and '"d"' not in made.jwks.read_text()
    principal = workers(made.jwks).worker(sign(made.private, WORKER), SCOPE_NACK)
    assert (principal.subject, principal.tenant, principal.any_command) == ("w1", "acme", True)


def test_the_key_id_is_the_thumbprint_of_the_standard() -> None:
    """The example of RFC 7638."""
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_"
        "BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_"
        "FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI"
        "4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    assert tokens.thumbprint({"kty": "RSA", "n": modulus, "e": "AQAB"}) == (
        "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    )


def test_a_set_takes_further_keys(tmp_path: Path) -> None:
    first = make_key("EdDSA", tmp_path / "a.pem")
    second = make_key("ES256", tmp_path / "b.pem", first.jwks)
    known = workers(first.jwks)
    for made in (first, second):
        assert known.worker(sign(made.private, WORKER)).subject == "w1"
    assert not list(tmp_path.glob("*.new"))


def test_keys_of_other_tools_can_sign(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    file = tmp_path / "openssl.pem"
    file.write_bytes(_pem(key, serialization.PrivateFormat.TraditionalOpenSSL))
    set_of_it = tmp_path / "set.json"
    set_of_it.write_text(json.dumps({"keys": [tokens.public_jwk(key)]}))
    assert workers(set_of_it).worker(sign(file, WORKER)).subject == "w1"


def _pem(key: Any, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8) -> bytes:
    none = serialization.NoEncryption()
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, none))


def test_files_that_cannot_sign(tmp_path: Path) -> None:
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    for name, content in (
        ("short", _pem(short)),
        ("curve", _pem(ec.generate_private_key(ec.SECP384R1()))),
        ("text", b"hello"),
        ("empty", b""),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(TokenError):
            sign(file, WORKER)


# --- claims


def test_claims() -> None:
    more = ('role="ADMIN"', 'aud=["a", "b"]', "n=5", "exp=null")
    claims = tokens.claims_of(WORKER._replace(expires="1m30s"), 1000)
    assert claims == {
        "sub": "w1",
        "iss": "dev",
        "aud": "codeq-worker",
        "iat": 1000,
        "exp": 1090,
        "tenantId": "acme",
        "scope": " ".join(tokens.WORKER_SCOPES),
        "eventTypes": ["*"],
    }
    changed = tokens.claims_of(WORKER._replace(more=more), 1000)
    assert (changed["role"], changed["aud"], changed["n"]) == ("ADMIN", ["a", "b"], 5)
    plain = tokens.claims_of(Claims("s", "i", "a"), 0)
    assert set(plain) == {"sub", "iss", "aud", "iat", "exp"}


def test_the_six_scopes_are_those_of_the_server() -> None:
    from codeq.server.auth import WORKER_SCOPES

    assert set(tokens.WORKER_SCOPES) == WORKER_SCOPES


# --- the command


def test_key_sign_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "dev.pem")
    assert cli.run(["token", "key", "--out", file]) == 0
    kid = capsys.readouterr().out.split()[1]
    asked = [
        "--subject",
        "shop",
        "--issuer",
        "dev",
        "--audience",
        "a",
        "--scope",
        "x",
        "--scope",
        "y",
    ]
    events = ["--event-types", "a b", "--event-types", "c", "--expires", "2h", "--claim", "n=[1]"]
    assert cli.run(["token", "sign", "--key", file, *asked, *events]) == 0
    token = capsys.readouterr().out.strip()
    assert cli.run(["token", "show", token]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["header"] == {"alg": "EdDSA", "kid": kid, "typ": "JWT"}
    claims = shown["claims"]
    assert claims["exp"] - claims["iat"] == 7200
    assert (claims["scope"], claims["eventTypes"], claims["n"]) == ("x y", ["a b", "c"], [1])


def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_key("EdDSA", tmp_path / "dev.pem")
    key, bad = str(made.private), tmp_path / "bad.json"
    bad.write_text("[]")
    new = ["key", "--out", str(tmp_path / "new.pem")]
    named = ["--subject", "s", "--issuer", "i", "--audience", "a"]
    signing = ["sign", "--key", key, *named]
    for arguments, says in (
        (["key", "--out", key], "is there already"),
        (["key", "--out", str(tmp_path / "no" / "key.pem")], "cannot be written"),
        ([*new, "--alg", "HS256"], "unknown algorithm 'HS256'"),
        ([*new, "--jwks", str(bad)], "is no set of keys"),
        ([*new, "--jwks", str(tmp_path)], "cannot be read"),
        (["key"], "Missing option '--out'"),
        (["sign", "--key", key, "--subject", "s"], "Missing option"),
        (["sign", "--key", str(tmp_path / "none"), *named], "cannot be read"),
        (["sign", "--key", str(bad), *named], "is no private key"),
        ([*signing, "--expires", "soon"], "not a duration such as 1h"),
        ([*signing, "--claim", "role=ADMIN"], "not NAME=JSON"),
        ([*signing, "--claim", "5"], "not NAME=JSON"),
        ([*signing, "--claim", "=5"], "not NAME=JSON"),
        (["show", "x.y.z"], "not a signed token"),
        (["shwo"], "No such command"),
    ):
        assert says in failed(arguments, capsys)
    assert not (tmp_path / "new.pem").exists()


# --- the page


def test_T56_the_settings_of_the_page_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_key("EdDSA", Path("dev.pem"))
    assert len(blocks("yaml")) >= 6
    for number, text in enumerate(blocks("yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        settings = config.load(str(file))
        assert config.unavailable_settings(settings) == ([], [])
        auth = build_auth(settings, Clock())
        assert auth.has_producers or auth.has_workers or settings.rate_limit.producer.burst_size


@pytest.fixture
def page_server(tmp_path: Path) -> Callable[[], Server]:
    """Starts the server of the page's last example in the folder with its keys."""
    (text,) = (text for text in blocks("yaml") if "dev.jwks.json" in text)
    (tmp_path / "codeq.yaml").write_text(text.replace("dev.jwks", f"{tmp_path}/dev.jwks"))

    def start() -> Server:
        arguments = ["serve", "--config", str(tmp_path / "codeq.yaml"), "--http", ANY_PORT]
        data = ["--data", str(tmp_path / "data")]
        return Server(tmp_path, [*arguments, *data], {"LIMITS_DISK_RESERVE_BYTES": "0"})

    return start


def test_T57_the_tokens_of_the_page_share_a_tenant_and_deliver_a_task(
    tmp_path: Path, page_server: Callable[[], Server]
) -> None:
    codeq = f'codeq() {{ {shlex.quote(sys.executable)} -m codeq "$@"; }}; set -e; '
    shown = "".join(re.findall(r"^\$ (.*\n)", blocks("console")[0], re.MULTILINE))
    done = subprocess.run(
        ["bash", "-c", codeq + shown],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout[done.stdout.index("{") :])["claims"]["sub"] == "farm"
    server = page_server()
    try:
        producer = server.client((tmp_path / "producer.txt").read_text().strip())
        worker = server.client((tmp_path / "worker.txt").read_text().strip())
        task_id = claimed(producer, worker, "job")
        ended = worker.post(f"/tasks/{task_id}/result", json={"status": "COMPLETED"})
        assert ended.status_code == 200
        task = producer.get(f"/tasks/{task_id}").json()
        assert (task["status"], task["tenantId"]) == ("COMPLETED", "acme")
    finally:
        server.close()
