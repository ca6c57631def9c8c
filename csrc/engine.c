/* engine.c: the engine as a whole, and what every transition does to a slot. */
#include <string.h>

#include "codeq.h"

/* --- the engine ------------------------------------------------------------------------------- */

cq_engine *cq_engine_new(const cq_settings *settings)
{
    cq_engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL)
        return NULL;
    engine->set = *settings;
    engine->random = settings->seed;
    engine->now_ms = INT64_MIN;
    if (cq_log_init(&engine->log, 1, 0, 1) != CQ_DONE) {
        free(engine);
        return NULL;
    }
    return engine;
}

static void free_slot(cq_slot *slot)
{
    if (slot->state == CQ_READY || slot->state == CQ_DELAYED || slot->state == CQ_LEASED)
        free(slot->body);
    free(slot->error);
}

static void free_slots(cq_table *table)
{
    for (size_t i = 0; i < table->count; i++) {
        cq_block *block = table->blocks[table->start + i];
        for (int j = 0; block != NULL && j < CQ_BUCKET_SLOTS; j++)
            free_slot(&block->slots[j]);
    }
    for (size_t i = 0; i < table->detached.cap; i++) {
        for (cq_node *node = table->detached.heads[i]; node != NULL; node = node->next)
            free_slot(&((cq_detached *)node)->slot);
    }
    cq_table_free(table);
}

/* Frees every object of the map, which begins with its node. */
static void free_nodes(cq_map *map)
{
    for (size_t i = 0; i < map->cap; i++) {
        for (cq_node *node = map->heads[i], *next; node != NULL; node = next) {
            next = node->next;
            free(node);
        }
    }
    cq_map_free(map);
}

void cq_engine_free(cq_engine *engine)
{
    if (engine == NULL)
        return;
    free_slots(&engine->table);
    cq_log_free(engine);
    for (size_t i = 0; i < engine->queues.cap; i++) {
        for (cq_node *node = engine->queues.heads[i]; node != NULL; node = node->next) {
            cq_ready_free(engine, (cq_queue *)node);
            cq_order_free(&((cq_queue *)node)->dead_numbers);
        }
    }
    for (size_t i = 0; i < engine->tenants.cap; i++) {
        for (cq_node *node = engine->tenants.heads[i]; node != NULL; node = node->next)
            cq_heap_free(&((cq_tenant *)node)->ready);
    }
    free_nodes(&engine->queues);
    free_nodes(&engine->tenants);
    free_nodes(&engine->holders);
    free_nodes(&engine->labels);
    free_nodes(&engine->tallies);
    free_nodes(&engine->rules);
    free_nodes(&engine->consumers);
    cq_map_free(&engine->levels);
    cq_heap_free(&engine->due);
    if (engine->spare_level != NULL) {
        free(engine->spare_level->ring);
        free(engine->spare_level->back.items);
        free(engine->spare_level);
    }
    free(engine->touched);
    free(engine->ended_ids.data);
    free(engine);
}

void cq_tell_time(cq_engine *engine, int64_t now_ms)
{
    if (now_ms > engine->now_ms)
        engine->now_ms = now_ms;
}

/* splitmix64 */
uint64_t cq_draw(cq_engine *engine)
{
    uint64_t z = engine->random += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

/* a + b, cut to what an int64 holds. */
int64_t cq_plus(int64_t a, int64_t b)
{
    int64_t sum;
    if (__builtin_add_overflow(a, b, &sum))
        return b > 0 ? INT64_MAX : INT64_MIN + 1;
    return sum;
}

/* --- what transitions share ------------------------------------------------------------------- */

static bool is_live(uint8_t state)
{
    return state == CQ_READY || state == CQ_DELAYED || state == CQ_LEASED;
}

static bool is_counted(uint8_t state)
{
    return is_live(state) || state == CQ_DEAD;
}

void cq_slot_set_state(cq_engine *engine, cq_slot *slot, uint8_t state)
{
    if (slot->state == CQ_LEASED)
        cq_lease_ends(engine, slot);
    if (is_counted(slot->state))
        --*cq_queue_count(slot->queue, slot->state);
    if (is_counted(state))
        ++*cq_queue_count(slot->queue, state);
    if (slot->state == CQ_DEAD)
        cq_order_remove(&slot->queue->dead_numbers, cq_id_number(slot->id));
    if (state == CQ_DEAD)
        cq_order_add(&slot->queue->dead_numbers, cq_id_number(slot->id));
    engine->live += is_live(state) - is_live(slot->state);
    slot->state = state;
    if (state == CQ_LEASED)
        cq_lease_begins(engine, slot);
}

void cq_slot_clear_holder(cq_engine *engine, cq_slot *slot)
{
    cq_holder_release(engine, slot->holder);
    slot->holder = NULL;
    slot->flags &= (uint8_t)~CQ_FLAG_UNDELIVERED;
}

/* Sets `text` to an own copy, NULL for an empty one. */
cq_status cq_text_copy(cq_bytes from, cq_text **text)
{
    *text = NULL;
    from = cq_utf8_cut(from, CQ_TEXT_BYTES_MAX);
    if (from.len == 0)
        return CQ_DONE;
    *text = malloc(sizeof **text + from.len);
    if (*text == NULL)
        return CQ_NO_MEMORY;
    (*text)->len = from.len;
    memcpy((*text)->data, from.ptr, from.len);
    return CQ_DONE;
}

void cq_slot_set_error(cq_slot *slot, cq_text *error)
{
    if (error == slot->error)
        return;
    free(slot->error);
    slot->error = error;
}

void cq_slot_drop_body(cq_engine *engine, cq_slot *slot)
{
    if (slot->body == NULL)
        return;
    free(slot->body);
    slot->body = NULL;
    engine->body_bytes -= slot->body_len;
}

void cq_slot_schedule(cq_engine *engine, cq_slot *slot, int64_t due_ms)
{
    slot->due_ms = due_ms;
    if (slot->heap_at == 0)
        cq_heap_push(&engine->due, due_ms, cq_id_number(slot->id), &slot->heap_at);
    else
        cq_heap_change(&engine->due, due_ms, cq_id_number(slot->id), &slot->heap_at);
}

void cq_slot_unschedule(cq_engine *engine, cq_slot *slot)
{
    if (slot->heap_at != 0)
        cq_heap_remove(&engine->due, &slot->heap_at);
    slot->due_ms = 0;
}

cq_slot *cq_task_find(const cq_engine *engine, const uint8_t *id, cq_bytes tenant)
{
    cq_slot *slot = cq_table_find(&engine->table, id);
    if (slot == NULL || slot->state == CQ_GONE)
        return NULL;
    return cq_bytes_equal(slot->queue->tenant->name, tenant) ? slot : NULL;
}
