/* log.c: the log of chunks as the engine sees it: the open commit group, what each segment of the
 * log still holds, directories of closed buckets, the head, removal at the tail, and the carrying
 * forward of stragglers.
 *
 * Entries beside the chunks. Integers are little endian but where BE is said; crc is the CRC-32C of
 * what is before it.
 *   d + bucket BE   highest sequence BE, 256 x (created chunk u40, ended chunk u40; 0 = gone or
 *                   elsewhere), crc
 *   e + number BE   highest sequence BE, created chunk u64, ended chunk u64, crc
 *   w + ended sequence BE + number BE
 *                   version, id, created chunk BE, tenant lp32; what these two chunks hold is its
 *                   check. The shard may put the whole delivery in its place (version 2,
 *                   deliveries.py)
 *   s + segment BE  expires i64, crc
 *   mhead           format u32, shards u32, next number u64, last id ms i64, next sequence u64,
 *                   sequence where recovery starts u64, tail u64, crc */
#include <string.h>

#include "codeq.h"

#define CHUNK_BYTES 8192
#define CHUNK_CREATES 32
#define STRAGGLER_FACTOR 4 /* the log may be so many times the live bodies, and the slack */
#define OUT_MIN 65536
#define OUT_KEEP_MAX (16u << 20) /* a larger buffer is given back after its group */
#define SEQ_BYTES 5              /* of a sequence in a directory */
#define KEY_BYTES 9              /* prefix and number */
#define HEAD_KEY "mhead"
#define ENTRY_FRAME 5 /* key length, value length */
#define OWN_BYTES (8 + 8 + 8 + 4)
#define WEBHOOK_KEY_BYTES (KEY_BYTES + 8)
#define WEBHOOK_BYTES (1 + CQ_ID_BYTES + 8 + 4) /* and the tenant */
#define WEBHOOK_VERSION 3
#define SEGMENT_VALUE_BYTES (8 + 4)

static cq_status reserve(cq_buffer *buffer, size_t more)
{
    if (more <= buffer->cap - buffer->len)
        return CQ_DONE;
    size_t cap = buffer->cap ? buffer->cap : OUT_MIN;
    while (cap - buffer->len < more)
        cap *= 2;
    uint8_t *data = realloc(buffer->data, cap);
    if (data == NULL)
        return CQ_NO_MEMORY;
    buffer->data = data;
    buffer->cap = cap;
    return CQ_DONE;
}

/* --- segments --------------------------------------------------------------------------------- */

static uint64_t segment_of(uint64_t seq)
{
    return seq / CQ_SEGMENT_CHUNKS;
}

/* Makes sure that the segment of this sequence is counted; CQ_NO_MEMORY changes nothing. */
static cq_status reserve_segment(cq_log *log, uint64_t seq)
{
    size_t needed = segment_of(seq) - log->first_segment + 1;
    if (needed <= log->segment_count)
        return CQ_DONE;
    if (needed > log->segment_cap) {
        size_t cap = needed * 2;
        cq_segment *segments = realloc(log->segments, cap * sizeof *segments);
        if (segments == NULL)
            return CQ_NO_MEMORY;
        log->segments = segments;
        log->segment_cap = cap;
    }
    size_t more = needed - log->segment_count;
    memset(log->segments + log->segment_count, 0, more * sizeof *log->segments);
    log->segment_count = needed;
    return CQ_DONE;
}

cq_segment *cq_log_segment(cq_log *log, uint64_t seq)
{
    uint64_t index = segment_of(seq) - log->first_segment; /* wraps below the first: too large */
    return index < log->segment_count ? &log->segments[index] : NULL;
}

/* Keeps the segment until then. Dead letters need none: they hold it by their slot. */
void cq_log_expire(cq_log *log, uint64_t seq, int64_t expires_ms)
{
    cq_segment *segment = cq_log_segment(log, seq);
    if (segment != NULL && segment->expires_ms < expires_ms)
        segment->expires_ms = expires_ms;
}

void cq_log_weigh(cq_log *log, uint64_t seq, size_t chunk_len)
{
    int64_t bytes = chunk_len > CHUNK_BYTES ? (int64_t)chunk_len : CHUNK_BYTES;
    cq_log_segment(log, seq)->bytes += bytes;
}

cq_status cq_log_init(cq_log *log, uint64_t tail, uint64_t oldest, uint64_t next_seq)
{
    log->tail = tail;
    log->first_segment = segment_of(tail);
    log->oldest = oldest;
    log->first_seq = log->next_seq = next_seq;
    return reserve_segment(log, next_seq);
}

void cq_log_free(cq_engine *engine)
{
    cq_log *log = &engine->log;
    cq_holder_release(engine, log->actor);
    free(log->out.data);
    free(log->ends);
    free(log->segments);
    free(log->puts.data);
    free(log->closing.items);
    free(log->ended.items);
    free(log->drop.items);
    *log = (cq_log){0};
}

/* --- records ---------------------------------------------------------------------------------- */

static void set_actor(cq_engine *engine, int64_t at_ms, cq_holder *holder, bool known)
{
    cq_log *log = &engine->log;
    if (holder != NULL)
        holder->refs++;
    cq_holder_release(engine, log->actor);
    log->actor = holder;
    log->actor_ms = at_ms;
    log->actor_set = known;
}

/* Frames the open chunk; its entry in `ends` is reserved. */
static void close_chunk(cq_engine *engine)
{
    cq_log *log = &engine->log;
    uint8_t *chunk = log->out.data + log->chunk_at;
    size_t len = log->out.len - log->chunk_at;
    CQ_ASSERT(len >= CQ_CHUNK_FRAME && log->end_count < log->end_cap);
    chunk[0] = CQ_CHUNK_VERSION;
    cq_put_le(chunk + 1, cq_crc32c(chunk + CQ_CHUNK_FRAME, len - CQ_CHUNK_FRAME), 4);
    log->ends[log->end_count++] = log->out.len;
    log->chunk_at = log->out.len;
    log->chunk_creates = 0;
    cq_log_weigh(log, log->next_seq, len);
    log->next_seq++;
    set_actor(engine, 0, NULL, false);
}

static cq_status reserve_end(cq_log *log)
{
    if (log->end_count < log->end_cap)
        return CQ_DONE;
    size_t cap = log->end_cap ? log->end_cap * 2 : 64;
    size_t *ends = realloc(log->ends, cap * sizeof *ends);
    if (ends == NULL)
        return CQ_NO_MEMORY;
    log->ends = ends;
    log->end_cap = cap;
    return CQ_DONE;
}

/* Room for `bytes` in the open chunk, or in a new one when they do not fit into it. */
static cq_status open_room(cq_engine *engine, size_t bytes, bool creates)
{
    cq_log *log = &engine->log;
    size_t used = log->out.len - log->chunk_at;
    bool full = used + bytes > CHUNK_BYTES;
    if (creates && log->chunk_creates == CHUNK_CREATES)
        full = true;
    if (used > 0 && full) {
        close_chunk(engine);
        used = 0;
    }
    if (reserve_end(log) != CQ_DONE || reserve(&log->out, CQ_CHUNK_FRAME + bytes) != CQ_DONE)
        return CQ_NO_MEMORY;
    if (reserve_segment(log, log->next_seq) != CQ_DONE)
        return CQ_NO_MEMORY;
    if (used == 0)
        log->out.len += CQ_CHUNK_FRAME;
    return CQ_DONE;
}

uint8_t *cq_log_record(cq_engine *engine, int64_t at_ms, const cq_holder *holder, size_t bytes)
{
    cq_log *log = &engine->log;
    if (open_room(engine, bytes + cq_actor_size(holder), false) != CQ_DONE)
        return NULL;
    if (!log->actor_set || log->actor_ms != at_ms || log->actor != holder) {
        uint8_t *end = cq_actor_put(log->out.data + log->out.len, at_ms, holder);
        log->out.len = (size_t)(end - log->out.data);
        set_actor(engine, at_ms, (cq_holder *)holder, true);
    }
    return log->out.data + log->out.len;
}

uint8_t *cq_log_create(cq_engine *engine, size_t bytes)
{
    if (open_room(engine, bytes, true) != CQ_DONE)
        return NULL;
    engine->log.chunk_creates++;
    return engine->log.out.data + engine->log.out.len;
}

void cq_log_wrote(cq_engine *engine, const uint8_t *end)
{
    cq_log *log = &engine->log;
    log->out.len = (size_t)(end - log->out.data);
    CQ_ASSERT(log->out.len <= log->out.cap);
    log->records++;
}

/* --- entries ---------------------------------------------------------------------------------- */

/* Begins an entry whose key is a prefix, a number, and what the caller adds up to key_len; returns
 * where that or the value goes. Reserved. */
static uint8_t *put_frame(cq_log *log, char prefix, uint64_t number, size_t key_len, size_t len)
{
    uint8_t *to = log->puts.data + log->puts.len;
    log->puts.len += ENTRY_FRAME + key_len + len;
    CQ_ASSERT(log->puts.len <= log->puts.cap);
    *to++ = (uint8_t)key_len;
    to = cq_put_le(to, len, 4);
    *to++ = (uint8_t)prefix;
    return cq_put_be64(to, number);
}

/* The same for a key of prefix and number alone. */
static uint8_t *put_entry(cq_log *log, char prefix, uint64_t number, size_t value_len)
{
    return put_frame(log, prefix, number, KEY_BYTES, value_len);
}

static void put_crc(uint8_t *value, uint8_t *at)
{
    cq_put_le(at, cq_crc32c(value, (size_t)(at - value)), 4);
}

static uint64_t highest(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static void put_own(cq_log *log, const cq_slot *slot)
{
    uint8_t *value = put_entry(log, 'e', cq_id_number(slot->id), OWN_BYTES);
    uint8_t *at = cq_put_be64(value, highest(slot->created_chunk, slot->ended_chunk));
    at = cq_put_le(cq_put_le(at, slot->created_chunk, 8), slot->ended_chunk, 8);
    put_crc(value, at);
}

/* What the bucket's tasks left in the log; those gone or detached have no chunks. */
static void put_directory(cq_log *log, const cq_block *block, uint64_t bucket)
{
    uint8_t *value = put_entry(log, 'd', bucket, CQ_DIRECTORY_BYTES);
    uint8_t *at = value + 8;
    uint64_t top = 0;
    for (int i = 0; i < CQ_BUCKET_SLOTS; i++) {
        const cq_slot *slot = &block->slots[i];
        bool here = slot->state == CQ_COMPLETED || slot->state == CQ_FAILED;
        uint64_t created = here ? slot->created_chunk : 0;
        uint64_t ended = here ? slot->ended_chunk : 0;
        at = cq_put_le(cq_put_le(at, created, SEQ_BYTES), ended, SEQ_BYTES);
        top = highest(top, highest(created, ended));
    }
    cq_put_be64(value, top);
    put_crc(value, at);
}

static void put_segment(cq_log *log, uint64_t segment)
{
    uint8_t *value = put_entry(log, 's', segment, SEGMENT_VALUE_BYTES);
    int64_t expires_ms = log->segments[segment - log->first_segment].expires_ms;
    put_crc(value, cq_put_le(value, (uint64_t)expires_ms, 8));
}

static uint64_t start_of(const cq_log *log, uint64_t segment)
{
    return highest(segment * CQ_SEGMENT_CHUNKS, log->tail);
}

/* Where everything stands after this group; the key is text, not prefix and number. */
static void put_head(cq_engine *engine)
{
    cq_log *log = &engine->log;
    uint8_t *to = log->puts.data + log->puts.len;
    size_t key_len = sizeof HEAD_KEY - 1;
    *to++ = (uint8_t)key_len;
    to = cq_put_le(to, CQ_HEAD_BYTES, 4);
    memcpy(to, HEAD_KEY, key_len);
    uint8_t *value = to + key_len;
    to = cq_put_le(cq_put_le(value, CQ_FORMAT, 4), engine->set.shard_count, 4);
    to = cq_put_le(cq_put_le(to, engine->next_number, 8), (uint64_t)engine->last_id_ms, 8);
    to = cq_put_le(cq_put_le(to, log->next_seq, 8), start_of(log, log->oldest), 8);
    to = cq_put_le(to, log->tail, 8);
    put_crc(value, to);
    log->puts.len += ENTRY_FRAME + key_len + CQ_HEAD_BYTES;
}

void cq_log_webhook(cq_engine *engine, const cq_slot *slot, uint64_t ended_seq)
{
    cq_bytes tenant = slot->queue->tenant->name;
    size_t len = WEBHOOK_BYTES + tenant.len;
    uint8_t *at = put_frame(&engine->log, 'w', ended_seq, WEBHOOK_KEY_BYTES, len);
    at = cq_put_be64(at, cq_id_number(slot->id));
    *at++ = WEBHOOK_VERSION;
    memcpy(at, slot->id, CQ_ID_BYTES);
    at = cq_put_be64(at + CQ_ID_BYTES, slot->created_chunk);
    at = cq_put_le(at, tenant.len, 4);
    memcpy(at, tenant.ptr, tenant.len);
}

/* --- the end of a task ------------------------------------------------------------------------ */

/* What is loaded has its entries on disk, unless they are what is made again. */
static bool puts_entries(const cq_engine *engine)
{
    return !engine->loading || engine->salvaging;
}

cq_status cq_log_reserve_end(cq_engine *engine, const cq_slot *slot)
{
    cq_log *log = &engine->log;
    size_t entries = 2 * ENTRY_FRAME + KEY_BYTES + OWN_BYTES + WEBHOOK_KEY_BYTES + WEBHOOK_BYTES +
                     slot->queue->tenant->name.len;
    if (reserve(&log->puts, entries) != CQ_DONE || cq_numbers_reserve(&log->closing, 1) != CQ_DONE)
        return CQ_NO_MEMORY;
    return cq_numbers_reserve(&log->ended, 1);
}

void cq_log_final(cq_engine *engine, cq_slot *slot)
{
    cq_log *log = &engine->log;
    cq_log_segment(log, slot->created_chunk)->live--;
    engine->live_bytes -= slot->body_len;
    if (slot->state != CQ_GONE) {
        cq_log_expire(log, slot->created_chunk, slot->due_ms);
        cq_log_expire(log, slot->ended_chunk, slot->due_ms);
    }
    uint64_t number = cq_id_number(slot->id);
    if (slot->flags & CQ_FLAG_DETACHED) {
        if (slot->state != CQ_GONE && puts_entries(engine))
            put_own(log, slot);
        log->ended.items[log->ended.count++] = number;
        return;
    }
    cq_block *block = cq_table_block(&engine->table, number / CQ_BUCKET_SLOTS);
    if (--block->open == 0)
        log->closing.items[log->closing.count++] = number / CQ_BUCKET_SLOTS;
}

/* Gives up what a slot that leaves memory holds. */
static void let_go(cq_engine *engine, cq_slot *slot)
{
    cq_queue *queue = slot->queue;
    cq_log_segment(&engine->log, slot->created_chunk)->held--;
    cq_holder_release(engine, slot->holder);
    free(slot->error);
    queue->slots--;
    cq_queue_release(engine, queue);
}

static void close_bucket(cq_engine *engine, uint64_t bucket)
{
    cq_block *block = cq_table_block(&engine->table, bucket);
    for (int i = 0; i < CQ_BUCKET_SLOTS; i++) {
        if (block->slots[i].state != CQ_MOVED && block->slots[i].state != CQ_NONE)
            let_go(engine, &block->slots[i]);
    }
    cq_table_close(&engine->table, bucket);
}

cq_status cq_log_reserve_settle(cq_engine *engine)
{
    cq_log *log = &engine->log;
    size_t directory = ENTRY_FRAME + KEY_BYTES + CQ_DIRECTORY_BYTES;
    return reserve(&log->puts, log->closing.count * directory);
}

void cq_log_settle(cq_engine *engine)
{
    cq_log *log = &engine->log;
    for (uint32_t i = 0; i < log->closing.count; i++) {
        uint64_t bucket = log->closing.items[i];
        if (puts_entries(engine))
            put_directory(log, cq_table_block(&engine->table, bucket), bucket);
        close_bucket(engine, bucket);
    }
    for (uint32_t i = 0; i < log->ended.count; i++) {
        cq_slot *slot = cq_table_at(&engine->table, log->ended.items[i]);
        let_go(engine, slot);
        cq_table_forget(&engine->table, slot);
    }
    log->closing.count = log->ended.count = 0;
}

/* --- the group -------------------------------------------------------------------------------- */

static void drop_bodies(cq_engine *engine)
{
    cq_numbers *drop = &engine->log.drop;
    for (uint32_t i = 0; i < drop->count; i++) {
        cq_slot *slot = cq_table_at(&engine->table, drop->items[i]);
        if (slot != NULL && (slot->state == CQ_READY || slot->state == CQ_DELAYED))
            cq_slot_drop_body(engine, slot);
    }
    drop->count = 0;
}

/* Moves `oldest` past segments of which memory holds nothing; their expiry is final now. */
static void advance(cq_log *log)
{
    for (; log->oldest < segment_of(log->next_seq); log->oldest++) {
        if (log->segments[log->oldest - log->first_segment].held > 0)
            return;
        put_segment(log, log->oldest);
    }
}

cq_status cq_log_close(cq_engine *engine)
{
    cq_log *log = &engine->log;
    if (log->out.len == 0 && log->puts.len == 0 && log->closing.count == 0 && !log->changed)
        return CQ_DONE;
    if (reserve_segment(log, log->next_seq + 1) != CQ_DONE)
        return CQ_NO_MEMORY;
    size_t segments = segment_of(log->next_seq + 1) - log->oldest;
    size_t bytes = log->closing.count * (ENTRY_FRAME + KEY_BYTES + CQ_DIRECTORY_BYTES) +
                   segments * (ENTRY_FRAME + KEY_BYTES + SEGMENT_VALUE_BYTES) + ENTRY_FRAME +
                   KEY_BYTES + CQ_HEAD_BYTES;
    if (reserve(&log->puts, bytes) != CQ_DONE)
        return CQ_NO_MEMORY;
    if (log->out.len > log->chunk_at)
        close_chunk(engine);
    cq_log_settle(engine);
    drop_bodies(engine);
    advance(log);
    put_head(engine);
    return CQ_DONE;
}

size_t cq_log_chunk(const cq_log *log, size_t index, cq_bytes *chunk)
{
    if (index < log->end_count) {
        size_t start = index == 0 ? 0 : log->ends[index - 1];
        *chunk = (cq_bytes){log->out.data + start, (uint32_t)(log->ends[index] - start)};
    }
    return log->end_count;
}

bool cq_log_entry(const cq_log *log, size_t *at, cq_bytes *key, cq_bytes *value)
{
    if (*at == log->puts.len)
        return false;
    const uint8_t *entry = log->puts.data + *at;
    *key = (cq_bytes){entry + ENTRY_FRAME, entry[0]};
    *value = (cq_bytes){key->ptr + key->len, (uint32_t)cq_get_le(entry + 1, 4)};
    *at += ENTRY_FRAME + key->len + value->len;
    return true;
}

void cq_log_taken(cq_engine *engine)
{
    cq_log *log = &engine->log;
    if (log->out.cap > OUT_KEEP_MAX) {
        free(log->out.data);
        log->out = (cq_buffer){0};
    }
    log->out.len = log->chunk_at = log->end_count = log->puts.len = 0;
    log->records = 0;
    log->changed = false;
    log->first_seq = log->next_seq;
}

/* --- removal ---------------------------------------------------------------------------------- */

uint64_t cq_log_expired(const cq_engine *engine, int64_t now_ms)
{
    const cq_log *log = &engine->log;
    uint64_t segment = log->first_segment;
    while (segment < log->oldest &&
           log->segments[segment - log->first_segment].expires_ms <= now_ms)
        segment++;
    return start_of(log, segment);
}

bool cq_log_trim(cq_engine *engine, int64_t now_ms, uint64_t keep, uint64_t *from, uint64_t *to)
{
    cq_log *log = &engine->log;
    uint64_t expired = cq_log_expired(engine, now_ms);
    uint64_t end = segment_of(expired < keep ? expired : keep);
    if (end <= log->first_segment)
        return false;
    size_t gone = end - log->first_segment;
    *from = log->tail;
    log->first_segment += gone;
    log->segment_count -= gone;
    memmove(log->segments, log->segments + gone, log->segment_count * sizeof *log->segments);
    *to = log->tail = log->first_segment * CQ_SEGMENT_CHUNKS;
    log->changed = true;
    return true;
}

/* The bucket that is being filled cannot close. When it alone holds the oldest segment, and nothing
 * in it waits for anything, its unused numbers are given up. */
static void close_last(cq_engine *engine)
{
    uint64_t bucket = engine->next_number / CQ_BUCKET_SLOTS;
    uint32_t given = engine->next_number % CQ_BUCKET_SLOTS;
    cq_block *block = cq_table_block(&engine->table, bucket);
    if (given == 0 || block == NULL || block->open != CQ_BUCKET_SLOTS - given)
        return;
    bool holds = false;
    for (uint32_t i = 0; i < given; i++) {
        const cq_slot *slot = &block->slots[i];
        holds |= slot->state != CQ_MOVED && segment_of(slot->created_chunk) == engine->log.oldest;
    }
    if (!holds || cq_numbers_append(&engine->log.closing, bucket) != CQ_DONE)
        return;
    block->open = 0;
    engine->next_number = (bucket + 1) * CQ_BUCKET_SLOTS;
    engine->log.changed = true;
}

bool cq_log_straggler(cq_engine *engine, uint64_t *from, uint64_t *to)
{
    cq_log *log = &engine->log;
    uint64_t head = segment_of(log->next_seq);
    int64_t log_bytes = 0;
    for (uint64_t segment = log->oldest; segment < head; segment++)
        log_bytes += log->segments[segment - log->first_segment].bytes;
    if (log_bytes <= STRAGGLER_FACTOR * engine->live_bytes + engine->set.straggler_slack_bytes)
        return false;
    close_last(engine);
    for (uint64_t segment = log->oldest; segment < head; segment++) {
        if (log->segments[segment - log->first_segment].live > 0) {
            *from = start_of(log, segment);
            *to = (segment + 1) * CQ_SEGMENT_CHUNKS;
            return true;
        }
    }
    return false;
}

/* Writes the carried record of one task and detaches it. */
static cq_status carry_one(cq_engine *engine, cq_slot *slot, const cq_record *created)
{
    cq_log *log = &engine->log;
    if (cq_log_reserve_end(engine, slot) != CQ_DONE)
        return CQ_NO_MEMORY;
    uint8_t *to = cq_log_create(engine, cq_carried_size(slot, created));
    if (to == NULL)
        return CQ_NO_MEMORY;
    if (!(slot->flags & CQ_FLAG_DETACHED)) {
        uint64_t bucket = cq_id_number(slot->id) / CQ_BUCKET_SLOTS;
        cq_slot *own = cq_table_detach(&engine->table, slot);
        if (own == NULL)
            return CQ_NO_MEMORY;
        cq_heap_moved(&engine->due, &own->heap_at);
        if (own->queue->top == slot)
            own->queue->top = own;
        if (cq_table_block(&engine->table, bucket)->open == 0)
            log->closing.items[log->closing.count++] = bucket;
        slot = own;
    }
    cq_log_wrote(engine, cq_carried_put(to, slot, created));
    cq_segment *old = cq_log_segment(log, slot->created_chunk);
    old->held--;
    old->live--;
    slot->created_chunk = log->next_seq;
    cq_segment *new = cq_log_segment(log, log->next_seq);
    new->held++;
    new->live++;
    if (slot->state == CQ_DEAD)
        slot->ended_chunk = log->next_seq;
    return CQ_DONE;
}

cq_status cq_log_carry(cq_engine *engine, uint64_t seq, cq_bytes chunk, int64_t now_ms,
                       uint32_t *count)
{
    cq_bytes rest;
    cq_record record = {0};
    cq_status status;
    *count = 0;
    if (now_ms > engine->now_ms)
        engine->now_ms = now_ms;
    if (cq_chunk_open(chunk, &rest) != CQ_DONE)
        return CQ_MALFORMED;
    while ((status = cq_record_next(&rest, &record)) == CQ_DONE) {
        if (record.kind != CQ_RECORD_CREATED && record.kind != CQ_RECORD_CARRIED)
            continue;
        cq_slot *slot = cq_table_find(&engine->table, record.id);
        if (slot == NULL || slot->created_chunk != seq || slot->state > CQ_DEAD ||
            slot->state == CQ_COMPLETED || slot->state == CQ_FAILED)
            continue;
        if (carry_one(engine, slot, &record) != CQ_DONE)
            return CQ_NO_MEMORY;
        ++*count;
    }
    return status == CQ_FULL ? CQ_DONE : status;
}
