"""Clients that load a server, each noting in the ledger what it saw."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import random
import threading
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import grpc

from codeq.engine import _wire
from tests.crash_server import START_SECONDS, Server
from tests.ledger import Entry, Ledger

#: The queues, in the order in which every worker names them
COMMANDS = ("crash", "crash/später : nochmal")
LEASE_SECONDS = 2
MESSAGE_BYTES_MAX = 4 << 20
PRIORITIES = (-5, 0, 0, 0, 0, 7, 2_000_000_000)
REST_REFUSALS = (403, 409)  # the lease was over


class Load(threading.Thread):
    """A client that works until it is told to stop or its server is gone."""

    def __init__(self, server: Server, ledger: Ledger, seed: int, worker: str = "") -> None:
        super().__init__(daemon=True)
        self.server, self.ledger, self.worker = server, ledger, worker
        self.random = random.Random(seed)
        self.stopping = threading.Event()
        self.fault: Exception | None = None

    def run(self) -> None:
        try:
            self.work()
        except (grpc.RpcError, OSError, http.client.HTTPException):
            pass  # the server was killed; what it owes is in the ledger
        except Exception as fault:
            self.fault = fault  # raised by the round, not lost in a thread

    def work(self) -> None:
        raise NotImplementedError

    def new_create(self, *, keyed: float = 0.5) -> Entry:
        """``keyed`` is the part of the creates that have a key."""
        dice = self.random
        fate = dice.random()
        return self.ledger.new_create(
            dice.choices(COMMANDS, (4, 1))[0],
            keyed=dice.random() < keyed,
            priority=dice.choice(PRIORITIES),
            delay_seconds=1 if fate < 0.03 else 0,
            run_in_ms=dice.randrange(1, 700) if 0.03 < fate < 0.08 else 0,
            max_attempts=dice.randint(1, 2) if 0.08 < fate < 0.13 else 0,
        )

    def delivered(self, tasks: Iterable[tuple[str, int, str, int, str]]) -> list[Entry]:
        """Notes the tasks of one claim: payload, priority, id, attempts, end of the lease."""
        entries, places = [], []
        for payload, priority, task_id, attempts, lease_until in tasks:
            until = datetime.fromisoformat(lease_until).timestamp()
            number = json.loads(payload)["number"]
            entry = self.ledger.delivered(number, task_id, attempts, until, self.worker)
            assert priority == entry.priority, (priority, entry)
            entries.append(entry)
            places.append(place_of(entry, task_id))
        self.ledger.in_order(places)
        return entries


def place_of(entry: Entry, task_id: str) -> tuple[int, int, str]:
    """Where the task stands in the order of a claim that names COMMANDS."""
    return COMMANDS.index(entry.command), -entry.priority, task_id


def payload(entry: Entry) -> bytes:
    """The same for each sending of one create; of various length."""
    return json.dumps({"number": entry.number, "fill": "x" * (entry.number * 37 % 300)}).encode()


@contextlib.contextmanager
def stream(address: str, method: str) -> Iterator[tuple[queue.SimpleQueue[bytes | None], Any]]:
    """An open stream: a queue of messages to send (None half-closes) and the answers."""
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(address) as channel:
        messages: Any = iter(outgoing.get, None)
        call: Any = channel.stream_stream(method)(messages)
        try:
            yield outgoing, call
        finally:
            outgoing.put(None)
            call.cancel()


class StreamProducer(Load):
    """Keeps a few batches of creates in flight; half of the creates carry a key."""

    BATCHES_IN_FLIGHT = 3
    BATCH_COUNT = 100
    BACKLOG_MAX = 1500

    def work(self) -> None:
        address = self.server.address["producer"]
        with stream(address, "/producerpb.ProducerStream/Stream") as (outgoing, answers):
            self.outgoing = outgoing
            outgoing.put(_wire.encode_producer_hello("dev-producer"))
            unanswered = 0
            for message in answers:
                unanswered -= self.acknowledged(message)
                if unanswered == 0:
                    self.ledger.wait_for(self.may_go_on, START_SECONDS)
                while unanswered < self.BATCHES_IN_FLIGHT * self.BATCH_COUNT and self.may_go_on():
                    if self.stopping.is_set():
                        break
                    unanswered += self.send_next()
                if self.stopping.is_set() and unanswered == 0:
                    return

    def acknowledged(self, message: bytes) -> int:
        """How many creates this message answers."""
        kind, acks = _wire.decode_producer_server_event(message)
        if kind != _wire.CREATE_ACKS:
            return 0
        assert isinstance(acks, list)
        for number, ok, task_id, error in acks:
            assert ok, f"create refused: {error}"
            self.ledger.created(number, task_id)
        self.ledger.progress()
        return len(acks)

    def may_go_on(self) -> bool:
        return self.ledger.backlog < self.BACKLOG_MAX or self.stopping.is_set()

    def send_next(self) -> int:
        return self.send([self.new_create() for _ in range(self.BATCH_COUNT)])

    def send(self, entries: list[Entry]) -> int:
        creates = _wire.Creates()
        for entry in entries:
            creates.add(
                entry.command.encode(),
                payload(entry),
                key=entry.key.encode(),
                seq=entry.number,
                priority=entry.priority,
                delay_seconds=entry.delay_seconds,
                run_at_ms=entry.run_at_ms,
                max_attempts=entry.max_attempts,
            )
        for message in _wire.encode_creates(creates, MESSAGE_BYTES_MAX):
            self.outgoing.put(message)
        return len(creates)


class SingleProducer(StreamProducer):
    """Sends creates one by one, many at once; some with the key of an earlier one again."""

    BATCHES_IN_FLIGHT = 16
    BATCH_COUNT = 1

    def work(self) -> None:
        self.old: list[Entry] = []
        super().work()

    def send_next(self) -> int:
        entry = self.new_create(keyed=0.8)
        if entry.key:
            self.old = [*self.old[-50:], entry]
        sent = self.send([entry])
        if self.random.random() < 0.1 and self.old:
            sent += self.send([self.random.choice(self.old)])
        return sent


class Retry(StreamProducer):
    """Sends creates with a key again: no second task may come of them."""

    def __init__(self, server: Server, ledger: Ledger, entries: list[Entry]) -> None:
        super().__init__(server, ledger, 0)
        self.entries = entries

    def may_go_on(self) -> bool:
        return True

    def send_next(self) -> int:
        self.stopping.set()
        return self.send(self.entries) if self.entries else 0


class StreamWorker(Load):
    """Claims in batches, finishes most tasks, nacks, abandons, extends or forgets the others.

    ``asked`` holds by task what was sent and not answered: entry, its delivery, when.
    """

    READY_COUNT = 150
    READYS = 2

    def work(self) -> None:
        self.asked: dict[str, tuple[Entry, int, float]] = {}
        address = self.server.address["worker"]
        with stream(address, "/workerpb.WorkerStream/Stream") as (outgoing, answers):
            self.outgoing = outgoing
            outgoing.put(_wire.encode_worker_hello("dev-worker", self.worker))
            self.finish(self.ledger.unanswered(self.worker))
            for _ in range(self.READYS):
                self.ready()
            for message in answers:
                kind, body = _wire.decode_worker_server_event(message)
                if kind == _wire.TASKS:
                    assert isinstance(body, _wire.Tasks)
                    self.answer(body)
                    self.ready()
                else:
                    self.acknowledged(kind, body)
                self.ledger.progress()
                if self.stopping.is_set():
                    return

    def ready(self) -> None:
        commands = [command.encode() for command in COMMANDS]
        lease_seconds = self.random.randint(1, LEASE_SECONDS)
        count = self.random.choice((1, self.READY_COUNT, self.READY_COUNT, self.READY_COUNT))
        self.outgoing.put(_wire.encode_ready(commands, lease_seconds, count))

    def acknowledged(self, kind: int, body: Any) -> None:
        if kind == _wire.RESULT_ACKS:
            for task_id, ok, _ in body:
                self.ledger.answered(task_id, self.worker, ok)
            return
        if kind not in (_wire.HEARTBEAT_ACK, _wire.NACK_ACK, _wire.ABANDON_ACK):
            return
        entry, delivery, sent_at = self.asked.pop(body[0])
        ok = body[1]
        if kind == _wire.ABANDON_ACK:
            self.ledger.abandoned(entry, delivery, ok)
        elif kind == _wire.NACK_ACK and ok:
            _, _, _, delay_seconds, dead = body
            self.ledger.was_nacked(entry, delivery, sent_at, delay_seconds, dead)
        elif kind == _wire.HEARTBEAT_ACK and ok:
            self.ledger.extended(entry, delivery, sent_at + LEASE_SECONDS)
            self.finish([entry])

    def answer(self, tasks: _wire.Tasks) -> None:
        views = [tasks[index] for index in range(len(tasks))]
        entries = self.delivered(
            (v.payload.decode(), v.priority, v.id, v.attempts, v.lease_until) for v in views
        )
        done = []
        for entry in entries:
            fate = self.random.random()
            if fate < 0.10 and entry.task_id not in self.asked:
                self.give_back_or_extend(entry, fate)
            elif fate > 0.11:  # the others are forgotten: their leases run out
                done.append(entry)
        self.finish(done)

    def give_back_or_extend(self, entry: Entry, fate: float) -> None:
        task_id = entry.task_id or ""
        sent_at = 0.0
        if fate < 0.03:
            self.ledger.abandoning(entry)
            message = _wire.encode_abandon(task_id)
        elif fate < 0.07:
            delay_seconds = 1 if fate < 0.05 else None
            sent_at = self.ledger.nacking(entry, delay_seconds)
            message = _wire.encode_nack(task_id, delay_seconds or 0, "not now")
        else:
            sent_at = self.ledger.extending(entry, LEASE_SECONDS)
            message = _wire.encode_heartbeat(task_id, LEASE_SECONDS)
        self.asked[task_id] = (entry, entry.deliveries, sent_at)
        self.outgoing.put(message)

    def finish(self, entries: list[Entry]) -> None:
        finishes = _wire.Finishes()
        for entry in entries:
            status, text = self.ledger.finishing(entry, self.worker)
            said = {"result" if status == "COMPLETED" else "error": text.encode()}
            finishes.add((entry.task_id or "").encode(), status.encode(), **said)
        if entries:
            for message in _wire.encode_results(finishes, MESSAGE_BYTES_MAX):
                self.outgoing.put(message)


class Rest:
    """One kept connection to the REST API."""

    def __init__(self, server: Server, token: str) -> None:
        host, _, port = server.address["http"].rpartition(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=30)
        self.headers = {"Authorization": f"Bearer {token}"}

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body)
        self.connection.request(method, f"/v1/codeq{path}", data, self.headers)
        answer = self.connection.getresponse()
        text = answer.read()
        self.retry_after = answer.getheader("Retry-After")
        return answer.status, json.loads(text) if text else None

    def close(self) -> None:
        self.connection.close()


class RestLoad(Load):
    """Works over REST with one connection each for creates and for claims."""

    def work(self) -> None:
        self.producer = Rest(self.server, "dev-producer")
        self.consumer = Rest(self.server, "dev-worker")
        try:
            self.repeat_results(self.ledger.unanswered(self.worker))
            while not self.stopping.is_set():
                self.turn()
                self.ledger.progress()
        finally:
            self.producer.close()
            self.consumer.close()

    def turn(self) -> None:
        raise NotImplementedError

    def body(self, entry: Entry) -> dict[str, Any]:
        said: dict[str, Any] = {
            "command": entry.command,
            "payload": json.loads(payload(entry)),
            "priority": entry.priority,
            "delaySeconds": entry.delay_seconds,
            "maxAttempts": entry.max_attempts,
            "idempotencyKey": entry.key,
        }
        if entry.run_at_ms is not None:
            due = datetime.fromtimestamp(entry.run_at_ms / 1000, UTC)
            said["runAt"] = due.isoformat(timespec="milliseconds")
        return said

    def got(self, tasks: list[dict[str, Any]]) -> list[Entry]:
        return self.delivered(
            (t["payload"], t["priority"], t["id"], t["attempts"], t["leaseUntil"]) for t in tasks
        )

    def claim(self, **more: Any) -> dict[str, Any]:
        return {"commands": COMMANDS, "leaseSeconds": 2, "workerId": self.worker, **more}

    def result(self, entry: Entry) -> dict[str, Any]:
        status, text = self.ledger.finishing(entry, self.worker)
        said = {"result": json.loads(text)} if status == "COMPLETED" else {"error": text}
        return {"taskId": entry.task_id, "status": status, "workerId": self.worker, **said}

    def repeat_results(self, entries: list[Entry]) -> None:
        for entry in entries:
            if self.worker in entry.finishing:  # still
                self.finish(entry)

    def finish(self, entry: Entry) -> None:
        ok, _ = self.say(entry, "result", self.result(entry))
        self.ledger.answered(entry.task_id or "", self.worker, ok)

    def say(self, entry: Entry, call: str, body: dict[str, Any]) -> tuple[bool, Any]:
        """Not ok when the lease was over before, or the task ended and was removed."""
        path = f"/tasks/{entry.task_id}/{call}"
        status, answer = self.consumer.call("POST", path, {"workerId": self.worker, **body})
        gone = status == 404 and self.ledger.may_be_gone(entry)
        assert gone or status in (200, *REST_REFUSALS), (entry, answer)
        return status == 200, answer


class RestLife(RestLoad):
    """Creates, claims and finishes in batches."""

    CREATE_COUNT, CLAIM_COUNT = 50, 100

    def turn(self) -> None:
        entries = [self.new_create() for _ in range(self.CREATE_COUNT)]
        tasks = [self.body(entry) for entry in entries]
        status, answer = self.producer.call("POST", "/tasks/batch", tasks)
        assert status == 200, answer
        for entry, item in zip(entries, answer, strict=True):
            self.ledger.created(entry.number, item["task"]["id"])
        self.claim_and_finish()

    def claim_and_finish(self) -> None:
        claim = self.claim(count=self.CLAIM_COUNT)
        status, answer = self.consumer.call("POST", "/tasks/claim/batch", claim)
        if status == 204:
            return
        assert status == 200, answer
        results = [self.result(entry) for entry in self.got(answer["tasks"])]
        status, answer = self.consumer.call("POST", "/tasks/batch/results", {"results": results})
        assert status == 200, answer
        for item in answer["results"]:
            self.ledger.answered(item["taskId"], self.worker, "result" in item)


class RestSingles(RestLoad):
    """Creates one task, claims one and does with it all that a holder may do."""

    def turn(self) -> None:
        entry = self.new_create()
        repeats = 2 if entry.key and self.random.random() < 0.3 else 1
        for _ in range(repeats):
            status, task = self.producer.call("POST", "/tasks", self.body(entry))
            assert status == 201, task
            self.ledger.created(entry.number, task["id"])
        status, task = self.consumer.call("POST", "/tasks/claim", self.claim(waitSeconds=1))
        if status != 204:
            assert status == 200, task
            [entry] = self.got([task])
            self.answer(entry)

    def answer(self, entry: Entry) -> None:
        delivery, fate = entry.deliveries, self.random.random()
        attempt = {"attempt": entry.attempts}
        if fate < 0.1:
            self.ledger.abandoning(entry)
            ok, _ = self.say(entry, "abandon", attempt)
            self.ledger.abandoned(entry, delivery, ok)
        elif fate < 0.3:
            delay_seconds = self.random.choice((0, 1, None))
            sent_at = self.ledger.nacking(entry, delay_seconds)
            delay = {} if delay_seconds is None else {"delaySeconds": delay_seconds}
            ok, said = self.say(entry, "nack", {**attempt, **delay, "reason": "not now"})
            if ok:
                dead = said["status"] == "dlq"
                self.ledger.was_nacked(entry, delivery, sent_at, said["delaySeconds"], dead)
        else:
            if fate < 0.5:
                sent_at = self.ledger.extending(entry, LEASE_SECONDS)
                ok, _ = self.say(entry, "heartbeat", {**attempt, "extendSeconds": LEASE_SECONDS})
                if ok:
                    self.ledger.extended(entry, delivery, sent_at + LEASE_SECONDS)
            self.finish(entry)


class OrderedWorker(RestLoad):
    """Works off what is ready, all of it by itself; ``order`` is what it got, in that order."""

    def turn(self) -> None:
        self.order: list[tuple[int, int, str]] = []
        while True:
            claim = self.claim(leaseSeconds=60, count=200)
            status, answer = self.consumer.call("POST", "/tasks/claim/batch", claim)
            if status == 204:
                self.stopping.set()
                return
            assert status == 200, answer
            entries = self.got(answer["tasks"])
            self.order += [place_of(entry, entry.task_id or "") for entry in entries]
            results = {"results": [self.result(entry) for entry in entries]}
            _, answer = self.consumer.call("POST", "/tasks/batch/results", results)
            for item in answer["results"]:
                assert "result" in item, item
                self.ledger.answered(item["taskId"], self.worker, True)


LOADS: tuple[type[Load], ...] = (
    StreamProducer,
    SingleProducer,
    StreamWorker,
    StreamWorker,
    RestLife,
    RestSingles,
)


def started(
    server: Server, ledger: Ledger, seeds: random.Random, kinds: Iterable[type[Load]] = LOADS
) -> list[Load]:
    """Clients of these kinds, at work; those in the same place have the same worker id in each
    life."""
    loads = [
        kind(server, ledger, seeds.getrandbits(32), f"{kind.__name__}-{place}")
        for place, kind in enumerate(kinds)
    ]
    for load in loads:
        load.start()
    return loads
