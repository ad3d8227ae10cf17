/* steering.c: see steering.h. */
#include "steering.h"

#include <assert.h>
#include <string.h>

#include "events.h"
#include "freelist.h"

static const char *const state_names[] = {"open", "paused", "draining", "closed"}; /* in the order of enum pool_state */
_Static_assert(sizeof state_names / sizeof *state_names == (SHM_STATE_MASK >> SHM_STATE_SHIFT) + 1, "each state has a name");

const char *steering_state_name(enum pool_state state) { return state_names[state]; }

bool steering_state_named(const char *name, enum pool_state *state)
{
    for (*state = SHM_POOL_OPEN; *state <= SHM_POOL_CLOSED; (*state)++)
        if (strcmp(name, state_names[*state]) == 0)
            return true;
    return false;
}

bool steering_state(struct slab *slab, enum pool_state to)
{
    uint64_t summary = SHM_LOAD_SEQ(queue, slab->header->summary), said;
    do {
        uint64_t state = summary >> SHM_STATE_SHIFT;
        if (state == SHM_POOL_CLOSED || state == (uint64_t)to)
            return false;
        said = (summary & ~SHM_STATE_MASK) | (uint64_t)to << SHM_STATE_SHIFT;
    } while (!SHM_CAS_SEQ(queue, slab->header->summary, &summary, said));
    event_note(slab, (struct event){.kind = EVENT_state, .reason = (uint8_t)to, .slot = EVENT_NO_SLOT});
    waiter_wake_all(slab);
    return true;
}

bool steering_condemn(struct slab *slab, uint32_t slot, uint64_t connection, uint64_t why)
{
    struct slot_shm *row = &slab->slots[slot];
    if (SHM_LOAD(row, row->connection) != connection || slot_state(slot_load(row)) == SLOT_EMPTY)
        return false;
    SHM_STORE(row, row->expires_ns, why);
    SHM_OR(row, row->kind, SHM_KIND_ENDING);
    return true;
}

static bool peer_fits(struct slot_shm *row, const void *peer, size_t peer_size)
{
    uint64_t words[3];
    for (int i = 0; i < 3; i++)
        words[i] = SHM_LOAD(row, row->peer[i]);
    return peer_size <= sizeof words && memcmp(words, peer, peer_size) == 0;
}

uint32_t steering_evict(struct slab *slab, uint64_t connection, const void *peer, size_t peer_size, bool leased)
{
    uint32_t found = 0;
    for (uint32_t slot = 0; slot < steering_bound(slab); slot++) {
        struct slot_shm *row = &slab->slots[slot];
        uint64_t id = SHM_LOAD(row, row->connection);
        enum slot_state state = slot_state(slot_load(row));
        bool is_there = state == SLOT_IDLE || (leased && (state == SLOT_LEASED || state == SLOT_OFFERED || state == SLOT_CHECKING));
        if (!is_there || (connection && id != connection) || !peer_fits(row, peer, peer_size))
            continue;
        found += steering_condemn(slab, slot, id, SHM_EXPIRES_EVICTED);
    }
    if (found)
        event_note(slab, (struct event){.kind = EVENT_evicted, .slot = EVENT_NO_SLOT, .value = found});
    return found;
}

void steering_enforce(struct slab *slab)
{
    for (uint32_t slot = steering_cap(slab); slot < steering_bound(slab); slot++)
        if (slot_state(slot_load(&slab->slots[slot])) != SLOT_EMPTY)
            steering_condemn(slab, slot, SHM_LOAD(row, slab->slots[slot].connection), SHM_EXPIRES_RESIZED);
}

uint32_t steering_resize(struct slab *slab, uint32_t cap)
{
    assert(cap && cap <= slab->layout.max_slots);
    uint32_t bound = SHM_LOAD_SEQ(cap, slab->header->bound);
    while (bound < cap && !SHM_CAS_SEQ(cap, slab->header->bound, &bound, cap))
        ;
    uint32_t before = SHM_SWAP_SEQ(cap, slab->header->cap, cap);
    steering_enforce(slab); /* also of a cap that is not smaller: who lowered it before us may have died before this */
    for (uint32_t slot = before; slot < cap; slot++)
        freelist_put(slab, SHM_EMPTY_LIST, slot);
    if (cap != before)
        event_note(slab, (struct event){.kind = EVENT_resized, .slot = EVENT_NO_SLOT, .value = cap});
    if (cap > before)
        waiter_wake_all(slab);
    return before;
}

static uint32_t count_used(const struct slab *slab, uint32_t from, uint32_t to)
{
    uint32_t used = 0;
    for (uint32_t slot = from; slot < to; slot++)
        used += slot_state(slot_load(&slab->slots[slot])) != SLOT_EMPTY;
    return used;
}

bool steering_has_permit(const struct slab *slab, uint32_t slot)
{
    uint32_t cap = steering_cap(slab), bound = steering_bound(slab);
    if (slot >= cap)
        return false;
    uint32_t beyond = count_used(slab, cap, bound);
    return SHM_LIKELY(!beyond) || count_used(slab, 0, cap) + beyond <= cap;
}

bool steering_has_room(const struct slab *slab) { return count_used(slab, 0, steering_bound(slab)) < steering_cap(slab); }
