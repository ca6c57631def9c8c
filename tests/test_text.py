"""Texts: JSON, UTF-8, white space, control characters and ids, each against what Python says."""

from __future__ import annotations

import json
import sys
import unicodedata
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeq.engine import _wire

CODES = _wire.CODES
PAYLOAD_BYTES_MAX = 1000

# --- JSON -----------------------------------------------------------------------------------------


def refuse_constant(name: str) -> None:
    raise ValueError(name)


def json_valid_by_python(text: bytes) -> bool:
    try:
        json.loads(text.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


VALID = [
    "null", "true", "false", "0", "-0", "-0.0", "1e5", "1E+5", "1e-05", "0.5",
    "12345678901234567890123", '""', '"a"', '"\\u0000"', '"\\ud800"', '"\\uD83D\\uDE00"',
    '"\\"\\\\\\/\\b\\f\\n\\r\\t"', '"\u2028\x7f"', '"12345678"', '"1234567\\n"', '"a\U0001f600b"',
    "[]", "{}", "[ ]", "{ }", "[1,[2,[3]]]", '{"":{}}',
    ' \t\r\n{"a" : [ 1 , {"b":null} ] , "a":2} \n', "[9007199254740993]", '{"a":{"b":[{},[],""]}}',
]  # fmt: skip
INVALID = [
    "", " ", "nul", "nulll", "True", "NaN", "Infinity", "-Infinity", "-", "+1", "01", "-01", "1.",
    ".5", "1e", "1e+", "0x1", "1 2", "1,", ",1", "[", "]", "[1", "[1,", "[1,]", "[,1]", "[1 2]",
    "[1}", "{", "}", '{"a"}', '{"a":}', '{"a":1,}', '{"a":1 "b":2}', '{a:1}', "{1:1}", '{"a":1]',
    "{,}", '"', '"a', '"\\"', '"\\x"', '"\\u12"', '"\\u12g4"', '"\n"', '"\x00"', '"1234567\x1f"',
    "'a'", "/**/1", "\ufeff1", "\xa01", "1\x00", '"a" x', "[1]]", '"\\\x00"', "nullnull", "{}{}",
    "[[]", "tru", "\x0b1",
]  # fmt: skip


@pytest.mark.parametrize("text", VALID)
def test_json_valid(text: str) -> None:
    assert json_valid_by_python(text.encode())
    assert _wire.json_valid(text.encode())


@pytest.mark.parametrize("text", INVALID)
def test_json_invalid(text: str) -> None:
    assert not json_valid_by_python(text.encode())
    assert not _wire.json_valid(text.encode())


def test_json_depth_ends_at_512() -> None:
    for opening, middle, closing in (
        (b"[", b"", b"]"),
        (b'{"a":', b"1", b"}"),
        (b'[[{"k":[', b"0", b"]}]]"),
    ):
        levels = opening.count(b"[") + opening.count(b"{")
        most = 512 // levels
        assert _wire.json_valid(opening * most + middle + closing * most)
        assert not _wire.json_valid(opening * (most + 1) + middle + closing * (most + 1))
    assert not _wire.json_valid(b"[" * 1_000_000)
    assert _wire.json_valid(b"[" + b"[]," * 10_000 + b"[]]")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON_VALUES, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_json_accepts_what_python_writes(
    value: object, ascii_only: bool, indent: int | str | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert _wire.json_valid(text.encode("utf-8", "surrogatepass")) == (
        not any(map(surrogate, text))
    )


def surrogate(character: str) -> bool:
    return "\ud800" <= character <= "\udfff"


@given(JSON_VALUES, st.data())
def test_json_agrees_with_python_on_damaged_texts(value: object, data: st.DataObject) -> None:
    text = bytearray(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from(
                [
                    b"",
                    b'"',
                    b"\\",
                    b",",
                    b"]",
                    b"}",
                    b"{",
                    b"[",
                    b":",
                    b"0",
                    b"e",
                    b"-",
                    b".",
                    b"\x1f",
                    b"\x80",
                ]
            )
        )
    assert _wire.json_valid(bytes(text)) == json_valid_by_python(bytes(text))


@given(st.binary(max_size=40))
def test_json_agrees_with_python_on_any_bytes(text: bytes) -> None:
    assert _wire.json_valid(text) == json_valid_by_python(text)


# --- UTF-8 ----------------------------------------------------------------------------------------


def utf8_by_python(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_utf8_of_every_short_sequence() -> None:
    def agrees(text: bytes) -> bool:
        return _wire.json_valid(b'"' + text + b'"') == utf8_by_python(text)

    for lead in range(0x80, 0x100):
        assert agrees(bytes([lead]))
        for second in range(0x80, 0x100):
            assert agrees(bytes([lead, second]))
            if lead >= 0xE0:
                for third in (0x80, 0x9F, 0xBF, 0xC0, 0x7F, 0xFF):
                    assert agrees(bytes([lead, second, third]))
                    for fourth in (0x80, 0xBF, 0xC0, 0x41):
                        assert agrees(bytes([lead, second, third, fourth]))


@given(st.integers(0, 17), st.binary(min_size=1, max_size=4), st.integers(0, 17))
def test_utf8_at_every_place(before: int, middle: bytes, after: int) -> None:
    text = b"a" * before + middle.translate(None, bytes(range(0x80))) + b"b" * after
    assert _wire.json_valid(b'"' + text + b'"') == utf8_by_python(text)


# --- white space and control characters -----------------------------------------------------------

#: the code points with the property White_Space
WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | frozenset(
    map(chr, range(0x2000, 0x200B))
)
ALL_CHARACTERS = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]


def test_white_space_is_trimmed_for_every_character() -> None:
    creates = _wire.Creates()
    for character in ALL_CHARACTERS:
        creates.add(b"c", b"", key=f"{character}{character}k{character}".encode())
    creates.check(PAYLOAD_BYTES_MAX)
    trimmed = {ALL_CHARACTERS[index] for index, key, _ in creates.keyed() if key == b"k"}
    assert trimmed == WHITE_SPACE


def test_T20_command_takes_every_character_but_controls() -> None:
    creates = _wire.Creates()
    for character in ALL_CHARACTERS:
        creates.add(f"a{character}b".encode(), b"")
    creates.check(PAYLOAD_BYTES_MAX)
    refused = {c for c, code in zip(ALL_CHARACTERS, creates.codes, strict=True) if code}
    assert refused == {c for c in ALL_CHARACTERS if unicodedata.category(c) == "Cc"}
    assert set(creates.codes) == {CODES["OK"], CODES["COMMAND_INVALID"]}


def check_one(command: bytes, **fields: object) -> int:
    creates = _wire.Creates()
    creates.add(command, b"{}", **fields)  # type: ignore[arg-type]
    creates.check(PAYLOAD_BYTES_MAX)
    return creates.codes[0]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (b"", "COMMAND_REQUIRED"),
        (b" \t\xc2\xa0\xe3\x80\x80 ", "COMMAND_REQUIRED"),
        (b"x" * 256, "OK"),
        (b"  " + b"x" * 256 + b"\n", "OK"),
        (b"x" * 257, "COMMAND_INVALID"),
        ("é".encode() * 128, "OK"),
        ("é".encode() * 129, "COMMAND_INVALID"),
        (b"a\x00b", "COMMAND_INVALID"),
        (b"\x00", "COMMAND_INVALID"),
        (b"a\xff", "COMMAND_INVALID"),
        (b"a\xe3\x80", "COMMAND_INVALID"),
        ("send/e:mail now ж".encode(), "OK"),
    ],
)
def test_command_bounds(command: bytes, code: str) -> None:
    assert check_one(command) == CODES[code]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"key": b"k" * 512}, "OK"),
        ({"key": b" " + b"k" * 512}, "OK"),
        ({"key": b"k" * 513}, "KEY_INVALID"),
        ({"key": b"\xff"}, "KEY_INVALID"),
        ({"webhook": b"w" * 2048}, "OK"),
        ({"webhook": b"w" * 2049}, "WEBHOOK_INVALID"),
        ({"webhook": b"\xff"}, "WEBHOOK_INVALID"),
        ({"delay_seconds": 0}, "OK"),
        ({"delay_seconds": 2147483647}, "OK"),
        ({"delay_seconds": -1}, "DELAY_INVALID"),
        ({"delay_seconds": -1, "run_at_ms": 1}, "DELAY_INVALID"),
        ({"priority": -2147483648, "max_attempts": -2147483648}, "OK"),
        ({"run_at_ms": -62135596800000}, "OK"),
        ({"run_at_ms": -62135596800001}, "RUN_AT_INVALID"),
        ({"run_at_ms": 253402300800000}, "OK"),
        ({"run_at_ms": 253402300800001}, "RUN_AT_INVALID"),
        ({"trace_parent": b"t" * 100_000, "trace_state": b"\xff"}, "OK"),
    ],
)
def test_create_bounds(fields: dict[str, object], code: str) -> None:
    assert check_one(b"c", **fields) == CODES[code]


def test_payload_bound_and_default() -> None:
    creates = _wire.Creates()
    for size in (0, PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX + 1):
        creates.add(b"c", b"x" * size, key=b"k")
    creates.check(PAYLOAD_BYTES_MAX)
    assert list(creates.codes) == [0, 0, CODES["PAYLOAD_TOO_LARGE"]]
    assert [request.endswith(b"null") for _, _, request in creates.keyed()] == [True, False]


# --- results --------------------------------------------------------------------------------------

ID = str(uuid.UUID(int=5)).encode()


@pytest.mark.parametrize(
    ("status", "fields", "lenient", "code"),
    [
        (b"COMPLETED", {}, True, "OK"),
        (b"COMPLETED", {"result": b" [1] "}, True, "OK"),
        (b"COMPLETED", {"result": b"   "}, True, "RESULT_JSON_INVALID"),
        (b"COMPLETED", {"result": b"{"}, True, "RESULT_JSON_INVALID"),
        (b"COMPLETED", {"result": b'"\xff"'}, True, "RESULT_JSON_INVALID"),
        (b"COMPLETED", {"result": b'"%b"' % (b"x" * 998)}, True, "OK"),
        (b"COMPLETED", {"result": b'"%b"' % (b"x" * 999)}, True, "RESULT_TOO_LARGE"),
        (b"completed", {}, True, "STATUS_INVALID"),
        (b"", {}, True, "STATUS_INVALID"),
        (b"COMPLETED ", {}, True, "STATUS_INVALID"),
        (b"DONE", {"result": b"{"}, True, "STATUS_INVALID"),
        (b"FAILED", {"error": b"why"}, False, "OK"),
        (b"FAILED", {"error": b" \n"}, False, "ERROR_REQUIRED"),
        (b"FAILED", {}, False, "ERROR_REQUIRED"),
        (b"FAILED", {}, True, "OK"),
        (b"FAILED", {"result": b"nope"}, False, "RESULT_JSON_INVALID"),
        (b"FAILED", {"error": b"e", "worker": b"w" * 256}, False, "OK"),
        (b"FAILED", {"error": b"e", "worker": b"w" * 257}, False, "WORKER_ID_INVALID"),
    ],
)
def test_result_bounds(status: bytes, fields: dict[str, bytes], lenient: bool, code: str) -> None:
    finishes = _wire.Finishes()
    finishes.add(ID, status, **fields)  # type: ignore[arg-type]
    finishes.check(1000, lenient_error=lenient)
    assert finishes.codes[0] == CODES[code]


def test_blank_error_of_a_failure_is_named_on_streams() -> None:
    finishes = _wire.Finishes()
    finishes.add(ID, b"FAILED", error=b"\t ")
    finishes.add(ID, b"COMPLETED", error=b"\t ", result=b"")
    finishes.check(1000, lenient_error=True)
    assert finishes.item(0) == ("FAILED", None, "unspecified failure", b"", b"")
    assert finishes.item(1) == ("COMPLETED", b"null", "", b"", b"")


@given(st.text(min_size=1, max_size=9), st.integers(900, 9000))
def test_error_is_cut_at_8_kib_between_characters(part: str, times: int) -> None:
    text = "e" + part * times
    finishes = _wire.Finishes()
    finishes.add(ID, b"FAILED", error=text.encode())
    finishes.check(1000, lenient_error=False)
    error = finishes.item(0)[2]
    assert text.startswith(error)
    assert len(error.encode()) <= 8192
    assert error == text or len(error.encode()) > 8192 - 4


# --- ids ------------------------------------------------------------------------------------------


@given(st.uuids())
def test_ids_to_text_and_back(value: uuid.UUID) -> None:
    assert _wire.format_id(value.bytes) == str(value)
    assert _wire.parse_id(str(value)) == value.bytes
    assert _wire.parse_id(str(value).encode()) == value.bytes


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "0" * 36, "00000000-0000-0000-0000-00000000000",
        "00000000-0000-0000-0000-0000000000000", "0000000A-0000-0000-0000-000000000000",
        "0000000g-0000-0000-0000-000000000000", "00000000_0000-0000-0000-000000000000",
        "000000000000-0000-0000-0000-00000000", "{00000000-0000-0000-0000-00000000000}",
        "00000000-0000-0000-0000-00000000000é", " 0000000-0000-0000-0000-000000000000",
        "\ud80000000-0000-0000-0000-000000000000",
    ],
)  # fmt: skip
def test_ids_are_refused_unless_canonical(text: str) -> None:
    assert _wire.parse_id(text) is None


def test_ids_refuse_a_wrong_byte_anywhere() -> None:
    canonical = bytearray(b"01234567-89ab-7def-8123-456789abcdef")
    assert _wire.parse_id(bytes(canonical)) is not None
    allowed = b"0123456789abcdef"
    for at, old in enumerate(canonical):
        for byte in range(256):
            canonical[at] = byte
            fine = byte == old if old == ord("-") else byte in allowed
            assert (_wire.parse_id(bytes(canonical)) is not None) == fine
        canonical[at] = old


def test_id_of_the_wrong_length_is_refused() -> None:
    for size in (0, 15, 17):
        with pytest.raises(ValueError, match="16 bytes"):
            _wire.format_id(b"x" * size)
