"""Certificates made for a test: an authority and what it signs."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

NAME = "queue.test"


class Pair:
    """A certificate and its key as files in a folder."""

    def __init__(self, folder: Path, subject: str) -> None:
        self.subject = subject
        self.cert = folder / f"{subject}.pem"
        self.key = folder / f"{subject}.key"

    def write(self, certificate: x509.Certificate, key: Any, password: bytes = b"") -> None:
        encryption = BestAvailableEncryption(password) if password else NoEncryption()
        self.cert.write_bytes(certificate.public_bytes(Encoding.PEM))
        self.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))

    def replace(self, other: Pair) -> None:
        """Puts another certificate and key into these files."""
        self.cert.write_bytes(other.cert.read_bytes())
        self.key.write_bytes(other.key.read_bytes())


class Authority:
    """Signs certificates for 127.0.0.1, localhost and NAME. ``ca`` is the file with its own."""

    def __init__(self, folder: Path, subject: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(subject)
        builder = _builder(self._name, self._name, self._key)
        own = builder.add_extension(x509.BasicConstraints(True, None), True)
        self.ca = folder / f"{subject}.ca.pem"
        self.ca.write_bytes(own.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def issue(self, subject: str, key: Any = None, password: bytes = b"") -> Pair:
        """A new certificate, with a key of its own unless one is given."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName("localhost"), x509.DNSName(NAME)]
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = _builder(_name(subject), self._name, key).add_extension(
            x509.SubjectAlternativeName([*names, address]), False
        )
        pair = Pair(self._folder, subject)
        pair.write(builder.sign(self._key, hashes.SHA256()), key, password)
        return pair


def _name(subject: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])


def _builder(subject: x509.Name, issuer: x509.Name, key: Any) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
    )
