/* steering.h: changing a pool while it runs: its state, its cap, which connections shall end. On the slab alone, so that who is no
 * member of the pool can do it too.
 *
 *   from               to         function          meaning
 *   OPEN, DRAINING     PAUSED     steering_state    who wants a connection waits
 *   OPEN, PAUSED       DRAINING   steering_state    who waits already is served, later ones are refused; what is idle or returned ends
 *   PAUSED, DRAINING   OPEN       steering_state    as before
 *   any                CLOSED     steering_state    for ever
 *
 * The state is the upper two bits of the summary: a warm get() and release() look at one word for it and for the waiters, and who steers changes it in one
 * step, so that nobody can die, or be overtaken, halfway.
 *
 * The cap: only slots below `cap` open connections. A smaller cap leaves connections beyond it (in slots from `cap` to `bound`), which end when they are
 * idle or returned. While there is one, who opens a connection counts all (pool_take_empty).
 * ORDER(cap): seq_cst. Who claims an empty slot claims it and then looks at the cap; who lowers the cap stores it and then looks at the slots: one of
 * the two sees the other. `bound` is raised before `cap`: who finds a slot used finds it within the bound. Weaker: a connection that
 * neither counts, or that no scan meets.
 *
 * A condemned connection has SHM_KIND_ENDING and an expires_ns that says why. Both are hints of a kind: set beside a new connection of the slot by a
 * race, they end that one at its first return, and nothing is lost.
 *
 * Not here: ending connections (pool.c), who may steer (the segment's owner and mode).
 */
#ifndef SHMPOOL_STEERING_H
#define SHMPOOL_STEERING_H

#include "slot.h"
#include "waiter.h"

/* "open", "paused", ...; "invalid" for what is no state */
const char *steering_state_name(enum pool_state state);
/* false: there is no such state */
bool steering_state_named(const char *name, enum pool_state *state);

static inline enum pool_state steering_now(const struct slab *slab)
{
    return (enum pool_state)(SHM_LOAD_SEQ(queue, slab->header->summary) >> SHM_STATE_SHIFT);
}

/* Change the state and wake all waiters (who dies between the two leaves them asleep for a WAITER_SLICE_NS at most). False: it is closed, or in that
 * state already. */
bool steering_state(struct slab *slab, enum pool_state to);
/* Slots that may be used: [0, bound). */
static inline uint32_t steering_bound(const struct slab *slab)
{
    uint32_t bound = SHM_LOAD_SEQ(cap, slab->header->bound);
    return SHM_LIKELY(bound <= slab->layout.max_slots) ? bound : slab->layout.max_slots;
}
static inline uint32_t steering_cap(const struct slab *slab)
{
    uint32_t cap = SHM_LOAD_SEQ(cap, slab->header->cap);
    return SHM_LIKELY(cap <= slab->layout.max_slots) ? cap : slab->layout.max_slots;
}
/* Make it `cap` (1..max_slots): condemn what is beyond it, wake all waiters when it grows. Returns what it was. */
uint32_t steering_resize(struct slab *slab, uint32_t cap);
/* Condemn the connection of a slot, which was seen with that id; `why`: SHM_EXPIRES_*. False: it is another one by now. */
bool steering_condemn(struct slab *slab, uint32_t slot, uint64_t connection, uint64_t why);
/* Condemn every connection of that id (0: any) whose peer begins with these bytes (none: any); `leased`: also those that are in use, else only
 * idle ones. How many there were. */
uint32_t steering_evict(struct slab *slab, uint64_t connection, const void *peer, size_t peer_size, bool leased);
/* Condemn what is open beyond the cap (again, in maintenance: who lowered it may have died in the middle). */
void steering_enforce(struct slab *slab);
/* Is less open than the cap allows? */
bool steering_has_room(const struct slab *slab);
/* Does that slot, DIALING by the caller, keep the cap? */
bool steering_has_permit(const struct slab *slab, uint32_t slot);

#endif
