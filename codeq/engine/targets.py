"""Which addresses a webhook or callback may reach."""

from __future__ import annotations

import ipaddress
import socket


def is_public(address: str) -> bool:
    """Whether the IP address is one of the public internet (not private, loopback, link-local,
    ...)."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_global and not found.is_multicast


def is_private_literal(host: str) -> bool:
    """Whether the host of a URL is an address, in any notation, that is not public.

    Notations that a resolver would take as an IPv4 address (``127.1``, ``0x7f000001``) count.
    """
    bare = host.strip("[]").partition("%")[0]
    try:
        return not is_public(bare)
    except ValueError:
        pass
    if bare.rstrip(".").lower() == "localhost":
        return True
    try:
        return not is_public(socket.inet_ntoa(socket.inet_aton(bare)))
    except OSError:
        return False
