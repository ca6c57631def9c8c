/* wire.c: stream messages and records. It faces strangers: every read is bounded, nothing recurses
 * deeper than DEPTH_MAX, and memory grows with the message only.
 *
 * One table per message type says where each field goes; decoder and encoder both walk it. */
#include <string.h>

#include "codeq.h"

enum { VARINT = 0, FIXED64 = 1, RUN = 2, GROUP = 3, GROUP_END = 4, FIXED32 = 5 }; /* wire types */

typedef enum kind {
    NONE = 0, /* no such field */
    TEXT,     /* cq_bytes, UTF-8 */
    BLOB,     /* cq_bytes */
    TEXTS,    /* cq_texts, repeated */
    STAMP,    /* google.protobuf.Timestamp, int64_t milliseconds */
    INT32,
    UINT64,
    BOOL /* uint8_t */
} kind;

typedef struct field {
    uint8_t kind;
    uint8_t wire;
    uint16_t offset;
} field;

/* A Timestamp as it is merged; it becomes milliseconds when the record is complete. */
typedef struct stamp {
    int64_t seconds;
    int32_t nanos;
    bool present;
} stamp;

#define FIELDS_END 16 /* every field number is below, so every tag is one byte */
#define TAG_BYTES 1

/* One message type. */
typedef struct shape {
    size_t record_bytes;
    void (*settle)(void *record, const stamp stamps[2]); /* completes a record; may be NULL */
    field fields[FIELDS_END]; /* by field number; a STAMP is gathered in stamps[number & 1] */
} shape;

typedef enum form {
    ABSENT = 0,
    SINGLE,  /* the member is the record's message */
    WRAPPED, /* the member holds one such message in field 1 */
    LIST     /* the member holds any number of them in field 1 */
} form;

typedef struct member {
    form form;
    const shape *shape;
} member;

/* --- the messages ----------------------------------------------------------------------------- */

#define RUN_FIELD(kind, type, name) {kind, RUN, offsetof(type, name)}
#define VARINT_FIELD(kind, type, name) {kind, VARINT, offsetof(type, name)}

static void settle_create(void *record, const stamp stamps[2]);
static void settle_finish(void *record, const stamp stamps[2]);
static void settle_task(void *record, const stamp stamps[2]);

/* clang-format off */
static const shape CREATE = {
    sizeof(cq_create), settle_create,
    {[1] = VARINT_FIELD(UINT64, cq_create, seq),
     [2] = RUN_FIELD(TEXT, cq_create, command),
     [3] = RUN_FIELD(BLOB, cq_create, payload),
     [4] = VARINT_FIELD(INT32, cq_create, priority),
     [5] = RUN_FIELD(TEXT, cq_create, webhook),
     [6] = VARINT_FIELD(INT32, cq_create, max_attempts),
     [7] = RUN_FIELD(TEXT, cq_create, key),
     [8] = RUN_FIELD(STAMP, cq_create, run_at_ms),
     [9] = VARINT_FIELD(INT32, cq_create, delay_seconds),
     [10] = RUN_FIELD(TEXT, cq_create, trace_parent),
     [11] = RUN_FIELD(TEXT, cq_create, trace_state)}};

static const shape FINISH = {
    sizeof(cq_finish), settle_finish,
    {[1] = RUN_FIELD(TEXT, cq_finish, task_id),
     [2] = RUN_FIELD(TEXT, cq_finish, status),
     [3] = RUN_FIELD(BLOB, cq_finish, result),
     [4] = RUN_FIELD(TEXT, cq_finish, error)}};

static const shape TASK = {
    sizeof(cq_task), settle_task,
    {[1] = RUN_FIELD(TEXT, cq_task, id),
     [2] = RUN_FIELD(TEXT, cq_task, command),
     [3] = RUN_FIELD(BLOB, cq_task, payload),
     [4] = VARINT_FIELD(INT32, cq_task, priority),
     [5] = RUN_FIELD(TEXT, cq_task, webhook),
     [6] = VARINT_FIELD(INT32, cq_task, max_attempts),
     [7] = RUN_FIELD(TEXT, cq_task, status),
     [8] = RUN_FIELD(TEXT, cq_task, worker),
     [9] = RUN_FIELD(TEXT, cq_task, lease_until),
     [10] = VARINT_FIELD(INT32, cq_task, attempts),
     [11] = RUN_FIELD(TEXT, cq_task, tenant),
     [12] = RUN_FIELD(STAMP, cq_task, created_ms),
     [13] = RUN_FIELD(STAMP, cq_task, updated_ms)}};

static const shape CREATE_ACK = {
    sizeof(cq_ack), NULL,
    {[1] = VARINT_FIELD(UINT64, cq_ack, seq),
     [2] = VARINT_FIELD(BOOL, cq_ack, ok),
     [3] = RUN_FIELD(TEXT, cq_ack, task_id),
     [4] = RUN_FIELD(TEXT, cq_ack, error)}};

/* ResultAck, HeartbeatAck, AbandonAck */
static const shape TASK_ACK = {
    sizeof(cq_ack), NULL,
    {[1] = RUN_FIELD(TEXT, cq_ack, task_id),
     [2] = VARINT_FIELD(BOOL, cq_ack, ok),
     [3] = RUN_FIELD(TEXT, cq_ack, error)}};

static const shape NACK_ACK = {
    sizeof(cq_ack), NULL,
    {[1] = RUN_FIELD(TEXT, cq_ack, task_id),
     [2] = VARINT_FIELD(BOOL, cq_ack, ok),
     [3] = RUN_FIELD(TEXT, cq_ack, error),
     [4] = VARINT_FIELD(INT32, cq_ack, delay_seconds),
     [5] = VARINT_FIELD(BOOL, cq_ack, dead)}};

/* producerpb.Hello, Abandon */
static const shape ONE_TEXT = {
    sizeof(cq_call), NULL, {[1] = RUN_FIELD(TEXT, cq_call, text[0])}};

/* workerpb.Hello, both HelloAcks, both ServerErrors */
static const shape TWO_TEXTS = {
    sizeof(cq_call), NULL,
    {[1] = RUN_FIELD(TEXT, cq_call, text[0]), [2] = RUN_FIELD(TEXT, cq_call, text[1])}};

static const shape READY = {
    sizeof(cq_call), NULL,
    {[1] = RUN_FIELD(TEXTS, cq_call, commands),
     [2] = VARINT_FIELD(INT32, cq_call, number[0]),
     [3] = VARINT_FIELD(INT32, cq_call, number[1])}};

static const shape NACK = {
    sizeof(cq_call), NULL,
    {[1] = RUN_FIELD(TEXT, cq_call, text[0]),
     [2] = VARINT_FIELD(INT32, cq_call, number[0]),
     [3] = RUN_FIELD(TEXT, cq_call, text[1])}};

static const shape HEARTBEAT = {
    sizeof(cq_call), NULL,
    {[1] = RUN_FIELD(TEXT, cq_call, text[0]), [2] = VARINT_FIELD(INT32, cq_call, number[0])}};
/* clang-format on */

static const member MEMBERS[4][FIELDS_END] = {
    [CQ_PRODUCER_EVENT] = {[1] = {SINGLE, &ONE_TEXT},
                           [2] = {SINGLE, &CREATE},
                           [3] = {LIST, &CREATE}},
    [CQ_PRODUCER_SERVER_EVENT] = {[1] = {SINGLE, &TWO_TEXTS},
                                  [2] = {SINGLE, &CREATE_ACK},
                                  [3] = {SINGLE, &TWO_TEXTS},
                                  [4] = {LIST, &CREATE_ACK}},
    [CQ_WORKER_EVENT] = {[1] = {SINGLE, &TWO_TEXTS},
                         [2] = {SINGLE, &READY},
                         [3] = {SINGLE, &FINISH},
                         [4] = {SINGLE, &NACK},
                         [5] = {SINGLE, &HEARTBEAT},
                         [6] = {SINGLE, &ONE_TEXT},
                         [7] = {LIST, &FINISH}},
    [CQ_WORKER_SERVER_EVENT] = {[1] = {SINGLE, &TWO_TEXTS},
                                [2] = {WRAPPED, &TASK},
                                [3] = {SINGLE, &TASK_ACK},
                                [4] = {SINGLE, &TASK_ACK},
                                [5] = {SINGLE, &NACK_ACK},
                                [6] = {SINGLE, &TASK_ACK},
                                [7] = {SINGLE, &TWO_TEXTS},
                                [8] = {LIST, &TASK},
                                [9] = {LIST, &TASK_ACK}},
};

/* --- reading ---------------------------------------------------------------------------------- */

#define DEPTH_MAX 100 /* messages and groups inside one another, as the generated classes have it */
#define VARINT_BYTES_MAX 10
#define SHORT_VARINT_BYTES_MAX 5 /* of a tag or a length */

typedef struct reader {
    const uint8_t *at;
    const uint8_t *end;
    uint32_t depth; /* levels that may still be entered */
} reader;

/* Returns false when the varint is cut short or longer than `bytes_max`; bits above 64 are lost. */
static bool varint_long(reader *r, uint32_t bytes_max, uint64_t *value)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < bytes_max && r->at < r->end; i++) {
        uint8_t byte = *r->at++;
        sum |= (uint64_t)(byte & 0x7F) << (7 * i);
        if (byte < 0x80) {
            *value = sum;
            return true;
        }
    }
    return false;
}

static inline bool varint(reader *r, uint32_t bytes_max, uint64_t *value)
{
    if (r->at < r->end && *r->at < 0x80) {
        *value = *r->at++;
        return true;
    }
    return varint_long(r, bytes_max, value);
}

/* Returns false when no tag comes next, or one past 32 bits. */
static inline bool tag_any(reader *r, uint32_t *tag)
{
    uint64_t value;
    if (!varint(r, SHORT_VARINT_BYTES_MAX, &value) || value > UINT32_MAX)
        return false;
    *tag = (uint32_t)value;
    return true;
}

/* The same for a tag that may be known: there is no field 0. */
static inline bool tag_next(reader *r, uint32_t *tag)
{
    return tag_any(r, tag) && *tag >> 3 != 0;
}

/* Returns false when the length-prefixed run that comes next does not fit; else passes it and
 * gives a reader of it, one level deeper. */
static inline bool run_next(reader *r, reader *run)
{
    uint64_t len;
    if (!varint(r, SHORT_VARINT_BYTES_MAX, &len) || len > (uint64_t)(r->end - r->at))
        return false;
    *run = (reader){r->at, r->at + len, r->depth - 1};
    r->at += len;
    return true;
}

static bool pass(reader *r, ptrdiff_t len)
{
    if (r->end - r->at < len)
        return false;
    r->at += len;
    return true;
}

static bool skip_group(reader *r, uint32_t number);

/* Returns false when the value of an unknown field is malformed; else passes it. */
static bool skip(reader *r, uint32_t tag)
{
    uint64_t ignored;
    reader run;
    switch (tag & 7) {
    case VARINT:
        return varint(r, VARINT_BYTES_MAX, &ignored);
    case FIXED64:
        return pass(r, 8);
    case RUN:
        return run_next(r, &run);
    case GROUP:
        return skip_group(r, tag >> 3);
    case FIXED32:
        return pass(r, 4);
    default: /* the end of a group that was not opened, or no wire type */
        return false;
    }
}

/* Returns false when the group is malformed, ends as another one or is too deep; else passes it. */
static bool skip_group(reader *r, uint32_t number)
{
    uint32_t tag;
    if (r->depth == 0)
        return false;
    r->depth--;
    while (tag_any(r, &tag)) { /* the generated classes let field 0 pass in here */
        if ((tag & 7) == GROUP_END) {
            r->depth++;
            return tag >> 3 == number;
        }
        if (!skip(r, tag))
            return false;
    }
    return false;
}

/* --- decoding --------------------------------------------------------------------------------- */

static void *place(const void *record, const field *f)
{
    return (uint8_t *)(uintptr_t)record + f->offset;
}

/* Returns how many runs of this field the message has, as far as it is well formed. */
static size_t count_runs(reader r, uint32_t number)
{
    size_t count = 0;
    uint32_t tag;
    while (r.at < r.end && tag_next(&r, &tag) && skip(&r, tag))
        count += tag == (number << 3 | RUN);
    return count;
}

/* Makes room for `more` items. At least doubles, so that many small steps stay cheap. CQ_FULL past
 * CQ_WIRE_ITEMS_MAX; on a failure nothing changed. */
static cq_status reserve(void **items, uint32_t *cap, uint32_t count, size_t more,
                         size_t item_bytes)
{
    if (more > CQ_WIRE_ITEMS_MAX - count)
        return CQ_FULL;
    size_t need = count + more;
    if (need <= *cap)
        return CQ_DONE;
    if (need < (size_t)*cap * 2)
        need = (size_t)*cap * 2;
    void *grown = realloc(*items, need * item_bytes);
    if (grown == NULL)
        return CQ_NO_MEMORY;
    *items = grown;
    *cap = (uint32_t)need;
    return CQ_DONE;
}

static bool text_next(reader *r, bool utf8, cq_bytes *text)
{
    reader run;
    if (!run_next(r, &run))
        return false;
    *text = (cq_bytes){run.at, (uint32_t)(run.end - run.at)};
    return !utf8 || cq_utf8_valid(*text);
}

/* `r` starts at this field's value. */
static cq_status texts_add(reader *r, uint32_t number, cq_texts *texts)
{
    cq_bytes text;
    if (!text_next(r, true, &text))
        return CQ_MALFORMED;
    if (texts->count == texts->cap) {
        size_t more = 1 + count_runs(*r, number);
        cq_status status =
            reserve((void **)&texts->items, &texts->cap, texts->count, more, sizeof(cq_bytes));
        if (status != CQ_DONE)
            return status;
    }
    texts->items[texts->count++] = text;
    return CQ_DONE;
}

/* Merges the Timestamp that comes next; returns false when it is malformed. */
static bool stamp_next(reader *r, stamp *into)
{
    reader run;
    uint32_t tag;
    uint64_t value;
    if (!run_next(r, &run))
        return false;
    into->present = true;
    while (run.at < run.end) {
        if (!tag_next(&run, &tag))
            return false;
        if (tag != (1 << 3 | VARINT) && tag != (2 << 3 | VARINT)) {
            if (!skip(&run, tag))
                return false;
            continue;
        }
        if (!varint(&run, VARINT_BYTES_MAX, &value))
            return false;
        if (tag >> 3 == 1)
            into->seconds = (int64_t)value;
        else
            into->nanos = (int32_t)(uint32_t)value;
    }
    return true;
}

static bool number_next(reader *r, const field *f, void *record)
{
    uint64_t value;
    if (!varint(r, VARINT_BYTES_MAX, &value))
        return false;
    if (f->kind == INT32)
        *(int32_t *)place(record, f) = (int32_t)(uint32_t)value;
    else if (f->kind == UINT64)
        *(uint64_t *)place(record, f) = value;
    else
        *(uint8_t *)place(record, f) = value != 0;
    return true;
}

/* Merges a message into the record: the last of a field that occurs twice wins, Timestamps merge,
 * unknown fields and known ones of another wire type are passed over. */
static cq_status fill(reader r, const shape *shape, void *record, stamp stamps[2])
{
    static const field none = {NONE, 0, 0};
    while (r.at < r.end) {
        uint32_t tag;
        if (!tag_next(&r, &tag))
            return CQ_MALFORMED;
        uint32_t number = tag >> 3;
        const field *f = number < FIELDS_END ? &shape->fields[number] : &none;
        bool fine;
        if (f->kind == NONE || f->wire != (tag & 7)) {
            fine = skip(&r, tag);
        } else if (f->kind <= BLOB) {
            fine = text_next(&r, f->kind == TEXT, place(record, f));
        } else if (f->wire == VARINT) {
            fine = number_next(&r, f, record);
        } else if (f->kind == STAMP) {
            fine = stamp_next(&r, &stamps[number & 1]);
        } else {
            cq_status status = texts_add(&r, number, place(record, f));
            if (status != CQ_DONE)
                return status;
            fine = true;
        }
        if (!fine)
            return CQ_MALFORMED;
    }
    if (shape->settle != NULL)
        shape->settle(record, stamps);
    return CQ_DONE;
}

static bool stamp_in_range(const stamp *s)
{
    return s->seconds >= CQ_SECONDS_MIN && s->seconds <= CQ_SECONDS_MAX && s->nanos >= 0 &&
           s->nanos <= 999999999;
}

static void settle_create(void *record, const stamp stamps[2])
{
    cq_create *create = record;
    const stamp *run_at = &stamps[0];
    create->same_as = -1;
    create->run_at_ms = CQ_NEVER;
    create->code = CQ_OK;
    if (!run_at->present)
        return;
    if (stamp_in_range(run_at))
        create->run_at_ms = run_at->seconds * 1000 + (run_at->nanos + 999999) / 1000000;
    else
        create->code = CQ_RUN_AT_INVALID;
}

static void settle_finish(void *record, const stamp stamps[2])
{
    cq_finish *finish = record;
    (void)stamps;
    finish->has_result = finish->result.len > 0;
}

static void settle_task(void *record, const stamp stamps[2])
{
    cq_task *task = record;
    int64_t *times[2] = {&task->created_ms, &task->updated_ms};
    for (int i = 0; i < 2; i++)
        if (stamps[i].present)
            *times[i] = stamp_in_range(&stamps[i])
                            ? stamps[i].seconds * 1000 + stamps[i].nanos / 1000000
                            : 0; /* also when what it merges with was in range */
}

/* Appends an empty record for which there is room. */
static void *record_add(const shape *shape, cq_event *event)
{
    void *record = (uint8_t *)event->records + shape->record_bytes * event->count++;
    memset(record, 0, shape->record_bytes);
    return record;
}

/* The messages of field 1 of a WRAPPED or LIST member; those of a WRAPPED one are merged. */
static cq_status fill_inner(reader r, const member *m, cq_event *event, stamp stamps[2])
{
    while (r.at < r.end) {
        uint32_t tag;
        reader run;
        if (!tag_next(&r, &tag))
            return CQ_MALFORMED;
        if (tag != (1 << 3 | RUN)) {
            if (!skip(&r, tag))
                return CQ_MALFORMED;
            continue;
        }
        if (!run_next(&r, &run))
            return CQ_MALFORMED;
        void *record = event->records;
        if (m->form == LIST) {
            memset(stamps, 0, 2 * sizeof(stamp));
            record = record_add(m->shape, event);
        } else if (event->count == 0) {
            record = record_add(m->shape, event);
        }
        cq_status status = fill(run, m->shape, record, stamps);
        if (status != CQ_DONE)
            return status;
    }
    return CQ_DONE;
}

/* Merges one occurrence of a member into the event. On a failure the event may hold a part. */
static cq_status fill_member(reader r, const member *m, cq_event *event, stamp stamps[2])
{
    size_t more = m->form == LIST ? count_runs(r, 1) : event->count == 0;
    cq_status status =
        reserve(&event->records, &event->cap, event->count, more, m->shape->record_bytes);
    if (status != CQ_DONE)
        return status;
    if (m->form != SINGLE)
        return fill_inner(r, m, event, stamps);
    void *record = event->count == 0 ? record_add(m->shape, event) : event->records;
    return fill(r, m->shape, record, stamps);
}

void cq_event_free(cq_stream stream, cq_event *event)
{
    if (event->count > 0 && MEMBERS[stream][event->member].shape == &READY)
        free(((cq_call *)event->records)->commands.items);
    free(event->records);
    *event = (cq_event){0, 0, 0, NULL};
}

/* Of the oneof the last member counts; the same member again is merged, another starts afresh. */
static cq_status decode(reader r, cq_stream stream, cq_event *event)
{
    stamp stamps[2] = {{0, 0, false}, {0, 0, false}};
    while (r.at < r.end) {
        uint32_t tag;
        reader run;
        if (!tag_next(&r, &tag))
            return CQ_MALFORMED;
        uint32_t number = tag >> 3;
        bool known =
            (tag & 7) == RUN && number < FIELDS_END && MEMBERS[stream][number].form != ABSENT;
        if (!known) {
            if (!skip(&r, tag))
                return CQ_MALFORMED;
            continue;
        }
        if (!run_next(&r, &run))
            return CQ_MALFORMED;
        if (number != event->member) {
            cq_event_free(stream, event);
            memset(stamps, 0, sizeof stamps);
            event->member = number;
        }
        cq_status status = fill_member(run, &MEMBERS[stream][number], event, stamps);
        if (status != CQ_DONE)
            return status;
    }
    return CQ_DONE;
}

cq_status cq_event_decode(cq_stream stream, cq_bytes message, cq_event *event)
{
    *event = (cq_event){0, 0, 0, NULL};
    if (message.len == 0)
        return CQ_DONE;
    reader r = {message.ptr, message.ptr + message.len, DEPTH_MAX};
    cq_status status = decode(r, stream, event);
    if (status != CQ_DONE)
        cq_event_free(stream, event);
    return status;
}

/* --- encoding --------------------------------------------------------------------------------- */

static size_t varint_size(uint64_t value)
{
    size_t bits = 64 - (size_t)__builtin_clzll(value | 1);
    return (bits + 6) / 7;
}

static uint8_t *put_varint(uint8_t *to, uint64_t value)
{
    while (value >= 0x80) {
        *to++ = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    *to++ = (uint8_t)value;
    return to;
}

static uint8_t *put_tag(uint8_t *to, uint32_t number, uint32_t wire)
{
    *to++ = (uint8_t)(number << 3 | wire);
    return to;
}

static uint8_t *put_run(uint8_t *to, uint32_t number, cq_bytes text)
{
    to = put_tag(to, number, RUN);
    to = put_varint(to, text.len);
    if (text.len > 0)
        memcpy(to, text.ptr, text.len);
    return to + text.len;
}

static size_t run_size(size_t len)
{
    return TAG_BYTES + varint_size(len) + len;
}

/* Returns the value of a number field as the varint carries it; 0 is not written. */
static uint64_t number_of(const field *f, const void *record)
{
    if (f->kind == INT32)
        return (uint64_t)(int64_t)*(const int32_t *)place(record, f);
    if (f->kind == UINT64)
        return *(const uint64_t *)place(record, f);
    return *(const uint8_t *)place(record, f) != 0;
}

static stamp stamp_of(int64_t ms)
{
    int64_t seconds = ms / 1000;
    int32_t rest = (int32_t)(ms % 1000);
    if (ms == CQ_NEVER)
        return (stamp){0, 0, false};
    return rest < 0 ? (stamp){seconds - 1, (rest + 1000) * 1000000, true}
                    : (stamp){seconds, rest * 1000000, true};
}

static size_t stamp_size(stamp s)
{
    size_t seconds = s.seconds != 0 ? TAG_BYTES + varint_size((uint64_t)s.seconds) : 0;
    size_t nanos = s.nanos != 0 ? TAG_BYTES + varint_size((uint64_t)s.nanos) : 0;
    return seconds + nanos;
}

static uint8_t *put_stamp(uint8_t *to, uint32_t number, stamp s)
{
    to = put_tag(to, number, RUN);
    to = put_varint(to, stamp_size(s));
    if (s.seconds != 0)
        to = put_varint(put_tag(to, 1, VARINT), (uint64_t)s.seconds);
    if (s.nanos != 0)
        to = put_varint(put_tag(to, 2, VARINT), (uint64_t)s.nanos);
    return to;
}

/* Returns the bytes of a field with its tag: 0 when it has its default value. */
static size_t field_size(const field *f, const void *record)
{
    if (f->kind == NONE)
        return 0;
    if (f->wire == VARINT) {
        uint64_t value = number_of(f, record);
        return value != 0 ? TAG_BYTES + varint_size(value) : 0;
    }
    if (f->kind == STAMP) {
        stamp s = stamp_of(*(const int64_t *)place(record, f));
        return s.present ? run_size(stamp_size(s)) : 0;
    }
    if (f->kind == TEXTS) {
        const cq_texts *texts = place(record, f);
        size_t sum = 0;
        for (uint32_t i = 0; i < texts->count; i++)
            sum += run_size(texts->items[i].len);
        return sum;
    }
    uint32_t len = ((const cq_bytes *)place(record, f))->len;
    return len > 0 ? run_size(len) : 0;
}

/* Writes the bytes that field_size counted and returns where they end. */
static uint8_t *put_field(uint8_t *to, uint32_t number, const field *f, const void *record)
{
    if (f->kind == NONE)
        return to;
    if (f->wire == VARINT) {
        uint64_t value = number_of(f, record);
        return value != 0 ? put_varint(put_tag(to, number, VARINT), value) : to;
    }
    if (f->kind == STAMP) {
        stamp s = stamp_of(*(const int64_t *)place(record, f));
        return s.present ? put_stamp(to, number, s) : to;
    }
    if (f->kind == TEXTS) {
        const cq_texts *texts = place(record, f);
        for (uint32_t i = 0; i < texts->count; i++)
            to = put_run(to, number, texts->items[i]);
        return to;
    }
    const cq_bytes *text = place(record, f);
    return text->len > 0 ? put_run(to, number, *text) : to;
}

static const member *member_of(cq_stream stream, uint32_t number)
{
    CQ_ASSERT(number < FIELDS_END && MEMBERS[stream][number].form != ABSENT);
    return &MEMBERS[stream][number];
}

size_t cq_record_size(cq_stream stream, uint32_t member, const void *record)
{
    const shape *shape = member_of(stream, member)->shape;
    size_t sum = 0;
    for (uint32_t number = 1; number < FIELDS_END; number++)
        sum += field_size(&shape->fields[number], record);
    return sum;
}

size_t cq_event_fit(const size_t *sizes, size_t count, size_t len_max, size_t *len)
{
    size_t sum = 0;
    size_t fit = 0;
    while (fit < count) {
        size_t grown = sum + run_size(sizes[fit]);
        if (fit > 0 && run_size(grown) > len_max)
            break;
        sum = grown;
        fit++;
    }
    *len = run_size(sum);
    return fit;
}

size_t cq_event_size(size_t record_size)
{
    return run_size(record_size);
}

void cq_event_put(cq_stream stream, uint32_t member, const void *records, const size_t *sizes,
                  size_t count, uint8_t *to)
{
    const struct member *m = member_of(stream, member);
    const uint8_t *record = records;
    CQ_ASSERT(m->form == LIST || (m->form == SINGLE && count == 1));
    to = put_tag(to, member, RUN);
    if (m->form == LIST) {
        size_t sum = 0;
        for (size_t i = 0; i < count; i++)
            sum += run_size(sizes[i]);
        to = put_varint(to, sum);
    }
    for (size_t i = 0; i < count; i++) {
        if (m->form == LIST)
            to = put_tag(to, 1, RUN);
        to = put_varint(to, sizes[i]);
        const uint8_t *from = to;
        for (uint32_t number = 1; number < FIELDS_END; number++)
            to = put_field(to, number, &m->shape->fields[number], record);
        CQ_ASSERT(to == from + sizes[i]);
        record += m->shape->record_bytes;
    }
}
