/*
 * Preloaded into a server under test: notes what was really synced, and lets calls fail.
 *
 *   SHIM_FOLDER  the folder whose files are watched (absolute, no trailing slash)
 *   SHIM_NOTES   a file to which one line per event is appended; it outlives a killed process
 *   SHIM_UNDO    a folder on the same file system for what an overwrite or unlink destroys
 *   SHIM_FAULT   CALL:ERROR:N[+][:PART] - the N-th fsync, write or open of a file whose name
 *                contains PART fails with EIO, ENOSPC, EMFILE or EROFS; with + every later one too
 *   SHIM_ARMED   a file: SHIM_FAULT counts and strikes only while it exists
 *   SHIM_SLOW_US every fsync takes that many microseconds longer
 *
 * Lines of SHIM_NOTES, in the order in which the calls took effect:
 *
 *   open INODE SIZE           opened for writing; SIZE bytes were there before
 *   begin INODE NAME          a sync begins
 *   sync INODE END            all that was written up to END is on disk
 *   cut INODE END             truncated
 *   make INODE NAME           a new entry of the folder
 *   rename OLD NEW SAVED      SAVED: link to the file that NEW was before, or -
 *   remove NAME SAVED         SAVED: link to the file that is gone
 *   folder                    the entries of the folder are on disk
 *
 * Bytes that a write replaces are kept in SHIM_UNDO/INODE at their own offset, once per opening.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FDS_MAX = 65536, FILES_MAX = 65536, NAME_MAX_ = 256 };

struct file {
    uint64_t inode; /* 0 = free */
    int64_t end;    /* of what was written since it was opened */
    int64_t before; /* its size when it was opened */
    int64_t undone; /* end of what is kept in SHIM_UNDO */
    int undo;       /* -1 = not opened yet */
    char name[NAME_MAX_];
};

struct fault {
    int error;
    long count;
    bool sticky;
    char call[16], part[64];
};

static struct file files[FILES_MAX];
static struct file *by_fd[FDS_MAX];
static bool folder_fd[FDS_MAX];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX], undo_folder[PATH_MAX], armed[PATH_MAX];
static size_t folder_length;
static int notes = -1;
static unsigned saved_count;
static useconds_t slow_us;
static struct fault fault;

static int (*real_openat)(int, const char *, int, ...);
static int (*real_close)(int);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static ssize_t (*real_writev)(int, const struct iovec *, int);
static ssize_t (*real_pwritev)(int, const struct iovec *, int, off_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_ftruncate)(int, off_t);
static int (*real_rename)(const char *, const char *);
static int (*real_unlink)(const char *);

static int error_of(const char *name)
{
    if (strcmp(name, "ENOSPC") == 0)
        return ENOSPC;
    if (strcmp(name, "EMFILE") == 0)
        return EMFILE;
    if (strcmp(name, "EROFS") == 0)
        return EROFS;
    return EIO;
}

static void read_fault(const char *text)
{
    char error[16] = "", sticky = 0;
    int used = 0;
    if (sscanf(text, "%15[^:]:%15[^:]:%ld%n", fault.call, error, &fault.count, &used) < 3) {
        fprintf(stderr, "shim: bad SHIM_FAULT %s\n", text);
        _exit(70);
    }
    text += used;
    sticky = *text;
    fault.sticky = sticky == '+';
    text += fault.sticky;
    if (*text == ':')
        snprintf(fault.part, sizeof fault.part, "%s", text + 1);
    fault.error = error_of(error);
}

static void copy_setting(char *into, const char *name)
{
    const char *value = getenv(name);
    if (value)
        snprintf(into, PATH_MAX, "%s", value);
}

/* Reads the settings; a forked process that got its own calls it again. */
void shim_begin(void)
{
    const char *path = getenv("SHIM_NOTES"), *text;
    copy_setting(folder, "SHIM_FOLDER");
    copy_setting(undo_folder, "SHIM_UNDO");
    copy_setting(armed, "SHIM_ARMED");
    folder_length = strlen(folder);
    saved_count = (unsigned)getpid() * 100000U;
    if (path)
        notes = real_openat(AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if ((text = getenv("SHIM_FAULT")) && *text)
        read_fault(text);
    if ((text = getenv("SHIM_SLOW_US")))
        slow_us = (useconds_t)atol(text);
}

/* Finds the real calls and reads the settings; once, at the first call or when it is loaded. */
__attribute__((constructor)) static void begin(void)
{
    if (real_openat)
        return;
    *(void **)&real_openat = dlsym(RTLD_NEXT, "openat64");
    *(void **)&real_close = dlsym(RTLD_NEXT, "close");
    *(void **)&real_write = dlsym(RTLD_NEXT, "write");
    *(void **)&real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
    *(void **)&real_writev = dlsym(RTLD_NEXT, "writev");
    *(void **)&real_pwritev = dlsym(RTLD_NEXT, "pwritev64");
    *(void **)&real_fsync = dlsym(RTLD_NEXT, "fsync");
    *(void **)&real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    *(void **)&real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
    *(void **)&real_rename = dlsym(RTLD_NEXT, "rename");
    *(void **)&real_unlink = dlsym(RTLD_NEXT, "unlink");
    shim_begin();
}

__attribute__((format(printf, 1, 2))) static void note(const char *format, ...)
{
    char line[1024];
    va_list given;
    if (notes < 0)
        return;
    va_start(given, format);
    int length = vsnprintf(line, sizeof line, format, given);
    va_end(given);
    if (length > 0 && real_write(notes, line, (size_t)length) != length)
        abort();
}

/* The name inside the folder, or NULL when the path leads elsewhere. Only plain absolute paths. */
static const char *inside(const char *path)
{
    if (!folder_length || strncmp(path, folder, folder_length) != 0)
        return NULL;
    path += folder_length;
    while (*path == '/')
        path++;
    return *path && !strchr(path, '/') ? path : NULL;
}

static bool is_folder(const char *path)
{
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/')
        length--;
    return folder_length && length == folder_length && strncmp(path, folder, length) == 0;
}

/* Whether this call is the one that must fail; errno is set then. */
static bool strikes(const char *call, const char *name)
{
    if (!fault.count || strcmp(fault.call, call) != 0)
        return false;
    if (fault.part[0] && !strstr(name, fault.part))
        return false;
    if (armed[0] && access(armed, F_OK) != 0)
        return false;
    pthread_mutex_lock(&lock);
    bool now = fault.count == 1;
    if (fault.count > 1)
        fault.count--;
    else if (!fault.sticky)
        fault.count = 0;
    pthread_mutex_unlock(&lock);
    if (now)
        errno = fault.error;
    return now;
}

static struct file *watched(int fd)
{
    return fd >= 0 && fd < FDS_MAX ? by_fd[fd] : NULL;
}

/* The entry of an inode, a new one when it is not known; aborts when there are too many. */
static struct file *entry(uint64_t inode)
{
    for (size_t i = 0; i < FILES_MAX; i++) {
        struct file *file = &files[(inode + i) % FILES_MAX];
        if (!file->inode) {
            file->inode = inode;
            file->undo = -1;
        }
        if (file->inode == inode)
            return file;
    }
    abort();
}

static void drop_undo(struct file *file)
{
    char path[PATH_MAX + 32];
    if (file->undo >= 0)
        real_close(file->undo);
    file->undo = -1;
    file->undone = 0;
    snprintf(path, sizeof path, "%s/%llu", undo_folder, (unsigned long long)file->inode);
    real_unlink(path);
}

static void opened(int fd, const char *name, bool writes, bool is_new)
{
    struct stat stat;
    if (fd < 0 || fd >= FDS_MAX || fstat(fd, &stat) != 0)
        return;
    struct file *file = entry(stat.st_ino);
    snprintf(file->name, sizeof file->name, "%s", name);
    by_fd[fd] = file;
    if (is_new)
        note("make %llu %s\n", (unsigned long long)file->inode, name);
    if (!writes)
        return;
    drop_undo(file);
    file->end = 0;
    file->before = stat.st_size;
    note("open %llu %lld\n", (unsigned long long)file->inode, (long long)stat.st_size);
}

static int open_watched(int at, const char *path, int flags, mode_t mode)
{
    begin();
    const char *name = inside(path);
    struct stat stat;
    if (!name) {
        int fd = real_openat(at, path, flags, mode);
        if (fd >= 0 && fd < FDS_MAX && is_folder(path))
            folder_fd[fd] = true;
        return fd;
    }
    if (strikes("open", name))
        return -1;
    pthread_mutex_lock(&lock);
    bool is_new = (flags & O_CREAT) && lstat(path, &stat) != 0;
    int fd = real_openat(at, path, flags, mode);
    int error = errno;
    if (fd >= 0)
        opened(fd, name, (flags & O_ACCMODE) != O_RDONLY, is_new);
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

/* Keeps the bytes of the file that a write to [from, from + size) replaces. */
static void keep(int fd, struct file *file, int64_t from, size_t size)
{
    char buffer[65536], path[PATH_MAX + 32];
    int64_t end = from + (int64_t)size;
    if (end > file->before)
        end = file->before;
    if (from < file->undone)
        from = file->undone;
    if (from >= end || !undo_folder[0])
        return;
    if (file->undo < 0) {
        snprintf(path, sizeof path, "%s/%llu", undo_folder, (unsigned long long)file->inode);
        file->undo = real_openat(AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (file->undo < 0)
            abort();
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int source = real_openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (source < 0)
        abort();
    while (from < end) {
        size_t want = (size_t)(end - from) < sizeof buffer ? (size_t)(end - from) : sizeof buffer;
        ssize_t got = pread(source, buffer, want, from);
        if (got <= 0 || real_pwrite(file->undo, buffer, (size_t)got, from) != got)
            abort();
        from += got;
    }
    file->undone = end;
    real_close(source);
}

static size_t bytes_of(const struct iovec *parts, int count)
{
    size_t size = 0;
    for (int i = 0; i < count; i++)
        size += parts[i].iov_len;
    return size;
}

/* One write in any of its forms; offset -1 = at the position of the descriptor. */
static ssize_t write_watched(int fd, const struct iovec *parts, int count, off_t offset)
{
    struct file *file = watched(fd);
    if (!file) {
        if (offset < 0)
            return real_writev(fd, parts, count);
        return real_pwritev(fd, parts, count, offset);
    }
    if (strikes("write", file->name))
        return -1;
    pthread_mutex_lock(&lock);
    off_t from = offset;
    if (offset < 0) {
        bool appends = fcntl(fd, F_GETFL) & O_APPEND;
        from = appends ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
    }
    keep(fd, file, from, bytes_of(parts, count));
    ssize_t done =
        offset < 0 ? real_writev(fd, parts, count) : real_pwritev(fd, parts, count, offset);
    int error = errno;
    if (done > 0 && from + done > file->end)
        file->end = from + done;
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

static int sync_watched(int fd, int (*real)(int))
{
    if (fd >= 0 && fd < FDS_MAX && folder_fd[fd]) {
        pthread_mutex_lock(&lock); /* an entry made meanwhile may miss it */
        int failed = real(fd), error = errno;
        if (!failed)
            note("folder\n");
        pthread_mutex_unlock(&lock);
        errno = error;
        return failed;
    }
    struct file *file = watched(fd);
    if (!file)
        return real(fd);
    note("begin %llu %s\n", (unsigned long long)file->inode, file->name);
    if (slow_us)
        usleep(slow_us);
    if (strikes("fsync", file->name))
        return -1;
    pthread_mutex_lock(&lock);
    int64_t end = file->end; /* what is written while the sync runs may miss it */
    pthread_mutex_unlock(&lock);
    int failed = real(fd);
    if (!failed)
        note("sync %llu %lld\n", (unsigned long long)file->inode, (long long)end);
    return failed;
}

/* Links the file of this name into SHIM_UNDO; writes "-" when there is none. */
static void save(const char *path, char *name, size_t size)
{
    char to[PATH_MAX + 32];
    snprintf(name, size, "saved-%u", saved_count++);
    snprintf(to, sizeof to, "%s/%s", undo_folder, name);
    if (!undo_folder[0] || link(path, to) != 0)
        snprintf(name, size, "-");
}

int open(const char *path, int flags, ...)
{
    va_list given;
    va_start(given, flags);
    mode_t mode = va_arg(given, mode_t);
    va_end(given);
    return open_watched(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list given;
    va_start(given, flags);
    mode_t mode = va_arg(given, mode_t);
    va_end(given);
    return open_watched(AT_FDCWD, path, flags, mode);
}

int openat(int at, const char *path, int flags, ...)
{
    va_list given;
    va_start(given, flags);
    mode_t mode = va_arg(given, mode_t);
    va_end(given);
    return open_watched(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...)
{
    va_list given;
    va_start(given, flags);
    mode_t mode = va_arg(given, mode_t);
    va_end(given);
    return open_watched(at, path, flags, mode);
}

int creat(const char *path, mode_t mode)
{
    return open_watched(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

int close(int fd)
{
    begin();
    if (fd >= 0 && fd < FDS_MAX) {
        by_fd[fd] = NULL;
        folder_fd[fd] = false;
    }
    return real_close(fd);
}

ssize_t write(int fd, const void *bytes, size_t size)
{
    begin();
    struct iovec part = {(void *)bytes, size};
    return watched(fd) ? write_watched(fd, &part, 1, -1) : real_write(fd, bytes, size);
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset)
{
    struct iovec part = {(void *)bytes, size};
    return watched(fd) ? write_watched(fd, &part, 1, offset) : real_pwrite(fd, bytes, size, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t offset)
{
    return pwrite(fd, bytes, size, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    return write_watched(fd, parts, count, -1);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    return write_watched(fd, parts, count, offset);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset)
{
    return write_watched(fd, parts, count, offset);
}

int fsync(int fd)
{
    return sync_watched(fd, real_fsync);
}

int fdatasync(int fd)
{
    return sync_watched(fd, real_fdatasync);
}

int ftruncate(int fd, off_t size)
{
    struct file *file = watched(fd);
    if (!file)
        return real_ftruncate(fd, size);
    pthread_mutex_lock(&lock);
    int failed = real_ftruncate(fd, size), error = errno;
    if (!failed) {
        if (size < file->end)
            file->end = size;
        if (size < file->before)
            file->before = size;
        note("cut %llu %lld\n", (unsigned long long)file->inode, (long long)size);
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return failed;
}

int ftruncate64(int fd, off64_t size)
{
    return ftruncate(fd, size);
}

int rename(const char *from, const char *to)
{
    const char *old = inside(from), *name = inside(to);
    char saved[32];
    struct stat stat;
    if (!old || !name)
        return real_rename(from, to);
    pthread_mutex_lock(&lock);
    save(to, saved, sizeof saved);
    int failed = real_rename(from, to), error = errno;
    if (!failed) {
        note("rename %s %s %s\n", old, name, saved);
        if (lstat(to, &stat) == 0) {
            struct file *file = entry(stat.st_ino);
            snprintf(file->name, sizeof file->name, "%s", name);
        }
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return failed;
}

int unlink(const char *path)
{
    const char *name = inside(path);
    char saved[32];
    if (!name)
        return real_unlink(path);
    pthread_mutex_lock(&lock);
    save(path, saved, sizeof saved);
    int failed = real_unlink(path), error = errno;
    if (!failed)
        note("remove %s %s\n", name, saved);
    pthread_mutex_unlock(&lock);
    errno = error;
    return failed;
}
