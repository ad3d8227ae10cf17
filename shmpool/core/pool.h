/* pool.h: one process's handle on the pool, and the order of get() and release() without Python.
 *
 * The handle is private memory: it maps the slab, holds the mailboxes and what this process knows of each connection (entries).
 * Several handles fit into one process (C tests let threads play worker processes).
 *
 * The order of a get (pool_take): local cache -> free-list -> steal by scan -> an offer nobody claimed -> a dial under way that
 * nobody waits for -> an empty slot (dial) -> recovery of the dead, once more -> retire an idle connection of another kind ->
 * nothing: wait.
 *
 * Threads: all functions may be called by several threads of a process at once. What belongs to a slot (its entry, row and
 * mailbox) is touched only by the thread that holds the slot; ORDER(slot) passes it on.
 *
 * Not here: Python objects, sleeping with the GIL, dialling, hooks (module.c); who is dead (recovery.c).
 */
#ifndef SHMPOOL_POOL_H
#define SHMPOOL_POOL_H

#include "descriptors.h"
#include "local_cache.h"
#include "mailbox.h"
#include "rendezvous.h"
#include "slot.h"
#include "stats.h"
#include "steering.h"
#include "upstream.h"
#include "waiter.h"
#include "worker.h"

/* What this process knows of a slot's connection. Touched by the thread that holds the slot; `place` by any. */
struct entry {
    uint64_t connection; /* the connection that fd and the objects belong to; 0: none */
    int fd;
    a32_shm place;       /* where the slot stands in the local cache */
    const char *dirty;   /* nonzero there: the holder may have changed the socket's mode, or closed it */
    a32_shm unended;     /* private: the connection, RETIRING by us, could not be ended yet: 1 + why it ends, or UNENDED_JUST_NOW; else 0 */
    void *socket, *session, *note; /* of module.c */
};

struct service; /* service.h */

struct pool_options {
    uint32_t local_cache_size;
    uint64_t alive_bypass_ns, idle_timeout_ns;
    uint64_t udp_clear_timeout_ns;
    uint32_t udp_clear_max_packets;
    bool clear_udp_buffer, stats;
    uint32_t min_connections, idle_limit; /* idle_limit: one more than may be idle; 0: there is none */
    struct upstream_backoff backoff;
};

/* A connection that this process has ended, for whoever wants to be told (module.c). */
struct ended {
    struct ended *next;
    uint64_t connection, age_ns, uses, peer[3];
    uint32_t slot, kind, reason; /* SHM_T_closed_* */
};

struct pool {
    struct slab slab;
    struct fork_page *fork;
    uint32_t worker;     /* our number (index + 1), 0 before registration */
    uint32_t generation; /* raised in each forked child: leases of another generation are not ours */
    struct worker_shm *row;
    struct pool_options options;
    struct entry *entries;
    int *mailboxes;
    uint64_t slab_inode; /* slab_fd may be closed and reused behind our back; 0: not looked at */
    int slab_fd;
    struct descriptors shared; /* slab_fd, listener and mailboxes, for newcomers; owns the listener alone */
    struct rendezvous *door;   /* answers newcomers of a pool with a listener; else NULL */
    a32_shm unended;       /* private: how many entries are */
    _Atomic(int) spare_fd; /* given up for a moment when a letter must be read and no descriptor is left */
    uint32_t pid;
    struct seat *seat;
    /* A thread of ours sweeps; OFD locks do not exclude threads of one process. Taken with acquire, given back with release: the
     * next sweeper sees the seat as the last one left it. Never crosses the process border. */
    atomic_bool recovering;
    _Atomic(struct ended *) ended; /* what pool_empty() has noted, latest first: pushed by any thread, taken whole */
    bool notes_ended;
    a64_shm timing_tick;    /* private: when the last sample was taken, and leases since */
    a32_shm timing_count;
    struct service *service; /* NULL: connections are dialled, not accepted */
    struct local_cache cache;
};

enum pool_verdict { POOL_OK, POOL_ERRNO, POOL_NO_WORKER, POOL_LOST_DESCRIPTORS, POOL_BAD_SLAB };

/* Format a new slab in the file `slab_fd` and join it. `listener`: a listening socket for newcomers, or -1. The handle takes both
 * descriptors over. errno on POOL_ERRNO. After any failure: pool_free. */
enum pool_verdict pool_create(struct pool *pool, int slab_fd, int listener, const struct slab_layout *layout,
                              const struct slab_identity *who, const struct pool_options *options);
/* Take the notes of ended connections, latest first; the caller frees each. */
struct ended *pool_take_ended(struct pool *pool);
/* Join the pool whose descriptors another process sent; takes the set over, whatever happens. POOL_BAD_SLAB: *why is not SLAB_OK, or the
 * set is not that of the slab (POOL_LOST_DESCRIPTORS). After any failure: pool_free. */
enum pool_verdict pool_attach(struct pool *pool, struct descriptors *set, const struct pool_options *options, enum slab_verdict *why);
/* Answer newcomers, if this pool has a listener and nobody in this process does yet. 0 or errno. */
int pool_answer(struct pool *pool);
/* Give the pool another listener, in place of the one it has, and answer there. 0: the pool owns it; or errno. */
int pool_listen(struct pool *pool, int listener);
/* Register this process (also the first time in a forked child). Cheap when done already. POOL_LOST_DESCRIPTORS: this process has
 * closed the pool's descriptors (a daemon that closes all), so it cannot take part. */
enum pool_verdict pool_join(struct pool *pool);
/* Does this process lease, open or end a connection this moment? */
bool pool_holds_any(struct pool *pool);
/* Leave: give the index back. Leases of this process that are still out are retired; what a thread of ours is opening or ending is
 * waited for a little, and then left to recovery. */
void pool_leave(struct pool *pool);
/* Close mailboxes and slab file; the mapping stays readable. After pool_leave, when nothing is held any more. */
void pool_release_descriptors(struct pool *pool);
/* Free the handle: unmap, close mailboxes and the slab. Does not leave. */
void pool_free(struct pool *pool);

static inline bool pool_joined(const struct pool *pool)
{
    return SHM_LIKELY(SHM_LOAD_ACQUIRE(private, pool->fork->phase) >= FORK_READY);
}
/* Joined, and nothing is due beside the lease. */
static inline bool pool_is_settled(const struct pool *pool)
{
    return SHM_LIKELY(SHM_LOAD_ACQUIRE(private, pool->fork->phase) == FORK_READY);
}
static inline bool pool_is_open(const struct pool *pool) { return steering_now(&pool->slab) != SHM_POOL_CLOSED; }
/* Open, and neither paused nor draining. */
static inline bool pool_is_plain(const struct pool *pool)
{
    return SHM_LIKELY(steering_now(&pool->slab) == SHM_POOL_OPEN);
}

/* ---- get ---- */

enum pool_source { SOURCE_CACHE, SOURCE_FREELIST, SOURCE_STEAL, SOURCE_OFFER, SOURCE_DIAL, SOURCE_SPOKE };

/* A slot that this thread holds, and the word to give it back with. */
struct pool_claim {
    uint32_t slot;
    enum pool_source source;
    uint64_t word;
    uint64_t upstream; /* DIALING: what upstream_ask() said; of an adopted dial: its word is `word` */
    bool alone;        /* DIALING: there is no other connection that could come back meanwhile */
};

enum pool_taken {
    TAKEN_LEASED,  /* an idle connection is ours */
    TAKEN_DIAL,    /* an empty slot is ours (DIALING): connect, then pool_install or pool_abandon */
    TAKEN_EVICTED, /* an idle connection of another kind is ours (RETIRING): end it and take again */
    TAKEN_NOTHING, /* every connection is leased, or opening */
    TAKEN_RECOVER, /* nothing, but it is time to look for the dead: recovery_run (blocks, without the GIL), then take again */
    TAKEN_ADOPTED, /* nothing, but a dial is under way (claim: slot and word) that nobody else waits for: wait */
    TAKEN_DOWN,    /* nothing, and nobody may dial: the server is down */
    TAKEN_PAUSED,
    TAKEN_CLOSED,  /* the pool is closed */
    TAKEN_DRAINING, /* the same for who does not wait already */
    TAKEN_DAMAGED, /* a slot word is in no state that exists */
};

/* local_cache: the warm path. True when a fitting slot was taken. */
static inline bool pool_take_cached(struct pool *pool, uint32_t mask, struct pool_claim *claim);
/* Everything else, in the order above; never blocks. `place`: ours when we are queued, else NULL. */
enum pool_taken pool_take(struct pool *pool, uint32_t mask, struct waiter_place *place, struct pool_claim *claim);

/* Only an empty slot, for a dial that the upstream's state allows: TAKEN_DIAL, TAKEN_DOWN or TAKEN_NOTHING. */
enum pool_taken pool_take_dial(struct pool *pool, bool waits, struct pool_claim *claim);
/* Only an empty slot: DIALING. */
bool pool_take_empty(struct pool *pool, struct pool_claim *claim);
/* DIALING: say for which buckets; `orphan`: nobody waits for it. */
void pool_announce_dial(struct pool *pool, const struct pool_claim *claim, uint32_t mask, bool orphan);
/* Whoever began that dial does not wait for it any more: it may be adopted. */
void pool_orphan_dial(struct pool *pool, const struct pool_claim *claim);
/* Is that dial still under way, or its connection still in the hands of the dialler? */
static inline bool pool_dial_goes_on(struct pool *pool, const struct pool_claim *claim)
{
    uint64_t word = slot_load(&pool->slab.slots[claim->slot]);
    return word == claim->word || word == slot_next(claim->word, slot_owner(claim->word), SLOT_LEASED);
}
/* Connections there are, or are being opened or closed; those of them that are idle. */
uint32_t pool_count_used(struct pool *pool);
uint32_t pool_count_idle(struct pool *pool);

enum pool_condition { CONDITION_GOOD, CONDITION_BROKEN, CONDITION_DIRTY, CONDITION_IDLE, CONDITION_LIFETIME };
/* The part of validation that needs the descriptor: liveness, stray datagrams. */
enum pool_condition pool_check(struct pool *pool, uint32_t slot, int fd);
/* Is the leased connection fit for use at (coarse) `now`? */
static inline enum pool_condition pool_validate(struct pool *pool, uint32_t slot, int fd, uint64_t now);

/* ---- a connection's life; the caller holds the slot ---- */

struct pool_birth {
    unsigned bucket;
    uint32_t flags;          /* SHM_KIND_* */
    uint64_t expires_ns;     /* UINT64_MAX: never */
    uint64_t peer[3];
    uint64_t took_ns;        /* the dial, for the event; 0: not known */
};

/* DIALING: the id under which the connection will be known (for the letter). */
uint64_t pool_name_connection(struct pool *pool, struct pool_claim *claim);
/* DIALING -> LEASED: fill the row. The letter has been deposited, or flags say that it was not. */
bool pool_install(struct pool *pool, struct pool_claim *claim, const struct pool_birth *birth);
/* DIALING -> EMPTY: the dial failed; what it left in the mailbox is ended. Blocks up to CONNECTION_LINGER_NS. */
void pool_abandon(struct pool *pool, struct pool_claim *claim);
/* LEASED, IDLE or CHECKING -> RETIRING: from now on nobody else may have it. False: it was not ours any more. */
bool pool_condemn(struct pool *pool, struct pool_claim *claim);
/* RETIRING: end connections for all processes, each by the caller's descriptor, else by its letter. `fds` may be NULL, and an element
 * -1. Blocks up to `linger_ns`, once for all. The caller then closes its own copies and calls pool_empty for each. */
void pool_end(struct pool *pool, struct pool_claim *claims, const int *fds, size_t count, uint64_t linger_ns);
/* RETIRING -> EMPTY: the permit is free. `reason` is a counter SHM_T_closed_*. A connection that pool_end() could not end, because this process has no
 * descriptor left to fetch it with, stays RETIRING, with its permit, for pool_end_again(). */
void pool_empty(struct pool *pool, struct pool_claim *claim, unsigned reason);
/* Try again what could not be ended. */
void pool_end_again(struct pool *pool);
/* IDLE -> CHECKING: the next idle connection from slot *from on, usable here, that nobody has used or checked for `interval_ns`.
 * *from is where to go on. `only_private`: of those that nobody but we can use. */
bool pool_begin_check(struct pool *pool, uint32_t *from, uint64_t interval_ns, bool only_private, struct pool_claim *claim);
/* CHECKING -> IDLE: it is well. False: not ours any more. */
bool pool_end_check(struct pool *pool, struct pool_claim *claim);
/* Why a connection that is ENDING, or past its expiry, ends: SHM_T_closed_*. */
unsigned pool_over_reason(struct pool *pool, uint32_t slot);
/* Why RELEASE_RETIRE was the answer. */
unsigned pool_retire_reason(struct pool *pool, uint32_t slot);

/* ---- release ---- */

enum pool_released { RELEASED, RELEASE_STALE, RELEASE_RETIRE /* still ours, but not to be kept: retire it */ };
/* LEASED -> IDLE or to a waiter. RELEASED makes the claim void. */
static inline enum pool_released pool_release(struct pool *pool, struct pool_claim *claim, uint64_t now_coarse);
enum pool_released pool_release_contended(struct pool *pool, struct pool_claim *claim);
/* The queue was empty before the release and is not after it. */
void pool_release_late(struct pool *pool, uint32_t slot);
/* Give back a slot that was promised to a waiter which needs it no more. */
void pool_return_promise(struct pool *pool, int64_t slot);
void pool_forget_cached(struct pool *pool, uint32_t slot);

/* ---- closing ---- */

/* Nobody gets anything any more; every waiter is woken. */
void pool_shut(struct pool *pool);

/* ---- the maintainer ---- */

/* Become the one process that looks after the pool for all, or stay it. The kernel ends that with the process; one that has not said for
 * MAINTAINER_PATIENCE_NS that it is at work (it is stopped, or stuck in a hook) is helped: what it does can be done by two. */
#define MAINTAINER_PATIENCE_NS UINT64_C(10000000000)
bool pool_be_maintainer(struct pool *pool);
void pool_resign(struct pool *pool);

/* ---- inline parts ---- */

static inline unsigned kind_bucket(uint32_t kind) { return kind & 0xff; }
static inline bool bucket_is_udp(unsigned bucket) { return bucket == BUCKET_UDP4 || bucket == BUCKET_UDP6; }
/* the waiters that a connection of this kind may serve; all of them when the kind is damaged */
static inline uint32_t kind_mask(uint32_t kind)
{
    return kind_bucket(kind) < SHM_BUCKETS ? 1u << kind_bucket(kind) : WAITER_ANY_BUCKET;
}

/* May this process use a connection of that kind, and is it of a wanted bucket? */
static inline bool pool_fits(const struct pool *pool, const struct slot_shm *row, uint32_t kind, uint32_t mask)
{
    if (kind_bucket(kind) >= SHM_BUCKETS || !(mask >> kind_bucket(kind) & 1))
        return false;
    return SHM_LIKELY(!(kind & SHM_KIND_PRIVATE)) || SHM_LOAD(row, row->private_owner) == pool->worker;
}

/* The word is loaded before the kind: if the CAS from it succeeds, the kind was that of this very idle connection. */
static inline bool pool_lease_idle(struct pool *pool, uint32_t slot, uint32_t mask, uint64_t word, struct pool_claim *claim)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    if (!pool_fits(pool, row, SHM_LOAD(row, row->kind), mask) || !slot_move(row, &word, pool->worker, SLOT_LEASED))
        return false;
    claim->slot = slot;
    claim->word = word;
    return true;
}

static inline bool pool_take_cached(struct pool *pool, uint32_t mask, struct pool_claim *claim)
{
    struct local_cache *cache = &pool->cache;
    uint32_t last = SHM_LOAD(private, cache->last);
    for (uint32_t i = 0; i < cache->size; i++) {
        uint32_t at = last + i < cache->size ? last + i : last + i - cache->size;
        uint32_t slot = SHM_LOAD(private, cache->entries[at]);
        if (slot == LOCAL_CACHE_NONE)
            continue;
        uint64_t word = slot_load(&pool->slab.slots[slot]);
        if (slot_state(word) == SLOT_IDLE && slot_owner(word) == pool->worker &&
            pool_lease_idle(pool, slot, mask, word, claim)) {
            claim->source = SOURCE_CACHE;
            return true;
        }
    }
    return false;
}

static inline enum pool_condition pool_validate(struct pool *pool, uint32_t slot, int fd, uint64_t now)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    uint64_t used = SHM_LOAD(row, row->last_used_ns);
    unsigned bucket = kind_bucket(SHM_LOAD(row, row->kind));
    if (SHM_UNLIKELY(SHM_LOAD(row, row->expires_ns) <= now))
        return CONDITION_LIFETIME;
    uint64_t idle = now > used ? now - used : 0;
    if (SHM_LIKELY(idle < pool->options.alive_bypass_ns && !bucket_is_udp(bucket)))
        return CONDITION_GOOD;
    if (idle > pool->options.idle_timeout_ns && pool_count_used(pool) > pool->options.min_connections)
        return CONDITION_IDLE;
    return pool_check(pool, slot, fd);
}

static inline enum pool_released pool_release(struct pool *pool, struct pool_claim *claim, uint64_t now_coarse)
{
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    if (SHM_UNLIKELY(slot_load(row) != claim->word))
        return RELEASE_STALE;
    if (SHM_UNLIKELY(SHM_LOAD(row, row->kind) & (SHM_KIND_UNMAILED | SHM_KIND_ENDING)))
        return RELEASE_RETIRE; /* nobody else could use it, nor end it; or it is condemned */
    SHM_STORE(row, row->last_used_ns, now_coarse);
    SHM_STORE(row, row->leased_ns, 0); /* whoever takes it next has it a moment before he says since when */
    if (SHM_UNLIKELY(SHM_LOAD_SEQ(queue, pool->slab.header->summary)))
        return pool_release_contended(pool, claim);
    if (SHM_UNLIKELY(pool->options.idle_limit) && pool_count_idle(pool) + 1 >= pool->options.idle_limit)
        return RELEASE_RETIRE;
    if (!slot_move(row, &claim->word, pool->worker, SLOT_IDLE))
        return RELEASE_STALE;
    claim->word = 0; /* no state: this claim never fits again */
    uint32_t out = local_cache_note(&pool->cache, claim->slot, &pool->entries[claim->slot].place);
    if (SHM_UNLIKELY(out != LOCAL_CACHE_NONE))
        pool_forget_cached(pool, out);
    if (SHM_UNLIKELY(SHM_LOAD_SEQ(queue, pool->slab.header->summary)))
        pool_release_late(pool, claim->slot);
    return RELEASED;
}

static inline void pool_count(struct pool *pool, unsigned counter, uint64_t by)
{
    SHM_ADD(count, pool->row->counters[counter], by);
}
static inline void pool_count_total(struct pool *pool, unsigned counter, uint64_t by)
{
    SHM_ADD(count, pool->slab.totals->counters[counter], by);
}

/* Time this lease out of the cache? Returns the weight of the sample, 0 for no: every lease while they come slower than the coarse clock
 * ticks, else one in 16. Others are always timed, each for itself. */
static inline uint32_t pool_timing_due(struct pool *pool, uint64_t now_coarse)
{
    uint32_t count = SHM_LOAD(private, pool->timing_count) + 1;
    if (SHM_LIKELY(count < 16 && SHM_LOAD(private, pool->timing_tick) == now_coarse)) {
        SHM_STORE(private, pool->timing_count, count);
        return 0;
    }
    SHM_STORE(private, pool->timing_count, 0);
    SHM_STORE(private, pool->timing_tick, now_coarse);
    return count;
}

/* It was none out of the cache: those before it wait for the next sample, and it is not one of them. */
static inline void pool_timing_undo(struct pool *pool, uint32_t weight)
{
    uint32_t count = weight ? weight : SHM_LOAD(private, pool->timing_count);
    SHM_STORE(private, pool->timing_count, count ? count - 1 : 0);
}

#endif
