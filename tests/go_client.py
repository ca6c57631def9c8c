"""A client with the habits of the one in Go whose users must be able to stay.

One thread blocks on reading; whatever it cannot hand over at once keeps it from reading on. It
takes messages up to 4 MiB and no more. A slot sends its next Ready only after a message came for
the last. ``faults`` lists what would have hung or broken that client.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from tests.protos import producerpb, workerpb

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
#: The Go client waits without limit; a test must not.
PATIENCE_SECONDS = 60


class StreamEnded(Exception):
    """The stream is over: what was waiting will not be answered."""


class GoStream:
    """One call: sends from any thread, one reader, half-close then cancel."""

    def __init__(self, address: str, method: str, event: Any, server_event: Any) -> None:
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._half_closed = threading.Event()
        self._call = self._channel.stream_stream(
            method,
            request_serializer=event.SerializeToString,
            response_deserializer=server_event.FromString,
        )(self._events())

    def _events(self) -> Iterator[Any]:
        while (event := self._out.get()) is not None:
            yield event
        self._half_closed.set()

    def send(self, event: Any) -> None:
        self._out.put(event)

    def receive(self) -> Any:
        """The next message; StreamEnded at the end, which names the status."""
        try:
            return next(self._call)
        except StopIteration:
            raise StreamEnded("clean end") from None
        except grpc.RpcError as status:
            raise StreamEnded(str(status.code())) from status

    def greet(self, hello: Any) -> Any:
        """Sends Hello; returns the HelloAck, which must be the first message."""
        self.send(hello)
        try:
            first = self.receive()
        except StreamEnded:
            self.close_channel()
            raise
        assert first.WhichOneof("event") == "hello_ack", first
        return first.hello_ack

    def half_close(self) -> None:
        self._out.put(None)
        self._half_closed.wait(PATIENCE_SECONDS)

    def cancel(self) -> None:
        self._out.put(None)
        self._call.cancel()

    def close_channel(self) -> None:
        self._channel.close()


class GoProducer:
    """Produce from many threads over one stream; seq counts 1, 2, 3, ..."""

    def __init__(self, address: str, token: str) -> None:
        self.faults: list[str] = []
        self.errors: list[tuple[str, str]] = []
        self.ended: str | None = None
        self._lock = threading.Lock()
        self._seq = 0
        self._waiting: dict[int, queue.SimpleQueue[Any]] = {}
        self._stream = GoStream(
            address,
            "/producerpb.ProducerStream/Stream",
            producerpb.ProducerEvent,
            producerpb.ServerEvent,
        )
        hello = producerpb.ProducerEvent(hello=producerpb.Hello(token=token))
        self.tenant = self._stream.greet(hello).tenant_id
        self._reader = threading.Thread(target=self._read, name="go-producer")
        self._reader.start()

    def produce(self, command: str, payload: bytes, **fields: Any) -> Any:
        """The ack of one create; StreamEnded when the stream ended first."""
        (seq,), (waiter,) = self._register(1)
        task = producerpb.CreateTask(seq=seq, command=command, payload=payload, **fields)
        self._stream.send(producerpb.ProducerEvent(create=task))
        return self._wait(waiter)

    def produce_batch(self, tasks: list[dict[str, Any]]) -> list[Any]:
        """The acks of one batch, in its order."""
        seqs, waiters = self._register(len(tasks))
        numbered = [
            producerpb.CreateTask(seq=seq, **task) for seq, task in zip(seqs, tasks, strict=True)
        ]
        batch = producerpb.CreateTaskBatch(tasks=numbered)
        self._stream.send(producerpb.ProducerEvent(create_batch=batch))
        return [self._wait(waiter) for waiter in waiters]

    def close(self) -> None:
        """Half-close and cancel in one go, as the Go client does; open Produces fail."""
        self._stream.half_close()
        self._stream.cancel()
        self.join()

    def join(self) -> None:
        self._reader.join(PATIENCE_SECONDS)
        assert not self._reader.is_alive()
        self._stream.close_channel()

    def _register(self, count: int) -> tuple[list[int], list[queue.SimpleQueue[Any]]]:
        waiters: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(count)]
        with self._lock:
            if self.ended is not None:
                raise StreamEnded(self.ended)
            seqs = [self._seq + 1 + i for i in range(count)]
            self._seq += count
            self._waiting.update(zip(seqs, waiters, strict=True))
        return seqs, waiters

    def _wait(self, waiter: queue.SimpleQueue[Any]) -> Any:
        answer = waiter.get(timeout=PATIENCE_SECONDS)
        if answer is None:
            raise StreamEnded(self.ended)
        return answer

    def _read(self) -> None:
        try:
            while True:
                self._dispatch(self._stream.receive())
        except StreamEnded as end:
            with self._lock:
                self.ended = str(end)
                waiting, self._waiting = self._waiting, {}
            for waiter in waiting.values():
                waiter.put(None)

    def _dispatch(self, event: Any) -> None:
        kind = event.WhichOneof("event")
        if kind == "create_ack":
            self._acknowledge(event.create_ack)
        elif kind == "create_ack_batch":
            for ack in event.create_ack_batch.acks:
                self._acknowledge(ack)
        elif kind == "error":
            self.errors.append((event.error.code, event.error.message))
        else:
            self.faults.append(f"unexpected {kind}")

    def _acknowledge(self, ack: Any) -> None:
        with self._lock:
            waiter = self._waiting.pop(ack.seq, None)
        if waiter is None:
            self.faults.append(f"an ack nobody waits for: seq {ack.seq}")
        else:
            waiter.put(ack)


class GoWorker:
    """Slots that each send a Ready, wait for a message, handle its tasks and answer.

    ``handler(task)`` returns a Result or Nack or Abandon message for the task.
    """

    def __init__(
        self,
        address: str,
        token: str,
        handler: Callable[[Any], Any],
        *,
        commands: tuple[str, ...] = (),
        worker_id: str = "",
        concurrency: int = 1,
        batch_size: int = 0,
        lease_seconds: int = 0,
    ) -> None:
        self.faults: list[str] = []
        self.errors: list[tuple[str, str]] = []
        self.messages = 0
        self.refused: list[str] = []
        self.acks = 0
        self.acked = threading.Condition()
        self.ended: str | None = None
        self._handler = handler
        self._batch_size = batch_size
        self._ready = workerpb.Ready(
            commands=commands, lease_seconds=lease_seconds, count=max(1, batch_size)
        )
        self._lock = threading.Lock()
        self._open_readys = 0
        self._stopping = threading.Event()
        # No room in between: a message that no slot takes blocks the reader.
        self._handover: queue.Queue[list[Any]] = queue.Queue(maxsize=1)
        self._stream = GoStream(
            address, "/workerpb.WorkerStream/Stream", workerpb.WorkerEvent, workerpb.ServerEvent
        )
        hello = workerpb.WorkerEvent(hello=workerpb.Hello(token=token, worker_id=worker_id))
        self.worker_id = self._stream.greet(hello).worker_id
        self._threads = [threading.Thread(target=self._read, name="go-worker")]
        self._threads += [
            threading.Thread(target=self._slot, name=f"go-slot-{number}")
            for number in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def wait_for_acks(self, count: int) -> None:
        """Until so many acknowledgements of results, nacks and abandons have come."""
        with self.acked:
            done = self.acked.wait_for(
                lambda: self.acks >= count or self.ended is not None, PATIENCE_SECONDS
            )
        assert done and self.acks >= count, (self.acks, count, self.ended, self.faults)

    def stop(self) -> None:
        self._stopping.set()
        self._stream.half_close()
        self._stream.cancel()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), thread.name
        self._stream.close_channel()

    def _slot(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                self._open_readys += 1
            self._stream.send(workerpb.WorkerEvent(ready=self._ready))
            tasks = self._next()
            if tasks is None:
                return
            self._answer(tasks)

    def _next(self) -> list[Any] | None:
        while True:
            try:
                return self._handover.get(timeout=0.05)
            except queue.Empty:
                if self._stopping.is_set() or self.ended is not None:
                    return None

    def _answer(self, tasks: list[Any]) -> None:
        answers = [self._handler(task) for task in tasks]
        results = [answer for answer in answers if isinstance(answer, workerpb.Result)]
        if len(tasks) > 1 and results:
            batch = workerpb.ResultBatch(results=results)
            self._stream.send(workerpb.WorkerEvent(result_batch=batch))
        elif results:
            self._stream.send(workerpb.WorkerEvent(result=results[0]))
        for answer in answers:
            if isinstance(answer, workerpb.Nack):
                self._stream.send(workerpb.WorkerEvent(nack=answer))
            elif isinstance(answer, workerpb.Abandon):
                self._stream.send(workerpb.WorkerEvent(abandon=answer))

    def _read(self) -> None:
        try:
            while True:
                self._dispatch(self._stream.receive())
        except StreamEnded as end:
            with self.acked:
                self.ended = str(end)
                self.acked.notify_all()

    def _dispatch(self, event: Any) -> None:
        kind = event.WhichOneof("event")
        if kind == "task":
            self._assign([event.task.task], single=True)
        elif kind == "task_batch":
            self._assign(list(event.task_batch.tasks), single=False)
        elif kind == "error":
            self.errors.append((event.error.code, event.error.message))
        elif kind == "result_ack_batch":
            self._count(list(event.result_ack_batch.acks))
        elif kind in ("result_ack", "nack_ack", "abandon_ack"):
            self._count([getattr(event, kind)])
        else:
            self.faults.append(f"unexpected {kind}")

    def _assign(self, tasks: list[Any], *, single: bool) -> None:
        with self._lock:
            self.messages += 1
            self._open_readys -= 1
            surplus = self._open_readys < 0
        if surplus:
            self.faults.append("more messages than Readys: the reader is blocked")
        if not tasks:
            self.faults.append("an empty TaskBatch")
        if single != (self._batch_size <= 1) or len(tasks) > max(1, self._batch_size):
            self.faults.append(f"{len(tasks)} tasks for a Ready of {self._batch_size}")
        while not self._stopping.is_set():
            try:
                self._handover.put(tasks, timeout=0.05)
                return
            except queue.Full:
                continue

    def _count(self, acks: list[Any]) -> None:
        with self.acked:
            self.acks += len(acks)
            self.refused += [ack.error_message for ack in acks if not ack.ok]
            self.acked.notify_all()
