"""The main job on real input: one task per file, two kill -9 on the way, every result checked.

The workers are processes of their own (``python -m codeq.demo``, told what to do on standard
input). Worker 1 works slowly, so that it can be caught with its hands full.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import signal
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from codeq.client import Fail, NewTask, Producer, Task, Worker
from codeq.client.local import PRODUCER_TOKEN, WORKER_TOKEN, LocalServer, until_told
from codeq.errors import CodeqError

LEASE_SECONDS = 10
BATCH = 200
CREATE_BATCH = 500
READ_BYTES = 1 << 20
#: What is to be shown; a small folder cannot, and says so.
HELD_WANTED = 100
UNFINISHED_WANTED = 1000
#: Worker 1 takes this long for a batch, so that it surely holds leases when it is stopped.
SLOW_BATCH_SECONDS = 5.0
#: It should have its first batch long before.
BATCH_SECONDS = 30.0
LOOK_SECONDS = 0.05
#: Nothing moves for this long: something is wrong. Longer than lease and backoff together.
STALL_SECONDS = 90.0
SERVER_SETTINGS = {
    "BACKOFF_BASE_SECONDS": "1",  # lost leases come back soon
    "LIMITS_DISK_RESERVE_BYTES": str(64 << 20),
    "LOG_LEVEL": "warn",
}


class Answer(msgspec.Struct):
    """What a worker finds out about a file."""

    size: int
    lines: int
    sha256: str


class Order(msgspec.Struct):
    """What a worker process is told, on its standard input."""

    address: str
    token: str
    command: str
    worker_id: str
    lease_seconds: int
    slow: bool


# --- the worker process


async def examine(task: Task) -> Answer | Fail:
    """Reads the file of a task in pieces, so that heartbeats get out during a long one."""
    digest, size, lines = hashlib.sha256(), 0, 0
    try:
        with open(path_of(task.json()["file"]), "rb") as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
                size += len(piece)
                lines += piece.count(b"\n")
                await asyncio.sleep(0)
    except OSError as error:
        return Fail(str(error))
    return Answer(size, lines, digest.hexdigest())


async def work(order: Order) -> None:
    """Works until standard input ends. Reports the tasks of each batch of a slow worker."""

    async def examine_all(tasks: list[Task]) -> list[Answer | Fail]:
        if order.slow:
            print(json.dumps([task.id for task in tasks]), flush=True)
        answers = []
        for task in tasks:
            answers.append(await examine(task))
            if order.slow:
                await asyncio.sleep(SLOW_BATCH_SECONDS / len(tasks))
        return answers

    worker = Worker(
        order.address,
        token=order.token,
        commands=[order.command],
        worker_id=order.worker_id,
        batch=BATCH,
        lease_seconds=order.lease_seconds,
    )
    loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()

    def ended() -> None:
        loop.remove_reader(stdin)
        worker.stop()

    loop.add_reader(stdin, ended)  # nothing but its end comes any more
    await worker.run_batches(examine_all)


class WorkerProcess:
    """One worker of the crew, as its parent sees it."""

    def __init__(self, order: Order, process: asyncio.subprocess.Process) -> None:
        self.order = order
        self._process = process

    @classmethod
    async def start(cls, order: Order, log: Path) -> WorkerProcess:
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "codeq.demo"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=READ_BYTES,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                start_new_session=True,
            )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        await process.stdin.drain()
        return cls(order, process)

    async def batch(self) -> list[str]:
        """The ids of the next batch that a slow worker got; empty when there is none any more."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(BATCH_SECONDS):
                line = await self._process.stdout.readline()
        except TimeoutError:
            return []
        return json.loads(line) if line else []

    def signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self._process.wait()

    async def stop(self) -> None:
        """Lets the worker finish; kills it if it does not within a few seconds."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            await self.kill()


# --- the server, and what is asked of it over REST


class Target(NamedTuple):
    """Where a server is and which tokens it takes."""

    http: str
    producer: str
    worker: str
    producer_token: str = PRODUCER_TOKEN
    worker_token: str = WORKER_TOKEN


class Rest:
    """GET requests over one connection that stays open."""

    def __init__(self, target: Target) -> None:
        self._connection = http.client.HTTPConnection(target.http, timeout=30)
        self._headers = {"Authorization": f"Bearer {target.producer_token}"}

    def close(self) -> None:
        self._connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        """(status, body as JSON); raises OSError when the server cannot be reached."""
        try:
            return self._get(path)
        except OSError:
            return self._get(path)  # the connection was left over from before a restart

    def _get(self, path: str) -> tuple[int, Any]:
        try:
            self._connection.request("GET", f"/v1/codeq{path}", headers=self._headers)
            response = self._connection.getresponse()
            return response.status, msgspec.json.decode(response.read())
        except (http.client.HTTPException, OSError, msgspec.DecodeError) as error:
            self._connection.close()
            raise OSError(f"the server did not answer over REST: {error}") from None

    def unfinished(self, command: str) -> int:
        """Tasks of this command that are ready, delayed or leased."""
        status, stats = self.get(f"/admin/queues/{quote(command, safe='')}")
        if status != 200:
            raise CodeqError("internal", f"queue statistics: {stats.get('message', status)}")
        return int(stats["ready"] + stats["delayed"] + stats["inProgress"])

    def held(self, ids: list[str], worker_id: str) -> int:
        """How many of these tasks the worker holds, by the server's word."""
        tasks = [self.get(f"/tasks/{task_id}")[1] for task_id in ids]
        return sum(
            task.get("status") == "IN_PROGRESS" and task.get("workerId") == worker_id
            for task in tasks
        )


# --- the files


def uri_of(path: str) -> str:
    """Any file name, also one that is no text, as ASCII."""
    return quote(os.fsencode(path))


def path_of(uri: str) -> str:
    return os.fsdecode(unquote_to_bytes(uri))


def files_under(path: Path | None) -> list[str]:
    """Every regular file under ``path`` that can be read, in order; for None those of the standard
    library, without what is installed beside it."""
    root = os.path.abspath(path or sysconfig.get_path("stdlib"))
    if not os.path.isdir(root):
        raise CodeqError("validation-error", f"{root} is not a folder")
    found = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        if path is None:
            folders[:] = [name for name in folders if name != "site-packages"]
        paths = (os.path.join(folder, name) for name in sorted(names))
        found += [name for name in paths if os.path.isfile(name) and os.access(name, os.R_OK)]
    if not found:
        raise CodeqError("validation-error", f"there is no readable file under {root}")
    return found


def answer_of(path: str) -> Answer:
    """What the right answer is, found directly."""
    with open(path, "rb") as file:
        data = file.read()
    return Answer(len(data), data.count(b"\n"), hashlib.sha256(data).hexdigest())


# --- the show


class Outcome:
    """What came of it. ``notes`` say what was shown and what could not be."""

    def __init__(self, files: int) -> None:
        self.files = files
        self.seconds = 0.0
        self.redelivered = 0
        self.lost = 0
        self.mismatched = 0
        self.unshown = 0  # kills that this folder was large enough for and that did not succeed
        self.notes: list[str] = []

    @property
    def good(self) -> bool:
        return not (self.lost or self.mismatched or self.unshown) and self.redelivered > 0

    def shown(self, what: str, number: int, wanted: int, possible: bool) -> None:
        """Notes a kill, and whether it was as hard as it should be."""
        if number >= wanted:
            self.notes.append(f"{what} {number:,}")
        elif possible:
            self.unshown += 1
            self.notes.append(f"{what} only {number:,}: at least {wanted:,} should be shown")
        else:
            unable = f"{wanted:,} or more could not be shown with {self.files:,} files"
            self.notes.append(f"{what} {number:,}; {unable}")

    def table(self) -> Table:
        table = Table()
        row = {
            "tasks": f"{self.files:,}",
            "seconds": f"{self.seconds:.1f}",
            "tasks/s": f"{self.files / max(self.seconds, 0.001):,.0f}",
            "redelivered": f"{self.redelivered:,}",
            "lost": f"{self.lost:,}",
            "mismatched": f"{self.mismatched:,}",
        }
        for name in row:
            table.add_column(name, justify="right")
        table.add_row(*row.values())
        return table


class Show:
    """One run. ``server`` is None when the server is somebody else's."""

    def __init__(
        self,
        files: list[str],
        target: Target,
        server: LocalServer | None,
        log: Path,
        progress: Progress,
    ) -> None:
        self._files = files
        self._target = target
        self._server = server
        self._log = log
        self._progress = progress
        self._command = f"demo-{uuid.uuid4().hex[:12]}"
        self._rest = Rest(target)
        self._crew: list[WorkerProcess] = []
        self._outcome = Outcome(len(files))

    def close(self) -> None:
        self._rest.close()

    async def run(self, workers: int) -> Outcome:
        await asyncio.to_thread(self._rest.unfinished, self._command)  # is anybody there?
        started = time.monotonic()
        victim = await self._hire(1, slow=True)
        try:
            ids = await self._create_all()
            bar = self._progress.add_task("finished", total=len(ids))
            await self._kill_worker(victim, workers)
            if self._server is None:
                self._outcome.notes.append("the server was not killed: it is not ours (--url)")
            else:
                await self._kill_server(self._server, bar)
            await self._until(bar, 0)
            self._outcome.seconds = time.monotonic() - started
        finally:
            await asyncio.gather(*(worker.stop() for worker in self._crew))
        await self._read_back(ids)
        if not self._outcome.redelivered:
            self._outcome.notes.append("nothing was redelivered")
        return self._outcome

    async def _hire(self, number: int, *, slow: bool = False) -> WorkerProcess:
        order = Order(
            address=self._target.worker,
            token=self._target.worker_token,
            command=self._command,
            worker_id=f"{self._command}-{number}",
            lease_seconds=LEASE_SECONDS,
            slow=slow,
        )
        worker = await WorkerProcess.start(order, self._log)
        self._crew.append(worker)
        return worker

    async def _create_all(self) -> list[str]:
        """One task per file; each has a key, so that a create may safely be sent twice."""
        bar = self._progress.add_task("created", total=len(self._files))
        ids: list[str] = []
        async with Producer(self._target.producer, token=self._target.producer_token) as producer:
            for start in range(0, len(self._files), CREATE_BATCH):
                tasks = [
                    NewTask(
                        self._command,
                        {"file": uri_of(path)},
                        idempotency_key=f"{self._command}/{start + index}",
                    )
                    for index, path in enumerate(self._files[start : start + CREATE_BATCH])
                ]
                for result in await producer.produce_batch(tasks):
                    if isinstance(result, CodeqError):
                        raise result
                    ids.append(result)
                self._progress.update(bar, completed=len(ids))
        return ids

    async def _kill_worker(self, victim: WorkerProcess, workers: int) -> None:
        """kill -9 for worker 1 with its hands full; the others start with its first batch.

        It is frozen first, so that what the server then says it holds is what it holds when it
        dies.
        """
        batch = await victim.batch()
        if not batch:
            raise CodeqError("internal", f"worker 1 got no task: {last_line(self._log)}")
        # The others, and the one that takes the place of the dead.
        hiring = asyncio.gather(*(self._hire(number) for number in range(2, workers + 2)))
        possible = len(self._files) >= HELD_WANTED
        wanted = HELD_WANTED if possible else 1
        held = 0
        while batch and held < wanted:
            victim.signal(signal.SIGSTOP)
            held = await asyncio.to_thread(self._rest.held, batch, victim.order.worker_id)
            if held < wanted:
                victim.signal(signal.SIGCONT)
                batch = await victim.batch()
        await victim.kill()
        self._crew.remove(victim)
        await hiring
        self._outcome.shown(
            "worker 1 was killed (-9); leases it held:", held, HELD_WANTED, possible
        )

    async def _kill_server(self, server: LocalServer, bar: TaskID) -> None:
        """kill -9 for the server while much is to be done; it comes back at the same addresses."""
        total = len(self._files)
        enough_done = max(0, min(total // 10, total - UNFINISHED_WANTED - 2 * BATCH))
        unfinished = await self._until(bar, total - enough_done)
        await server.kill()
        killed = time.monotonic()
        await server.start()
        pause = time.monotonic() - killed
        # Nothing is created any more: what the new server still has to do, the old one had too.
        left = await self._unfinished(bar)
        self._outcome.shown(
            f"the server was killed (-9) and was back after {pause:.1f} s; tasks unfinished:",
            left,
            UNFINISHED_WANTED,
            total >= UNFINISHED_WANTED + 4 * BATCH,
        )
        if left > unfinished:
            self._outcome.lost += left - unfinished
            self._outcome.notes.append(f"the server forgot {left - unfinished:,} results")

    async def _until(self, bar: TaskID, goal: int) -> int:
        """Waits until at most ``goal`` tasks are unfinished, or nothing moves any more; returns how
        many are."""
        moved, least = time.monotonic(), sys.maxsize
        while (unfinished := await self._unfinished(bar)) > goal:
            if unfinished < least:
                moved, least = time.monotonic(), unfinished
            elif time.monotonic() - moved > STALL_SECONDS:
                self._outcome.notes.append(f"gave up: {unfinished:,} tasks do not move any more")
                break
            await asyncio.sleep(LOOK_SECONDS)
        return unfinished

    async def _unfinished(self, bar: TaskID) -> int:
        unfinished = await asyncio.to_thread(self._rest.unfinished, self._command)
        self._progress.update(bar, completed=len(self._files) - unfinished)
        return unfinished

    async def _read_back(self, ids: list[str]) -> None:
        bar = self._progress.add_task("checked", total=len(ids))
        outcome = self._outcome
        if len(set(ids)) != len(ids):
            outcome.mismatched += len(ids) - len(set(ids))
            outcome.notes.append("one task stands for several files")
        await asyncio.to_thread(self._check_all, ids, bar)

    def _check_all(self, ids: list[str], bar: TaskID) -> None:
        for path, task_id in zip(self._files, ids, strict=True):
            self._check(path, task_id)
            self._progress.advance(bar)

    def _check(self, path: str, task_id: str) -> None:
        """Compares what the server keeps about a task with the file itself."""
        status, body = self._rest.get(f"/tasks/{task_id}/result")
        if status != 200:
            self._outcome.lost += 1
            return
        task, record = body["task"], body["result"]
        if task["attempts"] > 1:
            self._outcome.redelivered += 1
        try:
            right = msgspec.to_builtins(answer_of(path))
        except OSError as error:
            right = str(error)
        if record["taskId"] != task_id or record["status"] != "COMPLETED" or (
            record.get("result") != right
        ):  # fmt: skip
            self._outcome.mismatched += 1
            found = record.get("error") or record.get("result")
            self._outcome.notes.append(f"{path}: the result is {found}, the file {right}")


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing"


async def perform(files: list[str], target: Target | None, workers: int, console: Console) -> int:
    """Runs the show in a scratch folder, prints what came of it, returns the exit code."""
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn())
    with tempfile.TemporaryDirectory(prefix="codeq-demo-") as scratch:
        server = None
        if target is None:
            server = LocalServer(
                Path(scratch, "data"), Path(scratch, "server.log"), SERVER_SETTINGS
            )
        try:
            if server is not None:
                await server.start()
                target = Target(server.http, server.producer, server.worker)
            assert target is not None
            console.print(f"{len(files):,} files, server at {target.http}", highlight=False)
            with Progress(*columns, console=console) as progress:
                show = Show(files, target, server, Path(scratch, "workers.log"), progress)
                with contextlib.closing(show):
                    outcome = await show.run(workers)
        finally:
            if server is not None:
                await server.kill()
    for note in list(short(outcome.notes)):
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(outcome.table())
    console.print("good" if outcome.good else "NOT good", style="green" if outcome.good else "red")
    return 0 if outcome.good else 1


def short(notes: list[str], most: int = 20) -> Iterator[str]:
    yield from notes[:most]
    if len(notes) > most:
        yield f"... and {len(notes) - most:,} more"


def run(path: Path | None, target: Target | None, workers: int) -> int:
    """Runs the demo over the files under ``path`` with ``workers`` worker processes.

    Returns 0 only when every file has exactly one correct result and tasks were redelivered.
    """
    try:
        return asyncio.run(until_told(perform(files_under(path), target, workers, Console())))
    except OSError as error:
        raise CodeqError("unavailable", str(error)) from None


if __name__ == "__main__":
    asyncio.run(work(msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)))
