"""The batches that decoder, edges and engine share, and the C types of csrc/codeq.h they hold.

Whoever passes items to C cimports the C types from here: one declaration, one type.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "codeq.h":
    const int CQ_ID_BYTES
    const int CQ_ID_TEXT_BYTES
    const uint32_t CQ_TEXT_BYTES_MAX
    const int64_t CQ_NEVER
    const uint32_t CQ_WIRE_ITEMS_MAX

    ctypedef enum cq_status:
        CQ_DONE
        CQ_NO_MEMORY
        CQ_MALFORMED
        CQ_FULL

    ctypedef enum cq_code:
        CQ_OK
        CQ_COMMAND_REQUIRED
        CQ_COMMAND_INVALID
        CQ_WEBHOOK_INVALID
        CQ_RUN_AT_INVALID
        CQ_DELAY_INVALID
        CQ_PRIORITY_INVALID
        CQ_KEY_INVALID
        CQ_BODY_INVALID
        CQ_PAYLOAD_TOO_LARGE
        CQ_RESULT_TOO_LARGE
        CQ_KEY_CONFLICT
        CQ_UNAVAILABLE
        CQ_NOT_FOUND
        CQ_TASK_NOT_FOUND
        CQ_NOT_IN_PROGRESS
        CQ_NOT_OWNER
        CQ_STATUS_INVALID
        CQ_ERROR_REQUIRED
        CQ_RESULT_JSON_INVALID
        CQ_ARTIFACT_INVALID
        CQ_NOT_PENDING
        CQ_WORKER_ID_INVALID
        CQ_PRIORITY_NO_TIER
        CQ_ENDED
        CQ_ABSENT

    ctypedef struct cq_bytes:
        const uint8_t *ptr
        uint32_t len

    ctypedef struct cq_create:
        uint64_t seq
        cq_bytes command
        cq_bytes payload
        cq_bytes webhook
        cq_bytes key
        cq_bytes trace_parent
        cq_bytes trace_state
        int64_t run_at_ms
        int32_t priority
        int32_t max_attempts
        int32_t delay_seconds
        int32_t same_as
        uint8_t code
        uint8_t replayed
        uint8_t id[16]

    ctypedef struct cq_finish:
        cq_bytes task_id
        cq_bytes status
        cq_bytes result
        cq_bytes error
        cq_bytes artifacts
        cq_bytes worker
        int64_t completed_ms
        uint8_t id[16]
        uint8_t has_result
        uint8_t completed
        uint8_t code

    cq_bytes cq_utf8_cut(cq_bytes text, uint32_t len_max)
    bint cq_json_valid(cq_bytes text)
    void cq_id_format(const uint8_t *id, uint8_t *text)
    bint cq_id_parse(cq_bytes text, uint8_t *id)
    void cq_create_check(cq_create *create, uint32_t payload_bytes_max)
    void cq_finish_check(cq_finish *finish, uint32_t result_bytes_max, bint lenient_error)

    ctypedef enum cq_stream:
        CQ_PRODUCER_EVENT
        CQ_PRODUCER_SERVER_EVENT
        CQ_WORKER_EVENT
        CQ_WORKER_SERVER_EVENT

    ctypedef struct cq_texts:
        cq_bytes *items
        uint32_t count
        uint32_t cap

    ctypedef struct cq_call:
        cq_bytes text[2]
        int32_t number[2]
        cq_texts commands

    ctypedef struct cq_ack:
        uint64_t seq
        cq_bytes task_id
        cq_bytes error
        int32_t delay_seconds
        uint8_t ok
        uint8_t dead

    ctypedef struct cq_task:
        cq_bytes id
        cq_bytes command
        cq_bytes payload
        cq_bytes webhook
        cq_bytes status
        cq_bytes worker
        cq_bytes lease_until
        cq_bytes tenant
        int64_t created_ms
        int64_t updated_ms
        int32_t priority
        int32_t max_attempts
        int32_t attempts

    ctypedef struct cq_event:
        uint32_t member
        uint32_t count
        uint32_t cap
        void *records

    cq_status cq_event_decode(cq_stream stream, cq_bytes message, cq_event *event)
    void cq_event_free(cq_stream stream, cq_event *event)
    size_t cq_record_size(cq_stream stream, uint32_t member, const void *record)
    size_t cq_event_fit(const size_t *sizes, size_t count, size_t len_max, size_t *len)
    size_t cq_event_size(size_t record_size)
    void cq_event_put(
        cq_stream stream, uint32_t member, const void *records, const size_t *sizes, size_t count,
        uint8_t *to,
    )


cdef inline cq_bytes bytes_of(bytes text) except *:
    """Borrows; the caller keeps ``text`` alive. No protobuf field may pass 2^31 - 1 bytes."""
    cdef cq_bytes out
    if text is None:
        raise TypeError("expected bytes, got None")
    if PyBytes_GET_SIZE(text) > INT32_MAX:
        raise OverflowError("a text of a message has at most 2147483647 bytes")
    out.ptr = <const uint8_t *>PyBytes_AS_STRING(text)
    out.len = <uint32_t>PyBytes_GET_SIZE(text)
    return out


cdef inline str str_of(cq_bytes text):
    return PyUnicode_DecodeUTF8(<const char *>text.ptr, text.len, "replace")


cdef inline bytes copy_of(cq_bytes text):
    return PyBytes_FromStringAndSize(<const char *>text.ptr, text.len)


cdef inline str id_text(const uint8_t *id):
    cdef uint8_t text[36]
    cq_id_format(id, text)
    return PyUnicode_DecodeUTF8(<const char *>text, CQ_ID_TEXT_BYTES, NULL)


# Field numbers of the oneof members in proto/.
cdef enum:
    PRODUCER_HELLO = 1
    PRODUCER_CREATE = 2
    PRODUCER_CREATE_BATCH = 3

    PRODUCER_HELLO_ACK = 1
    PRODUCER_CREATE_ACK = 2
    PRODUCER_ERROR = 3
    PRODUCER_CREATE_ACK_BATCH = 4

    WORKER_HELLO = 1
    WORKER_READY = 2
    WORKER_RESULT = 3
    WORKER_NACK = 4
    WORKER_HEARTBEAT = 5
    WORKER_ABANDON = 6
    WORKER_RESULT_BATCH = 7

    WORKER_HELLO_ACK = 1
    WORKER_TASK = 2
    WORKER_RESULT_ACK = 3
    WORKER_HEARTBEAT_ACK = 4
    WORKER_NACK_ACK = 5
    WORKER_ABANDON_ACK = 6
    WORKER_ERROR = 7
    WORKER_TASK_BATCH = 8
    WORKER_RESULT_ACK_BATCH = 9


cdef class _Batch:
    cdef Py_ssize_t count         # items
    cdef Py_ssize_t capacity      # items there is room for
    cdef list keep                # the bytes objects that the items point into
    cdef Py_ssize_t kept_bytes    # sum of their lengths

    cdef cq_bytes borrow(self, bytes text) except *
    cdef void *grown(self, void *items, size_t item_bytes) except NULL
    cdef void *adopt(self, cq_event *event, bytes message)


@cython.final
cdef class Creates(_Batch):
    cdef cq_create *items         # in the order of the request

    cdef Py_ssize_t append(self, const cq_create *item) except -1
    cdef cq_create *at(self, Py_ssize_t index) except NULL
    cdef const cq_create *origin(self, Py_ssize_t index) except NULL


@cython.final
cdef class Finishes(_Batch):
    cdef cq_finish *items

    cdef Py_ssize_t append(self, const cq_finish *item) except -1
    cdef cq_finish *at(self, Py_ssize_t index) except NULL


@cython.final
cdef class Tasks:
    cdef cq_task *items           # point into the message
    cdef Py_ssize_t count
    cdef bytes message


cdef class ClientTask:
    cdef Tasks tasks
    cdef const cq_task *task
    cdef readonly int32_t priority, attempts, max_attempts
    cdef readonly int64_t created_ms, updated_ms

    cdef void bind(self, Tasks tasks, Py_ssize_t index) noexcept


cdef int decode(cq_stream stream, bytes message, cq_event *event) except -1
cdef Tasks tasks_of(cq_event *event, bytes message)
