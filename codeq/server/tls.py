"""Certificates of the listeners: read from the files of the settings and looked at before use.

Whoever serves with them has them as bytes: a file that changes later is looked at when the process
is told to, and not before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from codeq.config import ConfigError, Tls, TlsListener

log = logging.getLogger("codeq.tls")

HANDSHAKE_SECONDS = 5
PEM_BEGIN, PEM_END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class Identity(NamedTuple):
    """What a listener shows, and the authorities whose certificates it asks of clients (empty: it
    asks for none). All in PEM."""

    certificate: bytes
    private_key: bytes
    client_ca: bytes

    @property
    def leaf(self) -> bytes:
        """The listener's own certificate in DER."""
        return certificates(self.certificate)[0]


class Certificates:
    """The identities of all listeners, read at the start and again when asked for.

    ``on_change`` says by listener who exchanges its identity; it returns False when nothing changed
    and raises ConfigError when the new one cannot be used.
    """

    def __init__(self, files: Tls) -> None:
        self._files = {"http": files.http, "producer": files.producer, "worker": files.worker}
        self._asked = asyncio.Event()
        self.on_change: dict[str, Callable[[Identity], Awaitable[bool]]] = {}

    def read(self) -> dict[str, Identity | None]:
        """The identity of each listener; raises ConfigError."""
        return {name: read(files, f"tls.{name}") for name, files in self._files.items()}

    def ask(self) -> None:
        """Has ``run`` read the files again."""
        self._asked.set()

    async def run(self) -> None:
        """Reads the files as often as asked for, one time after the other."""
        while await self._asked.wait():
            self._asked.clear()
            await asyncio.gather(*map(self._exchange, self.on_change))
            log.info("certificates were read")

    async def _exchange(self, name: str) -> None:
        try:
            identity = read(self._files[name], f"tls.{name}")
            if identity is not None and await self.on_change[name](identity):
                log.info("tls.%s: the certificate was exchanged", name)
        except ConfigError as error:
            log.error("%s; the certificate in use stays", error)
        except Exception:
            log.exception("tls.%s: the certificate in use stays", name)


def read(files: TlsListener, key: str) -> Identity | None:
    """The identity of the listener with the settings ``key`` (as "tls.http"); None = clear text.

    Raises ConfigError with the name of the file's key when it could not be served with.
    """
    if not files.cert_file:
        return None
    certificate = _content(files.cert_file, f"{key}.certFile")
    private_key = _content(files.key_file, f"{key}.keyFile")
    client_ca = _content(files.client_ca_file, f"{key}.clientCaFile")
    _require_certificates(certificate, f"{key}.certFile")
    if files.client_ca_file:
        _require_certificates(client_ca, f"{key}.clientCaFile")
    _require_pair(certificate, private_key, f"{key}.keyFile")
    return Identity(certificate, private_key, client_ca)


def certificates(pem: bytes) -> list[bytes]:
    """Every certificate of a PEM text in DER; raises ValueError for one that is none."""
    text = pem.decode("ascii", "replace")
    blocks = [block.partition(PEM_END)[0] for block in text.split(PEM_BEGIN)[1:]]
    return [ssl.PEM_cert_to_DER_cert(f"{PEM_BEGIN}{block}{PEM_END}") for block in blocks]


def in_memory(content: bytes) -> int:
    """A file without a name that holds the bytes; the caller closes it. Its path is
    ``path_of(it)``, also in a child process that inherits it."""
    file = os.memfd_create("codeq-tls")
    with open(file, "wb", closefd=False) as writer:
        writer.write(content)
    return file


def path_of(file: int) -> str:
    """Where an open file can be opened once more by name."""
    return f"/proc/self/fd/{file}"


async def shown_by(host: str, port: int, protocols: list[str]) -> bytes:
    """The certificate (DER) that a listener shows to whoever asks; raises OSError when there is no
    handshake. The listener itself is not judged here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(protocols)
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except TimeoutError:
        raise OSError("no handshake in time") from None
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return shown


def _content(path: str, key: str) -> bytes:
    if not path:
        return b""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(key, f"{path} cannot be read: {error.strerror}") from None


def _require_certificates(pem: bytes, key: str) -> None:
    try:
        found = certificates(pem)
        if not found:
            raise ConfigError(key, "holds no certificate in PEM")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=b"".join(found))
    except (ValueError, ssl.SSLError):
        raise ConfigError(key, "holds a certificate that cannot be read") from None


def _require_pair(certificate: bytes, private_key: bytes, key: str) -> None:
    files = [in_memory(certificate), in_memory(private_key)]
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path_of(files[0]), path_of(files[1]), _no_password)
    except (ValueError, OSError) as error:
        mismatch = getattr(error, "reason", "") == "KEY_VALUES_MISMATCH"
        text = "is not the key of the certificate" if mismatch else "holds no usable private key"
        raise ConfigError(key, f"{text} (in PEM, not encrypted)") from None
    finally:
        for file in files:
            os.close(file)


def _no_password() -> str:
    raise ValueError("the key is encrypted")
