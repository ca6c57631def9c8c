"""Reading a log that may be damaged: which of its records fit together, and which entries belong
beside them.

The rules are those of the start (csrc/recovery.c), so that what a salvage keeps can be started.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

EMPTY_CHUNK = b"\x01" + bytes(4)  # version, checksum of nothing

cdef list KINDS = [
    "", "actor", "created", "claimed", "kept", "returned", "ended", "carried", "requeued", "purged",
]


cdef inline cq_bytes bytes_of(bytes text) noexcept:
    return cq_bytes(<const uint8_t *>PyBytes_AS_STRING(text), <uint32_t>PyBytes_GET_SIZE(text))


cdef inline bytes to_bytes(cq_bytes run):
    return PyBytes_FromStringAndSize(<const char *>run.ptr, run.len)


cdef inline bytes id_of(const cq_record *record):
    return PyBytes_FromStringAndSize(<const char *>record.id, CQ_ID_BYTES)


cdef inline int check(cq_status status) except -1:
    if status == CQ_NO_MEMORY:
        raise MemoryError
    return 0


cdef bint checked(cq_bytes value, size_t size) noexcept:
    return (value.len == size
            and cq_get_le(value.ptr + size - 4, 4) == cq_crc32c(value.ptr, size - 4))


cdef inline bint creates(const cq_record *record) noexcept:
    return record.kind == CQ_RECORD_CREATED or record.kind == CQ_RECORD_CARRIED


# --- what stands beside the chunks ----------------------------------------------------------------

def read_head(bytes value not None):
    cdef const uint8_t *at = bytes_of(value).ptr
    if not checked(bytes_of(value), CQ_HEAD_BYTES):
        return None
    return (cq_get_le(at, 4), cq_get_le(at + 4, 4), cq_get_le(at + 8, 8),
            <int64_t>cq_get_le(at + 16, 8), cq_get_le(at + 24, 8), cq_get_le(at + 32, 8),
            cq_get_le(at + 40, 8))


def segment_sound(bytes value not None):
    return checked(bytes_of(value), 12)


def read_directory(bytes key not None, bytes value not None):
    cdef uint64_t created, ended, number, first, count = 1
    cdef cq_status status
    cdef bint own = key[:1] == b"e"
    cdef list found = []
    if len(key) != 9:
        return None
    first = cq_get_be64(bytes_of(key).ptr + 1)
    if not own:
        first *= CQ_BUCKET_SLOTS
        count = CQ_BUCKET_SLOTS
    for number in range(first, first + count):
        status = cq_directory_read(bytes_of(value), own, number, &created, &ended)
        if status == CQ_MALFORMED:
            return None
        if status == CQ_DONE:
            found.append((number, created, ended))
    return found


def task_number(bytes task_id not None):
    return cq_id_number(bytes_of(task_id).ptr) if len(task_id) == CQ_ID_BYTES else 0


# --- chunks ---------------------------------------------------------------------------------------

def chunk_sound(bytes chunk not None, set purged=None):
    cdef cq_bytes rest
    cdef cq_record record
    cdef cq_status status
    if cq_chunk_open(bytes_of(chunk), &rest) != CQ_DONE:
        return False
    status = cq_record_next(&rest, &record)
    while status == CQ_DONE:
        if record.kind == CQ_RECORD_PURGED and purged is not None:
            purged.add(record.number)
        status = cq_record_next(&rest, &record)
    return status == CQ_FULL


def created_in(bytes chunk not None):
    cdef cq_bytes rest = bytes_of(chunk)
    cdef cq_record record
    cdef list ids = []
    if rest.len < CQ_CHUNK_FRAME:
        return ids
    rest.ptr += CQ_CHUNK_FRAME
    rest.len -= CQ_CHUNK_FRAME
    while cq_record_next(&rest, &record) == CQ_DONE:
        if creates(&record):
            ids.append(id_of(&record))
    return ids


@cython.final
cdef class Salvage:
    cdef cq_engine *core
    cdef uint64_t counted[10]
    cdef readonly uint64_t ended_tasks
    cdef readonly list refused

    def __cinit__(self, *, uint32_t shard_count, uint64_t tail, uint64_t next_seq,
                  uint64_t next_number, int64_t last_id_ms):
        cdef cq_settings settings
        settings = cq_settings(shard_count=shard_count, max_attempts_default=1)
        if tail < 1 or next_seq < tail:
            raise ValueError("the log ends before it begins")
        self.core = cq_engine_new(&settings)
        if self.core == NULL:
            raise MemoryError
        check(cq_salvage_begin(self.core, tail, next_seq, next_number, last_id_ms))
        self.refused = []

    def __dealloc__(self):
        cq_engine_free(self.core)

    def chunk(self, bytes chunk not None, gone not None, list keyed not None):
        cdef cq_bytes rest
        cdef cq_record record
        cdef const uint8_t *start
        cdef list kept = []
        cdef bint whole = True
        if not chunk_sound(chunk) or cq_chunk_open(bytes_of(chunk), &rest) != CQ_DONE:
            raise ValueError("the chunk is damaged")
        start = rest.ptr
        while cq_record_next(&rest, &record) == CQ_DONE:
            if record.kind != CQ_RECORD_ACTOR and record.number in gone:
                whole = False
            elif self.take(&record, keyed):
                kept.append(PyBytes_FromStringAndSize(<const char *>start, rest.ptr - start))
            else:
                whole = False
                self.refused.append((KINDS[record.kind], record.number))
            start = rest.ptr
        check(cq_salvage_chunk(self.core, PyBytes_GET_SIZE(chunk)))
        return chunk if whole else framed(b"".join(kept))

    cdef bint take(self, const cq_record *record, list keyed) except -1:
        cdef cq_slot *slot = NULL
        cdef cq_body body
        cdef bint ends = record.kind == CQ_RECORD_ENDED and record.state != CQ_DEAD
        cdef cq_status status
        if ends:
            slot = cq_table_at(&self.core.table, record.number)
            ends = slot != NULL and not is_final(slot)
        status = cq_salvage_record(self.core, record)
        check(status)
        if status == CQ_MALFORMED:
            return False
        self.counted[record.kind] += 1
        self.ended_tasks += ends
        if creates(record) and record.flags & CQ_FLAG_KEY:
            if cq_body_read(record.stored, record.flags, &body) == CQ_DONE:
                keyed.append((id_of(record), to_bytes(body.tenant), to_bytes(record.key),
                              body.created_ms, record.key_end_ms))
        return True

    def entries(self):
        cdef list found = []
        cdef cq_bytes key, value
        cdef size_t at = 0
        while cq_log_entry(&self.core.log, &at, &key, &value):
            found.append((to_bytes(key), to_bytes(value)))
        self.core.log.puts.len = 0
        return found

    def done(self, int64_t now_ms):
        cdef cq_status status = cq_load_done(self.core, now_ms, 0)
        check(status)
        if status == CQ_MALFORMED:
            raise ValueError("what is left of the log contradicts itself")
        cq_engine_verify(self.core)
        check(cq_log_close(self.core))
        cdef list entries = self.entries()
        cq_log_taken(self.core)
        return entries

    def knows(self, uint64_t number):
        cdef cq_slot *slot = cq_table_at(&self.core.table, number)
        return slot != NULL and slot.state != CQ_GONE

    @property
    def live_tasks(self):
        return self.core.live

    @property
    def dead_letters(self):
        cdef uint32_t i
        cdef uint64_t dead = 0
        for i in range(self.core.due.count):
            dead += cq_table_at(&self.core.table, self.core.due.items[i].number).state == CQ_DEAD
        return dead

    @property
    def records(self):
        return {KINDS[kind]: self.counted[kind] for kind in range(2, 10)}


cdef bint is_final(const cq_slot *slot) noexcept:
    return slot.state == CQ_COMPLETED or slot.state == CQ_FAILED or slot.state == CQ_GONE


cdef bytes framed(bytes records):
    cdef uint8_t frame[CQ_CHUNK_FRAME]
    frame[0] = CQ_CHUNK_VERSION
    cq_put_le(frame + 1, cq_crc32c(PyBytes_AS_STRING(records), PyBytes_GET_SIZE(records)), 4)
    return PyBytes_FromStringAndSize(<const char *>frame, CQ_CHUNK_FRAME) + records
