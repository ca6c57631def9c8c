"""What the engine counts, as rows for metrics and the overview.

None of it costs more with more tasks: rows are per queue, command or worker.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free

from codeq.engine._engine cimport (
    CQ_DONE, CQ_LATENCY_BUCKETS, cq_bytes_equal, cq_engine, cq_holder, cq_label, cq_node, cq_queue,
    cq_queue_ready_since, cq_tally, cq_tally_list, cq_tenant, cq_tenant_find
)
from codeq.engine._views cimport bytes_of, to_bytes, to_text
from codeq.engine._wire cimport CQ_NEVER, cq_bytes

# Levels (priorities of queues) asked in one call how long their tasks wait, and holders of leases
# looked at. What is beyond is left out.
cdef uint32_t LEVELS_MAX = 100_000
cdef uint32_t HOLDERS_MAX = 100_000


cdef list queue_rows(cq_engine *core, bytes tenant):
    """Of one tenant, or all: tenant, command and depths, sorted; queues without tasks left out."""
    cdef list found = []
    cdef cq_tenant *owner
    cdef cq_queue *queue
    cdef cq_node *node
    cdef size_t i
    if tenant is not None:
        owner = cq_tenant_find(core, bytes_of(tenant))
        queue = NULL if owner == NULL else owner.queues
        while queue != NULL:
            add_queue(found, queue)
            queue = queue.next_of_tenant
    else:
        for i in range(core.queues.cap):
            node = core.queues.heads[i]
            while node != NULL:
                add_queue(found, <cq_queue *>node)
                node = node.next
    found.sort()
    return found


cdef int add_queue(list found, const cq_queue *queue) except -1:
    if queue.ready + queue.delayed + queue.leased + queue.dead:
        found.append((to_bytes(queue.tenant.name), to_bytes(queue.command),
                      queue.ready, queue.delayed, queue.leased, queue.dead))
    return 0


cdef list command_rows(const cq_engine *core):
    """By label: its name, the counters, and buckets and sum of both latencies."""
    cdef list stats = []
    cdef cq_label *label = core.all_labels
    while label != NULL:
        stats.append((
            to_text(label.name),
            (label.created, label.claimed, label.completed, label.failed, label.expired),
            histogram(label.latency[0]), label.latency_s[0],
            histogram(label.latency[1]), label.latency_s[1],
        ))
        label = label.next
    return stats


cdef tuple histogram(const uint64_t *buckets):
    return tuple([buckets[i] for i in range(CQ_LATENCY_BUCKETS)])


cdef dict ready_since(cq_engine *core):
    """By label: when the oldest ready task of its queues became ready."""
    cdef dict found = {}
    cdef cq_node *node
    cdef cq_queue *queue
    cdef uint32_t looks = LEVELS_MAX
    cdef int64_t since_ms
    cdef size_t i
    for i in range(core.queues.cap):
        node = core.queues.heads[i]
        while node != NULL:
            queue = <cq_queue *>node
            node = node.next
            since_ms = cq_queue_ready_since(core, queue, &looks)
            if since_ms != CQ_NEVER:
                name = to_text(queue.label.name)
                found[name] = min(since_ms, found.get(name, since_ms))
    return found


cdef tuple tally_rows(cq_engine *core, bytes tenant, Py_ssize_t count_max):
    """The first queues by command, how many are left out, and the live tasks of all."""
    cdef cq_bytes wanted = cq_bytes(NULL, 0) if tenant is None else bytes_of(tenant)
    cdef cq_tally **tallies = NULL
    cdef cq_queue *queue
    cdef size_t i, count
    cdef uint32_t looks = LEVELS_MAX
    cdef int64_t live = 0
    cdef list rows = []
    if cq_tally_list(core, wanted, &tallies, &count) != CQ_DONE:
        raise MemoryError
    try:
        for i in range(count):
            queue = tallies[i].queue
            if queue != NULL:
                live += queue.ready + queue.delayed + queue.leased
            if i < <size_t>count_max:
                rows.append(tally_row(core, tallies[i], &looks))
    finally:
        free(tallies)
    return rows, max(0, <Py_ssize_t>count - count_max), live


cdef tuple tally_row(cq_engine *core, const cq_tally *tally, uint32_t *looks):
    cdef cq_queue *queue = tally.queue
    cdef int64_t since_ms = CQ_NEVER
    depths = (0, 0, 0, 0)
    if queue != NULL:
        depths = (queue.ready, queue.delayed, queue.leased, queue.dead)
        since_ms = cq_queue_ready_since(core, queue, looks)
    counts = (tally.created, tally.claimed, tally.completed, tally.failed, tally.dead,
              tally.expired)
    return (to_bytes(tally.tenant), to_bytes(tally.command), depths, counts,
            None if since_ms == CQ_NEVER else since_ms, histogram(tally.latency))


cdef list lease_rows(const cq_engine *core, bytes tenant):
    """Tenant, worker id and leases, for each subject that holds some."""
    cdef cq_bytes wanted = cq_bytes(NULL, 0) if tenant is None else bytes_of(tenant)
    cdef const cq_holder *holder = core.busy
    cdef uint32_t looks = HOLDERS_MAX
    cdef list rows = []
    while holder != NULL and looks > 0:
        if tenant is None or cq_bytes_equal(holder.tenant, wanted):
            rows.append((to_bytes(holder.tenant), to_bytes(holder.worker), holder.leases))
        holder = holder.next_busy
        looks -= 1
    return rows
