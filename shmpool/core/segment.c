/* segment.c: see segment.h. */
#include "segment.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "slab.h"

enum { REMOVER_TRIES = 100 }; /* 50 ms */

static bool same_file(const struct stat *a, const struct stat *b) { return a->st_dev == b->st_dev && a->st_ino == b->st_ino; }

/* May the slab of `fd` be removed? Its magic is that of every version; the rest of a foreign one is not read. From a yes about remains until
 * `fd` is closed nobody can become a member: the family's byte is ours. */
static bool may_go(int fd, const uint8_t *id)
{
    uint64_t magic = 0;
    uint8_t found[16];
    if (pread(fd, &magic, sizeof magic, offsetof(struct header_shm, magic)) != sizeof magic || magic != SHM_MAGIC)
        return false;
    if (!id)
        return byte_lock(fd, SHM_FAMILY_BYTE);
    return pread(fd, found, sizeof found, offsetof(struct header_shm, id)) == sizeof found && !memcmp(found, id, sizeof found);
}

/* The socket for newcomers, and its directory with the last one. */
static void remove_socket(int fd)
{
    char path[SHM_RENDEZVOUS_BYTES];
    uint32_t version = 0;
    struct stat status;
    if (pread(fd, &version, sizeof version, offsetof(struct header_shm, version)) != sizeof version || version != SHM_VERSION ||
        pread(fd, path, sizeof path, offsetof(struct header_shm, rendezvous)) != sizeof path || path[0] != '/' ||
        strnlen(path, sizeof path) == sizeof path)
        return;
    if (lstat(path, &status) || !S_ISSOCK(status.st_mode) || status.st_uid != geteuid() || unlink(path))
        return;
    *strrchr(path, '/') = '\0';
    rmdir(path);
}

/* Another remover may find us still holding the family's byte, and we find it at work when we have let go: so one waits for the other, or
 * the last two to leave would both leave the name. Not for ever: it may be stopped. */
static bool become_remover(int fd)
{
    for (int tries = 0; tries < REMOVER_TRIES; tries++) {
        if (byte_lock(fd, SHM_REMOVER_BYTE))
            return true;
        usleep(500);
    }
    return false;
}

bool segment_remove(const char *path, const uint8_t *id)
{
    struct stat opened, named;
    int fd = open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT;
    bool gone = false;
    if (fstat(fd, &opened) == 0 && S_ISREG(opened.st_mode) && opened.st_uid == geteuid() && become_remover(fd)) {
        if (lstat(path, &named))
            gone = errno == ENOENT;
        else if (same_file(&opened, &named) && may_go(fd, id)) {
            gone = unlink(path) == 0;
            remove_socket(fd);
        }
    }
    close(fd);
    return gone;
}

/* ---- at exit ---- */

static void remove_names(void)
{
    for (struct seat *seat = seat_first(); seat; seat = seat->next) {
        struct stat status;
        int slab_fd = atomic_load_explicit(&seat->fd, memory_order_acquire) >= 0 ? seat->slab_fd : -1;
        if (slab_fd < 0)
            continue; /* not registered here: left, or never begun in this process */
        if (fstat(slab_fd, &status) || status.st_ino != seat->inode)
            continue; /* the program has closed it, and may have its log there: it is written after this */
        close(slab_fd); /* else it is we who hold it */
        segment_remove(seat->path, NULL);
    }
}

static pthread_once_t exit_once = PTHREAD_ONCE_INIT;
static void install_exit_handler(void) { atexit(remove_names); }

void segment_note(struct seat *seat, int slab_fd, const char *path)
{
    pthread_once(&exit_once, install_exit_handler);
    seat->slab_fd = slab_fd;
    snprintf(seat->path, sizeof seat->path, "%s", path);
}
