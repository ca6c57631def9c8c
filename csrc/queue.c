/* queue.c: tenants and their queues, lease holders; and the ready tasks of each queue in their
 * order: priority from high to low, then creation order.
 *
 * The ready tasks of one priority are a level: a ring of numbers in creation order, and beside it
 * a small heap of numbers that came back after later ones were queued. A task that is cancelled
 * leaves its number behind; it is skipped at the front, and a level with too many is swept. */
#include <string.h>

#include "codeq.h"

#define RING_MIN 4
#define SPARE_RING_MAX 4096 /* entries of the one emptied level that is kept for reuse */
#define STALE_MIN 64        /* below so many stale entries sweeping is not worth it */
#define BACK_LOOKS 64       /* of the tasks that came back, so many are asked how long they wait */

/* --- tenants and queues ----------------------------------------------------------------------- */

cq_tenant *cq_tenant_find(const cq_engine *engine, cq_bytes name)
{
    cq_node *node = cq_map_first(&engine->tenants, cq_hash(engine->set.seed, name.ptr, name.len));
    while (node != NULL && !cq_bytes_equal(((cq_tenant *)node)->name, name))
        node = cq_map_next(node);
    return (cq_tenant *)node;
}

/* Finds or makes a tenant with room for one more ready queue; NULL without memory. */
static cq_tenant *open_tenant(cq_engine *engine, cq_bytes name)
{
    cq_tenant *tenant = cq_tenant_find(engine, name);
    if (tenant != NULL) {
        uint32_t more = tenant->queue_count + 1 - tenant->ready.count;
        return cq_heap_reserve(&tenant->ready, more) == CQ_DONE ? tenant : NULL;
    }
    tenant = calloc(1, sizeof *tenant + name.len);
    if (tenant == NULL)
        return NULL;
    if (cq_map_reserve(&engine->tenants) != CQ_DONE ||
        cq_heap_reserve(&tenant->ready, 1) != CQ_DONE) {
        cq_heap_free(&tenant->ready);
        free(tenant);
        return NULL;
    }
    if (name.len > 0)
        memcpy(tenant + 1, name.ptr, name.len);
    tenant->name = (cq_bytes){(uint8_t *)(tenant + 1), name.len};
    cq_map_put(&engine->tenants, &tenant->node, cq_hash(engine->set.seed, name.ptr, name.len));
    return tenant;
}

static void release_tenant(cq_engine *engine, cq_tenant *tenant)
{
    if (tenant->queue_count > 0)
        return;
    cq_map_remove(&engine->tenants, &tenant->node);
    cq_heap_free(&tenant->ready);
    free(tenant);
}

uint64_t cq_queue_hash(const cq_engine *engine, cq_bytes tenant, cq_bytes command)
{
    return cq_hash(cq_hash(engine->set.seed, tenant.ptr, tenant.len), command.ptr, command.len);
}

cq_queue *cq_queue_find(const cq_engine *engine, cq_bytes tenant, cq_bytes command)
{
    cq_node *node = cq_map_first(&engine->queues, cq_queue_hash(engine, tenant, command));
    for (; node != NULL; node = cq_map_next(node)) {
        cq_queue *queue = (cq_queue *)node;
        if (cq_bytes_equal(queue->command, command) && cq_bytes_equal(queue->tenant->name, tenant))
            return queue;
    }
    return NULL;
}

static void join_tenant(cq_queue *queue, cq_tenant *tenant)
{
    queue->next_of_tenant = tenant->queues;
    if (tenant->queues != NULL)
        tenant->queues->prev_of_tenant = queue;
    tenant->queues = queue;
    tenant->queue_count++;
}

static void leave_tenant(cq_queue *queue)
{
    cq_tenant *tenant = queue->tenant;
    if (queue->prev_of_tenant != NULL)
        queue->prev_of_tenant->next_of_tenant = queue->next_of_tenant;
    else
        tenant->queues = queue->next_of_tenant;
    if (queue->next_of_tenant != NULL)
        queue->next_of_tenant->prev_of_tenant = queue->prev_of_tenant;
    tenant->queue_count--;
}

/* Gives a new queue, whose command stands behind it, its tenant and all that counts it;
 * CQ_NO_MEMORY changes nothing. */
static cq_status fill_queue(cq_engine *engine, cq_queue *queue, cq_tenant *tenant, uint32_t len)
{
    queue->command = (cq_bytes){(uint8_t *)(queue + 1), len};
    queue->label = cq_label_open(engine, queue->command);
    queue->tenant = tenant;
    if (queue->label == NULL || cq_map_reserve(&engine->queues) != CQ_DONE)
        return CQ_NO_MEMORY;
    queue->tally = cq_tally_open(engine, queue);
    if (queue->tally == NULL)
        return CQ_NO_MEMORY;
    if (cq_rule_join(engine, queue) != CQ_DONE) {
        cq_tally_leave(engine, queue);
        return CQ_NO_MEMORY;
    }
    join_tenant(queue, tenant);
    return CQ_DONE;
}

cq_queue *cq_queue_open(cq_engine *engine, cq_bytes tenant_name, cq_bytes command)
{
    cq_queue *queue = cq_queue_find(engine, tenant_name, command);
    if (queue != NULL)
        return queue;
    cq_tenant *tenant = open_tenant(engine, tenant_name);
    if (tenant == NULL)
        return NULL;
    queue = calloc(1, sizeof *queue + command.len);
    if (queue != NULL && command.len > 0)
        memcpy(queue + 1, command.ptr, command.len);
    if (queue == NULL || fill_queue(engine, queue, tenant, command.len) != CQ_DONE) {
        free(queue);
        release_tenant(engine, tenant);
        return NULL;
    }
    cq_map_put(&engine->queues, &queue->node, cq_queue_hash(engine, tenant_name, command));
    return queue;
}

static void untouch(cq_engine *engine, cq_queue *queue)
{
    if (queue->touched_at == 0)
        return;
    cq_queue *last = engine->touched[--engine->touched_count];
    engine->touched[queue->touched_at - 1] = last;
    last->touched_at = queue->touched_at;
    queue->touched_at = 0;
}

void cq_queue_release(cq_engine *engine, cq_queue *queue)
{
    if (queue->slots > 0)
        return;
    CQ_ASSERT(queue->ready + queue->delayed + queue->leased + queue->dead == 0);
    CQ_ASSERT(queue->dead_numbers.count == 0);
    cq_tenant *tenant = queue->tenant;
    untouch(engine, queue);
    cq_rule_leave(engine, queue);
    cq_tally_leave(engine, queue);
    cq_map_remove(&engine->queues, &queue->node);
    leave_tenant(queue);
    cq_heap_free(&queue->levels);
    cq_order_free(&queue->dead_numbers); /* what was reserved and not used */
    free(queue);
    release_tenant(engine, tenant);
}

uint64_t *cq_queue_count(cq_queue *queue, uint8_t state)
{
    switch (state) {
    case CQ_READY:
        return &queue->ready;
    case CQ_DELAYED:
        return &queue->delayed;
    case CQ_LEASED:
        return &queue->leased;
    default:
        CQ_ASSERT(state == CQ_DEAD);
        return &queue->dead;
    }
}

/* --- levels ----------------------------------------------------------------------------------- */

static uint64_t level_hash(const cq_queue *queue, int32_t priority)
{
    return cq_hash((uint32_t)priority, &queue, sizeof queue);
}

static int64_t rank(int32_t priority)
{
    return -(int64_t)priority;
}

static cq_level *top_level(const cq_queue *queue)
{
    return queue->levels.count ? CQ_OWNER(cq_level, heap_at, queue->levels.items[0].at) : NULL;
}

static cq_level *find_level(const cq_engine *engine, const cq_queue *queue, int32_t priority)
{
    cq_level *level = top_level(queue);
    if (level == NULL || level->priority == priority)
        return level;
    cq_node *node = cq_map_first(&engine->levels, level_hash(queue, priority));
    for (; node != NULL; node = cq_map_next(node)) {
        level = (cq_level *)node;
        if (level->queue == queue && level->priority == priority)
            return level;
    }
    return NULL;
}

static void free_level(cq_level *level)
{
    if (level == NULL)
        return;
    free(level->ring);
    free(level->back.items);
    free(level);
}

/* Takes the level out of its queue; the engine keeps one for reuse, rings and all. */
static void close_level(cq_engine *engine, cq_level *level)
{
    cq_heap_remove(&level->queue->levels, &level->heap_at);
    cq_map_remove(&engine->levels, &level->node);
    bool keep = level->ring_cap <= SPARE_RING_MAX && level->back.cap <= SPARE_RING_MAX;
    cq_level *freed = keep ? engine->spare_level : level;
    if (keep)
        engine->spare_level = level;
    free_level(freed);
}

/* A new level of the queue, empty; NULL without memory. */
static cq_level *open_level(cq_engine *engine, cq_queue *queue, int32_t priority)
{
    if (cq_map_reserve(&engine->levels) != CQ_DONE || cq_heap_reserve(&queue->levels, 1) != CQ_DONE)
        return NULL;
    cq_level *level = engine->spare_level;
    if (level == NULL)
        level = calloc(1, sizeof *level);
    if (level == NULL)
        return NULL;
    engine->spare_level = NULL;
    level->queue = queue;
    level->priority = priority;
    level->ready = level->ring_at = level->ring_count = level->back.count = 0;
    cq_map_put(&engine->levels, &level->node, level_hash(queue, priority));
    cq_heap_push(&queue->levels, rank(priority), 0, &level->heap_at);
    return level;
}

static uint64_t ring_number(const cq_level *level, uint32_t index)
{
    return level->ring[(level->ring_at + index) & (level->ring_cap - 1)];
}

/* Room for one more number; CQ_NO_MEMORY changes nothing. */
static cq_status ring_reserve(cq_level *level)
{
    if (level->ring_count < level->ring_cap)
        return CQ_DONE;
    uint64_t cap = level->ring_cap ? (uint64_t)level->ring_cap * 2 : RING_MIN;
    if (cap > UINT32_MAX)
        return CQ_NO_MEMORY;
    uint64_t *ring = malloc(cap * sizeof *ring);
    if (ring == NULL)
        return CQ_NO_MEMORY;
    for (uint32_t i = 0; i < level->ring_count; i++)
        ring[i] = ring_number(level, i);
    free(level->ring);
    level->ring = ring;
    level->ring_at = 0;
    level->ring_cap = (uint32_t)cap;
    return CQ_DONE;
}

cq_status cq_touch_reserve(cq_engine *engine)
{
    uint32_t need = engine->touched_count + engine->limited_count + 1;
    if (need <= engine->touched_cap)
        return CQ_DONE;
    uint32_t cap = engine->touched_cap ? engine->touched_cap * 2 : RING_MIN;
    cap = cap < need ? need : cap;
    cq_queue **touched = realloc(engine->touched, cap * sizeof *touched);
    if (touched == NULL)
        return CQ_NO_MEMORY;
    engine->touched = touched;
    engine->touched_cap = cap;
    return CQ_DONE;
}

cq_level *cq_ready_reserve(cq_engine *engine, cq_queue *queue, int32_t priority)
{
    if (cq_touch_reserve(engine) != CQ_DONE)
        return NULL;
    cq_level *level = find_level(engine, queue, priority);
    bool opened = level == NULL;
    if (opened)
        level = open_level(engine, queue, priority);
    if (level == NULL)
        return NULL;
    if (ring_reserve(level) != CQ_DONE || cq_numbers_reserve(&level->back, 1) != CQ_DONE) {
        if (opened)
            close_level(engine, level);
        return NULL;
    }
    return level;
}

static cq_slot *ready_slot(const cq_engine *engine, uint64_t number)
{
    cq_slot *slot = cq_table_at(&engine->table, number);
    return slot != NULL && slot->state == CQ_READY ? slot : NULL;
}

/* The first task of the level that is still ready; drops stale numbers in front of it. */
static cq_slot *level_front(const cq_engine *engine, cq_level *level)
{
    cq_slot *queued = NULL, *back = NULL;
    while (level->ring_count > 0 && (queued = ready_slot(engine, ring_number(level, 0))) == NULL) {
        level->ring_at++;
        level->ring_count--;
    }
    while (level->back.count > 0 && (back = ready_slot(engine, level->back.items[0])) == NULL)
        cq_numbers_pop(&level->back);
    if (queued == NULL || back == NULL)
        return queued != NULL ? queued : back;
    return level->back.items[0] < ring_number(level, 0) ? back : queued;
}

/* Finds the new top, too. A level without tasks must be closed. */
void cq_queue_settle(cq_engine *engine, cq_queue *queue)
{
    cq_heap *ready = &queue->tenant->ready;
    cq_level *level = top_level(queue);
    queue->top = level == NULL ? NULL : level_front(engine, level);
    CQ_ASSERT((level == NULL) == (queue->top == NULL));
    bool closed = queue->limited || (queue->rule != NULL && queue->rule->paused);
    if (queue->top == NULL || closed) {
        if (queue->heap_at != 0)
            cq_heap_remove(ready, &queue->heap_at);
        return;
    }
    uint64_t number = cq_id_number(queue->top->id);
    if (queue->heap_at == 0)
        cq_heap_push(ready, rank(level->priority), number, &queue->heap_at);
    else
        cq_heap_change(ready, rank(level->priority), number, &queue->heap_at);
}

void cq_queue_touch(cq_engine *engine, cq_queue *queue)
{
    if (queue->touched_at != 0)
        return;
    engine->touched[engine->touched_count++] = queue;
    queue->touched_at = engine->touched_count;
}

void cq_ready_put(cq_engine *engine, cq_level *level, cq_slot *slot)
{
    cq_queue *queue = slot->queue;
    uint64_t number = cq_id_number(slot->id);
    if (level->ring_count == 0 || number > ring_number(level, level->ring_count - 1))
        level->ring[(level->ring_at + level->ring_count++) & (level->ring_cap - 1)] = number;
    else
        cq_numbers_push(&level->back, number);
    level->ready++;
    cq_queue_touch(engine, queue);
    cq_slot *top = queue->top;
    if (top == NULL || slot->priority > top->priority ||
        (slot->priority == top->priority && number < cq_id_number(top->id)))
        cq_queue_settle(engine, queue);
}

void cq_ready_pop(cq_engine *engine, cq_queue *queue)
{
    cq_level *level = top_level(queue);
    CQ_ASSERT(queue->top != NULL && queue->top->state != CQ_READY);
    if (--level->ready == 0)
        close_level(engine, level);
    cq_queue_settle(engine, queue);
}

/* Drops the stale numbers of a level. */
static void sweep(const cq_engine *engine, cq_level *level)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < level->ring_count; i++) {
        uint64_t number = ring_number(level, i);
        if (ready_slot(engine, number) != NULL)
            level->ring[(level->ring_at + kept++) & (level->ring_cap - 1)] = number;
    }
    level->ring_count = kept;
    uint32_t count = level->back.count;
    level->back.count = 0;
    for (uint32_t i = 0; i < count; i++) {
        /* Pushing never reaches past the entry that was read last. */
        uint64_t number = level->back.items[i];
        if (ready_slot(engine, number) != NULL)
            cq_numbers_push(&level->back, number);
    }
}

void cq_ready_drop(cq_engine *engine, cq_slot *slot)
{
    cq_queue *queue = slot->queue;
    cq_level *level = find_level(engine, queue, slot->priority);
    CQ_ASSERT(level != NULL && level->priority == slot->priority && level->ready > 0);
    bool was_top = queue->top == slot;
    uint64_t entries = (uint64_t)level->ring_count + level->back.count;
    if (--level->ready == 0)
        close_level(engine, level);
    else if (entries > 2 * (uint64_t)level->ready + STALE_MIN)
        sweep(engine, level);
    if (was_top)
        cq_queue_settle(engine, queue);
}

/* When the first of the level's queued tasks became ready, or an earlier one of the first that came
 * back. The ring is in the order in which its tasks became ready. */
static int64_t level_since(cq_engine *engine, cq_level *level)
{
    int64_t since_ms = INT64_MAX;
    (void)level_front(engine, level);
    for (uint32_t i = 0; i <= BACK_LOOKS && i <= level->back.count; i++) {
        if (i == 0 && level->ring_count == 0)
            continue;
        uint64_t number = i == 0 ? ring_number(level, 0) : level->back.items[i - 1];
        const cq_slot *slot = ready_slot(engine, number);
        if (slot == NULL)
            continue;
        int64_t ready_ms = slot->due_ms > slot->updated_ms ? slot->due_ms : slot->updated_ms;
        since_ms = ready_ms < since_ms ? ready_ms : since_ms;
    }
    return since_ms;
}

int64_t cq_queue_ready_since(cq_engine *engine, cq_queue *queue, uint32_t *looks)
{
    int64_t since_ms = INT64_MAX;
    for (uint32_t i = 0; i < queue->levels.count && *looks > 0; i++, --*looks) {
        int64_t level_ms =
            level_since(engine, CQ_OWNER(cq_level, heap_at, queue->levels.items[i].at));
        since_ms = level_ms < since_ms ? level_ms : since_ms;
    }
    return since_ms == INT64_MAX ? CQ_NEVER : since_ms;
}

void cq_ready_free(cq_engine *engine, cq_queue *queue)
{
    while (queue->levels.count > 0) {
        cq_level *level = top_level(queue);
        cq_heap_remove(&queue->levels, &level->heap_at);
        cq_map_remove(&engine->levels, &level->node);
        free_level(level);
    }
    cq_heap_free(&queue->levels);
}

/* --- holders ---------------------------------------------------------------------------------- */

static uint64_t holder_hash(const cq_engine *engine, cq_bytes tenant, cq_bytes worker,
                            cq_bytes subject)
{
    uint64_t hash = cq_hash(engine->set.seed, tenant.ptr, tenant.len);
    return cq_hash(cq_hash(hash, worker.ptr, worker.len), subject.ptr, subject.len);
}

cq_holder *cq_holder_open(cq_engine *engine, cq_bytes tenant, cq_bytes worker, cq_bytes subject)
{
    uint64_t hash = holder_hash(engine, tenant, worker, subject);
    cq_holder *holder;
    cq_node *node = cq_map_first(&engine->holders, hash);
    for (; node != NULL; node = cq_map_next(node)) {
        holder = (cq_holder *)node;
        if (cq_bytes_equal(holder->worker, worker) && cq_bytes_equal(holder->subject, subject) &&
            cq_bytes_equal(holder->tenant, tenant)) {
            holder->refs++;
            return holder;
        }
    }
    holder = calloc(1, sizeof *holder + tenant.len + worker.len + subject.len);
    if (holder == NULL || cq_map_reserve(&engine->holders) != CQ_DONE) {
        free(holder);
        return NULL;
    }
    uint8_t *at = cq_bytes_keep((uint8_t *)(holder + 1), &holder->tenant, tenant);
    cq_bytes_keep(cq_bytes_keep(at, &holder->worker, worker), &holder->subject, subject);
    holder->refs = 1;
    cq_map_put(&engine->holders, &holder->node, hash);
    return holder;
}

void cq_holder_release(cq_engine *engine, cq_holder *holder)
{
    if (holder == NULL || --holder->refs > 0)
        return;
    cq_map_remove(&engine->holders, &holder->node);
    free(holder);
}
