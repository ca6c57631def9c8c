/* table.c: hash maps, ids, and the slots of all tasks in memory, found by number. */
#include <string.h>

#include "codeq.h"

#define HEADS_MIN 16
#define WINDOW_MIN 16
#define RANDOM_BITS 26 /* of an id */

_Static_assert(sizeof(cq_slot) <= 104, "memory per waiting task is a promise");

/* --- maps ------------------------------------------------------------------------------------- */

static void rehash(cq_map *map, cq_node **heads, size_t cap)
{
    for (size_t i = 0; i < map->cap; i++) {
        for (cq_node *node = map->heads[i], *next; node != NULL; node = next) {
            next = node->next;
            cq_node **head = &heads[node->hash & (cap - 1)];
            node->next = *head;
            *head = node;
        }
    }
    free(map->heads);
    map->heads = heads;
    map->cap = cap;
}

cq_status cq_map_reserve(cq_map *map)
{
    if (map->count < map->cap)
        return CQ_DONE;
    size_t cap = map->cap ? map->cap * 2 : HEADS_MIN;
    cq_node **heads = calloc(cap, sizeof *heads);
    if (heads == NULL)
        return CQ_NO_MEMORY;
    rehash(map, heads, cap);
    return CQ_DONE;
}

void cq_map_put(cq_map *map, cq_node *node, uint64_t hash)
{
    CQ_ASSERT(map->count < map->cap);
    cq_node **head = &map->heads[hash & (map->cap - 1)];
    node->hash = hash;
    node->next = *head;
    *head = node;
    map->count++;
}

void cq_map_remove(cq_map *map, cq_node *node)
{
    cq_node **link = &map->heads[node->hash & (map->cap - 1)];
    while (*link != node) {
        CQ_ASSERT(*link != NULL);
        link = &(*link)->next;
    }
    *link = node->next;
    map->count--;
}

static cq_node *same_hash(cq_node *node, uint64_t hash)
{
    while (node != NULL && node->hash != hash)
        node = node->next;
    return node;
}

cq_node *cq_map_first(const cq_map *map, uint64_t hash)
{
    return map->cap ? same_hash(map->heads[hash & (map->cap - 1)], hash) : NULL;
}

cq_node *cq_map_next(const cq_node *node)
{
    return same_hash(node->next, node->hash);
}

void cq_map_free(cq_map *map)
{
    free(map->heads);
    *map = (cq_map){0};
}

static uint64_t mix(uint64_t a, uint64_t b)
{
    a ^= UINT64_C(0x9E3779B97F4A7C15);
    b ^= UINT64_C(0xD6E8FEB86659FD93);
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

uint64_t cq_hash(uint64_t seed, const void *ptr, size_t len)
{
    const uint8_t *from = ptr;
    uint64_t hash = mix(seed, len);
    for (; len >= 8; from += 8, len -= 8)
        hash = mix(hash, cq_get_le(from, 8));
    uint64_t rest = 0;
    if (len > 0)
        memcpy(&rest, from, len);
    return mix(hash, rest);
}

uint64_t cq_fnv(uint64_t hash, const void *ptr, size_t len)
{
    const uint8_t *from = ptr;
    for (size_t i = 0; i < len; i++)
        hash = (hash ^ from[i]) * UINT64_C(1099511628211);
    return hash;
}

/* --- ids -------------------------------------------------------------------------------------- */

void cq_id_make(uint8_t id[CQ_ID_BYTES], int64_t ms, uint64_t number, uint32_t random)
{
    uint64_t high = (uint64_t)ms << 16 | UINT64_C(7) << 12 | number >> 36;
    uint64_t low = UINT64_C(2) << 62 | (number & ((UINT64_C(1) << 36) - 1)) << RANDOM_BITS |
                   (random & ((UINT32_C(1) << RANDOM_BITS) - 1));
    cq_put_be64(cq_put_be64(id, high), low);
}

uint64_t cq_id_number(const uint8_t id[CQ_ID_BYTES])
{
    uint64_t high = cq_get_be64(id);
    uint64_t low = cq_get_be64(id + 8);
    return (high & 0xFFF) << 36 | (low >> RANDOM_BITS & ((UINT64_C(1) << 36) - 1));
}

/* --- slots ------------------------------------------------------------------------------------ */

/* Room in the window for `index` blocks behind its start; CQ_NO_MEMORY changes nothing. */
static cq_status widen(cq_table *table, size_t index)
{
    if (table->start + index < table->cap)
        return CQ_DONE;
    size_t cap = table->cap ? table->cap : WINDOW_MIN;
    while (cap < 2 * (index + 1))
        cap *= 2;
    cq_block **blocks = calloc(cap, sizeof(cq_block *));
    if (blocks == NULL)
        return CQ_NO_MEMORY;
    if (table->count > 0)
        memcpy(blocks, table->blocks + table->start, table->count * sizeof(cq_block *));
    free(table->blocks);
    table->blocks = blocks;
    table->cap = cap;
    table->start = 0;
    return CQ_DONE;
}

static cq_block *new_block(cq_table *table)
{
    cq_block *block = table->spare;
    if (block != NULL) {
        table->spare = NULL;
        memset(block, 0, sizeof *block);
    } else {
        block = calloc(1, sizeof *block);
    }
    if (block != NULL)
        block->open = CQ_BUCKET_SLOTS;
    return block;
}

cq_status cq_table_reserve(cq_table *table, uint64_t number)
{
    uint64_t bucket = number / CQ_BUCKET_SLOTS;
    if (table->count == 0)
        table->first_bucket = bucket;
    CQ_ASSERT(bucket >= table->first_bucket);
    size_t index = bucket - table->first_bucket;
    if (index < table->count && table->blocks[table->start + index] != NULL)
        return CQ_DONE;
    if (widen(table, index) != CQ_DONE)
        return CQ_NO_MEMORY;
    cq_block *block = new_block(table);
    if (block == NULL)
        return CQ_NO_MEMORY;
    table->blocks[table->start + index] = block;
    if (index >= table->count)
        table->count = index + 1;
    return CQ_DONE;
}

cq_block *cq_table_block(const cq_table *table, uint64_t bucket)
{
    uint64_t index = bucket - table->first_bucket; /* wraps below the first: too large */
    return index < table->count ? table->blocks[table->start + index] : NULL;
}

static cq_detached *find_detached(const cq_table *table, uint64_t number)
{
    return (cq_detached *)cq_map_first(&table->detached, number);
}

cq_slot *cq_table_at(const cq_table *table, uint64_t number)
{
    cq_block *block = cq_table_block(table, number / CQ_BUCKET_SLOTS);
    if (block != NULL) {
        cq_slot *slot = &block->slots[number % CQ_BUCKET_SLOTS];
        if (slot->state != CQ_NONE && slot->state != CQ_MOVED)
            return slot;
    }
    cq_detached *detached = find_detached(table, number);
    return detached == NULL ? NULL : &detached->slot;
}

cq_slot *cq_table_find(const cq_table *table, const uint8_t id[CQ_ID_BYTES])
{
    cq_slot *slot = cq_table_at(table, cq_id_number(id));
    return slot != NULL && memcmp(slot->id, id, CQ_ID_BYTES) == 0 ? slot : NULL;
}

cq_slot *cq_table_adopt(cq_table *table, uint64_t number)
{
    if (cq_map_reserve(&table->detached) != CQ_DONE ||
        cq_order_reserve(&table->strays, number) != CQ_DONE)
        return NULL;
    cq_detached *detached = calloc(1, sizeof *detached);
    if (detached == NULL)
        return NULL;
    cq_map_put(&table->detached, &detached->node, number);
    cq_order_add(&table->strays, number);
    return &detached->slot;
}

cq_slot *cq_table_detach(cq_table *table, cq_slot *slot)
{
    CQ_ASSERT(!(slot->flags & CQ_FLAG_DETACHED));
    uint64_t number = cq_id_number(slot->id);
    cq_slot *own = cq_table_adopt(table, number);
    if (own == NULL)
        return NULL;
    *own = *slot;
    own->flags |= CQ_FLAG_DETACHED;
    memset(slot, 0, sizeof *slot);
    slot->state = CQ_MOVED;
    cq_table_block(table, number / CQ_BUCKET_SLOTS)->open--;
    return own;
}

void cq_table_forget(cq_table *table, cq_slot *slot)
{
    cq_detached *detached = (cq_detached *)((char *)slot - offsetof(cq_detached, slot));
    cq_order_remove(&table->strays, detached->node.hash);
    cq_map_remove(&table->detached, &detached->node);
    free(detached);
}

void cq_table_close(cq_table *table, uint64_t bucket)
{
    cq_block **place = &table->blocks[table->start + (bucket - table->first_bucket)];
    CQ_ASSERT(*place != NULL);
    if (table->spare == NULL)
        table->spare = *place;
    else
        free(*place);
    *place = NULL;
    while (table->count > 0 && table->blocks[table->start] == NULL) {
        table->start++;
        table->first_bucket++;
        table->count--;
    }
    if (table->count == 0)
        table->start = 0;
}

void cq_table_free(cq_table *table)
{
    for (size_t i = 0; i < table->count; i++)
        free(table->blocks[table->start + i]);
    for (size_t i = 0; i < table->detached.cap; i++) {
        for (cq_node *node = table->detached.heads[i], *next; node != NULL; node = next) {
            next = node->next;
            free(node);
        }
    }
    cq_map_free(&table->detached);
    cq_order_free(&table->strays);
    free(table->blocks);
    free(table->spare);
    *table = (cq_table){0};
}
