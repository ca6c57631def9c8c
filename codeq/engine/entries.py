"""The entry of a rule about one queue, as it stands in the store.

Its key is a prefix of two bytes, the tenant, NUL, and the name of the queue. Its value is a version
byte, what the rule says, and a checksum over key and value.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

from codeq.errors import StoreError

_PREFIX_BYTES = 2
_CHECK_BYTES = 4
_VERSION = 1


class Entry(NamedTuple):
    """What an entry says; ``body`` means something to its kind only."""

    tenant: bytes
    name: bytes
    body: bytes


def entry_key(prefix: bytes, tenant: bytes, name: bytes) -> bytes:
    """The key of an entry."""
    return prefix + tenant + b"\0" + name


def entry_value(key: bytes, body: bytes) -> bytes:
    """The value of an entry."""
    said = bytes([_VERSION]) + body
    return said + _check(key, said)


def open_entry(kind: str, key: bytes, value: bytes) -> Entry:
    """What an entry says; StoreError with its ``kind`` and key when it is damaged."""
    said, check = value[:-_CHECK_BYTES], value[-_CHECK_BYTES:]
    tenant, nul, name = key[_PREFIX_BYTES:].partition(b"\0")
    if not nul or not said or _check(key, said) != check:
        raise StoreError(f"the entry of a {kind} is damaged (key {key.hex()})")
    if said[0] != _VERSION:
        raise StoreError(f"the entry of a {kind} has the unknown version {said[0]}")
    return Entry(tenant, name, said[1:])


def _check(key: bytes, said: bytes) -> bytes:
    return zlib.crc32(key + said).to_bytes(_CHECK_BYTES, "little")
