/* recovery.c: see recovery.h. The least-run code of the core, so it is kept the shortest. */
#include "recovery.h"

#include <assert.h>

#include "connection.h"
#include "events.h"
#include "freelist.h"
#include "service.h"

enum { BATCH = 64 };

/* Take over one slot of the dead for closing; true when it now is RETIRING by us. */
static bool take_over(struct pool *pool, uint32_t slot, uint32_t dead, unsigned reason, struct pool_claim *claim)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    uint64_t word = slot_load(row);
    enum slot_state state = slot_state(word);
    if (slot_owner(word) != dead || state == SLOT_EMPTY)
        return false;
    if (state == SLOT_OFFERED) {
        if (slot_move(row, &word, SHM_NO_WORKER, SLOT_IDLE))
            pool_count_total(pool, SHM_T_recovered_offers, 1);
        state = SLOT_IDLE;
    }
    if (state == SLOT_IDLE && !(SHM_LOAD(row, row->kind) & SHM_KIND_PRIVATE)) {
        freelist_put_idle(&pool->slab, slot);
        return false;
    }
    if (state == SLOT_LEASED && reason == SHM_T_closed_owner_died)
        pool_count_total(pool, SHM_T_recovered_leases, 1);
    *claim = (struct pool_claim){.slot = slot, .word = word};
    return slot_may_move(state, SLOT_RETIRING) && slot_move(row, &claim->word, pool->worker, SLOT_RETIRING);
}

/* Sweep the slots of `dead` that are in one of `states` (bits). */
static uint32_t sweep_slots(struct pool *pool, uint32_t dead, unsigned states, unsigned reason)
{
    struct pool_claim claims[BATCH];
    uint32_t freed = 0, count = 0;
    pool_count_total(pool, SHM_T_recovered_waiters, waiter_forget(&pool->slab, dead)); /* first: no more offers to the dead */
    upstream_forget(&pool->slab, dead, clock_now());
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++) {
        if (states >> slot_state(slot_load(&pool->slab.slots[slot])) & 1)
            count += take_over(pool, slot, dead, reason, &claims[count]);
        if (count == BATCH || (count && slot + 1 == pool->slab.layout.max_slots)) {
            pool_end(pool, claims, NULL, count, CONNECTION_LINGER_NS);
            for (freed += count; count; count--)
                pool_empty(pool, &claims[count - 1], reason);
        }
    }
    waiter_wake_first(&pool->slab, WAITER_ANY_BUCKET);
    return freed;
}

uint32_t recovery_sweep(struct pool *pool, uint32_t dead)
{
    uint32_t freed = sweep_slots(pool, dead, ~0u, SHM_T_closed_owner_died);
    service_doubt(&pool->slab); /* it may have died with an event in its hands */
    return freed;
}

void recovery_sweep_own(struct pool *pool)
{
    sweep_slots(pool, pool->worker, 1u << SLOT_LEASED | 1u << SLOT_OFFERED | 1u << SLOT_IDLE, SHM_T_closed_shutdown);
}

static uint32_t recover_one(struct pool *pool, int fd, uint32_t index)
{
    struct worker_shm *row = &pool->slab.workers[index];
    if (SHM_LOAD_ACQUIRE(worker, row->state) != SHM_WORKER_ACTIVE || index + 1 == pool->worker ||
        byte_is_locked(fd, index) || !byte_lock(fd, index))
        return 0;
    uint32_t freed = 0;
    if (SHM_LOAD_ACQUIRE(worker, row->state) == SHM_WORKER_ACTIVE) { /* not recovered by another meanwhile */
        freed = recovery_sweep(pool, index + 1);
        pool_count_total(pool, SHM_T_recoveries, 1);
        event_note(&pool->slab, (struct event){.kind = EVENT_died, .slot = EVENT_NO_SLOT, .pid = SHM_LOAD(hint, row->pid), .value = freed});
        SHM_STORE_RELEASE(worker, row->state, SHM_WORKER_FREE);
    }
    byte_unlock(fd, index);
    return freed;
}

/* ---- who to look at ---- */

typedef uint64_t worker_set[(SHM_MAX_WORKERS + 64) / 64]; /* by worker number, from 1 on */

static void note(worker_set set, uint32_t worker)
{
    if (worker <= SHM_MAX_WORKERS)
        set[worker / 64] |= UINT64_C(1) << worker % 64;
}

/* Who has what a waiter could have, or stands in its way. Each look at a lock takes the kernel as long as there are workers; those who
 * have nothing can wait for maintenance. */
static void note_holders(struct pool *pool, worker_set set)
{
    struct slab *slab = &pool->slab;
    uint64_t upstream = SHM_LOAD(hint, slab->header->upstream);
    for (uint32_t slot = 0; slot < slab->layout.max_slots; slot++) {
        uint64_t word = SHM_LOAD(hint, slab->slots[slot].word);
        if (slot_state(word) != SLOT_IDLE || SHM_LOAD(row, slab->slots[slot].kind) & SHM_KIND_PRIVATE)
            note(set, slot_owner(word));
    }
    for (uint32_t cell = 0; cell < slab->layout.max_waiters; cell++)
        note(set, waiter_owner(SHM_LOAD(hint, slab->waiter_words[cell])));
    if (upstream_state(upstream) == UPSTREAM_PROBING)
        note(set, upstream_owner(upstream));
}

bool recovery_is_due(struct pool *pool)
{
    return clock_coarse() - SHM_LOAD(hint, pool->slab.header->recovery_checked_ns) >= RECOVERY_INTERVAL_NS;
}

uint32_t recovery_run(struct pool *pool, bool now_please)
{
    assert(pool->worker);
    if (!now_please && !recovery_is_due(pool))
        return 0;
    SHM_STORE(hint, pool->slab.header->recovery_checked_ns, clock_coarse());
    if (atomic_exchange_explicit(&pool->recovering, true, memory_order_acquire))
        return 0; /* a thread of ours is at it */
    pool_end_again(pool);
    uint32_t freed = 0;
    worker_set holders = {0};
    bool whoever = now_please || pool->slab.header->listening; /* one may have died with an event in its hands, and nothing else */
    if (!whoever)
        note_holders(pool, holders);
    int fd = atomic_load_explicit(&pool->seat->fd, memory_order_acquire);
    for (uint32_t index = 0; fd >= 0 && index < pool->slab.layout.max_workers; index++) {
        if (!whoever && !(holders[(index + 1) / 64] >> (index + 1) % 64 & 1))
            continue;
        freed += recover_one(pool, fd, index);
        if (freed && !now_please) { /* somebody waits for a slot, and each of the dead may cost a linger: use what there is first */
            SHM_STORE(hint, pool->slab.header->recovery_checked_ns, 0);
            break;
        }
    }
    atomic_store_explicit(&pool->recovering, false, memory_order_release);
    return freed;
}
