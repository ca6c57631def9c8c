"""What the engine counts, as rows of Python objects."""

from codeq.engine._engine cimport cq_engine


cdef list queue_rows(cq_engine *core, bytes tenant)
cdef list command_rows(const cq_engine *core)
cdef dict ready_since(cq_engine *core)
cdef tuple tally_rows(cq_engine *core, bytes tenant, Py_ssize_t count_max)
cdef list lease_rows(const cq_engine *core, bytes tenant)
