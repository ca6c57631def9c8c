"""The part of csrc/codeq.h that reads a damaged log."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from codeq.engine._wire cimport cq_bytes


cdef extern from "codeq.h":
    enum:
        CQ_ID_BYTES
        CQ_BUCKET_SLOTS
        CQ_CHUNK_FRAME
        CQ_CHUNK_VERSION
        CQ_HEAD_BYTES
        CQ_FLAG_KEY

    ctypedef enum cq_status:
        CQ_DONE
        CQ_NO_MEMORY
        CQ_MALFORMED
        CQ_FULL

    ctypedef enum cq_state:
        CQ_COMPLETED
        CQ_FAILED
        CQ_DEAD
        CQ_GONE

    ctypedef enum cq_record_kind:
        CQ_RECORD_ACTOR
        CQ_RECORD_CREATED
        CQ_RECORD_ENDED
        CQ_RECORD_CARRIED
        CQ_RECORD_PURGED

    ctypedef struct cq_settings:
        uint32_t shard_count
        int32_t max_attempts_default

    ctypedef struct cq_slot:
        uint8_t state

    ctypedef struct cq_table:
        pass

    ctypedef struct cq_buffer:
        size_t len

    ctypedef struct cq_log:
        cq_buffer puts

    ctypedef struct cq_heap_entry:
        uint64_t number

    ctypedef struct cq_heap:
        cq_heap_entry *items
        uint32_t count

    ctypedef struct cq_engine:
        cq_table table
        cq_heap due
        cq_log log
        int64_t live

    ctypedef struct cq_record:
        uint8_t kind
        uint8_t flags
        uint8_t state
        uint64_t number
        const uint8_t *id
        int64_t key_end_ms
        cq_bytes key
        cq_bytes stored

    ctypedef struct cq_body:
        cq_bytes tenant
        int64_t created_ms

    uint64_t cq_id_number(const uint8_t *id)
    uint64_t cq_get_le(const uint8_t *at, int count)
    uint64_t cq_get_be64(const uint8_t *at)
    uint8_t *cq_put_le(uint8_t *to, uint64_t value, int count)
    uint32_t cq_crc32c(const void *ptr, size_t len)
    cq_slot *cq_table_at(const cq_table *table, uint64_t number)
    cq_engine *cq_engine_new(const cq_settings *settings)
    void cq_engine_free(cq_engine *engine)
    void cq_engine_verify(const cq_engine *engine)
    cq_status cq_chunk_open(cq_bytes chunk, cq_bytes *records)
    cq_status cq_record_next(cq_bytes *rest, cq_record *record)
    cq_status cq_body_read(cq_bytes stored, uint8_t flags, cq_body *body)
    cq_status cq_log_close(cq_engine *engine)
    bint cq_log_entry(const cq_log *log, size_t *at, cq_bytes *key, cq_bytes *value)
    void cq_log_taken(cq_engine *engine)
    cq_status cq_directory_read(cq_bytes value, bint own, uint64_t number, uint64_t *created,
                                uint64_t *ended)
    cq_status cq_load_done(cq_engine *engine, int64_t now_ms, int64_t grace_ms)
    cq_status cq_salvage_begin(cq_engine *engine, uint64_t tail, uint64_t next_seq,
                               uint64_t next_number, int64_t last_id_ms)
    cq_status cq_salvage_record(cq_engine *engine, const cq_record *record)
    cq_status cq_salvage_chunk(cq_engine *engine, size_t chunk_len)
