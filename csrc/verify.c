/* verify.c: what must be true of memory at any moment (I1, I3, I5, I6), checked by walking it, and
 * a digest of what a restart must rebuild (I8). */
#include "codeq.h"

#define CHECK_ALWAYS_BELOW 1000 /* live tasks; above, every CHECK_EVERY-th call */
#define CHECK_EVERY 4096

/* Sums over all slots, to be compared with the counters kept along the way. */
typedef struct sums {
    uint64_t slots, live, due, ready;
    int64_t body_bytes, live_bytes;
} sums;

static bool is_waiting(const cq_slot *slot)
{
    return slot->state == CQ_READY || slot->state == CQ_DELAYED || slot->state == CQ_LEASED;
}

static void check_place(const cq_engine *engine, const cq_slot *slot)
{
    bool timed = slot->state == CQ_DELAYED || slot->state == CQ_LEASED || slot->state == CQ_DEAD;
    CQ_ASSERT(timed == (slot->heap_at != 0));
    if (timed) {
        const cq_heap_entry *entry = &engine->due.items[slot->heap_at - 1];
        CQ_ASSERT(entry->at == &slot->heap_at && entry->rank == slot->due_ms);
        CQ_ASSERT(entry->number == cq_id_number(slot->id));
    }
    CQ_ASSERT(slot->state != CQ_LEASED || slot->holder != NULL);
    CQ_ASSERT(!is_waiting(slot) || slot->state == CQ_LEASED || slot->holder == NULL);
    CQ_ASSERT(slot->attempts >= 0 && slot->attempts <= slot->max_attempts);
    CQ_ASSERT(slot->state != CQ_READY || slot->attempts < slot->max_attempts);
}

static void check_slot(const cq_engine *engine, const cq_slot *slot, uint64_t number, sums *all)
{
    CQ_ASSERT(cq_id_number(slot->id) == number);
    CQ_ASSERT(cq_table_find(&engine->table, slot->id) == slot);
    CQ_ASSERT(cq_log_segment((cq_log *)&engine->log, slot->created_chunk) != NULL);
    check_place(engine, slot);
    all->slots++;
    all->due += slot->heap_at != 0;
    all->ready += slot->state == CQ_READY;
    all->live += is_waiting(slot);
    if (is_waiting(slot) && slot->body != NULL)
        all->body_bytes += slot->body_len;
    if (is_waiting(slot) || slot->state == CQ_DEAD)
        all->live_bytes += slot->body_len;
}

static void check_block(const cq_engine *engine, const cq_block *block, uint64_t bucket, sums *all)
{
    uint32_t open = 0, seen = 0;
    for (uint32_t i = 0; i < CQ_BUCKET_SLOTS; i++) {
        const cq_slot *slot = &block->slots[i];
        seen += slot->state != CQ_NONE;
        open += slot->state == CQ_NONE || slot->state == CQ_DEAD || is_waiting(slot);
        if (slot->state != CQ_NONE && slot->state != CQ_MOVED)
            check_slot(engine, slot, bucket * CQ_BUCKET_SLOTS + i, all);
    }
    CQ_ASSERT(seen == block->seen);
    CQ_ASSERT(open == block->open || block->open == 0); /* 0: its unused numbers were given up */
}

static void check_heap(const cq_heap *heap)
{
    for (uint32_t i = 0; i < heap->count; i++) {
        CQ_ASSERT(*heap->items[i].at == i + 1);
        const cq_heap_entry *parent = &heap->items[i ? (i - 1) / 4 : 0];
        CQ_ASSERT(parent->rank < heap->items[i].rank ||
                  (parent->rank == heap->items[i].rank && parent->number <= heap->items[i].number));
    }
}

/* Counts the tasks of a level that are ready and belong here, and finds the least. */
static uint64_t check_level(const cq_engine *engine, const cq_queue *queue, const cq_level *level)
{
    uint64_t ready = 0, least = UINT64_MAX, last = 0;
    for (uint32_t i = 0; i < level->ring_count + level->back.count; i++) {
        bool queued = i < level->ring_count;
        uint64_t number = queued ? level->ring[(level->ring_at + i) & (level->ring_cap - 1)]
                                 : level->back.items[i - level->ring_count];
        CQ_ASSERT(!queued || i == 0 || number > last);
        last = number;
        const cq_slot *slot = cq_table_at(&engine->table, number);
        if (slot == NULL || slot->state != CQ_READY)
            continue;
        CQ_ASSERT(slot->queue == queue && slot->priority == level->priority);
        ready++;
        least = number < least ? number : least;
    }
    CQ_ASSERT(ready == level->ready && ready > 0);
    return least;
}

/* The set of dead letters has those of the queue, each once. */
static void check_dead(const cq_engine *engine, const cq_queue *queue)
{
    uint64_t count = 0;
    for (uint64_t number = 0; cq_order_next(&queue->dead_numbers, &number); number++) {
        const cq_slot *slot = cq_table_at(&engine->table, number);
        CQ_ASSERT(slot != NULL && slot->state == CQ_DEAD && slot->queue == queue);
        count++;
    }
    CQ_ASSERT(count == queue->dead);
}

/* The top is the least of the first level, the counters are right, the tenant's heap knows. */
static void check_queue(const cq_engine *engine, const cq_queue *queue, sums *all)
{
    uint64_t ready = 0;
    check_heap(&queue->levels);
    for (uint32_t i = 0; i < queue->levels.count; i++) {
        const cq_level *level = CQ_OWNER(cq_level, heap_at, queue->levels.items[i].at);
        uint64_t least = check_level(engine, queue, level);
        ready += level->ready;
        if (i > 0)
            continue;
        CQ_ASSERT(queue->top->priority == level->priority);
        CQ_ASSERT(cq_id_number(queue->top->id) == least);
    }
    CQ_ASSERT(ready == queue->ready && (ready > 0) == (queue->top != NULL));
    bool paused = queue->rule != NULL && queue->rule->paused;
    bool open = !paused && !queue->limited;
    CQ_ASSERT((ready > 0 && open) == (queue->heap_at != 0) && queue->slots > 0);
    CQ_ASSERT(queue->limited == (queue->rule != NULL && queue->rule->policy.consumers_max > 0));
    CQ_ASSERT(queue->limited || queue->consumers == 0);
    CQ_ASSERT(queue->tally->queue == queue);
    CQ_ASSERT(queue->top == NULL || cq_table_find(&engine->table, queue->top->id) == queue->top);
    if (queue->heap_at != 0) {
        const cq_heap_entry *entry = &queue->tenant->ready.items[queue->heap_at - 1];
        CQ_ASSERT(entry->rank == -(int64_t)queue->top->priority);
        CQ_ASSERT(entry->number == cq_id_number(queue->top->id));
    }
    check_dead(engine, queue);
    all->slots += queue->slots;
    all->live += queue->ready + queue->delayed + queue->leased;
    all->due += queue->delayed + queue->leased + queue->dead;
    all->ready += ready;
}

static void check_segments(const cq_engine *engine, const sums *all)
{
    uint64_t held = 0;
    for (size_t i = 0; i < engine->log.segment_count; i++) {
        const cq_segment *segment = &engine->log.segments[i];
        CQ_ASSERT(segment->live <= segment->held);
        CQ_ASSERT(segment->held == 0 || engine->log.first_segment + i >= engine->log.oldest);
        held += segment->held;
    }
    CQ_ASSERT(held == all->slots);
}

void cq_engine_verify(const cq_engine *engine)
{
    sums slots = {0}, queues = {0};
    const cq_table *table = &engine->table;
    for (size_t i = 0; i < table->count; i++) {
        if (table->blocks[table->start + i] != NULL)
            check_block(engine, table->blocks[table->start + i], table->first_bucket + i, &slots);
    }
    uint64_t strays = 0;
    for (uint64_t number = 0; cq_order_next(&table->strays, &number); number++)
        strays++;
    CQ_ASSERT(strays == table->detached.count);
    for (size_t i = 0; i < table->detached.cap; i++) {
        for (cq_node *node = table->detached.heads[i]; node != NULL; node = node->next)
            check_slot(engine, &((cq_detached *)node)->slot, node->hash, &slots);
    }
    for (size_t i = 0; i < engine->queues.cap; i++) {
        for (cq_node *node = engine->queues.heads[i]; node != NULL; node = node->next)
            check_queue(engine, (cq_queue *)node, &queues);
    }
    for (size_t i = 0; i < engine->tenants.cap; i++) {
        for (cq_node *node = engine->tenants.heads[i]; node != NULL; node = node->next)
            check_heap(&((cq_tenant *)node)->ready);
    }
    check_heap(&engine->due);
    cq_leases_verify(engine);
    check_segments(engine, &slots);
    CQ_ASSERT(slots.slots == queues.slots && slots.live == queues.live);
    CQ_ASSERT(slots.ready == queues.ready);
    CQ_ASSERT(slots.due == queues.due && slots.due == engine->due.count);
    CQ_ASSERT(slots.live == (uint64_t)engine->live);
    CQ_ASSERT(slots.body_bytes == engine->body_bytes && slots.live_bytes == engine->live_bytes);
}

void cq_engine_check(cq_engine *engine)
{
#ifdef CODEQ_DEBUG
    if (engine->live < CHECK_ALWAYS_BELOW || ++engine->checks % CHECK_EVERY == 0)
        cq_engine_verify(engine);
#else
    (void)engine;
#endif
}

/* --- digest ----------------------------------------------------------------------------------- */

static uint64_t add(uint64_t digest, uint64_t value)
{
    return cq_hash(digest, &value, sizeof value);
}

static uint64_t add_bytes(uint64_t digest, cq_bytes bytes)
{
    return cq_hash(digest, bytes.ptr, bytes.len);
}

/* Of all that the log says of a task; not of what only this process knows. */
static uint64_t slot_digest(const cq_slot *slot)
{
    uint64_t digest = cq_hash(0, slot->id, CQ_ID_BYTES);
    digest = add(add(digest, slot->state), slot->created_chunk);
    digest = add_bytes(add_bytes(digest, slot->queue->tenant->name), slot->queue->command);
    if (slot->state == CQ_GONE)
        return digest;
    digest = add(add(digest, (uint64_t)slot->priority), (uint64_t)slot->attempts);
    digest = add(add(digest, (uint64_t)slot->max_attempts), slot->body_len);
    digest = add(add(digest, (uint64_t)slot->created_ms), (uint64_t)slot->updated_ms);
    if (slot->state != CQ_READY) /* else it is only a help to tell since when */
        digest = add(digest, (uint64_t)slot->due_ms);
    digest = add(digest, slot->flags & (CQ_FLAGS_STORED | CQ_FLAG_DETACHED));
    if (!is_waiting(slot))
        digest = add(digest, slot->ended_chunk);
    if (slot->error != NULL)
        digest = add_bytes(digest, (cq_bytes){slot->error->data, slot->error->len});
    if (slot->holder != NULL) {
        digest = add_bytes(add_bytes(digest, slot->holder->tenant), slot->holder->worker);
        digest = add_bytes(digest, slot->holder->subject);
    }
    return digest;
}

/* Sums, where the order in memory means nothing. */
uint64_t cq_engine_digest(const cq_engine *engine)
{
    const cq_table *table = &engine->table;
    const cq_log *log = &engine->log;
    uint64_t slots = 0, buckets = 0;
    for (size_t i = 0; i < table->count; i++) {
        const cq_block *block = table->blocks[table->start + i];
        for (int j = 0; block != NULL && j < CQ_BUCKET_SLOTS; j++) {
            const cq_slot *slot = &block->slots[j];
            if (slot->state != CQ_NONE && slot->state != CQ_MOVED)
                slots += slot_digest(slot);
        }
        if (block != NULL)
            buckets += add(table->first_bucket + i, (uint64_t)block->open << 32 | block->seen);
    }
    for (size_t i = 0; i < table->detached.cap; i++) {
        for (const cq_node *node = table->detached.heads[i]; node != NULL; node = node->next)
            slots += slot_digest(&((const cq_detached *)node)->slot);
    }
    uint64_t digest = add(add(slots, buckets), engine->next_number);
    digest = add(add(digest, (uint64_t)engine->last_id_ms), (uint64_t)engine->live);
    digest = add(add(digest, log->next_seq), add(log->tail, log->oldest));
    size_t segments = log->next_seq / CQ_SEGMENT_CHUNKS - log->first_segment + 1;
    for (size_t i = 0; i < segments; i++) { /* one more may be reserved, and empty */
        const cq_segment *segment = &log->segments[i];
        digest = add(add(digest, segment->held), add(segment->live, (uint64_t)segment->expires_ms));
    }
    return add(digest, (uint64_t)engine->live_bytes);
}
