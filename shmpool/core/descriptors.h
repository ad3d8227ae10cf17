/* descriptors.h: handing a pool's descriptors to a process that did not inherit them.
 *
 * What a process needs of a pool is the slab's file, the mailbox of each slot and, of a named pool, the socket on which newcomers
 * ask. They travel over one connected AF_UNIX/SOCK_SEQPACKET socket as a few messages with SCM_RIGHTS:
 *
 *   {first 0, count 0}  with the slab [and the listener]
 *   {first 0, count n}  with the mailboxes 0 .. n-1
 *   {first n, ...}      and so on, until `total` mailboxes went
 *
 * So however large the pool is, one descriptor (the receiving end) is enough to pass it on: through a fork server, a pickle, or accept().
 *
 * Invariant: a set is complete or not at all; on any failure every descriptor received so far is closed. Whether they are the
 * right ones is for the receiver to check (pool_attach compares inodes with the slab).
 *
 * Not here: who may ask (rendezvous.h), what is done with them (pool.c).
 */
#ifndef SHMPOOL_DESCRIPTORS_H
#define SHMPOOL_DESCRIPTORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct descriptors {
    uint8_t slab_id[16];
    int slab, listener; /* listener: -1 when the pool has none */
    uint32_t count;
    int *mailboxes;
};

/* Send the whole set over `to`, a socket in non-blocking mode, within `timeout_ns`; ends early when `stop` becomes readable (-1:
 * nothing stops it). 0 or errno: EPIPE the receiver left, ETIMEDOUT it does not read, ETOOMANYREFS too many are under way, all that time, ECANCELED
 * stopped. */
int descriptors_send(int to, const struct descriptors *set, int stop, uint64_t timeout_ns);
/* Wait until there is something to receive, or its sender has gone. 0, or ETIMEDOUT. */
int descriptors_await(int from, uint64_t timeout_ns);
/* Receive a whole set. 0 or errno: ECONNRESET the sender left before the end, ETIMEDOUT, EMFILE this process has no room,
 * EPROTO it was no set. On 0 the caller owns set->mailboxes (malloc) and all descriptors. */
int descriptors_receive(int from, struct descriptors *set, uint64_t timeout_ns);
/* Close all of them and free the list. */
void descriptors_close(struct descriptors *set);

#endif
