/* harness.c: the C core fed with any bytes, built by build.py with the sanitizers.
 *
 * CODEQ_FUZZ_TARGET names what the bytes are. Without LIBFUZZER each argument is a file that is read
 * once. With it the arguments are libFuzzer's, and the core is compiled with
 * -fsanitize-coverage=trace-pc,trace-cmp: gcc then calls one function per edge, libFuzzer wants
 * counters, so the linker puts the function below in its place; this file is compiled without. */
#include <string.h>

#include "codeq.h"

#define PAYLOAD_MAX 4128768
#define NOW_MS INT64_C(1700000000000)
#define LOADED_TASKS 600 /* three buckets, the last one open */
#define LOADED_CHUNKS_MAX 8

/* --- stream messages -------------------------------------------------------------------------- */

typedef struct event_kind {
    cq_stream stream;
    size_t record_bytes[16]; /* by member; 0 = not written again */
    uint32_t lists;          /* bit per member that is a batch */
} event_kind;

/* What was read is written, read again and written again: the bytes must be the same. */
static cq_bytes written(const event_kind *kind, const cq_event *event, size_t *sizes)
{
    size_t bytes = kind->record_bytes[event->member], len = 0;
    for (uint32_t i = 0; i < event->count; i++)
        sizes[i] = cq_record_size(kind->stream, event->member,
                                  (const uint8_t *)event->records + i * bytes);
    if (kind->lists >> event->member & 1)
        CQ_ASSERT(cq_event_fit(sizes, event->count, SIZE_MAX, &len) == event->count);
    else
        len = cq_event_size(sizes[0]);
    uint8_t *to = malloc(len);
    cq_event_put(kind->stream, event->member, event->records, sizes, event->count, to);
    return (cq_bytes){to, (uint32_t)len};
}

static void round_trip(const event_kind *kind, const cq_event *event)
{
    if (event->count == 0 || kind->record_bytes[event->member] == 0)
        return;
    size_t *sizes = calloc(event->count, sizeof *sizes);
    cq_bytes first = written(kind, event, sizes);
    cq_event again;
    CQ_ASSERT(cq_event_decode(kind->stream, first, &again) == CQ_DONE);
    CQ_ASSERT(again.member == event->member && again.count == event->count);
    cq_bytes second = written(kind, &again, sizes);
    CQ_ASSERT(cq_bytes_equal(first, second));
    cq_event_free(kind->stream, &again);
    free((void *)first.ptr);
    free((void *)second.ptr);
    free(sizes);
}

static void read_event(const event_kind *kind, cq_bytes message)
{
    cq_event event;
    if (cq_event_decode(kind->stream, message, &event) != CQ_DONE)
        return;
    round_trip(kind, &event);
    for (uint32_t i = 0; i < event.count; i++) {
        if (kind->stream == CQ_PRODUCER_EVENT && event.member >= 2)
            cq_create_check((cq_create *)event.records + i, PAYLOAD_MAX);
        if (kind->stream == CQ_WORKER_EVENT && (event.member == 3 || event.member == 7))
            cq_finish_check((cq_finish *)event.records + i, PAYLOAD_MAX, i % 2 == 0);
    }
    cq_event_free(kind->stream, &event);
}

static void producer_event(cq_bytes bytes)
{
    const event_kind kind = {
        CQ_PRODUCER_EVENT,
        {[1] = sizeof(cq_call), [2] = sizeof(cq_create), [3] = sizeof(cq_create)},
        1 << 3};
    read_event(&kind, bytes);
}

static void producer_server_event(cq_bytes bytes)
{
    const event_kind kind = {
        CQ_PRODUCER_SERVER_EVENT,
        {[1] = sizeof(cq_call), [2] = sizeof(cq_ack), [3] = sizeof(cq_call), [4] = sizeof(cq_ack)},
        1 << 4};
    read_event(&kind, bytes);
}

static void worker_event(cq_bytes bytes)
{
    const event_kind kind = {CQ_WORKER_EVENT,
                             {[1] = sizeof(cq_call),
                              [2] = sizeof(cq_call),
                              [3] = sizeof(cq_finish),
                              [4] = sizeof(cq_call),
                              [5] = sizeof(cq_call),
                              [6] = sizeof(cq_call),
                              [7] = sizeof(cq_finish)},
                             1 << 7};
    read_event(&kind, bytes);
}

static void worker_server_event(cq_bytes bytes)
{
    const event_kind kind = {CQ_WORKER_SERVER_EVENT,
                             {[1] = sizeof(cq_call),
                              [3] = sizeof(cq_ack),
                              [4] = sizeof(cq_ack),
                              [5] = sizeof(cq_ack),
                              [6] = sizeof(cq_ack),
                              [7] = sizeof(cq_call),
                              [8] = sizeof(cq_task),
                              [9] = sizeof(cq_ack)},
                             1 << 8 | 1 << 9};
    read_event(&kind, bytes);
}

/* --- texts ------------------------------------------------------------------------------------ */

static void text(cq_bytes bytes)
{
    uint8_t id[CQ_ID_BYTES];
    bool utf8 = cq_utf8_valid(bytes);
    CQ_ASSERT(!cq_json_valid(bytes) || utf8);
    if (cq_id_parse(bytes, id)) {
        uint8_t canonical[CQ_ID_TEXT_BYTES];
        cq_id_format(id, canonical);
        CQ_ASSERT(cq_bytes_equal((cq_bytes){canonical, sizeof canonical}, bytes));
    }
    if (!utf8)
        return;
    cq_has_control(bytes);
    CQ_ASSERT(cq_utf8_valid(cq_trim(bytes)));
    for (uint32_t len = 0; len <= bytes.len && len < 8; len++)
        CQ_ASSERT(cq_utf8_valid(cq_utf8_cut(bytes, len)));
}

/* --- the log ---------------------------------------------------------------------------------- */

/* The bytes of a chunk with these records; the checksum is right. */
static cq_bytes framed(cq_bytes records)
{
    uint8_t *chunk = malloc(CQ_CHUNK_FRAME + records.len);
    chunk[0] = CQ_CHUNK_VERSION;
    cq_put_le(chunk + 1, cq_crc32c(records.ptr, records.len), 4);
    if (records.len > 0)
        memcpy(chunk + CQ_CHUNK_FRAME, records.ptr, records.len);
    return (cq_bytes){chunk, CQ_CHUNK_FRAME + records.len};
}

static void assign(const cq_record *record, const cq_body *body)
{
    cq_splice splice;
    cq_piece piece = {record->id, body->head, body->tail, body->created_ms, body->priority};
    if (cq_splice_make(&splice, body->command, record->due_ms, body->created_ms) != CQ_DONE)
        return;
    uint8_t *to = malloc(cq_assignment_size(&splice, &piece, 1));
    cq_assignment_put(to, &splice, &piece, 1, true);
    free(to);
    free(splice.data);
}

/* A reader's way through one chunk. */
static void chunk(cq_bytes bytes)
{
    cq_bytes whole = framed(bytes), rest;
    cq_record record = {0}, found;
    cq_chunk_open(bytes, &rest); /* as it came: the checksum is hardly ever right */
    CQ_ASSERT(cq_chunk_open(whole, &rest) == CQ_DONE);
    while (cq_record_next(&rest, &record) == CQ_DONE) {
        cq_body body;
        bool stored = record.kind == CQ_RECORD_CREATED || record.kind == CQ_RECORD_CARRIED;
        if (stored && cq_body_read(record.stored, record.flags, &body) == CQ_DONE)
            assign(&record, &body);
        cq_record_find(whole, record.number, record.number % 2 == 0, &found);
    }
    free((void *)whole.ptr);
}

static void put_head(uint8_t head[CQ_HEAD_BYTES], uint64_t chunk_count)
{
    uint8_t *to = cq_put_le(cq_put_le(head, CQ_FORMAT, 4), 1, 4);
    to = cq_put_le(cq_put_le(to, LOADED_TASKS, 8), (uint64_t)NOW_MS, 8);
    to = cq_put_le(cq_put_le(to, 1 + chunk_count, 8), 1, 8);
    to = cq_put_le(to, 1, 8);
    cq_put_le(to, cq_crc32c(head, CQ_HEAD_BYTES - 4), 4);
}

/* Chunks stand behind the two bytes of their lengths. */
static uint64_t split(cq_bytes bytes, cq_bytes chunks[LOADED_CHUNKS_MAX])
{
    uint64_t count = 0;
    while (bytes.len >= 2 && count < LOADED_CHUNKS_MAX) {
        uint32_t len = (uint32_t)cq_get_le(bytes.ptr, 2);
        len = len > bytes.len - 2 ? bytes.len - 2 : len;
        chunks[count++] = framed((cq_bytes){bytes.ptr + 2, len});
        bytes = (cq_bytes){bytes.ptr + 2 + len, bytes.len - 2 - len};
    }
    return count;
}

/* A log that was accepted makes an engine that keeps its own rules. */
static void live_on(cq_engine *engine)
{
    int64_t moved;
    cq_want want = {.tenant = {(const uint8_t *)"acme", 4},
                    .worker = {(const uint8_t *)"w1", 2},
                    .count_max = 10,
                    .lease_ms = 1000,
                    .now_ms = NOW_MS + 1,
                    .bytes_max = 1 << 20};
    cq_claim claim = {0};
    cq_engine_verify(engine);
    if (cq_task_claim(engine, &want, &claim) == CQ_DONE)
        cq_claim_delivered(engine, &claim);
    cq_claim_free(engine, &claim);
    for (int64_t now_ms = NOW_MS + 2; now_ms < NOW_MS + 90000000; now_ms += 30000000) {
        cq_task_tick(engine, now_ms, 1000, &moved);
        cq_engine_verify(engine);
        if (cq_log_close(engine) == CQ_DONE)
            cq_log_taken(engine);
    }
    cq_engine_verify(engine);
}

/* A start's way through a log of a few chunks. */
static void load(cq_bytes bytes)
{
    const cq_settings settings = {.seed = 1,
                                  .shard_count = 1,
                                  .payload_memory_bytes = 200,
                                  .retention_ms = 60000,
                                  .dead_retention_ms = 60000,
                                  .key_window_ms = 60000,
                                  .max_attempts_default = 5,
                                  .backoff = CQ_BACKOFF_FIXED,
                                  .backoff_base_ms = 1000,
                                  .backoff_max_ms = 1000,
                                  .command_labels_max = 10,
                                  .straggler_slack_bytes = 0};
    cq_bytes chunks[LOADED_CHUNKS_MAX];
    uint64_t count = split(bytes, chunks);
    uint8_t head[CQ_HEAD_BYTES];
    uint32_t shard_count;
    cq_engine *engine = cq_engine_new(&settings);
    put_head(head, count);
    cq_status status = cq_load_head(engine, (cq_bytes){head, sizeof head}, &shard_count);
    for (uint64_t i = 0; i < count; i++) {
        if (status == CQ_DONE)
            status = cq_load_chunk(engine, 1 + i, chunks[i]);
        free((void *)chunks[i].ptr);
    }
    if (status == CQ_DONE && cq_load_done(engine, NOW_MS, 0) == CQ_DONE)
        live_on(engine);
    cq_engine_free(engine);
}

/* Head, segment and directory entries, with the right checksum behind them. */
static void entry(cq_bytes bytes)
{
    uint64_t created, ended;
    cq_engine *engine = cq_engine_new(&(cq_settings){.shard_count = 1});
    uint8_t *value = malloc((size_t)bytes.len + 4);
    if (bytes.len > 0)
        memcpy(value, bytes.ptr, bytes.len);
    cq_put_le(value + bytes.len, cq_crc32c(value, bytes.len), 4);
    cq_bytes whole = {value, bytes.len + 4};
    cq_directory_read(whole, true, bytes.len, &created, &ended);
    cq_directory_read(whole, false, bytes.len, &created, &ended);
    cq_load_segment(engine, bytes, whole);
    free(value);
    cq_engine_free(engine);
}

/* --- which ------------------------------------------------------------------------------------ */

static const struct {
    const char *name;
    void (*read)(cq_bytes bytes);
} TARGETS[] = {
    {"producer", producer_event},
    {"producer_server", producer_server_event},
    {"worker", worker_event},
    {"worker_server", worker_server_event},
    {"text", text},
    {"chunk", chunk},
    {"load", load},
    {"entry", entry},
};

static void (*target)(cq_bytes bytes);

static bool choose(const char *name)
{
    for (size_t i = 0; name != NULL && i < sizeof TARGETS / sizeof *TARGETS; i++) {
        if (strcmp(TARGETS[i].name, name) == 0)
            target = TARGETS[i].read;
    }
    return target != NULL;
}

#ifdef LIBFUZZER
#define COUNTERS (1U << 16) /* edges share one where their addresses have the same hash */

extern void __sanitizer_cov_8bit_counters_init(uint8_t *start, uint8_t *stop);
extern void __sanitizer_cov_pcs_init(const uintptr_t *start, const uintptr_t *stop);
extern int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*one)(const uint8_t *, size_t));
void __wrap___sanitizer_cov_trace_pc(void);

static uint8_t counters[COUNTERS];
static uintptr_t edges[COUNTERS][2]; /* an address that tells it apart, flags */

void __wrap___sanitizer_cov_trace_pc(void)
{
    uint64_t from = (uintptr_t)__builtin_return_address(0);
    counters[from * UINT64_C(0x9E3779B97F4A7C15) >> 48]++;
}

static int read_one(const uint8_t *data, size_t size)
{
    target((cq_bytes){data, (uint32_t)size});
    return 0;
}

static int run(int argc, char **argv)
{
    for (uintptr_t i = 0; i < COUNTERS; i++)
        edges[i][0] = i + 1;
    __sanitizer_cov_8bit_counters_init(counters, counters + COUNTERS);
    __sanitizer_cov_pcs_init(edges[0], edges[COUNTERS]);
    return LLVMFuzzerRunDriver(&argc, &argv, read_one);
}
#else
static int run(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (file == NULL || fseek(file, 0, SEEK_END) != 0)
            return 2;
        size_t size = (size_t)ftell(file);
        uint8_t *data = malloc(size == 0 ? 1 : size); /* exactly: the sanitizer sees a byte more */
        rewind(file);
        if (fread(data, 1, size, file) != size)
            return 2;
        fclose(file);
        fprintf(stderr, "%s\n", argv[i]);
        target((cq_bytes){data, (uint32_t)size});
        free(data);
    }
    return 0;
}
#endif

int main(int argc, char **argv)
{
    if (choose(getenv("CODEQ_FUZZ_TARGET")))
        return run(argc, argv);
    fprintf(stderr, "CODEQ_FUZZ_TARGET names no target\n");
    return 2;
}
