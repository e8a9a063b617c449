// File calls of a process, counted and struck: loaded with LD_PRELOAD, asleep until strike_arm is called.
// Below ROOT every call that makes, writes, syncs, renames or removes is an event; event number AT gets what WITH says.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long at, with_signal, with_error, lasting, *events;
static int armed;
static pid_t owner;

// how: a signal above 0, or minus an errno; a negative AT only counts. forever: fails all that needs room from then on.
void strike_arm(const char *below, long event, long how, int forever, long *counter) {
    if (!realpath(below, root)) abort();
    at = event;
    with_signal = how > 0 ? how : 0;
    with_error = how < 0 ? -how : 0;
    lasting = forever;
    events = counter;
    owner = getpid();
    *events = 0;
    armed = 1;
}

__attribute__((constructor)) static void from_environment(void) {
    static long counter;
    const char *below = getenv("STRIKE_ROOT"), *event = getenv("STRIKE_AT"), *how = getenv("STRIKE_WITH");
    if (below && event && how) strike_arm(below, atol(event), atol(how), 0, &counter);
}

// In a folder below ROOT: what lies in ROOT itself, as the streams of the command, is no event.
static int is_below(const char *path) {
    size_t length = strlen(root);
    return !strncmp(path, root, length) && path[length] == '/' && strchr(path + length + 1, '/');
}

static int path_counts(int folder, const char *path) {
    char whole[2 * PATH_MAX];
    if (!path) return 0;
    if (path[0] == '/') return is_below(path);
    ssize_t length;
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX)) return 0;
        length = strlen(whole);
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        if ((length = readlink(link, whole, PATH_MAX - 1)) < 0) return 0;
    }
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return is_below(whole);
}

static int handle_counts(int handle) {
    char link[64], whole[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, whole, sizeof whole - 1);
    if (length < 0) return 0;
    whole[length] = 0;
    return whole[0] == '/' && is_below(whole);
}

// 1: the call fails with errno set. room: whether a full disk would refuse it.
static int struck(int counts, int room) {
    if (!armed || !counts || getpid() != owner) return 0;
    long now = __sync_add_and_fetch(events, 1);
    if (now == at && with_signal) {
        kill(getpid(), with_signal);
        return 0;
    }
    if (with_error && (now == at || (lasting && room && at >= 0 && now > at)) && (room || !lasting)) {
        errno = with_error;
        return 1;
    }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))

#define OPEN(name)                                                                                  \
    int name(const char *path, int flags, ...) {                                                    \
        va_list more;                                                                               \
        va_start(more, flags);                                                                      \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                     \
        va_end(more);                                                                               \
        if (armed && struck(path_counts(AT_FDCWD, path), WRITES(flags))) return -1;                 \
        return REAL(name)(path, flags, mode);                                                       \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                                                \
    int name(int folder, const char *path, int flags, ...) {                                        \
        va_list more;                                                                               \
        va_start(more, flags);                                                                      \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                     \
        va_end(more);                                                                               \
        if (armed && struck(path_counts(folder, path), WRITES(flags))) return -1;                   \
        return REAL(name)(folder, path, flags, mode);                                               \
    }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name)                                                                                 \
    FILE *name(const char *path, const char *mode) {                                                \
        if (armed && struck(path_counts(AT_FDCWD, path), mode[0] != 'r')) return NULL;              \
        return REAL(name)(path, mode);                                                              \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define BY_HANDLE(type, name, room, signature, ...)                                                 \
    type name signature {                                                                           \
        if (armed && struck(handle_counts(handle), room)) return -1;                                \
        return REAL(name)(__VA_ARGS__);                                                             \
    }
BY_HANDLE(ssize_t, write, 1, (int handle, const void *data, size_t size), handle, data, size)
BY_HANDLE(ssize_t, writev, 1, (int handle, const struct iovec *parts, int count), handle, parts, count)
BY_HANDLE(ssize_t, pwrite, 1, (int handle, const void *data, size_t size, off_t place), handle, data, size, place)
BY_HANDLE(ssize_t, pwrite64, 1, (int handle, const void *data, size_t size, off64_t place), handle, data, size, place)
BY_HANDLE(int, ftruncate, 1, (int handle, off_t size), handle, size)
BY_HANDLE(int, ftruncate64, 1, (int handle, off64_t size), handle, size)
BY_HANDLE(int, fsync, 1, (int handle), handle)
BY_HANDLE(int, fdatasync, 1, (int handle), handle)
BY_HANDLE(ssize_t, sendfile, 1, (int handle, int source, off_t *place, size_t size), handle, source, place, size)
BY_HANDLE(ssize_t, sendfile64, 1, (int handle, int source, off64_t *place, size_t size), handle, source, place, size)
ssize_t copy_file_range(int source, off64_t *from, int handle, off64_t *to, size_t size, unsigned flags) {
    if (armed && struck(handle_counts(handle), 1)) return -1;
    return REAL(copy_file_range)(source, from, handle, to, size, flags);
}

#define BY_PATH(name, folder, path, room, signature, ...)                                           \
    int name signature {                                                                            \
        if (armed && struck(path_counts(folder, path), room)) return -1;                            \
        return REAL(name)(__VA_ARGS__);                                                             \
    }
BY_PATH(mkdir, AT_FDCWD, path, 1, (const char *path, mode_t mode), path, mode)
BY_PATH(mkdirat, folder, path, 1, (int folder, const char *path, mode_t mode), folder, path, mode)
BY_PATH(rename, AT_FDCWD, path, 0, (const char *path, const char *other), path, other)
BY_PATH(renameat, folder, path, 0, (int folder, const char *path, int place, const char *other), folder, path, place, other)
BY_PATH(link, AT_FDCWD, other, 1, (const char *path, const char *other), path, other)
BY_PATH(linkat, folder, other, 1, (int source, const char *path, int folder, const char *other, int flags), source, path, folder, other, flags)
BY_PATH(symlink, AT_FDCWD, path, 1, (const char *target, const char *path), target, path)
BY_PATH(unlink, AT_FDCWD, path, 0, (const char *path), path)
BY_PATH(unlinkat, folder, path, 0, (int folder, const char *path, int flags), folder, path, flags)
BY_PATH(rmdir, AT_FDCWD, path, 0, (const char *path), path)
