/* recovery.c: memory from the log, and the checks that say whether memory is what it should be. */
#include <string.h>

#include "codeq.h"

#define KEY_BYTES 9

static bool checked(cq_bytes value, size_t len)
{
    return value.len == len && cq_get_le(value.ptr + len - 4, 4) == cq_crc32c(value.ptr, len - 4);
}

/* --- head, segments, directories -------------------------------------------------------------- */

cq_status cq_load_head(cq_engine *engine, cq_bytes head, uint32_t *shard_count)
{
    CQ_ASSERT(engine->next_number == 0);
    if (head.len < 4)
        return CQ_MALFORMED;
    if (cq_get_le(head.ptr, 4) != CQ_FORMAT)
        return CQ_FULL;
    if (!checked(head, CQ_HEAD_BYTES))
        return CQ_MALFORMED;
    *shard_count = (uint32_t)cq_get_le(head.ptr + 4, 4);
    uint64_t next_seq = cq_get_le(head.ptr + 24, 8);
    uint64_t start = cq_get_le(head.ptr + 32, 8);
    uint64_t tail = cq_get_le(head.ptr + 40, 8);
    if (tail < 1 || start < tail || next_seq < start)
        return CQ_MALFORMED;
    cq_log_free(engine);
    if (cq_log_init(&engine->log, tail, start / CQ_SEGMENT_CHUNKS, next_seq) != CQ_DONE)
        return CQ_NO_MEMORY;
    size_t told = engine->log.oldest - engine->log.first_segment; /* by segment entries, later */
    for (size_t i = 0; i < told; i++)
        engine->log.segments[i].expires_ms = CQ_NEVER;
    engine->next_number = cq_get_le(head.ptr + 8, 8);
    engine->last_id_ms = (int64_t)cq_get_le(head.ptr + 16, 8);
    engine->scan_next = start;
    engine->loading = true;
    return CQ_DONE;
}

cq_status cq_load_segment(cq_engine *engine, cq_bytes key, cq_bytes value)
{
    if (key.len != KEY_BYTES || key.ptr[0] != 's' || !checked(value, 12))
        return CQ_MALFORMED;
    uint64_t segment = cq_get_be64(key.ptr + 1);
    if (segment >= engine->log.first_segment && segment < engine->log.oldest)
        engine->log.segments[segment - engine->log.first_segment].expires_ms =
            (int64_t)cq_get_le(value.ptr, 8);
    return CQ_DONE;
}

cq_status cq_directory_read(cq_bytes value, bool own, uint64_t number, uint64_t *created,
                            uint64_t *ended)
{
    if (!checked(value, own ? 28 : CQ_DIRECTORY_BYTES))
        return CQ_MALFORMED;
    const uint8_t *at = value.ptr + 8 + (own ? 0 : number % CQ_BUCKET_SLOTS * 10);
    *created = cq_get_le(at, own ? 8 : 5);
    *ended = cq_get_le(at + (own ? 8 : 5), own ? 8 : 5);
    return *ended == 0 ? CQ_FULL : CQ_DONE;
}

void cq_directory_forget(uint8_t value[CQ_DIRECTORY_BYTES], uint64_t number)
{
    memset(value + 8 + number % CQ_BUCKET_SLOTS * 10, 0, 10);
    size_t len = CQ_DIRECTORY_BYTES - 4;
    cq_put_le(value + len, cq_crc32c(value, len), 4);
}

/* --- records ---------------------------------------------------------------------------------- */

static bool is_final(const cq_slot *slot)
{
    return slot->state == CQ_COMPLETED || slot->state == CQ_FAILED || slot->state == CQ_GONE;
}

static cq_status keep_body(cq_engine *engine, cq_slot *slot, cq_bytes stored)
{
    slot->body_len = stored.len;
    slot->body = NULL;
    if (engine->body_bytes + stored.len > engine->set.payload_memory_bytes)
        return CQ_DONE;
    slot->body = malloc(stored.len);
    if (slot->body == NULL)
        return CQ_NO_MEMORY;
    memcpy(slot->body, stored.ptr, stored.len);
    engine->body_bytes += stored.len;
    return CQ_DONE;
}

/* Fills an empty slot with what does not change in a task's life. */
static cq_status fill(cq_engine *engine, cq_slot *slot, const cq_record *record)
{
    cq_body body;
    if (cq_body_read(record->stored, record->flags, &body) != CQ_DONE || body.command.len == 0)
        return CQ_MALFORMED;
    cq_queue *queue = cq_queue_open(engine, body.tenant, body.command);
    if (queue == NULL)
        return CQ_NO_MEMORY;
    if (keep_body(engine, slot, record->stored) != CQ_DONE) {
        cq_queue_release(engine, queue);
        return CQ_NO_MEMORY;
    }
    memcpy(slot->id, record->id, CQ_ID_BYTES);
    slot->flags |= record->flags & CQ_FLAGS_STORED;
    slot->queue = queue;
    queue->slots++;
    slot->priority = body.priority;
    slot->max_attempts = body.max_attempts;
    slot->created_ms = slot->updated_ms = body.created_ms;
    engine->live_bytes += slot->body_len;
    return CQ_DONE;
}

static void stand_in(cq_engine *engine, cq_slot *slot, uint64_t seq)
{
    cq_segment *segment = cq_log_segment(&engine->log, seq);
    slot->created_chunk = seq;
    segment->held++;
    segment->live++;
}

static void leave(cq_engine *engine, const cq_slot *slot)
{
    cq_segment *segment = cq_log_segment(&engine->log, slot->created_chunk);
    segment->held--;
    segment->live--;
}

static cq_status set_text(cq_slot *slot, cq_bytes error)
{
    cq_text *text;
    if (cq_text_copy(error, &text) != CQ_DONE)
        return CQ_NO_MEMORY;
    cq_slot_set_error(slot, text);
    return CQ_DONE;
}

/* The holder of a lease, or nobody when the record names none. */
static cq_status set_holder(cq_engine *engine, cq_slot *slot, const cq_record *record,
                            cq_bytes tenant)
{
    cq_holder_release(engine, slot->holder);
    slot->holder = NULL;
    if (tenant.len + record->worker.len + record->subject.len == 0)
        return CQ_DONE;
    slot->holder = cq_holder_open(engine, tenant, record->worker, record->subject);
    return slot->holder == NULL ? CQ_NO_MEMORY : CQ_DONE;
}

/* CQ_MALFORMED: not a task, or its number is taken or was never given out. */
static cq_status load_created(cq_engine *engine, uint64_t seq, const cq_record *record)
{
    if (record->number >= engine->next_number)
        return CQ_MALFORMED;
    uint64_t bucket = record->number / CQ_BUCKET_SLOTS;
    if (engine->table.count > 0 && bucket < engine->table.first_bucket)
        return CQ_MALFORMED;
    if (cq_table_reserve(&engine->table, record->number) != CQ_DONE)
        return CQ_NO_MEMORY;
    cq_block *block = cq_table_block(&engine->table, bucket);
    cq_slot *slot = &block->slots[record->number % CQ_BUCKET_SLOTS];
    if (slot->state != CQ_NONE)
        return CQ_MALFORMED;
    cq_status status = fill(engine, slot, record);
    if (status != CQ_DONE)
        return status;
    block->seen++;
    slot->state = record->due_ms == CQ_NEVER ? CQ_READY : CQ_DELAYED;
    slot->due_ms = record->due_ms == CQ_NEVER ? 0 : record->due_ms;
    stand_in(engine, slot, seq);
    return CQ_DONE;
}

/* Finds the slot that a carried record is about, and detaches it; makes one when its creation is no
 * more read. CQ_MALFORMED: the task has ended before. */
static cq_status find_carried(cq_engine *engine, const cq_record *record, cq_slot **slot)
{
    *slot = cq_table_at(&engine->table, record->number);
    if (*slot != NULL && is_final(*slot))
        return CQ_MALFORMED;
    if (*slot == NULL) {
        *slot = cq_table_adopt(&engine->table, record->number);
        if (*slot == NULL)
            return CQ_NO_MEMORY;
        (*slot)->flags = CQ_FLAG_DETACHED;
        (*slot)->state = CQ_GONE; /* owns nothing until it is filled */
        cq_status status = fill(engine, *slot, record);
        if (status != CQ_DONE)
            cq_table_forget(&engine->table, *slot);
        return status;
    }
    leave(engine, *slot);
    if (!((*slot)->flags & CQ_FLAG_DETACHED))
        *slot = cq_table_detach(&engine->table, *slot);
    return *slot == NULL ? CQ_NO_MEMORY : CQ_DONE;
}

/* The task stands here from now on, in the state that the record says. */
static cq_status load_carried(cq_engine *engine, uint64_t seq, const cq_record *record)
{
    cq_slot *slot;
    cq_status status = find_carried(engine, record, &slot);
    if (status != CQ_DONE)
        return status;
    stand_in(engine, slot, seq);
    if (slot->state != CQ_DEAD && record->state == CQ_DEAD)
        cq_slot_drop_body(engine, slot);
    slot->state = record->state;
    slot->attempts = record->attempts;
    slot->updated_ms = record->updated_ms;
    slot->due_ms = record->due_ms;
    if (record->state == CQ_DEAD)
        slot->ended_chunk = seq;
    cq_bytes tenant = record->state == CQ_LEASED ? slot->queue->tenant->name : (cq_bytes){0};
    if (set_holder(engine, slot, record, tenant) != CQ_DONE)
        return CQ_NO_MEMORY;
    return set_text(slot, record->error);
}

static cq_status load_claimed(cq_engine *engine, cq_slot *slot, const cq_record *record)
{
    slot->state = CQ_LEASED;
    slot->due_ms = record->due_ms;
    slot->attempts = record->attempts;
    slot->updated_ms = record->at_ms;
    return set_holder(engine, slot, record, record->tenant);
}

static cq_status load_returned(cq_engine *engine, cq_slot *slot, const cq_record *record)
{
    cq_holder_release(engine, slot->holder);
    slot->holder = NULL;
    slot->state = record->state;
    slot->due_ms = record->due_ms;
    slot->attempts = record->attempts;
    slot->updated_ms = record->at_ms;
    return set_text(slot, record->error);
}

static cq_status load_final(cq_engine *engine, cq_slot *slot, uint8_t state)
{
    if (cq_log_reserve_end(engine, slot) != CQ_DONE || set_text(slot, (cq_bytes){0}) != CQ_DONE)
        return CQ_NO_MEMORY;
    slot->state = state;
    cq_log_final(engine, slot);
    return CQ_DONE;
}

/* CQ_MALFORMED: it had more attempts than it may. */
static cq_status load_ended(cq_engine *engine, uint64_t seq, cq_slot *slot, const cq_record *record)
{
    if (record->attempts > slot->max_attempts)
        return CQ_MALFORMED;
    cq_slot_drop_body(engine, slot);
    slot->ended_chunk = seq;
    slot->attempts = record->attempts;
    slot->updated_ms = record->ended_ms;
    slot->due_ms = record->expires_ms;
    if (set_holder(engine, slot, record, record->tenant) != CQ_DONE)
        return CQ_NO_MEMORY;
    if (record->state != CQ_DEAD)
        return load_final(engine, slot, record->state);
    slot->state = CQ_DEAD;
    return set_text(slot, record->error);
}

/* Any record but the two that create; CQ_MALFORMED when the task's state forbids it. */
static cq_status load_change(cq_engine *engine, uint64_t seq, const cq_record *record)
{
    if (record->kind == CQ_RECORD_ENDED && record->state != CQ_DEAD)
        cq_log_expire(&engine->log, seq, record->expires_ms);
    cq_slot *slot = cq_table_at(&engine->table, record->number);
    if (slot == NULL)
        return CQ_DONE; /* of a bucket that was closed, and whose creation is not read */
    if (is_final(slot)) {
        if (record->kind == CQ_RECORD_PURGED)
            slot->state = CQ_GONE;
        return CQ_DONE;
    }
    bool dead = slot->state == CQ_DEAD;
    if (dead != (record->kind == CQ_RECORD_REQUEUED || record->kind == CQ_RECORD_PURGED))
        return CQ_MALFORMED;
    switch (record->kind) {
    case CQ_RECORD_CLAIMED:
        return load_claimed(engine, slot, record);
    case CQ_RECORD_KEPT:
        if (slot->state != CQ_LEASED)
            return CQ_MALFORMED;
        slot->due_ms = record->due_ms;
        slot->updated_ms = record->at_ms;
        return CQ_DONE;
    case CQ_RECORD_RETURNED:
        return load_returned(engine, slot, record);
    case CQ_RECORD_ENDED:
        return load_ended(engine, seq, slot, record);
    case CQ_RECORD_REQUEUED:
        slot->body = NULL;
        slot->state = CQ_READY;
        slot->attempts = 0;
        slot->due_ms = 0;
        slot->updated_ms = record->at_ms;
        return set_text(slot, (cq_bytes){0});
    default:
        return load_final(engine, slot, CQ_GONE);
    }
}

static cq_status load_record(cq_engine *engine, uint64_t seq, const cq_record *record)
{
    switch (record->kind) {
    case CQ_RECORD_ACTOR:
        return CQ_DONE;
    case CQ_RECORD_CREATED:
        return load_created(engine, seq, record);
    case CQ_RECORD_CARRIED:
        return load_carried(engine, seq, record);
    default:
        return load_change(engine, seq, record);
    }
}

cq_status cq_load_chunk(cq_engine *engine, uint64_t seq, cq_bytes chunk)
{
    cq_bytes rest;
    cq_record record = {0};
    cq_status status;
    if (!engine->loading || seq != engine->scan_next || seq >= engine->log.next_seq)
        return CQ_MALFORMED;
    if (cq_chunk_open(chunk, &rest) != CQ_DONE)
        return CQ_MALFORMED;
    while ((status = cq_record_next(&rest, &record)) == CQ_DONE) {
        status = load_record(engine, seq, &record);
        if (status != CQ_DONE)
            return status;
    }
    cq_log_weigh(&engine->log, seq, chunk.len);
    engine->scan_next++;
    cq_log_settle(engine);
    engine->log.puts.len = 0;
    return status == CQ_FULL ? CQ_DONE : status;
}

/* --- salvage ---------------------------------------------------------------------------------- */

cq_status cq_salvage_begin(cq_engine *engine, uint64_t tail, uint64_t next_seq,
                           uint64_t next_number, int64_t last_id_ms)
{
    CQ_ASSERT(engine->next_number == 0 && tail >= 1 && next_seq >= tail);
    cq_log_free(engine);
    if (cq_log_init(&engine->log, tail, tail / CQ_SEGMENT_CHUNKS, next_seq) != CQ_DONE)
        return CQ_NO_MEMORY;
    engine->log.changed = true;
    engine->next_number = next_number;
    engine->last_id_ms = last_id_ms;
    engine->scan_next = tail;
    engine->loading = engine->salvaging = true;
    return CQ_DONE;
}

cq_status cq_salvage_record(cq_engine *engine, const cq_record *record)
{
    return load_record(engine, engine->scan_next, record);
}

cq_status cq_salvage_chunk(cq_engine *engine, size_t chunk_len)
{
    CQ_ASSERT(engine->salvaging && engine->scan_next < engine->log.next_seq);
    if (cq_log_reserve_settle(engine) != CQ_DONE)
        return CQ_NO_MEMORY;
    cq_log_weigh(&engine->log, engine->scan_next, chunk_len);
    engine->scan_next++;
    cq_log_settle(engine);
    return CQ_DONE;
}

/* --- done ------------------------------------------------------------------------------------- */

/* A number that was given out and not read stands elsewhere: its bucket is closed, or it was
 * detached. A bucket in which nothing is open after that is closed. */
static cq_status settle_bucket(cq_engine *engine, cq_block *block, uint64_t bucket)
{
    for (uint64_t i = 0; i < CQ_BUCKET_SLOTS; i++) {
        cq_slot *slot = &block->slots[i];
        if (slot->state == CQ_NONE && bucket * CQ_BUCKET_SLOTS + i < engine->next_number) {
            slot->state = CQ_MOVED;
            block->open--;
            block->seen++;
        }
    }
    return block->open == 0 ? cq_numbers_append(&engine->log.closing, bucket) : CQ_DONE;
}

/* The same for all of them. CQ_NO_MEMORY: some are not settled, the load has failed. */
static cq_status settle_buckets(cq_engine *engine)
{
    cq_table *table = &engine->table;
    if (engine->next_number % CQ_BUCKET_SLOTS != 0) {
        if (cq_table_reserve(table, engine->next_number) != CQ_DONE)
            return CQ_NO_MEMORY;
    }
    for (size_t i = 0; i < table->count; i++) {
        cq_block *block = table->blocks[table->start + i];
        if (block != NULL && settle_bucket(engine, block, table->first_bucket + i) != CQ_DONE)
            return CQ_NO_MEMORY;
    }
    if (engine->salvaging && cq_log_reserve_settle(engine) != CQ_DONE)
        return CQ_NO_MEMORY;
    cq_log_settle(engine);
    return CQ_DONE;
}

/* Whether a task that has not ended may be as its records say. */
static bool plausible(const cq_slot *slot)
{
    bool counted = slot->state == CQ_LEASED || slot->state == CQ_DEAD;
    if (slot->attempts < 0 || slot->attempts > slot->max_attempts - (counted ? 0 : 1))
        return false;
    return slot->state != CQ_LEASED || slot->holder != NULL;
}

/* Puts a task into its queue or the heap, and counts it. CQ_MALFORMED: its records contradict. */
static cq_status place(cq_engine *engine, cq_slot *slot, int64_t now_ms, int64_t lease_end_min_ms)
{
    if (!plausible(slot))
        return CQ_MALFORMED;
    if (slot->state == CQ_DELAYED && slot->due_ms <= now_ms)
        slot->state = CQ_READY;
    if (slot->state == CQ_LEASED && slot->due_ms < lease_end_min_ms)
        slot->due_ms = lease_end_min_ms;
    ++*cq_queue_count(slot->queue, slot->state);
    engine->live += slot->state != CQ_DEAD;
    if (slot->state == CQ_READY) {
        cq_level *level = cq_ready_reserve(engine, slot->queue, slot->priority);
        if (level == NULL)
            return CQ_NO_MEMORY;
        cq_ready_put(engine, level, slot);
        return CQ_DONE;
    }
    uint64_t number = cq_id_number(slot->id);
    cq_order *dead_numbers = &slot->queue->dead_numbers;
    bool dead = slot->state == CQ_DEAD;
    if (cq_heap_reserve(&engine->due, 1) != CQ_DONE ||
        (dead && cq_order_reserve(dead_numbers, number) != CQ_DONE))
        return CQ_NO_MEMORY;
    cq_heap_push(&engine->due, slot->due_ms, cq_id_number(slot->id), &slot->heap_at);
    if (slot->state == CQ_LEASED)
        cq_lease_begins(engine, slot);
    if (dead)
        cq_order_add(dead_numbers, number);
    return CQ_DONE;
}

/* Places detached tasks last: of all numbers theirs are the lowest, and rings want them rising. */
static cq_status place_all(cq_engine *engine, int64_t now_ms, int64_t lease_end_min_ms)
{
    cq_table *table = &engine->table;
    cq_status status = CQ_DONE;
    for (size_t i = 0; i < table->count && status == CQ_DONE; i++) {
        cq_block *block = table->blocks[table->start + i];
        for (int j = 0; block != NULL && j < CQ_BUCKET_SLOTS && status == CQ_DONE; j++) {
            cq_slot *slot = &block->slots[j];
            if (slot->state != CQ_NONE && slot->state != CQ_MOVED && !is_final(slot))
                status = place(engine, slot, now_ms, lease_end_min_ms);
        }
    }
    for (size_t i = 0; i < table->detached.cap; i++) {
        cq_node *node = table->detached.heads[i];
        for (; node != NULL && status == CQ_DONE; node = node->next)
            status = place(engine, &((cq_detached *)node)->slot, now_ms, lease_end_min_ms);
    }
    return status;
}

cq_status cq_load_done(cq_engine *engine, int64_t now_ms, int64_t grace_ms)
{
    cq_log *log = &engine->log;
    int64_t lease_end_min_ms;
    if (!engine->loading)
        return CQ_DONE;
    if (engine->scan_next != log->next_seq)
        return CQ_MALFORMED;
    for (uint64_t i = log->first_segment; i < log->oldest; i++) {
        if (log->segments[i - log->first_segment].expires_ms == CQ_NEVER)
            return CQ_MALFORMED;
    }
    if (__builtin_add_overflow(now_ms, grace_ms, &lease_end_min_ms))
        lease_end_min_ms = INT64_MAX;
    if (settle_buckets(engine) != CQ_DONE)
        return CQ_NO_MEMORY;
    engine->loading = engine->salvaging = false;
    engine->now_ms = now_ms;
    return place_all(engine, now_ms, lease_end_min_ms);
}
