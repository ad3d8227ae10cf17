/* rendezvous.c: see rendezvous.h. */
#include "rendezvous.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { STACK_BYTES = 128 * 1024, SEND_TIMEOUT_NS = 1000000000, NO_ROOM_PAUSE_MS = 50, GONE_TRIES = 10000 };

struct rendezvous {
    pthread_t thread;
    const struct descriptors *set;
    struct fork_page *fork;
    pid_t pid, tid; /* whose thread it is */
    int stop[2];    /* a pipe: the thread ends when its writing end is closed */
    int events, spare;
    uint64_t stop_inode, listener_inode; /* a program may close descriptors that it does not know, and use the numbers again */
    atomic_uint turn;                    /* a thread of an earlier one is not ours any more */
    atomic_bool open;
    bool taken, ended_by_fork;
    struct rendezvous *next;
};

/* Guards the list and every field but `open`, which may be read without it. Held across fork(). The thread never takes it. */
static pthread_mutex_t doors_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t doors_once = PTHREAD_ONCE_INIT;
static struct rendezvous *doors;

/* ---- the thread ---- */

static bool peer_is_ours(int fd)
{
    struct ucred who;
    socklen_t size = sizeof who;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) == 0 && who.uid == geteuid();
}

static uint64_t inode_of(int fd)
{
    struct stat status;
    return fd >= 0 && fstat(fd, &status) == 0 ? (uint64_t)status.st_ino : 0;
}

static bool is_stopped(const struct rendezvous *door, int wait_ms)
{
    struct pollfd stop = {.fd = door->stop[0], .events = POLLIN};
    return poll(&stop, 1, wait_ms) > 0;
}

/* The next in the queue; -1: errno. The spare descriptor makes room for one: a member that woke for a newcomer was woken alone. */
static int admit(struct rendezvous *door)
{
    errno = EBADF;
    if (inode_of(door->set->listener) != door->listener_inode)
        return -1;
    int to = accept4(door->set->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (to >= 0 || (errno != EMFILE && errno != ENFILE) || door->spare < 0)
        return to;
    close(door->spare);
    door->spare = -1;
    return accept4(door->set->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
}

/* Answer whoever stands in the queue, at least one even when stopped. False: this process has no descriptor left to accept with. */
static bool answer_all(struct rendezvous *door)
{
    do {
        int to = admit(door);
        if (to < 0 && errno != EINTR && errno != ECONNABORTED)
            return errno == EAGAIN;
        if (to < 0)
            continue;
        if (peer_is_ours(to))
            descriptors_send(to, door->set, door->stop[0], SEND_TIMEOUT_NS); /* who got only a part asks again */
        close(to);
        if (door->spare < 0)
            door->spare = fcntl(door->stop[0], F_DUPFD_CLOEXEC, 0);
    } while (!is_stopped(door, 0));
    return true;
}

static void *answer(void *argument)
{
    struct rendezvous *door = argument;
    unsigned turn = atomic_load(&door->turn);
    door->tid = (pid_t)syscall(SYS_gettid);
    prctl(PR_SET_NAME, "shmpool-answers");
    for (;;) {
        struct epoll_event event;
        int count = epoll_wait(door->events, &event, 1, -1);
        if ((count < 0 && errno != EINTR) || atomic_load(&door->turn) != turn)
            return NULL;
        if (count > 0 && is_stopped(door, answer_all(door) ? 0 : NO_ROOM_PAUSE_MS))
            return NULL;
    }
}

/* ---- beginning and ending it; the mutex is held ---- */

static bool watch(int events, int fd, uint32_t how)
{
    struct epoll_event event = {.events = how, .data.fd = fd};
    return epoll_ctl(events, EPOLL_CTL_ADD, fd, &event) == 0;
}

static void close_one(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void close_descriptors(struct rendezvous *door)
{
    close_one(&door->stop[1]);
    close_one(&door->stop[0]);
    close_one(&door->events);
    close_one(&door->spare);
}

static void forget_descriptors(struct rendezvous *door) { door->stop[0] = door->stop[1] = door->events = door->spare = -1; }

static int begin_locked(struct rendezvous *door, const struct descriptors *set, struct fork_page *fork)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    door->set = set;
    door->fork = fork;
    door->pid = getpid();
    atomic_fetch_add(&door->turn, 1);
    if (pipe2(door->stop, O_CLOEXEC | O_NONBLOCK))
        return errno;
    door->events = epoll_create1(EPOLL_CLOEXEC);
    int error = errno;
    door->spare = fcntl(door->stop[0], F_DUPFD_CLOEXEC, 0);
    door->stop_inode = inode_of(door->stop[1]);
    door->listener_inode = inode_of(set->listener);
    errno = error;
    /* exclusive: a newcomer wakes one member, not all */
    if (door->events >= 0 && watch(door->events, door->stop[0], EPOLLIN) &&
        watch(door->events, set->listener, EPOLLIN | EPOLLEXCLUSIVE)) {
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, STACK_BYTES);
        sigfillset(&all); /* no handler of the program may run on this stack */
        pthread_sigmask(SIG_SETMASK, &all, &before);
        error = pthread_create(&door->thread, &attributes, answer, door);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
        atomic_store(&door->open, error == 0);
    } else
        error = errno;
    if (error)
        close_descriptors(door);
    return error;
}

static void end_locked(struct rendezvous *door)
{
    if (!atomic_load(&door->open))
        return;
    if (inode_of(door->stop[1]) != door->stop_inode) { /* closed behind our back: nothing of it is ours, nor will the thread wake */
        if (door->pid == getpid())
            pthread_detach(door->thread);
        atomic_fetch_add(&door->turn, 1);
        forget_descriptors(door);
    } else if (door->pid == getpid()) {
        close_one(&door->stop[1]);
        pthread_join(door->thread, NULL);
        /* Joined is not yet gone: the kernel counts the thread for some microseconds more. */
        for (int tries = 0; tries < GONE_TRIES && syscall(SYS_tgkill, door->pid, door->tid, 0) == 0; tries++)
            sched_yield();
    }
    close_descriptors(door);
    atomic_store(&door->open, false);
}

/* ---- fork ---- */

static void before_fork(void)
{
    pthread_mutex_lock(&doors_mutex);
    for (struct rendezvous *door = doors; door; door = door->next) {
        door->ended_by_fork = atomic_load(&door->open);
        end_locked(door);
    }
}

/* In the child the page has been wiped: nothing is noted there. */
static void after_fork(void)
{
    for (struct rendezvous *door = doors; door; door = door->next) {
        uint32_t phase = FORK_READY;
        if (door->ended_by_fork && door->fork)
            SHM_CAS_SEQ(private, door->fork->phase, &phase, FORK_PARENT);
    }
    pthread_mutex_unlock(&doors_mutex); /* in the child too: this thread locked it */
}

static const struct forks_watcher watcher = {before_fork, after_fork};
static void watch_forks(void) { forks_watch(&watcher); }

/* ---- the rest of the interface ---- */

struct rendezvous *rendezvous_take(void)
{
    pthread_once(&doors_once, watch_forks);
    pthread_mutex_lock(&doors_mutex);
    struct rendezvous *door = doors;
    while (door && door->taken)
        door = door->next;
    if (!door && (door = calloc(1, sizeof *door))) {
        forget_descriptors(door);
        door->next = doors;
        doors = door;
    }
    if (door)
        door->taken = true;
    pthread_mutex_unlock(&doors_mutex);
    return door;
}

void rendezvous_give_back(struct rendezvous *door)
{
    pthread_mutex_lock(&doors_mutex);
    end_locked(door);
    door->taken = false;
    pthread_mutex_unlock(&doors_mutex);
}

int rendezvous_open(struct rendezvous *door, const struct descriptors *set, struct fork_page *fork)
{
    int error = 0;
    assert(set->listener >= 0);
    pthread_mutex_lock(&doors_mutex);
    if (atomic_load(&door->open) && door->pid != getpid())
        end_locked(door);
    if (!atomic_load(&door->open))
        error = begin_locked(door, set, fork);
    pthread_mutex_unlock(&doors_mutex);
    return error;
}

void rendezvous_close(struct rendezvous *door)
{
    pthread_mutex_lock(&doors_mutex);
    end_locked(door);
    pthread_mutex_unlock(&doors_mutex);
}

bool rendezvous_is_open(const struct rendezvous *door) { return atomic_load(&door->open); }
