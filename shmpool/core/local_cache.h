/* local_cache.h: the slots this process used last.
 *
 * Private to the process, shared by its threads. An entry is a bare hint: the slot is ours to take while its word says IDLE
 * with our number as owner; anyone else may take it by CAS all the same (a steal), so caching never starves anyone.
 * Entries are not removed when a slot is leased: it will come back to the same place, so a warm round trip does not write here.
 *
 * ORDER(private): relaxed. Threads of one process read and write entries and marks without order; a torn view costs a
 * failed CAS or a slot that stands in the cache twice or in no cache at all, and a scan finds it.
 */
#ifndef SHMPOOL_LOCAL_CACHE_H
#define SHMPOOL_LOCAL_CACHE_H

#include "slab.h"

enum { LOCAL_CACHE_MAX = 64, LOCAL_CACHE_NONE = UINT32_MAX };

struct local_cache {
    uint32_t size;                        /* places in use, 0..LOCAL_CACHE_MAX; never changes */
    a32_shm last;                         /* place of the slot released last */
    a32_shm hand;                         /* the place to be given away next */
    a32_shm entries[LOCAL_CACHE_MAX];     /* slot index, or LOCAL_CACHE_NONE */
};

static inline void local_cache_clear(struct local_cache *cache)
{
    for (uint32_t i = 0; i < LOCAL_CACHE_MAX; i++)
        SHM_STORE(private, cache->entries[i], LOCAL_CACHE_NONE);
    SHM_STORE(private, cache->last, 0);
}

/* Note the release of `slot`, which this process noted last in *place. Returns the slot that lost its place, or NONE. */
static inline uint32_t local_cache_note(struct local_cache *cache, uint32_t slot, a32_shm *place)
{
    uint32_t at = SHM_LOAD(private, *place);
    if (SHM_LIKELY(at < cache->size && SHM_LOAD(private, cache->entries[at]) == slot)) {
        if (SHM_LOAD(private, cache->last) != at)
            SHM_STORE(private, cache->last, at);
        return LOCAL_CACHE_NONE;
    }
    if (!cache->size)
        return slot;
    at = SHM_ADD(private, cache->hand, 1) % cache->size;
    uint32_t out = SHM_LOAD(private, cache->entries[at]);
    SHM_STORE(private, cache->entries[at], slot);
    SHM_STORE(private, *place, at);
    SHM_STORE(private, cache->last, at);
    return out;
}

#endif
