/* account.c: see account.h. */
#include "account.h"

#include <assert.h>

enum { BUCKET_SHIFT = 1, BUCKET_MASK = 7, COUNT_SHIFT = 4 };

_Static_assert((int)SHM_BUCKETS <= (int)BUCKET_MASK, "a bucket fits into its field");

static unsigned bucket_of(uint64_t lives) { return (unsigned)(lives >> BUCKET_SHIFT) & BUCKET_MASK; }

/* What has ended, of each bucket and in all. */
static uint64_t load_ended(struct account_shm *row, uint64_t ended[SHM_BUCKETS])
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < SHM_BUCKETS; i++)
        sum += ended[i] = SHM_LOAD_ACQUIRE(account, row->ended[i]);
    return sum;
}

void account_begin(struct account_shm *row, unsigned bucket)
{
    assert(bucket < SHM_BUCKETS);
    uint64_t lives = account_lives(row);
    uint64_t next = ((lives >> COUNT_SHIFT) + 1) << COUNT_SHIFT | (uint64_t)bucket << BUCKET_SHIFT | 1;
    SHM_CAS_SEQ(account, row->lives, &lives, next);
}

bool account_end(struct account_shm *row)
{
    uint64_t ended[SHM_BUCKETS], lives = account_lives(row), sum = load_ended(row, ended);
    unsigned bucket = bucket_of(lives);
    if (!account_is_open(lives) || bucket >= SHM_BUCKETS)
        return false;
    if (sum != lives >> COUNT_SHIFT) /* else who began to end it has died since */
        SHM_CAS_SEQ(account, row->ended[bucket], &ended[bucket], ended[bucket] + 1);
    return SHM_CAS_SEQ(account, row->lives, &lives, lives & ~UINT64_C(1));
}

bool account_read(struct account_shm *row, uint64_t lives, struct account *out)
{
    uint64_t sum = load_ended(row, out->begun);
    unsigned bucket = bucket_of(lives);
    out->open = account_is_open(lives) && bucket < SHM_BUCKETS ? bucket : SHM_BUCKETS;
    if (out->open < SHM_BUCKETS && sum != lives >> COUNT_SHIFT)
        out->begun[bucket]++;
    return account_lives(row) == lives;
}
