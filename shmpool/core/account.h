/* account.h: how many connections a slot has had, of which kind, and whether it has one now, so that in every snapshot created - closed
 * is what there is, also after deaths. Counters apart from each other could not say that: who dies between two of them leaves them apart.
 *
 *   lives            [connections there have been:60 | bucket of the last:3 | it is open:1]
 *   ended[bucket]    how many of them have ended
 *
 *   function        who                                     steps
 *   account_begin   the dialler, DIALING, just before       lives: one more, of that bucket, open
 *                   LEASED
 *   account_end     the closer, RETIRING, before EMPTY      1. ended[bucket] + 1   2. lives: not open
 *
 * Invariant: the sum of ended[] is the number of lives, less one while one is open; between steps 1 and 2 of an end it is the number of lives
 * already. So who reads, or goes on for a closer that died there, can tell that step 1 was done. A slot that is EMPTY has none open; one
 * that is LEASED, IDLE, CHECKING or OFFERED has.
 *
 * ORDER(account): seq_cst, acquire for who only reads. Pairs with itself and with ORDER(slot): a reader that finds the same `lives` before and after
 * a slot word knows that they belong together. Reasons of closing (totals_shm) are counted after account_end(), and read before the accounts:
 * weaker, and more reasons than ends would be seen.
 *
 * Not here: why connections end (the totals), when (pool.c).
 */
#ifndef SHMPOOL_ACCOUNT_H
#define SHMPOOL_ACCOUNT_H

#include "slab.h"

/* What an account says: of each bucket how many there have been, and which one is open now (SHM_BUCKETS: none). */
struct account {
    uint64_t begun[SHM_BUCKETS];
    unsigned open;
};

void account_begin(struct account_shm *row, unsigned bucket);
/* False: none was open. Once more does nothing. */
bool account_end(struct account_shm *row);
/* Read it; false when it changed meanwhile (`lives`, seen before, is another by now): read again. */
bool account_read(struct account_shm *row, uint64_t lives, struct account *out);

static inline uint64_t account_lives(struct account_shm *row) { return SHM_LOAD_ACQUIRE(account, row->lives); }
static inline bool account_is_open(uint64_t lives) { return lives & 1; }

#endif
