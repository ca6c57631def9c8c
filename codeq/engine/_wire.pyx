"""Stream messages in, acknowledgements and batches out: csrc/wire.c and csrc/text.c for Python.

Batches stay C arrays that point into the messages they came from; a Python object is made only for
what somebody asks for.
"""

cimport cython
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset


class WireError(ValueError):
    """The bytes are not the message they should be: cut short, a bad tag, length or UTF-8 text."""


# The kinds of events; a decoder answers (kind, content).
(
    UNKNOWN, HELLO, CREATE, CREATE_BATCH, READY, RESULT, RESULT_BATCH, NACK, HEARTBEAT, ABANDON,
    HELLO_ACK, CREATE_ACKS, ERROR, TASKS, RESULT_ACKS, HEARTBEAT_ACK, NACK_ACK, ABANDON_ACK,
) = range(18)

CODES = {
    "OK": CQ_OK, "COMMAND_REQUIRED": CQ_COMMAND_REQUIRED, "PAYLOAD_TOO_LARGE": CQ_PAYLOAD_TOO_LARGE,
    "WORKER_ID_INVALID": CQ_WORKER_ID_INVALID, "RESULT_JSON_INVALID": CQ_RESULT_JSON_INVALID,
    "COMMAND_INVALID": CQ_COMMAND_INVALID, "WEBHOOK_INVALID": CQ_WEBHOOK_INVALID, "ENDED": CQ_ENDED,
    "PRIORITY_NO_TIER": CQ_PRIORITY_NO_TIER, "PRIORITY_INVALID": CQ_PRIORITY_INVALID,
    "NOT_IN_PROGRESS": CQ_NOT_IN_PROGRESS, "RUN_AT_INVALID": CQ_RUN_AT_INVALID, "ABSENT": CQ_ABSENT,
    "TASK_NOT_FOUND": CQ_TASK_NOT_FOUND, "STATUS_INVALID": CQ_STATUS_INVALID,
    "DELAY_INVALID": CQ_DELAY_INVALID, "ERROR_REQUIRED": CQ_ERROR_REQUIRED,
    "BODY_INVALID": CQ_BODY_INVALID, "KEY_INVALID": CQ_KEY_INVALID, "KEY_CONFLICT": CQ_KEY_CONFLICT,
    "NOT_FOUND": CQ_NOT_FOUND, "UNAVAILABLE": CQ_UNAVAILABLE, "NOT_PENDING": CQ_NOT_PENDING,
    "RESULT_TOO_LARGE": CQ_RESULT_TOO_LARGE, "ARTIFACT_INVALID": CQ_ARTIFACT_INVALID,
    "NOT_OWNER": CQ_NOT_OWNER,
}


# --- texts ----------------------------------------------------------------------------------------

def parse_id(text):
    cdef uint8_t id[16]
    if isinstance(text, str):
        text = text.encode(errors="replace")
    if not cq_id_parse(bytes_of(text), id):
        return None
    return PyBytes_FromStringAndSize(<const char *>id, CQ_ID_BYTES)


def format_id(bytes task_id not None):
    if len(task_id) != CQ_ID_BYTES:
        raise ValueError("an id has 16 bytes")
    return id_text(<const uint8_t *>PyBytes_AS_STRING(task_id))


def json_valid(bytes text not None):
    return cq_json_valid(bytes_of(text))


# --- refusal texts --------------------------------------------------------------------------------

cdef cq_bytes messages_by_number[256]
cdef list message_texts = []  # keeps them alive


def set_messages(messages):
    cdef uint8_t number
    texts = {number: text.encode() for number, text in messages.items()}
    memset(messages_by_number, 0, sizeof(messages_by_number))
    for number, text in texts.items():
        messages_by_number[number] = bytes_of(text)
    message_texts[:] = texts.values()


cdef cq_bytes refusal_text(uint8_t number) noexcept:
    """A number without a text is a bug, of which a client learns no more than that."""
    if messages_by_number[number].len > 0:
        return messages_by_number[number]
    return bytes_of(b"internal")


# --- batches --------------------------------------------------------------------------------------

cdef class _Batch:
    """What both kinds of batches have: room that grows, and the bytes their items point into."""

    def __cinit__(self):
        self.keep = []

    def __len__(self):
        return self.count

    cdef cq_bytes borrow(self, bytes text) except *:
        cdef cq_bytes out = bytes_of(text)
        if out.len > 0:
            self.keep.append(text)
            self.kept_bytes += out.len
        return out

    cdef void *grown(self, void *items, size_t item_bytes) except NULL:
        """The items with room for at least one more."""
        cdef Py_ssize_t room = 2 * self.capacity if self.capacity > 0 else 8
        cdef void *moved = realloc(items, room * item_bytes)
        if moved == NULL:
            raise MemoryError()
        self.capacity = room
        return moved

    cdef void *adopt(self, cq_event *event, bytes message):
        """Takes over the records of a decoded event, and answers them."""
        cdef void *records = event.records
        self.keep.append(message)
        self.kept_bytes = len(message)
        self.count = event.count
        self.capacity = event.cap
        event.records = NULL
        return records


@cython.final
cdef class Creates(_Batch):
    """A batch of creates: decoded from a stream message, or filled by ``add``."""

    def __dealloc__(self):
        free(self.items)

    cdef Py_ssize_t append(self, const cq_create *item) except -1:
        if self.count == self.capacity:
            self.items = <cq_create *>self.grown(self.items, sizeof(cq_create))
        self.items[self.count] = item[0]
        self.count += 1
        return self.count - 1

    cdef cq_create *at(self, Py_ssize_t index) except NULL:
        if index < 0 or index >= self.count:
            raise IndexError(f"no item {index} in a batch of {self.count}")
        return &self.items[index]

    cdef const cq_create *origin(self, Py_ssize_t index) except NULL:
        """The item whose id and code this one has: the earlier one it repeats, or itself."""
        cdef const cq_create *item = self.at(index)
        while item.same_as >= 0:
            item = &self.items[item.same_as]
        return item

    def add(
        self,
        bytes command not None,
        bytes payload not None,
        *,
        int32_t priority=0,
        bytes webhook not None=b"",
        int32_t max_attempts=0,
        bytes key not None=b"",
        run_at_ms=None,
        int32_t delay_seconds=0,
        bytes trace_parent not None=b"",
        bytes trace_state not None=b"",
        uint64_t seq=0,
    ):
        cdef cq_create item
        memset(&item, 0, sizeof(item))
        item.same_as = -1
        item.seq = seq
        item.run_at_ms = CQ_NEVER if run_at_ms is None else run_at_ms
        item.priority = priority
        item.max_attempts = max_attempts
        item.delay_seconds = delay_seconds
        item.command = self.borrow(command)
        item.payload = self.borrow(payload)
        item.webhook = self.borrow(webhook)
        item.key = self.borrow(key)
        item.trace_parent = self.borrow(trace_parent)
        item.trace_state = self.borrow(trace_state)
        return self.append(&item)

    def add_refused(self, uint8_t number):
        cdef Py_ssize_t index = self.add(b"", b"")
        self.items[index].code = number
        return index

    def check(self, uint32_t payload_bytes_max):
        cdef Py_ssize_t i
        for i in range(self.count):
            cq_create_check(&self.items[i], payload_bytes_max)

    def refuse(self, Py_ssize_t index, uint8_t number):
        self.at(index).code = number

    def trace(self, bytes parent not None):
        cdef list own = []
        cdef cq_create *item
        cdef Py_ssize_t i
        for i in range(self.count):
            item = &self.items[i]
            if item.trace_parent.len > 0:
                own.append((copy_of(item.trace_parent), copy_of(item.trace_state)))
            else:
                item.trace_parent = self.borrow(parent)
        return own

    def replay(self, Py_ssize_t index, bytes task_id not None):
        cdef cq_create *item = self.at(index)
        if len(task_id) != CQ_ID_BYTES:
            raise ValueError("an id has 16 bytes")
        memcpy(item.id, PyBytes_AS_STRING(task_id), CQ_ID_BYTES)
        item.replayed = 1

    def alias(self, Py_ssize_t index, int32_t earlier):
        cdef cq_create *item = self.at(index)
        if not 0 <= earlier < index:
            raise IndexError(f"item {earlier} is not earlier than item {index}")
        item.same_as = earlier

    @property
    def codes(self):
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.count)
        cdef Py_ssize_t i
        for i in range(self.count):
            PyBytes_AS_STRING(out)[i] = <char>self.origin(i).code
        return out

    @property
    def payload_bytes(self):
        return self.kept_bytes + self.count * <Py_ssize_t>sizeof(cq_create)

    def keyed(self):
        return [
            (i, copy_of(self.items[i].key), request_of(&self.items[i]))
            for i in range(self.count)
            if self.items[i].code == CQ_OK and self.items[i].key.len > 0
        ]

    def webhooks(self):
        return [
            (i, str_of(self.items[i].webhook))
            for i in range(self.count)
            if self.items[i].code == CQ_OK and self.items[i].webhook.len > 0
        ]

    def task_id(self, Py_ssize_t index):
        return id_text(self.origin(index).id)

    def id_bytes(self, Py_ssize_t index):
        return PyBytes_FromStringAndSize(<const char *>self.origin(index).id, CQ_ID_BYTES)

    def accepted_ids(self):
        return [None if code else self.id_bytes(i) for i, code in enumerate(self.codes)]

    def replayed(self, Py_ssize_t index):
        cdef const cq_create *item = self.at(index)
        return item.same_as >= 0 or item.replayed != 0


cdef bytes request_of(const cq_create *item):
    """All that makes two requests the same: a fixed head with the lengths, then the texts."""
    cdef int64_t head[6]
    head[:] = [
        item.priority, max(item.max_attempts, 0), item.run_at_ms, item.delay_seconds,
        item.command.len, item.webhook.len,
    ]
    return b"".join((
        PyBytes_FromStringAndSize(<const char *>head, sizeof(head)),
        copy_of(item.command),
        copy_of(item.webhook),
        copy_of(item.payload),
    ))


@cython.final
cdef class Finishes(_Batch):
    """A batch of results: decoded from a stream message, or filled by ``add``."""

    def __dealloc__(self):
        free(self.items)

    cdef Py_ssize_t append(self, const cq_finish *item) except -1:
        if self.count == self.capacity:
            self.items = <cq_finish *>self.grown(self.items, sizeof(cq_finish))
        self.items[self.count] = item[0]
        self.count += 1
        return self.count - 1

    cdef cq_finish *at(self, Py_ssize_t index) except NULL:
        if index < 0 or index >= self.count:
            raise IndexError(f"no item {index} in a batch of {self.count}")
        return &self.items[index]

    def add(
        self,
        bytes task_id not None,
        bytes status not None,
        *,
        bytes result=None,
        bytes error not None=b"",
        bytes artifacts not None=b"",
        bytes worker not None=b"",
    ):
        cdef cq_finish item
        memset(&item, 0, sizeof(item))
        item.task_id = self.borrow(task_id)
        item.status = self.borrow(status)
        if result is not None:
            item.has_result = 1
            item.result = self.borrow(result)
        item.error = self.borrow(error)
        item.artifacts = self.borrow(artifacts)
        item.worker = self.borrow(worker)
        return self.append(&item)

    def add_refused(self, bytes task_id not None, uint8_t number):
        cdef Py_ssize_t index = self.add(task_id, b"")
        self.items[index].code = number
        return index

    def check(self, uint32_t result_bytes_max, *, bint lenient_error):
        cdef Py_ssize_t i
        for i in range(self.count):
            cq_finish_check(&self.items[i], result_bytes_max, lenient_error)

    def refuse(self, Py_ssize_t index, uint8_t number):
        self.at(index).code = number

    def accept(self, Py_ssize_t index, int64_t completed_ms, bytes artifacts not None):
        cdef cq_finish *item = self.at(index)
        item.code = CQ_OK
        item.completed_ms = completed_ms
        item.artifacts = self.borrow(artifacts)

    @property
    def codes(self):
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.count)
        cdef Py_ssize_t i
        for i in range(self.count):
            PyBytes_AS_STRING(out)[i] = <char>self.items[i].code
        return out

    @property
    def payload_bytes(self):
        return self.kept_bytes + self.count * <Py_ssize_t>sizeof(cq_finish)

    def task_id(self, Py_ssize_t index):
        return str_of(self.at(index).task_id)

    def id_bytes(self, Py_ssize_t index):
        return PyBytes_FromStringAndSize(<const char *>self.at(index).id, CQ_ID_BYTES)

    def completed_ms(self, Py_ssize_t index):
        return self.at(index).completed_ms

    def item(self, Py_ssize_t index):
        cdef const cq_finish *item = self.at(index)
        return (
            str_of(item.status), copy_of(item.result) if item.has_result else None,
            str_of(item.error), copy_of(item.artifacts), copy_of(item.worker),
        )


# --- tasks as a worker receives them --------------------------------------------------------------

@cython.final
cdef class Tasks:
    """The tasks of one assignment message, borrowed from its bytes; fields are made when asked."""

    def __dealloc__(self):
        free(self.items)

    def __len__(self):
        return self.count

    def __getitem__(self, Py_ssize_t index):
        cdef ClientTask task = ClientTask()
        if index < 0:
            index += self.count
        if index < 0 or index >= self.count:
            raise IndexError("no such task in this assignment")
        task.bind(self, index)
        return task


cdef cq_task no_task  # what a ClientTask that no message brought points at


@cython.no_gc  # holds a message, which holds nothing
cdef class ClientTask:
    """One task of an assignment message."""

    def __cinit__(self):
        self.task = &no_task

    cdef void bind(self, Tasks tasks, Py_ssize_t index) noexcept:
        self.tasks = tasks
        self.task = &tasks.items[index]
        self.priority = self.task.priority
        self.attempts = self.task.attempts
        self.max_attempts = self.task.max_attempts
        self.created_ms = self.task.created_ms
        self.updated_ms = self.task.updated_ms

    @property
    def id(self):
        return str_of(self.task.id)

    @property
    def command(self):
        return str_of(self.task.command)

    @property
    def payload(self):
        return copy_of(self.task.payload)

    @property
    def webhook(self):
        return str_of(self.task.webhook)

    @property
    def status(self):
        return str_of(self.task.status)

    @property
    def worker_id(self):
        return str_of(self.task.worker)

    @property
    def lease_until(self):
        return str_of(self.task.lease_until)

    @property
    def tenant_id(self):
        return str_of(self.task.tenant)


# --- decoding -------------------------------------------------------------------------------------

cdef int decode(cq_stream stream, bytes message, cq_event *event) except -1:
    """The caller frees the event, whatever it has taken out of it."""
    cdef cq_status status = CQ_MALFORMED
    if PyBytes_GET_SIZE(message) <= INT32_MAX:
        status = cq_event_decode(stream, bytes_of(message), event)
    if status == CQ_NO_MEMORY:
        raise MemoryError()
    if status == CQ_FULL:
        raise WireError(f"a message has at most {CQ_WIRE_ITEMS_MAX} items")
    if status != CQ_DONE:
        raise WireError("malformed message")
    return 0


cdef Creates creates_of(cq_event *event, bytes message):
    cdef Creates creates = Creates()
    creates.items = <cq_create *>creates.adopt(event, message)
    return creates


cdef Finishes finishes_of(cq_event *event, bytes message):
    cdef Finishes finishes = Finishes()
    finishes.items = <cq_finish *>finishes.adopt(event, message)
    return finishes


cdef Tasks tasks_of(cq_event *event, bytes message):
    cdef Tasks tasks = Tasks()
    tasks.message = message
    tasks.items = <cq_task *>event.records
    tasks.count = event.count
    event.records = NULL
    return tasks


def decode_producer_event(bytes message not None):
    cdef cq_event event
    decode(CQ_PRODUCER_EVENT, message, &event)
    try:
        if event.member == PRODUCER_HELLO:
            return HELLO, str_of((<cq_call *>event.records).text[0])
        if event.member == PRODUCER_CREATE:
            return CREATE, creates_of(&event, message)
        if event.member == PRODUCER_CREATE_BATCH:
            return CREATE_BATCH, creates_of(&event, message)
        return UNKNOWN, None
    finally:
        cq_event_free(CQ_PRODUCER_EVENT, &event)


def decode_worker_event(bytes message not None):
    cdef cq_event event
    decode(CQ_WORKER_EVENT, message, &event)
    try:
        if event.member == WORKER_RESULT:
            return RESULT, finishes_of(&event, message)
        if event.member == WORKER_RESULT_BATCH:
            return RESULT_BATCH, finishes_of(&event, message)
        if event.member == 0:
            return UNKNOWN, None
        return worker_call(event.member, <cq_call *>event.records)
    finally:
        cq_event_free(CQ_WORKER_EVENT, &event)


cdef tuple worker_call(uint32_t member, const cq_call *call):
    if member == WORKER_READY:
        commands = tuple([copy_of(call.commands.items[i]) for i in range(call.commands.count)])
        return READY, (commands, call.number[0], call.number[1])
    text = str_of(call.text[0])
    if member == WORKER_HELLO:
        return HELLO, (text, str_of(call.text[1]))
    if member == WORKER_NACK:
        return NACK, (text, call.number[0], str_of(call.text[1]))
    if member == WORKER_HEARTBEAT:
        return HEARTBEAT, (text, call.number[0])
    return ABANDON, text


def decode_producer_server_event(bytes message not None):
    cdef cq_event event
    decode(CQ_PRODUCER_SERVER_EVENT, message, &event)
    try:
        if event.member == 0:
            return UNKNOWN, None
        if event.member == PRODUCER_CREATE_ACK or event.member == PRODUCER_CREATE_ACK_BATCH:
            return CREATE_ACKS, create_acks(<const cq_ack *>event.records, event.count)
        kind = ERROR if event.member == PRODUCER_ERROR else HELLO_ACK
        call = <const cq_call *>event.records
        return kind, (str_of(call.text[0]), str_of(call.text[1]))
    finally:
        cq_event_free(CQ_PRODUCER_SERVER_EVENT, &event)


cdef list create_acks(const cq_ack *acks, Py_ssize_t count):
    cdef Py_ssize_t i
    return [
        (acks[i].seq, acks[i].ok != 0, str_of(acks[i].task_id), str_of(acks[i].error))
        for i in range(count)
    ]


cdef tuple task_ack(const cq_ack *ack):
    return str_of(ack.task_id), ack.ok != 0, str_of(ack.error)


def decode_worker_server_event(bytes message not None):
    cdef cq_event event
    cdef Py_ssize_t i
    cdef uint32_t member
    decode(CQ_WORKER_SERVER_EVENT, message, &event)
    try:
        member = event.member
        if member == WORKER_TASK or member == WORKER_TASK_BATCH:
            return TASKS, tasks_of(&event, message)
        if member == WORKER_RESULT_ACK or member == WORKER_RESULT_ACK_BATCH:
            acks = <const cq_ack *>event.records
            return RESULT_ACKS, [task_ack(&acks[i]) for i in range(event.count)]
        if member == WORKER_HEARTBEAT_ACK:
            return HEARTBEAT_ACK, task_ack(<const cq_ack *>event.records)
        if member == WORKER_ABANDON_ACK:
            return ABANDON_ACK, task_ack(<const cq_ack *>event.records)
        if member == WORKER_NACK_ACK:
            ack = <const cq_ack *>event.records
            return NACK_ACK, (*task_ack(ack), ack.delay_seconds, ack.dead != 0)
        if member == 0:
            return UNKNOWN, None
        call = <const cq_call *>event.records
        if member == WORKER_ERROR:
            return ERROR, (str_of(call.text[1]), str_of(call.text[0]))
        return HELLO_ACK, (str_of(call.text[0]), str_of(call.text[1]))
    finally:
        cq_event_free(CQ_WORKER_SERVER_EVENT, &event)


# --- encoding -------------------------------------------------------------------------------------

cdef bytes event_bytes(
    cq_stream stream, uint32_t member, const void *records, const size_t *sizes, size_t count,
    size_t len,
):
    cdef bytes out = PyBytes_FromStringAndSize(NULL, len)
    cq_event_put(stream, member, records, sizes, count, <uint8_t *>PyBytes_AS_STRING(out))
    return out


cdef bytes encode_one(cq_stream stream, uint32_t member, const void *record):
    cdef size_t size = cq_record_size(stream, member, record)
    return event_bytes(stream, member, record, &size, 1, cq_event_size(size))


cdef list encode_many(
    cq_stream stream, uint32_t single, uint32_t batch, const void *records, size_t record_bytes,
    size_t count, Py_ssize_t bytes_max,
):
    """An event of the single form when there is one record, else as many batches as are needed."""
    cdef const char *at = <const char *>records
    cdef list out = []
    cdef size_t i, fit, len
    cdef size_t first = 0
    cdef size_t *sizes
    if count == 1:
        return [encode_one(stream, single, records)]
    sizes = <size_t *>malloc(count * sizeof(size_t) + 1)
    if sizes == NULL:
        raise MemoryError()
    try:
        for i in range(count):
            sizes[i] = cq_record_size(stream, batch, at + i * record_bytes)
        while first < count:
            fit = cq_event_fit(sizes + first, count - first, max(bytes_max, 0), &len)
            out.append(
                event_bytes(stream, batch, at + first * record_bytes, sizes + first, fit, len)
            )
            first += fit
    finally:
        free(sizes)
    return out


@cython.final
cdef class _Acks:
    """Acknowledgements about to be encoded, and the texts they need that nobody else keeps."""

    cdef cq_ack *items
    cdef uint8_t *ids  # room for the text of one id each
    cdef Py_ssize_t count
    cdef list keep

    def __cinit__(self, Py_ssize_t room):
        self.keep = []
        self.items = <cq_ack *>calloc(room + 1, sizeof(cq_ack))
        self.ids = <uint8_t *>malloc(room * CQ_ID_TEXT_BYTES + 1)
        if self.items == NULL or self.ids == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.items)
        free(self.ids)

    cdef int add_created(self, const cq_create *item, uint64_t seq) except -1:
        cdef cq_ack *ack = &self.items[self.count]
        cdef uint8_t *id = self.ids + self.count * CQ_ID_TEXT_BYTES
        ack.seq = seq
        ack.ok = item.code == CQ_OK
        if ack.ok:
            cq_id_format(item.id, id)
            ack.task_id.ptr = id
            ack.task_id.len = CQ_ID_TEXT_BYTES
        else:
            ack.error = refusal_text(item.code)
        self.count += 1
        return 0

    cdef int add_finished(self, const cq_finish *item) except -1:
        cdef cq_ack *ack = &self.items[self.count]
        ack.ok = item.code == CQ_OK
        ack.task_id = cq_utf8_cut(item.task_id, CQ_TEXT_BYTES_MAX)
        if item.code == CQ_STATUS_INVALID:
            status = copy_of(cq_utf8_cut(item.status, CQ_TEXT_BYTES_MAX))
            text = b'%b (must be COMPLETED or FAILED): "%b"' % (
                copy_of(refusal_text(item.code)), status
            )
            ack.error = bytes_of(text)
            self.keep.append(text)
        elif not ack.ok:
            ack.error = refusal_text(item.code)
        self.count += 1
        return 0


def encode_create_acks(batches, Py_ssize_t bytes_max):
    cdef Creates batch
    cdef Py_ssize_t i
    cdef tuple fixed = tuple(batches)
    cdef _Acks acks = _Acks(sum(map(len, fixed)))
    for batch in fixed:
        for i in range(batch.count):
            acks.add_created(batch.origin(i), batch.items[i].seq)
    return encode_many(
        CQ_PRODUCER_SERVER_EVENT, PRODUCER_CREATE_ACK, PRODUCER_CREATE_ACK_BATCH,
        acks.items, sizeof(cq_ack), acks.count, bytes_max,
    )


def encode_result_acks(batches, Py_ssize_t bytes_max):
    cdef Finishes batch
    cdef Py_ssize_t i
    cdef tuple fixed = tuple(batches)
    cdef _Acks acks = _Acks(sum(map(len, fixed)))
    for batch in fixed:
        for i in range(batch.count):
            acks.add_finished(&batch.items[i])
    return encode_many(
        CQ_WORKER_SERVER_EVENT, WORKER_RESULT_ACK, WORKER_RESULT_ACK_BATCH,
        acks.items, sizeof(cq_ack), acks.count, bytes_max,
    )


def encode_creates(Creates creates not None, Py_ssize_t bytes_max):
    return encode_many(
        CQ_PRODUCER_EVENT, PRODUCER_CREATE, PRODUCER_CREATE_BATCH,
        creates.items, sizeof(cq_create), creates.count, bytes_max,
    )


def encode_results(Finishes finishes not None, Py_ssize_t bytes_max):
    return encode_many(
        CQ_WORKER_EVENT, WORKER_RESULT, WORKER_RESULT_BATCH,
        finishes.items, sizeof(cq_finish), finishes.count, bytes_max,
    )


cdef bytes encode_call(cq_stream stream, uint32_t member, str one, str two="", int32_t number=0):
    cdef cq_call call
    memset(&call, 0, sizeof(call))
    one_bytes = one.encode()
    two_bytes = two.encode()
    call.text[0] = bytes_of(one_bytes)
    call.text[1] = bytes_of(two_bytes)
    call.number[0] = number
    return encode_one(stream, member, &call)


cdef bytes encode_task_ack(
    uint32_t member, str task_id, uint8_t number, int32_t delay_seconds=0, bint dead=False
):
    cdef cq_ack ack
    memset(&ack, 0, sizeof(ack))
    task_id_bytes = task_id.encode()
    ack.task_id = cq_utf8_cut(bytes_of(task_id_bytes), CQ_TEXT_BYTES_MAX)
    ack.ok = number == CQ_OK
    if not ack.ok:
        ack.error = refusal_text(number)
    ack.delay_seconds = delay_seconds
    ack.dead = dead
    return encode_one(CQ_WORKER_SERVER_EVENT, member, &ack)


def encode_producer_hello_ack(str tenant not None, str subject not None):
    return encode_call(CQ_PRODUCER_SERVER_EVENT, PRODUCER_HELLO_ACK, tenant, subject)


def encode_worker_hello_ack(str worker_id not None, str tenant not None):
    return encode_call(CQ_WORKER_SERVER_EVENT, WORKER_HELLO_ACK, worker_id, tenant)


def encode_producer_error(str code not None, str message not None):
    return encode_call(CQ_PRODUCER_SERVER_EVENT, PRODUCER_ERROR, code, message)


def encode_worker_error(str code not None, str message not None):
    # workerpb.ServerError has the two the other way round
    return encode_call(CQ_WORKER_SERVER_EVENT, WORKER_ERROR, message, code)


def encode_heartbeat_ack(str task_id not None, uint8_t number):
    return encode_task_ack(WORKER_HEARTBEAT_ACK, task_id, number)


def encode_abandon_ack(str task_id not None, uint8_t number):
    return encode_task_ack(WORKER_ABANDON_ACK, task_id, number)


def encode_nack_ack(str task_id not None, uint8_t number, int32_t applied_delay_seconds, bint dlq):
    return encode_task_ack(WORKER_NACK_ACK, task_id, number, applied_delay_seconds, dlq)


def encode_producer_hello(str token not None):
    return encode_call(CQ_PRODUCER_EVENT, PRODUCER_HELLO, token)


def encode_worker_hello(str token not None, str worker_id not None):
    return encode_call(CQ_WORKER_EVENT, WORKER_HELLO, token, worker_id)


def encode_nack(str task_id not None, int32_t delay_seconds, str reason not None):
    return encode_call(CQ_WORKER_EVENT, WORKER_NACK, task_id, reason, delay_seconds)


def encode_heartbeat(str task_id not None, int32_t extend_seconds):
    return encode_call(CQ_WORKER_EVENT, WORKER_HEARTBEAT, task_id, "", extend_seconds)


def encode_abandon(str task_id not None):
    return encode_call(CQ_WORKER_EVENT, WORKER_ABANDON, task_id)


def encode_ready(commands, int32_t lease_seconds, int32_t count):
    cdef cq_call call
    cdef list texts = list(commands)
    memset(&call, 0, sizeof(call))
    call.number[0] = lease_seconds
    call.number[1] = count
    call.commands.items = <cq_bytes *>malloc(len(texts) * sizeof(cq_bytes) + 1)
    if call.commands.items == NULL:
        raise MemoryError()
    try:
        for text in texts:
            call.commands.items[call.commands.count] = bytes_of(text)
            call.commands.count += 1
        return encode_one(CQ_WORKER_EVENT, WORKER_READY, &call)
    finally:
        free(call.commands.items)
