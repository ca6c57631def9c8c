/* rule.c: what was laid down for a queue, whether it exists or not: that it is paused, how long its
 * ended tasks are kept, and how many worker ids may hold its leases at once.
 *
 * A queue with such a bound stands in its tenant's list of limited queues instead of the heap of
 * ready ones: who may claim from it depends on the worker. Its consumers are the worker ids that
 * hold leases of it, counted while the bound is there. */
#include <string.h>

#include "codeq.h"

/* A worker id that holds leases of a limited queue. */
typedef struct consumer {
    cq_node node;
    const cq_queue *queue;
    uint64_t leases; /* 0 only while one is being made */
    cq_bytes worker;
} consumer;

/* --- rules ------------------------------------------------------------------------------------ */

static cq_rule *find_rule(const cq_engine *engine, cq_bytes tenant, cq_bytes command)
{
    if (engine->rules.count == 0)
        return NULL;
    cq_node *node = cq_map_first(&engine->rules, cq_queue_hash(engine, tenant, command));
    for (; node != NULL; node = cq_map_next(node)) {
        cq_rule *rule = (cq_rule *)node;
        if (cq_bytes_equal(rule->command, command) && cq_bytes_equal(rule->tenant, tenant))
            return rule;
    }
    return NULL;
}

/* Finds the rule or makes one that says nothing yet; NULL without memory. */
static cq_rule *open_rule(cq_engine *engine, cq_bytes tenant, cq_bytes command)
{
    cq_rule *rule = find_rule(engine, tenant, command);
    if (rule != NULL)
        return rule;
    rule = calloc(1, sizeof *rule + tenant.len + command.len);
    if (rule == NULL || cq_map_reserve(&engine->rules) != CQ_DONE) {
        free(rule);
        return NULL;
    }
    cq_bytes_keep(cq_bytes_keep((uint8_t *)(rule + 1), &rule->tenant, tenant), &rule->command,
                  command);
    cq_map_put(&engine->rules, &rule->node, cq_queue_hash(engine, tenant, command));
    cq_queue *queue = cq_queue_find(engine, tenant, command);
    if (queue != NULL)
        queue->rule = rule;
    return rule;
}

/* Frees a rule that says nothing any more. */
static void close_rule(cq_engine *engine, cq_rule *rule, cq_queue *queue)
{
    if (rule->paused || rule->policy.tiers != 0)
        return;
    if (queue != NULL)
        queue->rule = NULL;
    cq_map_remove(&engine->rules, &rule->node);
    free(rule);
}

cq_status cq_queue_pause(cq_engine *engine, cq_bytes tenant, cq_bytes command)
{
    cq_rule *rule = open_rule(engine, tenant, command);
    if (rule == NULL)
        return CQ_NO_MEMORY;
    rule->paused = true;
    cq_queue *queue = cq_queue_find(engine, tenant, command);
    if (queue != NULL)
        cq_queue_settle(engine, queue);
    return CQ_DONE;
}

cq_status cq_queue_resume(cq_engine *engine, cq_bytes tenant, cq_bytes command)
{
    cq_rule *rule = find_rule(engine, tenant, command);
    if (rule == NULL || !rule->paused)
        return CQ_DONE;
    if (cq_touch_reserve(engine) != CQ_DONE)
        return CQ_NO_MEMORY;
    rule->paused = false;
    cq_queue *queue = cq_queue_find(engine, tenant, command);
    if (queue != NULL) {
        cq_queue_settle(engine, queue);
        if (queue->ready > 0)
            cq_queue_touch(engine, queue); /* for the claims that wait */
    }
    close_rule(engine, rule, queue);
    return CQ_DONE;
}

cq_code cq_create_govern(cq_create *create, const cq_policy *policy)
{
    if (policy->tiers == 0)
        return CQ_OK;
    if (create->priority == 0 && !(policy->tiers & 1))
        create->priority = __builtin_ctz(policy->tiers);
    if (create->priority < 0 || create->priority > 31 || !(policy->tiers >> create->priority & 1))
        return CQ_PRIORITY_NO_TIER;
    if (create->max_attempts <= 0)
        create->max_attempts = policy->max_attempts;
    return CQ_OK;
}

/* --- consumers -------------------------------------------------------------------------------- */

static uint64_t consumer_hash(const cq_queue *queue, cq_bytes worker)
{
    return cq_hash(cq_hash(0, worker.ptr, worker.len), &queue, sizeof queue);
}

static consumer *find_consumer(const cq_engine *engine, const cq_queue *queue, cq_bytes worker)
{
    cq_node *node = cq_map_first(&engine->consumers, consumer_hash(queue, worker));
    for (; node != NULL; node = cq_map_next(node)) {
        consumer *one = (consumer *)node;
        if (one->queue == queue && cq_bytes_equal(one->worker, worker))
            return one;
    }
    return NULL;
}

static void drop_consumer(cq_engine *engine, cq_queue *queue, consumer *one)
{
    queue->consumers--;
    cq_map_remove(&engine->consumers, &one->node);
    free(one);
}

static void drop_consumers(cq_engine *engine, cq_queue *queue)
{
    for (size_t i = 0; i < engine->consumers.cap && queue->consumers > 0; i++) {
        cq_node *next;
        for (cq_node *node = engine->consumers.heads[i]; node != NULL; node = next) {
            next = node->next;
            if (((consumer *)node)->queue == queue)
                drop_consumer(engine, queue, (consumer *)node);
        }
    }
}

bool cq_queue_admits(const cq_engine *engine, const cq_queue *queue, cq_bytes worker)
{
    const cq_rule *rule = queue->rule;
    if (rule == NULL)
        return true;
    if (rule->paused)
        return false;
    return !queue->limited || queue->consumers < rule->policy.consumers_max ||
           find_consumer(engine, queue, worker) != NULL;
}

cq_status cq_consumer_reserve(cq_engine *engine, cq_queue *queue, cq_bytes worker)
{
    if (!queue->limited || find_consumer(engine, queue, worker) != NULL)
        return CQ_DONE;
    consumer *one = calloc(1, sizeof *one + worker.len);
    if (one == NULL || cq_map_reserve(&engine->consumers) != CQ_DONE) {
        free(one);
        return CQ_NO_MEMORY;
    }
    one->queue = queue;
    cq_bytes_keep((uint8_t *)(one + 1), &one->worker, worker);
    queue->consumers++;
    cq_map_put(&engine->consumers, &one->node, consumer_hash(queue, worker));
    return CQ_DONE;
}

void cq_consumer_give_up(cq_engine *engine, cq_queue *queue, cq_bytes worker)
{
    consumer *one = queue->limited ? find_consumer(engine, queue, worker) : NULL;
    if (one != NULL && one->leases == 0)
        drop_consumer(engine, queue, one);
}

static void consumer_gets(cq_engine *engine, const cq_slot *slot)
{
    consumer *one = find_consumer(engine, slot->queue, slot->holder->worker);
    CQ_ASSERT(one != NULL);
    one->leases++;
}

/* A worker's last lease makes room for others: their claims are looked at again. */
static void consumer_loses(cq_engine *engine, const cq_slot *slot)
{
    cq_queue *queue = slot->queue;
    consumer *one = find_consumer(engine, queue, slot->holder->worker);
    CQ_ASSERT(one != NULL && one->leases > 0);
    if (--one->leases > 0)
        return;
    drop_consumer(engine, queue, one);
    if (queue->ready > 0)
        cq_queue_touch(engine, queue);
}

void cq_lease_begins(cq_engine *engine, const cq_slot *slot)
{
    cq_holder *holder = slot->holder;
    if (slot->queue->limited && !slot->queue->uncounted)
        consumer_gets(engine, slot);
    if (++holder->leases > 1)
        return;
    holder->prev_busy = NULL;
    holder->next_busy = engine->busy;
    if (engine->busy != NULL)
        engine->busy->prev_busy = holder;
    engine->busy = holder;
}

void cq_lease_ends(cq_engine *engine, const cq_slot *slot)
{
    cq_holder *holder = slot->holder;
    if (slot->queue->limited && !slot->queue->uncounted)
        consumer_loses(engine, slot);
    if (--holder->leases > 0)
        return;
    if (holder->prev_busy != NULL)
        holder->prev_busy->next_busy = holder->next_busy;
    else
        engine->busy = holder->next_busy;
    if (holder->next_busy != NULL)
        holder->next_busy->prev_busy = holder->prev_busy;
}

/* --- limited queues --------------------------------------------------------------------------- */

static void join_limited(cq_engine *engine, cq_queue *queue)
{
    cq_tenant *tenant = queue->tenant;
    queue->limited = true;
    queue->prev_limited = NULL;
    queue->next_limited = tenant->limited;
    if (tenant->limited != NULL)
        tenant->limited->prev_limited = queue;
    tenant->limited = queue;
    tenant->limited_count++;
    engine->limited_count++;
}

static void leave_limited(cq_engine *engine, cq_queue *queue)
{
    cq_tenant *tenant = queue->tenant;
    drop_consumers(engine, queue);
    queue->limited = queue->uncounted = false;
    if (queue->prev_limited != NULL)
        queue->prev_limited->next_limited = queue->next_limited;
    else
        tenant->limited = queue->next_limited;
    if (queue->next_limited != NULL)
        queue->next_limited->prev_limited = queue->prev_limited;
    tenant->limited_count--;
    engine->limited_count--;
}

cq_status cq_rule_join(cq_engine *engine, cq_queue *queue)
{
    cq_rule *rule = find_rule(engine, queue->tenant->name, queue->command);
    if (rule != NULL && rule->policy.consumers_max > 0) {
        if (cq_touch_reserve(engine) != CQ_DONE)
            return CQ_NO_MEMORY;
        join_limited(engine, queue);
    }
    queue->rule = rule;
    return CQ_DONE;
}

void cq_rule_leave(cq_engine *engine, cq_queue *queue)
{
    if (queue->limited)
        leave_limited(engine, queue);
}

cq_status cq_queue_govern(cq_engine *engine, cq_bytes tenant, cq_bytes command,
                          const cq_policy *policy)
{
    if (cq_touch_reserve(engine) != CQ_DONE)
        return CQ_NO_MEMORY;
    cq_rule *rule = open_rule(engine, tenant, command);
    if (rule == NULL)
        return CQ_NO_MEMORY;
    rule->policy = *policy;
    cq_queue *queue = cq_queue_find(engine, tenant, command);
    if (queue != NULL) {
        if (policy->consumers_max > 0 && !queue->limited) {
            join_limited(engine, queue);
            queue->uncounted = queue->leased > 0;
        } else if (policy->consumers_max == 0 && queue->limited) {
            leave_limited(engine, queue);
        }
        cq_queue_settle(engine, queue);
        if (queue->ready > 0)
            cq_queue_touch(engine, queue); /* others may be let in now */
    }
    close_rule(engine, rule, queue);
    return CQ_DONE;
}

/* How many leases the uncounted queues have; with `counted`, they are counted now. */
static uint64_t uncounted_leases(const cq_engine *engine, bool counted)
{
    uint64_t leases = 0;
    for (size_t i = 0; i < engine->tenants.cap; i++) {
        for (cq_node *node = engine->tenants.heads[i]; node != NULL; node = node->next) {
            cq_queue *queue = ((cq_tenant *)node)->limited;
            for (; queue != NULL; queue = queue->next_limited) {
                leases += queue->uncounted ? queue->leased : 0;
                queue->uncounted = queue->uncounted && !counted;
            }
        }
    }
    return leases;
}

/* Of all timed tasks it looks at as many as are needed to find the leases. CQ_NO_MEMORY: some are
 * not counted; the queue is not to be used. */
cq_status cq_consumers_count(cq_engine *engine)
{
    uint64_t left = uncounted_leases(engine, false);
    for (uint32_t i = 0; i < engine->due.count && left > 0; i++) {
        cq_slot *slot = CQ_OWNER(cq_slot, heap_at, engine->due.items[i].at);
        if (slot->state != CQ_LEASED || !slot->queue->uncounted)
            continue;
        if (cq_consumer_reserve(engine, slot->queue, slot->holder->worker) != CQ_DONE)
            return CQ_NO_MEMORY;
        consumer_gets(engine, slot);
        left--;
    }
    (void)uncounted_leases(engine, true);
    return CQ_DONE;
}

void cq_leases_verify(const cq_engine *engine)
{
    uint64_t leased = 0, limited = 0, held = 0, consumed = 0, consumers = 0;
    for (size_t i = 0; i < engine->queues.cap; i++) {
        for (cq_node *node = engine->queues.heads[i]; node != NULL; node = node->next) {
            const cq_queue *queue = (cq_queue *)node;
            leased += queue->leased;
            limited += queue->limited ? queue->leased : 0;
            consumers += queue->consumers;
            CQ_ASSERT(!queue->uncounted);
        }
    }
    for (size_t i = 0; i < engine->consumers.cap; i++) {
        for (cq_node *node = engine->consumers.heads[i]; node != NULL; node = node->next) {
            CQ_ASSERT(((consumer *)node)->leases > 0 && ((consumer *)node)->queue->limited);
            consumed += ((consumer *)node)->leases;
        }
    }
    for (const cq_holder *holder = engine->busy; holder != NULL; holder = holder->next_busy) {
        CQ_ASSERT(holder->leases > 0 && holder->refs >= holder->leases);
        held += holder->leases;
    }
    CQ_ASSERT(held == leased && consumed == limited && consumers == engine->consumers.count);
}
