/* recovery.h: taking back what dead workers held.
 *
 * Whoever holds the lock on byte i acts for worker i, so the lock is the right to recover, the mutex of recovery, and frees itself if the
 * recoverer dies: the next one begins again. It is held for the whole sweep: "look, then sweep" would sweep a newcomer's leases.
 *
 *   what the dead held            becomes
 *   LEASED DIALING CHECKING       RETIRING by the recoverer, ended through its letter, EMPTY (its protocol state is unknown)
 *   RETIRING                      the same
 *   OFFERED to it                 IDLE
 *   IDLE, usable by all           stays, and is noted in the free-list
 *   IDLE, private to it           RETIRING ... EMPTY
 *   its places in the queue       FREE
 *
 * Invariants: recovering twice is recovering once; a death at any step leaves what a next recovery understands: a slot that
 * the recoverer took is owned by the recoverer.
 */
#ifndef SHMPOOL_RECOVERY_H
#define SHMPOOL_RECOVERY_H

#include "pool.h"

#define RECOVERY_INTERVAL_NS UINT64_C(10000000)

/* Leaving: end our own leases and what else is ours and at rest. */
void recovery_sweep_own(struct pool *pool);
/* Sweep what worker number `dead` left; the caller holds its byte lock (or is about to become that number). Returns slots freed. */
uint32_t recovery_sweep(struct pool *pool, uint32_t dead);
/* Has nobody looked for RECOVERY_INTERVAL_NS? */
bool recovery_is_due(struct pool *pool);
/* Look for dead workers and sweep them. Unless `now_please`, does nothing when somebody looked within RECOVERY_INTERVAL_NS, looks
 * only at those who hold something that a waiter could have, and stops after the first of the dead that did (the next call goes on).
 * Returns how many slots became free. Blocks up to CONNECTION_LINGER_NS for each 64 connections of the dead. */
uint32_t recovery_run(struct pool *pool, bool now_please);

#endif
