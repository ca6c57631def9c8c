"""How a client reaches a server that speaks TLS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from codeq.errors import CodeqError


@dataclass(frozen=True)
class Tls:
    """TLS to a server. The files are PEM and are read anew for every stream.

    ``ca_file``: the authorities that may have signed the server's certificate; empty = those that
    the gRPC library brings, and for REST those of the system. ``cert_file`` and ``key_file``: a
    certificate of this client, for servers that ask for one. ``server_name``: the name to find in
    the server's certificate, where the address has another.
    """

    ca_file: str | Path = ""
    cert_file: str | Path = ""
    key_file: str | Path = ""
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """The files as they are now; raises CodeqError ``validation-error`` when one is missing."""
        ca, key, cert = map(_content, (self.ca_file, self.key_file, self.cert_file))
        return grpc.ssl_channel_credentials(ca, key, cert)

    def context(self) -> ssl.SSLContext:
        """The same for REST, whose client reads the files once."""
        try:
            made = ssl.create_default_context(cafile=str(self.ca_file) or None)
            if self.cert_file:
                made.load_cert_chain(self.cert_file, self.key_file or None)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(file) for file in (self.ca_file, self.cert_file) if file)
            why = error.strerror or error
            raise CodeqError("validation-error", f"{files}: {why}") from None
        return made

    def options(self) -> list[tuple[str, Any]]:
        """Options of the channel."""
        name = self.server_name
        return [("grpc.ssl_target_name_override", name)] if name else []


def _content(path: str | Path) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CodeqError("validation-error", f"{path}: {error.strerror}") from None
