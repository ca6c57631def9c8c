"""The queues, heaps and table of csrc as one object; one call per batch; no clock, no I/O."""

from collections.abc import Mapping, Sequence
from typing import Self, final

from codeq.engine._views import CorruptRecord as CorruptRecord
from codeq.engine._views import TaskView
from codeq.engine._wire import Creates, Finishes

#: tenant, command, depths, counts, since when the oldest ready task is ready, ends by latency
_Tally = tuple[
    bytes,
    bytes,
    tuple[int, int, int, int],
    tuple[int, int, int, int, int, int],
    int | None,
    tuple[int, ...],
]

READY: int
DELAYED: int
LEASED: int
COMPLETED: int
FAILED: int
DEAD: int

@final
class Claim:
    """Tasks leased by one claim and not yet handed over."""

    lease_until_ms: int
    def __len__(self) -> int: ...
    def ids(self) -> list[bytes]:
        """The tasks that are still under this claim, in the order of delivery."""
    def missing(self) -> list[int]:
        """Sequences of the chunks that must be read because bodies are not in memory."""

@final
class Engine:
    """Decides every transition of a task and builds the records that make it durable.

    All methods run on the thread that made the object (checked). Every operation changes memory at
    once and appends records to the open group, which ``take`` hands out for one atomic commit.
    """

    def __new__(
        cls,
        *,
        seed: int,
        shard_count: int = 1,
        payload_memory_bytes: int = 536870912,
        retention_ms: int = 86400000,
        dead_retention_ms: int = 604800000,
        key_window_ms: int = 86400000,
        max_attempts_default: int = 5,
        backoff_policy: str = "exp_full_jitter",
        backoff_base_ms: int = 5000,
        backoff_max_ms: int = 900000,
        command_labels_max: int = 1000,
        straggler_slack_bytes: int = 268435456,
    ) -> Self: ...

    # --- operations
    def create(
        self, creates: Creates, tenant: bytes, now_ms: int, begin: int = 0, end: int = -1
    ) -> int:
        """Makes a task of every item whose code is OK and that is neither replayed nor an alias;
        sets ids; returns how many were made. Only the items [begin, end)."""
    def claim(
        self,
        tenant: bytes,
        commands: Sequence[bytes] | None,
        in_order: bool,
        worker: bytes,
        subject: bytes,
        count: int,
        lease_ms: int,
        bytes_max: int,
        now_ms: int,
    ) -> Claim | None:
        """Leases up to ``count`` tasks whose encoded bodies fit ``bytes_max`` together (one always
        fits). ``commands`` None = every queue of the tenant. ``in_order``: the queues in the order
        given, else highest priority first, then the older task. None when nothing is ready. A task
        whose time has come is ready only after ``tick``."""
    def assignment(
        self, claim: Claim, single: bool, chunks: Mapping[int, bytes] | None = None
    ) -> bytes:
        """workerpb.ServerEvent with task (single) or task_batch: the stored bodies with the
        changing fields spliced in. Afterwards the bodies may leave memory."""
    def claimed_views(
        self, claim: Claim, chunks: Mapping[int, bytes] | None = None
    ) -> list[TaskView]:
        """The same for REST."""
    def delivered(self, claim: Claim) -> None:
        """The transport took the message: from now on the end of the lease counts the attempt."""
    def give_back(self, claim: Claim, now_ms: int) -> int:
        """Claim not delivered: its tasks that are still under it go back, attempt unused."""
    def heartbeat(
        self,
        task_id: bytes,
        tenant: bytes,
        worker: bytes,
        subject: bytes,
        attempt: int,
        lease_ms: int,
        now_ms: int,
    ) -> int:
        """Returns a cq_code. ``worker`` empty = none named; ``attempt`` < 0 = any."""
    def abandon(
        self,
        task_id: bytes,
        tenant: bytes,
        worker: bytes,
        subject: bytes,
        attempt: int,
        now_ms: int,
    ) -> int: ...
    def nack(
        self,
        task_id: bytes,
        tenant: bytes,
        worker: bytes,
        subject: bytes,
        attempt: int,
        delay_ms: int,
        reason: bytes,
        now_ms: int,
    ) -> tuple[int, int, bool]:
        """(code, applied delay in ms, dead letter). ``delay_ms`` < 0 = backoff by policy."""
    def finish(
        self,
        finishes: Finishes,
        tenant: bytes,
        worker: bytes,
        subject: bytes,
        attempt: int,
        now_ms: int,
        begin: int = 0,
        end: int = -1,
    ) -> int:
        """Ends every item whose code is OK; returns how many. Items of tasks that ended before get
        CQ_ENDED, those without a slot CQ_ABSENT (the caller asks the store); a second mention in
        the same batch gets NOT_IN_PROGRESS. An item's own worker id wins over ``worker``."""
    def cancel(self, task_id: bytes, tenant: bytes, now_ms: int) -> int: ...
    def requeue(
        self, task_id: bytes, tenant: bytes, now_ms: int, command: bytes | None = None
    ) -> int:
        """Makes a dead letter ready again, as new. ``command`` None = whatever its queue."""
    def purge(
        self, task_id: bytes, tenant: bytes, now_ms: int, command: bytes | None = None
    ) -> int:
        """Takes a dead letter and its record away."""

    # --- many tasks, in creation order; numbers in ids are the order of creation
    def walk(
        self,
        tenant: bytes | None,
        command: bytes | None,
        states: int,
        begin: int,
        end: int,
        looks: int,
        count_max: int,
        bytes_max: int,
    ) -> tuple[list[TaskView], int]:
        """Tasks in memory with numbers in [begin, end), None = of every tenant or command,
        ``states`` a bit for each: at most ``count_max``, about ``bytes_max`` of bodies, and
        ``looks`` numbers looked at. Also the number to go on with. Views may need ``fill``."""
    def cancel_many(
        self,
        tenant: bytes,
        command: bytes,
        ready: bool,
        delayed: bool,
        begin: int,
        end: int,
        looks: int,
        count_max: int,
        now_ms: int,
    ) -> tuple[int, int]:
        """Cancels waiting tasks of the queue; (how many, the number to go on with)."""
    def requeue_many(
        self, tenant: bytes, command: bytes, begin: int, count_max: int, now_ms: int
    ) -> tuple[int, int]:
        """Requeues dead letters of the queue; likewise."""
    def purge_many(
        self, tenant: bytes, command: bytes, begin: int, count_max: int, now_ms: int
    ) -> tuple[int, int]:
        """Purges dead letters of the queue; likewise."""
    def forget(
        self,
        tenant: bytes,
        before_ms: int,
        begin: int,
        end: int,
        looks: int,
        count_max: int,
        now_ms: int,
    ) -> tuple[int, int, int]:
        """Takes ended tasks in memory away whose keeping time ends by ``before_ms``; (how many,
        the number to go on with, looks)."""
    def gone(self, number: int, now_ms: int) -> None:
        """Records that an ended task on disk is taken away, for those who make its directory
        again."""
    @property
    def looked(self) -> int:
        """Looks of all walks so far."""
    @property
    def next_number(self) -> int:
        """The number of the next create."""

    # --- pauses and policies
    def pause(self, tenant: bytes, command: bytes) -> None:
        """Claims pass the queue over from now on, whether it exists yet or not."""
    def resume(self, tenant: bytes, command: bytes) -> None: ...
    def govern(
        self,
        tenant: bytes,
        command: bytes,
        tiers: int = 0,
        max_attempts: int = 0,
        consumers_max: int = 0,
        retention_ms: int = 0,
    ) -> None:
        """Gives the queue a policy, whether it exists yet or not; ``tiers`` has a bit for each
        priority that is allowed, 0 takes the policy away. ``count_consumers`` must follow, before
        anything else, once for several."""
    def count_consumers(self) -> None: ...
    def limited(self, tenant: bytes, command: bytes | None, worker: bytes | None = None) -> bool:
        """Whether a queue (None = any of the tenant) has ready tasks that not every worker may
        claim; with ``worker``, whether that one may."""

    # --- time
    def tick(self, now_ms: int, limit: int) -> int:
        """Moves up to ``limit`` tasks whose time has come (due, lease over, dead letters whose
        keeping time is over); returns how many; call again while it returns ``limit``."""
    def next_due_ms(self) -> int | None: ...

    # --- what parked claims and watchers need
    def touched(self) -> list[tuple[bytes, bytes]]:
        """(tenant, command) of queues that got a ready task since the last call."""
    def ready_count(self, tenant: bytes, command: bytes) -> int: ...
    def watch(self, task_id: bytes) -> bool:
        """Reports the end of this live task in ``ended``; False when it is not live."""
    def ended(self) -> list[bytes]:
        """Ids of watched tasks that ended since the last call."""

    # --- reading
    def view(self, task_id: bytes, tenant: bytes) -> TaskView | None:
        """The task as memory has it, or None (absent, or of another tenant). Ended tasks whose
        keeping time is over are None too (see TaskView.expires_ms)."""
    def directory_keys(self, task_id: bytes) -> list[bytes]:
        """Store keys to ask for a task that is not in memory (directory of its bucket, own
        entry)."""
    def view_stored(
        self, task_id: bytes, tenant: bytes, values: Sequence[bytes | None]
    ) -> TaskView | None:
        """From the values of ``directory_keys``: a view of an ended task that still needs ``fill``
        (which checks id and tenant and raises KeyError when they do not match), or None."""
    def holds(self, task_id: bytes) -> bool | None:
        """Whether memory has the task and it can still be read; None = it is not in memory."""
    def holds_stored(self, task_id: bytes, values: Sequence[bytes | None]) -> bool:
        """The same by the values of ``directory_keys``."""
    def stats(self, tenant: bytes, command: bytes) -> tuple[int, int, int, int]:
        """ready, delayed, in progress, dead letters; in O(1)."""
    def queues(self, tenant: bytes | None) -> list[tuple[bytes, bytes, int, int, int, int]]:
        """(tenant, command, ready, delayed, in progress, dead) of queues with a live task or dead
        letter."""
    def command_stats(
        self,
    ) -> list[tuple[str, tuple[int, ...], tuple[int, ...], float, tuple[int, ...], float]]:
        """Per command label: (created, claimed, completed, failed, expired leases), then the
        latency histogram of COMPLETED (counts per bucket of .1 .25 .5 1 2.5 5 10 30
        60 120 300 600 1800 3600 s and +Inf, sum in s)
        and of FAILED."""
    def ready_since(self) -> dict[str, int]:
        """Per command label: when the oldest ready task of its queues became ready, in ms; none
        where nothing is ready. Exact but for tasks that came back to their old place."""
    def tallies(self, tenant: bytes | None, count_max: int) -> tuple[list[_Tally], int, int]:
        """(the first queues by command, how many more there are, live tasks of all). A queue:
        tenant, command, the depths as of ``stats``, counts since the start (created, claimed,
        completed, failed, dead, expired leases), since when its oldest ready task is ready, and
        its ends on every path in the buckets of ``command_stats``."""
    def leases(self, tenant: bytes | None) -> list[tuple[bytes, bytes, int]]:
        """(tenant, worker id, leases held); a worker id once per subject."""
    @property
    def live_tasks(self) -> int: ...
    @property
    def body_bytes(self) -> int:
        """Bytes of payloads held in memory."""

    # --- the open group
    @property
    def pending_records(self) -> int: ...
    @property
    def pending_bytes(self) -> int: ...
    def take(self) -> list[tuple[bytes, bytes]]:
        """Closes the open group: every (key, value) to put, in one atomic write: chunks,
        directories, webhook entries, segment entries, and the head (`m` + "head": next number, last
        id time, next sequence, where recovery starts). Empty when nothing changed."""

    # --- removal
    def expired(self, now_ms: int) -> int:
        """Sequence up to which no task needs the log any more."""
    def trim(self, now_ms: int, keep: int = ...) -> tuple[int, int] | None:
        """(from, to) sequences of chunks at the tail of the log that nobody needs any more, in
        whole segments before that of ``keep``; they are forgotten at once, the caller deletes the
        range in the next commit."""
    def straggler_chunks(self) -> tuple[int, int] | None:
        """(from, to) of the oldest segment when so much of the log is dead behind it that its live
        records should be carried forward; the caller reads those chunks and calls ``carry``."""
    def carry(self, seq: int, chunk: bytes, now_ms: int) -> int:
        """Copies the records of this chunk that are still needed into the open group."""
    @property
    def tail(self) -> int:
        """Sequence of the oldest chunk kept. Directory and other entries begin with the highest
        sequence they rest on (8 bytes, big endian) and may go when that is below the tail."""

    # --- recovery, in this order
    def load_head(self, value: bytes | None) -> int:
        """Reads `m` + "head" (None = new store); returns the sequence where the scan of chunks
        starts."""
    def load_segment(self, key: bytes, value: bytes) -> None: ...
    def load_chunk(self, seq: int, chunk: bytes) -> None: ...
    def load_done(self, now_ms: int, lease_grace_ms: int) -> None:
        """Builds queues and heaps; no lease ends before ``now_ms + lease_grace_ms``."""
    def verify(self) -> None:
        """Walks everything and aborts on a broken invariant (debug builds do it by themselves)."""
    def digest(self) -> int:
        """A hash of all that a restart must rebuild: equal before and after one (I8)."""
