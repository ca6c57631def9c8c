"""Producer against a server that the test plays by hand."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from datetime import UTC, datetime
from typing import Any

import grpc
import msgspec
import pytest

from codeq import CodeqError, NewTask, Producer

from .fake_streams import UNAVAILABLE, FakeStreams, Peer, ended, play, spawn, task_id


async def started(fake: FakeStreams, **options: Any) -> tuple[Producer, Peer]:
    producer = Producer(fake.address, token="secret", **options)
    starting = spawn(producer.start())
    peer = await fake.producer()
    await starting
    return producer, peer


def creates_of(event: Any) -> list[Any]:
    return [event.create] if event.HasField("create") else list(event.create_batch.tasks)


async def acknowledge(peer: Peer, creates: list[Any], first: int = 1) -> None:
    """Acknowledges each create with the next id, in one message."""
    acks = [
        {"seq": create.seq, "ok": True, "task_id": task_id(first + index)}
        for index, create in enumerate(creates)
    ]
    await peer.say(create_ack_batch={"acks": acks})


def test_single_produces_of_one_moment_are_one_message() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake)
        calls = [spawn(producer.produce("mail", {"n": n})) for n in range(50)]
        creates = creates_of(await peer.heard())
        assert [json.loads(create.payload)["n"] for create in creates] == list(range(50))
        await peer.say(create_ack_batch={"acks": [
            {"seq": create.seq, "ok": True, "task_id": task_id(json.loads(create.payload)["n"])}
            for create in reversed(creates)
        ]})  # fmt: skip
        assert await asyncio.gather(*calls) == [task_id(n) for n in range(50)]
        await ended(producer.close(), peer)

    play(scenario)


def test_without_merging_each_produce_is_a_message() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake, merge=False)
        calls = [spawn(producer.produce("mail", n)) for n in range(3)]
        for n in range(3):
            event = await peer.heard()
            assert event.create.payload == str(n).encode()
            await peer.say(create_ack={"seq": event.create.seq, "ok": True, "task_id": task_id(n)})
        assert await asyncio.gather(*calls) == [task_id(n) for n in range(3)]
        await ended(producer.close(), peer)

    play(scenario)


def test_every_field_and_kind_of_payload_arrives() -> None:
    class Order(msgspec.Struct):
        number: int

    @dataclasses.dataclass
    class Mail:
        to: str

    at = datetime(2030, 1, 2, 3, 4, 5, 678_901, UTC)

    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake)
        payloads = [{"a": [1, None]}, Order(7), Mail("x@y"), b"\xff\x00raw", bytearray(b"b"), None,
                    memoryview(b"m")]  # fmt: skip
        calling = spawn(producer.produce_batch([("c", payload) for payload in payloads]))
        creates = creates_of(await peer.heard())
        assert [create.payload for create in creates] == [
            b'{"a":[1,null]}', b'{"number":7}', b'{"to":"x@y"}', b"\xff\x00raw", b"b", b"null",
            b"m",
        ]  # fmt: skip
        await acknowledge(peer, creates)
        assert await calling == [task_id(n) for n in range(1, 8)]
        calling = spawn(producer.produce("größe", 1, priority=-7, webhook="https://h/x",
                                         max_attempts=3, idempotency_key=" \x1ck ", run_at=at,
                                         delay_seconds=9))  # fmt: skip
        (create,) = creates_of(await peer.heard())
        assert (create.command, create.priority, create.webhook) == ("größe", -7, "https://h/x")
        assert (create.max_attempts, create.delay_seconds) == (3, 9)
        assert create.idempotency_key == "\x1ck", "trimmed as the server does"
        rounded_up = datetime(2030, 1, 2, 3, 4, 5, 679_000, UTC)
        assert create.run_at.ToDatetime(UTC) == rounded_up
        await acknowledge(peer, [create])
        assert await calling == task_id(1)
        await ended(producer.close(), peer)

    play(scenario)


def test_a_batch_answers_each_create_in_its_place() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake)
        tasks = [
            NewTask("a", 1),
            NewTask("a", object()),  # no JSON
            NewTask("a", 2, priority=2**40),
            NewTask("a", 3, run_at=datetime(2030, 1, 1)),  # no time zone
            NewTask("a", b"x" * (16 << 20)),
            ("", 4),
            ("a", 5),
        ]
        calling = spawn(producer.produce_batch(tasks))
        creates = creates_of(await peer.heard())
        assert [create.payload for create in creates] == [b"1", b"4", b"5"]
        await peer.say(create_ack_batch={"acks": [
            {"seq": creates[0].seq, "ok": True, "task_id": task_id(1)},
            {"seq": creates[1].seq, "ok": False, "error_message": "command is required"},
            {"seq": creates[2].seq, "ok": False, "error_message": "unavailable"},
        ]})  # fmt: skip
        results = await calling
        assert results[0] == task_id(1)
        slugs = [result.slug for result in results[1:] if isinstance(result, CodeqError)]
        assert slugs == ["validation-error"] * 3 + ["payload-too-large", "validation-error",
                                                    "unavailable"]  # fmt: skip
        assert await producer.produce_batch([]) == []
        await ended(producer.close(), peer)

    play(scenario)


def test_a_long_batch_goes_in_several_messages() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake)
        calling = spawn(producer.produce_batch(("a", n) for n in range(2500)))
        numbers = []
        while len(numbers) < 2500:
            creates = creates_of(await peer.heard())
            assert len(creates) <= 1000
            await acknowledge(peer, creates, first=len(numbers))
            numbers += [int(create.payload) for create in creates]
        assert numbers == list(range(2500))
        assert await calling == [task_id(n) for n in range(2500)]
        await ended(producer.close(), peer)

    play(scenario)


def test_unacknowledged_bytes_are_bounded() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake, inflight_bytes_max=3000)
        calls = [spawn(producer.produce("a", b"x" * 800)) for _ in range(9)]
        for first in range(0, 9, 3):
            creates = creates_of(await peer.heard())
            assert len(creates) == 3
            assert sum(call.done() for call in calls) == first
            await acknowledge(peer, creates)
            await asyncio.gather(*calls[first : first + 3])
        calls = [spawn(producer.produce("a", b"x" * 2500)) for _ in range(3)]
        first_create = creates_of(await peer.heard())
        calls[1].cancel()  # gives its place in the row away
        await acknowledge(peer, first_create)
        await acknowledge(peer, creates_of(await peer.heard()))
        await asyncio.gather(calls[0], calls[2])
        lone = spawn(producer.produce("a", b"x" * 9000))  # more than the bound still goes alone
        await acknowledge(peer, creates_of(await peer.heard()))
        await lone
        await ended(producer.close(), peer)

    play(scenario)


def test_T65_after_a_break_only_keyed_creates_are_sent_again() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake, make_keys=False)
        with_key = spawn(producer.produce("a", 1, idempotency_key="k"))
        without = spawn(producer.produce("a", 2))
        batch = spawn(producer.produce_batch(
            [NewTask("b", 3), NewTask("b", 4, idempotency_key="k2"), ("b", 5)]
        ))  # fmt: skip
        assert len(creates_of(await peer.heard())) == 2
        sent = creates_of(await peer.heard())
        await acknowledge(peer, sent[:1], first=3)
        peer.end(UNAVAILABLE, "going away")
        peer = await fake.producer()
        with pytest.raises(CodeqError, match="outcome unknown") as caught:
            await without
        assert caught.value.slug == "unavailable"
        again = [*creates_of(await peer.heard()), *creates_of(await peer.heard())]
        assert [create.idempotency_key for create in again] == ["k", "k2"]
        await acknowledge(peer, again, first=1)
        assert await with_key == task_id(1)
        first, second, third = await batch
        assert (first, second) == (task_id(3), task_id(2))
        assert isinstance(third, CodeqError) and third.slug == "unavailable"
        await ended(producer.close(), peer)

    play(scenario)


def test_T65_creates_without_a_key_get_one_and_are_sent_again_under_it() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake)
        single = spawn(producer.produce("a", 1))
        batch = spawn(producer.produce_batch([("b", 2), NewTask("b", 3, idempotency_key="mine")]))
        sent = [*creates_of(await peer.heard()), *creates_of(await peer.heard())]
        keys = [create.idempotency_key for create in sent]
        assert len(set(keys)) == 3 and keys[2] == "mine"
        await acknowledge(peer, sent[1:2], first=2)
        peer.end(UNAVAILABLE)
        peer = await fake.producer()
        again = [*creates_of(await peer.heard()), *creates_of(await peer.heard())]
        assert [create.idempotency_key for create in again] == [keys[0], "mine"]
        await acknowledge(peer, again[:1], first=1)
        await acknowledge(peer, again[1:], first=3)
        assert await single == task_id(1)
        assert await batch == [task_id(2), task_id(3)]
        await ended(producer.close(), peer)
        other, peer = await started(fake)
        calling = spawn(other.produce("a", 1))
        (create,) = creates_of(await peer.heard())
        assert create.idempotency_key.rpartition("-")[0] != keys[0].rpartition("-")[0]
        await acknowledge(peer, [create])
        await calling
        await ended(other.close(), peer)

    play(scenario)


def test_T65_creates_that_were_never_sent_wait_for_the_next_connection() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake)
        peer.end(UNAVAILABLE)
        silent = await fake.peer()  # the next stream is open but not greeted
        waiting = spawn(producer.produce("a", 1))
        assert (await silent.heard()).HasField("hello")
        assert not waiting.done()
        silent.end(UNAVAILABLE)
        peer = await fake.producer()
        await acknowledge(peer, creates_of(await peer.heard()))
        assert await waiting == task_id(1)
        await ended(producer.close(), peer)

    play(scenario)


def test_a_create_that_breaks_every_stream_ends() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake)
        calling = spawn(producer.produce("a", 1, idempotency_key="k"))
        while True:
            await peer.heard()
            peer.end(grpc.StatusCode.RESOURCE_EXHAUSTED, "message too large")
            listening = spawn(fake.producer())
            await asyncio.wait({calling, listening}, return_when=asyncio.FIRST_COMPLETED)
            if calling.done():
                break
            peer = await listening
        with pytest.raises(CodeqError, match="outcome unknown"):
            await calling
        peer = await listening
        await ended(producer.close(), peer)

    play(scenario)


def test_T65_closing_waits_for_acknowledgements_and_half_closes() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake)
        calls = [spawn(producer.produce("a", n)) for n in range(3)]
        creates = creates_of(await peer.heard())
        closing = spawn(producer.close())
        await acknowledge(peer, creates)
        assert await peer.heard() is None
        peer.end()
        await closing
        assert await asyncio.gather(*calls) == [task_id(n) for n in (1, 2, 3)]
        with pytest.raises(CodeqError, match="the producer is closed"):
            await producer.produce("a", 1)
        results = await producer.produce_batch([("a", 1), ("a", 2)])
        assert all(isinstance(result, CodeqError) for result in results)

    play(scenario)


def test_T65_closing_during_a_send_is_safe(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, _ = await started(fake, inflight_bytes_max=1 << 20)
        calls = [spawn(producer.produce("a", b"x" * 100_000)) for _ in range(40)]
        batch = spawn(producer.produce_batch([("a", b"x" * 100_000)] * 40))
        await asyncio.sleep(0)
        await producer.close(flush=False)
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, CodeqError) and outcome.slug == "unavailable"
        for outcome in await batch:
            assert isinstance(outcome, CodeqError) and outcome.slug == "unavailable"
        await producer.close()

    play(scenario)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not [record for record in errors if not record.name.startswith("grpc.")]


def test_a_refused_token_is_told_at_once() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer = Producer(fake.address, token="bad")
        starting = spawn(producer.start())
        (await fake.peer()).end(grpc.StatusCode.UNAUTHENTICATED, "auth failed: invalid token")
        with pytest.raises(CodeqError, match="auth failed: invalid token") as caught:
            await starting
        assert caught.value.slug == "unauthenticated"
        with pytest.raises(CodeqError, match="not started"):
            await producer.produce("a")
        await producer.close()

    play(scenario)


def test_nobody_listening_is_told_in_time() -> None:
    async def scenario(_: FakeStreams) -> None:
        producer = Producer("127.0.0.1:1", token="t", connect_timeout_seconds=0.2)
        with pytest.raises(CodeqError) as caught:
            async with producer:
                pass
        assert caught.value.slug == "unavailable"

    play(scenario)


def test_T65_each_connection_gets_a_fresh_token() -> None:
    async def scenario(fake: FakeStreams) -> None:
        tokens = iter(("one", "two", "three"))

        async def fresh() -> str:
            return next(tokens)

        producer = Producer(fake.address, token=fresh)
        starting = spawn(producer.start())
        peer = await fake.peer()
        assert (await peer.heard()).hello.token == "one"
        await peer.say(hello_ack={"tenant_id": "t"})
        await starting
        peer.end(grpc.StatusCode.UNAUTHENTICATED, "token expired")
        peer = await fake.peer()
        assert (await peer.heard()).hello.token == "two"
        peer.end(grpc.StatusCode.UNAUTHENTICATED, "auth failed")  # keys of the server not there yet
        peer = await fake.peer()
        assert (await peer.heard()).hello.token == "three"
        await peer.say(hello_ack={"tenant_id": "t"})
        calling = spawn(producer.produce("a", 1))
        await acknowledge(peer, creates_of(await peer.heard()))
        assert await calling == task_id(1)
        await ended(producer.close(), peer)

    play(scenario)


def test_T65_a_token_that_cannot_be_had_is_asked_for_again() -> None:
    """But not at the start, where it is told at once."""

    async def scenario(fake: FakeStreams) -> None:
        answers: list[str | OSError] = ["one", OSError("no route"), "two"]

        def fresh() -> str:
            answer = answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

        producer = Producer(fake.address, token=fresh)
        starting = spawn(producer.start())
        peer = await fake.peer()
        await peer.heard()
        await peer.say(hello_ack={"tenant_id": "t"})
        await starting
        peer.end(UNAVAILABLE)
        peer = await fake.peer()
        assert (await peer.heard()).hello.token == "two"
        await peer.say(hello_ack={"tenant_id": "t"})
        await ended(producer.close(), peer)
        answers[:] = [OSError("no route")]
        with pytest.raises(CodeqError, match="no route") as caught:
            await Producer(fake.address, token=fresh).start()
        assert caught.value.slug == "unauthenticated"

    play(scenario)


def test_a_token_refused_later_fails_what_is_open() -> None:
    async def scenario(fake: FakeStreams) -> None:
        producer, peer = await started(fake)
        calling = spawn(producer.produce("a", 1, idempotency_key="k"))
        await peer.heard()
        peer.end(UNAVAILABLE)
        (await fake.peer()).end(grpc.StatusCode.UNAUTHENTICATED, "auth failed: expired")
        with pytest.raises(CodeqError, match="auth failed: expired"):
            await calling
        with pytest.raises(CodeqError, match="auth failed: expired"):
            await producer.produce("a", 2)
        await producer.close()

    play(scenario)
