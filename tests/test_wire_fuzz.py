"""_wire faces strangers: whatever the bytes, it answers what the generated classes answer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeq.engine import _wire
from tests.wire_oracle import EVENTS, OURS, PROTOBUF, REFUSED

STREAMS = sorted(EVENTS)
ROUNDS = 8000


def agree(stream: str, message: bytes) -> object:
    ours = OURS[stream](message)
    assert ours == PROTOBUF[stream](message), message.hex()
    return ours


# --- messages made of odd, but mostly well-formed pieces ------------------------------------------


class Cook:
    """Makes messages in which anything may turn up: unknown, repeated and misfit fields, groups,
    padded varints, Timestamps, bad UTF-8."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def varint(self, value: int) -> bytes:
        out = bytearray()
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
        if self.dice.random() < 0.03:
            out[-1] |= 0x80
            out += b"\x80" * self.dice.randrange(5) + bytes([self.dice.choice((0, 0, 1, 0x7F))])
        return bytes(out)

    def number(self) -> int:
        if self.dice.random() < 0.03:
            return self.dice.choice((0, 16, 17, 100, 2**29 - 1, 2**29, 2**32))
        return min(self.dice.randrange(1, 15), self.dice.randrange(1, 15))

    def scalar(self) -> int:
        return self.dice.choice(
            (0, 1, 2, 127, 128, 999999999, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 1, 2**63,
             2**64 - 1, 2**64 - 2, 253402300799, self.dice.getrandbits(64))
        )  # fmt: skip

    def text(self) -> bytes:
        part = self.dice.choice((b"", b"a", b"task", "жé".encode(), "\U0001f600".encode(), b"{}"))
        if self.dice.random() < 0.02:
            part += self.dice.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe3\x80"))
        return part * self.dice.randrange(1, 4)

    def field(self, depth: int) -> bytes:
        number = self.number()
        kind = self.dice.random()
        if kind < 0.3:
            return self.varint(number << 3) + self.varint(self.scalar())
        if kind < 0.9:
            run = self.soup(depth - 1) if depth and self.dice.random() < 0.7 else self.text()
            return self.varint(number << 3 | 2) + self.varint(len(run)) + run
        if kind < 0.93:
            return self.varint(number << 3 | 1) + self.dice.randbytes(8)
        if kind < 0.96:
            return self.varint(number << 3 | 5) + self.dice.randbytes(4)
        end = number if self.dice.random() < 0.97 else self.number()
        return self.varint(number << 3 | 3) + self.soup(depth - 1) + self.varint(end << 3 | 4)

    def soup(self, depth: int) -> bytes:
        return b"".join(
            self.field(depth) for _ in range(self.dice.randrange(5 if depth > 0 else 1))
        )

    def damage(self, message: bytes) -> bytes:
        out = bytearray(message)
        for _ in range(self.dice.randrange(1, 4)):
            at = self.dice.randrange(len(out) + 1)
            cut = self.dice.choice((0, 1, 1, len(out)))
            out[at : at + cut] = self.dice.randbytes(self.dice.randrange(3))
        return bytes(out)


@pytest.mark.parametrize("stream", STREAMS)
def test_soup_is_read_as_the_generated_classes_read_it(stream: str) -> None:
    cook = Cook(seed=STREAMS.index(stream))
    read = 0
    for _ in range(ROUNDS):
        message = cook.soup(4)
        read += agree(stream, message) not in (REFUSED, (_wire.UNKNOWN, None))
        agree(stream, cook.damage(message))
    assert read > ROUNDS // 6, "most messages are refused; the fuzz tells little"


@pytest.mark.parametrize("stream", STREAMS)
@given(message=st.binary(max_size=60))
def test_any_bytes_are_read_as_the_generated_classes_read_them(stream: str, message: bytes) -> None:
    agree(stream, message)


def full(kind: object, depth: int = 0) -> dict[str, object]:
    """Arguments that set every field of a message; the last member of a oneof wins."""
    values: dict[str, object] = {}
    for field in kind.DESCRIPTOR.fields:  # type: ignore[attr-defined]
        if field.message_type:
            inner = field.message_type._concrete_class
            value: object = inner(**full(inner, depth + 1))
        elif field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            value = "tä" if field.type == field.TYPE_STRING else b"\xff\x00"
        else:
            value = True if field.type == field.TYPE_BOOL else 300 + field.number
        values[field.name] = [value, value] if field.is_repeated else value
    return values


@pytest.mark.parametrize("stream", STREAMS)
def test_every_truncation_of_every_member(stream: str) -> None:
    kind = EVENTS[stream]
    for member, value in full(kind).items():
        message = kind(**{member: value}).SerializeToString()
        assert agree(stream, message) != REFUSED
        answers = [agree(stream, message[:size]) for size in range(len(message))]
        assert answers.count(REFUSED) >= len(message) - 2


@pytest.mark.parametrize("stream", STREAMS)
def test_members_are_merged_or_replaced_in_any_order(stream: str) -> None:
    kind = EVENTS[stream]
    parts = [kind(**{name: value}).SerializeToString() for name, value in full(kind).items()]
    parts += [part[:1] + b"\0" for part in parts]
    dice = random.Random(7)
    for _ in range(500):
        agree(stream, b"".join(dice.choices(parts, k=dice.randrange(1, 6))))


# --- lengths, depth, number -----------------------------------------------------------------------

BAD = [
    "0a", "0aff", "0affffffff", "0affffffff07", "0affffffff0f", "0affffffffffffffffff01", "1a80",
    "0a8080808000", "0a808080808000", "00", "0000", "0200", "07", "0f", "0e", "0c", "0b", "0b0c",
    "0b14", "0b0b0c0c", "0b0b0c", "08", "0880", "08ffffffffffffffffff01",
    "08ffffffffffffffffffff01", "0880808080808080808000", "8a00", "8a0000", "8a8080800000",
    "8a808080800000", "8a80808080800000", "ffffffff0f00", "f8ffffff0f00", "f8ffffffff0f00",
    "0d000000", "0d00000000", "09", "0900000000", "090000000000000000", "faffffff0f00", "fa7f00",
    "120208", "12020800", "1202421a", "120342010a", "1203420108", "120442020800",
    "120642040880808000",
]  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS)
def test_odd_tags_lengths_and_varints(stream: str) -> None:
    for text in BAD:
        agree(stream, bytes.fromhex(text))


@pytest.mark.parametrize("stream", STREAMS)
def test_nested_groups_end_where_the_generated_classes_end(stream: str) -> None:
    for depth in (1, 50, 96, 97, 98, 99, 100, 101, 102, 5000):
        groups = b"\x7b" * depth + b"\x7c" * depth
        for around in range(4):
            message = groups
            for _ in range(around):
                message = b"\x0a" + Cook(0).varint(len(message)) + message
            agree(stream, message)
        agree(stream, b"\x7b" * depth)
    agree(stream, b"\x7b" * 1_000_000)


def run(number: int, content: bytes) -> bytes:
    return Cook(0).varint(number << 3 | 2) + Cook(0).varint(len(content)) + content


def test_a_million_empty_creates_are_read_and_refused_one_by_one() -> None:
    kind, creates = _wire.decode_producer_event(run(3, b"\x0a\x00" * 1_000_000))
    assert kind == _wire.CREATE_BATCH
    assert isinstance(creates, _wire.Creates)
    creates.check(100)
    assert creates.codes == bytes([_wire.CODES["COMMAND_REQUIRED"]]) * 1_000_000
    assert creates.payload_bytes > 2_000_000, "the items count too"


def test_too_many_items_are_refused_before_they_take_memory() -> None:
    many = b"\x0a\x00" * ((1 << 20) + 1)
    for decode, number in (
        (_wire.decode_producer_event, 3),
        (_wire.decode_worker_event, 7),
        (_wire.decode_worker_event, 2),
        (_wire.decode_worker_server_event, 8),
        (_wire.decode_producer_server_event, 4),
    ):
        with pytest.raises(_wire.WireError, match="1048576"):
            decode(run(number, many))
        with pytest.raises(_wire.WireError, match="1048576"):
            decode(run(number, many[:-2]) + run(number, b"\x0a\x00"))


def test_many_batches_in_one_event_add_up() -> None:
    part = run(3, b"\x0a\x00")
    _, creates = _wire.decode_producer_event(part * 300_000)
    assert isinstance(creates, _wire.Creates)
    assert len(creates) == 300_000
    _, ready = _wire.decode_worker_event(run(2, b"\x0a\x00") * 300_000)
    assert ready == ((b"",) * 300_000, 0, 0)
    kind, _ = _wire.decode_producer_event((part + run(1, b"")) * 300_000)
    assert kind == _wire.HELLO
