"""A worker over REST that runs a command for each task, or only shows it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
from msgspec import Raw, Struct

from codeq.cli.connection import PASSING
from codeq.client.rest import Client
from codeq.errors import CodeqError
from codeq.model import Task

#: This exit code of a command ends its task FAILED; every other one but 0 gives it back.
EXIT_FAIL = 100
#: No server takes a longer result.
OUTPUT_BYTES_MAX = 16 << 20
REASON_CHARS_MAX = 8_000
#: A command that is told to end has so long before it is killed.
KILL_SECONDS = 5.0
PAUSE_FIRST_SECONDS, PAUSE_MAX_SECONDS = 0.25, 10.0
#: Refusals that mean that the lease is somebody else's, or nobody's
LOST = ("not-owner", "not-in-progress", "not-found")


class Plan(NamedTuple):
    """What a worker is to do. Without ``argv`` it shows each task and acts by ``ack``."""

    commands: tuple[str, ...]
    argv: tuple[str, ...]
    ack: str
    worker_id: str
    concurrency: int = 1
    lease_seconds: int = 60
    wait_seconds: int = 10
    nack_delay_seconds: int = 5
    tasks_max: int = 0


class Done(Struct, rename="camel", omit_defaults=True):
    """What became of a task: completed, failed, requeued, dlq, abandoned, lost or left."""

    task_id: str
    command: str
    attempts: int
    outcome: str
    reason: str = ""


class Run:
    """One task in hand: its command, and whether the lease still is ours."""

    def __init__(self, task: Task, until: float) -> None:
        self.task = task
        self.until = until
        self.lost = ""
        self.given_back = False
        self._last_words = ""
        self._group = 0  # of processes, while anyone of it may still write

    async def output(self, argv: tuple[str, ...]) -> tuple[int, bytes, str]:
        """Exit code, standard output and last line on standard error of the command. It has ended
        when all that write to its output have."""
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **_environment(self.task)},
        )
        self._group = process.pid
        if self.given_back or self.lost:
            self.kill()
        try:
            _, out, _ = await asyncio.gather(
                self._feed(process), self._collect(process), self._listen(process)
            )
            return await process.wait(), out, self._last_words
        except BaseException:
            self._signal(signal.SIGKILL)
            raise
        finally:
            self._group = 0

    async def _feed(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(self.task.payload.encode())
            await process.stdin.drain()
        process.stdin.close()

    async def _collect(self, process: asyncio.subprocess.Process) -> bytes:
        assert process.stdout is not None
        out = bytearray()
        while part := await process.stdout.read(1 << 16):
            out += part
            if len(out) > OUTPUT_BYTES_MAX:
                self._last_words = f"more than {OUTPUT_BYTES_MAX} bytes of output"
                self.kill()
                break
        return bytes(out)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        """Passes standard error on, and keeps its last line."""
        assert process.stderr is not None
        tail = ""
        while part := await process.stderr.read(1 << 16):
            text = part.decode("utf-8", "replace")
            sys.stderr.write(text)
            sys.stderr.flush()
            tail = (tail + text)[-REASON_CHARS_MAX:]
        lines = tail.strip().splitlines()
        self._last_words = self._last_words or (lines[-1].strip() if lines else "")

    def kill(self) -> None:
        """Has the command and all that it started end, soon in any case: also a child that lives
        on when the command itself has ended."""
        self._signal(signal.SIGTERM)
        asyncio.get_running_loop().call_later(KILL_SECONDS, self._signal, signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, number)

    def lose(self, why: str) -> None:
        self.lost = why
        self.kill()


def _environment(task: Task) -> dict[str, str]:
    return {
        "CODEQ_TASK_ID": task.id,
        "CODEQ_COMMAND": task.command,
        "CODEQ_ATTEMPTS": str(task.attempts),
        "CODEQ_MAX_ATTEMPTS": str(task.max_attempts),
        "CODEQ_PRIORITY": str(task.priority),
        "CODEQ_TENANT_ID": task.tenant_id,
        "CODEQ_LEASE_UNTIL": task.lease_until,
        "CODEQ_CREATED_AT": task.created_at,
    }


def result_of(output: bytes) -> Raw | str | None:
    """What a command wrote, as a result: JSON as it is, other text as a JSON string."""
    text = output.strip()
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=Raw)
    except ValueError:
        return text.decode("utf-8", "replace")


class Runner:
    """Claims tasks with ``client`` until ``stop``; ``show`` hears of each task without a command,
    ``tell`` of what became of each, ``warn`` of what went wrong with the server."""

    def __init__(
        self,
        client: Client,
        plan: Plan,
        show: Callable[[Task], None],
        tell: Callable[[Done], None],
        warn: Callable[[str], None],
    ) -> None:
        self._client = client
        self._plan = plan
        self._show, self._tell, self._warn = show, tell, warn
        self._stopping = asyncio.Event()
        self._claims: set[asyncio.Future[Task | None]] = set()
        self._runs: set[Run] = set()
        self._begun = 0
        self._fault: CodeqError | None = None
        self.gave_back = False

    async def run(self) -> None:
        """Works until it is stopped or has had its number of tasks; raises CodeqError when the
        server refuses it, after the tasks in hand have ended."""
        await asyncio.gather(*(self._slot() for _ in range(self._plan.concurrency)))
        if self._fault is not None:
            raise self._fault

    def stop(self) -> None:
        """Takes no more tasks; called again, it kills the commands and gives their tasks back."""
        if self._stopping.is_set():
            self.gave_back = True
            for run in self._runs:
                run.given_back = True
                run.kill()
        elif self._runs:
            self._warn(f"tasks in hand: {len(self._runs)}; a second signal gives them back")
        self._claim_no_more()

    def _claim_no_more(self) -> None:
        self._stopping.set()
        for claim in self._claims:
            claim.cancel()  # a task that is on its way just then comes back when its lease is over

    async def _slot(self) -> None:
        pause_seconds = PAUSE_FIRST_SECONDS
        while not self._stopping.is_set() and not 0 < self._plan.tasks_max <= self._begun:
            self._begun += 1
            task = None
            try:
                task = await self._claim()
                pause_seconds = PAUSE_FIRST_SECONDS
            except CodeqError as error:
                if error.slug not in PASSING:
                    self._fault = error
                    self._claim_no_more()
                    return
                self._warn(error.message)
                await self._rest(max(pause_seconds, error.retry_after_seconds))
                pause_seconds = min(2 * pause_seconds, PAUSE_MAX_SECONDS)
            if task is None:
                self._begun -= 1
            else:
                await self._work(task)

    async def _claim(self) -> Task | None:
        plan = self._plan
        claim = asyncio.ensure_future(
            self._client.claim(
                plan.commands,
                lease_seconds=plan.lease_seconds,
                wait_seconds=plan.wait_seconds,
                worker_id=plan.worker_id,
            )
        )
        self._claims.add(claim)
        try:
            return await claim
        except asyncio.CancelledError:
            if self._stopping.is_set() and claim.cancelled():
                return None
            raise
        finally:
            self._claims.discard(claim)

    async def _rest(self, seconds: float) -> None:
        """A pause that a stop ends."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _work(self, task: Task) -> None:
        run = Run(task, asyncio.get_running_loop().time() + self._plan.lease_seconds)
        self._runs.add(run)
        keeping = asyncio.create_task(self._keep(run))
        try:
            done = await (self._command(run) if self._plan.argv else self._ack(run))
        except CodeqError as error:
            lost = run.lost or error.message
            done = Done(task.id, task.command, task.attempts, "lost", lost)
        finally:
            keeping.cancel()
            self._runs.discard(run)
        self._tell(done)

    async def _keep(self, run: Run) -> None:
        """Heartbeats until the task is done or its lease is lost."""
        loop = asyncio.get_running_loop()
        lease_seconds = self._plan.lease_seconds
        while True:
            await asyncio.sleep(lease_seconds / 3)
            sent = loop.time()
            try:
                async with asyncio.timeout_at(run.until):
                    await self._client.heartbeat(
                        run.task.id,
                        extend_seconds=lease_seconds,
                        worker_id=self._plan.worker_id,
                        attempt=run.task.attempts,
                    )
            except TimeoutError:
                run.lose("no word from the server until the lease was over")
                return
            except CodeqError as error:
                if error.slug not in PASSING:
                    run.lose(error.message)
                    return
            else:
                run.until = sent + lease_seconds

    # --- what is said of a task

    async def _command(self, run: Run) -> Done:
        try:
            code, output, words = await run.output(self._plan.argv)
        except OSError as error:
            code, output, words = -1, b"", f"{self._plan.argv[0]}: {error.strerror}"
        if run.lost:
            raise CodeqError("not-owner", run.lost)
        if run.given_back:
            return await self._abandon(run)
        if code == 0:
            return await self._complete(run, result_of(output))
        reason = words or (f"exit code {code}" if code > 0 else f"signal {-code}")
        return await (self._fail(run, reason) if code == EXIT_FAIL else self._nack(run, reason))

    async def _ack(self, run: Run) -> Done:
        self._show(run.task)
        if self._plan.ack == "complete":
            return await self._complete(run, None)
        if self._plan.ack == "abandon":
            return await self._abandon(run)
        if self._plan.ack == "nack":
            return await self._nack(run, "")
        return self._done(run, "left")

    async def _complete(self, run: Run, result: Raw | str | None) -> Done:
        task, plan = run.task, self._plan
        try:
            await self._say(
                run,
                lambda: self._client.complete(
                    task.id, result, worker_id=plan.worker_id, attempt=task.attempts
                ),
            )
        except CodeqError as error:
            if error.slug in (*LOST, *PASSING):
                raise
            return await self._nack(run, f"the result was refused: {error.message}")
        return self._done(run, "completed")

    async def _fail(self, run: Run, reason: str) -> Done:
        task, worker_id = run.task, self._plan.worker_id
        await self._say(
            run,
            lambda: self._client.fail(task.id, reason, worker_id=worker_id, attempt=task.attempts),
        )
        return self._done(run, "failed", reason)

    async def _nack(self, run: Run, reason: str) -> Done:
        nacked = await self._client.nack(
            run.task.id,
            delay_seconds=self._plan.nack_delay_seconds,
            reason=reason,
            worker_id=self._plan.worker_id,
            attempt=run.task.attempts,
        )
        return self._done(run, nacked.status, reason)

    async def _abandon(self, run: Run) -> Done:
        await self._client.abandon(
            run.task.id, worker_id=self._plan.worker_id, attempt=run.task.attempts
        )
        return self._done(run, "abandoned")

    async def _say(self, run: Run, call: Callable[[], Awaitable[object]]) -> None:
        """Sends a result until it is answered or the lease is over: the same one is taken twice."""
        loop = asyncio.get_running_loop()
        pause_seconds = PAUSE_FIRST_SECONDS
        while True:
            try:
                await call()
                return
            except CodeqError as error:
                if error.slug not in PASSING or loop.time() + pause_seconds > run.until:
                    raise
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, PAUSE_MAX_SECONDS)

    def _done(self, run: Run, outcome: str, reason: str = "") -> Done:
        task = run.task
        return Done(task.id, task.command, task.attempts, outcome, reason)
