/* freelist.h: the shared hint of which slots are idle, one bitmap per bucket, and of which are empty.
 *
 * A set bit says "perhaps idle (empty)"; the slot word decides. Setting a bit twice is harmless, a bit lost to a death costs
 * a scan of the slot words (pool.c: every get() scans before it dials, evicts or sleeps). So nothing here needs repair, and a
 * linked list, which a second push would tie into a ring, is not used.
 *
 * A word in the header says which lists may have any bit at all, so that an empty list costs a load and not a walk.
 *
 * ORDER(freelist): relaxed. Bits are hints (see above); the slot word that is checked next carries the order.
 */
#ifndef SHMPOOL_FREELIST_H
#define SHMPOOL_FREELIST_H

#include "slab.h"

/* Say that `slot` is perhaps free in `list` (a bucket, or SHM_EMPTY_LIST). */
void freelist_put(struct slab *slab, unsigned list, uint32_t slot);
/* Say that `slot` is perhaps idle in the bucket of its connection. */
void freelist_put_idle(struct slab *slab, uint32_t slot);
/* Take a hint out of `list`, searching from slot `start` on and around; -1 when there is none. */
int64_t freelist_take(struct slab *slab, unsigned list, uint32_t start);

#endif
