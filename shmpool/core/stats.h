/* stats.h: counters and log-linear histograms in the slab.
 *
 * A worker's block has one writing process (several threads); a block belongs to an *index*, and who takes the index over
 * goes on counting where the last one stopped. So the sum over all blocks is the sum over all workers, living and
 * departed, with nothing to fold when one dies.
 * Rare events (totals_shm) are counted by all processes with an atomic add.
 *
 * Histogram: 32 buckets per power of two from 64 ns to 137 s (values outside go to the first or last bucket), so the middle
 * of a bucket is at most 1.6 % from any value in it. Source: HdrHistogram's log-linear layout.
 *
 * Warm leases are timed by sample (pool.c, timing_due): a sample of weight w stands for w leases.
 */
#ifndef SHMPOOL_STATS_H
#define SHMPOOL_STATS_H

#include <time.h>

#include "slab.h"

static inline uint64_t clock_read(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}
/* nanoseconds; 22 ns a reading */
static inline uint64_t clock_now(void) { return clock_read(CLOCK_MONOTONIC); }
/* the same clock as of the last tick (1-4 ms old); 3 ns a reading */
static inline uint64_t clock_coarse(void) { return clock_read(CLOCK_MONOTONIC_COARSE); }

static inline uint32_t hist_bucket(uint64_t ns)
{
    if (ns < UINT64_C(1) << SHM_HIST_FIRST_OCTAVE)
        return 0;
    uint32_t octave = 63 - (uint32_t)__builtin_clzll(ns);
    if (octave >= SHM_HIST_FIRST_OCTAVE + SHM_HIST_OCTAVES)
        return SHM_HIST_BUCKETS - 1;
    uint32_t sub = (uint32_t)(ns >> (octave - SHM_HIST_SUB_BITS)) & ((1u << SHM_HIST_SUB_BITS) - 1);
    return (octave - SHM_HIST_FIRST_OCTAVE) << SHM_HIST_SUB_BITS | sub;
}

/* the smallest value that belongs to a bucket; of SHM_HIST_BUCKETS: the end of the last one */
static inline uint64_t hist_lower(uint32_t bucket)
{
    uint32_t octave = (bucket >> SHM_HIST_SUB_BITS) + SHM_HIST_FIRST_OCTAVE;
    uint64_t sub = bucket & ((1u << SHM_HIST_SUB_BITS) - 1);
    return ((UINT64_C(1) << SHM_HIST_SUB_BITS) + sub) << (octave - SHM_HIST_SUB_BITS);
}

static inline void hist_add(struct hist_shm *hist, uint64_t ns, uint64_t weight)
{
    SHM_ADD(count, hist->buckets[hist_bucket(ns)], weight);
}

#endif
