/* worker.h: who takes part: registration, liveness, fork.
 *
 * A worker is alive while it holds an F_OFD_SETLK write lock on byte `index` of the slab's file, through a descriptor
 * ("seat") whose open file description is its own. The kernel drops the lock when the last copy of that descriptor is closed: at any death.
 * Whoever gets the lock of a byte may act for that index, and must first sweep what its last holder left (recovery.c).
 * In addition every process of a family holds, through the inherited slab descriptor, a read lock on SHM_FAMILY_BYTE:
 * "somebody still has this slab", also before it registers.
 *
 *   worker row:  FREE --worker_register (lock held)--> ACTIVE --worker_leave or recovery (lock held)--> FREE
 *
 * Fork: a child inherits the parent's seat and would keep the parent's lock alive. pthread_atfork closes it in the child
 * at once. A page with MADV_WIPEONFORK (Linux 4.14) reads as zeros in every child, however it was made: the hot path reads its
 * phase word and so knows at no cost that it has to register anew.
 *
 * Sources: OFD locks: fcntl(2); the reasons against pids, robust mutexes and POSIX locks: docs/design.md, "worker".
 *
 * ORDER(worker): acquire/release. A row's fields are written under the byte's lock and published by its state.
 * ORDER(seat): acquire/release between threads of one process and its forked child: a seat is closed once.
 */
#ifndef SHMPOOL_WORKER_H
#define SHMPOOL_WORKER_H

#include <pthread.h>

#include "slab.h"

#define SHM_FAMILY_BYTE (INT64_C(1) << 20)
#define SHM_REMOVER_BYTE (SHM_FAMILY_BYTE + 1) /* segment.h */
#define SHM_MAINTAINER_BYTE (SHM_FAMILY_BYTE + 2) /* pool_be_maintainer() */
enum { SHM_PATH_BYTES = 160 }; /* of a segment's path */

/* A descriptor that a forked child must close. Nodes are never freed: the atfork handler may walk them at any moment. */
struct seat {
    _Atomic(int) fd; /* -1: none */
    uint64_t inode;  /* of the file it opened: the program may have closed it behind our back, and use the number again */
    struct seat *next;
    atomic_bool taken;
    int slab_fd; /* of the handle that has the seat, and where the segment is: for exit() alone (segment.c); -1, "" */
    char path[SHM_PATH_BYTES];
};

/* FORK_PARENT: ready as well, but this process has forked since it last answered newcomers, and should begin again (rendezvous.h) */
enum fork_phase { FORK_WIPED = 0, FORK_CHANGING = 1, FORK_READY = 2, FORK_PARENT = 3 };
struct fork_page {
    a32_shm phase;
    a32_shm service_users; /* threads of this process in service_next() (service.h) */
};

/* What a fork() must not meet half done: forks of other threads wait from hold to release, some milliseconds at most. Between them this
 * thread waits for nobody who might fork. */
void forks_hold(void);
void forks_release(void);
/* Call these around every fork() of libc as well, beside what is done for the seats; `after` on both sides. For one caller (rendezvous.c). */
struct forks_watcher {
    void (*before)(void), (*after)(void);
};
void forks_watch(const struct forks_watcher *watcher);

/* One seat node out of the process-wide list; NULL without memory. */
struct seat *seat_take(void);
/* The list, from its begin to NULL by `next`; nodes stay for ever. */
struct seat *seat_first(void);
/* Open the file of `slab_fd` anew: a description of its own; -1 (errno). */
int file_open_anew(int slab_fd);
/* The same, into the seat; 0 or errno. */
int seat_open(struct seat *seat, int slab_fd);
void seat_close(struct seat *seat);
void seat_give_back(struct seat *seat);

/* A page that a fork wipes; NULL when the kernel has none (errno). */
struct fork_page *fork_page_new(void);
void fork_page_free(struct fork_page *page);

/* Take the write lock of a byte; true when we have it (also when this description had it before). */
bool byte_lock(int fd, int64_t byte);
void byte_unlock(int fd, int64_t byte);
/* Hold a read lock on the family byte for as long as `fd`'s description lives. */
bool family_join(int fd);
/* Does a description other than fd's hold a lock on the byte? Works with a read-only descriptor. */
bool byte_is_locked(int fd, int64_t byte);

#endif
