"""Keys and signed tokens for development and small installations: what ``codeq token`` does.

A key pair is a PEM file with the private key and an entry in a JWKS file with the public one. The
key id is the thumbprint of the public key (RFC 7638), so the PEM file alone can sign.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from codeq.errors import CodeqError
from codeq.model import parse_duration_ns

RSA_BITS = 2048
#: Members of a public key that its thumbprint is made of, in their order
THUMBPRINT = {"RSA": ("e", "kty", "n"), "EC": ("crv", "kty", "x", "y"), "OKP": ("crv", "kty", "x")}
WORKER_SCOPES = (
    "codeq:claim",
    "codeq:heartbeat",
    "codeq:abandon",
    "codeq:nack",
    "codeq:result",
    "codeq:subscribe",
)

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
MAKERS: dict[str, Callable[[], PrivateKey]] = {
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RS256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS),
}


class TokenError(CodeqError):
    """What was asked for cannot be done; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__("validation-error", message)


class Claims(NamedTuple):
    """What a token is to say. ``expires`` is a duration from now; ``more`` are ``name=JSON``."""

    subject: str
    issuer: str
    audience: str
    tenant: str = ""
    scopes: Sequence[str] = ()
    event_types: Sequence[str] = ()
    expires: str = "1h"
    more: Sequence[str] = ()


class MadeKey(NamedTuple):
    """A new key pair: its id and the two files."""

    kid: str
    private: Path
    jwks: Path


def make_key(algorithm: str, out: Path, jwks: Path | None = None) -> MadeKey:
    """Writes a new private key to ``out`` (readable by its owner alone, never over another file)
    and adds the public one to ``jwks``, by default ``out`` with the ending .jwks.json."""
    maker = MAKERS.get(algorithm)
    if maker is None:
        raise TokenError(f"unknown algorithm {algorithm!r}; there are {', '.join(MAKERS)}")
    jwks = jwks or out.with_suffix(".jwks.json")
    key = maker()
    entry = public_jwk(key)
    keys = [*_keys_of(jwks), entry]
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
        _replace(jwks, json.dumps({"keys": keys}, indent=2) + "\n")
    except FileExistsError:
        raise TokenError(f"{out} is there already") from None
    except OSError as fault:
        raise TokenError(f"{fault.filename} cannot be written: {fault.strerror}") from None
    return MadeKey(entry["kid"], out, jwks)


def _keys_of(jwks: Path) -> list[Any]:
    """The keys that a JWKS file has already."""
    try:
        tree = json.loads(jwks.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as fault:
        raise TokenError(f"{jwks} cannot be read: {fault.strerror}") from None
    except ValueError:
        tree = None
    if not isinstance(tree, dict) or not isinstance(tree.get("keys"), list):
        raise TokenError(f"{jwks} is no set of keys (JWKS)")
    return list(tree["keys"])


def _replace(path: Path, text: str) -> None:
    """A server that reads the file meanwhile sees the old or the new one, whole."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def public_jwk(key: PrivateKey) -> dict[str, str]:
    """The public half of a key as a member of a JWKS."""
    jwk = _members(key)
    members = {name: jwk[name] for name in THUMBPRINT[jwk["kty"]]}
    return {**members, "kid": thumbprint(jwk), "use": "sig", "alg": algorithm_of(key)}


def thumbprint(jwk: dict[str, Any]) -> str:
    """The id of a public key that follows from it (RFC 7638)."""
    named = {name: jwk[name] for name in THUMBPRINT[jwk["kty"]]}
    digest = hashlib.sha256(json.dumps(named, separators=(",", ":")).encode()).digest()
    return urlsafe_b64encode(digest).rstrip(b"=").decode()


def _members(key: PrivateKey) -> dict[str, Any]:
    if isinstance(key, rsa.RSAPrivateKey):
        return RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)


def algorithm_of(key: object) -> str:
    """What is signed with a private key; raises TokenError for one that no server takes."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "EdDSA"
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        return "ES256"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= RSA_BITS:
        return "RS256"
    raise TokenError(f"the key must be Ed25519, P-256, or RSA of {RSA_BITS} bits or more")


def sign(key_file: Path, claims: Claims, now_s: int | None = None) -> str:
    """A token with these claims, signed with the private key of a PEM file."""
    key = read_private_key(key_file)
    now_s = int(time.time()) if now_s is None else now_s
    jwk = public_jwk(key)
    payload = claims_of(claims, now_s)
    return jwt.encode(payload, key, algorithm=jwk["alg"], headers={"kid": jwk["kid"]})


def claims_of(claims: Claims, now_s: int) -> dict[str, Any]:
    """The claims as a token has them; those of ``more`` win."""
    lasting_ns = parse_duration_ns(claims.expires.strip())
    if lasting_ns is None:
        raise TokenError(f"not a duration such as 1h or 90s: {claims.expires!r}")
    payload: dict[str, Any] = {
        "sub": claims.subject,
        "iss": claims.issuer,
        "aud": claims.audience,
        "iat": now_s,
        "exp": now_s + lasting_ns // 10**9,
    }
    if claims.tenant:
        payload["tenantId"] = claims.tenant
    if claims.scopes:
        payload["scope"] = " ".join(claims.scopes)
    if claims.event_types:
        payload["eventTypes"] = list(claims.event_types)
    for pair in claims.more:
        name, sign_, text = pair.partition("=")
        try:
            payload[name.strip()] = json.loads(text)
        except ValueError:
            raise TokenError(f"not NAME=JSON (a text needs quotes): {pair!r}") from None
        if not sign_ or not name.strip():
            raise TokenError(f"not NAME=JSON (a text needs quotes): {pair!r}")
    return payload


def read_private_key(path: Path) -> PrivateKey:
    """The private key of a PEM file."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as fault:
        raise TokenError(f"{path} cannot be read: {fault.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise TokenError(f"{path} is no private key (PEM without password)") from None
    algorithm_of(key)
    assert isinstance(key, PrivateKey)
    return key


def show(token: str) -> dict[str, Any]:
    """Header and claims of a token; nothing is checked."""
    try:
        whole = jwt.decode_complete(token.strip(), options={"verify_signature": False})
    except jwt.PyJWTError:
        raise TokenError("not a signed token (JWT)") from None
    return {"header": whole["header"], "claims": whole["payload"]}
