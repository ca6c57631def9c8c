"""Which addresses a webhook or callback may reach."""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from urllib.parse import SplitResult, urlsplit

URL_BYTES_MAX = 2048
#: Networks whose addresses lead to an IPv4 address that they contain, and at which bit it begins:
#: NAT64, and 6to4
_EMBEDDING = (
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
)
#: Such translators in private use, relays to IPv4, and the old site-local and compatible addresses
_NEVER = tuple(
    ipaddress.IPv6Network(network)
    for network in ("64:ff9b:1::/48", "2001::/32", "fec0::/10", "::/96")
)
#: A name has at most so many characters, as short as it may get by normalisation
HOST_CHARS_MAX = 253
#: Labels without white space, control characters and others that stand in no name. Who decodes
#: ``%`` would see another name than was checked.
_LABEL = r"[^\s\x00-\x1f\x7f-\x9f\\%<>^|.]+"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
#: Characters that resolvers leave out, and the dot that normalisation does not know
_LEFT_OUT = (
    *(0xAD, 0x34F, 0x1806, 0x180B, 0x180C, 0x180D, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF),
    *range(0xFE00, 0xFE10),
)
_MAPPED = {**dict.fromkeys(_LEFT_OUT), 0x3002: "."}


def is_valid(url: str, *, private: bool) -> bool:
    """Whether the URL is http(s) with a host that is no literal address of a private network
    (unless ``private``)."""
    if len(url.encode()) > URL_BYTES_MAX or any(c <= " " or c == "\x7f" for c in url):
        return False
    try:
        parts = urlsplit(url)
        host, _ = _host(parts), parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not host:
        return False
    return private or not is_private_literal(host)


def _host(parts: SplitResult) -> str:
    """The host as a resolver gets it in the end; empty when it can be neither name nor address."""
    host = parts.hostname or ""
    if "[" in parts.netloc:
        return str(ipaddress.IPv6Address(host))
    if len(host) > HOST_CHARS_MAX:
        return ""
    if not host.isascii():  # as an address may be written; a name in another script stays one
        host = unicodedata.normalize("NFKC", host).casefold().translate(_MAPPED)
    name = host.removesuffix(".")
    return name if _NAME.fullmatch(name) else ""


def is_public(address: str) -> bool:
    """Whether the IP address is one of the public internet (not private, loopback, link-local,
    ...)."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or _embedded(found)
        if inner is not None:
            found = inner
        elif any(found in network for network in _NEVER):
            return False
    return found.is_global and not found.is_multicast


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address at which a translated address ends up."""
    for network, shift in _EMBEDDING:
        if address in network:
            return ipaddress.IPv4Address(int(address) >> shift & 0xFFFF_FFFF)
    return None


def is_private_literal(host: str) -> bool:
    """Whether the host of a URL is an address, in any notation, that is not public.

    Notations that a resolver would take as an IPv4 address (``127.1``, ``0x7f000001``) count.
    """
    bare = host.strip("[]").partition("%")[0]
    try:
        return not is_public(bare)
    except ValueError:
        pass
    if bare.lower() == "localhost":
        return True
    try:
        return not is_public(socket.inet_ntoa(socket.inet_aton(bare)))
    except OSError:
        return False
