/* tally.c: what is counted since the process began, by command for the metrics and by queue for
 * the overview. A tally outlives its queue: one that runs empty now and then keeps its counts. */
#include <string.h>

#include "codeq.h"

/* Upper bounds; the last bucket has none. */
const int64_t CQ_LATENCY_MS[CQ_LATENCY_BUCKETS - 1] = {
    100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 120000, 300000, 600000, 1800000, 3600000};

/* --- labels ----------------------------------------------------------------------------------- */

static cq_label *find_label(const cq_engine *engine, cq_bytes name, uint64_t hash)
{
    cq_node *node = cq_map_first(&engine->labels, hash);
    while (node != NULL && !cq_bytes_equal(((cq_label *)node)->name, name))
        node = cq_map_next(node);
    return (cq_label *)node;
}

/* The label of a command, or that of all commands beyond the limit; NULL without memory. */
cq_label *cq_label_open(cq_engine *engine, cq_bytes name)
{
    uint64_t hash = cq_hash(engine->set.seed, name.ptr, name.len);
    cq_label *label = find_label(engine, name, hash);
    if (label != NULL)
        return label;
    if (engine->labels.count >= engine->set.command_labels_max) {
        name = (cq_bytes){(const uint8_t *)"_other", 6};
        hash = cq_hash(engine->set.seed, name.ptr, name.len);
        label = find_label(engine, name, hash);
        if (label != NULL)
            return label;
    }
    label = calloc(1, sizeof *label + name.len);
    if (label == NULL || cq_map_reserve(&engine->labels) != CQ_DONE) {
        free(label);
        return NULL;
    }
    memcpy(label + 1, name.ptr, name.len);
    label->name = (cq_bytes){(uint8_t *)(label + 1), name.len};
    label->next = engine->all_labels;
    engine->all_labels = label;
    cq_map_put(&engine->labels, &label->node, hash);
    return label;
}

/* --- tallies ---------------------------------------------------------------------------------- */

cq_tally *cq_tally_open(cq_engine *engine, cq_queue *queue)
{
    cq_bytes tenant = queue->tenant->name, command = queue->command;
    uint64_t hash = cq_queue_hash(engine, tenant, command);
    cq_node *node = cq_map_first(&engine->tallies, hash);
    for (; node != NULL; node = cq_map_next(node)) {
        cq_tally *known = (cq_tally *)node;
        if (cq_bytes_equal(known->command, command) && cq_bytes_equal(known->tenant, tenant)) {
            known->queue = queue;
            return known;
        }
    }
    cq_tally *tally = calloc(1, sizeof *tally + tenant.len + command.len);
    if (tally == NULL || cq_map_reserve(&engine->tallies) != CQ_DONE) {
        free(tally);
        return NULL;
    }
    cq_bytes_keep(cq_bytes_keep((uint8_t *)(tally + 1), &tally->tenant, tenant), &tally->command,
                  command);
    tally->queue = queue;
    cq_map_put(&engine->tallies, &tally->node, hash);
    return tally;
}

void cq_tally_leave(cq_engine *engine, cq_queue *queue)
{
    cq_tally *tally = queue->tally;
    tally->queue = NULL;
    queue->tally = NULL;
    uint64_t counted = tally->created + tally->claimed + tally->completed + tally->failed;
    counted += tally->dead + tally->expired;
    if (counted > 0 && engine->tallies.count <= CQ_TALLIES_MAX)
        return;
    cq_map_remove(&engine->tallies, &tally->node);
    free(tally);
}

void cq_count_end(cq_slot *slot, uint8_t state, int64_t now_ms)
{
    cq_label *label = slot->queue->label;
    cq_tally *tally = slot->queue->tally;
    int64_t latency_ms = now_ms > slot->created_ms ? now_ms - slot->created_ms : 0;
    int bucket = 0;
    while (bucket < CQ_LATENCY_BUCKETS - 1 && latency_ms > CQ_LATENCY_MS[bucket])
        bucket++;
    int which = state == CQ_COMPLETED ? 0 : 1;
    label->latency[which][bucket]++;
    tally->latency[bucket]++;
    label->latency_s[which] += (double)latency_ms / 1000;
    if (which == 0)
        label->completed++;
    else
        label->failed++;
    if (state == CQ_COMPLETED)
        tally->completed++;
    else if (state == CQ_DEAD)
        tally->dead++;
    else
        tally->failed++;
}

static int compare_bytes(cq_bytes a, cq_bytes b)
{
    uint32_t len = a.len < b.len ? a.len : b.len;
    int order = len ? memcmp(a.ptr, b.ptr, len) : 0;
    return order ? order : (a.len > b.len) - (a.len < b.len);
}

static int compare_tallies(const void *left, const void *right)
{
    const cq_tally *a = *(cq_tally *const *)left, *b = *(cq_tally *const *)right;
    int order = compare_bytes(a->command, b->command);
    return order ? order : compare_bytes(a->tenant, b->tenant);
}

cq_status cq_tally_list(const cq_engine *engine, cq_bytes tenant, cq_tally ***list, size_t *count)
{
    *count = 0;
    *list = malloc((engine->tallies.count + 1) * sizeof **list);
    if (*list == NULL)
        return CQ_NO_MEMORY;
    for (size_t i = 0; i < engine->tallies.cap; i++) {
        for (cq_node *node = engine->tallies.heads[i]; node != NULL; node = node->next) {
            cq_tally *tally = (cq_tally *)node;
            if (tenant.ptr == NULL || cq_bytes_equal(tally->tenant, tenant))
                (*list)[(*count)++] = tally;
        }
    }
    qsort(*list, *count, sizeof **list, compare_tallies);
    return CQ_DONE;
}
