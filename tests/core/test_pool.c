/* test_pool.c: the order of a get, the ends of leases and connections, and closing. */
#include <pthread.h>

#include "play.h"

static struct pool *pool, *other;

static void begin(uint32_t slots, uint32_t cache)
{
    pool = play_found(slots, 3, 8, cache);
    other = play_join(pool);
}

static void end(void)
{
    play_check_queue_empty(pool);
    play_leave(other);
    play_check_workers(pool, 1);
    play_lease_all(pool);
    play_leave(pool);
}

static struct pool_claim dial(struct pool *who, unsigned bucket, uint32_t flags, int *peer)
{
    struct pool_claim claim;
    CHECK(pool_take_empty(who, &claim));
    CHECK(play_install_as(who, &claim, (struct pool_birth){.bucket = bucket, .flags = flags, .expires_ns = PLAY_NEVER}, peer));
    return claim;
}

static void back(struct pool *who, struct pool_claim claim) { CHECK_EQ(play_release(who, &claim), RELEASED); }

static bool at_end(int fd)
{
    char byte;
    return recv(fd, &byte, 1, MSG_DONTWAIT) == 0;
}

/* ---- the order ---- */

static void order_of_a_get(void)
{
    begin(4, 1);
    struct pool_claim claim, held[4];
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &held[0]), TAKEN_DIAL);
    CHECK(play_install(pool, &held[0]));
    back(pool, held[0]);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &held[0]), TAKEN_LEASED);
    CHECK_EQ(held[0].source, SOURCE_CACHE);
    for (int i = 1; i < 3; i++)
        held[i] = dial(pool, 0, 0, NULL);
    back(pool, held[1]);
    back(pool, held[2]); /* pushes the first out of the cache of one place */
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &held[1]), TAKEN_LEASED);
    CHECK_EQ(held[1].source, SOURCE_FREELIST);
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &held[2]), TAKEN_LEASED);
    CHECK_EQ(held[2].source, SOURCE_STEAL); /* out of the other's cache, before it dials */
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &held[3]), TAKEN_DIAL);
    CHECK(play_install(other, &held[3]));
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &claim), TAKEN_NOTHING);
    atomic_store(&pool->slab.header->recovery_checked_ns, 0);
    CHECK_EQ(pool_take(other, PLAY_ANY, NULL, &claim), TAKEN_RECOVER);
    back(pool, held[0]);
    for (int i = 1; i < 4; i++)
        back(other, held[i]);
    end();
}

static void kinds(void)
{
    begin(2, 2);
    struct pool_claim tcp = dial(pool, 0, 0, NULL), udp = dial(pool, 3, 0, NULL), claim;
    back(pool, tcp);
    back(pool, udp);
    CHECK_EQ(play_take(other, 1u << 3, NULL, &claim), TAKEN_LEASED);
    CHECK_EQ(claim.slot, udp.slot);
    CHECK_EQ(play_take(other, 1u << 3, NULL, &tcp), TAKEN_EVICTED); /* the permit of another kind's idle connection */
    play_retire(other, &tcp, SHM_T_closed_evicted);
    CHECK_EQ(play_take(other, 1u << 3, NULL, &tcp), TAKEN_DIAL);
    CHECK_EQ(play_take(other, 1u << 3, NULL, &udp), TAKEN_NOTHING);
    pool_abandon(other, &tcp);
    back(other, claim);
    end();
}

/* ---- stale words ---- */

static void stale_releases(void)
{
    begin(2, 2);
    struct pool_claim claim = play_lease(pool), copy = claim, foreign = claim;
    CHECK_EQ(play_release(other, &(struct pool_claim){.slot = 1 - claim.slot, .word = claim.word}), RELEASE_STALE);
    back(pool, claim);
    CHECK_EQ(play_release(pool, &copy), RELEASE_STALE);    /* double */
    CHECK_EQ(play_release(other, &foreign), RELEASE_STALE); /* of another process */
    claim = play_lease(pool);
    CHECK_EQ(play_release(pool, &copy), RELEASE_STALE); /* late, while it is leased again */
    CHECK(!pool_condemn(pool, &copy));
    CHECK_EQ(play_word(pool, claim.slot), claim.word);
    CHECK(pool_condemn(pool, &claim));
    CHECK_EQ(play_release(pool, &copy), RELEASE_STALE);
    play_retire(pool, &claim, SHM_T_closed_error);
    CHECK_EQ(play_release(pool, &copy), RELEASE_STALE);
    end();
}

/* The word of a lease that was given back fits no second time, whatever the first release left in it. */
static void a_given_back_claim_is_stale(void)
{
    struct waiter_place places[2] = {{0}};
    begin(1, 1);
    struct pool_claim claim = play_lease(pool);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(play_release(pool, &claim), RELEASE_STALE);
    claim = play_lease(pool);
    for (int i = 0; i < 2; i++)
        CHECK(waiter_enter(&pool->slab, &places[i], i ? pool->worker : other->worker, 1, 1, 1));
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(play_release(pool, &claim), RELEASE_STALE);
    CHECK_EQ(slot_owner(play_word(pool, 0)), other->worker);
    waiter_leave(&pool->slab, &places[1]);
    pool_return_promise(other, waiter_leave(&pool->slab, &places[0]));
    end();
}

/* Two threads release one lease: one of them does. */
struct twins {
    pthread_barrier_t *barrier;
    struct pool_claim claim;
};
static void *release_it(void *arg)
{
    struct twins *twins = arg;
    pthread_barrier_wait(twins->barrier);
    return (void *)(uintptr_t)(play_release(pool, &twins->claim) == RELEASED);
}

static void released_by_two_threads(void)
{
    pthread_barrier_t barrier;
    begin(1, 1);
    CHECK(pthread_barrier_init(&barrier, NULL, 2) == 0);
    for (int round = 0; round < 300; round++) {
        struct waiter_place place = {0};
        struct twins twins[2];
        pthread_t threads[2];
        uintptr_t released = 0;
        twins[0].barrier = twins[1].barrier = &barrier;
        twins[0].claim = twins[1].claim = play_lease(pool);
        if (round % 2) /* by hand-over */
            CHECK(waiter_enter(&other->slab, &place, other->worker, PLAY_ANY, 1, 1));
        for (int i = 0; i < 2; i++)
            CHECK(pthread_create(&threads[i], NULL, release_it, &twins[i]) == 0);
        for (int i = 0; i < 2; i++) {
            void *result;
            pthread_join(threads[i], &result);
            released += (uintptr_t)result;
        }
        CHECK_EQ(released, 1);
        if (place.queued)
            pool_return_promise(other, waiter_leave(&other->slab, &place));
        CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    }
    pthread_barrier_destroy(&barrier);
    end();
}

/* ---- connections ---- */

static void shared_by_letter(void)
{
    int peer;
    begin(1, 1);
    struct pool_claim claim = dial(pool, 4, 0, &peer);
    back(pool, claim);
    claim = play_lease(other);
    int fd = play_fetch(other, &claim);
    char byte;
    CHECK(fd >= 0 && write(fd, "x", 1) == 1 && read(peer, &byte, 1) == 1);
    CHECK(pool_condemn(other, &claim)); /* ended by one, for all */
    play_retire(other, &claim, SHM_T_closed_error);
    CHECK(at_end(peer) && at_end(pool->entries[0].fd));
    close(peer);
    CHECK_EQ(play_total(pool, SHM_T_closed_error), 1);
    end();
}

static void letter_lost(void)
{
    begin(1, 1);
    back(pool, dial(pool, 0, 0, NULL));
    mailbox_drain(pool->mailboxes[0]);
    struct pool_claim claim = play_lease(other);
    CHECK_EQ(play_fetch(other, &claim), -1);
    CHECK(pool_condemn(other, &claim));
    play_retire(other, &claim, SHM_T_closed_letter);
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
    CHECK(play_install(other, &claim));
    back(other, claim);
    end();
}

/* A private connection is used by its owner alone; another has its permit, by ending it. */
static void private_connections(void)
{
    begin(1, 1);
    struct pool_claim claim = dial(pool, 0, SHM_KIND_PRIVATE, NULL);
    back(pool, claim);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_LEASED);
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &claim), TAKEN_NOTHING);
    claim.word = play_word(pool, 0);
    claim.slot = 0;
    struct waiter_place place = {0};
    CHECK(waiter_enter(&other->slab, &place, other->worker, PLAY_ANY, 1, 1));
    back(pool, claim); /* not offered: it could not use it */
    CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    CHECK(atomic_load(&pool->slab.waiters[place.cell].futex));
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_EVICTED);
    play_retire(other, &claim, SHM_T_closed_evicted);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_DIAL);
    CHECK(play_install(other, &claim));
    waiter_leave(&other->slab, &place);
    back(other, claim);
    end();
}

/* Without a letter nobody else could use or end it: it does not outlive its lease. */
static void unmailed_connections(void)
{
    int peer;
    begin(1, 1);
    struct pool_claim claim = dial(pool, 0, SHM_KIND_PRIVATE | SHM_KIND_UNMAILED, &peer);
    CHECK_EQ(play_total(pool, SHM_T_failed_deposits), 1);
    CHECK_EQ(play_release(pool, &claim), RELEASE_RETIRE);
    CHECK_EQ(play_state(pool, 0), SLOT_EMPTY);
    CHECK(at_end(peer));
    close(peer);
    end();
}

static void rows(void)
{
    begin(1, 1);
    struct pool_claim claim;
    CHECK(pool_take_empty(pool, &claim));
    CHECK(play_install_as(pool, &claim, (struct pool_birth){.bucket = 1, .expires_ns = 99, .peer = {1, 2, 3}}, NULL));
    struct slot_shm *row = &pool->slab.slots[0];
    uint64_t first = row->connection;
    CHECK(first > 0 && row->kind == 1 && row->expires_ns == 99 && row->peer[2] == 3 && row->private_owner == 0);
    CHECK(row->created_ns <= clock_now() && row->created_ns > 0);
    CHECK(pool_condemn(pool, &claim));
    play_retire(pool, &claim, SHM_T_closed_lifetime);
    CHECK(row->connection == 0 && row->kind == 0 && row->private_owner == 0);
    claim = play_lease(pool);
    CHECK(row->connection > first); /* never the same id again */
    back(pool, claim);
    CHECK(pool_take_empty(pool, &claim) == false);
    end();
}

static void many_retired_at_once(void)
{
    enum { COUNT = 70 };
    struct pool_claim claims[COUNT];
    int fds[COUNT];
    begin(COUNT, 4);
    for (int i = 0; i < COUNT; i++) {
        claims[i] = play_lease(pool);
        CHECK(pool_condemn(pool, &claims[i]));
        fds[i] = -1;
    }
    pool_end(pool, claims, fds, COUNT, CONNECTION_LINGER_NS);
    for (int i = 0; i < COUNT; i++)
        pool_empty(pool, &claims[i], SHM_T_closed_idle);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), COUNT);
    CHECK_EQ(play_total(pool, SHM_T_closed_idle), COUNT);
    end();
}

static void validated(void)
{
    int peer;
    begin(1, 1);
    struct pool_claim claim;
    CHECK(pool_take_empty(pool, &claim));
    CHECK(play_install_as(pool, &claim, (struct pool_birth){.bucket = 0, .expires_ns = PLAY_NEVER}, &peer));
    struct slot_shm *row = &pool->slab.slots[0];
    int fd = pool->entries[0].fd;
    uint64_t now = row->last_used_ns;
    CHECK_EQ(pool_validate(pool, 0, fd, now), CONDITION_GOOD);
    CHECK(write(peer, "x", 1) == 1);
    CHECK_EQ(pool_validate(pool, 0, fd, now), CONDITION_GOOD); /* just used: not looked at */
    now += pool->options.alive_bypass_ns;
    CHECK_EQ(pool_validate(pool, 0, fd, now), CONDITION_DIRTY);
    atomic_store(&row->kind, SHM_KIND_PRIVATE);
    CHECK_EQ(pool_validate(pool, 0, fd, now), CONDITION_GOOD); /* TLS has records of its own */
    atomic_store(&row->kind, 0);
    char byte;
    CHECK(read(fd, &byte, 1) == 1);
    CHECK_EQ(pool_validate(pool, 0, fd, now), CONDITION_GOOD);
    close(peer);
    CHECK_EQ(pool_validate(pool, 0, fd, now), CONDITION_BROKEN);
    pool->options.idle_timeout_ns = 600 * PLAY_MS;
    CHECK_EQ(pool_validate(pool, 0, fd, row->last_used_ns + 600 * PLAY_MS + 1), CONDITION_IDLE);
    atomic_store(&row->expires_ns, now);
    CHECK_EQ(pool_validate(pool, 0, fd, now), CONDITION_LIFETIME);
    CHECK(pool_condemn(pool, &claim));
    play_retire(pool, &claim, SHM_T_closed_broken);
    end();
}

/* ---- leaving and closing ---- */

static void leaving(void)
{
    int peer;
    begin(4, 1);
    struct pool_claim kept = dial(other, 0, 0, NULL), own = dial(other, 0, SHM_KIND_PRIVATE, NULL), out = dial(other, 0, 0, &peer);
    struct pool_claim late;
    struct waiter_place place = {0};
    back(other, kept);
    back(other, own);
    CHECK(waiter_enter(&other->slab, &place, other->worker, PLAY_ANY, 1, 1));
    CHECK(pool_holds_any(other) && !pool_holds_any(pool));
    pool_leave(other);
    CHECK(!pool_joined(other) && !pool_holds_any(other));
    CHECK_EQ(play_state(pool, kept.slot), SLOT_IDLE);
    CHECK_EQ(play_state(pool, own.slot), SLOT_EMPTY);
    CHECK_EQ(play_state(pool, out.slot), SLOT_EMPTY);
    CHECK(at_end(peer));
    close(peer);
    CHECK_EQ(play_release(other, &out), RELEASE_STALE);
    play_check_queue_empty(pool);
    play_check_workers(pool, 1);
    pool_leave(other); /* once more is nothing */
    CHECK_EQ(pool_join(other), POOL_OK); /* and it can come back */
    late = play_lease(other);
    back(other, late);
    end();
}

static void *wait_for_one(void *arg)
{
    struct pool_claim claim;
    return (void *)(uintptr_t)play_get_any(arg, PLAY_ANY, 3600 * 1000 * PLAY_MS, &claim);
}

static void closing(void)
{
    int peer, idle_peer;
    pthread_t thread;
    void *got;
    struct waiter_seen seen;
    begin(2, 2);
    struct pool_claim claim = dial(pool, 0, 0, &peer), idle = dial(pool, 0, 0, &idle_peer), taken;
    CHECK(pthread_create(&thread, NULL, wait_for_one, other) == 0);
    while (!waiter_first(&pool->slab, PLAY_ANY, &seen))
        ;
    CHECK(!play_take_idle(pool, &taken));
    pool_shut(pool);
    CHECK(!pool_is_open(pool) && !pool_is_open(other));
    pthread_join(thread, &got);
    CHECK_EQ((intptr_t)got, PLAY_CLOSED); /* woken, though it would wait for an hour */
    CHECK_EQ(pool_take(other, PLAY_ANY, NULL, &taken), TAKEN_CLOSED);
    CHECK_EQ(play_release(pool, &idle), RELEASE_RETIRE);
    CHECK(at_end(idle_peer));
    CHECK_EQ(play_release(pool, &claim), RELEASE_RETIRE);
    CHECK(at_end(peer));
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 2);
    CHECK_EQ(play_total(pool, SHM_T_closed_shutdown), 2);
    close(peer);
    close(idle_peer);
    play_check_queue_empty(pool);
    play_leave(other);
    play_leave(pool);
}

/* What is idle, or offered, is there for the closer. */
static void closing_takes_idle_and_offered(void)
{
    struct pool_claim one, two, taken;
    struct waiter_place place = {0};
    begin(3, 2);
    one = play_lease(pool);
    two = play_lease(pool);
    back(pool, one);
    CHECK(waiter_enter(&other->slab, &place, other->worker, PLAY_ANY, 1, 1));
    back(pool, two);
    pool_shut(pool);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK(play_take_idle(pool, &taken));
        play_retire(pool, &taken, SHM_T_closed_shutdown);
    }
    CHECK(!play_take_idle(pool, &taken));
    pool_return_promise(other, waiter_leave(&other->slab, &place));
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 3);
    play_leave(other);
    play_leave(pool);
}

/* A promise that comes back after the pool was closed is ended, not left idle. */
static void promise_returned_after_closing(void)
{
    struct waiter_place place = {0};
    begin(1, 1);
    struct pool_claim claim = play_lease(pool);
    CHECK(waiter_enter(&other->slab, &place, other->worker, PLAY_ANY, 1, 1));
    back(pool, claim);
    pool_shut(pool);
    CHECK_EQ(play_state(pool, 0), SLOT_OFFERED);
    pool_return_promise(other, waiter_leave(&other->slab, &place));
    CHECK_EQ(play_state(pool, 0), SLOT_EMPTY);
    play_leave(other);
    play_leave(pool);
}

static void no_descriptor_leaks(void)
{
    int before = dup(0);
    close(before);
    for (int i = 0; i < 3; i++) {
        begin(5, 2);
        end();
    }
    int after = dup(0);
    close(after);
    CHECK_EQ(after, before);
}

int main(void)
{
    RUN(order_of_a_get);
    RUN(kinds);
    RUN(stale_releases);
    RUN(released_by_two_threads);
    RUN(shared_by_letter);
    RUN(letter_lost);
    RUN(private_connections);
    RUN(unmailed_connections);
    RUN(rows);
    RUN(many_retired_at_once);
    RUN(validated);
    RUN(leaving);
    RUN(closing);
    RUN(closing_takes_idle_and_offered);
    RUN(promise_returned_after_closing);
    RUN(no_descriptor_leaks);
    RUN(a_given_back_claim_is_stale);
}
