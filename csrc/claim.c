/* claim.c: ready tasks become leased, in the order of their queues, until the transport has them or
 * they are given back. */
#include "codeq.h"

/* Of one task beside its stored body and the splice: id 38, attempts 6, time of creation 19, tag
 * and length 6, less the 10 in front of a stored body that are no field. And of the message. */
#define ASSIGNMENT_BYTES_MAX 64

/* --- claim ------------------------------------------------------------------------------------ */

/* The queues a claim may take from, in the order named; those that do not exist are left out. */
typedef struct sources {
    cq_tenant *every; /* all queues of this tenant, or NULL */
    cq_queue **named; /* with `every`: those of its limited queues that admit the worker */
    size_t count, next;
    bool in_order;
} sources;

static cq_status find_every(const cq_engine *engine, const cq_want *want, sources *from)
{
    cq_tenant *tenant = from->every = cq_tenant_find(engine, want->tenant);
    from->in_order = false;
    if (tenant == NULL || tenant->limited == NULL)
        return CQ_DONE;
    from->named = malloc(tenant->limited_count * sizeof(cq_queue *));
    if (from->named == NULL)
        return CQ_NO_MEMORY;
    for (cq_queue *queue = tenant->limited; queue != NULL; queue = queue->next_limited) {
        if (queue->top != NULL && cq_queue_admits(engine, queue, want->worker))
            from->named[from->count++] = queue;
    }
    return CQ_DONE;
}

/* Names the queues; CQ_NO_MEMORY leaves nothing to free. */
static cq_status find_sources(const cq_engine *engine, const cq_want *want, sources *from)
{
    *from = (sources){.in_order = want->in_order};
    if (want->commands == NULL)
        return find_every(engine, want, from);
    from->named = malloc((want->command_count + 1) * sizeof(cq_queue *));
    if (from->named == NULL)
        return CQ_NO_MEMORY;
    for (size_t i = 0; i < want->command_count; i++) {
        cq_queue *queue = cq_queue_find(engine, want->tenant, want->commands[i]);
        if (queue != NULL && cq_queue_admits(engine, queue, want->worker))
            from->named[from->count++] = queue;
    }
    return CQ_DONE;
}

static bool goes_before(const cq_slot *a, const cq_slot *b)
{
    if (a->priority != b->priority)
        return a->priority > b->priority;
    return cq_id_number(a->id) < cq_id_number(b->id);
}

/* The queue whose top goes next; NULL when nothing is ready. */
static cq_queue *next_queue(sources *from)
{
    cq_queue *best = NULL;
    if (from->every != NULL && from->every->ready.count > 0)
        best = CQ_OWNER(cq_queue, heap_at, from->every->ready.items[0].at);
    for (; from->in_order && from->next < from->count; from->next++) {
        if (from->named[from->next]->top != NULL)
            return from->named[from->next];
    }
    for (size_t i = from->next; i < from->count; i++) {
        cq_queue *queue = from->named[i];
        if (queue->top != NULL && (best == NULL || goes_before(queue->top, best->top)))
            best = queue;
    }
    return best;
}

static cq_status start_claim(cq_engine *engine, const cq_want *want, cq_claim *claim)
{
    claim->lease_until_ms = cq_plus(want->now_ms, want->lease_ms > 0 ? want->lease_ms : 0);
    claim->holder = cq_holder_open(engine, want->tenant, want->worker, want->subject);
    if (claim->holder == NULL)
        return CQ_NO_MEMORY;
    if (++engine->serial == 0)
        ++engine->serial;
    claim->serial = engine->serial;
    return cq_splice_make(&claim->splice, want->worker, claim->lease_until_ms, want->now_ms);
}

/* Leases the top of the queue; CQ_NO_MEMORY changes nothing. */
static cq_status lease(cq_engine *engine, cq_queue *queue, cq_claim *claim, int64_t now_ms)
{
    cq_slot *slot = queue->top;
    if (cq_heap_reserve(&engine->due, 1) != CQ_DONE ||
        cq_numbers_reserve(&claim->tasks, 1) != CQ_DONE)
        return CQ_NO_MEMORY;
    cq_bytes worker = claim->holder->worker;
    if (cq_consumer_reserve(engine, queue, worker) != CQ_DONE)
        return CQ_NO_MEMORY;
    uint8_t *to = cq_log_record(engine, now_ms, claim->holder, CQ_CLAIMED_BYTES);
    if (to == NULL) {
        cq_consumer_give_up(engine, queue, worker);
        return CQ_NO_MEMORY;
    }
    CQ_ASSERT(slot->state == CQ_READY && slot->attempts < slot->max_attempts);
    slot->holder = claim->holder;
    claim->holder->refs++;
    cq_slot_set_state(engine, slot, CQ_LEASED);
    slot->attempts++;
    slot->updated_ms = now_ms;
    slot->lease = claim->serial;
    slot->flags |= CQ_FLAG_UNDELIVERED;
    cq_slot_schedule(engine, slot, claim->lease_until_ms);
    cq_log_wrote(engine, cq_claimed_put(to, slot));
    claim->tasks.items[claim->tasks.count++] = cq_id_number(slot->id);
    queue->label->claimed++;
    queue->tally->claimed++;
    cq_ready_pop(engine, queue);
    return CQ_DONE;
}

cq_status cq_task_claim(cq_engine *engine, const cq_want *want, cq_claim *claim)
{
    sources from;
    *claim = (cq_claim){0};
    cq_tell_time(engine, want->now_ms);
    if (find_sources(engine, want, &from) != CQ_DONE)
        return CQ_NO_MEMORY;
    cq_status status = CQ_DONE;
    cq_queue *queue = next_queue(&from);
    if (queue != NULL)
        status = start_claim(engine, want, claim);
    int64_t bytes = ASSIGNMENT_BYTES_MAX;
    int64_t around = ASSIGNMENT_BYTES_MAX;
    around += (int64_t)claim->splice.before_len + claim->splice.after_len;
    while (queue != NULL && status == CQ_DONE && claim->tasks.count < want->count_max) {
        bytes += around + queue->top->body_len;
        if (claim->tasks.count > 0 && bytes > want->bytes_max)
            break;
        status = lease(engine, queue, claim, want->now_ms);
        queue = next_queue(&from);
    }
    free(from.named);
    return status;
}

void cq_claim_free(cq_engine *engine, cq_claim *claim)
{
    free(claim->tasks.items);
    free(claim->splice.data);
    cq_holder_release(engine, claim->holder);
    *claim = (cq_claim){0};
}

cq_slot *cq_claim_slot(const cq_engine *engine, const cq_claim *claim, uint32_t index)
{
    cq_slot *slot = cq_table_at(&engine->table, claim->tasks.items[index]);
    return slot != NULL && slot->state == CQ_LEASED && slot->lease == claim->serial ? slot : NULL;
}

void cq_claim_delivered(cq_engine *engine, const cq_claim *claim)
{
    for (uint32_t i = 0; i < claim->tasks.count; i++) {
        cq_slot *slot = cq_claim_slot(engine, claim, i);
        if (slot != NULL)
            slot->flags &= (uint8_t)~CQ_FLAG_UNDELIVERED;
    }
}

cq_status cq_claim_give_back(cq_engine *engine, const cq_claim *claim, int64_t now_ms,
                             uint32_t *count)
{
    *count = 0;
    cq_tell_time(engine, now_ms);
    for (uint32_t i = 0; i < claim->tasks.count; i++) {
        cq_slot *slot = cq_claim_slot(engine, claim, i);
        if (slot == NULL)
            continue;
        if (cq_task_go_back_untried(engine, slot, now_ms) != CQ_DONE)
            return CQ_NO_MEMORY;
        ++*count;
    }
    return CQ_DONE;
}
