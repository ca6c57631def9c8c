"""Calls on open files that take less time than it takes to get the GIL back.

``os`` lets go of the GIL in each call, and under load the thread then waits for the loop to let go
of it: hundreds of times as long as these take, which do not wait for the disk (unless the kernel
makes every writer wait, the loop's own too).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EINTR, errno
from posix.stat cimport fstat, struct_stat
from posix.types cimport off_t
from posix.unistd cimport pwrite


def write_at(int fd, bytes data not None, off_t offset):
    cdef ssize_t written
    while True:
        written = pwrite(fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), offset)
        if written >= 0 or errno != EINTR:
            break
    if written < 0:
        PyErr_SetFromErrno(OSError)
    if written != PyBytes_GET_SIZE(data):
        raise OSError(f"{written} of {len(data)} bytes were written")


def links_and_size(int fd):
    cdef struct_stat found
    if fstat(fd, &found) < 0:
        PyErr_SetFromErrno(OSError)
    return found.st_nlink, found.st_size
