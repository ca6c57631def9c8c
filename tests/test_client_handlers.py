"""Decorated handlers of a Worker, against a server that the test plays by hand."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from typing import Any

import msgspec
import pytest

from codeq import Fail, Nack, Task, Worker
from codeq.client.signals import stopping

from .fake_streams import FakeStreams, Peer, ended, play, spawn, task_id
from .test_client_worker import result_acks, results_of, wire_task


class Size(msgspec.Struct):
    width: int


@dataclasses.dataclass
class Mail:
    to: str


def a_worker(fake: FakeStreams, **options: Any) -> Worker:
    return Worker(fake.address, token="t", **{"batch": 10, **options})


def mixed(*pairs: tuple[str, Any]) -> dict[str, Any]:
    """A message with tasks of these commands and payloads, numbered from 1 on."""
    tasks = [
        wire_task(n, payload, command=command) for n, (command, payload) in enumerate(pairs, 1)
    ]
    return {"task_batch": {"tasks": tasks}}


async def outcomes(peer: Peer, count: int) -> dict[str, Any]:
    """What the worker says of so many tasks, by id; everything is acknowledged."""
    found: dict[str, Any] = {}
    while len(found) < count:
        event = await peer.heard()
        if event.HasField("nack"):
            found[event.nack.task_id] = ("NACK", event.nack.delay_seconds, event.nack.reason)
            await peer.say(nack_ack={"task_id": event.nack.task_id, "ok": True})
        elif event.HasField("abandon"):
            found[event.abandon.task_id] = "ABANDON"
            await peer.say(abandon_ack={"task_id": event.abandon.task_id, "ok": True})
        elif event.HasField("result") or event.HasField("result_batch"):
            found |= results_of(event)
            await result_acks(peer, event)
    return found


def test_each_command_has_its_handler() -> None:
    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)

        @worker.task("double")
        async def double(task: Task) -> int:
            return int(task.json(int)) * 2

        @worker.task(" shout ")
        def shout(task: Task) -> str:
            return str(task.json(str)).upper()

        running = spawn(worker.run())
        peer = await fake.worker()
        assert list((await peer.heard()).ready.commands) == ["double", "shout"]
        await peer.say(**mixed(("shout", "a"), ("double", 4), ("shout", "b"), ("Shout", "c")))
        found = await outcomes(peer, 4)
        assert [found[task_id(n)][1] for n in (1, 2, 3)] == [b'"A"', b"8", b'"B"']
        assert found[task_id(4)] == ("NACK", 0, "LookupError: no handler of 'Shout'")
        worker.stop()
        await ended(running, peer)
        assert shout.__name__ == "shout"

    play(scenario)


def test_commands_choose_among_the_handlers_and_order_them() -> None:
    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake, commands=["c", " a "])
        for command in "abc":
            worker.task(command)(lambda task: 1)
        running = spawn(worker.run())
        peer = await fake.worker()
        assert list((await peer.heard()).ready.commands) == ["c", "a"]
        with pytest.raises(ValueError, match="the worker runs: a handler of 'd' comes too late"):
            worker.task("d")(lambda task: 1)
        worker.stop()
        await ended(running, peer)

    play(scenario)


def test_a_typed_payload_is_decoded_or_ends_the_task() -> None:
    calls: list[Any] = []

    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)

        @worker.task("resize", type=Size)
        async def resize(task: Task, size: Size) -> Size:
            calls.append(size)
            return Size(size.width * 2)

        @worker.task("mail", type=Mail)
        def mail(task: Task, mail: Mail) -> Mail:
            calls.append(mail)
            return mail

        @worker.task("sum", type=list[int])
        def add(task: Task, numbers: list[int]) -> int:
            return sum(numbers)

        running = spawn(worker.run())
        peer = await fake.worker()
        await peer.heard()
        message = mixed(
            ("resize", {"width": 4}), ("mail", {"to": "ann"}), ("sum", [1, 2]),
            ("resize", {"width": "wide"}), ("mail", {}), ("sum", None),
        )  # fmt: skip
        message["task_batch"]["tasks"][5]["payload"] = b"\xff{"
        await peer.say(**message)
        found = await outcomes(peer, 6)
        assert [found[task_id(n)] for n in (1, 2, 3)] == [
            ("COMPLETED", b'{"width":8}', ""),
            ("COMPLETED", b'{"to":"ann"}', ""),
            ("COMPLETED", b"3", ""),
        ]
        reasons = {
            4: "Expected `int`, got `str` - at `$.width`",
            5: "missing required field `to`",
            6: "JSON is malformed",
        }
        for number, why in reasons.items():
            status, _, error = found[task_id(number)]
            assert status == "FAILED" and why in error
            assert error.startswith("the payload is not what the handler takes: ")
        assert calls == [Size(4), Mail("ann")]
        worker.stop()
        await ended(running, peer)

    play(scenario)


def test_a_batch_handler_gets_all_tasks_of_its_command() -> None:
    batches: list[list[int]] = []

    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)

        @worker.batch("index", type=Size)
        async def index(tasks: list[Task], sizes: list[Size]) -> list[Any]:
            assert len(tasks) == len(sizes)
            batches.append([size.width for size in sizes])
            return [Fail("odd") if size.width % 2 else size.width for size in sizes]

        @worker.batch("plain")
        def plain(tasks: list[Task]) -> list[int]:
            return [task.json() for task in tasks]

        @worker.task("single")
        def single(task: Task) -> Any:
            raise Nack(3, "later")

        running = spawn(worker.run())
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**mixed(
            ("index", {"width": 1}), ("plain", 7), ("index", {}), ("single", 0),
            ("index", {"width": 2}), ("plain", 8),
        ))  # fmt: skip
        found = await outcomes(peer, 6)
        assert found[task_id(1)] == ("FAILED", b"", "odd")
        assert found[task_id(2)][1] == b"7" and found[task_id(6)][1] == b"8"
        assert found[task_id(3)][0] == "FAILED" and "`width`" in found[task_id(3)][2]
        assert found[task_id(4)] == ("NACK", 3, "later")
        assert found[task_id(5)] == ("COMPLETED", b"2", "")
        await peer.say(**mixed(("index", 1), ("index", 2)))
        assert {status for status, _, _ in (await outcomes(peer, 2)).values()} == {"FAILED"}
        assert batches == [[1, 2]], "nothing that does not decode gets to the handler"
        worker.stop()
        await ended(running, peer)

    play(scenario)


@pytest.mark.parametrize("typed", [True, False])
def test_a_batch_handler_that_raises_or_answers_for_too_few(typed: bool) -> None:
    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)
        kind: dict[str, Any] = {"type": int} if typed else {}

        @worker.batch("few", **kind)
        async def few(*_: Any) -> list[int]:
            return [1]

        @worker.batch("broken", **kind)
        def broken(*_: Any) -> list[int]:
            raise KeyError("oops")

        running = spawn(worker.run())
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**mixed(("few", 1), ("few", 2), ("broken", 3)))
        found = await outcomes(peer, 3)
        assert found[task_id(2)] == ("NACK", 0, "ValueError: 1 results for 2 tasks")
        assert found[task_id(3)] == ("NACK", 0, "KeyError: 'oops'")
        worker.stop()
        await ended(running, peer)

    play(scenario)


def test_T65_heartbeats_and_lost_leases_of_a_message_with_batches() -> None:
    """While a batch is worked on, the parts behind it keep their leases too; the batch is cancelled
    when all its tasks are lost, and a part that is lost is not begun."""
    begun: list[str] = []

    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake, lease_seconds=2)
        release = asyncio.Event()

        async def wait(tasks: list[Task]) -> list[int]:
            begun.append(tasks[0].command)
            await release.wait()
            return [1] * len(tasks)

        for command in "abc":
            worker.batch(command)(wait)
        running = spawn(worker.run())
        peer = await fake.worker()
        await peer.heard()
        message = mixed(("a", 1), ("b", 2), ("a", 3), ("b", 4), ("c", 5))
        for task in message["task_batch"]["tasks"]:
            task |= {"lease_until": wire_task(1, lease_seconds=2)["lease_until"]}
        await peer.say(**message)
        beats = [(await peer.heard()).heartbeat.task_id for _ in range(5)]
        assert beats == [task_id(n) for n in (1, 3, 2, 4, 5)]
        for number in (5, 1, 3):  # when b has begun, the word of c has come too
            lost = {"task_id": task_id(number), "ok": False, "error_message": "not-owner"}
            await peer.say(heartbeat_ack=lost)
        while begun != ["a", "b"]:
            await asyncio.sleep(0)
        release.set()
        assert (await outcomes(peer, 2)).keys() == {task_id(2), task_id(4)}
        worker.stop()
        await ended(running, peer)
        assert begun == ["a", "b"]

    play(scenario)


def test_who_handles_what_must_be_clear() -> None:
    async def scenario(fake: FakeStreams) -> None:
        with pytest.raises(ValueError, match=r"no handler: decorate one with @worker\.task"):
            await a_worker(fake, commands=["a"]).run()
        worker = a_worker(fake, commands=["a", "b", "c"])
        worker.task("a")(lambda task: 1)
        with pytest.raises(ValueError, match="two handlers of 'a'"):
            worker.batch("a")(lambda tasks: [1])
        with pytest.raises(ValueError, match="a handler needs a command"):
            worker.task("  ")(lambda task: 1)
        with pytest.raises(ValueError, match=r"a payload of raw bytes is task\.payload"):
            worker.task("d", type=bytes)
        with pytest.raises(ValueError, match="no handler of 'b', 'c'"):
            await worker.run()
        with pytest.raises(ValueError, match="decorated or one is given to run, not both"):
            await worker.run(lambda task: 1)
        with pytest.raises(ValueError, match="decorated or one is given to run, not both"):
            await worker.run_batches(lambda tasks: [1])

    play(scenario)


@pytest.mark.parametrize("times", [1, 2])
def test_signals_finish_and_a_second_one_gives_back(times: int) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def scenario(fake: FakeStreams) -> None:
        worker = a_worker(fake)
        release = asyncio.Event()
        begun = asyncio.Event()

        @worker.task("a")
        async def handle(task: Task) -> int:
            begun.set()
            await release.wait()
            return 1

        running = spawn(worker.run(signals=True))
        peer = await fake.worker()
        await peer.heard()
        await peer.say(**mixed(("a", 1), ("a", 2)))
        await begun.wait()
        for number in (signal.SIGTERM, signal.SIGINT)[:times]:
            signal.raise_signal(number)
        if times == 1:
            while not worker._stopping:
                await asyncio.sleep(0)
            release.set()
        found = await outcomes(peer, 2)
        finished = ("COMPLETED", b"1", "")
        assert list(found.values()) == [finished if times == 1 else "ABANDON"] * 2
        await ended(running, peer)

    play(scenario)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_third_signal_does_what_it_did_before() -> None:
    told: list[bool] = []
    before: list[int] = []
    theirs = signal.signal(signal.SIGTERM, lambda number, frame: before.append(number))
    try:
        with stopping(told.append):
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, theirs)
    assert (told, before) == ([False, True], [signal.SIGTERM])


def test_signals_are_for_the_main_thread() -> None:
    async def scenario() -> None:
        worker = Worker("127.0.0.1:1", token="t")
        with pytest.raises(ValueError, match="signals reach the main thread only"):
            await worker.run(lambda task: 1, signals=True)

    async def elsewhere() -> None:
        await asyncio.to_thread(asyncio.run, scenario())

    asyncio.run(elsewhere())
