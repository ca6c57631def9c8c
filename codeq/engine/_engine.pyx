"""The engine of csrc as one object: bytes become pointer and length, a batch is one call.

C decides and counts; this file owns the memory and makes Python objects of what is asked for.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from codeq.engine._counts cimport (
    command_rows, lease_rows, queue_rows, ready_since, tally_rows
)
from codeq.engine._views cimport (
    TaskView, body_of, bytes_of, find_record, id_of, id_text, is_live, new_view, numbered_key,
    to_bytes, view_of
)
from codeq.engine._wire cimport Creates, Finishes

from codeq.engine._views import CorruptRecord

READY = CQ_READY
DELAYED = CQ_DELAYED
LEASED = CQ_LEASED
COMPLETED = CQ_COMPLETED
FAILED = CQ_FAILED
DEAD = CQ_DEAD

cdef dict BACKOFFS = {
    "fixed": CQ_BACKOFF_FIXED,
    "linear": CQ_BACKOFF_LINEAR,
    "exponential": CQ_BACKOFF_EXPONENTIAL,
    "exp_equal_jitter": CQ_BACKOFF_EXP_EQUAL_JITTER,
    "exp_full_jitter": CQ_BACKOFF_EXP_FULL_JITTER,
}


# --- bytes ----------------------------------------------------------------------------------------

cdef inline int check(cq_status status) except -1:
    if status == CQ_NO_MEMORY:
        raise MemoryError
    return 0


# --- claims ---------------------------------------------------------------------------------------

@cython.final
@cython.no_gc_clear
cdef class Claim:
    cdef cq_claim tasks
    cdef Engine engine

    def __cinit__(self, Engine engine not None):
        self.engine = engine

    def __dealloc__(self):
        if self.engine is not None:
            cq_claim_free(self.engine.core, &self.tasks)

    def __len__(self):
        return self.tasks.tasks.count

    @property
    def lease_until_ms(self):
        return self.tasks.lease_until_ms

    def ids(self):
        cdef cq_slot *slot
        cdef uint32_t i
        cdef list ids = []
        for i in range(self.tasks.tasks.count):
            slot = cq_claim_slot(self.engine.core, &self.tasks, i)
            if slot != NULL:
                ids.append(PyBytes_FromStringAndSize(<const char *>slot.id, CQ_ID_BYTES))
        return ids

    def missing(self):
        cdef cq_slot *slot
        cdef uint32_t i
        cdef dict found = {}
        for i in range(self.tasks.tasks.count):
            slot = cq_claim_slot(self.engine.core, &self.tasks, i)
            if slot != NULL and slot.body == NULL:
                found[slot.created_chunk] = None
        return list(found)


cdef Py_ssize_t part_of(Py_ssize_t count, Py_ssize_t begin, Py_ssize_t end) except -1:
    """Length of the items [begin, end) of a batch of ``count``; a negative end is that of all."""
    if end < 0:
        end = count
    if begin < 0 or begin > end or end > count:
        raise IndexError("part of a batch")
    return end - begin


# --- the engine -----------------------------------------------------------------------------------

@cython.final
cdef class Engine:
    cdef cq_engine *core
    cdef unsigned long thread
    cdef readonly uint64_t looked

    def __cinit__(
        self,
        *,
        uint64_t seed,
        uint32_t shard_count=1,
        int64_t payload_memory_bytes=536870912,
        int64_t retention_ms=86400000,
        int64_t dead_retention_ms=604800000,
        int64_t key_window_ms=86400000,
        int32_t max_attempts_default=5,
        str backoff_policy="exp_full_jitter",
        int64_t backoff_base_ms=5000,
        int64_t backoff_max_ms=900000,
        uint32_t command_labels_max=1000,
        int64_t straggler_slack_bytes=268435456,
    ):
        cdef cq_settings settings
        if backoff_policy not in BACKOFFS:
            raise ValueError(f"unknown backoff policy {backoff_policy!r}")
        if shard_count < 1 or max_attempts_default < 1 or backoff_base_ms < 0 or backoff_max_ms < 0:
            raise ValueError("shard_count, max_attempts_default: at least 1; backoff: at least 0")
        settings.seed = seed
        settings.shard_count = shard_count
        settings.payload_memory_bytes = payload_memory_bytes
        settings.retention_ms = retention_ms
        settings.dead_retention_ms = dead_retention_ms
        settings.key_window_ms = key_window_ms
        settings.max_attempts_default = max_attempts_default
        settings.backoff = BACKOFFS[backoff_policy]
        settings.backoff_base_ms = backoff_base_ms
        settings.backoff_max_ms = backoff_max_ms
        settings.command_labels_max = command_labels_max
        settings.straggler_slack_bytes = straggler_slack_bytes
        self.thread = PyThread_get_thread_ident()
        self.core = cq_engine_new(&settings)
        if self.core == NULL:
            raise MemoryError

    def __dealloc__(self):
        cq_engine_free(self.core)

    cdef int enter(self) except -1:
        if PyThread_get_thread_ident() != self.thread:
            raise RuntimeError("the engine belongs to the thread that made it")
        return 0

    cdef int leave(self, cq_status status) except -1:
        cq_engine_check(self.core)
        return check(status)

    # --- operations

    def create(
        self, Creates creates not None, bytes tenant not None, int64_t now_ms,
        Py_ssize_t begin=0, Py_ssize_t end=-1,
    ):
        cdef uint32_t made
        cdef Py_ssize_t count = part_of(creates.count, begin, end)
        self.enter()
        self.leave(cq_task_create(self.core, creates.items + begin, count, bytes_of(tenant),
                                  now_ms, &made))
        return made

    def claim(
        self, bytes tenant not None, commands, bint in_order, bytes worker not None,
        bytes subject not None, int64_t count, int64_t lease_ms, int64_t bytes_max, int64_t now_ms,
    ):
        cdef cq_want want
        cdef Claim claim
        cdef cq_bytes *runs = NULL
        cdef tuple named = None if commands is None else tuple(commands)
        cdef Py_ssize_t i
        self.enter()
        want.command_count = 0 if named is None else len(named)
        want.commands = NULL
        try:
            if named is not None:
                runs = <cq_bytes *>malloc((want.command_count + 1) * sizeof(cq_bytes))
                if runs == NULL:
                    raise MemoryError
                for i in range(<Py_ssize_t>want.command_count):
                    runs[i] = bytes_of(<bytes?>named[i])
                want.commands = runs
            want.tenant = bytes_of(tenant)
            want.in_order = in_order
            want.worker = bytes_of(worker)
            want.subject = bytes_of(subject)
            want.count_max = count if count > 1 else 1
            want.lease_ms = lease_ms
            want.bytes_max = bytes_max
            want.now_ms = now_ms
            claim = Claim.__new__(Claim, self)
            self.leave(cq_task_claim(self.core, &want, &claim.tasks))
        finally:
            free(runs)
        return claim if claim.tasks.tasks.count else None

    def assignment(self, Claim claim not None, bint single, chunks=None):
        cdef uint32_t i, kept = 0, count = claim.tasks.tasks.count
        cdef cq_slot *slot
        cdef list keep = []
        cdef size_t size
        cdef bytes message
        self.enter()
        cdef cq_piece *pieces = <cq_piece *>malloc((count + 1) * sizeof(cq_piece))
        if pieces == NULL:
            raise MemoryError
        try:
            for i in range(count):
                slot = cq_claim_slot(self.core, &claim.tasks, i)
                if slot != NULL:
                    self.cut_piece(slot, chunks, keep, &pieces[kept])
                    kept += 1
            if kept == 0:
                return b""
            if single and kept > 1:
                raise ValueError("a single assignment has one task")
            size = cq_assignment_size(&claim.tasks.splice, pieces, kept)
            message = PyBytes_FromStringAndSize(NULL, size)
            cq_assignment_put(<uint8_t *>PyBytes_AS_STRING(message), &claim.tasks.splice, pieces,
                              kept, single)
        finally:
            free(pieces)
        self.drop_bodies(claim)
        return message

    cdef int cut_piece(self, cq_slot *slot, object chunks, list keep, cq_piece *piece) except -1:
        cdef cq_body body
        cdef cq_record record
        cdef cq_bytes stored
        if slot.body != NULL:
            stored = body_of(slot)
        else:
            self.read_stored(slot, chunks, keep, &record)
            stored = record.stored
        if cq_body_split(stored, slot.flags, &body) != CQ_DONE:
            raise CorruptRecord(f"the stored body of task {id_text(slot.id)} is damaged")
        piece.id = slot.id
        piece.head = body.head
        piece.tail = body.tail
        piece.created_ms = body.created_ms
        piece.attempts = slot.attempts
        return 0

    cdef int read_stored(self, cq_slot *slot, chunks, list keep, cq_record *record) except -1:
        cdef uint64_t number = cq_id_number(slot.id)
        if chunks is not None and slot.created_chunk in chunks:
            if find_record(chunks, slot.created_chunk, number, False, record, keep):
                raise CorruptRecord(f"chunk {slot.created_chunk} lacks the task {id_text(slot.id)}")
            return 0
        for seq in chunks or ():  # carried since they were read: the body is the same
            if not find_record(chunks, seq, number, False, record, keep):
                return 0
        raise KeyError(slot.created_chunk)

    cdef void drop_bodies(self, Claim claim) noexcept:
        cdef cq_slot *slot
        cdef uint32_t i
        for i in range(claim.tasks.tasks.count):
            slot = cq_claim_slot(self.core, &claim.tasks, i)
            if slot != NULL:
                cq_slot_drop_body(self.core, slot)

    def claimed_views(self, Claim claim not None, chunks=None):
        cdef cq_slot *slot
        cdef cq_record record
        cdef TaskView view
        cdef uint32_t i
        cdef list views = [], keep = []
        self.enter()
        for i in range(claim.tasks.tasks.count):
            slot = cq_claim_slot(self.core, &claim.tasks, i)
            if slot == NULL:
                continue
            view = view_of(slot)
            if slot.body != NULL:
                view.read_body(body_of(slot), slot.flags)
            else:
                self.read_stored(slot, chunks, keep, &record)
                view.read_body(record.stored, slot.flags)
            views.append(view)
        self.drop_bodies(claim)
        return views

    def delivered(self, Claim claim not None):
        self.enter()
        cq_claim_delivered(self.core, &claim.tasks)

    def give_back(self, Claim claim not None, int64_t now_ms):
        cdef uint32_t count
        self.enter()
        self.leave(cq_claim_give_back(self.core, &claim.tasks, now_ms, &count))
        return count

    cdef cq_caller caller(
        self, bytes tenant, bytes worker, bytes subject, int64_t attempt
    ) noexcept:
        cdef cq_caller caller
        caller.tenant = bytes_of(tenant)
        caller.worker = bytes_of(worker)
        caller.subject = bytes_of(subject)
        caller.attempt = attempt
        return caller

    def heartbeat(
        self, bytes task_id not None, bytes tenant not None, bytes worker not None,
        bytes subject not None, int64_t attempt, int64_t lease_ms, int64_t now_ms,
    ):
        cdef cq_code code
        cdef cq_caller caller = self.caller(tenant, worker, subject, attempt)
        self.enter()
        self.leave(cq_task_heartbeat(self.core, id_of(task_id), &caller, lease_ms, now_ms, &code))
        return <int>code

    def abandon(
        self, bytes task_id not None, bytes tenant not None, bytes worker not None,
        bytes subject not None, int64_t attempt, int64_t now_ms,
    ):
        cdef cq_code code
        cdef cq_caller caller = self.caller(tenant, worker, subject, attempt)
        self.enter()
        self.leave(cq_task_abandon(self.core, id_of(task_id), &caller, now_ms, &code))
        return <int>code

    def nack(
        self, bytes task_id not None, bytes tenant not None, bytes worker not None,
        bytes subject not None, int64_t attempt,
        int64_t delay_ms, bytes reason not None, int64_t now_ms,
    ):
        cdef cq_code code
        cdef c_bool dead
        cdef cq_caller caller = self.caller(tenant, worker, subject, attempt)
        self.enter()
        self.leave(cq_task_nack(self.core, id_of(task_id), &caller, bytes_of(reason), now_ms, &code,
                                &delay_ms, &dead))
        return (<int>code, delay_ms if code == CQ_OK else 0, dead != 0)

    def finish(
        self, Finishes finishes not None, bytes tenant not None, bytes worker not None,
        bytes subject not None, int64_t attempt,
        int64_t now_ms, Py_ssize_t begin=0, Py_ssize_t end=-1,
    ):
        cdef uint32_t ended
        cdef Py_ssize_t count = part_of(finishes.count, begin, end)
        cdef cq_caller caller = self.caller(tenant, worker, subject, attempt)
        self.enter()
        self.leave(cq_task_finish(self.core, finishes.items + begin, count, &caller, now_ms,
                                  &ended))
        return ended

    def cancel(self, bytes task_id not None, bytes tenant not None, int64_t now_ms):
        cdef cq_code code
        self.enter()
        self.leave(cq_task_cancel(self.core, id_of(task_id), bytes_of(tenant), now_ms, &code))
        return <int>code

    cdef bint elsewhere(self, bytes task_id, bytes tenant, bytes command) except -1:
        """Whether a command is named and the task is of another one."""
        cdef cq_slot *slot
        if command is None:
            return False
        slot = cq_task_find(self.core, id_of(task_id), bytes_of(tenant))
        return slot != NULL and not cq_bytes_equal(slot.queue.command, bytes_of(command))

    def requeue(
        self, bytes task_id not None, bytes tenant not None, int64_t now_ms, bytes command=None,
    ):
        cdef cq_code code
        self.enter()
        if self.elsewhere(task_id, tenant, command):
            return <int>CQ_NOT_FOUND
        self.leave(cq_task_requeue(self.core, id_of(task_id), bytes_of(tenant), now_ms, &code))
        return <int>code

    def purge(
        self, bytes task_id not None, bytes tenant not None, int64_t now_ms, bytes command=None,
    ):
        cdef cq_code code
        self.enter()
        if self.elsewhere(task_id, tenant, command):
            return <int>CQ_NOT_FOUND
        self.leave(cq_task_purge(self.core, id_of(task_id), bytes_of(tenant), now_ms, &code))
        return <int>code

    # --- many tasks, in creation order

    cdef cq_walk walk_over(
        self, bytes tenant, bytes command, uint32_t states, uint64_t begin, uint64_t end,
        uint32_t looks,
    ) noexcept:
        cdef cq_walk walk
        memset(&walk, 0, sizeof(walk))
        if tenant is not None:
            walk.tenant = bytes_of(tenant)
        if command is not None:
            walk.command = bytes_of(command)
        walk.states = states
        walk.next = begin
        walk.end = end
        walk.looks = looks
        cq_walk_begin(self.core, &walk)
        return walk

    def walk(
        self, bytes tenant, bytes command, uint32_t states, uint64_t begin, uint64_t end,
        uint32_t looks, Py_ssize_t count_max, int64_t bytes_max,
    ):
        cdef cq_slot *slot
        cdef TaskView view
        cdef list views = []
        cdef int64_t size = 0
        self.enter()
        cdef cq_walk walk = self.walk_over(tenant, command, states, begin, end, looks)
        while len(views) < count_max and (not views or size <= bytes_max):
            slot = cq_walk_next(self.core, &walk)
            if slot == NULL:
                break
            view = view_of(slot)
            if view.has_record and view.expires_ms <= self.core.now_ms:
                continue
            size += slot.body_len
            if is_live(slot) and slot.body != NULL:
                view.read_body(body_of(slot), slot.flags)
            else:
                view.body_chunk = slot.created_chunk
            views.append(view)
        self.looked += looks - walk.looks
        return views, walk.next

    cdef tuple each(
        self, cq_slot_change *change, bytes tenant, bytes command, uint32_t states, uint64_t begin,
        uint64_t end, uint32_t looks, uint32_t count_max, int64_t now_ms,
    ):
        cdef uint32_t count
        self.enter()
        cdef cq_walk walk = self.walk_over(tenant, command, states, begin, end, looks)
        self.leave(cq_walk_each(self.core, &walk, change, count_max, now_ms, &count))
        self.looked += looks - walk.looks
        return (count, walk.next)

    def cancel_many(
        self, bytes tenant not None, bytes command not None, bint ready, bint delayed,
        uint64_t begin, uint64_t end, uint32_t looks, uint32_t count_max, int64_t now_ms,
    ):
        cdef uint32_t states = (1 << CQ_READY if ready else 0) | (1 << CQ_DELAYED if delayed else 0)
        return self.each(&cq_slot_cancel, tenant, command, states, begin, end, looks, count_max,
                         now_ms)

    def requeue_many(
        self, bytes tenant not None, bytes command not None, uint64_t begin, uint32_t count_max,
        int64_t now_ms,
    ):
        return self.each(&cq_slot_requeue, tenant, command, 1 << CQ_DEAD, begin,
                         self.core.next_number, count_max, count_max, now_ms)

    def purge_many(
        self, bytes tenant not None, bytes command not None, uint64_t begin, uint32_t count_max,
        int64_t now_ms,
    ):
        return self.each(&cq_slot_purge, tenant, command, 1 << CQ_DEAD, begin,
                         self.core.next_number, count_max, count_max, now_ms)

    def forget(
        self, bytes tenant not None, int64_t before_ms, uint64_t begin, uint64_t end,
        uint32_t looks, uint32_t count_max, int64_t now_ms,
    ):
        cdef uint32_t count
        cdef uint32_t states = 1 << CQ_COMPLETED | 1 << CQ_FAILED | 1 << CQ_DEAD
        self.enter()
        cdef cq_walk walk = self.walk_over(tenant, None, states, begin, end, looks)
        self.leave(cq_walk_forget(self.core, &walk, before_ms, count_max, now_ms, &count))
        self.looked += looks - walk.looks
        return (count, walk.next, looks - walk.looks)

    def gone(self, uint64_t number, int64_t now_ms):
        self.enter()
        self.leave(cq_walk_gone(self.core, number, now_ms))

    @property
    def next_number(self):
        return self.core.next_number

    # --- pauses and policies

    def pause(self, bytes tenant not None, bytes command not None):
        self.enter()
        self.leave(cq_queue_pause(self.core, bytes_of(tenant), bytes_of(command)))

    def resume(self, bytes tenant not None, bytes command not None):
        self.enter()
        self.leave(cq_queue_resume(self.core, bytes_of(tenant), bytes_of(command)))

    def govern(
        self, bytes tenant not None, bytes command not None, uint32_t tiers=0,
        int32_t max_attempts=0, uint32_t consumers_max=0, int64_t retention_ms=0,
    ):
        cdef cq_policy policy = cq_policy(tiers, max_attempts, consumers_max, retention_ms)
        self.enter()
        check(cq_queue_govern(self.core, bytes_of(tenant), bytes_of(command), &policy))

    def count_consumers(self):
        self.enter()
        self.leave(cq_consumers_count(self.core))

    def limited(self, bytes tenant not None, bytes command, bytes worker=None):
        cdef cq_queue *queue
        cdef cq_tenant *owner = cq_tenant_find(self.core, bytes_of(tenant))
        queue = NULL if owner == NULL else owner.limited
        if queue != NULL and command is not None:
            queue = cq_queue_find(self.core, bytes_of(tenant), bytes_of(command))
        while queue != NULL:
            if queue.limited and queue.top != NULL and not queue.rule.paused:
                if worker is None or cq_queue_admits(self.core, queue, bytes_of(worker)):
                    return True
            queue = queue.next_limited if command is None else NULL
        return False

    # --- time

    def tick(self, int64_t now_ms, int64_t limit):
        cdef int64_t moved
        self.enter()
        self.leave(cq_task_tick(self.core, now_ms, limit, &moved))
        return moved

    def next_due_ms(self):
        return self.core.due.items[0].rank if self.core.due.count else None

    # --- what parked claims and watchers need

    def touched(self):
        cdef cq_queue *queue
        cdef uint32_t i
        cdef list touched = []
        self.enter()
        for i in range(self.core.touched_count):
            queue = self.core.touched[i]
            queue.touched_at = 0
            touched.append((to_bytes(queue.tenant.name), to_bytes(queue.command)))
        self.core.touched_count = 0
        return touched

    def ready_count(self, bytes tenant not None, bytes command not None):
        cdef cq_queue *queue = cq_queue_find(self.core, bytes_of(tenant), bytes_of(command))
        return queue.ready if queue != NULL else 0

    def watch(self, bytes task_id not None):
        cdef cq_slot *slot
        self.enter()
        slot = cq_table_find(&self.core.table, id_of(task_id))
        if slot == NULL or not is_live(slot):
            return False
        slot.flags = slot.flags | CQ_FLAG_WATCHED
        return True

    def ended(self):
        cdef size_t at
        cdef list ids = []
        self.enter()
        for at in range(0, self.core.ended_ids.len, CQ_ID_BYTES):
            ids.append(PyBytes_FromStringAndSize(
                <const char *>self.core.ended_ids.data + at, CQ_ID_BYTES))
        self.core.ended_ids.len = 0
        return ids

    # --- reading

    def view(self, bytes task_id not None, bytes tenant not None):
        cdef cq_slot *slot
        cdef TaskView view
        self.enter()
        slot = cq_task_find(self.core, id_of(task_id), bytes_of(tenant))
        if slot == NULL:
            return None
        view = view_of(slot)
        if view.has_record and view.expires_ms <= self.core.now_ms:
            return None
        if is_live(slot) and slot.body != NULL:
            view.read_body(body_of(slot), slot.flags)
        else:
            view.body_chunk = slot.created_chunk
        return view

    def directory_keys(self, bytes task_id not None):
        cdef uint64_t number = cq_id_number(id_of(task_id))
        if number >= self.core.next_number:
            return []
        return [numbered_key(c"d", number // CQ_BUCKET_SLOTS), numbered_key(c"e", number)]

    cdef bint find_stored(
        self, bytes task_id, values, uint64_t *created, uint64_t *ended
    ) except -1:
        """Where the task stands by the values of its directory keys; False = nowhere."""
        cdef uint64_t number = cq_id_number(id_of(task_id))
        cdef Py_ssize_t i
        cdef bytes value
        cdef cq_status status
        for i in reversed(range(len(values))):
            value = values[i]
            if value is None:
                continue
            status = cq_directory_read(bytes_of(value), i == 1, number, created, ended)
            if status == CQ_MALFORMED:
                raise CorruptRecord(f"the directory of task {id_text(id_of(task_id))} is damaged")
            if (status == CQ_DONE and created[0] >= self.core.log.tail
                    and ended[0] >= self.core.log.tail):
                return True
        return False

    def view_stored(self, bytes task_id not None, bytes tenant not None, values not None):
        cdef uint64_t created, ended
        cdef TaskView view
        if not self.find_stored(task_id, values, &created, &ended):
            return None
        view = new_view(id_of(task_id))
        view.tenant = tenant.decode(errors="replace")
        view.has_record = True
        view.body_chunk = created
        view.record_chunk = ended
        return view

    def holds(self, bytes task_id not None):
        cdef cq_slot *slot
        self.enter()
        slot = cq_table_find(&self.core.table, id_of(task_id))
        if slot == NULL:
            return None
        return slot.state != CQ_GONE and (is_live(slot) or slot.due_ms > self.core.now_ms)

    def holds_stored(self, bytes task_id not None, values not None):
        cdef uint64_t created, ended
        return self.find_stored(task_id, values, &created, &ended)

    def stats(self, bytes tenant not None, bytes command not None):
        cdef cq_queue *queue = cq_queue_find(self.core, bytes_of(tenant), bytes_of(command))
        if queue == NULL:
            return (0, 0, 0, 0)
        return (queue.ready, queue.delayed, queue.leased, queue.dead)

    def queues(self, bytes tenant):
        self.enter()
        return queue_rows(self.core, tenant)

    def command_stats(self):
        self.enter()
        return command_rows(self.core)

    def ready_since(self):
        self.enter()
        return ready_since(self.core)

    def tallies(self, bytes tenant, Py_ssize_t count_max):
        self.enter()
        return tally_rows(self.core, tenant, count_max)

    def leases(self, bytes tenant):
        self.enter()
        return lease_rows(self.core, tenant)

    @property
    def live_tasks(self):
        return self.core.live

    @property
    def body_bytes(self):
        return self.core.body_bytes

    # --- the open group

    @property
    def pending_records(self):
        return self.core.log.records

    @property
    def pending_bytes(self):
        return self.core.log.out.len + self.core.log.puts.len

    def take(self):
        cdef list group = []
        cdef cq_bytes key, value
        cdef size_t i, count, at = 0
        cdef cq_log *log = &self.core.log
        self.enter()
        self.leave(cq_log_close(self.core))
        count = cq_log_chunk(log, <size_t>-1, &value)
        for i in range(count):
            cq_log_chunk(log, i, &value)
            group.append((numbered_key(c"c", log.first_seq + i), to_bytes(value)))
        while cq_log_entry(log, &at, &key, &value):
            group.append((to_bytes(key), to_bytes(value)))
        cq_log_taken(self.core)
        return group

    # --- removal

    def expired(self, int64_t now_ms):
        return cq_log_expired(self.core, now_ms)

    def trim(self, int64_t now_ms, uint64_t keep=<uint64_t>-1):
        cdef uint64_t start, end
        self.enter()
        if cq_log_trim(self.core, now_ms, keep, &start, &end):
            return (start, end)

    def straggler_chunks(self):
        cdef uint64_t start, end
        self.enter()
        if cq_log_straggler(self.core, &start, &end):
            return (start, end)

    def carry(self, uint64_t seq, bytes chunk not None, int64_t now_ms):
        cdef uint32_t count
        self.enter()
        cdef cq_status status = cq_log_carry(self.core, seq, bytes_of(chunk), now_ms, &count)
        if status == CQ_MALFORMED:
            raise CorruptRecord(f"chunk {seq} is damaged")
        self.leave(status)
        return count

    @property
    def tail(self):
        return self.core.log.tail

    # --- recovery

    def load_head(self, bytes value):
        cdef uint32_t shard_count
        cdef cq_status status
        self.enter()
        if self.core.next_number or self.core.loading:
            raise RuntimeError("load_head is for a new engine")
        if value is None:
            return self.core.log.next_seq
        status = cq_load_head(self.core, bytes_of(value), &shard_count)
        if status == CQ_FULL:
            raise ValueError("the store has a format that this version does not read")
        if status == CQ_MALFORMED:
            raise CorruptRecord("the head (key mhead) is damaged")
        check(status)
        if shard_count != self.core.set.shard_count:
            raise ValueError(f"the store was made with numShards {shard_count}, "
                             f"the settings say {self.core.set.shard_count}")
        return self.core.scan_next

    def load_segment(self, bytes key not None, bytes value not None):
        self.enter()
        cdef cq_status status = cq_load_segment(self.core, bytes_of(key), bytes_of(value))
        if status == CQ_MALFORMED:
            raise CorruptRecord(f"the segment entry {key.hex()} is damaged")
        check(status)

    def load_chunk(self, uint64_t seq, bytes chunk not None):
        self.enter()
        cdef cq_status status = cq_load_chunk(self.core, seq, bytes_of(chunk))
        if status == CQ_MALFORMED:
            raise CorruptRecord(f"chunk {seq} is damaged, or not the next ({self.core.scan_next})")
        check(status)

    def load_done(self, int64_t now_ms, int64_t lease_grace_ms):
        self.enter()
        cdef cq_status status = cq_load_done(self.core, now_ms, lease_grace_ms)
        if status == CQ_MALFORMED:
            raise CorruptRecord(f"the log is not whole: chunk {self.core.scan_next} or a segment "
                                "entry is missing, or records contradict each other")
        self.leave(status)

    def verify(self):
        self.enter()
        cq_engine_verify(self.core)

    def digest(self):
        self.enter()
        return cq_engine_digest(self.core)
