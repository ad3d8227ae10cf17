/* play.h: several workers in one process.
 *
 * A player is a handle of its own on a shared slab: its own mapping, entries, fork page and seat, as a process has. The first
 * founds the slab on a memfd, the others join it. play_get() and play_release() go the way of module.c without Python.
 *
 * Not here: what a test checks.
 */
#ifndef PLAY_H
#define PLAY_H

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "account.h"
#include "check.h"
#include "connection.h"
#include "freelist.h"
#include "pool.h"
#include "recovery.h"

#define PLAY __attribute__((unused)) static

#define PLAY_ANY WAITER_ANY_BUCKET
#define PLAY_NEVER UINT64_MAX
#define PLAY_MS UINT64_C(1000000)
/* of the upstream: all of it is over after a second */
#define PLAY_FIRST_STEP_NS (20 * PLAY_MS)
#define PLAY_LAST_STEP_NS (400 * PLAY_MS)
#define PLAY_PATIENCE_NS (800 * PLAY_MS)
/* as in module.c: a dial that takes longer may be that of one that is stopped */
#define PLAY_ADOPTED_PATIENCE_NS (200 * PLAY_MS)

/* No sockets: connections are numbers only (for schedulers that replay millions of runs). */
PLAY bool play_bare;

/* All handles use the founder's mapping: ThreadSanitizer, and who compares addresses, takes two mappings for two memories. */
PLAY bool play_one_mapping;
PLAY struct pool *play_founder;

PLAY struct slab_identity play_identity(void)
{
    static uint8_t id[16] = "a slab of a test";
    return (struct slab_identity){id, 1, 1000, 2000, "check", "tcp://test:1", "{}", "", 0};
}

PLAY struct pool_options play_options(uint32_t cache)
{
    return (struct pool_options){.local_cache_size = cache, .alive_bypass_ns = 500 * PLAY_MS,
                                 .idle_timeout_ns = PLAY_NEVER, .udp_clear_timeout_ns = PLAY_MS,
                                 .udp_clear_max_packets = 16, .clear_udp_buffer = true, .stats = true,
                                 .backoff = {PLAY_FIRST_STEP_NS, PLAY_LAST_STEP_NS, PLAY_PATIENCE_NS}};
}

PLAY int play_memory(uint64_t size)
{
    int fd = memfd_create("check", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

/* The first player, on a new slab whose cap is `cap` of its slots. */
PLAY struct pool *play_found_capped(uint32_t slots, uint32_t cap, uint32_t workers, uint32_t waiters, uint32_t cache)
{
    struct slab_layout layout;
    struct slab_identity who = play_identity();
    struct pool_options options = play_options(cache);
    who.cap = cap;
    struct pool *pool = calloc(1, sizeof *pool);
    CHECK(pool && slab_layout(&layout, slots, workers, waiters));
    CHECK_EQ(pool_create(pool, play_memory(layout.total_size), -1, &layout, &who, &options), POOL_OK);
    return play_founder = pool;
}

PLAY struct pool *play_found(uint32_t slots, uint32_t workers, uint32_t waiters, uint32_t cache)
{
    return play_found_capped(slots, slots, workers, waiters, cache);
}

/* A further player on the same slab, not registered yet. */
PLAY struct pool *play_attach(const struct pool *first)
{
    struct pool *pool = calloc(1, sizeof *pool);
    uint64_t size = first->slab.layout.total_size;
    uint32_t slots = first->slab.layout.max_slots;
    CHECK(pool);
    pool->options = first->options;
    pool->cache.size = first->cache.size;
    pool->slab_fd = dup(first->slab_fd);
    pool->shared.listener = -1;
    pool->shared.count = slots;
    void *base = play_one_mapping ? first->slab.header : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, pool->slab_fd, 0);
    CHECK(base != MAP_FAILED);
    CHECK_EQ(slab_open(&pool->slab, base, size), SLAB_OK);
    pool->entries = calloc(slots, sizeof *pool->entries);
    pool->mailboxes = calloc(slots, sizeof *pool->mailboxes);
    pool->fork = fork_page_new();
    pool->seat = seat_take();
    CHECK(pool->entries && pool->mailboxes && pool->fork && pool->seat);
    for (uint32_t i = 0; i < slots; i++) {
        pool->entries[i].fd = -1;
        pool->mailboxes[i] = dup(first->mailboxes[i]);
    }
    return pool;
}

PLAY struct pool *play_join(const struct pool *first)
{
    struct pool *pool = play_attach(first);
    CHECK_EQ(pool_join(pool), POOL_OK);
    return pool;
}

PLAY void play_drop_entry(struct entry *entry)
{
    if (entry->fd >= 0)
        close(entry->fd);
    entry->fd = -1;
    entry->connection = 0;
}

/* Free the handle; whoever has not left before is dead to the others from now on. */
PLAY void play_end(struct pool *pool)
{
    for (uint32_t i = 0; i < pool->slab.layout.max_slots; i++)
        play_drop_entry(&pool->entries[i]);
    if (play_one_mapping && pool != play_founder)
        pool->slab.header = NULL; /* not ours to unmap */
    pool_free(pool);
    free(pool);
}

PLAY void play_leave(struct pool *pool)
{
    pool_leave(pool);
    play_end(pool);
}

/* The player dies: the kernel drops its lock, and it does nothing more. */
PLAY void play_die(struct pool *pool) { seat_close(pool->seat); }

PLAY uint64_t play_word(struct pool *pool, uint32_t slot)
{
    return atomic_load_explicit(&pool->slab.slots[slot].word, memory_order_relaxed);
}
PLAY enum slot_state play_state(struct pool *pool, uint32_t slot) { return slot_state(play_word(pool, slot)); }

PLAY uint32_t play_count(struct pool *pool, enum slot_state state)
{
    uint32_t count = 0;
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++)
        count += play_state(pool, slot) == state;
    return count;
}

PLAY uint64_t play_total(struct pool *pool, unsigned counter)
{
    return atomic_load_explicit(&pool->slab.totals->counters[counter], memory_order_relaxed);
}

/* How many connections there have been. */
PLAY uint64_t play_created(struct pool *pool)
{
    uint64_t created = 0;
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++)
        created += atomic_load(&pool->slab.accounts[slot].lives) >> 4;
    return created;
}

/* ---- connections: stream pairs; the peer's end is given to the caller, or closed at once ---- */

PLAY bool play_install_as(struct pool *pool, struct pool_claim *claim, struct pool_birth birth, int *peer)
{
    struct entry *entry = &pool->entries[claim->slot];
    uint64_t id = pool_name_connection(pool, claim);
    if (!play_bare) {
        int ends[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
        if (!(birth.flags & SHM_KIND_PRIVATE))
            CHECK_EQ(mailbox_deposit(pool->mailboxes[claim->slot], pool->slab.header->id, claim->slot, id, ends[0], "note", 4),
                     0);
        play_drop_entry(entry);
        entry->fd = ends[0];
        entry->connection = id;
        if (peer)
            *peer = ends[1];
        else
            close(ends[1]);
    }
    if (!pool_install(pool, claim, &birth))
        return false;
    upstream_proved(&pool->slab);
    return true;
}

PLAY bool play_install(struct pool *pool, struct pool_claim *claim)
{
    return play_install_as(pool, claim, (struct pool_birth){.bucket = 0, .expires_ns = PLAY_NEVER}, NULL);
}

/* The dial has failed: nobody answers. */
PLAY void play_fail_dial(struct pool *pool, struct pool_claim *claim)
{
    upstream_failed(&pool->slab, claim->upstream, clock_now(), &pool->options.backoff, 0, "refused");
    pool_abandon(pool, claim);
    waiter_wake_all(&pool->slab);
}

PLAY void play_retire(struct pool *pool, struct pool_claim *claim, unsigned reason)
{
    struct entry *entry = &pool->entries[claim->slot];
    uint64_t connection = atomic_load_explicit(&pool->slab.slots[claim->slot].connection, memory_order_relaxed);
    int fd = entry->connection == connection ? entry->fd : -1;
    pool_end(pool, claim, &fd, 1, CONNECTION_LINGER_NS);
    if (fd >= 0)
        play_drop_entry(entry); /* the entry is the next holder's from pool_empty() on */
    pool_empty(pool, claim, reason);
}

/* Take what is idle or offered for ending, as a closer does; false when there is none. */
PLAY bool play_take_idle(struct pool *pool, struct pool_claim *claim)
{
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++) {
        uint64_t word = slot_load(&pool->slab.slots[slot]);
        *claim = (struct pool_claim){.slot = slot, .word = word};
        if ((slot_state(word) == SLOT_IDLE || slot_state(word) == SLOT_OFFERED) && pool_condemn(pool, claim))
            return true;
    }
    return false;
}

/* The descriptor of a leased connection, fetched from the mailbox when this player has not seen it. -1: no letter. */
PLAY int play_fetch(struct pool *pool, const struct pool_claim *claim)
{
    struct entry *entry = &pool->entries[claim->slot];
    uint64_t connection = atomic_load_explicit(&pool->slab.slots[claim->slot].connection, memory_order_relaxed);
    if (entry->connection == connection && connection)
        return entry->fd;
    struct letter letter;
    int fd = mailbox_peek(pool->mailboxes[claim->slot], pool->slab.header->id, claim->slot, connection, &letter);
    if (fd < 0)
        return -1;
    play_drop_entry(entry);
    entry->fd = fd;
    entry->connection = connection;
    return fd;
}

/* ---- get and release, as module.c does them ---- */

enum play_got { PLAY_GOT, PLAY_TIMED_OUT, PLAY_CLOSED, PLAY_CROWDED };

PLAY void play_leave_queue(struct pool *pool, struct waiter_place *place)
{
    if (place->queued)
        pool_return_promise(pool, waiter_leave(&pool->slab, place));
}

/* One call of get. */
struct play_request {
    uint32_t mask;
    bool waits; /* for others */
    uint64_t deadline;
    struct waiter_place place;
    struct pool_claim under_way; /* place.dialling: the dial that goes on for this call, */
    uint64_t adopted_ns;         /* since when */
    bool woken;                  /* the last sleep ended by a wake-up */
};

PLAY struct play_request play_request(uint32_t mask, uint64_t timeout_ns)
{
    uint64_t begun = clock_now(), deadline = timeout_ns > PLAY_NEVER - begun ? PLAY_NEVER : begun + timeout_ns;
    return (struct play_request){.mask = mask, .waits = timeout_ns != 0, .deadline = deadline};
}

PLAY void play_end_request(struct pool *pool, struct play_request *request)
{
    if (request->place.dialling)
        pool_orphan_dial(pool, &request->under_way);
    play_leave_queue(pool, &request->place);
}

PLAY void play_sleep(struct pool *pool, struct play_request *request, uint64_t now)
{
    struct waiter_place *place = &request->place;
    uint64_t waited = now - place->since_ns, slice = WAITER_SLICE_NS;
    if (waiter_promised(&pool->slab, place) >= 0) { /* promised, but the look did not find the offer */
        pool_return_promise(pool, waiter_rematch(&pool->slab, place));
        waiter_prepare(&pool->slab, place);
        return;
    }
    if (request->woken && waited < WAITER_HANDOVER_AFTER_NS) { /* woken in vain */
        if (!waiter_be_patient(&pool->slab, place)) {
            waiter_prepare(&pool->slab, place);
            return;
        }
        slice = WAITER_HANDOVER_AFTER_NS - waited;
    }
    request->woken = waiter_sleep(&pool->slab, place, request->deadline - now < slice ? request->deadline - now : slice);
    waiter_prepare(&pool->slab, place);
}

/* A lease that was found: true when it may be used. What is condemned ends with whoever meets it. */
PLAY bool play_fits(struct pool *pool, struct pool_claim *claim)
{
    if (SHM_LOAD(row, pool->slab.slots[claim->slot].expires_ns) > clock_coarse())
        return true;
    if (pool_condemn(pool, claim))
        play_retire(pool, claim, pool_over_reason(pool, claim->slot));
    return false;
}

/* One look: true when it is decided. */
PLAY bool play_look(struct pool *pool, struct play_request *request, struct pool_claim *claim, enum play_got *got)
{
    *got = PLAY_GOT;
    if (request->place.dialling &&
        (clock_now() >= request->adopted_ns + PLAY_ADOPTED_PATIENCE_NS || !pool_dial_goes_on(pool, &request->under_way)))
        request->place.dialling = false;
    switch (pool_take(pool, request->mask, request->waits ? &request->place : NULL, claim)) {
    case TAKEN_LEASED:
        return play_fits(pool, claim);
    case TAKEN_DIAL:
        pool_announce_dial(pool, claim, request->mask, false);
        CHECK(play_install(pool, claim));
        return true;
    case TAKEN_ADOPTED:
        request->place.dialling = true;
        request->under_way = *claim;
        request->adopted_ns = clock_now();
        return false;
    case TAKEN_EVICTED:
        play_retire(pool, claim, SHM_T_closed_evicted);
        return false;
    case TAKEN_RECOVER:
        recovery_run(pool, false);
        return false;
    case TAKEN_CLOSED:
    case TAKEN_DRAINING:
        *got = PLAY_CLOSED;
        return true;
    case TAKEN_DAMAGED:
        CHECK(!"a slot word is in no state that exists");
        return true;
    case TAKEN_NOTHING:
    case TAKEN_DOWN:
    case TAKEN_PAUSED:
        break;
    }
    uint64_t now = clock_now();
    *got = PLAY_TIMED_OUT;
    if (now >= request->deadline)
        return true;
    if (!request->place.queued) {
        *got = PLAY_CROWDED;
        return !waiter_enter(&pool->slab, &request->place, pool->worker, request->mask, 1, now);
    }
    play_sleep(pool, request, now);
    return false;
}

PLAY enum play_got play_get_any(struct pool *pool, uint32_t mask, uint64_t timeout_ns, struct pool_claim *claim)
{
    struct play_request request = play_request(mask, timeout_ns);
    enum play_got got = PLAY_GOT;
    if (!pool_is_plain(pool) || !pool_take_cached(pool, mask, claim) || !play_fits(pool, claim))
        while (!play_look(pool, &request, claim, &got))
            ;
    play_end_request(pool, &request);
    return got;
}

/* pool_take() when nobody need look for the dead. */
PLAY enum pool_taken play_take(struct pool *pool, uint32_t mask, struct waiter_place *place, struct pool_claim *claim)
{
    SHM_STORE(hint, pool->slab.header->recovery_checked_ns, clock_coarse());
    return pool_take(pool, mask, place, claim);
}

PLAY bool play_try(struct pool *pool, struct pool_claim *claim)
{
    return play_get_any(pool, PLAY_ANY, 0, claim) == PLAY_GOT;
}

/* A lease that must be there. */
PLAY struct pool_claim play_lease(struct pool *pool)
{
    struct pool_claim claim = {0};
    CHECK_EQ(play_get_any(pool, PLAY_ANY, 0, &claim), PLAY_GOT);
    return claim;
}

PLAY enum pool_released play_release(struct pool *pool, struct pool_claim *claim)
{
    enum pool_released released = pool_release(pool, claim, clock_coarse());
    if (released == RELEASE_RETIRE && pool_condemn(pool, claim))
        play_retire(pool, claim, pool_retire_reason(pool, claim->slot));
    return released;
}

/* ---- what must hold when nobody is active ---- */

/* As many as the cap allows can be leased, each slot once, by one player, and no more than that. Then all go back. */
PLAY void play_lease_all(struct pool *pool)
{
    uint32_t cap = steering_cap(&pool->slab), slots = pool->slab.layout.max_slots;
    struct pool_claim *claims = calloc(cap, sizeof *claims), one_more;
    uint8_t *seen = calloc(slots, 1);
    CHECK(claims && seen);
    for (uint32_t i = 0; i < cap; i++) {
        claims[i] = play_lease(pool);
        CHECK(claims[i].slot < slots && !seen[claims[i].slot]);
        seen[claims[i].slot] = 1;
    }
    CHECK(!play_try(pool, &one_more));
    for (uint32_t i = 0; i < cap; i++) {
        struct pool_claim stale = claims[i];
        CHECK_EQ(play_release(pool, &claims[i]), RELEASED);
        CHECK_EQ(play_release(pool, &stale), RELEASE_STALE);
    }
    free(claims);
    free(seen);
}

PLAY void play_check_queue_empty(struct pool *pool)
{
    for (uint32_t cell = 0; cell < pool->slab.layout.max_waiters; cell++)
        CHECK_EQ(atomic_load(&pool->slab.waiter_words[cell]), WAITER_FREE_WORD);
}

/* The accounts say what the slots say; the reasons of ends and the failures of dials are whole, but for at most `lost` of each, which processes that
 * died have not counted. */
PLAY void play_check_accounts(struct pool *pool, uint64_t lost)
{
    uint64_t created = play_created(pool), there = 0, begun = 0, reasons = 0;
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++) {
        struct account account;
        CHECK(account_read(&pool->slab.accounts[slot], account_lives(&pool->slab.accounts[slot]), &account));
        bool has_one = play_state(pool, slot) != SLOT_EMPTY && play_state(pool, slot) != SLOT_DIALING;
        CHECK_EQ(account.open < SHM_BUCKETS, has_one);
        CHECK(!has_one || account.open == kind_bucket(pool->slab.slots[slot].kind));
        for (unsigned i = 0; i < SHM_BUCKETS; i++)
            begun += account.begun[i];
        there += has_one;
    }
    for (unsigned reason = SHM_T_closed_broken; reason <= SHM_T_closed_revoked; reason++)
        reasons += play_total(pool, reason);
    CHECK_EQ(begun, created);
    uint64_t dialling = play_count(pool, SLOT_DIALING), failures = play_total(pool, SHM_T_dial_failures);
    uint64_t uncounted = created - there - reasons, undecided = play_total(pool, SHM_T_dial_attempts) - created - failures - dialling;
    CHECK(uncounted <= lost);
    CHECK(undecided <= lost);
}

/* No worker index is lost: every row but those of the living is FREE. */
PLAY void play_check_workers(struct pool *pool, uint32_t living)
{
    uint32_t active = 0;
    for (uint32_t index = 0; index < pool->slab.layout.max_workers; index++) {
        uint32_t state = atomic_load(&pool->slab.workers[index].state);
        CHECK(state == SHM_WORKER_FREE || state == SHM_WORKER_ACTIVE);
        active += state == SHM_WORKER_ACTIVE;
    }
    CHECK_EQ(active, living);
}

#endif
