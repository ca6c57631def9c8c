/* order.c: an ordered set of numbers, for the tasks that must be found in creation order and stand
 * nowhere in it: dead letters of a queue, and tasks that outlived their bucket.
 *
 * Numbers stand in pages, each in order and all of them in order. A page that is full is split;
 * one that is added to at the end of all gets a new page behind it, so that rising numbers fill
 * their pages. An empty page goes; others are not joined. */
#include <string.h>

#include "codeq.h"

/* The page the number belongs into: the last whose first number is not above it, or the first. */
static uint32_t page_of(const cq_order *order, uint64_t number)
{
    uint32_t low = 0, high = order->count;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (order->pages[middle]->numbers[0] <= number)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* How many numbers of the page are below this one. */
static uint32_t place_of(const cq_page *page, uint64_t number)
{
    uint32_t low = 0, high = page->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (page->numbers[middle] < number)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

cq_status cq_order_reserve(cq_order *order, uint64_t number)
{
    if (order->count > 0 && order->pages[page_of(order, number)]->count < CQ_PAGE_NUMBERS)
        return CQ_DONE;
    if (order->count == order->cap) {
        uint32_t cap = order->cap ? order->cap * 2 : 1;
        cq_page **pages = realloc(order->pages, cap * sizeof(cq_page *));
        if (pages == NULL)
            return CQ_NO_MEMORY;
        order->pages = pages;
        order->cap = cap;
    }
    if (order->spare == NULL)
        order->spare = malloc(sizeof *order->spare);
    return order->spare == NULL ? CQ_NO_MEMORY : CQ_DONE;
}

/* Puts the reserved page, empty, at this place among the pages. */
static cq_page *open_page(cq_order *order, uint32_t at)
{
    cq_page *page = order->spare;
    CQ_ASSERT(page != NULL && order->count < order->cap);
    order->spare = NULL;
    page->count = 0;
    memmove(order->pages + at + 1, order->pages + at, (order->count - at) * sizeof(cq_page *));
    order->pages[at] = page;
    order->count++;
    return page;
}

/* Makes room in a full page; returns the page that the number belongs into now. */
static cq_page *split(cq_order *order, uint32_t at, uint64_t number)
{
    cq_page *page = order->pages[at];
    cq_page *next = open_page(order, at + 1);
    if (at + 2 == order->count && number > page->numbers[CQ_PAGE_NUMBERS - 1])
        return next;
    page->count = CQ_PAGE_NUMBERS / 2;
    next->count = CQ_PAGE_NUMBERS - page->count;
    memcpy(next->numbers, page->numbers + page->count, next->count * sizeof next->numbers[0]);
    return number < next->numbers[0] ? page : next;
}

void cq_order_add(cq_order *order, uint64_t number)
{
    uint32_t at = order->count == 0 ? 0 : page_of(order, number);
    cq_page *page = order->count == 0 ? open_page(order, 0) : order->pages[at];
    if (page->count == CQ_PAGE_NUMBERS)
        page = split(order, at, number);
    uint32_t place = place_of(page, number);
    CQ_ASSERT(place == page->count || page->numbers[place] != number);
    memmove(page->numbers + place + 1, page->numbers + place,
            (page->count - place) * sizeof page->numbers[0]);
    page->numbers[place] = number;
    page->count++;
}

void cq_order_remove(cq_order *order, uint64_t number)
{
    CQ_ASSERT(order->count > 0);
    uint32_t at = page_of(order, number);
    cq_page *page = order->pages[at];
    uint32_t place = place_of(page, number);
    CQ_ASSERT(place < page->count && page->numbers[place] == number);
    page->count--;
    memmove(page->numbers + place, page->numbers + place + 1,
            (page->count - place) * sizeof page->numbers[0]);
    if (page->count > 0)
        return;
    free(page);
    order->count--;
    memmove(order->pages + at, order->pages + at + 1, (order->count - at) * sizeof(cq_page *));
    if (order->count == 0)
        cq_order_free(order);
}

bool cq_order_next(const cq_order *order, uint64_t *number)
{
    if (order->count == 0)
        return false;
    uint32_t at = page_of(order, *number);
    uint32_t place = place_of(order->pages[at], *number);
    if (place == order->pages[at]->count) {
        if (++at == order->count)
            return false;
        place = 0;
    }
    *number = order->pages[at]->numbers[place];
    return true;
}

void cq_order_free(cq_order *order)
{
    for (uint32_t i = 0; i < order->count; i++)
        free(order->pages[i]);
    free(order->pages);
    free(order->spare);
    *order = (cq_order){0};
}
