"""Artifacts of a result: files a worker hands in with it, or links to files elsewhere.

A file's content is kept in the ended record of its task, so that it is there as long as the record,
is committed with it and goes with it.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import NamedTuple
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from codeq.errors import ARTIFACT_INVALID, RESULT_TOO_LARGE, Refusal
from codeq.model import Artifact, ArtifactLink

NAME_BYTES_MAX = 255
CONTENT_TYPE_CHARACTERS_MAX = 255
ANY_TYPE = "application/octet-stream"
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_MEDIA_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(?: *;.*)?")
PATH = "/v1/codeq/tasks/{}/artifacts/{}"


class Kept(Struct, rename="camel", omit_defaults=True):
    """One artifact in the record: a link, or a file with its type."""

    name: str
    url: str = ""
    content_base64: str | UnsetType = UNSET
    content_type: str = ""


class Content(NamedTuple):
    """A file."""

    content_type: str
    content: bytes


_decode = msgspec.json.Decoder(list[Kept]).decode
_encode = msgspec.json.Encoder().encode


def kept(sent: list[Artifact], bytes_max: int) -> tuple[Refusal | None, bytes]:
    """(refusal or None, text for the record, empty when there are none). Entries with neither link
    nor content are dropped. ``bytes_max`` bounds the text."""
    found: list[Kept] = []
    files: set[str] = set()
    for artifact in sent:
        name, content_type = artifact.name or "", artifact.content_type or ""
        if not plain_name(name) or not _type_valid(content_type):
            return ARTIFACT_INVALID, b""
        if artifact.content_base64 is not None:
            content = _decoded(artifact.content_base64)
            if content is None or name in files:  # the second of a name could not be read
                return ARTIFACT_INVALID, b""
            files.add(name)
            text = base64.b64encode(content).decode()
            found.append(Kept(name, content_base64=text, content_type=content_type))
        elif artifact.url:
            found.append(Kept(name, artifact.url))
    if not found:
        return None, b""
    text_kept = _encode(found)
    return (RESULT_TOO_LARGE, b"") if len(text_kept) > bytes_max else (None, text_kept)


def shown(task_id: str, text: bytes) -> Raw | UnsetType:
    """The artifacts of a record as a list of names and URLs; a file's is its path here."""
    if not text:
        return UNSET
    if b'"contentBase64"' not in text:
        return Raw(text)
    links = [
        ArtifactLink(item.name, item.url or PATH.format(task_id, quote(item.name, safe="")))
        for item in _decode(text)
    ]
    return Raw(_encode(links))


def content_of(text: bytes, name: str) -> Content | None:
    """The file of that name in the artifacts of a record."""
    for item in _decode(text) if text else ():
        if item.name == name and item.content_base64 is not UNSET:
            return Content(_media_type(item.content_type), base64.b64decode(item.content_base64))
    return None


def _media_type(content_type: str) -> str:
    """What a file is served as: what its worker said, if that is a media type."""
    return content_type if _MEDIA_TYPE.fullmatch(content_type) else ANY_TYPE


def plain_name(name: str) -> bool:
    """Whether the name is one plain file name."""
    return (
        bool(name.strip())
        and name not in (".", "..")
        and len(name.encode()) <= NAME_BYTES_MAX
        and not any(char in "/\\" or not char.isprintable() for char in name)
    )


def _type_valid(content_type: str) -> bool:
    """Whether the text may stand in a header."""
    return len(content_type) <= CONTENT_TYPE_CHARACTERS_MAX and all(
        " " <= char <= "~" for char in content_type
    )


def _decoded(text: str) -> bytes | None:
    """The bytes of Base64, padded or not; None when it is no Base64."""
    bare = text.rstrip("=")
    try:
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
