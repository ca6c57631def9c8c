"""A real server under load, killed with -9 at random moments and compared with its promises.

    python -m tests.crash --rounds 50 --seed 7

Each round starts ``codeq serve`` on the same folder, checks everything it acknowledged in earlier
rounds, loads it over both streams and over REST, and kills it as soon as a random number of further
acknowledgements has come, while creates are in flight. The last round drains the queue. This shows
what a killed process keeps; what a machine without power keeps needs a store that forgets what was
never synced, and is not shown here.
"""

from __future__ import annotations

import argparse
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
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from codeq.engine import _wire
from tests.ledger import Entry, Ledger

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "DEFAULT_LEASE_SECONDS": "2",
    "LEASE_GRACE_SECONDS": "1",
    "MAX_ATTEMPTS_DEFAULT": "1000",
    "BACKOFF_POLICY": "fixed",
    "BACKOFF_BASE_SECONDS": "1",
    "LIMITS_DISK_RESERVE_BYTES": "0",
    "LOG_LEVEL": "warn",
}
COMMAND = "crash"
LEASE_SECONDS = 2
MESSAGE_BYTES_MAX = 4 << 20
FAULT_POINTS = ("before-write", "after-write", "after-sync", "before-ack")
START_SECONDS = 30
DRAIN_SECONDS = 60


class Server:
    """One run of ``codeq serve --dev`` on ``folder``, on ports the system picks."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        arguments = ["serve", "--dev", "--data", str(folder / "data"), "--http", "127.0.0.1:0"]
        arguments += ["--producer-stream", "127.0.0.1:0", "--worker-stream", "127.0.0.1:0"]
        self.log = (folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "codeq", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=ROOT,
            env={**os.environ, **settings},
        )
        self.address: dict[str, str] = {}

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

    def payload(self, entry: Entry) -> bytes:
        fill = "x" * self.random.randrange(300)
        return json.dumps({"number": entry.number, "fill": fill}).encode()


@contextlib.contextmanager
def stream(address: str, method: str) -> Iterator[tuple[queue.SimpleQueue[bytes | None], Any]]:
    """An open stream: a queue of messages to send (None half-closes) and the answers."""
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(method)(iter(outgoing.get, None))
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
            entry = self.ledger.new_create(keyed=self.random.random() < 0.5)
            self.add(creates, entry)
        for message in _wire.encode_creates(creates, MESSAGE_BYTES_MAX):
            outgoing.put(message)
        return len(creates)

    def add(self, creates: _wire.Creates, entry: Entry) -> None:
        payload = self.payload(entry) if not entry.key else b'{"number": %d}' % entry.number
        creates.add(COMMAND.encode(), payload, key=entry.key.encode(), seq=entry.number)


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
    """Claims in batches, finishes most tasks, fails some, gives some back."""

    READY_COUNT = 50

    def work(self) -> None:
        address = self.server.address["worker"]
        with stream(address, "/workerpb.WorkerStream/Stream") as (outgoing, answers):
            outgoing.put(_wire.encode_worker_hello("dev-worker", f"stream-{self.ident}"))
            ready = _wire.encode_ready([COMMAND.encode()], LEASE_SECONDS, self.READY_COUNT)
            outgoing.put(ready)
            for message in answers:
                kind, body = _wire.decode_worker_server_event(message)
                if kind == _wire.TASKS:
                    assert isinstance(body, _wire.Tasks)
                    self.answer(body, outgoing)
                    outgoing.put(ready)
                elif kind == _wire.RESULT_ACKS:
                    assert isinstance(body, list)
                    for task_id, ok, _ in body:
                        self.ledger.answered(task_id, ok)
                self.ledger.progress()
                if self.stopping.is_set():
                    return

    def answer(self, tasks: _wire.Tasks, outgoing: queue.SimpleQueue[bytes | None]) -> None:
        finishes = _wire.Finishes()
        for index in range(len(tasks)):
            task = tasks[index]
            number = json.loads(task.payload)["number"]
            self.ledger.delivered(number, task.id, task.attempts, task.lease_until)
            if self.random.random() < 0.05:
                self.ledger.given_back(number)
                outgoing.put(_wire.encode_abandon(task.id))
                continue
            status, text = self.verdict(number)
            self.ledger.sending_result(number, status, text)
            if status == "COMPLETED":
                finishes.add(task.id.encode(), b"COMPLETED", result=text.encode())
            else:
                finishes.add(task.id.encode(), b"FAILED", error=text.encode())
        if len(finishes):
            for message in _wire.encode_results(finishes, MESSAGE_BYTES_MAX):
                outgoing.put(message)

    def verdict(self, number: int) -> tuple[str, str]:
        nonce = self.random.getrandbits(32)
        if self.random.random() < 0.1:
            return "FAILED", f"create {number} failed with {nonce}"
        return "COMPLETED", f'{{"number": {number}, "nonce": {nonce}}}'


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


class RestLife(Load):
    """Creates, claims and finishes over REST, one request at a time."""

    def work(self) -> None:
        producer, worker = Rest(self.server, "dev-producer"), Rest(self.server, "dev-worker")
        try:
            while not self.stopping.is_set():
                self.create(producer)
                self.claim_and_finish(worker)
        finally:
            producer.close()
            worker.close()

    def create(self, rest: Rest) -> None:
        entries = [self.ledger.new_create(keyed=False) for _ in range(5)]
        tasks = [{"command": COMMAND, "payload": {"number": entry.number}} for entry in entries]
        status, answer = rest.call("POST", "/tasks/batch", tasks)
        assert status == 200, answer
        for entry, item in zip(entries, answer, strict=True):
            self.ledger.created(entry.number, item["task"]["id"])

    def claim_and_finish(self, rest: Rest) -> None:
        claim = {"commands": [COMMAND], "leaseSeconds": LEASE_SECONDS, "count": 10}
        status, answer = rest.call("POST", "/tasks/claim/batch", claim)
        if status == 204:
            return
        assert status == 200, answer
        results = []
        for task in answer["tasks"]:
            number = json.loads(task["payload"])["number"]
            self.ledger.delivered(number, task["id"], task["attempts"], task["leaseUntil"])
            text = f'{{"number": {number}, "nonce": {self.random.getrandbits(32)}}}'
            self.ledger.sending_result(number, "COMPLETED", text)
            result = {"taskId": task["id"], "status": "COMPLETED", "result": json.loads(text)}
            results.append(result)
        status, answer = rest.call("POST", "/tasks/batch/results", {"results": results})
        assert status == 200, answer
        for item in answer["results"]:
            self.ledger.answered(item["taskId"], "result" in item)
        self.ledger.progress()


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
    ended = task["status"] in ("COMPLETED", "FAILED")
    assert ended or entry.result is None, f"{entry} has a result and runs again: {task}"
    assert not ended or entry.result or entry.result_sent, f"{entry} ended by itself: {task}"


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


class Crash:
    """The rounds on one folder with one ledger."""

    def __init__(self, folder: Path, seed: int, settings: dict[str, str] = SETTINGS) -> None:
        self.folder, self.random, self.settings = folder, random.Random(seed), settings
        self.ledger = Ledger()
        self.in_flight = 0  # creates that were in flight at a kill, over all rounds

    def round(self) -> str:
        """Start, check, load, kill. Returns a line that says what happened."""
        if self.random.random() < 0.3:
            self.kill_during_start()
        touched = self.ledger.take_touched()
        fault = self.pick_fault(len(touched))
        server = self.start(fault)
        check(server, touched)
        first, begun = self.ledger.creates, self.ledger.acknowledgements
        loads = self.load(server, StreamProducer, StreamWorker, StreamWorker, RestLife)
        if fault:
            assert server.process.wait(60) == -signal.SIGKILL, self.log()
            server.close()
        else:
            self.kill_after(server, 1 + self.random.choice((0, 100, 500, 2000)))
        for load in loads:
            load.stopping.set()
        self.ledger.progress()
        self.join(loads)
        in_flight = self.ledger.in_flight(first)
        self.in_flight += in_flight
        return (
            f"killed {fault or 'from outside'} after {self.ledger.acknowledgements - begun} "
            f"acknowledgements with {in_flight} creates in flight "
            f"and {self.ledger.unfinished()} tasks unfinished"
        )

    def drain(self) -> str:
        """The last round: retry what has a key, work everything off, check everything, stop."""
        server = self.start()
        check(server, self.ledger.take_touched())
        lost = [entry for entry in self.ledger.entries.values() if entry.task_id is None]
        retry = Retry(server, self.ledger, [entry for entry in lost if entry.key])
        retry.start()
        self.join([retry])
        workers = self.load(server, StreamWorker, StreamWorker)
        drained = self.ledger.wait_for(
            lambda: self.ledger.unfinished() == 0 and live(server) == 0, DRAIN_SECONDS
        )
        assert drained, f"{self.ledger.unfinished()} unfinished, {live(server)} live tasks"
        check(server, self.ledger.take_touched())
        entries = list(self.ledger.entries.values())
        check(server, self.random.sample(entries, min(1000, len(entries))))
        assert server.stop(signal.SIGTERM) == 0, self.log()
        self.join(workers)
        return f"{len(self.ledger.numbers)} tasks, {self.ledger.deliveries} deliveries"

    def pick_fault(self, reads: int) -> str:
        """A fault point at which the server kills itself, or "" for a kill from outside.

        The ``reads`` answers of the check pass the last point too, twice at most."""
        if self.random.random() < 0.5:
            return ""
        point = self.random.choice(FAULT_POINTS if reads < 500 else FAULT_POINTS[:-1])
        passed = 2 * reads if point == FAULT_POINTS[-1] else 0
        return f"{point}:{passed + self.random.randrange(10, 100)}"

    def kill_after(self, server: Server, count: int) -> None:
        goal = self.ledger.acknowledgements + count
        reached = self.ledger.wait_for(lambda: self.ledger.acknowledgements >= goal, 30)
        server.stop(signal.SIGKILL)
        assert reached, f"less than {count} acknowledgements in 30 s\n{self.log()}"

    def start(self, fault: str = "") -> Server:
        server = Server(self.folder, {**self.settings, "CODEQ_FAULT": fault})
        if not server.wait_ready():
            server.stop(signal.SIGKILL)
            raise AssertionError(f"no ready line\n{self.log()}")
        return server

    def kill_during_start(self) -> None:
        """At a chunk that recovery reads, or some time after the start of the process."""
        fault = self.random.choice(("", f"recovery:{self.random.randrange(1, 50)}"))
        server = Server(self.folder, {**self.settings, "CODEQ_FAULT": fault})
        server.wait_ready(self.random.uniform(0.2, 1.5))
        server.stop(signal.SIGKILL)

    def load(self, server: Server, *kinds: type[Load]) -> list[Load]:
        loads = [kind(server, self.ledger, self.random.getrandbits(32)) for kind in kinds]
        for load in loads:
            load.start()
        return loads

    def join(self, loads: Sequence[Load]) -> None:
        for load in loads:
            load.join(30)
            assert not load.is_alive(), f"{load} hangs"
            if load.fault is not None:
                raise load.fault
        assert not self.ledger.violations, "\n".join(self.ledger.violations[:20])

    def log(self) -> str:
        return (self.folder / "server.log").read_text()[-4000:]


def live(server: Server) -> int:
    """Live tasks of the queue, as its statistics say."""
    rest = Rest(server, "dev-producer")
    try:
        status, stats = rest.call("GET", f"/admin/queues/{COMMAND}")
        assert status == 200 and stats["dlq"] == 0, stats
        return int(stats["ready"] + stats["delayed"] + stats["inProgress"])
    finally:
        rest.close()


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    print(f"{given.rounds} rounds with seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="codeq-crash-") as folder:
        crash = Crash(Path(folder), given.seed)
        for number in range(1, given.rounds + 1):
            print(f"{number}: {crash.round()}", flush=True)
        print(f"drained: {crash.drain()}; nothing acknowledged was lost", flush=True)


if __name__ == "__main__":
    main()
