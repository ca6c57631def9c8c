"""A server process and the clients that load it, each noting in the ledger what it saw."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import queue
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from codeq.engine import _wire
from tests.ledger import Entry, Ledger

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "crash"
LEASE_SECONDS = 2
NACK_SECONDS = 1
MESSAGE_BYTES_MAX = 4 << 20
START_SECONDS = 30
PRIORITIES = (-5, 0, 0, 0, 0, 7, 2_000_000_000)


class Server:
    """One run of ``codeq serve --dev`` on ``folder``, on ports the system picks.

    ``module`` is what Python runs: codeq, or something that runs it with other constants.
    """

    def __init__(self, folder: Path, settings: dict[str, str], module: str = "codeq") -> None:
        arguments = ["serve", "--dev", "--data", str(folder / "data"), "--http", "127.0.0.1:0"]
        arguments += ["--producer-stream", "127.0.0.1:0", "--worker-stream", "127.0.0.1:0"]
        self.log = (folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=ROOT,
            env={**os.environ, **settings},
        )
        self.address: dict[str, str] = {}
        atexit.register(self.process.kill)  # when a check failed; does nothing once it has ended

    def wait_ready(self, seconds: float = START_SECONDS) -> bool:
        """Waits for the ready line and reads the addresses from it; False when there is none."""
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], seconds)[0]:
            return False
        line = out.readline().decode()
        self.address = dict(word.split("=", 1) for word in line.split()[1:])
        return line.startswith("ready ")

    def stop(self, by: signal.Signals) -> int:
        """Sends the signal, waits for the end and returns the exit code."""
        self.process.send_signal(by)
        code = self.process.wait(timeout=30)
        self.close()
        return code

    def close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()


class Load(threading.Thread):
    """A client that works until it is told to stop or its server is gone."""

    def __init__(self, server: Server, ledger: Ledger, seed: int) -> None:
        super().__init__(daemon=True)
        self.server, self.ledger = server, ledger
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

    def new_create(self, keyed: bool) -> Entry:
        delay_seconds = 1 if self.random.random() < 0.05 else 0
        priority = self.random.choice(PRIORITIES)
        return self.ledger.new_create(keyed=keyed, priority=priority, delay_seconds=delay_seconds)

    def verdict(self, number: int) -> tuple[str, str]:
        nonce = self.random.getrandbits(32)
        if self.random.random() < 0.1:
            return "FAILED", f"create {number} failed with {nonce}"
        return "COMPLETED", f'{{"number": {number}, "nonce": {nonce}}}'


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

    BATCHES_IN_FLIGHT = 4
    BATCH_COUNT = 40
    BACKLOG_MAX = 2000

    def work(self) -> None:
        address = self.server.address["producer"]
        with stream(address, "/producerpb.ProducerStream/Stream") as (outgoing, answers):
            outgoing.put(_wire.encode_producer_hello("dev-producer"))
            unanswered = 0
            for message in answers:
                kind, acks = _wire.decode_producer_server_event(message)
                if kind == _wire.CREATE_ACKS:
                    assert isinstance(acks, list)
                    unanswered -= len(acks)
                    for number, ok, task_id, error in acks:
                        assert ok, f"create refused: {error}"
                        self.ledger.created(number, task_id)
                    self.ledger.progress()
                if unanswered == 0:
                    self.ledger.wait_for(self.may_go_on, START_SECONDS)
                while unanswered < self.BATCHES_IN_FLIGHT * self.BATCH_COUNT and self.may_go_on():
                    if self.stopping.is_set():
                        break
                    unanswered += self.send(outgoing)
                if self.stopping.is_set() and unanswered == 0:
                    return

    def may_go_on(self) -> bool:
        return self.ledger.backlog < self.BACKLOG_MAX or self.stopping.is_set()

    def send(self, outgoing: queue.SimpleQueue[bytes | None]) -> int:
        creates = _wire.Creates()
        for _ in range(self.BATCH_COUNT):
            self.add(creates, self.new_create(keyed=self.random.random() < 0.5))
        for message in _wire.encode_creates(creates, MESSAGE_BYTES_MAX):
            outgoing.put(message)
        return len(creates)

    def add(self, creates: _wire.Creates, entry: Entry) -> None:
        creates.add(
            COMMAND.encode(),
            payload(entry),
            key=entry.key.encode(),
            seq=entry.number,
            priority=entry.priority,
            delay_seconds=entry.delay_seconds,
        )


class Retry(StreamProducer):
    """Sends keyed creates again that were never acknowledged: no second task may come of them."""

    def __init__(self, server: Server, ledger: Ledger, entries: list[Entry]) -> None:
        super().__init__(server, ledger, 0)
        self.entries = entries

    def may_go_on(self) -> bool:
        return True

    def send(self, outgoing: queue.SimpleQueue[bytes | None]) -> int:
        creates = _wire.Creates()
        for entry in self.entries:
            self.add(creates, entry)
        self.stopping.set()
        if self.entries:
            for message in _wire.encode_creates(creates, MESSAGE_BYTES_MAX):
                outgoing.put(message)
        return len(creates)


class StreamWorker(Load):
    """Claims in batches, finishes most tasks, nacks, abandons, extends or forgets the others."""

    READY_COUNT = 50

    def work(self) -> None:
        address = self.server.address["worker"]
        self.extending: dict[str, tuple[int, int, float]] = {}  # id: number, attempts, sent at
        with stream(address, "/workerpb.WorkerStream/Stream") as (outgoing, answers):
            self.outgoing = outgoing
            outgoing.put(_wire.encode_worker_hello("dev-worker", f"stream-{self.ident}"))
            ready = _wire.encode_ready([COMMAND.encode()], LEASE_SECONDS, self.READY_COUNT)
            outgoing.put(ready)
            for message in answers:
                kind, body = _wire.decode_worker_server_event(message)
                if kind == _wire.TASKS:
                    assert isinstance(body, _wire.Tasks)
                    self.answer(body)
                    outgoing.put(ready)
                else:
                    self.acknowledged(kind, body)
                self.ledger.progress()
                if self.stopping.is_set():
                    return

    def acknowledged(self, kind: int, body: object) -> None:
        if kind == _wire.RESULT_ACKS:
            assert isinstance(body, list)
            for task_id, ok, _ in body:
                self.ledger.answered(task_id, ok)
        elif kind == _wire.HEARTBEAT_ACK:
            assert isinstance(body, tuple)
            task_id, ok, _ = body
            number, attempts, sent = self.extending.pop(task_id)
            if ok:
                self.ledger.extended(task_id, attempts, sent + LEASE_SECONDS)
                finishes = _wire.Finishes()
                self.finish(finishes, number, task_id)
                self.send(finishes)

    def answer(self, tasks: _wire.Tasks) -> None:
        finishes = _wire.Finishes()
        for index in range(len(tasks)):
            task = tasks[index]
            number = json.loads(task.payload)["number"]
            self.ledger.delivered(number, task.id, task.attempts, task.lease_until)
            fate = self.random.random()
            if fate < 0.05:
                self.ledger.abandoning(number)
                self.outgoing.put(_wire.encode_abandon(task.id))
            elif fate < 0.08:
                self.ledger.nacking(number, NACK_SECONDS)
                self.outgoing.put(_wire.encode_nack(task.id, NACK_SECONDS, "not now"))
            elif fate < 0.11:
                self.extending[task.id] = (number, task.attempts, time.time())
                self.outgoing.put(_wire.encode_heartbeat(task.id, LEASE_SECONDS))
            elif fate > 0.02:  # the others are forgotten: their leases run out
                self.finish(finishes, number, task.id)
        self.send(finishes)

    def finish(self, finishes: _wire.Finishes, number: int, task_id: str) -> None:
        status, text = self.verdict(number)
        self.ledger.sending_result(number, status, text)
        if status == "COMPLETED":
            finishes.add(task_id.encode(), b"COMPLETED", result=text.encode())
        else:
            finishes.add(task_id.encode(), b"FAILED", error=text.encode())

    def send(self, finishes: _wire.Finishes) -> None:
        if len(finishes):
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
        return answer.status, json.loads(text) if text else None

    def close(self) -> None:
        self.connection.close()


class RestLoad(Load):
    """Works over REST with one connection each for creates and for claims."""

    def work(self) -> None:
        self.producer = Rest(self.server, "dev-producer")
        self.worker = Rest(self.server, "dev-worker")
        try:
            while not self.stopping.is_set():
                self.turn()
                self.ledger.progress()
        finally:
            self.producer.close()
            self.worker.close()

    def turn(self) -> None:
        raise NotImplementedError

    def body(self, entry: Entry) -> dict[str, Any]:
        body = {"command": COMMAND, "payload": json.loads(payload(entry))}
        if entry.key:
            body["idempotencyKey"] = entry.key
        return {**body, "priority": entry.priority, "delaySeconds": entry.delay_seconds}

    def delivered(self, task: dict[str, Any]) -> int:
        number: int = json.loads(task["payload"])["number"]
        self.ledger.delivered(number, task["id"], task["attempts"], task["leaseUntil"])
        return number

    def result(self, number: int, task_id: str) -> dict[str, Any]:
        status, text = self.verdict(number)
        self.ledger.sending_result(number, status, text)
        said = {"result": json.loads(text)} if status == "COMPLETED" else {"error": text}
        return {"taskId": task_id, "status": status, **said}


class RestLife(RestLoad):
    """Creates, claims and finishes in batches."""

    def turn(self) -> None:
        entries = [self.new_create(keyed=False) for _ in range(5)]
        tasks = [self.body(entry) for entry in entries]
        status, answer = self.producer.call("POST", "/tasks/batch", tasks)
        assert status == 200, answer
        for entry, item in zip(entries, answer, strict=True):
            self.ledger.created(entry.number, item["task"]["id"])
        self.claim_and_finish()

    def claim_and_finish(self) -> None:
        claim = {"commands": [COMMAND], "leaseSeconds": LEASE_SECONDS, "count": 10}
        status, answer = self.worker.call("POST", "/tasks/claim/batch", claim)
        if status == 204:
            return
        assert status == 200, answer
        results = [self.result(self.delivered(task), task["id"]) for task in answer["tasks"]]
        status, answer = self.worker.call("POST", "/tasks/batch/results", {"results": results})
        assert status == 200, answer
        for item in answer["results"]:
            self.ledger.answered(item["taskId"], "result" in item)


class RestSingles(RestLoad):
    """Creates one task, claims one and does with it all that a holder may do."""

    def turn(self) -> None:
        entry = self.new_create(keyed=self.random.random() < 0.5)
        repeats = 2 if entry.key and self.random.random() < 0.3 else 1
        for _ in range(repeats):
            status, task = self.producer.call("POST", "/tasks", self.body(entry))
            assert status == 201, task
            self.ledger.created(entry.number, task["id"])
        claim = {"commands": [COMMAND], "leaseSeconds": LEASE_SECONDS, "waitSeconds": 1}
        status, task = self.worker.call("POST", "/tasks/claim", claim)
        if status != 204:
            assert status == 200, task
            self.answer(task)

    def answer(self, task: dict[str, Any]) -> None:
        number = self.delivered(task)
        path = f"/tasks/{task['id']}"
        fate = self.random.random()
        if fate < 0.1:
            self.ledger.abandoning(number)
            self.say(f"{path}/abandon", {})
        elif fate < 0.3:
            delay_seconds = self.random.randrange(2)
            self.ledger.nacking(number, delay_seconds)
            self.say(f"{path}/nack", {"delaySeconds": delay_seconds, "reason": "not now"})
        else:
            sent = time.time()
            if fate < 0.5 and self.say(f"{path}/heartbeat", {"extendSeconds": LEASE_SECONDS}):
                self.ledger.extended(task["id"], task["attempts"], sent + LEASE_SECONDS)
            ok = self.say(f"{path}/result", self.result(number, task["id"]))
            self.ledger.answered(task["id"], ok)

    def say(self, path: str, body: dict[str, Any]) -> bool:
        """False when the lease was over before."""
        status, answer = self.worker.call("POST", path, body)
        assert status in (200, 403, 409), answer
        return status == 200


class OrderedWorker(RestLoad):
    """Works off what is ready, all of it by itself; ``order`` is what it got, in that order."""

    def turn(self) -> None:
        self.order: list[tuple[int, str]] = []  # priority downwards, id upwards
        claim = {"commands": [COMMAND], "leaseSeconds": 60, "count": 100}
        while True:
            status, answer = self.worker.call("POST", "/tasks/claim/batch", claim)
            if status == 204:
                self.stopping.set()
                return
            assert status == 200, answer
            results = []
            for task in answer["tasks"]:
                number = self.delivered(task)
                assert task["priority"] == self.ledger.entries[number].priority, task
                self.order.append((-task["priority"], task["id"]))
                results.append(self.result(number, task["id"]))
            _, answer = self.worker.call("POST", "/tasks/batch/results", {"results": results})
            for item in answer["results"]:
                assert "result" in item, item
                self.ledger.answered(item["taskId"], True)


def check(server: Server, entries: list[Entry]) -> None:
    """Asks the server for each acknowledged create and result; differences raise AssertionError."""
    rest = Rest(server, "dev-producer")
    try:
        for entry in entries:
            if entry.acknowledged:
                check_task(rest, entry)
            if entry.result is not None:
                check_result(rest, entry, entry.result)
    finally:
        rest.close()


def check_task(rest: Rest, entry: Entry) -> None:
    status, task = rest.call("GET", f"/tasks/{entry.task_id}")
    assert status == 200, f"{entry} was acknowledged and is gone: {task}"
    assert json.loads(task["payload"])["number"] == entry.number, f"{entry} became {task}"
    assert task["priority"] == entry.priority, f"{entry} became {task}"
    ended = task["status"] in ("COMPLETED", "FAILED")
    assert ended or entry.result is None, f"{entry} has a result and runs again: {task}"
    assert not ended or entry.result or entry.result_sent, f"{entry} ended by itself: {task}"
    if entry.result is not None:
        assert task["attempts"] == entry.attempts, f"{entry} has other attempts: {task}"


def check_result(rest: Rest, entry: Entry, expected: tuple[str, str]) -> None:
    code, answer = rest.call("GET", f"/tasks/{entry.task_id}/result")
    assert code == 200, f"{entry} lost its result: {answer}"
    record = answer["result"]
    status, text = expected
    assert record["status"] == status, f"{entry} has another result: {record}"
    if status == "COMPLETED":
        assert record["result"] == json.loads(text), f"{entry} has another result: {record}"
    else:
        assert record["error"] == text, f"{entry} has another error: {record}"


def counts(server: Server) -> tuple[int, int]:
    """Tasks of the queue that are ready, and all its live ones, as its statistics say."""
    rest = Rest(server, "dev-producer")
    try:
        status, stats = rest.call("GET", f"/admin/queues/{COMMAND}")
        assert status == 200 and stats["dlq"] == 0, stats
        return int(stats["ready"]), int(stats["ready"] + stats["delayed"] + stats["inProgress"])
    finally:
        rest.close()
