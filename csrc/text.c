/* text.c: what a well-formed text is: UTF-8, JSON, white space, control characters, UUIDs; and the
 * bounds of a create and a result that follow from it. */
#include <string.h>

#include "codeq.h"

#define ONES UINT64_C(0x0101010101010101)
#define HIGHS UINT64_C(0x8080808080808080)

/* Returns the next eight bytes, the first in the lowest bits on every machine. */
static uint64_t load8(const uint8_t *at)
{
    uint64_t word;
    memcpy(&word, at, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

static void store8(uint8_t *at, uint64_t word)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    memcpy(at, &word, 8);
}

/* --- UTF-8 ---------------------------------------------------------------------------------- */

static bool continues(uint8_t byte)
{
    return (byte & 0xC0) == 0x80;
}

/* Returns the length in bytes of the character at `at`, which is not ASCII, or 0 when it is cut
 * short, overlong, a surrogate or above U+10FFFF. */
static size_t wide(const uint8_t *at, size_t left)
{
    uint8_t lead = at[0];
    if (lead < 0xC2 || left < 2 || !continues(at[1]))
        return 0;
    if (lead < 0xE0)
        return 2;
    if (left < 3 || !continues(at[2]))
        return 0;
    if (lead < 0xF0) {
        bool overlong = lead == 0xE0 && at[1] < 0xA0;
        bool surrogate = lead == 0xED && at[1] >= 0xA0;
        return overlong || surrogate ? 0 : 3;
    }
    if (lead > 0xF4 || left < 4 || !continues(at[3]))
        return 0;
    bool overlong = lead == 0xF0 && at[1] < 0x90;
    bool beyond = lead == 0xF4 && at[1] >= 0x90;
    return overlong || beyond ? 0 : 4;
}

/* Returns how many of the bytes are plain ASCII from the start on; it may stop up to 7 too early,
 * but tells all of a text that is ASCII throughout. */
static size_t ascii(const uint8_t *at, size_t len)
{
    size_t done = 0;
    while (len - done >= 8 && (load8(at + done) & HIGHS) == 0)
        done += 8;
    if (len - done < 8 && len >= 8 && (load8(at + len - 8) & HIGHS) == 0)
        return len;
    return done;
}

bool cq_utf8_valid(cq_bytes text)
{
    size_t done = ascii(text.ptr, text.len);
    const uint8_t *at = text.ptr + done;
    size_t left = text.len - done;
    while (left > 0) {
        if (left >= 8 && (load8(at) & HIGHS) == 0) {
            at += 8;
            left -= 8;
            continue;
        }
        size_t size = *at < 0x80 ? 1 : wide(at, left);
        if (size == 0)
            return false;
        at += size;
        left -= size;
    }
    return true;
}

cq_bytes cq_utf8_cut(cq_bytes text, uint32_t len_max)
{
    if (text.len <= len_max)
        return text;
    text.len = len_max;
    while (text.len > 0 && continues(text.ptr[text.len]))
        text.len--;
    return text;
}

/* --- white space and control characters ------------------------------------------------------ */

/* Returns the length of the white-space character at `at`, or 0 when there is none. */
static uint32_t space(const uint8_t *at, uint32_t left)
{
    if (left >= 1 && (at[0] == ' ' || (at[0] >= '\t' && at[0] <= '\r')))
        return 1;
    if (left >= 2 && at[0] == 0xC2 && (at[1] == 0x85 || at[1] == 0xA0))
        return 2;
    if (left < 3 || at[0] < 0xE1 || at[0] > 0xE3)
        return 0;
    uint32_t code = (uint32_t)(at[0] & 0x0F) << 12 | (uint32_t)(at[1] & 0x3F) << 6 | (at[2] & 0x3F);
    bool blank = code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
                 code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
    return blank && continues(at[1]) && continues(at[2]) ? 3 : 0;
}

/* Returns the length of the white-space character that ends at `end`, or 0 when there is none. */
static uint32_t space_before(const uint8_t *end, uint32_t left)
{
    for (uint32_t size = 1; size <= 3 && size <= left; size++)
        if (space(end - size, size) == size)
            return size;
    return 0;
}

cq_bytes cq_trim(cq_bytes text)
{
    uint32_t size;
    while ((size = space(text.ptr, text.len)) > 0) {
        text.ptr += size;
        text.len -= size;
    }
    while (text.len > 0 && (size = space_before(text.ptr + text.len, text.len)) > 0)
        text.len -= size;
    return text;
}

bool cq_has_control(cq_bytes text)
{
    for (uint32_t i = 0; i < text.len; i++) {
        uint8_t byte = text.ptr[i];
        if (byte < 0x20 || byte == 0x7F)
            return true;
        if (byte == 0xC2 && i + 1 < text.len && text.ptr[i + 1] < 0xA0)
            return true;
    }
    return false;
}

/* --- JSON ------------------------------------------------------------------------------------ */

typedef struct scan {
    const uint8_t *at;
    const uint8_t *end;
    uint32_t depth;                           /* containers open */
    uint64_t objects[CQ_JSON_DEPTH_MAX / 64]; /* one bit each: it is an object */
} scan;

static bool digit(uint8_t byte)
{
    return byte >= '0' && byte <= '9';
}

static void blanks(scan *s)
{
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\n' || *s->at == '\t' || *s->at == '\r'))
        s->at++;
}

/* Returns whether the next byte was `byte`, and if so passes it. */
static bool take(scan *s, uint8_t byte)
{
    if (s->at == s->end || *s->at != byte)
        return false;
    s->at++;
    return true;
}

/* Returns whether one or more digits came next, and passes them. */
static bool digits(scan *s)
{
    const uint8_t *from = s->at;
    while (s->at < s->end && digit(*s->at))
        s->at++;
    return s->at > from;
}

static bool number(scan *s)
{
    take(s, '-');
    if (!take(s, '0') && !digits(s))
        return false;
    if (take(s, '.') && !digits(s))
        return false;
    if (!take(s, 'e') && !take(s, 'E'))
        return true;
    if (!take(s, '+'))
        take(s, '-');
    return digits(s);
}

static bool word(scan *s, const char *rest, size_t len)
{
    if ((size_t)(s->end - s->at) < len || memcmp(s->at, rest, len) != 0)
        return false;
    s->at += len;
    return true;
}

/* Returns whether an escape follows; its backslash is passed already. Lone surrogates are allowed,
 * as the grammar allows them. */
static bool escape(scan *s)
{
    if (s->at == s->end)
        return false;
    uint8_t kind = *s->at++;
    if (kind != 'u')
        return kind != 0 && strchr("\"\\/bfnrt", kind) != NULL;
    if (s->end - s->at < 4)
        return false;
    for (int i = 0; i < 4; i++) {
        uint8_t byte = *s->at++;
        uint8_t lower = byte | 0x20;
        if (!digit(byte) && (lower < 'a' || lower > 'f'))
            return false;
    }
    return true;
}

/* Returns a word that is not zero when one of its eight bytes ends a plain run inside a string: a
 * quote, a backslash or a control character. */
static uint64_t special(uint64_t bytes)
{
    uint64_t quote = bytes ^ (ONES * '"');
    uint64_t slash = bytes ^ (ONES * '\\');
    uint64_t found =
        ((quote - ONES) & ~quote) | ((slash - ONES) & ~slash) | ((bytes - ONES * 0x20) & ~bytes);
    return found & HIGHS;
}

/* Returns whether a string ends properly; its opening quote is passed already. */
static bool string(scan *s)
{
    for (;;) {
        while (s->end - s->at >= 8 && special(load8(s->at)) == 0)
            s->at += 8;
        if (s->at == s->end)
            return false;
        uint8_t byte = *s->at++;
        if (byte == '"')
            return true;
        if (byte < 0x20 || (byte == '\\' && !escape(s)))
            return false;
    }
}

/* Returns whether the container may be opened: false past CQ_JSON_DEPTH_MAX. */
static bool open(scan *s, bool object)
{
    if (s->depth == CQ_JSON_DEPTH_MAX)
        return false;
    uint64_t bit = UINT64_C(1) << (s->depth % 64);
    uint64_t *bits = &s->objects[s->depth / 64];
    *bits = object ? *bits | bit : *bits & ~bit;
    s->depth++;
    return true;
}

static bool in_object(const scan *s)
{
    return s->objects[(s->depth - 1) / 64] >> ((s->depth - 1) % 64) & 1;
}

/* Returns whether the container just opened is closed at once, and if so passes its end. */
static bool closes(scan *s, uint8_t byte)
{
    blanks(s);
    if (!take(s, byte))
        return false;
    s->depth--;
    return true;
}

/* Returns whether a member name and its colon come next. */
static bool name(scan *s)
{
    blanks(s);
    if (!take(s, '"') || !string(s))
        return false;
    blanks(s);
    return take(s, ':');
}

/* Returns whether a value starts here: passes a scalar or an empty container whole, of any other
 * container its opening and all down to its first scalar. */
static bool value(scan *s)
{
    for (;;) {
        blanks(s);
        if (s->at == s->end)
            return false;
        switch (*s->at++) {
        case '{':
            if (!open(s, true))
                return false;
            if (closes(s, '}'))
                return true;
            if (!name(s))
                return false;
            break;
        case '[':
            if (!open(s, false))
                return false;
            if (closes(s, ']'))
                return true;
            break;
        case '"':
            return string(s);
        case 't':
            return word(s, "rue", 3);
        case 'f':
            return word(s, "alse", 4);
        case 'n':
            return word(s, "ull", 3);
        default:
            s->at--;
            return number(s);
        }
    }
}

bool cq_json_valid(cq_bytes text)
{
    if (text.len == 0 || !cq_utf8_valid(text))
        return false;
    scan s;
    s.at = text.ptr;
    s.end = text.ptr + text.len;
    s.depth = 0;
    while (value(&s)) {
        for (;;) {
            blanks(&s);
            if (s.depth == 0)
                return s.at == s.end;
            bool object = in_object(&s);
            if (take(&s, ',')) {
                if (object && !name(&s))
                    return false;
                break;
            }
            if (!take(&s, object ? '}' : ']'))
                return false;
            s.depth--;
        }
    }
    return false;
}

/* --- UUIDs ----------------------------------------------------------------------------------- */

/* Returns eight lower-case hex digits of four bytes, in the order they are written. */
static uint64_t hex8(const uint8_t *bytes)
{
    uint64_t spread = (uint64_t)bytes[0] | (uint64_t)bytes[1] << 16 | (uint64_t)bytes[2] << 32 |
                      (uint64_t)bytes[3] << 48;
    uint64_t nibbles =
        (spread >> 4 & UINT64_C(0x000F000F000F000F)) | (spread & UINT64_C(0x000F000F000F000F)) << 8;
    uint64_t letters = (nibbles + ONES * 6) >> 4 & ONES;
    return nibbles + ONES * '0' + letters * ('a' - '0' - 10);
}

void cq_id_format(const uint8_t id[CQ_ID_BYTES], uint8_t text[CQ_ID_TEXT_BYTES])
{
    uint8_t digits32[32];
    for (int i = 0; i < 4; i++)
        store8(digits32 + 8 * i, hex8(id + 4 * i));
    memcpy(text, digits32, 8);
    text[8] = '-';
    memcpy(text + 9, digits32 + 8, 4);
    text[13] = '-';
    memcpy(text + 14, digits32 + 12, 4);
    text[18] = '-';
    memcpy(text + 19, digits32 + 16, 4);
    text[23] = '-';
    memcpy(text + 24, digits32 + 20, 12);
}

/* The value of a lower-case hex digit plus 1; 0 for every other byte. */
static const uint8_t HEX[256] = {
    ['0'] = 1, ['1'] = 2,  ['2'] = 3,  ['3'] = 4,  ['4'] = 5,  ['5'] = 6,  ['6'] = 7,  ['7'] = 8,
    ['8'] = 9, ['9'] = 10, ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16};

bool cq_id_parse(cq_bytes text, uint8_t id[CQ_ID_BYTES])
{
    /* where in the text each byte of the id stands */
    static const uint8_t place[CQ_ID_BYTES] = {0,  2,  4,  6,  9,  11, 14, 16,
                                               19, 21, 24, 26, 28, 30, 32, 34};
    if (text.len != CQ_ID_TEXT_BYTES || text.ptr[8] != '-' || text.ptr[13] != '-' ||
        text.ptr[18] != '-' || text.ptr[23] != '-')
        return false;
    bool strange = false;
    for (int i = 0; i < CQ_ID_BYTES; i++) {
        uint8_t high = HEX[text.ptr[place[i]]];
        uint8_t low = HEX[text.ptr[place[i] + 1]];
        strange |= high == 0 || low == 0;
        id[i] = (uint8_t)((uint8_t)(high - 1) << 4 | ((low - 1) & 0x0F));
    }
    return !strange;
}

/* --- bounds of a create and of a result ------------------------------------------------------ */

#define LITERAL(text) ((cq_bytes){(const uint8_t *)(text), sizeof(text) - 1})

static bool equals(cq_bytes text, cq_bytes other)
{
    return text.len == other.len && (text.len == 0 || memcmp(text.ptr, other.ptr, text.len) == 0);
}

/* A time rounded up to whole milliseconds may reach the first moment after the range. */
static bool run_at_valid(int64_t run_at_ms)
{
    return run_at_ms == CQ_NEVER ||
           (run_at_ms >= CQ_SECONDS_MIN * 1000 && run_at_ms <= (CQ_SECONDS_MAX + 1) * 1000);
}

/* Returns the first bound that the create breaks, CQ_OK when it keeps them all. */
static cq_code create_fault(const cq_create *create, uint32_t payload_bytes_max)
{
    if (create->command.len == 0)
        return CQ_COMMAND_REQUIRED;
    if (create->command.len > CQ_COMMAND_BYTES_MAX || !cq_utf8_valid(create->command) ||
        cq_has_control(create->command))
        return CQ_COMMAND_INVALID;
    if (create->webhook.len > CQ_WEBHOOK_BYTES_MAX || !cq_utf8_valid(create->webhook))
        return CQ_WEBHOOK_INVALID;
    if (!run_at_valid(create->run_at_ms))
        return CQ_RUN_AT_INVALID;
    if (create->delay_seconds < 0)
        return CQ_DELAY_INVALID;
    if (create->key.len > CQ_KEY_BYTES_MAX || !cq_utf8_valid(create->key))
        return CQ_KEY_INVALID;
    if (create->payload.len > payload_bytes_max)
        return CQ_PAYLOAD_TOO_LARGE;
    return CQ_OK;
}

/* Tracing must never cost a task: a trace text out of bounds is dropped, not refused. */
static void bound_trace(cq_bytes *text)
{
    if (text->len > CQ_TRACE_BYTES_MAX || !cq_utf8_valid(*text))
        text->len = 0;
}

void cq_create_check(cq_create *create, uint32_t payload_bytes_max)
{
    create->command = cq_trim(create->command);
    create->key = cq_trim(create->key);
    if (create->payload.len == 0)
        create->payload = LITERAL("null");
    bound_trace(&create->trace_parent);
    bound_trace(&create->trace_state);
    if (create->code == CQ_OK)
        create->code = (uint8_t)create_fault(create, payload_bytes_max);
}

/* Returns what is wrong with the result, CQ_OK when nothing is; the order is the contract's. */
static cq_code finish_fault(cq_finish *finish, uint32_t result_bytes_max)
{
    finish->completed = equals(finish->status, LITERAL("COMPLETED"));
    if (!finish->completed && !equals(finish->status, LITERAL("FAILED")))
        return CQ_STATUS_INVALID;
    if (finish->result.len > result_bytes_max)
        return CQ_RESULT_TOO_LARGE;
    if (finish->result.len > 0 && !cq_json_valid(finish->result))
        return CQ_RESULT_JSON_INVALID;
    if (!finish->completed && finish->error.len == 0)
        return CQ_ERROR_REQUIRED;
    if (finish->worker.len > CQ_WORKER_BYTES_MAX || !cq_utf8_valid(finish->worker))
        return CQ_WORKER_ID_INVALID;
    if (!cq_id_parse(finish->task_id, finish->id))
        return CQ_TASK_NOT_FOUND;
    return CQ_OK;
}

void cq_finish_check(cq_finish *finish, uint32_t result_bytes_max, bool lenient_error)
{
    if (cq_trim(finish->error).len == 0)
        finish->error = (cq_bytes){NULL, 0};
    if (finish->error.len == 0 && lenient_error && equals(finish->status, LITERAL("FAILED")))
        finish->error = LITERAL("unspecified failure");
    finish->error = cq_utf8_cut(finish->error, CQ_TEXT_BYTES_MAX);
    if (finish->has_result && finish->result.len == 0)
        finish->result = LITERAL("null");
    if (finish->code == CQ_OK)
        finish->code = (uint8_t)finish_fault(finish, result_bytes_max);
}
