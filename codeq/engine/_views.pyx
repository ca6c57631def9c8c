"""Tasks as replies show them, from a slot in memory or from the chunks and directories on disk.

Nothing here needs the engine, so helper threads may use what only reads bytes.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp

from codeq.engine._engine cimport (
    CQ_BUCKET_SLOTS, CQ_COMPLETED, CQ_DEAD, CQ_DIRECTORY_BYTES, CQ_DONE, CQ_FAILED, CQ_FULL,
    CQ_ID_BYTES, CQ_ID_TEXT_BYTES, CQ_MALFORMED, CQ_RECORD_ENDED, CQ_RECORD_HAS_RESULT, cq_body,
    cq_body_read, cq_bytes_equal, cq_directory_forget, cq_directory_read, cq_get_be64, cq_id_format,
    cq_id_number, cq_put_be64, cq_record, cq_record_find, cq_slot, cq_status
)
from codeq.engine._wire cimport cq_bytes

from codeq.model import RESULT_KEY as _RESULT_KEY, Task, rfc3339


class CorruptRecord(ValueError):
    """Bytes read from the store are not what was written; the text says which chunk or key."""


cdef str id_text(const uint8_t *task_id):
    cdef uint8_t text[36]
    cq_id_format(task_id, text)
    return PyUnicode_DecodeUTF8(<const char *>text, CQ_ID_TEXT_BYTES, NULL)


cdef bytes numbered_key(char prefix, uint64_t number):
    cdef uint8_t key[9]
    key[0] = <uint8_t>prefix
    cq_put_be64(key + 1, number)
    return PyBytes_FromStringAndSize(<const char *>key, sizeof(key))


cdef int find_record(object chunks, uint64_t seq, uint64_t number, bint ended, cq_record *record,
                     list keep) except -1:
    """Finds a record in a chunk, which is then kept in ``keep``; 1 = the chunk has none."""
    cdef bytes chunk = chunks[seq]
    keep.append(chunk)
    cdef cq_status status = cq_record_find(bytes_of(chunk), number, ended, record)
    if status == CQ_MALFORMED:
        raise CorruptRecord(f"chunk {seq} is damaged")
    return status == CQ_FULL


# --- views ----------------------------------------------------------------------------------------

@cython.final
@cython.no_gc  # the two attributes whose type Cython cannot see through are numbers
cdef class TaskView:
    def __cinit__(self):
        self.id = self.command = self.webhook = self.tenant = ""
        self.trace_parent = self.trace_state = self.worker = self.error = ""
        self.ended_worker = self.ended_subject = ""
        self.id_bytes = self.payload = self.artifacts = b""

    @property
    def number(self):
        return cq_id_number(id_of(self.id_bytes))

    cdef int read_body(self, cq_bytes stored, uint8_t flags) except -1:
        cdef cq_body body
        if cq_body_read(stored, flags, &body) != CQ_DONE:
            raise CorruptRecord(f"the stored body of task {self.id} is damaged")
        self.command = to_text(body.command)
        self.payload = to_bytes(body.payload)
        self.priority = body.priority
        self.webhook = to_text(body.webhook)
        self.max_attempts = body.max_attempts
        self.tenant = to_text(body.tenant)
        self.created_ms = body.created_ms
        self.trace_parent = to_text(body.trace_parent)
        self.trace_state = to_text(body.trace_state)
        return 0

    cdef int read_ended(self, const cq_record *record) except -1:
        cdef bint full = record.kind == CQ_RECORD_ENDED  # else a carried dead letter
        self.state = record.state
        self.attempts = record.attempts
        self.updated_ms = self.ended_ms = record.ended_ms
        self.expires_ms = record.expires_ms
        self.error = to_text(record.error)
        self.has_record = True
        if full:
            self.ended_worker = to_text(record.worker)
            self.ended_subject = to_text(record.subject)
            self.artifacts = to_bytes(record.artifacts)
            if record.flags & CQ_RECORD_HAS_RESULT:
                self.result = to_bytes(record.result) if record.result.len else b"null"
        return 0

    def fill(self, chunks not None):
        cdef cq_record record
        cdef list keep = []
        cdef uint64_t number = cq_id_number(id_of(self.id_bytes))
        cdef str tenant = self.tenant
        if self.body_chunk is not None:
            if find_record(chunks, self.body_chunk, number, False, &record, keep):
                raise CorruptRecord(f"chunk {self.body_chunk} lacks the task {self.id}")
            if memcmp(record.id, id_of(self.id_bytes), CQ_ID_BYTES) != 0:
                raise KeyError(self.id)
            self.read_body(record.stored, record.flags)
            if tenant and self.tenant != tenant:
                raise KeyError(self.id)
            self.body_chunk = None
        if self.record_chunk is not None:
            if find_record(chunks, self.record_chunk, number, True, &record, keep):
                raise CorruptRecord(f"chunk {self.record_chunk} lacks the end of task {self.id}")
            self.read_ended(&record)
            self.record_chunk = None

    def task(self, str status not None, str place not None):
        cdef bint leased = self.state == CQ_LEASED
        cdef object created = rfc3339(self.created_ms)
        return Task(
            self.id,
            self.command,
            to_text(bytes_of(self.payload)),
            self.priority,
            status,
            place,
            self.attempts,
            self.max_attempts,
            self.tenant,
            created,
            created if self.updated_ms == self.created_ms else rfc3339(self.updated_ms),
            self.webhook,
            self.trace_parent,
            self.trace_state,
            self.worker if leased else "",
            rfc3339(self.due_ms) if leased else "",
            self.error,
            _RESULT_KEY if self.has_record else "",
        )


def lack_chunks(list views not None):
    cdef TaskView view
    for view in views:
        if view is not None and (view.body_chunk is not None or view.record_chunk is not None):
            return True
    return False


cdef TaskView new_view(const uint8_t *task_id):
    cdef TaskView view = TaskView.__new__(TaskView)
    view.id = id_text(task_id)
    view.id_bytes = PyBytes_FromStringAndSize(<const char *>task_id, CQ_ID_BYTES)
    return view


cdef TaskView view_of(const cq_slot *slot):
    """The task as its slot has it, without the body."""
    cdef TaskView view = new_view(slot.id)
    view.tenant = to_text(slot.queue.tenant.name)
    view.state = slot.state
    view.attempts = slot.attempts
    view.updated_ms = slot.updated_ms
    if slot.error != NULL:
        view.error = PyUnicode_DecodeUTF8(<const char *>slot.error.data, slot.error.len, "replace")
    if slot.state == CQ_COMPLETED or slot.state == CQ_FAILED or slot.state == CQ_DEAD:
        view.ended_ms = slot.updated_ms
        view.expires_ms = slot.due_ms
        view.has_record = True
        view.record_chunk = slot.ended_chunk
        if slot.holder != NULL:
            view.ended_worker = to_text(slot.holder.worker)
            view.ended_subject = to_text(slot.holder.subject)
    else:
        view.due_ms = slot.due_ms if slot.state != CQ_READY else 0
        if slot.holder != NULL:
            view.worker = to_text(slot.holder.worker)
    return view


# --- what is on disk only -------------------------------------------------------------------------

def directory_entries(bytes key not None, bytes value not None):
    cdef uint64_t number, created, ended
    cdef cq_status status
    cdef bint own = PyBytes_AS_STRING(key)[0] == c"e"
    cdef uint64_t first = cq_get_be64(<const uint8_t *>PyBytes_AS_STRING(key) + 1)
    cdef list entries = []
    if not own:
        first *= CQ_BUCKET_SLOTS
    for number in range(first, first + (1 if own else CQ_BUCKET_SLOTS)):
        status = cq_directory_read(bytes_of(value), own, number, &created, &ended)
        if status == CQ_MALFORMED:
            raise CorruptRecord(f"the directory under key {key.hex()} is damaged")
        if status == CQ_DONE:
            entries.append((number, created, ended))
    return entries


def directory_without(bytes value not None, numbers):
    cdef bytes rest = PyBytes_FromStringAndSize(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
    cdef uint64_t number, created, ended
    if PyBytes_GET_SIZE(rest) != CQ_DIRECTORY_BYTES:
        raise ValueError("a directory of a bucket")
    for number in numbers:  # the copy is nobody else's yet
        cq_directory_forget(<uint8_t *>PyBytes_AS_STRING(rest), number)
    for number in range(<uint64_t>CQ_BUCKET_SLOTS):
        if cq_directory_read(bytes_of(rest), False, number, &created, &ended) == CQ_DONE:
            return rest
    return None


def stored_view(chunks not None, uint64_t number, uint64_t created, uint64_t ended, bytes tenant,
                bytes command):
    cdef cq_record record
    cdef cq_body body
    cdef TaskView view
    cdef list keep = []
    if find_record(chunks, created, number, False, &record, keep):
        raise CorruptRecord(f"chunk {created} lacks the task with the number {number}")
    if cq_body_read(record.stored, record.flags, &body) != CQ_DONE:
        raise CorruptRecord(f"the stored body of task {id_text(record.id)} is damaged")
    if tenant is not None and not cq_bytes_equal(body.tenant, bytes_of(tenant)):
        return None
    if command is not None and not cq_bytes_equal(body.command, bytes_of(command)):
        return None
    view = new_view(record.id)
    view.read_body(record.stored, record.flags)
    view.has_record = True
    view.record_chunk = ended
    return view
