/* walk.c: tasks in memory in creation order, and what is done to many of them by one call: listing,
 * cancelling what waits, dead letters, and taking away what has ended. */
#include "codeq.h"

/* --- the walk --------------------------------------------------------------------------------- */

void cq_walk_begin(const cq_engine *engine, cq_walk *walk)
{
    if (walk->end > engine->next_number)
        walk->end = engine->next_number;
    if (walk->tenant.ptr == NULL)
        return;
    walk->owner = cq_tenant_find(engine, walk->tenant);
    if (walk->command.ptr != NULL)
        walk->queue = cq_queue_find(engine, walk->tenant, walk->command);
    if (walk->owner == NULL || (walk->command.ptr != NULL && walk->queue == NULL))
        walk->next = walk->end; /* nothing of it is in memory */
}

static bool wanted(const cq_walk *walk, const cq_slot *slot)
{
    if (slot == NULL || !(walk->states & 1u << slot->state))
        return false;
    if (walk->queue != NULL)
        return slot->queue == walk->queue;
    if (walk->owner != NULL && slot->queue->tenant != walk->owner)
        return false;
    return walk->command.ptr == NULL || cq_bytes_equal(slot->queue->command, walk->command);
}

/* Moves the walk out of a bucket that is not in memory: to the next task that outlived its own, or
 * to the next bucket that is. */
static void leave_bucket(const cq_table *table, cq_walk *walk)
{
    uint64_t bucket = walk->next / CQ_BUCKET_SLOTS, stray = walk->next;
    uint64_t last = walk->end / CQ_BUCKET_SLOTS;
    bool strays = cq_order_next(&table->strays, &stray);
    if (strays && stray / CQ_BUCKET_SLOTS < last)
        last = stray / CQ_BUCKET_SLOTS;
    if (bucket < table->first_bucket && table->count > 0)
        bucket = table->first_bucket < last ? table->first_bucket : last;
    for (; bucket < last && cq_table_block(table, bucket) == NULL && walk->looks > 0; bucket++)
        walk->looks--;
    uint64_t start = bucket * CQ_BUCKET_SLOTS;
    if (cq_table_block(table, bucket) == NULL && bucket == last)
        start = strays && stray < walk->end ? stray : walk->end;
    if (start > walk->next)
        walk->next = start;
}

/* The next dead letter of the walk's queue. */
static cq_slot *next_dead(const cq_engine *engine, cq_walk *walk)
{
    uint64_t number = walk->next;
    if (walk->looks == 0 || walk->next >= walk->end)
        return NULL;
    if (!cq_order_next(&walk->queue->dead_numbers, &number) || number >= walk->end) {
        walk->next = walk->end;
        return NULL;
    }
    walk->looks--;
    walk->next = number + 1;
    return cq_table_at(&engine->table, number);
}

cq_slot *cq_walk_next(const cq_engine *engine, cq_walk *walk)
{
    const cq_table *table = &engine->table;
    if (walk->queue != NULL && walk->states == 1u << CQ_DEAD)
        return next_dead(engine, walk);
    while (walk->looks > 0 && walk->next < walk->end) {
        uint64_t stray = walk->next;
        bool here = cq_table_block(table, walk->next / CQ_BUCKET_SLOTS) != NULL ||
                    (cq_order_next(&table->strays, &stray) && stray == walk->next);
        if (!here) {
            leave_bucket(table, walk);
            continue;
        }
        walk->looks--;
        cq_slot *slot = cq_table_at(table, walk->next++);
        if (wanted(walk, slot))
            return slot;
    }
    return NULL;
}

/* --- many at once ----------------------------------------------------------------------------- */

/* Whether the walk's queue has a task left in one of its states. */
static bool any_left(const cq_walk *walk)
{
    uint64_t left = 0;
    for (uint8_t state = CQ_READY; state <= CQ_DEAD; state++) {
        bool counted = state <= CQ_LEASED || state == CQ_DEAD;
        if (counted && walk->states & 1u << state)
            left += *cq_queue_count(walk->queue, state);
    }
    return left > 0;
}

cq_status cq_walk_each(cq_engine *engine, cq_walk *walk, cq_slot_change *change, uint32_t count_max,
                       int64_t now_ms, uint32_t *count)
{
    cq_slot *slot;
    *count = 0;
    cq_tell_time(engine, now_ms);
    while (*count < count_max) {
        if (walk->queue != NULL && !any_left(walk))
            walk->next = walk->end;
        slot = cq_walk_next(engine, walk);
        if (slot == NULL)
            return CQ_DONE;
        if (change(engine, slot, now_ms) != CQ_DONE) {
            walk->next = cq_id_number(slot->id);
            return CQ_NO_MEMORY;
        }
        ++*count;
    }
    return CQ_DONE;
}

cq_status cq_walk_gone(cq_engine *engine, uint64_t number, int64_t now_ms)
{
    uint8_t *to = cq_log_record(engine, now_ms, NULL, CQ_NUMBER_BYTES);
    if (to == NULL)
        return CQ_NO_MEMORY;
    cq_log_wrote(engine, cq_number_put(to, CQ_RECORD_PURGED, number));
    return CQ_DONE;
}

/* Takes an ended task away whose directory is not written yet: that will not have it. */
static cq_status forget(cq_engine *engine, cq_slot *slot, int64_t now_ms)
{
    if (slot->state == CQ_DEAD)
        return cq_slot_purge(engine, slot, now_ms);
    if (cq_walk_gone(engine, cq_id_number(slot->id), now_ms) != CQ_DONE)
        return CQ_NO_MEMORY;
    cq_slot_set_state(engine, slot, CQ_GONE);
    return CQ_DONE;
}

cq_status cq_walk_forget(cq_engine *engine, cq_walk *walk, int64_t before_ms, uint32_t count_max,
                         int64_t now_ms, uint32_t *count)
{
    *count = 0;
    cq_tell_time(engine, now_ms);
    while (*count < count_max) {
        cq_slot *slot = cq_walk_next(engine, walk);
        if (slot == NULL)
            return CQ_DONE;
        /* A detached one that ended in this group has its entry among the puts already. */
        bool noted = slot->state != CQ_DEAD && slot->flags & CQ_FLAG_DETACHED;
        if (slot->due_ms > before_ms || noted)
            continue;
        if (forget(engine, slot, now_ms) != CQ_DONE)
            return CQ_NO_MEMORY;
        ++*count;
    }
    return CQ_DONE;
}
