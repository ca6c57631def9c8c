"""What a client does for each task, in C as far as it goes: creates from the call to their
acknowledgement, tasks from their message to the handler, results from there until they are known
to the server.
"""

import msgspec

from codeq import errors, model
from codeq.engine import _wire
from codeq.errors import CodeqError
from codeq.model import since_epoch_ms

cimport cython
from libc.stdint cimport uint64_t
from libc.string cimport memcmp, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from codeq.engine._wire cimport (
    CQ_NEVER, CQ_PRODUCER_SERVER_EVENT, CQ_WORKER_SERVER_EVENT, PRODUCER_CREATE_ACK,
    PRODUCER_CREATE_ACK_BATCH, WORKER_RESULT_ACK, WORKER_RESULT_ACK_BATCH, WORKER_TASK,
    WORKER_TASK_BATCH, ClientTask, Creates, Finishes, Tasks, bytes_of, cq_ack, cq_bytes, cq_create,
    cq_event, cq_event_free, cq_finish, decode, str_of, tasks_of
)

#: Larger creates are refused here: no server takes a message that long, it would end the stream.
ITEM_BYTES_MAX = 15 * 1024 * 1024
#: No server takes a longer result either.
RESULT_BYTES_MAX = 15 * 1024 * 1024
#: Of a task whose handler was not called
UNTRIED = object()

cdef enum:
    # An acknowledgement names its create by group number << SEQ_SHIFT | place in the group.
    SEQ_SHIFT = 10
    SEQ_MASK = (1 << SEQ_SHIFT) - 1
    # A message carries at most this many creates, and bytes unless one is larger.
    ITEMS_MAX = 1000
    BYTES_MAX = 1024 * 1024
    # What a create counts beside its texts when unacknowledged bytes are bounded
    ITEM_OVERHEAD_BYTES = 128
    # So many settled results are forgotten together.
    FORGOTTEN_AT_ONCE = 4096

cdef object encode_json = msgspec.json.Encoder().encode
cdef object decode_json = msgspec.json.Decoder().decode
cdef object decode_json_as = msgspec.json.decode


# --- creates --------------------------------------------------------------------------------------

@cython.final
cdef class Item:
    """A create as the codec takes it."""

    cdef cq_create create  # borrows from these four
    cdef bytes command
    cdef bytes payload
    cdef bytes key
    cdef bytes webhook
    cdef object command_text
    cdef readonly Py_ssize_t weight

    cdef int read(self, task, bytes made_key) except -1:
        """Takes in a NewTask or a pair; raises CodeqError when it cannot be a task."""
        memset(&self.create, 0, sizeof(self.create))
        self.create.same_as = -1
        self.create.run_at_ms = CQ_NEVER
        self.webhook = None
        try:
            if type(task) is tuple:
                command, payload = task
                self.key = made_key
            else:
                command, payload = task.command, task.payload
                self.read_more(task, made_key)
            if command is not self.command_text:
                self.command = command.encode()
                self.command_text = command
            if type(payload) is bytes:
                self.payload = payload
            elif isinstance(payload, (bytearray, memoryview)):
                self.payload = bytes(payload)
            else:
                self.payload = encode_json(payload)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CodeqError("validation-error", f"this cannot be a task: {error}") from None
        self.weight = (
            len(self.payload) + len(self.command) + len(self.key) + ITEM_OVERHEAD_BYTES
        )
        if self.weight > ITEM_BYTES_MAX:
            row = errors.PAYLOAD_TOO_LARGE
            raise CodeqError(row.slug, row.stream_message)
        return 0

    cdef int read_more(self, task, bytes made_key) except -1:
        """The rarer fields."""
        key = task.idempotency_key
        self.key = (key.strip(model.BLANKS).encode() if key else b"") or made_key
        self.create.priority = task.priority
        self.create.max_attempts = task.max_attempts
        self.create.delay_seconds = task.delay_seconds
        webhook = task.webhook
        if webhook:
            self.webhook = webhook.encode()
        run_at = task.run_at
        if run_at is not None:
            if run_at.tzinfo is None:
                raise ValueError("run_at needs a time zone")
            self.create.run_at_ms = since_epoch_ms(run_at)
        return 0


def item_of(task, bytes made_key not None):
    cdef Item item = Item()
    item.read(task, made_key)
    return item


@cython.final
cdef class Group:
    """The creates of one message, from the call to the last acknowledgement."""

    cdef readonly uint64_t number
    cdef readonly list results
    cdef readonly Py_ssize_t left
    cdef readonly Py_ssize_t weight
    cdef readonly bint sent
    cdef readonly Item over  # the one that had no room
    cdef public int resends
    cdef readonly object done
    cdef Creates creates  # None once nothing in it can be sent again
    cdef bint keyed
    cdef list waiters

    def __init__(self, uint64_t number, done, *, bint singles):
        self.number = number
        self.done = done
        self.results = []
        self.creates = Creates()
        self.waiters = [] if singles else None

    cdef bint fits(self, Item item) noexcept:
        cdef Py_ssize_t count = len(self.results)
        return count == 0 or (count < ITEMS_MAX and self.weight + item.weight <= BYTES_MAX)

    def has_room(self, Item item not None):
        return self.fits(item)

    def add(self, Item item not None, waiter):
        self.put(item)
        self.waiters.append(waiter)

    cdef int put(self, Item item) except -1:
        cdef cq_create *create = &item.create
        create.seq = self.number << SEQ_SHIFT | <uint64_t>len(self.results)
        create.command = self.creates.borrow(item.command)
        create.payload = self.creates.borrow(item.payload)
        if item.key:
            create.key = self.creates.borrow(item.key)
            self.keyed = True
        if item.webhook is not None:
            create.webhook = self.creates.borrow(item.webhook)
        self.creates.append(create)
        self.results.append(None)
        self.left += 1
        self.weight += item.weight
        return 0

    def fill(self, tasks, keys, Item over):
        cdef Item item = over if over is not None else Item()
        if over is not None:
            self.put(item)
        while len(self.results) < ITEMS_MAX:
            task = next(tasks, self)
            if task is self:
                return True
            try:
                item.read(task, next(keys))
            except CodeqError as error:
                self.results.append(error)
                continue
            if not self.fits(item):
                self.over = item
                return False
            self.put(item)
        return False

    def message(self):
        cdef Creates creates = self.again() if self.sent else self.creates
        self.sent = True
        if not self.keyed:
            self.creates = None
        (message,) = _wire.encode_creates(creates, 2 * ITEM_BYTES_MAX)
        return message

    cdef Creates again(self):
        """What has a key and no answer."""
        cdef Creates again = Creates()
        cdef Py_ssize_t i
        again.keep = self.creates.keep
        for i in range(self.creates.count):
            if self.stays(&self.creates.items[i]):
                again.append(&self.creates.items[i])
        return again

    cdef bint stays(self, const cq_create *create):
        return create.key.len > 0 and self.results[<Py_ssize_t>(create.seq & SEQ_MASK)] is None

    cdef int settle(self, Py_ssize_t place, result) except -1:
        if place >= len(self.results) or self.results[place] is not None:
            return 0
        self.results[place] = result
        self.left -= 1
        if self.waiters is not None:
            waiter = self.waiters[place]
            if not waiter.done():
                if isinstance(result, str):
                    waiter.set_result(result)
                else:
                    waiter.set_exception(result)
        if self.left == 0 and not self.done.done():
            self.done.set_result(None)
        return 0

    def settle_rest(self, error, *, bint keep_keyed=False):
        cdef Py_ssize_t i
        cdef set kept = set()
        if keep_keyed and self.creates is not None:
            for i in range(self.creates.count):
                if self.stays(&self.creates.items[i]):
                    kept.add(<Py_ssize_t>(self.creates.items[i].seq & SEQ_MASK))
        for i in range(len(self.results)):
            if self.results[i] is None and i not in kept:
                self.settle(i, error)


def producer_event(bytes message not None, dict sent not None, refusal_of):
    cdef cq_event event
    decode(CQ_PRODUCER_SERVER_EVENT, message, &event)
    try:
        if event.member == PRODUCER_CREATE_ACK or event.member == PRODUCER_CREATE_ACK_BATCH:
            return _wire.CREATE_ACKS, settle_creates(&event, sent, refusal_of)
    finally:
        cq_event_free(CQ_PRODUCER_SERVER_EVENT, &event)
    return _wire.decode_producer_server_event(message)


cdef list settle_creates(const cq_event *event, dict sent, refusal_of):
    """The groups in which nothing is open any more."""
    cdef const cq_ack *acks = <const cq_ack *>event.records
    cdef Group group = None
    cdef list over = []
    cdef Py_ssize_t i
    for i in range(event.count):
        if group is None or acks[i].seq >> SEQ_SHIFT != group.number:
            group = sent.get(acks[i].seq >> SEQ_SHIFT)
            if group is None:
                continue
        text = str_of(acks[i].task_id if acks[i].ok else acks[i].error)
        group.settle(acks[i].seq & SEQ_MASK, text if acks[i].ok else refusal_of(text))
        if group.left == 0:
            over.append(sent.pop(group.number))
            group = None
    return over


# --- tasks and results ----------------------------------------------------------------------------

@cython.final
@cython.no_gc  # holds a message and bytes, no way back
cdef class Task(ClientTask):
    """One task as its handler sees it. Fields are read from the message when asked for."""

    cdef bytes status_said  # what was found, once it was
    cdef bytes result
    cdef bytes error

    def json(self, type=object):
        """The payload read as JSON, as a value of ``type`` (a msgspec Struct, a dataclass, ...).
        Raises msgspec.DecodeError when it is something else."""
        if type is object:
            return decode_json(self.payload)
        return decode_json_as(self.payload, type=type)

    def __repr__(self):
        return f"<Task {self.id} {self.command!r} attempt {self.attempts}>"


cdef list tasks_in(Tasks tasks):
    cdef list out = []
    cdef Task task
    cdef Py_ssize_t i
    for i in range(tasks.count):
        task = Task.__new__(Task)
        task.bind(tasks, i)
        out.append(task)
    return out


@cython.final
cdef class Counts:
    """What a worker has done since it was made."""

    cdef public Py_ssize_t delivered  # tasks received
    cdef public Py_ssize_t finished  # results made by handlers
    cdef public Py_ssize_t returned  # nacks and abandons
    cdef public Py_ssize_t acknowledged  # results, nacks and abandons the server has accepted
    cdef public Py_ssize_t refused  # ... and refused


cdef double monotonic_s() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec / 1e9


cdef bint is_result(outcome):
    """Whether a handler that returned this is done and did not fail."""
    cdef object kind = type(outcome)
    if outcome is None or kind is dict or kind is list or kind is str or kind is int:
        return True
    return not isinstance(outcome, Exception) and not hasattr(outcome, "__await__")


@cython.final
cdef class Results:
    """Results in the order in which they were found, until the server has acknowledged them."""

    cdef public bint abandoning
    cdef readonly Py_ssize_t count
    cdef Counts counts
    cdef bint merge
    cdef list found  # tasks with their results; None where the server has answered
    cdef Py_ssize_t head  # all before this are answered
    cdef Py_ssize_t told  # those before this are in messages
    cdef dict by_id  # id -> place, while acknowledgements come out of order

    def __init__(self, Counts counts not None, *, bint merge):
        self.counts = counts
        self.merge = merge
        self.found = []

    def work(self, list tasks not None, Py_ssize_t place, handler, set lost, double until_s):
        cdef Task task
        for place in range(place, len(tasks)):
            task = tasks[place]
            if self.abandoning or (lost and task.id in lost):
                return place, UNTRIED
            try:
                outcome = handler(task)
                if not is_result(outcome):
                    return place, outcome
                self.end(task, outcome)
            except Exception as error:
                return place, error
            if monotonic_s() > until_s:
                return place + 1, UNTRIED
        return len(tasks), UNTRIED

    def complete(self, Task task not None, outcome):
        self.end(task, outcome)

    cdef int end(self, Task task, outcome) except -1:
        cdef bytes result = None if outcome is None else encode_json(outcome)
        if result is not None and len(result) > RESULT_BYTES_MAX:
            raise ValueError("result too large")
        task.result = result
        return self.add(task, b"COMPLETED")

    def fail(self, Task task not None, bytes error not None):
        task.error = error
        self.add(task, b"FAILED")

    cdef int add(self, Task task, bytes status) except -1:
        task.status_said = status
        if self.by_id is not None:
            self.place(task, len(self.found))
        self.found.append(task)
        self.count += 1
        self.counts.finished += 1
        return 0

    def messages(self, Py_ssize_t bytes_max):
        cdef list out = []
        cdef Finishes finishes = Finishes()
        cdef cq_finish item
        cdef Task task
        cdef Py_ssize_t i
        for i in range(self.told, len(self.found)):
            task = self.found[i]
            if task is None:
                continue
            memset(&item, 0, sizeof(item))
            item.task_id = task.task.id
            item.status = bytes_of(task.status_said)
            if task.result is not None:
                item.has_result = 1
                item.result = bytes_of(task.result)
            if task.error is not None:
                item.error = bytes_of(task.error)
            finishes.append(&item)
            if not self.merge:
                out += _wire.encode_results(finishes, bytes_max)
                finishes = Finishes()
        self.told = len(self.found)
        if finishes.count > 0:
            out += _wire.encode_results(finishes, bytes_max)
        return out

    @property
    def waiting(self):
        return self.told < len(self.found)

    def tell_again(self):
        self.told = self.head

    cdef list settle(self, const cq_event *event):
        """The ids and reasons of those that were refused."""
        cdef const cq_ack *acks = <const cq_ack *>event.records
        cdef list refused = []
        cdef Py_ssize_t i, place
        for i in range(event.count):
            place = self.find(acks[i].task_id)
            if place < 0:
                continue
            self.found[place] = None
            self.count -= 1
            if acks[i].ok:
                self.counts.acknowledged += 1
            else:
                refused.append((str_of(acks[i].task_id), str_of(acks[i].error)))
        self.forget()
        return refused

    cdef Py_ssize_t find(self, cq_bytes task_id) except -2:
        """The place of a result, -1 when it is not there. Acknowledgements come in the order of
        the results; only when one does not is there a dictionary, until all is answered."""
        cdef Task task
        cdef Py_ssize_t i
        cdef Py_ssize_t count = len(self.found)
        while self.head < count and self.found[self.head] is None:
            self.head += 1
        if self.head < count:
            task = self.found[self.head]
            if task.task.id.len == task_id.len and \
                    memcmp(task.task.id.ptr, task_id.ptr, task_id.len) == 0:
                if self.by_id is not None:
                    self.by_id.pop(task.id, None)
                return self.head
        if self.by_id is None:
            self.by_id = {}
            for i in range(self.head, count):
                if self.found[i] is not None:
                    self.place(self.found[i], i)
        return self.by_id.pop(str_of(task_id), -1)

    cdef int place(self, Task task, Py_ssize_t place) except -1:
        """A task that came twice counts with its last result."""
        cdef object earlier = self.by_id.get(task.id)
        if earlier is not None:
            self.found[<Py_ssize_t>earlier] = None
            self.count -= 1
        self.by_id[task.id] = place
        return 0

    cdef int forget(self) except -1:
        if self.count == 0:
            self.by_id = None
            self.found.clear()
            self.head = self.told = 0
        elif self.head >= FORGOTTEN_AT_ONCE:
            del self.found[:self.head]
            self.by_id = None
            self.told = max(self.told - self.head, 0)
            self.head = 0
        return 0


def worker_event(bytes message not None, Results results not None):
    cdef cq_event event
    decode(CQ_WORKER_SERVER_EVENT, message, &event)
    try:
        if event.member == WORKER_TASK or event.member == WORKER_TASK_BATCH:
            return _wire.TASKS, tasks_in(tasks_of(&event, message))
        if event.member == WORKER_RESULT_ACK or event.member == WORKER_RESULT_ACK_BATCH:
            return _wire.RESULT_ACKS, results.settle(&event)
    finally:
        cq_event_free(CQ_WORKER_SERVER_EVENT, &event)
    return _wire.decode_worker_server_event(message)
