/* rendezvous.h: the thread with which a member of a named pool answers newcomers.
 *
 * A process that has nothing of a pool but its name connects to the pool's socket; whichever member's thread is awake accepts, asks the
 * kernel who that is (SO_PEERCRED: the same user or nobody) and sends the descriptors. The thread runs no Python and takes no lock that
 * anybody else holds, so a member that is busy, in whatever, answers nevertheless; several answer in parallel.
 *
 *   closed --open--> open --close, or a fork of this process--> closed
 *
 * Fork: the thread is ended (and gone from the kernel's list) before a fork() of libc and not begun again by it: neither side forks with
 * a thread of ours in the middle of something, and CPython, which counts threads after a fork, finds nothing to warn of. Each side opens
 * again when it next uses the pool: the child when it registers; the parent because the fork has set its phase to FORK_PARENT, which sends
 * the next get() the long way. A child made by a bare clone() notices by its pid that the thread is not its own.
 *
 * Threads: open and close may be called by any thread. Not here: making and finding the socket (shmpool/rendezvous.py).
 */
#ifndef SHMPOOL_RENDEZVOUS_H
#define SHMPOOL_RENDEZVOUS_H

#include "atomics.h"
#include "descriptors.h"
#include "worker.h"

struct rendezvous;

/* A place in the process-wide list that fork() walks; NULL without memory. */
struct rendezvous *rendezvous_take(void);
void rendezvous_give_back(struct rendezvous *door);
/* Begin to answer for `set`, whose listener must be in non-blocking mode, and which must stay as it is until the close, as must `fork` (NULL: whoever uses this
 * sees to forks). Open already: nothing. 0 or errno. */
int rendezvous_open(struct rendezvous *door, const struct descriptors *set, struct fork_page *fork);
void rendezvous_close(struct rendezvous *door);
bool rendezvous_is_open(const struct rendezvous *door);

#endif
