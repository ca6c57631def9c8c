"""What a task is at one moment, and how its bytes are found in chunks."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from codeq.engine._engine cimport (
    CQ_DELAYED, CQ_ID_BYTES, CQ_LEASED, CQ_READY, cq_record, cq_slot
)
from codeq.engine._wire cimport cq_bytes


cdef inline cq_bytes bytes_of(bytes text) noexcept:
    return cq_bytes(<const uint8_t *>PyBytes_AS_STRING(text), <uint32_t>PyBytes_GET_SIZE(text))


cdef inline const uint8_t *id_of(bytes task_id) except NULL:
    if PyBytes_GET_SIZE(task_id) != CQ_ID_BYTES:
        raise ValueError("an id has 16 bytes")
    return <const uint8_t *>PyBytes_AS_STRING(task_id)


cdef inline bytes to_bytes(cq_bytes run):
    return PyBytes_FromStringAndSize(<const char *>run.ptr, run.len)


cdef inline str to_text(cq_bytes run):
    return PyUnicode_DecodeUTF8(<const char *>run.ptr, run.len, "replace")


cdef inline bint is_live(const cq_slot *slot) noexcept:
    return slot.state == CQ_READY or slot.state == CQ_DELAYED or slot.state == CQ_LEASED


cdef inline cq_bytes body_of(const cq_slot *slot) noexcept:
    return cq_bytes(slot.body, slot.body_len)


cdef class TaskView:
    cdef public str id
    cdef public bytes id_bytes
    cdef public str command
    cdef public bytes payload
    cdef public int priority
    cdef public str webhook
    cdef public int max_attempts
    cdef public str tenant
    cdef public int64_t created_ms
    cdef public str trace_parent
    cdef public str trace_state
    cdef public int state
    cdef public int attempts
    cdef public int64_t updated_ms
    cdef public int64_t due_ms
    cdef public str worker
    cdef public str error
    cdef public int64_t ended_ms
    cdef public int64_t expires_ms
    cdef public bint has_record
    cdef public object record_chunk
    cdef public bytes result
    cdef public bytes artifacts
    cdef public str ended_worker
    cdef public str ended_subject
    cdef public object body_chunk

    cdef int read_body(self, cq_bytes stored, uint8_t flags) except -1
    cdef int read_ended(self, const cq_record *record) except -1


cdef str id_text(const uint8_t *task_id)
cdef bytes numbered_key(char prefix, uint64_t number)
cdef int find_record(object chunks, uint64_t seq, uint64_t number, bint ended, cq_record *record,
                     list keep) except -1
cdef TaskView new_view(const uint8_t *task_id)
cdef TaskView view_of(const cq_slot *slot)
