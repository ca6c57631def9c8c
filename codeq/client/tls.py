"""How a client reaches a server that speaks TLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from codeq.errors import CodeqError


@dataclass(frozen=True)
class Tls:
    """TLS to a server. The files are PEM and are read anew for every connection.

    ``ca_file``: the authorities that may have signed the server's certificate; empty = those that
    the gRPC library brings. ``cert_file`` and ``key_file``: a certificate of this client, for
    servers that ask for one. ``server_name``: the name to find in the server's certificate, where
    the address has another.
    """

    ca_file: str | Path = ""
    cert_file: str | Path = ""
    key_file: str | Path = ""
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """The files as they are now; raises CodeqError ``validation-error`` when one is missing."""
        ca, key, cert = map(_content, (self.ca_file, self.key_file, self.cert_file))
        return grpc.ssl_channel_credentials(ca, key, cert)

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
