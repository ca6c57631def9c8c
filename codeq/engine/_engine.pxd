"""The part of csrc/codeq.h that the engine's Python face uses."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from codeq.engine._wire cimport cq_bytes, cq_create, cq_finish


cdef extern from "codeq.h":
    ctypedef bint c_bool "bool"  # bool * is not bint *
    enum:
        CQ_ID_BYTES
        CQ_ID_TEXT_BYTES
        CQ_BUCKET_SLOTS
        CQ_LATENCY_BUCKETS
        CQ_FLAG_WATCHED
        CQ_FLAGS_STORED
        CQ_RECORD_HAS_RESULT
        CQ_DIRECTORY_BYTES

    ctypedef enum cq_status:
        CQ_DONE
        CQ_NO_MEMORY
        CQ_MALFORMED
        CQ_FULL

    ctypedef enum cq_code:
        CQ_OK
        CQ_NOT_FOUND

    ctypedef enum cq_state:
        CQ_READY
        CQ_DELAYED
        CQ_LEASED
        CQ_COMPLETED
        CQ_FAILED
        CQ_DEAD
        CQ_GONE

    ctypedef enum cq_record_kind:
        CQ_RECORD_ENDED

    ctypedef enum cq_backoff:
        CQ_BACKOFF_FIXED
        CQ_BACKOFF_LINEAR
        CQ_BACKOFF_EXPONENTIAL
        CQ_BACKOFF_EXP_EQUAL_JITTER
        CQ_BACKOFF_EXP_FULL_JITTER

    ctypedef struct cq_buffer:
        uint8_t *data
        size_t len

    ctypedef struct cq_node:
        cq_node *next

    ctypedef struct cq_map:
        cq_node **heads
        size_t cap

    ctypedef struct cq_heap_entry:
        int64_t rank

    ctypedef struct cq_heap:
        cq_heap_entry *items
        uint32_t count

    ctypedef struct cq_numbers:
        uint64_t *items
        uint32_t count

    ctypedef struct cq_text:
        uint32_t len
        uint8_t data[1]

    ctypedef struct cq_holder:
        uint64_t leases
        cq_holder *next_busy
        cq_bytes tenant
        cq_bytes worker
        cq_bytes subject

    ctypedef struct cq_label:
        cq_label *next
        uint64_t created
        uint64_t claimed
        uint64_t completed
        uint64_t failed
        uint64_t expired
        uint64_t latency[2][15]
        double latency_s[2]
        cq_bytes name

    ctypedef struct cq_tally:
        cq_queue *queue
        uint64_t created
        uint64_t claimed
        uint64_t completed
        uint64_t failed
        uint64_t dead
        uint64_t expired
        uint64_t latency[15]
        cq_bytes tenant
        cq_bytes command

    ctypedef struct cq_policy:
        uint32_t tiers
        int32_t max_attempts
        uint32_t consumers_max
        int64_t retention_ms

    ctypedef struct cq_rule:
        bint paused

    ctypedef struct cq_tenant:
        cq_queue *queues
        cq_queue *limited
        cq_bytes name

    ctypedef struct cq_queue:
        cq_tenant *tenant
        cq_label *label
        cq_rule *rule
        cq_queue *next_of_tenant
        cq_queue *next_limited
        cq_slot *top
        uint32_t touched_at
        uint64_t ready
        uint64_t delayed
        uint64_t leased
        uint64_t dead
        bint limited
        cq_bytes command

    ctypedef struct cq_slot:
        uint8_t id[16]
        uint8_t *body
        uint64_t ended_chunk
        cq_queue *queue
        cq_holder *holder
        cq_text *error
        int64_t created_ms
        int64_t updated_ms
        int64_t due_ms
        uint64_t created_chunk
        uint32_t body_len
        int32_t priority
        int32_t attempts
        int32_t max_attempts
        uint8_t state
        uint8_t flags

    ctypedef struct cq_log:
        cq_buffer out
        cq_buffer puts
        uint64_t first_seq
        uint64_t next_seq
        uint64_t tail
        uint64_t records
        bint changed

    ctypedef struct cq_settings:
        uint64_t seed
        uint32_t shard_count
        int64_t payload_memory_bytes
        int64_t retention_ms
        int64_t dead_retention_ms
        int64_t key_window_ms
        int32_t max_attempts_default
        cq_backoff backoff
        int64_t backoff_base_ms
        int64_t backoff_max_ms
        uint32_t command_labels_max
        int64_t straggler_slack_bytes

    ctypedef struct cq_table:
        pass

    ctypedef struct cq_engine:
        cq_settings set
        int64_t now_ms
        uint64_t next_number
        cq_table table
        cq_heap due
        cq_map queues
        cq_label *all_labels
        cq_holder *busy
        cq_queue **touched
        uint32_t touched_count
        cq_buffer ended_ids
        cq_log log
        int64_t live
        int64_t body_bytes
        uint64_t scan_next
        bint loading

    ctypedef struct cq_record:
        uint8_t kind
        uint8_t flags
        uint8_t state
        const uint8_t *id
        int64_t ended_ms
        int64_t expires_ms
        int32_t attempts
        cq_bytes worker
        cq_bytes subject
        cq_bytes error
        cq_bytes result
        cq_bytes artifacts
        cq_bytes stored

    ctypedef struct cq_body:
        cq_bytes trace_parent
        cq_bytes trace_state
        cq_bytes head
        cq_bytes tail
        cq_bytes command
        cq_bytes payload
        cq_bytes webhook
        cq_bytes tenant
        int32_t priority
        int32_t max_attempts
        int64_t created_ms

    ctypedef struct cq_piece:
        const uint8_t *id
        cq_bytes head
        cq_bytes tail
        int64_t created_ms
        int32_t attempts

    ctypedef struct cq_splice:
        pass

    ctypedef struct cq_claim:
        cq_numbers tasks
        int64_t lease_until_ms
        cq_splice splice

    ctypedef struct cq_caller:
        cq_bytes tenant
        cq_bytes worker
        cq_bytes subject
        int64_t attempt

    ctypedef struct cq_want:
        cq_bytes tenant
        const cq_bytes *commands
        size_t command_count
        bint in_order
        cq_bytes worker
        cq_bytes subject
        int64_t count_max
        int64_t lease_ms
        int64_t bytes_max
        int64_t now_ms

    bint cq_bytes_equal(cq_bytes a, cq_bytes b)
    uint64_t cq_get_be64(const uint8_t *at)
    void cq_id_format(const uint8_t *id, uint8_t *text)
    uint64_t cq_id_number(const uint8_t *id)
    uint8_t *cq_put_be64(uint8_t *to, uint64_t value)
    cq_slot *cq_table_find(const cq_table *table, const uint8_t *id)
    cq_queue *cq_queue_find(const cq_engine *engine, cq_bytes tenant, cq_bytes command)
    cq_tenant *cq_tenant_find(const cq_engine *engine, cq_bytes name)

    cq_engine *cq_engine_new(const cq_settings *settings)
    void cq_engine_free(cq_engine *engine)
    cq_status cq_task_create(cq_engine *engine, cq_create *items, size_t count, cq_bytes tenant,
                             int64_t now_ms, uint32_t *made)
    cq_status cq_task_claim(cq_engine *engine, const cq_want *want, cq_claim *claim)
    void cq_claim_free(cq_engine *engine, cq_claim *claim)
    cq_slot *cq_claim_slot(const cq_engine *engine, const cq_claim *claim, uint32_t index)
    void cq_claim_delivered(cq_engine *engine, const cq_claim *claim)
    cq_status cq_claim_give_back(cq_engine *engine, const cq_claim *claim, int64_t now_ms,
                                 uint32_t *count)
    void cq_slot_drop_body(cq_engine *engine, cq_slot *slot)
    cq_status cq_task_heartbeat(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                                int64_t lease_ms, int64_t now_ms, cq_code *code)
    cq_status cq_task_abandon(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                              int64_t now_ms, cq_code *code)
    cq_status cq_task_nack(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                           cq_bytes reason, int64_t now_ms, cq_code *code, int64_t *delay_ms,
                           c_bool *dead)
    cq_status cq_task_finish(cq_engine *engine, cq_finish *items, size_t count,
                             const cq_caller *caller, int64_t now_ms, uint32_t *ended)
    cq_status cq_task_cancel(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                             cq_code *code)
    cq_status cq_task_requeue(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                              cq_code *code)
    cq_status cq_task_purge(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                            cq_code *code)
    cq_status cq_task_tick(cq_engine *engine, int64_t now_ms, int64_t limit, int64_t *moved)
    cq_slot *cq_task_find(const cq_engine *engine, const uint8_t *id, cq_bytes tenant)

    ctypedef struct cq_walk:
        cq_bytes tenant
        cq_bytes command
        uint32_t states
        uint64_t next
        uint64_t end
        uint32_t looks
        const cq_tenant *owner
        cq_queue *queue

    ctypedef cq_status cq_slot_change(cq_engine *engine, cq_slot *slot, int64_t now_ms)
    cq_status cq_slot_cancel(cq_engine *engine, cq_slot *slot, int64_t now_ms)
    cq_status cq_slot_requeue(cq_engine *engine, cq_slot *slot, int64_t now_ms)
    cq_status cq_slot_purge(cq_engine *engine, cq_slot *slot, int64_t now_ms)
    void cq_walk_begin(const cq_engine *engine, cq_walk *walk)
    cq_slot *cq_walk_next(const cq_engine *engine, cq_walk *walk)
    cq_status cq_walk_each(cq_engine *engine, cq_walk *walk, cq_slot_change *change,
                           uint32_t count_max, int64_t now_ms, uint32_t *count)
    cq_status cq_walk_gone(cq_engine *engine, uint64_t number, int64_t now_ms)
    cq_status cq_walk_forget(cq_engine *engine, cq_walk *walk, int64_t before_ms,
                             uint32_t count_max, int64_t now_ms, uint32_t *count)
    cq_status cq_queue_pause(cq_engine *engine, cq_bytes tenant, cq_bytes command)
    cq_status cq_queue_resume(cq_engine *engine, cq_bytes tenant, cq_bytes command)
    cq_status cq_queue_govern(cq_engine *engine, cq_bytes tenant, cq_bytes command,
                              const cq_policy *policy)
    cq_status cq_consumers_count(cq_engine *engine)
    bint cq_queue_admits(const cq_engine *engine, const cq_queue *queue, cq_bytes worker)
    int64_t cq_queue_ready_since(cq_engine *engine, cq_queue *queue, uint32_t *looks)
    cq_status cq_tally_list(const cq_engine *engine, cq_bytes tenant, cq_tally ***tallies,
                            size_t *count)

    cq_status cq_record_find(cq_bytes chunk, uint64_t number, bint ended, cq_record *record)
    cq_status cq_body_split(cq_bytes stored, uint8_t flags, cq_body *body)
    cq_status cq_body_read(cq_bytes stored, uint8_t flags, cq_body *body)
    size_t cq_assignment_size(const cq_splice *splice, const cq_piece *pieces, size_t count)
    void cq_assignment_put(uint8_t *to, const cq_splice *splice, const cq_piece *pieces,
                           size_t count, bint single)

    cq_status cq_log_close(cq_engine *engine)
    size_t cq_log_chunk(const cq_log *log, size_t index, cq_bytes *chunk)
    bint cq_log_entry(const cq_log *log, size_t *at, cq_bytes *key, cq_bytes *value)
    void cq_log_taken(cq_engine *engine)
    uint64_t cq_log_expired(const cq_engine *engine, int64_t now_ms)
    bint cq_log_trim(cq_engine *engine, int64_t now_ms, uint64_t keep, uint64_t *start,
                     uint64_t *end)
    bint cq_log_straggler(cq_engine *engine, uint64_t *start, uint64_t *end)
    cq_status cq_log_carry(cq_engine *engine, uint64_t seq, cq_bytes chunk, int64_t now_ms,
                           uint32_t *count)

    cq_status cq_load_head(cq_engine *engine, cq_bytes head, uint32_t *shard_count)
    cq_status cq_load_segment(cq_engine *engine, cq_bytes key, cq_bytes value)
    cq_status cq_load_chunk(cq_engine *engine, uint64_t seq, cq_bytes chunk)
    cq_status cq_load_done(cq_engine *engine, int64_t now_ms, int64_t grace_ms)
    cq_status cq_directory_read(cq_bytes value, bint own, uint64_t number, uint64_t *created,
                                uint64_t *ended)
    void cq_directory_forget(uint8_t *value, uint64_t number)
    void cq_engine_verify(const cq_engine *engine)
    void cq_engine_check(cq_engine *engine)
    uint64_t cq_engine_digest(const cq_engine *engine)
