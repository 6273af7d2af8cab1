/* What a process does to the files under one directory, watched at the system calls; see shim.py.

   Preloaded, it passes everything through until shim_arm is called. Armed, it numbers each change under the prefix
   (only of paths that contain `only`) from 1 and dies at one, or lets the disk be full from one on, or appends each to a log. A lock keeps the numbers,
   the log and the disk in one order, whichever threads write. The real calls are made by number, not by name. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { CREATE = 1, TRUNCATE, WRITE, FSYNC, RENAME, UNLINK, RMDIR, MKDIR, LINK, FSYNC_DIRECTORY };
enum mode { OFF, RECORD, BEFORE, HALF, FULL };
enum answer { GO, REFUSE, GO_HALF_WAY };

static enum mode mode = OFF;
static char prefix[PATH_MAX], part[PATH_MAX];
static size_t prefix_length;
static long target, count;
static int log_descriptor = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void shim_arm(const char *directory, const char *only, int how, long at, int log)
{
    snprintf(prefix, sizeof prefix, "%s/", directory);
    snprintf(part, sizeof part, "%s", only);
    prefix_length = strlen(prefix);
    target = at;
    count = 0;
    log_descriptor = log;
    mode = how;
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* The absolute path that a call names; whether it lies under the prefix. */
static int named(int directory, const char *path, char *out)
{
    char place[64], base[PATH_MAX] = "";
    if (mode == OFF)
        return 0;
    if (path[0] != '/') {
        snprintf(place, sizeof place, "/proc/self/fd/%d", directory);
        ssize_t n = readlink(directory == AT_FDCWD ? "/proc/self/cwd" : place, base, sizeof base - 1);
        base[n < 0 ? 0 : n] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s%s%s", base, base[0] ? "/" : "", path) >= PATH_MAX)
        return 0;
    return strncmp(out, prefix, prefix_length) == 0;
}

/* The path that an open file has now, after any rename. */
static int opened(int descriptor, char *out)
{
    char place[64];
    if (mode == OFF)
        return 0;
    snprintf(place, sizeof place, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(place, out, PATH_MAX - 1);
    if (n < 0)
        return 0;
    out[n] = 0;
    return strncmp(out, prefix, prefix_length) == 0 || ((size_t)n == prefix_length - 1 && !strncmp(out, prefix, n));
}

/* Number the change that comes, and say what becomes of it. With the lock held. */
static enum answer gate(enum kind kind, const char *path, size_t bytes)
{
    int takes_space = kind == CREATE || kind == WRITE || kind == MKDIR || kind == LINK;
    if (mode == OFF || mode == RECORD || (mode == HALF && (kind != WRITE || bytes < 2)) || (mode == FULL && !takes_space))
        return GO;
    if (!strstr(path, part) || ++count < target)
        return GO;
    if (mode == BEFORE)
        die();
    if (mode == HALF || (count == target && kind == WRITE && bytes > 1))
        return GO_HALF_WAY;
    errno = ENOSPC;
    return REFUSE;
}

static void note(enum kind kind, const char *path, const char *other, uint64_t offset, const void *data, size_t bytes)
{
    if (mode != RECORD)
        return;
    uint64_t head[5] = {kind, strlen(path), strlen(other), offset, bytes};
    struct iovec parts[] = {
        {head, sizeof head}, {(void *)path, head[1]}, {(void *)other, head[2]}, {(void *)data, bytes}};
    ssize_t wanted = sizeof head + head[1] + head[2] + bytes;
    if (syscall(SYS_writev, log_descriptor, parts, 4) != wanted)
        abort();
}

static int open_file(int directory, const char *path, int flags, mode_t permissions)
{
    char full[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) || !named(directory, path, full))
        return syscall(SYS_openat, directory, path, flags, permissions);
    pthread_mutex_lock(&lock);
    int is_new = access(full, F_OK) != 0, opened = -1;
    int changes = (flags & O_TRUNC) || (is_new && (flags & O_CREAT));
    enum kind kind = is_new ? CREATE : TRUNCATE;
    if (!changes || gate(kind, full, 0) == GO) {
        opened = syscall(SYS_openat, directory, path, flags, permissions);
        if (opened >= 0 && changes)
            note(kind, full, "", 0, "", 0);
    }
    pthread_mutex_unlock(&lock);
    return opened;
}

#define PERMISSIONS(flags, mode) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...) { PERMISSIONS(flags, p) return open_file(AT_FDCWD, path, flags, p); }
int open64(const char *path, int flags, ...) { PERMISSIONS(flags, p) return open_file(AT_FDCWD, path, flags, p); }
int openat(int at, const char *path, int flags, ...) { PERMISSIONS(flags, p) return open_file(at, path, flags, p); }
int openat64(int at, const char *path, int flags, ...) { PERMISSIONS(flags, p) return open_file(at, path, flags, p); }

/* Write at `offset`, or where the file stands when it is negative. */
static ssize_t put(int file, const void *data, size_t bytes, off_t offset)
{
    char path[PATH_MAX];
    int is_ours = opened(file, path);
    ssize_t written = -1;
    enum answer answer = GO;
    if (is_ours) {
        pthread_mutex_lock(&lock);
        answer = gate(WRITE, path, bytes);
    }
    size_t part = answer == GO_HALF_WAY ? bytes / 2 : bytes;
    if (answer != REFUSE)
        written = offset < 0 ? syscall(SYS_write, file, data, part) : syscall(SYS_pwrite64, file, data, part, offset);
    if (is_ours) {
        if (answer == GO_HALF_WAY && mode == HALF)
            die();
        if (written > 0)
            note(WRITE, path, "", offset < 0 ? lseek(file, 0, SEEK_CUR) - written : offset, data, written);
        pthread_mutex_unlock(&lock);
    }
    return written;
}

static ssize_t gather(int file, const struct iovec *parts, int n, off_t offset)
{
    size_t bytes = 0, at = 0;
    for (int i = 0; i < n; i++)
        bytes += parts[i].iov_len;
    char *data = malloc(bytes + 1);
    for (int i = 0; i < n; at += parts[i++].iov_len)
        memcpy(data + at, parts[i].iov_base, parts[i].iov_len);
    ssize_t written = put(file, data, bytes, offset);
    free(data);
    return written;
}

ssize_t write(int file, const void *data, size_t n) { return put(file, data, n, -1); }
ssize_t pwrite(int file, const void *data, size_t n, off_t offset) { return put(file, data, n, offset); }
ssize_t pwrite64(int file, const void *data, size_t n, off64_t offset) { return put(file, data, n, offset); }
ssize_t writev(int file, const struct iovec *parts, int n) { return gather(file, parts, n, -1); }
ssize_t pwritev(int file, const struct iovec *parts, int n, off_t offset) { return gather(file, parts, n, offset); }
ssize_t pwritev64(int file, const struct iovec *parts, int n, off64_t offset) { return gather(file, parts, n, offset); }

/* A call that changes something as a whole, on an open file or on one or two names. */
#define WHOLE(is_ours, kind, path, other, offset, call) \
    do { \
        if (!(is_ours)) \
            return call; \
        pthread_mutex_lock(&lock); \
        int result = gate(kind, path, 0) == REFUSE ? -1 : (call); \
        if (result == 0) \
            note(kind, path, other, offset, "", 0); \
        pthread_mutex_unlock(&lock); \
        return result; \
    } while (0)

int ftruncate(int file, off_t length)
{
    char path[PATH_MAX];
    WHOLE(opened(file, path), TRUNCATE, path, "", length, syscall(SYS_ftruncate, file, length));
}
int ftruncate64(int file, off64_t length) { return ftruncate(file, length); }

int truncate(const char *name, off_t length)
{
    char path[PATH_MAX];
    WHOLE(named(AT_FDCWD, name, path), TRUNCATE, path, "", length, syscall(SYS_truncate, name, length));
}
int truncate64(const char *name, off64_t length) { return truncate(name, length); }

int fsync(int file)
{
    char path[PATH_MAX];
    struct stat about = {0};
    int is_ours = opened(file, path) && fstat(file, &about) == 0;
    WHOLE(is_ours, S_ISDIR(about.st_mode) ? FSYNC_DIRECTORY : FSYNC, path, "", 0, syscall(SYS_fsync, file));
}
int fdatasync(int file) { return fsync(file); }

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    char path[PATH_MAX], other[PATH_MAX];
    int is_ours = named(from, old, path), is_too = named(to, new, other);
    WHOLE(is_ours || is_too, RENAME, path, other, 0, syscall(SYS_renameat2, from, old, to, new, flags));
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int directory, const char *name, int flags)
{
    char path[PATH_MAX];
    WHOLE(named(directory, name, path), flags & AT_REMOVEDIR ? RMDIR : UNLINK, path, "", 0,
          syscall(SYS_unlinkat, directory, name, flags));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int directory, const char *name, mode_t permissions)
{
    char path[PATH_MAX];
    WHOLE(named(directory, name, path), MKDIR, path, "", 0, syscall(SYS_mkdirat, directory, name, permissions));
}
int mkdir(const char *path, mode_t permissions) { return mkdirat(AT_FDCWD, path, permissions); }

int linkat(int from, const char *old, int to, const char *new, int flags)
{
    char path[PATH_MAX], other[PATH_MAX];
    int is_ours = named(from, old, path), is_too = named(to, new, other);
    WHOLE(is_ours || is_too, LINK, path, other, 0, syscall(SYS_linkat, from, old, to, new, flags));
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
