/* codeq.h: every type, limit and status code of the C core, and each function's contract.
 *
 * Rules of csrc/: C11, no Python.h, no I/O, no clock, no globals that change. Outputs go through
 * pointers, results are a cq_status. A function that can fail reserves memory first and acts after,
 * so that a failure changes nothing. Bad input is a status, never an assertion.
 */
#ifndef CODEQ_H
#define CODEQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* CQ_ASSERT: cheap facts, on in every build. CQ_VERIFY: walks everything, debug build only. */
#define CQ_ASSERT(fact)                                                             \
    do {                                                                            \
        if (!(fact)) {                                                              \
            fprintf(stderr, "codeq: bug: %s (%s:%d)\n", #fact, __FILE__, __LINE__); \
            abort();                                                                \
        }                                                                           \
    } while (0)
#ifdef CODEQ_DEBUG
#define CQ_VERIFY(fact) CQ_ASSERT(fact)
#else
#define CQ_VERIFY(fact) ((void)0)
#endif

typedef enum cq_status {
    CQ_DONE = 0,
    CQ_NO_MEMORY = -1,
    CQ_MALFORMED = -2, /* bytes that are not what they should be; the caller says which */
    CQ_FULL = -3       /* the output has no room */
} cq_status;

/* What became of one item of a batch. codeq/errors.py has the same numbers (a test compares). */
typedef enum cq_code {
    CQ_OK = 0,
    CQ_COMMAND_REQUIRED = 1,
    CQ_COMMAND_INVALID = 2,
    CQ_WEBHOOK_INVALID = 3,
    CQ_RUN_AT_INVALID = 4,
    CQ_DELAY_INVALID = 5,
    CQ_PRIORITY_INVALID = 6,
    CQ_KEY_INVALID = 7,
    CQ_BODY_INVALID = 8,
    CQ_PAYLOAD_TOO_LARGE = 9,
    CQ_RESULT_TOO_LARGE = 10,
    CQ_KEY_CONFLICT = 11,
    CQ_UNAVAILABLE = 12,
    CQ_NOT_FOUND = 13,
    CQ_TASK_NOT_FOUND = 14,
    CQ_NOT_IN_PROGRESS = 15,
    CQ_NOT_OWNER = 16,
    CQ_STATUS_INVALID = 17,
    CQ_ERROR_REQUIRED = 18,
    CQ_RESULT_JSON_INVALID = 19,
    CQ_ARTIFACT_INVALID = 20,
    CQ_NOT_PENDING = 21,
    CQ_WORKER_ID_INVALID = 22,
    CQ_PRIORITY_NO_TIER = 23,
    /* answers of the engine that never leave the process */
    CQ_ENDED = 100, /* the task has ended and its slot is still in memory */
    CQ_ABSENT = 101 /* no slot: ended long ago, or never existed; the store knows */
} cq_code;

/* A borrowed run of bytes. ptr may be NULL when len is 0. */
typedef struct cq_bytes {
    const uint8_t *ptr;
    uint32_t len;
} cq_bytes;

#define CQ_ID_BYTES 16
#define CQ_ID_TEXT_BYTES 36
#define CQ_COMMAND_BYTES_MAX 256
#define CQ_KEY_BYTES_MAX 512
#define CQ_WORKER_BYTES_MAX 256
#define CQ_WEBHOOK_BYTES_MAX 2048
#define CQ_TEXT_BYTES_MAX 8192 /* reason and error texts are cut to this, at a UTF-8 boundary */
#define CQ_NEVER INT64_MIN     /* no time given */

/* One create, decoded from a stream message or added by REST; borrowed from the batch's buffer. */
typedef struct cq_create {
    uint64_t seq;     /* the caller's number, echoed in the ack */
    cq_bytes command; /* trimmed by cq_create_check */
    cq_bytes payload;
    cq_bytes webhook;
    cq_bytes key; /* idempotency key; empty when blank after cq_create_check */
    cq_bytes trace_parent;
    cq_bytes trace_state;
    int64_t run_at_ms; /* milliseconds since the epoch, rounded up; CQ_NEVER when absent */
    int32_t priority;
    int32_t max_attempts;    /* as sent; <= 0 means absent */
    int32_t delay_seconds;   /* as sent */
    int32_t same_as;         /* index of an earlier item of this batch with the same key, or -1 */
    uint8_t code;            /* cq_code */
    uint8_t replayed;        /* the id is that of an earlier create with the same key */
    uint8_t id[CQ_ID_BYTES]; /* set by the engine, or by a replay */
} cq_create;

/* One result, likewise. */
typedef struct cq_finish {
    cq_bytes task_id; /* as sent (text) */
    cq_bytes status;  /* as sent; echoed when it is neither of the two */
    cq_bytes result;  /* JSON text; empty = null */
    cq_bytes error;
    cq_bytes artifacts;   /* JSON text of the stored list, empty when none (REST only) */
    cq_bytes worker;      /* worker id named for this item alone; empty = that of the call */
    int64_t completed_ms; /* set by the engine when the end is accepted */
    uint8_t id[CQ_ID_BYTES];
    uint8_t has_result; /* a result was sent at all */
    uint8_t completed;  /* status is COMPLETED (else FAILED), valid when code is CQ_OK */
    uint8_t code;
} cq_finish;

/* A growing output buffer. Zero it to start; free(data) to end. */
typedef struct cq_buffer {
    uint8_t *data;
    size_t len;
    size_t cap;
} cq_buffer;

/* === text.c: well-formed texts, and the bounds of a create and a result ======================= */

#define CQ_JSON_DEPTH_MAX 512   /* arrays and objects inside one another */
#define CQ_TRACE_BYTES_MAX 8192 /* a longer trace_parent or trace_state is dropped */
/* The range of a timestamp, years 1 to 9999, in seconds since the epoch. */
#define CQ_SECONDS_MIN INT64_C(-62135596800)
#define CQ_SECONDS_MAX INT64_C(253402300799)

/* Whether the text is UTF-8: nothing overlong, no surrogate, nothing above U+10FFFF. */
bool cq_utf8_valid(cq_bytes text);

/* The longest start of a UTF-8 text that has at most `len_max` bytes and cuts no character. */
cq_bytes cq_utf8_cut(cq_bytes text, uint32_t len_max);

/* The text without the white space (as Unicode has it) at both ends. */
cq_bytes cq_trim(cq_bytes text);

/* Whether a UTF-8 text holds a control character: U+0000-001F, U+007F-009F. */
bool cq_has_control(cq_bytes text);

/* Whether the bytes are one JSON value (RFC 8259) in UTF-8, at most CQ_JSON_DEPTH_MAX deep. */
bool cq_json_valid(cq_bytes text);

/* Writes the canonical text of an id: 36 bytes, lower case, no terminator. */
void cq_id_format(const uint8_t id[CQ_ID_BYTES], uint8_t text[CQ_ID_TEXT_BYTES]);

/* Whether the text is a UUID in canonical form; if so writes its 16 bytes. */
bool cq_id_parse(cq_bytes text, uint8_t id[CQ_ID_BYTES]);

/* Trims command and key, makes an empty payload `null`, drops trace texts out of bounds, and, when
 * code is CQ_OK, sets it to the first bound of the contract that the create breaks. */
void cq_create_check(cq_create *create, uint32_t payload_bytes_max);

/* Cuts the error text, blanks it when it is white space only (FAILED with `lenient_error`: makes it
 * `unspecified failure`), makes a result that was sent empty `null`, and, when code is CQ_OK, sets
 * it to what is wrong, else fills id and completed. */
void cq_finish_check(cq_finish *finish, uint32_t result_bytes_max, bool lenient_error);

/* === wire.c: stream messages (the protobuf subset of proto/) and records ====================== */

#define CQ_WIRE_ITEMS_MAX (UINT32_C(1) << 20) /* tasks, results, acks or commands in one message */

typedef enum cq_stream {
    CQ_PRODUCER_EVENT,        /* producerpb.ProducerEvent */
    CQ_PRODUCER_SERVER_EVENT, /* producerpb.ServerEvent */
    CQ_WORKER_EVENT,          /* workerpb.WorkerEvent */
    CQ_WORKER_SERVER_EVENT    /* workerpb.ServerEvent */
} cq_stream;

/* A growing list of borrowed texts. */
typedef struct cq_texts {
    cq_bytes *items;
    uint32_t count;
    uint32_t cap;
} cq_texts;

/* Hello, HelloAck, ServerError, Ready, Nack, Heartbeat, Abandon: their texts and numbers in the
 * order of the fields. */
typedef struct cq_call {
    cq_bytes text[2];
    int32_t number[2];
    cq_texts commands; /* Ready only */
} cq_call;

/* Any acknowledgement; each kind uses some of the fields. */
typedef struct cq_ack {
    uint64_t seq;
    cq_bytes task_id;
    cq_bytes error;
    int32_t delay_seconds;
    uint8_t ok;
    uint8_t dead;
} cq_ack;

/* workerpb.Task as a worker receives it. */
typedef struct cq_task {
    cq_bytes id;
    cq_bytes command;
    cq_bytes payload;
    cq_bytes webhook;
    cq_bytes status;
    cq_bytes worker;
    cq_bytes lease_until;
    cq_bytes tenant;
    int64_t created_ms; /* since the epoch, rounded down; 0 when absent or out of range */
    int64_t updated_ms;
    int32_t priority;
    int32_t max_attempts;
    int32_t attempts;
} cq_task;

/* A decoded event. Its records borrow from the message. */
typedef struct cq_event {
    uint32_t member; /* field number of the oneof member that counts; 0 = none that is known */
    uint32_t count;
    uint32_t cap;
    void *records; /* cq_create, cq_finish, cq_task, cq_ack or cq_call; malloc'ed */
} cq_event;

/* Decodes a message as the generated protobuf classes do. CQ_MALFORMED: no such message. CQ_FULL:
 * over CQ_WIRE_ITEMS_MAX. On any failure nothing is held; after CQ_DONE call cq_event_free, or take
 * `records` over (not those of a Ready). Of creates and results the codes are CQ_OK, except
 * CQ_RUN_AT_INVALID. */
cq_status cq_event_decode(cq_stream stream, cq_bytes message, cq_event *event);
void cq_event_free(cq_stream stream, cq_event *event);

/* Bytes of one record of a member, without its tag and length. */
size_t cq_record_size(cq_stream stream, uint32_t member, const void *record);

/* How many of the records (their sizes as above) go into one batch event of at most `len_max`
 * bytes, at least 1; `len` gets the length of that event. */
size_t cq_event_fit(const size_t *sizes, size_t count, size_t len_max, size_t *len);

/* Bytes of an event of one record that is no batch. */
size_t cq_event_size(size_t record_size);

/* Writes the event with these records; `to` has the room that cq_event_fit or cq_event_size said.
 * A member that is no batch takes exactly one. */
void cq_event_put(cq_stream stream, uint32_t member, const void *records, const size_t *sizes,
                  size_t count, uint8_t *to);

/* === order.c ================================================================================= */

/* An ordered set of numbers. Zero it to start. */
#define CQ_PAGE_NUMBERS 63
typedef struct cq_page {
    uint32_t count;
    uint64_t numbers[CQ_PAGE_NUMBERS];
} cq_page;
typedef struct cq_order {
    cq_page **pages;
    uint32_t count, cap; /* of pages */
    cq_page *spare;      /* reserved */
} cq_order;
cq_status cq_order_reserve(cq_order *order, uint64_t number); /* room for this number */
void cq_order_add(cq_order *order, uint64_t number);          /* reserved, and not there */
void cq_order_remove(cq_order *order, uint64_t number);       /* must be there */
/* Finds the first number that is not below *number; false = none. */
bool cq_order_next(const cq_order *order, uint64_t *number);
void cq_order_free(cq_order *order);

/* === table.c: hash maps, ids, and the slots of all tasks in memory ============================ */

/* A chained hash map of objects that begin with a node. Zero it to start. */
typedef struct cq_node {
    struct cq_node *next;
    uint64_t hash;
} cq_node;
typedef struct cq_map {
    cq_node **heads;
    size_t cap; /* heads, a power of two */
    size_t count;
} cq_map;
cq_status cq_map_reserve(cq_map *map);                      /* room for one more object */
void cq_map_put(cq_map *map, cq_node *node, uint64_t hash); /* after cq_map_reserve */
void cq_map_remove(cq_map *map, cq_node *node);
cq_node *cq_map_first(const cq_map *map, uint64_t hash); /* NULL = none, as of the next */
cq_node *cq_map_next(const cq_node *node);
void cq_map_free(cq_map *map); /* the heads, not the objects */

/* The object of which `place` is that field. */
#define CQ_OWNER(type, field, place) ((type *)((char *)(place) - offsetof(type, field)))

/* A 64-bit hash of the bytes; another seed gives another hash. */
uint64_t cq_hash(uint64_t seed, const void *ptr, size_t len);
/* FNV-1a 64, the hash that tells the shard of a task. Start with CQ_FNV_START. */
#define CQ_FNV_START UINT64_C(14695981039346656037)
uint64_t cq_fnv(uint64_t hash, const void *ptr, size_t len);

/* Ids are UUIDv7: 48 bits of ms, 48 bits of the task's number split around the variant, 26 random
 * bits. Numbers count the creates of a store, so their order is the creation order. */
#define CQ_NUMBER_MAX ((UINT64_C(1) << 48) - 1)
void cq_id_make(uint8_t id[CQ_ID_BYTES], int64_t ms, uint64_t number, uint32_t random);
uint64_t cq_id_number(const uint8_t id[CQ_ID_BYTES]);

typedef enum cq_state {
    CQ_NONE = 0, /* the number is not given out */
    CQ_READY = 1,
    CQ_DELAYED = 2,
    CQ_LEASED = 3,
    CQ_COMPLETED = 4,
    CQ_FAILED = 5,
    CQ_DEAD = 6,
    CQ_GONE = 7, /* taken away before its time: a purged dead letter, or cleaned up */
    CQ_MOVED = 8 /* the slot was detached from its block */
} cq_state;

/* Flags of a slot; the first three also stand in the created record. */
#define CQ_FLAG_KEY 1
#define CQ_FLAG_WEBHOOK 2
#define CQ_FLAG_TRACE 4
#define CQ_FLAG_UNDELIVERED 8 /* leased by a claim that the transport has not taken yet */
#define CQ_FLAG_WATCHED 16    /* its end is to be reported */
#define CQ_FLAG_DETACHED 32   /* does not stand in a block any more */
#define CQ_FLAGS_STORED 7

typedef struct cq_queue cq_queue;
typedef struct cq_engine cq_engine;
typedef struct cq_holder cq_holder;

/* A text of its own; malloc'ed. */
typedef struct cq_text {
    uint32_t len;
    uint8_t data[];
} cq_text;

/* Who holds leases: interned, one object per (tenant, worker, subject). */
struct cq_holder {
    cq_node node;
    uint32_t refs;
    uint64_t leases;                  /* held now */
    cq_holder *next_busy, *prev_busy; /* of those with leases */
    cq_bytes tenant, worker, subject;
};

/* One task. 112 bytes: there may be ten million. */
typedef struct cq_slot {
    uint8_t id[CQ_ID_BYTES];
    union {
        uint8_t *body;        /* live: the stored body (record.c), NULL when it is on disk only */
        uint64_t ended_chunk; /* ended: sequence of the chunk with the ended record */
    };
    cq_queue *queue;
    cq_holder *holder;       /* leased: whose; completed or failed: who ended it; else NULL */
    cq_text *error;          /* live or dead; NULL when empty. Of other ends the record knows it */
    int64_t created_ms : 48; /* shares a word with the next two; 48 bits last until the year 6429 */
    uint64_t state : 8;      /* cq_state */
    uint64_t flags : 8;
    int64_t updated_ms;     /* ended: the end */
    int64_t due_ms;         /* delayed, and ready since then: due; leased: its end; ended: end of
                             * keeping; else 0 */
    uint64_t created_chunk; /* sequence of the chunk with the created or carried record */
    uint32_t body_len;      /* of the stored body, in memory or not */
    uint32_t heap_at;       /* place in the heap of due times + 1, 0 = none */
    int32_t priority;
    int32_t attempts;
    int32_t max_attempts;
    uint32_t lease; /* leased: serial of its claim; ended: of the finish call */
} cq_slot;

#define CQ_BUCKET_SLOTS 256

/* The slots of one bucket: 256 consecutive numbers. */
typedef struct cq_block {
    uint32_t open; /* slots that are neither ended nor detached, given out or not */
    uint32_t seen; /* numbers given out */
    cq_slot slots[CQ_BUCKET_SLOTS];
} cq_block;

typedef struct cq_detached {
    cq_node node; /* hash = number */
    cq_slot slot;
} cq_detached;

/* All slots by number. Blocks stand in a window that moves with the buckets. */
typedef struct cq_table {
    cq_block **blocks; /* blocks[start + i] is of bucket first_bucket + i; NULL = closed */
    size_t start, count, cap;
    uint64_t first_bucket;
    cq_map detached;
    cq_order strays; /* the numbers of the detached */
    cq_block *spare;
} cq_table;

/* Makes sure that the block of this number is there, which is no earlier than the first one. */
cq_status cq_table_reserve(cq_table *table, uint64_t number);
cq_block *cq_table_block(const cq_table *table, uint64_t bucket); /* NULL when closed */
/* The slot of a number, wherever it stands, NULL = none; and one whose own id this is. */
cq_slot *cq_table_at(const cq_table *table, uint64_t number);
cq_slot *cq_table_find(const cq_table *table, const uint8_t id[CQ_ID_BYTES]);
/* An empty detached slot, and one moved out of its block; NULL without memory. */
cq_slot *cq_table_adopt(cq_table *table, uint64_t number);
cq_slot *cq_table_detach(cq_table *table, cq_slot *slot);
void cq_table_forget(cq_table *table, cq_slot *detached); /* frees a detached slot */
void cq_table_close(cq_table *table, uint64_t bucket);    /* frees a block */
void cq_table_free(cq_table *table);

/* === heap.c ================================================================================== */

/* A removable heap: least rank, then number first. The owner keeps its place + 1 in *at. */
typedef struct cq_heap_entry {
    int64_t rank;
    uint64_t number;
    uint32_t *at;
} cq_heap_entry;

typedef struct cq_heap {
    cq_heap_entry *items;
    uint32_t count, cap;
} cq_heap;
cq_status cq_heap_reserve(cq_heap *heap, uint32_t more);
void cq_heap_push(cq_heap *heap, int64_t rank, uint64_t number, uint32_t *at); /* reserved */
void cq_heap_remove(cq_heap *heap, uint32_t *at);
void cq_heap_change(cq_heap *heap, int64_t rank, uint64_t number, uint32_t *at);
void cq_heap_moved(cq_heap *heap, uint32_t *at); /* the owner, and `at` in it, has a new address */
void cq_heap_free(cq_heap *heap);

/* A plain heap of numbers, smallest first. */
typedef struct cq_numbers {
    uint64_t *items;
    uint32_t count, cap;
} cq_numbers;
cq_status cq_numbers_reserve(cq_numbers *numbers, uint32_t more);
void cq_numbers_push(cq_numbers *numbers, uint64_t number); /* reserved */
uint64_t cq_numbers_pop(cq_numbers *numbers);
cq_status cq_numbers_append(cq_numbers *numbers, uint64_t number); /* as a list, no heap */

/* === queue.c: tenants, queues, and the ready tasks in their order ============================= */

#define CQ_LATENCY_BUCKETS 15 /* the last is +Inf */
extern const int64_t CQ_LATENCY_MS[CQ_LATENCY_BUCKETS - 1];

/* Counts of one command since the start of the process. */
typedef struct cq_label {
    cq_node node;
    struct cq_label *next; /* all labels, newest first */
    uint64_t created, claimed, completed, failed, expired;
    uint64_t latency[2][CQ_LATENCY_BUCKETS]; /* of COMPLETED, of FAILED */
    double latency_s[2];                     /* sums */
    cq_bytes name;
} cq_label;

/* Counts of one queue since the start of the process. Outlives the queue, up to CQ_TALLIES_MAX. */
#define CQ_TALLIES_MAX 16384
typedef struct cq_tally {
    cq_node node;
    cq_queue *queue; /* NULL while there is none */
    uint64_t created, claimed, completed, failed, dead, expired;
    uint64_t latency[CQ_LATENCY_BUCKETS]; /* of every end */
    cq_bytes tenant, command;
} cq_tally;

typedef struct cq_tenant {
    cq_node node;
    cq_queue *queues; /* all of them, linked by next_of_tenant */
    uint32_t queue_count;
    cq_heap ready;     /* queues with a top that any worker may claim, by (its priority, number) */
    cq_queue *limited; /* queues that bound who may claim, linked by next_limited */
    size_t limited_count;
    cq_bytes name;
} cq_tenant;

/* The ready tasks of one priority in one queue. Exists only while there are some. */
typedef struct cq_level {
    cq_node node;
    cq_queue *queue;
    int32_t priority;
    uint32_t heap_at;
    uint32_t ready; /* tasks; entries of tasks no longer ready may stand beside them */
    uint64_t *ring; /* numbers in creation order */
    uint32_t ring_at, ring_count;
    uint32_t ring_cap; /* a power of two, or 0 */
    cq_numbers back;   /* numbers given back, or due, after later ones were queued */
} cq_level;

/* A topic policy. All zero = none. */
typedef struct cq_policy {
    uint32_t tiers;         /* a bit for each priority that is allowed, 0 to 31 */
    int32_t max_attempts;   /* of creates that name none */
    uint32_t consumers_max; /* so many worker ids may hold its leases at once; 0 = any number */
    int64_t retention_ms;   /* of its ended tasks; 0 = that of the settings */
} cq_policy;

/* What was laid down for a queue, whether it exists or not. */
typedef struct cq_rule {
    cq_node node;
    bool paused; /* nothing is claimed from it */
    cq_policy policy;
    cq_bytes tenant, command;
} cq_rule;

struct cq_queue {
    cq_node node;
    cq_tenant *tenant;
    cq_label *label;
    cq_tally *tally;
    cq_rule *rule; /* NULL = none */
    cq_queue *next_of_tenant, *prev_of_tenant;
    cq_heap levels;      /* by priority, highest first */
    cq_slot *top;        /* the ready task that goes next, NULL = none */
    uint32_t heap_at;    /* in tenant->ready */
    uint32_t touched_at; /* place in engine->touched + 1, 0 = none */
    uint64_t slots;      /* slots that point here; the queue lives as long as there are some */
    uint64_t ready, delayed, leased, dead;
    cq_order dead_numbers;
    cq_queue *next_limited, *prev_limited;
    uint32_t consumers; /* worker ids that hold its leases, if it is limited */
    bool limited;       /* its policy has consumers_max */
    bool uncounted;     /* its leases have not been looked at since it is limited */
    cq_bytes command;
};

cq_tenant *cq_tenant_find(const cq_engine *engine, cq_bytes name); /* NULL = it has no queue */
/* Of what is kept by queue: queues, rules, tallies. */
uint64_t cq_queue_hash(const cq_engine *engine, cq_bytes tenant, cq_bytes command);
cq_queue *cq_queue_find(const cq_engine *engine, cq_bytes tenant, cq_bytes command);
/* Finds or makes it; NULL without memory. A new one goes with cq_queue_release if unused. */
cq_queue *cq_queue_open(cq_engine *engine, cq_bytes tenant, cq_bytes command);
void cq_queue_release(cq_engine *engine, cq_queue *queue); /* frees it when no slot points to it */
uint64_t *cq_queue_count(cq_queue *queue, uint8_t state);  /* its counter of a live state or dead */
/* When the oldest of its ready tasks became ready, near enough, in ms; CQ_NEVER = none is. Looks at
 * `looks` levels at most, and counts them off. */
int64_t cq_queue_ready_since(cq_engine *engine, cq_queue *queue, uint32_t *looks);

/* Room to make a task of this queue and priority ready; NULL without memory. */
cq_level *cq_ready_reserve(cq_engine *engine, cq_queue *queue, int32_t priority);
/* The slot, in state CQ_READY, takes its place in the level that cq_ready_reserve gave. */
void cq_ready_put(cq_engine *engine, cq_level *level, cq_slot *slot);
/* Takes queue->top off; the next one becomes the top. Its state must have changed before. */
void cq_ready_pop(cq_engine *engine, cq_queue *queue);
/* A slot that was ready was cancelled; its state must have changed before. */
void cq_ready_drop(cq_engine *engine, cq_slot *slot);
void cq_ready_free(cq_engine *engine, cq_queue *queue); /* frees levels; the counts stay */

/* The top or a rule has changed: the tenant's heap has the queue exactly when any worker may claim
 * its top. */
void cq_queue_settle(cq_engine *engine, cq_queue *queue);
/* Room to touch one queue, and every limited one besides; and says that parked claims are to be
 * looked at. */
cq_status cq_touch_reserve(cq_engine *engine);
void cq_queue_touch(cq_engine *engine, cq_queue *queue);

/* Finds or makes it and counts one reference; NULL without memory. Release takes NULL too. */
cq_holder *cq_holder_open(cq_engine *engine, cq_bytes tenant, cq_bytes worker, cq_bytes subject);
void cq_holder_release(cq_engine *engine, cq_holder *holder);

/* === rule.c: pauses, and how many workers may hold leases of a queue ========================== */

/* Claims pass a paused queue over until it is resumed; either twice is the same as once. */
cq_status cq_queue_pause(cq_engine *engine, cq_bytes tenant, cq_bytes command);
cq_status cq_queue_resume(cq_engine *engine, cq_bytes tenant, cq_bytes command);
/* Gives the queue a policy, or none. After one or several call cq_consumers_count, before all else:
 * it counts who holds leases of queues that are limited since. */
cq_status cq_queue_govern(cq_engine *engine, cq_bytes tenant, cq_bytes command,
                          const cq_policy *policy);
cq_status cq_consumers_count(cq_engine *engine);
/* Applies the policy to a create of this queue; CQ_OK, or the code that refuses it. */
cq_code cq_create_govern(cq_create *create, const cq_policy *policy);
/* A new queue gets its rule; CQ_NO_MEMORY changes nothing. And it is about to go. */
cq_status cq_rule_join(cq_engine *engine, cq_queue *queue);
void cq_rule_leave(cq_engine *engine, cq_queue *queue);
/* Whether a claim of this worker may take from the queue: it is not paused, and not full of other
 * workers. */
bool cq_queue_admits(const cq_engine *engine, const cq_queue *queue, cq_bytes worker);
/* Room for this worker to hold one more lease of the queue; give_up when it comes to none. */
cq_status cq_consumer_reserve(cq_engine *engine, cq_queue *queue, cq_bytes worker);
void cq_consumer_give_up(cq_engine *engine, cq_queue *queue, cq_bytes worker);
/* A slot is leased from now on, by its holder, or about to be so no more. */
void cq_lease_begins(cq_engine *engine, const cq_slot *slot);
void cq_lease_ends(cq_engine *engine, const cq_slot *slot);
void cq_leases_verify(const cq_engine *engine); /* the counts of both against those of the queues */

/* === tally.c: what is counted since the start ================================================= */

cq_label *cq_label_open(cq_engine *engine, cq_bytes command); /* NULL without memory */
cq_tally *cq_tally_open(cq_engine *engine, cq_queue *queue);  /* likewise */
void cq_tally_leave(cq_engine *engine, cq_queue *queue);      /* the queue goes */
void cq_count_end(cq_slot *slot, uint8_t state, int64_t now_ms);
/* The queues of a tenant (ptr NULL = of all) by command, then tenant, that have tasks or had some;
 * free the list. */
cq_status cq_tally_list(const cq_engine *engine, cq_bytes tenant, cq_tally ***list, size_t *count);

static inline bool cq_bytes_equal(cq_bytes a, cq_bytes b)
{
    return a.len == b.len && (a.len == 0 || __builtin_memcmp(a.ptr, b.ptr, a.len) == 0);
}

/* Copies `from` to `to`, which *text then names; returns the place behind the copy. */
static inline uint8_t *cq_bytes_keep(uint8_t *to, cq_bytes *text, cq_bytes from)
{
    if (from.len > 0)
        __builtin_memcpy(to, from.ptr, from.len);
    *text = (cq_bytes){to, from.len};
    return to + from.len;
}

/* === record.c: records and stored bodies <-> bytes ============================================ */

/* clang-format off */
typedef enum cq_record_kind {
    CQ_RECORD_ACTOR = 1, CQ_RECORD_CREATED = 2, CQ_RECORD_CLAIMED = 3, CQ_RECORD_KEPT = 4,
    CQ_RECORD_RETURNED = 5, CQ_RECORD_ENDED = 6, CQ_RECORD_CARRIED = 7, CQ_RECORD_REQUEUED = 8,
    CQ_RECORD_PURGED = 9
} cq_record_kind;
/* clang-format on */

#define CQ_RECORD_HAS_RESULT 1 /* flag of an ended record */
#define CQ_RECORD_DUE 8        /* of a created or carried one: has due_ms, else CQ_NEVER */

/* A record as read from a chunk; each kind fills the fields it has. Borrows from the chunk. */
typedef struct cq_record {
    uint8_t kind, flags, state;
    uint64_t number;
    const uint8_t *id;
    int64_t at_ms; /* ACTOR; of other kinds that of the last ACTOR before them in the chunk */
    cq_bytes tenant, actor_worker, actor_subject;
    cq_bytes worker, subject; /* ACTOR's; of CARRIED its own */
    int64_t due_ms;           /* CREATED: CQ_NEVER = not delayed; CLAIMED, KEPT: end of the lease */
    int64_t updated_ms;       /* CARRIED */
    int64_t ended_ms, expires_ms; /* ENDED; CARRIED when dead */
    int64_t key_end_ms;           /* keyed: until when the key binds at least */
    cq_bytes key;
    int32_t attempts;
    cq_bytes error, result, artifacts;
    cq_bytes stored; /* CREATED, CARRIED: the stored body */
} cq_record;

/* What stands in a stored body: trace texts, time of creation, and fields of workerpb.Task. */
typedef struct cq_body {
    cq_bytes head, tail; /* encoded fields 2 to 6; 11 */
    cq_bytes trace_parent, trace_state, command, payload, webhook, tenant;
    int32_t priority, max_attempts;
    int64_t created_ms;
} cq_body;

/* Reads a chunk's frame: version and checksum. */
cq_status cq_chunk_open(cq_bytes chunk, cq_bytes *records);
/* Takes the next record off *rest; CQ_FULL at the end. `record` starts zeroed and is kept between
 * calls (it carries the actor). */
cq_status cq_record_next(cq_bytes *rest, cq_record *record);
/* Finds the created or carried record of a number in the chunk, or the last that says how it ended.
 * CQ_FULL when it is not there. */
cq_status cq_record_find(cq_bytes chunk, uint64_t number, bool ended, cq_record *record);

/* Splits a stored body without reading its fields; CQ_MALFORMED as below. */
cq_status cq_body_split(cq_bytes stored, uint8_t flags, cq_body *body);
cq_status cq_body_read(cq_bytes stored, uint8_t flags, cq_body *body);
/* Bytes of the stored body of a create, and the bytes. */
size_t cq_body_size(const cq_create *create, const cq_queue *queue, int32_t max_attempts);
void cq_body_put(uint8_t *to, const cq_create *create, const cq_queue *queue, int32_t max_attempts,
                 int64_t created_ms);

/* One task on its way to a worker. */
typedef struct cq_piece {
    const uint8_t *id;
    cq_bytes head, tail; /* of the stored body */
    int64_t created_ms;
    int32_t attempts;
} cq_piece;

/* The fields that all tasks of one claim share, encoded: 7 to 9, and 13. */
typedef struct cq_splice {
    uint8_t *data;
    uint32_t before_len; /* fields 7, 8, 9 */
    uint32_t after_len;  /* field 13 */
} cq_splice;
cq_status cq_splice_make(cq_splice *splice, cq_bytes worker, int64_t lease_until_ms,
                         int64_t now_ms);
size_t cq_piece_size(const cq_splice *splice, const cq_piece *piece);
/* Length of the workerpb.ServerEvent with these tasks, and the event. */
size_t cq_assignment_size(const cq_splice *splice, const cq_piece *pieces, size_t count);
void cq_assignment_put(uint8_t *to, const cq_splice *splice, const cq_piece *pieces, size_t count,
                       bool single);

/* Writers of records; `to` has the room that the *_BYTES or *_size say. Return the end. */
#define CQ_CLAIMED_BYTES 19
#define CQ_KEPT_BYTES 15
#define CQ_NUMBER_BYTES 7 /* REQUEUED, PURGED */
size_t cq_actor_size(const cq_holder *holder);
uint8_t *cq_actor_put(uint8_t *to, int64_t at_ms, const cq_holder *holder);
size_t cq_created_size(const cq_create *create, int64_t due_ms, size_t body_size);
uint8_t *cq_created_put(uint8_t *to, const cq_slot *slot, const cq_create *create, int64_t due_ms,
                        int64_t key_end_ms, size_t body_size);
uint8_t *cq_claimed_put(uint8_t *to, const cq_slot *slot);
uint8_t *cq_kept_put(uint8_t *to, const cq_slot *slot);
size_t cq_returned_size(uint32_t error_len);
uint8_t *cq_returned_put(uint8_t *to, const cq_slot *slot);
size_t cq_ended_size(cq_bytes result, cq_bytes error, cq_bytes artifacts);
uint8_t *cq_ended_put(uint8_t *to, const cq_slot *slot, uint8_t flags, cq_bytes result,
                      cq_bytes error, cq_bytes artifacts);
size_t cq_carried_size(const cq_slot *slot, const cq_record *created);
uint8_t *cq_carried_put(uint8_t *to, const cq_slot *slot, const cq_record *created);
uint8_t *cq_number_put(uint8_t *to, cq_record_kind kind, uint64_t number);
uint32_t cq_crc32c(const void *ptr, size_t len);

static inline uint64_t cq_get_le(const uint8_t *from, int bytes)
{
    uint64_t value = 0;
    __builtin_memcpy(&value, from, (size_t)bytes);
    return value;
}

static inline uint8_t *cq_put_le(uint8_t *to, uint64_t value, int bytes)
{
    __builtin_memcpy(to, &value, (size_t)bytes);
    return to + bytes;
}

static inline uint64_t cq_get_be64(const uint8_t *from)
{
    return __builtin_bswap64(cq_get_le(from, 8));
}

static inline uint8_t *cq_put_be64(uint8_t *to, uint64_t value)
{
    return cq_put_le(to, __builtin_bswap64(value), 8);
}

/* === log.c: the open commit group, segments, directories, the head ============================ */

#define CQ_CHUNK_VERSION 1
#define CQ_CHUNK_FRAME 5 /* version, checksum */
#define CQ_SEGMENT_CHUNKS 512
#define CQ_FORMAT 3
#define CQ_HEAD_BYTES 52
#define CQ_DIRECTORY_BYTES (8 + CQ_BUCKET_SLOTS * 10 + 4)

typedef struct cq_segment {
    uint32_t held;      /* slots in memory whose created record stands here */
    uint32_t live;      /* those of them that are live or dead letters */
    int64_t expires_ms; /* until when a record of a completed or failed task is to be kept */
    int64_t bytes;      /* of its chunks, as long as recovery reads them; a small one counts 8 KB */
} cq_segment;

typedef struct cq_log {
    cq_buffer out; /* the chunks of the open group */
    size_t *ends;  /* where each closed one ends */
    size_t end_count, end_cap;
    size_t chunk_at; /* where the open chunk starts; == out.len when there is none */
    uint32_t chunk_creates;
    int64_t actor_ms; /* context of the open chunk */
    cq_holder *actor; /* referenced; NULL = nobody */
    bool actor_set;
    uint64_t first_seq, next_seq; /* of the open group, of the open chunk */
    uint64_t tail;                /* the oldest chunk kept */
    cq_segment *segments;         /* of segment first_segment on, up to that of next_seq */
    size_t segment_count, segment_cap;
    uint64_t first_segment; /* that of tail */
    uint64_t oldest;        /* segment where recovery starts: the first with a held slot */
    cq_buffer puts;         /* other entries: key length u8, value length u32, key, value */
    cq_numbers closing;     /* buckets to close with this group */
    cq_numbers ended;       /* detached tasks that ended in this group */
    cq_numbers drop;        /* tasks whose bodies leave memory with this group */
    uint64_t records;
    bool changed;
} cq_log;
cq_status cq_log_init(cq_log *log, uint64_t tail, uint64_t oldest, uint64_t next_seq);
void cq_log_free(cq_engine *engine);
/* Where a record of `bytes` by this actor (holder NULL = nobody) goes, in chunk log.next_seq; NULL
 * without memory. The caller writes it whole and calls cq_log_wrote with its end. */
uint8_t *cq_log_record(cq_engine *engine, int64_t at_ms, const cq_holder *holder, size_t bytes);
uint8_t *cq_log_create(cq_engine *engine, size_t bytes); /* a created record needs no actor */
void cq_log_wrote(cq_engine *engine, const uint8_t *end);
/* Room for what the end of this task adds. */
cq_status cq_log_reserve_end(cq_engine *engine, const cq_slot *slot);
/* A slot became final: its `ended_chunk` is known, its state is COMPLETED, FAILED or GONE. */
void cq_log_final(cq_engine *engine, cq_slot *slot);
void cq_log_webhook(cq_engine *engine, const cq_slot *slot, uint64_t ended_seq);
cq_segment *cq_log_segment(cq_log *log, uint64_t seq); /* NULL when it is trimmed */
void cq_log_expire(cq_log *log, uint64_t seq, int64_t expires_ms);
void cq_log_weigh(cq_log *log, uint64_t seq, size_t chunk_len); /* counts a chunk of its segment */

/* Closes the open group; then read out its chunks and entries, then call cq_log_taken. */
cq_status cq_log_close(cq_engine *engine);
size_t cq_log_chunk(const cq_log *log, size_t index, cq_bytes *chunk);
bool cq_log_entry(const cq_log *log, size_t *at, cq_bytes *key, cq_bytes *value);
void cq_log_taken(cq_engine *engine);

/* Sequence up to which no task needs the log any more; it is cut in segments, and never at or
 * behind that of `keep`. */
uint64_t cq_log_expired(const cq_engine *engine, int64_t now_ms);
bool cq_log_trim(cq_engine *engine, int64_t now_ms, uint64_t keep, uint64_t *from, uint64_t *to);
bool cq_log_straggler(cq_engine *engine, uint64_t *from, uint64_t *to);
/* Copies what is still needed of a chunk. CQ_MALFORMED: no chunk. */
cq_status cq_log_carry(cq_engine *engine, uint64_t seq, cq_bytes chunk, int64_t now_ms,
                       uint32_t *count);
/* Frees the buckets and detached slots that have ended; unless loading, writes the directories. A
 * salvage writes them too, and reserves room for them before. */
void cq_log_settle(cq_engine *engine);
cq_status cq_log_reserve_settle(cq_engine *engine);

/* === engine.c: the engine as a whole, and what every transition does to a slot ================ */

typedef enum cq_backoff {
    CQ_BACKOFF_FIXED,
    CQ_BACKOFF_LINEAR,
    CQ_BACKOFF_EXPONENTIAL,
    CQ_BACKOFF_EXP_EQUAL_JITTER,
    CQ_BACKOFF_EXP_FULL_JITTER
} cq_backoff;

typedef struct cq_settings {
    uint64_t seed;
    uint32_t shard_count;
    int64_t payload_memory_bytes;
    int64_t retention_ms, dead_retention_ms, key_window_ms;
    int32_t max_attempts_default;
    cq_backoff backoff;
    int64_t backoff_base_ms, backoff_max_ms;
    uint32_t command_labels_max;
    int64_t straggler_slack_bytes;
} cq_settings;

struct cq_engine {
    cq_settings set;
    uint64_t random; /* state of the generator */
    int64_t now_ms;  /* the latest time told */
    uint64_t next_number;
    int64_t last_id_ms;
    cq_table table;
    cq_heap due; /* delayed, leased and dead slots */
    cq_map tenants, queues, levels, holders, labels, tallies, rules, consumers;
    cq_label *all_labels;
    cq_holder *busy;    /* holders with leases */
    cq_queue **touched; /* got a ready task, or room for a worker, since this list was read */
    uint32_t touched_count, touched_cap;
    uint32_t limited_count; /* queues that are limited */
    cq_level *spare_level;
    cq_buffer ended_ids; /* of watched tasks */
    cq_log log;
    uint32_t serial;                /* of claims and finish calls */
    uint32_t checks;                /* calls of cq_engine_check */
    int64_t live;                   /* tasks */
    int64_t body_bytes, live_bytes; /* stored bodies: in memory; of live tasks and dead letters */
    uint64_t scan_next;             /* loading: sequence expected next */
    bool loading;
    bool salvaging; /* loading a damaged log, and making its entries again */
};

cq_engine *cq_engine_new(const cq_settings *settings); /* NULL without memory */
void cq_engine_free(cq_engine *engine);                /* NULL is fine */
void cq_tell_time(cq_engine *engine, int64_t now_ms);
uint64_t cq_draw(cq_engine *engine);   /* 64 random bits */
int64_t cq_plus(int64_t a, int64_t b); /* cut to what an int64 holds */
void cq_slot_set_state(cq_engine *engine, cq_slot *slot, uint8_t state); /* and the counters */
void cq_slot_clear_holder(cq_engine *engine, cq_slot *slot);
void cq_slot_set_error(cq_slot *slot, cq_text *error);                   /* takes it over */
void cq_slot_drop_body(cq_engine *engine, cq_slot *slot);                /* it is on disk */
void cq_slot_schedule(cq_engine *engine, cq_slot *slot, int64_t due_ms); /* reserved */
void cq_slot_unschedule(cq_engine *engine, cq_slot *slot);
cq_status cq_text_copy(cq_bytes from, cq_text **text); /* cut to CQ_TEXT_BYTES_MAX; NULL if empty */
/* The slot of this id in this tenant; NULL when absent, purged, or of another tenant. */
cq_slot *cq_task_find(const cq_engine *engine, const uint8_t *id, cq_bytes tenant);

/* === task.c, claim.c: every transition of a task ============================================== */

/* Who calls, for what. `worker` empty = none named; `attempt` < 0 = any. */
typedef struct cq_caller {
    cq_bytes tenant, worker, subject;
    int64_t attempt;
} cq_caller;

/* Makes tasks of the items that are CQ_OK, not replayed and no alias, and that the policy of their
 * queue lets in; `made` counts them, also when memory ends on the way. */
cq_status cq_task_create(cq_engine *engine, cq_create *items, size_t count, cq_bytes tenant,
                         int64_t now_ms, uint32_t *made);

typedef struct cq_want {
    cq_bytes tenant, worker, subject;
    const cq_bytes *commands; /* NULL = every queue of the tenant */
    size_t command_count;
    bool in_order;
    int64_t count_max, lease_ms, now_ms;
    int64_t bytes_max; /* of the tasks, encoded */
} cq_want;

/* Tasks leased by one call. */
typedef struct cq_claim {
    cq_numbers tasks;
    uint32_t serial;
    int64_t lease_until_ms;
    cq_holder *holder;
    cq_splice splice;
} cq_claim;

/* Leases tasks; none: nothing is ready. On CQ_NO_MEMORY it holds those leased so far. Free it. */
cq_status cq_task_claim(cq_engine *engine, const cq_want *want, cq_claim *claim);
void cq_claim_free(cq_engine *engine, cq_claim *claim);
/* The slot of the i-th task while it is still under this claim, else NULL. */
cq_slot *cq_claim_slot(const cq_engine *engine, const cq_claim *claim, uint32_t index);
void cq_claim_delivered(cq_engine *engine, const cq_claim *claim);
cq_status cq_claim_give_back(cq_engine *engine, const cq_claim *claim, int64_t now_ms,
                             uint32_t *count);
/* A leased task becomes ready, the attempt unused. */
cq_status cq_task_go_back_untried(cq_engine *engine, cq_slot *slot, int64_t now_ms);
cq_status cq_task_heartbeat(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                            int64_t lease_ms, int64_t now_ms, cq_code *code);
cq_status cq_task_abandon(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                          int64_t now_ms, cq_code *code);
/* `delay_ms` < 0 = backoff, and is set to what applied. */
cq_status cq_task_nack(cq_engine *engine, const uint8_t *id, const cq_caller *caller,
                       cq_bytes reason, int64_t now_ms, cq_code *code, int64_t *delay_ms,
                       bool *dead);
cq_status cq_task_finish(cq_engine *engine, cq_finish *items, size_t count, const cq_caller *caller,
                         int64_t now_ms, uint32_t *ended);
cq_status cq_task_cancel(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                         cq_code *code);
cq_status cq_task_requeue(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                          cq_code *code);
cq_status cq_task_purge(cq_engine *engine, const uint8_t *id, cq_bytes tenant, int64_t now_ms,
                        cq_code *code);
cq_status cq_task_tick(cq_engine *engine, int64_t now_ms, int64_t limit, int64_t *moved);
/* The same for a slot of the right state: ready or delayed, dead, dead. */
cq_status cq_slot_cancel(cq_engine *engine, cq_slot *slot, int64_t now_ms);
cq_status cq_slot_requeue(cq_engine *engine, cq_slot *slot, int64_t now_ms);
cq_status cq_slot_purge(cq_engine *engine, cq_slot *slot, int64_t now_ms);

/* === walk.c: the tasks in memory, in creation order =========================================== */

/* A walk over the numbers [next, end). Fill the first six fields, then call cq_walk_begin. */
typedef struct cq_walk {
    cq_bytes tenant, command; /* ptr NULL = every one; a command of every tenant is fine */
    uint32_t states;          /* a bit for each cq_state */
    uint64_t next, end;
    uint32_t looks; /* numbers, or buckets not in memory, that may still be looked at */
    const cq_tenant *owner;
    cq_queue *queue;
} cq_walk;
void cq_walk_begin(const cq_engine *engine, cq_walk *walk);
/* The next task the walk wants; NULL: `looks` is 0, or `next` has come to the end. */
cq_slot *cq_walk_next(const cq_engine *engine, cq_walk *walk);
/* Changes at most `count_max` tasks of the walk; `count` says how many were changed. */
typedef cq_status cq_slot_change(cq_engine *engine, cq_slot *slot, int64_t now_ms);
cq_status cq_walk_each(cq_engine *engine, cq_walk *walk, cq_slot_change *change, uint32_t count_max,
                       int64_t now_ms, uint32_t *count);
/* Takes away ended tasks of the walk whose keeping time ends by then, likewise. */
cq_status cq_walk_forget(cq_engine *engine, cq_walk *walk, int64_t before_ms, uint32_t count_max,
                         int64_t now_ms, uint32_t *count);
/* Records that an ended task on disk is taken away, for those who make its directory again. */
cq_status cq_walk_gone(cq_engine *engine, uint64_t number, int64_t now_ms);

/* === recovery.c ============================================================================== */

/* CQ_FULL: another format. */
cq_status cq_load_head(cq_engine *engine, cq_bytes head, uint32_t *shard_count);
cq_status cq_load_segment(cq_engine *engine, cq_bytes key, cq_bytes value);
cq_status cq_load_chunk(cq_engine *engine, uint64_t seq, cq_bytes chunk);
cq_status cq_load_done(cq_engine *engine, int64_t now_ms, int64_t grace_ms);
/* Instead of the first three, for a damaged log: every chunk from the tail on, record by record.
 * All that stands beside the chunks is made again and put. CQ_MALFORMED: the record does not fit to
 * what came before, and nothing changed. */
cq_status cq_salvage_begin(cq_engine *engine, uint64_t tail, uint64_t next_seq,
                           uint64_t next_number, int64_t last_id_ms);
cq_status cq_salvage_record(cq_engine *engine, const cq_record *record);
cq_status cq_salvage_chunk(cq_engine *engine, size_t chunk_len); /* its records are through */
/* Where a task has its records, by a directory or an entry of its `own`. CQ_FULL: nowhere. */
cq_status cq_directory_read(cq_bytes value, bool own, uint64_t number, uint64_t *created,
                            uint64_t *ended);
/* Takes a task out of the directory of its bucket, which was read before. */
void cq_directory_forget(uint8_t value[CQ_DIRECTORY_BYTES], uint64_t number);

/* === verify.c ================================================================================= */

void cq_engine_verify(const cq_engine *engine);     /* walks everything; aborts on a broken fact */
void cq_engine_check(cq_engine *engine);            /* the same now and then, in debug builds */
uint64_t cq_engine_digest(const cq_engine *engine); /* of all that a restart must rebuild */

#endif
