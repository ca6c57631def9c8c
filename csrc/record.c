/* record.c: the records of the log and the stored bodies of tasks, to bytes and back.
 *
 * Integers are little endian; lp16 and lp32 are bytes behind their length. Kind first (u8), then
 *   ACTOR     at_ms i64, tenant lp16, worker lp16, subject lp16: who and when, for what follows
 *   CREATED   length u32 of the rest, id, flags u8, if due: due_ms i64,
 *             keyed: key end i64, key lp16; stored body
 *   CLAIMED   number u48, lease end i64, attempts u32
 *   KEPT      number u48, lease end i64
 *   RETURNED  number u48, state u8, due_ms i64, attempts u32, error lp16
 *   ENDED     number u48, state u8, attempts u32, ended i64, expires i64, flags u8,
 *             result lp32, error lp16, artifacts lp32
 *   CARRIED   as CREATED, and before the body: state u8, attempts u32, updated i64,
 *             worker lp16, subject lp16, error lp16 (due_ms of a dead letter: end of keeping)
 *   REQUEUED, PURGED  number u48
 * A stored body: with trace: parent lp16, state lp16; created_ms i48; split u32; then, before the
 * split fields 2 to 6 of workerpb.Task in proto3 encoding, from it on field 11. So an assignment is
 * these bytes with the id put before them, and the other fields between and behind them. */
#include <string.h>

#include "codeq.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are written as memory has them");

#define NUMBER 6  /* bytes of a task's number */
#define CREATED 6 /* bytes of created_ms in a stored body: up to the year 6429 */
#define VARINT_MAX 10

/* clang-format off */
enum {
    TAG_ID = 0x0A, TAG_COMMAND = 0x12, TAG_PAYLOAD = 0x1A, TAG_PRIORITY = 0x20, TAG_WEBHOOK = 0x2A,
    TAG_MAX_ATTEMPTS = 0x30, TAG_STATUS = 0x3A, TAG_WORKER = 0x42, TAG_LEASE_UNTIL = 0x4A,
    TAG_ATTEMPTS = 0x50, TAG_TENANT = 0x5A, TAG_CREATED = 0x62, TAG_UPDATED = 0x6A
};
/* clang-format on */
enum { TAG_SECONDS = 0x08, TAG_NANOS = 0x10 };   /* of a Timestamp */
enum { TAG_TASK = 0x12, TAG_TASK_BATCH = 0x42 }; /* of a ServerEvent */
enum { TAG_ITEM = 0x0A };                        /* of a TaskAssignment or TaskBatch */

#define STATUS "IN_PROGRESS"
#define LEASE_UNTIL_BYTES 20 /* 2026-01-02T03:04:05Z */

/* --- checksum --------------------------------------------------------------------------------- */

static uint32_t crc_by_table(const uint8_t *from, size_t len)
{
    static const uint32_t nibble[16] = {0x00000000, 0x105EC76F, 0x20BD8EDE, 0x30E349B1,
                                        0x417B1DBC, 0x5125DAD3, 0x61C69362, 0x7198540D,
                                        0x82F63B78, 0x92A8FC17, 0xA24BB5A6, 0xB21572C9,
                                        0xC38D26C4, 0xD3D3E1AB, 0xE330A81A, 0xF36E6F75};
    uint32_t crc = UINT32_MAX;
    for (size_t i = 0; i < len; i++) {
        crc = nibble[(crc ^ from[i]) & 15] ^ crc >> 4;
        crc = nibble[(crc ^ from[i] >> 4) & 15] ^ crc >> 4;
    }
    return ~crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_by_cpu(const uint8_t *from, size_t len)
{
    uint64_t crc = UINT32_MAX;
    for (; len >= 8; from += 8, len -= 8)
        crc = __builtin_ia32_crc32di(crc, cq_get_le(from, 8));
    for (; len > 0; from++, len--)
        crc = __builtin_ia32_crc32qi((uint32_t)crc, *from);
    return ~(uint32_t)crc;
}
#endif

uint32_t cq_crc32c(const void *ptr, size_t len)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return crc_by_cpu(ptr, len);
#endif
    return crc_by_table(ptr, len);
}

/* --- small writers ---------------------------------------------------------------------------- */

static cq_bytes cut16(cq_bytes text)
{
    return (cq_bytes){text.ptr, text.len > UINT16_MAX ? UINT16_MAX : text.len};
}

static uint8_t *put_bytes(uint8_t *to, cq_bytes bytes)
{
    if (bytes.len > 0)
        memcpy(to, bytes.ptr, bytes.len);
    return to + bytes.len;
}

static uint8_t *put_lp16(uint8_t *to, cq_bytes text)
{
    text = cut16(text);
    return put_bytes(cq_put_le(to, text.len, 2), text);
}

static uint8_t *put_lp32(uint8_t *to, cq_bytes bytes)
{
    return put_bytes(cq_put_le(to, bytes.len, 4), bytes);
}

static size_t varint_size(uint64_t value)
{
    return (size_t)(70 - __builtin_clzll(value | 1)) / 7;
}

static uint8_t *put_varint(uint8_t *to, uint64_t value)
{
    for (; value >= 0x80; value >>= 7)
        *to++ = (uint8_t)(value | 0x80);
    *to++ = (uint8_t)value;
    return to;
}

/* int32 and int64 fields: negative values take all ten bytes. */
static uint64_t widened(int64_t value)
{
    return (uint64_t)value;
}

static size_t int_size(int64_t value)
{
    return value == 0 ? 0 : 1 + varint_size(widened(value));
}

static uint8_t *put_int(uint8_t *to, uint8_t tag, int64_t value)
{
    if (value == 0)
        return to;
    *to++ = tag;
    return put_varint(to, widened(value));
}

static size_t run_size(uint32_t len)
{
    return len == 0 ? 0 : 1 + varint_size(len) + len;
}

static uint8_t *put_run(uint8_t *to, uint8_t tag, cq_bytes run)
{
    if (run.len == 0)
        return to;
    *to++ = tag;
    return put_bytes(put_varint(to, run.len), run);
}

static int64_t seconds_of(int64_t ms)
{
    return ms / 1000 - (ms % 1000 < 0);
}

static int64_t nanos_of(int64_t ms)
{
    return (ms - seconds_of(ms) * 1000) * 1000000;
}

static size_t stamp_size(int64_t ms)
{
    return 2 + int_size(seconds_of(ms)) + int_size(nanos_of(ms));
}

static uint8_t *put_stamp(uint8_t *to, uint8_t tag, int64_t ms)
{
    *to++ = tag;
    *to++ = (uint8_t)(stamp_size(ms) - 2);
    return put_int(put_int(to, TAG_SECONDS, seconds_of(ms)), TAG_NANOS, nanos_of(ms));
}

/* --- small readers ---------------------------------------------------------------------------- */

/* Takes `len` bytes off the front; NULL when there are fewer. */
static const uint8_t *take(cq_bytes *rest, uint64_t len)
{
    if (len > rest->len)
        return NULL;
    const uint8_t *at = rest->ptr;
    rest->ptr += len;
    rest->len -= (uint32_t)len;
    return at;
}

static bool take_run(cq_bytes *rest, int length_bytes, cq_bytes *run)
{
    const uint8_t *length = take(rest, (uint64_t)length_bytes);
    if (length == NULL)
        return false;
    run->len = (uint32_t)cq_get_le(length, length_bytes);
    run->ptr = take(rest, run->len);
    return run->ptr != NULL;
}

static bool take_varint(cq_bytes *rest, uint64_t *value)
{
    *value = 0;
    for (int shift = 0; shift < 7 * VARINT_MAX; shift += 7) {
        const uint8_t *byte = take(rest, 1);
        if (byte == NULL)
            return false;
        *value |= (uint64_t)(*byte & 0x7F) << shift;
        if (*byte < 0x80)
            return true;
    }
    return false;
}

/* --- stored bodies ---------------------------------------------------------------------------- */

static bool has_trace(const cq_create *create)
{
    return create->trace_parent.len + create->trace_state.len > 0;
}

static size_t head_size(const cq_create *create, int32_t max_attempts)
{
    return run_size(create->command.len) + run_size(create->payload.len) +
           int_size(create->priority) + run_size(create->webhook.len) + int_size(max_attempts);
}

size_t cq_body_size(const cq_create *create, const cq_queue *queue, int32_t max_attempts)
{
    size_t trace = has_trace(create)
                       ? 4 + cut16(create->trace_parent).len + cut16(create->trace_state).len
                       : 0;
    return trace + CREATED + 4 + head_size(create, max_attempts) +
           run_size(queue->tenant->name.len);
}

void cq_body_put(uint8_t *to, const cq_create *create, const cq_queue *queue, int32_t max_attempts,
                 int64_t created_ms)
{
    if (has_trace(create))
        to = put_lp16(put_lp16(to, create->trace_parent), create->trace_state);
    to = cq_put_le(to, (uint64_t)created_ms, CREATED);
    to = cq_put_le(to, head_size(create, max_attempts), 4);
    to = put_run(to, TAG_COMMAND, create->command);
    to = put_run(to, TAG_PAYLOAD, create->payload);
    to = put_int(to, TAG_PRIORITY, create->priority);
    to = put_run(to, TAG_WEBHOOK, create->webhook);
    to = put_int(to, TAG_MAX_ATTEMPTS, max_attempts);
    put_run(to, TAG_TENANT, queue->tenant->name);
}

cq_status cq_body_split(cq_bytes stored, uint8_t flags, cq_body *body)
{
    body->trace_parent = body->trace_state = (cq_bytes){0};
    if (flags & CQ_FLAG_TRACE) {
        if (!take_run(&stored, 2, &body->trace_parent) || !take_run(&stored, 2, &body->trace_state))
            return CQ_MALFORMED;
    }
    const uint8_t *created = take(&stored, CREATED);
    if (created == NULL || !take_run(&stored, 4, &body->head))
        return CQ_MALFORMED;
    body->created_ms = (int64_t)(cq_get_le(created, CREATED) << 16) >> 16; /* its sign as well */
    body->tail = stored;
    return CQ_DONE;
}

/* Reads one field of workerpb.Task; false when it is cut short or none that is stored. */
static bool read_field(cq_bytes *rest, cq_body *body)
{
    uint64_t tag, value;
    if (!take_varint(rest, &tag) || !take_varint(rest, &value))
        return false;
    if (tag == TAG_PRIORITY) {
        body->priority = (int32_t)value;
        return true;
    }
    if (tag == TAG_MAX_ATTEMPTS) {
        body->max_attempts = (int32_t)value;
        return true;
    }
    cq_bytes run = {NULL, (uint32_t)value};
    run.ptr = take(rest, value);
    if (run.ptr == NULL)
        return false;
    switch (tag) {
    case TAG_COMMAND:
        body->command = run;
        return true;
    case TAG_PAYLOAD:
        body->payload = run;
        return true;
    case TAG_WEBHOOK:
        body->webhook = run;
        return true;
    case TAG_TENANT:
        body->tenant = run;
        return true;
    default:
        return false;
    }
}

cq_status cq_body_read(cq_bytes stored, uint8_t flags, cq_body *body)
{
    *body = (cq_body){0};
    if (cq_body_split(stored, flags, body) != CQ_DONE)
        return CQ_MALFORMED;
    for (cq_bytes part = body->head; part.len > 0;) {
        if (!read_field(&part, body))
            return CQ_MALFORMED;
    }
    for (cq_bytes part = body->tail; part.len > 0;) {
        if (!read_field(&part, body))
            return CQ_MALFORMED;
    }
    return CQ_DONE;
}

/* --- assignments ------------------------------------------------------------------------------ */

static uint8_t *put_digits(uint8_t *to, int64_t value, int digits)
{
    for (int i = digits - 1; i >= 0; i--, value /= 10)
        to[i] = (uint8_t)('0' + value % 10);
    return to + digits;
}

/* RFC 3339 in UTC, whole seconds rounded down; times outside the years 1 to 9999 are cut. */
static void format_time(uint8_t text[LEASE_UNTIL_BYTES], int64_t ms)
{
    int64_t seconds = seconds_of(ms);
    seconds = seconds < CQ_SECONDS_MIN ? CQ_SECONDS_MIN : seconds;
    seconds = seconds > CQ_SECONDS_MAX ? CQ_SECONDS_MAX : seconds;
    int64_t day = (seconds - CQ_SECONDS_MIN) / 86400; /* since 0001-01-01 */
    int64_t second = (seconds - CQ_SECONDS_MIN) % 86400;
    /* Years that begin in March put the leap day last: day 0 becomes 0000-03-01. */
    int64_t march = day + 306;
    int64_t era = march / 146097, in_era = march % 146097;
    int64_t year = (in_era - in_era / 1460 + in_era / 36524 - in_era / 146096) / 365;
    int64_t in_year = in_era - (365 * year + year / 4 - year / 100);
    int64_t month = (5 * in_year + 2) / 153;
    int64_t day_of_month = in_year - (153 * month + 2) / 5 + 1;
    year += era * 400 + (month >= 10);
    month = month < 10 ? month + 3 : month - 9;
    uint8_t *to = put_digits(text, year, 4);
    *to++ = '-';
    to = put_digits(to, month, 2);
    *to++ = '-';
    to = put_digits(to, day_of_month, 2);
    *to++ = 'T';
    to = put_digits(to, second / 3600, 2);
    *to++ = ':';
    to = put_digits(to, second / 60 % 60, 2);
    *to++ = ':';
    *put_digits(to, second % 60, 2) = 'Z';
}

cq_status cq_splice_make(cq_splice *splice, cq_bytes worker, int64_t lease_until_ms, int64_t now_ms)
{
    cq_bytes status = {(const uint8_t *)STATUS, sizeof STATUS - 1};
    uint8_t until[LEASE_UNTIL_BYTES];
    format_time(until, lease_until_ms);
    size_t before_len = run_size(status.len) + run_size(worker.len) + run_size(sizeof until);
    splice->before_len = (uint32_t)before_len;
    splice->after_len = (uint32_t)stamp_size(now_ms);
    splice->data = malloc(splice->before_len + splice->after_len);
    if (splice->data == NULL)
        return CQ_NO_MEMORY;
    uint8_t *to = put_run(splice->data, TAG_STATUS, status);
    to = put_run(to, TAG_WORKER, worker);
    to = put_run(to, TAG_LEASE_UNTIL, (cq_bytes){until, sizeof until});
    put_stamp(to, TAG_UPDATED, now_ms);
    return CQ_DONE;
}

static size_t piece_len(const cq_splice *splice, const cq_piece *piece)
{
    return run_size(CQ_ID_TEXT_BYTES) + piece->head.len + splice->before_len +
           int_size(piece->attempts) + piece->tail.len + stamp_size(piece->created_ms) +
           splice->after_len;
}

size_t cq_piece_size(const cq_splice *splice, const cq_piece *piece)
{
    size_t len = piece_len(splice, piece);
    return 1 + varint_size(len) + len;
}

static size_t pieces_size(const cq_splice *splice, const cq_piece *pieces, size_t count)
{
    size_t size = 0;
    for (size_t i = 0; i < count; i++)
        size += cq_piece_size(splice, &pieces[i]);
    return size;
}

size_t cq_assignment_size(const cq_splice *splice, const cq_piece *pieces, size_t count)
{
    size_t size = pieces_size(splice, pieces, count);
    return 1 + varint_size(size) + size;
}

void cq_assignment_put(uint8_t *to, const cq_splice *splice, const cq_piece *pieces, size_t count,
                       bool single)
{
    CQ_ASSERT(!single || count == 1);
    *to++ = single ? TAG_TASK : TAG_TASK_BATCH;
    to = put_varint(to, pieces_size(splice, pieces, count));
    for (size_t i = 0; i < count; i++) {
        *to++ = TAG_ITEM;
        to = put_varint(to, piece_len(splice, &pieces[i]));
        *to++ = TAG_ID;
        *to++ = CQ_ID_TEXT_BYTES;
        cq_id_format(pieces[i].id, to);
        to = put_bytes(to + CQ_ID_TEXT_BYTES, pieces[i].head);
        to = put_bytes(to, (cq_bytes){splice->data, splice->before_len});
        to = put_int(to, TAG_ATTEMPTS, pieces[i].attempts);
        to = put_bytes(to, pieces[i].tail);
        to = put_stamp(to, TAG_CREATED, pieces[i].created_ms);
        to = put_bytes(to, (cq_bytes){splice->data + splice->before_len, splice->after_len});
    }
}

/* --- writing records -------------------------------------------------------------------------- */

size_t cq_actor_size(const cq_holder *holder)
{
    size_t size = 1 + 8 + 3 * 2;
    if (holder != NULL)
        size += (size_t)cut16(holder->tenant).len + cut16(holder->worker).len +
                cut16(holder->subject).len;
    return size;
}

uint8_t *cq_actor_put(uint8_t *to, int64_t at_ms, const cq_holder *holder)
{
    cq_bytes none = {0};
    *to++ = CQ_RECORD_ACTOR;
    to = cq_put_le(to, (uint64_t)at_ms, 8);
    to = put_lp16(to, holder == NULL ? none : holder->tenant);
    to = put_lp16(to, holder == NULL ? none : holder->worker);
    return put_lp16(to, holder == NULL ? none : holder->subject);
}

/* Of what CREATED and CARRIED begin with. */
static size_t start_size(int64_t due_ms, bool keyed, cq_bytes key)
{
    size_t size = 1 + 4 + CQ_ID_BYTES + 1 + (due_ms != CQ_NEVER ? 8 : 0);
    return keyed ? size + 8 + 2 + cut16(key).len : size;
}

static uint8_t *put_start(uint8_t *to, cq_record_kind kind, const cq_slot *slot, size_t size,
                          int64_t due_ms, int64_t key_end_ms, cq_bytes key)
{
    *to++ = (uint8_t)kind;
    to = cq_put_le(to, size - 5, 4);
    memcpy(to, slot->id, CQ_ID_BYTES);
    to += CQ_ID_BYTES;
    *to++ = (slot->flags & CQ_FLAGS_STORED) | (due_ms != CQ_NEVER ? CQ_RECORD_DUE : 0);
    if (due_ms != CQ_NEVER)
        to = cq_put_le(to, (uint64_t)due_ms, 8);
    if (!(slot->flags & CQ_FLAG_KEY))
        return to;
    return put_lp16(cq_put_le(to, (uint64_t)key_end_ms, 8), key);
}

size_t cq_created_size(const cq_create *create, int64_t due_ms, size_t body_size)
{
    return start_size(due_ms, create->key.len > 0, create->key) + body_size;
}

uint8_t *cq_created_put(uint8_t *to, const cq_slot *slot, const cq_create *create, int64_t due_ms,
                        int64_t key_end_ms, size_t body_size)
{
    size_t size = cq_created_size(create, due_ms, body_size);
    to = put_start(to, CQ_RECORD_CREATED, slot, size, due_ms, key_end_ms, create->key);
    return put_bytes(to, (cq_bytes){slot->body, (uint32_t)body_size});
}

uint8_t *cq_number_put(uint8_t *to, cq_record_kind kind, uint64_t number)
{
    *to++ = (uint8_t)kind;
    return cq_put_le(to, number, NUMBER);
}

uint8_t *cq_claimed_put(uint8_t *to, const cq_slot *slot)
{
    to = cq_number_put(to, CQ_RECORD_CLAIMED, cq_id_number(slot->id));
    return cq_put_le(cq_put_le(to, (uint64_t)slot->due_ms, 8), (uint32_t)slot->attempts, 4);
}

uint8_t *cq_kept_put(uint8_t *to, const cq_slot *slot)
{
    return cq_put_le(cq_number_put(to, CQ_RECORD_KEPT, cq_id_number(slot->id)),
                     (uint64_t)slot->due_ms, 8);
}

static cq_bytes error_of(const cq_slot *slot)
{
    return slot->error == NULL ? (cq_bytes){0} : (cq_bytes){slot->error->data, slot->error->len};
}

size_t cq_returned_size(uint32_t error_len)
{
    return 1 + NUMBER + 1 + 8 + 4 + 2 + (size_t)error_len;
}

uint8_t *cq_returned_put(uint8_t *to, const cq_slot *slot)
{
    to = cq_number_put(to, CQ_RECORD_RETURNED, cq_id_number(slot->id));
    *to++ = slot->state;
    to = cq_put_le(cq_put_le(to, (uint64_t)slot->due_ms, 8), (uint32_t)slot->attempts, 4);
    return put_lp16(to, error_of(slot));
}

size_t cq_ended_size(cq_bytes result, cq_bytes error, cq_bytes artifacts)
{
    return 1 + NUMBER + 1 + 4 + 8 + 8 + 1 + (4 + (size_t)result.len) +
           (2 + (size_t)cut16(error).len) + (4 + (size_t)artifacts.len);
}

uint8_t *cq_ended_put(uint8_t *to, const cq_slot *slot, uint8_t flags, cq_bytes result,
                      cq_bytes error, cq_bytes artifacts)
{
    to = cq_number_put(to, CQ_RECORD_ENDED, cq_id_number(slot->id));
    *to++ = slot->state;
    to = cq_put_le(to, (uint32_t)slot->attempts, 4);
    to = cq_put_le(cq_put_le(to, (uint64_t)slot->updated_ms, 8), (uint64_t)slot->due_ms, 8);
    *to++ = flags;
    return put_lp32(put_lp16(put_lp32(to, result), error), artifacts);
}

static cq_bytes worker_of(const cq_slot *slot)
{
    return slot->holder == NULL ? (cq_bytes){0} : slot->holder->worker;
}

static cq_bytes subject_of(const cq_slot *slot)
{
    return slot->holder == NULL ? (cq_bytes){0} : slot->holder->subject;
}

size_t cq_carried_size(const cq_slot *slot, const cq_record *created)
{
    return start_size(slot->due_ms, slot->flags & CQ_FLAG_KEY, created->key) + 1 + 4 + 8 +
           (2 + (size_t)cut16(worker_of(slot)).len) + (2 + (size_t)cut16(subject_of(slot)).len) +
           (2 + (size_t)error_of(slot).len) + created->stored.len;
}

uint8_t *cq_carried_put(uint8_t *to, const cq_slot *slot, const cq_record *created)
{
    size_t size = cq_carried_size(slot, created);
    to = put_start(to, CQ_RECORD_CARRIED, slot, size, slot->due_ms, created->key_end_ms,
                   created->key);
    *to++ = slot->state;
    to = cq_put_le(cq_put_le(to, (uint32_t)slot->attempts, 4), (uint64_t)slot->updated_ms, 8);
    to = put_lp16(put_lp16(to, worker_of(slot)), subject_of(slot));
    return put_bytes(put_lp16(to, error_of(slot)), created->stored);
}

/* --- reading records -------------------------------------------------------------------------- */

cq_status cq_chunk_open(cq_bytes chunk, cq_bytes *records)
{
    *records = chunk;
    const uint8_t *frame = take(records, CQ_CHUNK_FRAME);
    if (frame == NULL || frame[0] != CQ_CHUNK_VERSION)
        return CQ_MALFORMED;
    bool whole = cq_get_le(frame + 1, 4) == cq_crc32c(records->ptr, records->len);
    return whole ? CQ_DONE : CQ_MALFORMED;
}

static bool take_int(cq_bytes *rest, int bytes, uint64_t *value)
{
    const uint8_t *at = take(rest, (uint64_t)bytes);
    if (at == NULL)
        return false;
    *value = cq_get_le(at, bytes);
    return true;
}

static bool take_ms(cq_bytes *rest, int64_t *ms)
{
    uint64_t value;
    if (!take_int(rest, 8, &value))
        return false;
    *ms = (int64_t)value;
    return true;
}

static bool take_byte(cq_bytes *rest, uint8_t *byte)
{
    const uint8_t *at = take(rest, 1);
    if (at == NULL)
        return false;
    *byte = *at;
    return true;
}

static bool take_attempts(cq_bytes *rest, int32_t *attempts)
{
    uint64_t value;
    if (!take_int(rest, 4, &value))
        return false;
    *attempts = (int32_t)value;
    return value <= INT32_MAX;
}

static bool read_actor(cq_bytes *rest, cq_record *record)
{
    return take_ms(rest, &record->at_ms) && take_run(rest, 2, &record->tenant) &&
           take_run(rest, 2, &record->actor_worker) && take_run(rest, 2, &record->actor_subject);
}

static bool read_state(cq_bytes *rest, cq_record *record)
{
    if (!take_byte(rest, &record->state) || !take_attempts(rest, &record->attempts) ||
        !take_ms(rest, &record->updated_ms) || !take_run(rest, 2, &record->worker) ||
        !take_run(rest, 2, &record->subject) || !take_run(rest, 2, &record->error))
        return false;
    record->ended_ms = record->updated_ms;
    record->expires_ms = record->due_ms;
    return record->state == CQ_READY || record->state == CQ_DELAYED || record->state == CQ_LEASED ||
           record->state == CQ_DEAD;
}

/* CREATED and CARRIED. */
static bool read_created(cq_bytes *rest, cq_record *record)
{
    cq_bytes own;
    if (!take_run(rest, 4, &own))
        return false;
    record->id = take(&own, CQ_ID_BYTES);
    if (record->id == NULL || !take_byte(&own, &record->flags))
        return false;
    record->due_ms = CQ_NEVER;
    if (record->flags & CQ_RECORD_DUE && !take_ms(&own, &record->due_ms))
        return false;
    record->number = cq_id_number(record->id);
    record->key = (cq_bytes){0};
    record->key_end_ms = 0;
    if (record->flags & CQ_FLAG_KEY) {
        if (!take_ms(&own, &record->key_end_ms) || !take_run(&own, 2, &record->key))
            return false;
    }
    if (record->kind == CQ_RECORD_CARRIED && !read_state(&own, record))
        return false;
    record->stored = own;
    return true;
}

static bool read_returned(cq_bytes *rest, cq_record *record)
{
    return take_byte(rest, &record->state) && take_ms(rest, &record->due_ms) &&
           take_attempts(rest, &record->attempts) && take_run(rest, 2, &record->error) &&
           (record->state == CQ_READY || record->state == CQ_DELAYED);
}

static bool read_ended(cq_bytes *rest, cq_record *record)
{
    return take_byte(rest, &record->state) && take_attempts(rest, &record->attempts) &&
           take_ms(rest, &record->ended_ms) && take_ms(rest, &record->expires_ms) &&
           take_byte(rest, &record->flags) && take_run(rest, 4, &record->result) &&
           take_run(rest, 2, &record->error) && take_run(rest, 4, &record->artifacts) &&
           record->state >= CQ_COMPLETED && record->state <= CQ_DEAD;
}

/* The kinds that begin with a task's number; false when cut short or unknown. */
static bool read_numbered(cq_bytes *rest, cq_record *record)
{
    if (!take_int(rest, NUMBER, &record->number))
        return false;
    record->worker = record->actor_worker;
    record->subject = record->actor_subject;
    switch (record->kind) {
    case CQ_RECORD_CLAIMED:
        return take_ms(rest, &record->due_ms) && take_attempts(rest, &record->attempts);
    case CQ_RECORD_KEPT:
        return take_ms(rest, &record->due_ms);
    case CQ_RECORD_RETURNED:
        return read_returned(rest, record);
    case CQ_RECORD_ENDED:
        return read_ended(rest, record);
    default:
        return record->kind == CQ_RECORD_REQUEUED || record->kind == CQ_RECORD_PURGED;
    }
}

cq_status cq_record_next(cq_bytes *rest, cq_record *record)
{
    if (rest->len == 0)
        return CQ_FULL;
    bool read;
    take_byte(rest, &record->kind);
    if (record->kind == CQ_RECORD_ACTOR)
        read = read_actor(rest, record);
    else if (record->kind == CQ_RECORD_CREATED || record->kind == CQ_RECORD_CARRIED)
        read = read_created(rest, record);
    else
        read = read_numbered(rest, record);
    return read ? CQ_DONE : CQ_MALFORMED;
}

static bool is_end(const cq_record *record)
{
    return record->kind == CQ_RECORD_ENDED ||
           (record->kind == CQ_RECORD_CARRIED && record->state == CQ_DEAD);
}

static bool is_creation(const cq_record *record)
{
    return record->kind == CQ_RECORD_CREATED || record->kind == CQ_RECORD_CARRIED;
}

cq_status cq_record_find(cq_bytes chunk, uint64_t number, bool ended, cq_record *record)
{
    cq_bytes rest;
    if (cq_chunk_open(chunk, &rest) != CQ_DONE)
        return CQ_MALFORMED;
    cq_record each = {0};
    bool found = false;
    cq_status status;
    while ((status = cq_record_next(&rest, &each)) == CQ_DONE) {
        if (each.kind == CQ_RECORD_ACTOR || each.number != number)
            continue;
        if (ended ? is_end(&each) : is_creation(&each)) {
            *record = each;
            found = true;
        }
    }
    if (status == CQ_MALFORMED)
        return status;
    return found ? CQ_DONE : CQ_FULL;
}
