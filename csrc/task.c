/* task.c: every transition of a task but the claim. Each reserves what it needs, then changes
 * memory and writes its record; so it happens whole or not at all. */
#include <string.h>

#include "codeq.h"

static const cq_bytes NOTHING = {0};

static cq_bytes literal(const char *text)
{
    return (cq_bytes){(const uint8_t *)text, (uint32_t)strlen(text)};
}

/* --- create ----------------------------------------------------------------------------------- */

/* Gives the item its id; with a key and shards such that it falls on the shard of the key. */
static void make_id(cq_engine *engine, cq_create *item, cq_bytes tenant, int64_t ms)
{
    uint32_t shards = item->key.len > 0 ? engine->set.shard_count : 1;
    uint64_t wanted = 0;
    if (shards > 1) {
        wanted = cq_fnv(cq_fnv(CQ_FNV_START, tenant.ptr, tenant.len), "", 1);
        wanted = cq_fnv(wanted, item->key.ptr, item->key.len) % shards;
    }
    do
        cq_id_make(item->id, ms, engine->next_number, (uint32_t)cq_draw(engine));
    while (shards > 1 && cq_fnv(CQ_FNV_START, item->id, CQ_ID_BYTES) % shards != wanted);
}

static int64_t due_of(const cq_create *item, int64_t now_ms)
{
    int64_t due_ms = item->run_at_ms;
    if (due_ms == CQ_NEVER && item->delay_seconds > 0)
        due_ms = cq_plus(now_ms, (int64_t)item->delay_seconds * 1000);
    return due_ms > now_ms ? due_ms : CQ_NEVER;
}

/* A new slot, still without body, state and place. */
static void fill_slot(cq_engine *engine, cq_slot *slot, const cq_create *item, cq_queue *queue,
                      int64_t now_ms)
{
    memset(slot, 0, sizeof *slot);
    memcpy(slot->id, item->id, CQ_ID_BYTES);
    slot->queue = queue;
    slot->created_ms = slot->updated_ms = now_ms;
    slot->priority = item->priority;
    slot->max_attempts = item->max_attempts;
    if (item->max_attempts <= 0)
        slot->max_attempts = engine->set.max_attempts_default;
    if (item->key.len > 0)
        slot->flags |= CQ_FLAG_KEY;
    if (item->webhook.len > 0)
        slot->flags |= CQ_FLAG_WEBHOOK;
    if (item->trace_parent.len + item->trace_state.len > 0)
        slot->flags |= CQ_FLAG_TRACE;
}

/* Accounts for a created slot whose record was written. */
static void admit(cq_engine *engine, cq_slot *slot)
{
    cq_log *log = &engine->log;
    slot->created_chunk = log->next_seq;
    cq_segment *segment = cq_log_segment(log, log->next_seq);
    segment->held++;
    segment->live++;
    engine->body_bytes += slot->body_len;
    engine->live_bytes += slot->body_len;
    slot->queue->slots++;
    slot->queue->label->created++;
    slot->queue->tally->created++;
}

/* Makes one task in `queue`; CQ_NO_MEMORY changes nothing. */
static cq_status create_one(cq_engine *engine, cq_create *item, cq_queue *queue, int64_t now_ms)
{
    uint64_t number = engine->next_number;
    CQ_ASSERT(number <= CQ_NUMBER_MAX);
    int64_t id_ms = now_ms > engine->last_id_ms ? now_ms : engine->last_id_ms;
    int64_t due_ms = due_of(item, now_ms);
    if (cq_table_reserve(&engine->table, number) != CQ_DONE ||
        cq_heap_reserve(&engine->due, 1) != CQ_DONE)
        return CQ_NO_MEMORY;
    make_id(engine, item, queue->tenant->name, id_ms);
    cq_block *block = cq_table_block(&engine->table, number / CQ_BUCKET_SLOTS);
    cq_slot *slot = &block->slots[number % CQ_BUCKET_SLOTS];
    cq_slot made;
    fill_slot(engine, &made, item, queue, now_ms);
    size_t body_size = cq_body_size(item, queue, made.max_attempts);
    made.body_len = (uint32_t)body_size;
    made.body = malloc(body_size);
    bool over = engine->body_bytes + (int64_t)body_size > engine->set.payload_memory_bytes;
    if (made.body == NULL || (over && cq_numbers_append(&engine->log.drop, number) != CQ_DONE)) {
        free(made.body);
        return CQ_NO_MEMORY;
    }
    uint8_t *to = cq_log_create(engine, cq_created_size(item, due_ms, body_size));
    cq_level *level = NULL;
    if (to != NULL && due_ms == CQ_NEVER)
        level = cq_ready_reserve(engine, queue, item->priority);
    if (to == NULL || (due_ms == CQ_NEVER && level == NULL)) {
        free(made.body);
        return CQ_NO_MEMORY;
    }
    cq_body_put(made.body, item, queue, made.max_attempts, now_ms);
    int64_t key_end_ms = cq_plus(now_ms, engine->set.key_window_ms);
    *slot = made;
    cq_log_wrote(engine, cq_created_put(to, slot, item, due_ms, key_end_ms, body_size));
    engine->next_number++;
    engine->last_id_ms = id_ms;
    block->seen++;
    admit(engine, slot);
    if (level != NULL) {
        cq_slot_set_state(engine, slot, CQ_READY);
        cq_ready_put(engine, level, slot);
    } else {
        cq_slot_set_state(engine, slot, CQ_DELAYED);
        cq_slot_schedule(engine, slot, due_ms);
    }
    return CQ_DONE;
}

cq_status cq_task_create(cq_engine *engine, cq_create *items, size_t count, cq_bytes tenant,
                         int64_t now_ms, uint32_t *made)
{
    cq_queue *queue = NULL;
    *made = 0;
    cq_tell_time(engine, now_ms);
    for (size_t i = 0; i < count; i++) {
        cq_create *item = &items[i];
        if (item->code != CQ_OK || item->replayed || item->same_as >= 0)
            continue;
        if (queue == NULL || !cq_bytes_equal(queue->command, item->command))
            queue = cq_queue_open(engine, tenant, item->command);
        if (queue == NULL)
            return CQ_NO_MEMORY;
        if (queue->rule != NULL)
            item->code = (uint8_t)cq_create_govern(item, &queue->rule->policy);
        if (item->code != CQ_OK) {
            cq_queue_release(engine, queue);
            queue = NULL;
            continue;
        }
        if (create_one(engine, item, queue, now_ms) != CQ_DONE) {
            cq_queue_release(engine, queue);
            return CQ_NO_MEMORY;
        }
        ++*made;
    }
    return CQ_DONE;
}

/* --- going back ------------------------------------------------------------------------------- */

/* A leased task becomes ready or delayed. Takes `error` over (slot->error = unchanged); on
 * CQ_NO_MEMORY nothing changed, and it is freed unless it is the slot's. */
static cq_status go_back(cq_engine *engine, cq_slot *slot, int32_t attempts, int64_t delay_ms,
                         cq_text *error, int64_t now_ms)
{
    bool ready = delay_ms <= 0;
    cq_level *level = NULL;
    size_t size = cq_returned_size(error == NULL ? 0 : error->len);
    uint8_t *to = cq_log_record(engine, now_ms, NULL, size);
    if (to != NULL && ready)
        level = cq_ready_reserve(engine, slot->queue, slot->priority);
    if (to == NULL || (ready && level == NULL)) {
        if (error != slot->error)
            free(error);
        return CQ_NO_MEMORY;
    }
    cq_slot_set_error(slot, error);
    slot->attempts = attempts;
    slot->updated_ms = now_ms;
    cq_slot_set_state(engine, slot, ready ? CQ_READY : CQ_DELAYED);
    cq_slot_clear_holder(engine, slot);
    if (ready)
        cq_slot_unschedule(engine, slot);
    else
        cq_slot_schedule(engine, slot, cq_plus(now_ms, delay_ms));
    cq_log_wrote(engine, cq_returned_put(to, slot));
    if (ready)
        cq_ready_put(engine, level, slot);
    return CQ_DONE;
}

cq_status cq_task_go_back_untried(cq_engine *engine, cq_slot *slot, int64_t now_ms)
{
    return go_back(engine, slot, slot->attempts - 1, 0, slot->error, now_ms);
}

/* A number in 0..most. The bias of the remainder is far below a millisecond. */
static int64_t draw_upto(cq_engine *engine, int64_t most)
{
    return most <= 0 ? 0 : (int64_t)(cq_draw(engine) % ((uint64_t)most + 1));
}

/* min(base * 2^attempts, max) */
static int64_t exponential(const cq_settings *set, int32_t attempts)
{
    if (attempts >= 62 || set->backoff_base_ms > set->backoff_max_ms >> attempts)
        return set->backoff_max_ms;
    return set->backoff_base_ms << attempts;
}

static int64_t linear(const cq_settings *set, int32_t attempts)
{
    if (attempts > 0 && set->backoff_base_ms > set->backoff_max_ms / attempts)
        return set->backoff_max_ms;
    return set->backoff_base_ms * attempts;
}

/* How long a task waits after this many attempts, in ms. */
static int64_t backoff(cq_engine *engine, int32_t attempts)
{
    const cq_settings *set = &engine->set;
    int64_t most = exponential(set, attempts);
    switch (set->backoff) {
    case CQ_BACKOFF_FIXED:
        return linear(set, 1);
    case CQ_BACKOFF_LINEAR:
        return linear(set, attempts);
    case CQ_BACKOFF_EXPONENTIAL:
        return most;
    case CQ_BACKOFF_EXP_EQUAL_JITTER:
        return most / 2 + draw_upto(engine, most / 2);
    default:
        return draw_upto(engine, most);
    }
}

/* --- the end ---------------------------------------------------------------------------------- */

/* How a task ends. `error` goes into the record; that of a dead letter stays in memory too. */
typedef struct ending {
    uint8_t state;
    uint8_t flags;
    cq_bytes result, error, artifacts;
    const cq_holder *by; /* NULL = no worker */
    int64_t now_ms;
} ending;

static int64_t keeping_end(const cq_engine *engine, const cq_slot *slot, const ending *how)
{
    const cq_settings *set = &engine->set;
    const cq_rule *rule = slot->queue->rule;
    int64_t keep_ms = how->state == CQ_DEAD ? set->dead_retention_ms : set->retention_ms;
    if (rule != NULL && rule->policy.retention_ms > 0)
        keep_ms = rule->policy.retention_ms;
    int64_t end_ms = cq_plus(how->now_ms, keep_ms);
    int64_t key_end_ms = cq_plus(slot->created_ms, set->key_window_ms);
    return slot->flags & CQ_FLAG_KEY && key_end_ms > end_ms ? key_end_ms : end_ms;
}

static cq_status watch_reserve(cq_engine *engine)
{
    cq_buffer *ids = &engine->ended_ids;
    if (ids->cap - ids->len >= CQ_ID_BYTES)
        return CQ_DONE;
    size_t cap = ids->cap ? ids->cap * 2 : 64 * CQ_ID_BYTES;
    uint8_t *data = realloc(ids->data, cap);
    if (data == NULL)
        return CQ_NO_MEMORY;
    ids->data = data;
    ids->cap = cap;
    return CQ_DONE;
}

static void report_end(cq_engine *engine, cq_slot *slot)
{
    if (!(slot->flags & CQ_FLAG_WATCHED))
        return;
    memcpy(engine->ended_ids.data + engine->ended_ids.len, slot->id, CQ_ID_BYTES);
    engine->ended_ids.len += CQ_ID_BYTES;
    slot->flags &= (uint8_t)~CQ_FLAG_WATCHED;
}

/* Room for all that an end needs; where its record goes, or NULL without memory. A dead letter's
 * place in the heap is taken over from its lease. */
static uint8_t *reserve_ending(cq_engine *engine, cq_slot *slot, const ending *how, cq_text **error)
{
    CQ_ASSERT(how->state != CQ_DEAD || slot->heap_at != 0);
    *error = NULL;
    if (cq_log_reserve_end(engine, slot) != CQ_DONE || watch_reserve(engine) != CQ_DONE)
        return NULL;
    if (how->state == CQ_DEAD) {
        cq_order *dead_numbers = &slot->queue->dead_numbers;
        if (cq_order_reserve(dead_numbers, cq_id_number(slot->id)) != CQ_DONE ||
            cq_text_copy(how->error, error) != CQ_DONE)
            return NULL;
    }
    uint8_t *to = cq_log_record(engine, how->now_ms, how->by,
                                cq_ended_size(how->result, how->error, how->artifacts));
    if (to == NULL)
        free(*error);
    return to;
}

/* Ends a live task; CQ_NO_MEMORY changes nothing. */
static cq_status end(cq_engine *engine, cq_slot *slot, const ending *how)
{
    cq_text *error;
    uint8_t *to = reserve_ending(engine, slot, how, &error);
    if (to == NULL)
        return CQ_NO_MEMORY;
    bool was_ready = slot->state == CQ_READY;
    uint64_t seq = engine->log.next_seq;
    int64_t expires_ms = keeping_end(engine, slot, how);
    cq_slot_set_error(slot, error);
    cq_slot_drop_body(engine, slot);
    cq_slot_set_state(engine, slot, how->state);
    cq_count_end(slot, how->state, how->now_ms);
    report_end(engine, slot);
    if (how->by == NULL)
        cq_slot_clear_holder(engine, slot);
    slot->flags &= (uint8_t)~CQ_FLAG_UNDELIVERED;
    slot->updated_ms = how->now_ms;
    if (how->state == CQ_DEAD)
        cq_slot_schedule(engine, slot, expires_ms);
    else
        cq_slot_unschedule(engine, slot);
    slot->due_ms = expires_ms;
    slot->ended_chunk = seq;
    to = cq_ended_put(to, slot, how->flags, how->result, how->error, how->artifacts);
    cq_log_wrote(engine, to);
    if (slot->flags & CQ_FLAG_WEBHOOK)
        cq_log_webhook(engine, slot, seq);
    if (was_ready)
        cq_ready_drop(engine, slot);
    if (how->state != CQ_DEAD)
        cq_log_final(engine, slot);
    return CQ_DONE;
}

/* --- lease calls ------------------------------------------------------------------------------ */

static bool owns(const cq_slot *slot, cq_bytes worker, const cq_caller *caller)
{
    const cq_holder *holder = slot->holder;
    if (caller->attempt >= 0 && caller->attempt != slot->attempts)
        return false;
    if (worker.len > 0)
        return cq_bytes_equal(worker, holder->worker);
    return caller->subject.len > 0 && (cq_bytes_equal(caller->subject, holder->worker) ||
                                       cq_bytes_equal(caller->subject, holder->subject));
}

/* Finds the task of a lease call and says whether the caller may act on it. */
static cq_code check_lease(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                           int64_t now_ms, cq_slot **slot)
{
    cq_tell_time(engine, now_ms);
    *slot = cq_task_find(engine, id, caller->tenant);
    if (*slot == NULL)
        return CQ_ABSENT;
    if ((*slot)->state != CQ_LEASED)
        return CQ_NOT_IN_PROGRESS;
    return owns(*slot, caller->worker, caller) ? CQ_OK : CQ_NOT_OWNER;
}

cq_status cq_task_heartbeat(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                            int64_t lease_ms, int64_t now_ms, cq_code *code)
{
    cq_slot *slot;
    *code = check_lease(engine, id, caller, now_ms, &slot);
    if (*code != CQ_OK)
        return CQ_DONE;
    uint8_t *to = cq_log_record(engine, now_ms, NULL, CQ_KEPT_BYTES);
    if (to == NULL)
        return CQ_NO_MEMORY;
    slot->updated_ms = now_ms;
    slot->flags &= (uint8_t)~CQ_FLAG_UNDELIVERED; /* who keeps a task has got it */
    cq_slot_schedule(engine, slot, cq_plus(now_ms, lease_ms > 0 ? lease_ms : 0));
    cq_log_wrote(engine, cq_kept_put(to, slot));
    return CQ_DONE;
}

cq_status cq_task_abandon(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                          int64_t now_ms, cq_code *code)
{
    cq_slot *slot;
    *code = check_lease(engine, id, caller, now_ms, &slot);
    return *code == CQ_OK ? cq_task_go_back_untried(engine, slot, now_ms) : CQ_DONE;
}

cq_status cq_task_nack(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                       cq_bytes reason, int64_t now_ms, cq_code *code, int64_t *delay_ms,
                       bool *dead)
{
    cq_slot *slot;
    cq_text *error;
    *dead = false;
    *code = check_lease(engine, id, caller, now_ms, &slot);
    if (*code != CQ_OK)
        return CQ_DONE;
    reason = cq_utf8_cut(reason, CQ_TEXT_BYTES_MAX);
    if (slot->attempts >= slot->max_attempts) {
        *dead = true;
        *delay_ms = 0;
        if (cq_trim(reason).len == 0)
            reason = literal("MAX_ATTEMPTS");
        return end(engine, slot, &(ending){.state = CQ_DEAD, .error = reason, .now_ms = now_ms});
    }
    if (*delay_ms < 0)
        *delay_ms = backoff(engine, slot->attempts);
    if (cq_text_copy(reason, &error) != CQ_DONE)
        return CQ_NO_MEMORY;
    return go_back(engine, slot, slot->attempts, *delay_ms, error, now_ms);
}

/* --- finish ----------------------------------------------------------------------------------- */

/* What a result finds; `serial` marks the tasks that this call ended. */
static cq_code check_finish(const cq_engine *engine, const cq_finish *item, const cq_caller *caller,
                            const cq_tenant *tenant, uint32_t serial, cq_slot **slot)
{
    *slot = cq_table_find(&engine->table, item->id);
    if (*slot == NULL || (*slot)->state == CQ_GONE || (*slot)->queue->tenant != tenant)
        return CQ_ABSENT;
    if ((*slot)->state == CQ_COMPLETED || (*slot)->state == CQ_FAILED)
        return (*slot)->lease == serial ? CQ_NOT_IN_PROGRESS : CQ_ENDED;
    if ((*slot)->state != CQ_LEASED)
        return CQ_NOT_IN_PROGRESS;
    cq_bytes worker = item->worker.len > 0 ? item->worker : caller->worker;
    return owns(*slot, worker, caller) ? CQ_OK : CQ_NOT_OWNER;
}

static cq_status finish_one(cq_engine *engine, cq_slot *slot, cq_finish *item, int64_t now_ms)
{
    ending how = {
        .state = item->completed ? CQ_COMPLETED : CQ_FAILED,
        .flags = item->has_result ? CQ_RECORD_HAS_RESULT : 0,
        .result = item->result,
        .error = item->completed ? NOTHING : cq_utf8_cut(item->error, CQ_TEXT_BYTES_MAX),
        .artifacts = item->artifacts,
        .by = slot->holder,
        .now_ms = now_ms,
    };
    return end(engine, slot, &how);
}

cq_status cq_task_finish(cq_engine *engine, cq_finish *items, size_t count, const cq_caller *caller,
                         int64_t now_ms, uint32_t *ended)
{
    cq_tell_time(engine, now_ms);
    const cq_tenant *tenant = cq_tenant_find(engine, caller->tenant);
    if (++engine->serial == 0)
        ++engine->serial;
    uint32_t serial = engine->serial;
    *ended = 0;
    for (size_t i = 0; i < count; i++) {
        cq_finish *item = &items[i];
        cq_slot *slot;
        if (item->code != CQ_OK)
            continue;
        item->code = (uint8_t)check_finish(engine, item, caller, tenant, serial, &slot);
        if (item->code != CQ_OK)
            continue;
        if (finish_one(engine, slot, item, now_ms) != CQ_DONE) {
            item->code = CQ_UNAVAILABLE;
            return CQ_NO_MEMORY;
        }
        slot->lease = serial;
        item->completed_ms = now_ms;
        ++*ended;
    }
    return CQ_DONE;
}

/* --- cancel, requeue, purge ------------------------------------------------------------------- */

cq_status cq_slot_cancel(cq_engine *engine, cq_slot *slot, int64_t now_ms)
{
    ending how = {.state = CQ_FAILED, .error = literal("CANCELLED"), .now_ms = now_ms};
    return end(engine, slot, &how);
}

cq_status cq_task_cancel(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                         cq_code *code)
{
    cq_tell_time(engine, now_ms);
    cq_slot *slot = cq_task_find(engine, id, tenant);
    *code = slot == NULL ? CQ_ABSENT : CQ_NOT_PENDING;
    if (slot == NULL || (slot->state != CQ_READY && slot->state != CQ_DELAYED))
        return CQ_DONE;
    *code = CQ_OK;
    return cq_slot_cancel(engine, slot, now_ms);
}

/* The dead letter of this id, else NULL and the code that says why. */
static cq_slot *find_dead(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                          cq_code *code)
{
    cq_tell_time(engine, now_ms);
    cq_slot *slot = cq_task_find(engine, id, tenant);
    *code = slot == NULL ? CQ_ABSENT : slot->state == CQ_DEAD ? CQ_OK : CQ_NOT_FOUND;
    return *code == CQ_OK ? slot : NULL;
}

cq_status cq_slot_requeue(cq_engine *engine, cq_slot *slot, int64_t now_ms)
{
    uint8_t *to = cq_log_record(engine, now_ms, NULL, CQ_NUMBER_BYTES);
    cq_level *level = to == NULL ? NULL : cq_ready_reserve(engine, slot->queue, slot->priority);
    if (level == NULL)
        return CQ_NO_MEMORY;
    cq_slot_set_error(slot, NULL);
    slot->body = NULL; /* on disk; takes the place of ended_chunk */
    slot->attempts = 0;
    slot->updated_ms = now_ms;
    cq_slot_unschedule(engine, slot);
    cq_slot_set_state(engine, slot, CQ_READY);
    cq_log_wrote(engine, cq_number_put(to, CQ_RECORD_REQUEUED, cq_id_number(slot->id)));
    cq_ready_put(engine, level, slot);
    return CQ_DONE;
}

cq_status cq_task_requeue(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                          cq_code *code)
{
    cq_slot *slot = find_dead(engine, id, tenant, now_ms, code);
    return slot == NULL ? CQ_DONE : cq_slot_requeue(engine, slot, now_ms);
}

cq_status cq_slot_purge(cq_engine *engine, cq_slot *slot, int64_t now_ms)
{
    uint8_t *to = NULL;
    if (cq_log_reserve_end(engine, slot) == CQ_DONE)
        to = cq_log_record(engine, now_ms, NULL, CQ_NUMBER_BYTES);
    if (to == NULL)
        return CQ_NO_MEMORY;
    cq_log_wrote(engine, cq_number_put(to, CQ_RECORD_PURGED, cq_id_number(slot->id)));
    cq_slot_set_error(slot, NULL);
    cq_slot_unschedule(engine, slot);
    cq_slot_set_state(engine, slot, CQ_GONE);
    cq_log_final(engine, slot);
    return CQ_DONE;
}

cq_status cq_task_purge(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                        cq_code *code)
{
    cq_slot *slot = find_dead(engine, id, tenant, now_ms, code);
    return slot == NULL ? CQ_DONE : cq_slot_purge(engine, slot, now_ms);
}

/* --- time ------------------------------------------------------------------------------------- */

static cq_status become_ready(cq_engine *engine, cq_slot *slot)
{
    cq_level *level = cq_ready_reserve(engine, slot->queue, slot->priority);
    if (level == NULL)
        return CQ_NO_MEMORY;
    int64_t due_ms = slot->due_ms;
    cq_slot_unschedule(engine, slot);
    slot->due_ms = due_ms;
    cq_slot_set_state(engine, slot, CQ_READY);
    cq_ready_put(engine, level, slot);
    return CQ_DONE;
}

/* A lease that nobody ended. One that was never delivered does not count as an attempt. */
static cq_status lease_over(cq_engine *engine, cq_slot *slot, int64_t now_ms)
{
    if (slot->flags & CQ_FLAG_UNDELIVERED)
        return cq_task_go_back_untried(engine, slot, now_ms);
    cq_bytes reason = literal("LEASE_EXPIRED");
    cq_text *error;
    cq_queue *queue = slot->queue;
    cq_status status;
    if (slot->attempts >= slot->max_attempts) {
        status = end(engine, slot, &(ending){.state = CQ_DEAD, .error = reason, .now_ms = now_ms});
    } else {
        if (cq_text_copy(reason, &error) != CQ_DONE)
            return CQ_NO_MEMORY;
        int64_t delay_ms = backoff(engine, slot->attempts);
        status = go_back(engine, slot, slot->attempts, delay_ms, error, now_ms);
    }
    queue->label->expired += status == CQ_DONE;
    queue->tally->expired += status == CQ_DONE;
    return status;
}

static cq_status time_came(cq_engine *engine, cq_slot *slot, int64_t now_ms)
{
    switch (slot->state) {
    case CQ_DELAYED:
        return become_ready(engine, slot);
    case CQ_LEASED:
        return lease_over(engine, slot, now_ms);
    default:
        CQ_ASSERT(slot->state == CQ_DEAD);
        return cq_slot_purge(engine, slot, now_ms);
    }
}

cq_status cq_task_tick(cq_engine *engine, int64_t now_ms, int64_t limit, int64_t *moved)
{
    const cq_heap *due = &engine->due;
    *moved = 0;
    cq_tell_time(engine, now_ms);
    while (*moved < limit && due->count > 0 && due->items[0].rank <= now_ms) {
        if (time_came(engine, CQ_OWNER(cq_slot, heap_at, due->items[0].at), now_ms) != CQ_DONE)
            return CQ_NO_MEMORY;
        ++*moved;
    }
    return CQ_DONE;
}
