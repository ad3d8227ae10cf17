/* worker.c: seats, byte locks and the page that a fork wipes. See worker.h.
 *
 * Registration itself stands in pool.c (pool_join), because it sweeps (recovery.c) and fills the handle.
 */
#include "worker.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- seats ---- */

static _Atomic(struct seat *) seats;
static pthread_once_t seats_once = PTHREAD_ONCE_INIT;
/* Held while a seat is opened and noted, while it is closed, and across fork(): a child inherits no seat that is not in the list. */
static pthread_mutex_t seats_mutex = PTHREAD_MUTEX_INITIALIZER;

/* Taken before every other lock of ours. */
static pthread_mutex_t forks_mutex = PTHREAD_MUTEX_INITIALIZER;
static _Atomic(const struct forks_watcher *) watcher;
static const struct forks_watcher *told; /* by this fork */

static void before_fork(void)
{
    pthread_mutex_lock(&forks_mutex);
    if ((told = atomic_load(&watcher)))
        told->before();
    pthread_mutex_lock(&seats_mutex);
}

static void after_fork_parent(void)
{
    pthread_mutex_unlock(&seats_mutex);
    if (told)
        told->after();
    pthread_mutex_unlock(&forks_mutex);
}

static void close_now(struct seat *seat)
{
    struct stat status;
    int fd = atomic_exchange(&seat->fd, -1);
    if (fd >= 0 && fstat(fd, &status) == 0 && status.st_ino == seat->inode)
        close(fd);
}

static void after_fork_child(void)
{
    for (struct seat *seat = atomic_load_explicit(&seats, memory_order_acquire); seat; seat = seat->next)
        close_now(seat);
    after_fork_parent(); /* this thread locked them in before_fork() */
}

static void install_fork_handlers(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

void forks_hold(void)
{
    pthread_once(&seats_once, install_fork_handlers);
    pthread_mutex_lock(&forks_mutex);
}

void forks_release(void) { pthread_mutex_unlock(&forks_mutex); }

void forks_watch(const struct forks_watcher *who)
{
    pthread_once(&seats_once, install_fork_handlers);
    atomic_store(&watcher, who);
}

struct seat *seat_take(void)
{
    pthread_once(&seats_once, install_fork_handlers);
    for (struct seat *seat = atomic_load_explicit(&seats, memory_order_acquire); seat; seat = seat->next) {
        bool taken = false;
        if (atomic_compare_exchange_strong(&seat->taken, &taken, true))
            return seat;
    }
    struct seat *seat = malloc(sizeof *seat);
    if (!seat)
        return NULL;
    atomic_init(&seat->fd, -1);
    atomic_init(&seat->taken, true);
    seat->slab_fd = -1;
    seat->path[0] = '\0';
    seat->next = atomic_load(&seats);
    while (!atomic_compare_exchange_weak(&seats, &seat->next, seat))
        ;
    return seat;
}

struct seat *seat_first(void) { return atomic_load_explicit(&seats, memory_order_acquire); }

int file_open_anew(int slab_fd)
{
    char path[64];
    struct stat ours, opened;
    snprintf(path, sizeof path, "/proc/self/fd/%d", slab_fd);
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -1;
    if (fstat(slab_fd, &ours) || fstat(fd, &opened) || ours.st_ino != opened.st_ino || ours.st_dev != opened.st_dev) {
        close(fd);
        errno = EBADF;
        return -1;
    }
    return fd;
}

int seat_open(struct seat *seat, int slab_fd)
{
    pthread_mutex_lock(&seats_mutex);
    struct stat status;
    int fd = file_open_anew(slab_fd), error = fd < 0 || fstat(fd, &status) ? errno : 0;
    seat->inode = error ? 0 : (uint64_t)status.st_ino;
    if (!error)
        atomic_store_explicit(&seat->fd, fd, memory_order_release);
    pthread_mutex_unlock(&seats_mutex);
    return error;
}

void seat_close(struct seat *seat)
{
    pthread_mutex_lock(&seats_mutex); /* a child forked between the two steps would keep the seat, and the byte, for ever */
    close_now(seat);
    pthread_mutex_unlock(&seats_mutex);
}

void seat_give_back(struct seat *seat)
{
    seat_close(seat);
    seat->slab_fd = -1;
    atomic_store(&seat->taken, false);
}

/* ---- locks ---- */

static int lock_call(int fd, int command, short type, int64_t byte, struct flock *lock)
{
    *lock = (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    int result;
    do
        result = fcntl(fd, command, lock);
    while (result < 0 && errno == EINTR);
    return result;
}

bool byte_lock(int fd, int64_t byte)
{
    struct flock lock;
    return lock_call(fd, F_OFD_SETLK, F_WRLCK, byte, &lock) == 0;
}

void byte_unlock(int fd, int64_t byte)
{
    struct flock lock;
    lock_call(fd, F_OFD_SETLK, F_UNLCK, byte, &lock);
}

bool family_join(int fd)
{
    struct flock lock;
    return lock_call(fd, F_OFD_SETLK, F_RDLCK, SHM_FAMILY_BYTE, &lock) == 0;
}

bool byte_is_locked(int fd, int64_t byte)
{
    struct flock lock;
    return lock_call(fd, F_OFD_GETLK, F_WRLCK, byte, &lock) != 0 || lock.l_type != F_UNLCK; /* cannot tell: alive */
}

/* ---- the page that a fork wipes ---- */

struct fork_page *fork_page_new(void)
{
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    void *page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return NULL;
    if (madvise(page, size, MADV_WIPEONFORK)) {
        int error = errno;
        munmap(page, size);
        errno = error;
        return NULL;
    }
    return page;
}

void fork_page_free(struct fork_page *page) { munmap(page, (size_t)sysconf(_SC_PAGESIZE)); }
