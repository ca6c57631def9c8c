/* heap.c: a removable heap of owners by (rank, number), and a plain heap of numbers. */
#include "codeq.h"

#define WIDTH 4 /* children of an entry: fewer levels, and the children share a cache line or two */
#define CAP_MIN 4

static bool before(const cq_heap_entry *a, const cq_heap_entry *b)
{
    return a->rank < b->rank || (a->rank == b->rank && a->number < b->number);
}

static void set(cq_heap *heap, uint32_t place, cq_heap_entry entry)
{
    heap->items[place] = entry;
    *entry.at = place + 1;
}

/* Moves the entry from this place towards the root; returns where it stays. */
static uint32_t rise(cq_heap *heap, uint32_t place, cq_heap_entry entry)
{
    while (place > 0) {
        uint32_t parent = (place - 1) / WIDTH;
        if (!before(&entry, &heap->items[parent]))
            break;
        set(heap, place, heap->items[parent]);
        place = parent;
    }
    set(heap, place, entry);
    return place;
}

/* Moves the entry from this place away from the root. */
static void sink(cq_heap *heap, uint32_t place, cq_heap_entry entry)
{
    for (;;) {
        uint64_t first = (uint64_t)place * WIDTH + 1;
        if (first >= heap->count)
            break;
        uint64_t end = first + WIDTH < heap->count ? first + WIDTH : heap->count;
        uint32_t least = (uint32_t)first;
        for (uint32_t child = least + 1; child < end; child++) {
            if (before(&heap->items[child], &heap->items[least]))
                least = child;
        }
        if (!before(&heap->items[least], &entry))
            break;
        set(heap, place, heap->items[least]);
        place = least;
    }
    set(heap, place, entry);
}

cq_status cq_heap_reserve(cq_heap *heap, uint32_t more)
{
    if (more <= heap->cap - heap->count)
        return CQ_DONE;
    uint64_t cap = heap->cap ? heap->cap : CAP_MIN;
    while (cap - heap->count < more)
        cap *= 2;
    if (cap > UINT32_MAX)
        return CQ_NO_MEMORY;
    cq_heap_entry *items = realloc(heap->items, cap * sizeof *items);
    if (items == NULL)
        return CQ_NO_MEMORY;
    heap->items = items;
    heap->cap = (uint32_t)cap;
    return CQ_DONE;
}

void cq_heap_push(cq_heap *heap, int64_t rank, uint64_t number, uint32_t *at)
{
    CQ_ASSERT(heap->count < heap->cap && *at == 0);
    rise(heap, heap->count++, (cq_heap_entry){rank, number, at});
}

void cq_heap_remove(cq_heap *heap, uint32_t *at)
{
    uint32_t place = *at - 1;
    CQ_ASSERT(place < heap->count && heap->items[place].at == at);
    *at = 0;
    cq_heap_entry last = heap->items[--heap->count];
    if (place == heap->count)
        return;
    if (rise(heap, place, last) == place)
        sink(heap, place, last);
}

void cq_heap_change(cq_heap *heap, int64_t rank, uint64_t number, uint32_t *at)
{
    uint32_t place = *at - 1;
    CQ_ASSERT(place < heap->count && heap->items[place].at == at);
    cq_heap_entry entry = {rank, number, at};
    if (rise(heap, place, entry) == place)
        sink(heap, place, entry);
}

void cq_heap_moved(cq_heap *heap, uint32_t *at)
{
    if (*at != 0)
        heap->items[*at - 1].at = at;
}

void cq_heap_free(cq_heap *heap)
{
    free(heap->items);
    *heap = (cq_heap){0};
}

/* --- numbers ---------------------------------------------------------------------------------- */

cq_status cq_numbers_reserve(cq_numbers *numbers, uint32_t more)
{
    if (more <= numbers->cap - numbers->count)
        return CQ_DONE;
    uint64_t cap = numbers->cap ? numbers->cap : CAP_MIN;
    while (cap - numbers->count < more)
        cap *= 2;
    if (cap > UINT32_MAX)
        return CQ_NO_MEMORY;
    uint64_t *items = realloc(numbers->items, cap * sizeof *items);
    if (items == NULL)
        return CQ_NO_MEMORY;
    numbers->items = items;
    numbers->cap = (uint32_t)cap;
    return CQ_DONE;
}

void cq_numbers_push(cq_numbers *numbers, uint64_t number)
{
    CQ_ASSERT(numbers->count < numbers->cap);
    uint32_t place = numbers->count++;
    while (place > 0 && number < numbers->items[(place - 1) / 2]) {
        numbers->items[place] = numbers->items[(place - 1) / 2];
        place = (place - 1) / 2;
    }
    numbers->items[place] = number;
}

uint64_t cq_numbers_pop(cq_numbers *numbers)
{
    CQ_ASSERT(numbers->count > 0);
    uint64_t least = numbers->items[0];
    uint64_t last = numbers->items[--numbers->count];
    uint32_t place = 0;
    for (;;) {
        uint64_t child = (uint64_t)place * 2 + 1;
        if (child >= numbers->count)
            break;
        if (child + 1 < numbers->count && numbers->items[child + 1] < numbers->items[child])
            child++;
        if (numbers->items[child] >= last)
            break;
        numbers->items[place] = numbers->items[child];
        place = (uint32_t)child;
    }
    numbers->items[place] = last;
    return least;
}

cq_status cq_numbers_append(cq_numbers *numbers, uint64_t number)
{
    if (cq_numbers_reserve(numbers, 1) != CQ_DONE)
        return CQ_NO_MEMORY;
    numbers->items[numbers->count++] = number;
    return CQ_DONE;
}
