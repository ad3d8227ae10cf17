/* test_pool.c: the order of a get, the ends of leases and connections, closing, joining by a set that was sent. */
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "play.h"
#include "sets.h"

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

/* The number that the next descriptor gets. */
static int next_descriptor(void)
{
    int next = dup(0);
    close(next);
    return next;
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
    atomic_store(&pool->slab.header->recovery_checked_ns, 0);
    CHECK_EQ(pool_take(other, 1u << 3, NULL, &tcp), TAKEN_RECOVER); /* before anything that lives is ended */
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
/* The permits are those below the cap: empty slots beyond it are none. */
static void kinds_after_a_resize(void)
{
    begin(3, 2);
    steering_resize(&pool->slab, 2);
    struct pool_claim first = dial(pool, 0, 0, NULL), second = dial(pool, 0, 0, NULL), claim;
    back(pool, first);
    CHECK_EQ(play_take(other, 1u << 3, NULL, &claim), TAKEN_EVICTED);
    play_retire(other, &claim, SHM_T_closed_evicted);
    CHECK_EQ(play_take(other, 1u << 3, NULL, &claim), TAKEN_DIAL);
    pool_abandon(other, &claim);
    back(pool, second);
    steering_resize(&pool->slab, 3);
    end();
}

/* From the end of a lease to the begin of the next nobody says since when it is out; and an offer has a time of its own. */
static void times_of_leases(void)
{
    begin(1, 1);
    struct pool_claim claim = dial(pool, 0, 0, NULL);
    struct slot_shm *row = &pool->slab.slots[0];
    struct waiter_place place = {0};
    CHECK(atomic_load(&row->leased_ns) != 0);
    CHECK(waiter_enter(&other->slab, &place, other->worker, PLAY_ANY, 1, 1)); /* for so long that it is handed over */
    back(pool, claim);
    CHECK_EQ(play_state(pool, 0), SLOT_OFFERED);
    CHECK_EQ(atomic_load(&row->leased_ns), 0);
    CHECK(atomic_load(&row->offered_ns) != 0);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_LEASED);
    CHECK_EQ(atomic_load(&row->leased_ns), 0);
    waiter_leave(&other->slab, &place);
    back(other, claim);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_LEASED);
    CHECK_EQ(atomic_load(&row->leased_ns), 0);
    back(pool, claim);
    end();
}

/* Who has no descriptor left to fetch a connection with, not even the spare one, does not say that it has ended. */
static void no_descriptor_to_end_with(void)
{
    begin(1, 1);
    struct rlimit limit, none;
    int peer;
    struct pool_claim claim = dial(pool, 0, 0, &peer);
    back(pool, claim);
    claim.word = play_word(pool, 0);
    CHECK(pool_condemn(other, &claim));
    int spare = atomic_exchange(&other->spare_fd, -1); /* another thread has it */
    if (spare > 0)
        close(spare);
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    none = (struct rlimit){0, limit.rlim_max};
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    pool_end(other, &claim, NULL, 1, CONNECTION_LINGER_NS);
    pool_empty(other, &claim, SHM_T_closed_evicted);
    CHECK_EQ(play_state(pool, 0), SLOT_RETIRING);
    CHECK(!at_end(peer));
    pool_end_again(other); /* in vain */
    CHECK_EQ(play_state(pool, 0), SLOT_RETIRING);
    CHECK_EQ(play_total(pool, SHM_T_closed_evicted), 0);
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    pool_end_again(pool); /* it is not its to end */
    CHECK_EQ(play_state(pool, 0), SLOT_RETIRING);
    recovery_run(other, true); /* whoever looks for the dead tries again as well */
    CHECK_EQ(play_state(pool, 0), SLOT_EMPTY);
    CHECK(at_end(peer));
    CHECK_EQ(play_total(pool, SHM_T_closed_evicted), 1);
    CHECK_EQ(atomic_load(&other->unended), 0);
    close(peer);
    end();
}

/* All but the spare descriptor are in use: it is given up for the letter, and taken again. */
static void ended_with_the_spare_descriptor(void)
{
    begin(1, 1);
    struct rlimit limit, full;
    int peer;
    back(pool, dial(pool, 0, 0, &peer));
    struct pool_claim claim = {.slot = 0, .word = play_word(pool, 0)};
    CHECK(pool_condemn(pool, &claim));
    int next = next_descriptor();
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    full = (struct rlimit){(rlim_t)next, limit.rlim_max};
    CHECK(setrlimit(RLIMIT_NOFILE, &full) == 0);
    pool_end(pool, &claim, NULL, 1, CONNECTION_LINGER_NS);
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK(at_end(peer));
    CHECK(fcntl(atomic_load(&pool->spare_fd), F_GETFD) == FD_CLOEXEC);
    CHECK_EQ(next_descriptor(), next);
    pool_empty(pool, &claim, SHM_T_closed_evicted);
    CHECK_EQ(play_state(pool, 0), SLOT_EMPTY);
    close(peer);
    end();
}

/* Who ends a connection by its letter keeps no copy of it. */
static void ended_by_the_letter(void)
{
    begin(1, 1);
    back(pool, dial(pool, 0, 0, NULL));
    struct pool_claim claim = {.slot = 0, .word = play_word(pool, 0)};
    int next = next_descriptor();
    CHECK(pool_condemn(other, &claim));
    pool_end(other, &claim, NULL, 1, CONNECTION_LINGER_NS);
    CHECK_EQ(next_descriptor(), next);
    pool_empty(other, &claim, SHM_T_closed_evicted);
    end();
}

/* A dial fails after its letter was put into the mailbox: the connection is ended, and nobody keeps a copy of it. */
static void abandoned_with_a_letter(void)
{
    begin(1, 1);
    struct pool_claim claim;
    int ends[2];
    CHECK(pool_take_empty(pool, &claim));
    uint64_t id = pool_name_connection(pool, &claim);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    CHECK_EQ(mailbox_deposit(pool->mailboxes[0], pool->slab.header->id, 0, id, ends[0], NULL, 0), 0);
    int next = next_descriptor();
    pool_abandon(pool, &claim);
    CHECK_EQ(next_descriptor(), next);
    CHECK(at_end(ends[1])); /* though ends[0] is open */
    close(ends[0]);
    close(ends[1]);
    end();
}

/* A letter that should not be there does not stand before that of the next connection. */
static void dialled_over_a_letter(void)
{
    begin(1, 1);
    CHECK_EQ(mailbox_deposit(pool->mailboxes[0], pool->slab.header->id, 0, 0, 0, NULL, 0), 0);
    back(pool, dial(pool, 0, 0, NULL));
    struct pool_claim claim = play_lease(other);
    CHECK(play_fetch(other, &claim) >= 0);
    back(other, claim);
    end();
}

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
    row->uses = 9; /* of the one before */
    row->checked_ns = 0;
    claim = play_lease(pool);
    CHECK(row->uses == 0 && row->checked_ns == row->last_used_ns);
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

/* ---- dials under way ---- */

/* A dial of `who`, for these buckets. */
static struct pool_claim dial_begun(struct pool *who, uint32_t mask, bool orphan)
{
    struct pool_claim claim;
    upstream_proved(&who->slab);
    CHECK_EQ(play_take(who, mask, NULL, &claim), TAKEN_DIAL);
    pool_announce_dial(who, &claim, mask, orphan);
    return claim;
}

/* Who comes when a dial goes on for nobody waits for that one, instead of beginning another. */
static void dials_are_adopted(void)
{
    struct waiter_place place = {0}, second = {0};
    struct pool_claim claim, another;
    begin(3, 1);
    struct pool_claim begun = dial_begun(pool, PLAY_ANY, true);
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &claim), TAKEN_DIAL); /* who does not wait does not wait for that */
    pool_abandon(other, &claim);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_ADOPTED);
    CHECK(claim.slot == begun.slot && claim.word == begun.word);
    CHECK(pool_dial_goes_on(other, &claim));
    place.dialling = true;
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &another), TAKEN_NOTHING); /* one dial for one caller */
    CHECK_EQ(play_take(other, PLAY_ANY, &second, &another), TAKEN_DIAL);   /* another has no claim to it */
    pool_abandon(other, &another);
    CHECK(play_install(pool, &begun));
    back(pool, begun);
    CHECK(!pool_dial_goes_on(other, &claim));
    place.dialling = false;
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_LEASED);
    CHECK_EQ(claim.slot, begun.slot);
    back(other, claim);
    end();
}

/* A dial that somebody waits for is not adopted; when its caller goes it is, once. */
static void dials_with_a_caller_are_not(void)
{
    struct waiter_place place = {0};
    struct pool_claim claim;
    begin(1, 1);
    struct pool_claim begun = dial_begun(pool, PLAY_ANY, false);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_NOTHING);
    pool_orphan_dial(pool, &begun);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_ADOPTED);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_NOTHING);
    pool_orphan_dial(other, &claim); /* the second caller goes as well */
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_ADOPTED);
    pool_abandon(pool, &begun);
    CHECK(!pool_dial_goes_on(other, &claim));
    pool_orphan_dial(other, &claim); /* too late: that dial is over, and the next is not it */
    begun = dial_begun(pool, PLAY_ANY, false);
    pool_orphan_dial(other, &claim);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_NOTHING);
    CHECK(play_install(pool, &begun));
    back(pool, begun);
    end();
}

/* Only a dial whose every outcome is of use. */
static void dials_for_other_kinds_are_not(void)
{
    struct waiter_place place = {0};
    struct pool_claim claim;
    begin(1, 1);
    struct pool_claim begun = dial_begun(pool, 1u << 0 | 1u << 1, true);
    CHECK_EQ(play_take(other, 1u << 0, &place, &claim), TAKEN_NOTHING);
    CHECK_EQ(play_take(other, 1u << 3, &place, &claim), TAKEN_NOTHING);
    CHECK_EQ(play_take(other, 1u << 0 | 1u << 1 | 1u << 3, &place, &claim), TAKEN_ADOPTED);
    pool_abandon(pool, &begun);
    end();
}

/* A dial goes on until its connection is had by somebody, or by nobody. */
static void dials_go_on(void)
{
    begin(1, 1);
    struct pool_claim claim;
    CHECK(pool_take_empty(pool, &claim));
    struct pool_claim begun = claim;
    CHECK(pool_dial_goes_on(other, &begun));
    CHECK(play_install(pool, &claim));
    CHECK(pool_dial_goes_on(other, &begun));
    back(pool, claim);
    CHECK(!pool_dial_goes_on(other, &begun));
    end();
}

/* Does anything else promise to come back? Then the dial may go on beside the wait. */
static void alone_or_not(void)
{
    struct pool_claim claim, held;
    begin(2, 1);
    upstream_proved(&pool->slab);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
    CHECK(claim.alone);
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &held), TAKEN_DIAL);
    CHECK(!held.alone);
    pool_abandon(pool, &claim);
    CHECK(play_install(other, &held));
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
    CHECK(!claim.alone);
    pool_abandon(pool, &claim);
    back(other, held);
    end();
}

/* Somebody finds out whether the server is there: who waits for that ends nothing meanwhile, as there is an empty slot. */
static void unproved(void)
{
    struct waiter_place place = {0};
    struct pool_claim claim, held;
    begin(2, 1);
    back(pool, dial(pool, 0, 0, NULL));
    upstream_suspect(&pool->slab);
    CHECK_EQ(pool_take_dial(pool, true, &held), TAKEN_DIAL);
    CHECK_EQ(held.upstream, atomic_load(&pool->slab.header->upstream)); /* what the end of the dial is told to */
    upstream_untried(&pool->slab, held.upstream, clock_now() + 1000 * PLAY_MS);
    pool_abandon(pool, &held);
    CHECK_EQ(play_take(other, 1u << 3, &place, &claim), TAKEN_NOTHING);
    upstream_proved(&pool->slab);
    end();
}

/* While the server is down nobody dials; who waits and has something to wait for waits. */
static void down(void)
{
    struct waiter_place place = {0};
    struct pool_claim claim, held;
    begin(2, 1);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
    play_fail_dial(pool, &claim);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_DOWN);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_DOWN);
    CHECK_EQ(pool_take_dial(other, true, &claim), TAKEN_DOWN);
    atomic_store(&pool->slab.header->recovery_checked_ns, 0);
    CHECK_EQ(pool_take(other, PLAY_ANY, NULL, &claim), TAKEN_RECOVER); /* the dead may hold what is there */
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 2);
    held = dial(pool, 0, 0, NULL); /* one that began before */
    upstream_failed(&pool->slab, UPSTREAM_UP, clock_now(), &pool->options.backoff, 0, "refused");
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &claim), TAKEN_DOWN);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_NOTHING);
    CHECK(waiter_enter(&other->slab, &place, other->worker, PLAY_ANY, 1, 1));
    back(pool, held);
    struct waiter_place later = {0};
    CHECK_EQ(play_state(pool, held.slot), SLOT_OFFERED);
    CHECK_EQ(play_take(pool, PLAY_ANY, &later, &claim), TAKEN_NOTHING); /* an offer may be given back */
    pool_return_promise(other, waiter_leave(&other->slab, &place));
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_LEASED); /* what is there is had all the same */
    back(other, claim);
    upstream_proved(&pool->slab);
    end();
}

/* ---- health checks ---- */

/* Nobody has used or checked it for `ns`. */
static void age(uint32_t slot, uint64_t ns)
{
    atomic_store(&pool->slab.slots[slot].last_used_ns, clock_now() - ns);
    atomic_store(&pool->slab.slots[slot].checked_ns, clock_now() - ns);
}

static bool check_begins(struct pool *who, uint64_t interval_ns, bool only_private, struct pool_claim *claim)
{
    uint32_t from = 0;
    return pool_begin_check(who, &from, interval_ns, only_private, claim);
}

static void checks(void)
{
    struct waiter_place place = {0};
    struct pool_claim claim, check;
    uint32_t from = 0;
    begin(2, 1);
    struct pool_claim held = play_lease(pool), idle = play_lease(pool);
    back(pool, idle);
    age(held.slot, 2000 * PLAY_MS);
    age(idle.slot, 999 * PLAY_MS);
    CHECK(!check_begins(other, 1000 * PLAY_MS, false, &check)); /* too early; a lease is not looked at */
    age(idle.slot, 2000 * PLAY_MS);
    CHECK(pool_begin_check(other, &from, 1000 * PLAY_MS, false, &check));
    CHECK(check.slot == idle.slot && from == idle.slot + 1);
    CHECK(!pool_begin_check(other, &from, 1000 * PLAY_MS, false, &claim));
    CHECK(!check_begins(pool, 1000 * PLAY_MS, false, &claim)); /* one looks */
    CHECK_EQ(play_state(pool, idle.slot), SLOT_CHECKING);
    CHECK_EQ(pool_count_idle(pool), 1);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_NOTHING); /* and nobody has it meanwhile, nor its cache */
    CHECK(waiter_enter(&other->slab, &place, other->worker, PLAY_ANY, 1, clock_now()));
    struct pool_claim stale = check;
    CHECK(pool_end_check(other, &check));
    CHECK_EQ(atomic_load(&pool->slab.waiters[place.cell].futex), WAITER_WOKEN);
    waiter_leave(&other->slab, &place);
    CHECK(!pool_end_check(other, &stale)); /* once */
    CHECK(!pool_condemn(other, &stale));
    CHECK(!check_begins(other, 1000 * PLAY_MS, false, &check)); /* it was checked this moment */
    CHECK_EQ(freelist_take(&pool->slab, 0, 0), idle.slot); /* all know of it */
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_LEASED);
    back(pool, claim);
    back(pool, held);
    CHECK_EQ(play_total(pool, SHM_T_health_checks), 1);
    end();
}

static void checks_of_private_connections(void)
{
    struct pool_claim check;
    begin(2, 1);
    struct pool_claim own = dial(pool, 0, SHM_KIND_PRIVATE, NULL), shared = dial(pool, 0, 0, NULL);
    back(pool, own);
    back(pool, shared);
    age(own.slot, 2000 * PLAY_MS);
    age(shared.slot, 2000 * PLAY_MS);
    CHECK(!check_begins(other, PLAY_MS, true, &check));
    CHECK(check_begins(other, PLAY_MS, false, &check)); /* not that of another */
    CHECK_EQ(check.slot, shared.slot);
    CHECK(pool_end_check(other, &check));
    CHECK(check_begins(pool, PLAY_MS, true, &check));
    CHECK_EQ(check.slot, own.slot);
    CHECK(pool_condemn(pool, &check)); /* it is not well */
    play_retire(pool, &check, SHM_T_closed_unhealthy);
    CHECK_EQ(play_state(pool, own.slot), SLOT_EMPTY);
    end();
}

/* ---- leases taken back ---- */

static void revoked(void)
{
    int peer;
    begin(1, 1);
    struct pool_claim held = dial(pool, 0, 0, &peer), seen = {.slot = held.slot, .word = held.word}, late = seen;
    CHECK(pool_condemn(other, &seen)); /* anybody may, with the word of the lease */
    CHECK_EQ(play_release(pool, &held), RELEASE_STALE);
    play_retire(other, &seen, SHM_T_closed_revoked);
    CHECK(at_end(peer));
    close(peer);
    held = play_lease(pool);
    CHECK(!pool_condemn(other, &late)); /* a later lease is another */
    back(pool, held);
    CHECK(!pool_condemn(other, &late));
    CHECK_EQ(play_total(pool, SHM_T_closed_revoked), 1);
    end();
}

/* ---- who is told ---- */

static struct ended *only_note(struct pool *who)
{
    struct ended *note = pool_take_ended(who);
    CHECK(note && !note->next && !pool_take_ended(who));
    return note;
}

static void notes_of_the_ended(void)
{
    struct pool_claim claim;
    begin(2, 1);
    back(pool, dial(pool, 0, 0, NULL));
    claim = play_lease(pool);
    CHECK(pool_condemn(pool, &claim));
    play_retire(pool, &claim, SHM_T_closed_error);
    CHECK(!pool_take_ended(pool)); /* nobody wants to know */
    pool->notes_ended = true;
    CHECK(pool_take_empty(pool, &claim));
    CHECK(play_install_as(pool, &claim, (struct pool_birth){.bucket = 3, .expires_ns = PLAY_NEVER, .peer = {7, 8, 9}}, NULL));
    uint64_t id = atomic_load(&pool->slab.slots[claim.slot].connection);
    CHECK(pool_condemn(pool, &claim));
    play_retire(pool, &claim, SHM_T_closed_dirty);
    struct ended *note = only_note(pool);
    CHECK(note->connection == id && note->slot == claim.slot && note->reason == SHM_T_closed_dirty && note->kind == 3);
    CHECK(note->peer[0] == 7 && note->peer[2] == 9 && note->uses == 0 && note->age_ns < 10000 * PLAY_MS);
    free(note);
    CHECK(pool_take_empty(pool, &claim));
    pool_announce_dial(pool, &claim, 1, false);
    pool_name_connection(pool, &claim);
    pool_abandon(pool, &claim);
    CHECK(!pool_take_ended(pool)); /* there was no connection */
    struct pool_claim claims[2] = {play_lease(pool), play_lease(pool)};
    for (int i = 0; i < 2; i++) {
        CHECK(pool_condemn(pool, &claims[i]));
        play_retire(pool, &claims[i], SHM_T_closed_idle);
    }
    note = pool_take_ended(pool);
    CHECK(note && note->next && !note->next->next && note->slot == claims[1].slot); /* the latest first */
    free(note->next);
    free(note);
    CHECK(!pool_take_ended(other)); /* each process is told of what it ended itself */
    claim = play_lease(pool);
    CHECK(pool_condemn(pool, &claim));
    play_retire(pool, &claim, SHM_T_closed_idle); /* nobody takes the note: it goes with the handle */
    pool->notes_ended = false;
    end();
}

/* A dial whose process dies ended nothing; a lease did. */
static void notes_of_the_dead(void)
{
    struct pool_claim early, late, named;
    begin(4, 1);
    pool->notes_ended = true;
    struct pool *dead = play_join(pool);
    struct pool_claim claims[4];
    for (int i = 0; i < 4; i++)
        claims[i] = play_lease(pool);
    for (int i = 0; i < 4; i++) { /* all rows have been used before */
        CHECK(pool_condemn(pool, &claims[i]));
        play_retire(pool, &claims[i], SHM_T_closed_error);
    }
    for (struct ended *note = pool_take_ended(pool), *next; note; note = next) {
        next = note->next;
        free(note);
    }
    uint64_t failures = play_total(pool, SHM_T_dial_failures);
    CHECK(pool_take_empty(dead, &early));
    CHECK(pool_take_empty(dead, &late));
    pool_announce_dial(dead, &late, PLAY_ANY, false);
    CHECK(pool_take_empty(dead, &named));
    pool_announce_dial(dead, &named, PLAY_ANY, false);
    pool_name_connection(dead, &named);
    struct pool_claim held = play_lease(dead);
    play_die(dead);
    CHECK_EQ(recovery_run(pool, true), 4);
    struct ended *note = only_note(pool);
    CHECK(note->slot == held.slot && note->reason == SHM_T_closed_owner_died);
    free(note);
    CHECK_EQ(play_total(pool, SHM_T_closed_owner_died), 1);
    CHECK_EQ(play_total(pool, SHM_T_dial_failures), failures + 1);
    play_end(dead);
    pool->notes_ended = false;
    end();
}

/* Why a connection ends that is not to be kept. */
static void reasons(void)
{
    struct pool_claim claim;
    begin(1, 1);
    claim = dial(pool, 0, 0, NULL);
    CHECK_EQ(pool_over_reason(pool, claim.slot), SHM_T_closed_lifetime);
    CHECK_EQ(pool_retire_reason(pool, claim.slot), SHM_T_closed_idle);
    steering_state(&pool->slab, SHM_POOL_PAUSED);
    CHECK_EQ(pool_retire_reason(pool, claim.slot), SHM_T_closed_idle);
    steering_state(&pool->slab, SHM_POOL_DRAINING);
    CHECK_EQ(pool_retire_reason(pool, claim.slot), SHM_T_closed_shutdown);
    CHECK(steering_condemn(&pool->slab, claim.slot, atomic_load(&pool->slab.slots[claim.slot].connection), SHM_EXPIRES_EVICTED));
    CHECK_EQ(pool_retire_reason(pool, claim.slot), SHM_T_closed_evicted);
    CHECK_EQ(play_release(pool, &claim), RELEASE_RETIRE);
    steering_state(&pool->slab, SHM_POOL_OPEN);
    claim = dial(pool, 0, SHM_KIND_PRIVATE | SHM_KIND_UNMAILED, NULL);
    CHECK_EQ(pool_retire_reason(pool, claim.slot), SHM_T_closed_letter);
    CHECK_EQ(play_release(pool, &claim), RELEASE_RETIRE);
    end();
}

/* More idle than wanted: what comes back last ends. */
static void most_idle(void)
{
    begin(3, 3);
    struct pool_claim claims[3] = {play_lease(pool), play_lease(pool), play_lease(pool)};
    pool->options.idle_limit = 3; /* one more than may be idle */
    CHECK_EQ(play_release(pool, &claims[0]), RELEASED);
    CHECK_EQ(play_release(pool, &claims[1]), RELEASED);
    CHECK_EQ(play_release(pool, &claims[2]), RELEASE_RETIRE);
    CHECK_EQ(play_total(pool, SHM_T_closed_idle), 1);
    pool->options.idle_limit = 1;
    claims[0] = play_lease(pool);
    CHECK_EQ(play_release(pool, &claims[0]), RELEASE_RETIRE);
    pool->options.idle_limit = 0;
    end();
}

/* ---- the maintainer ---- */

static void one_maintainer(void)
{
    begin(1, 1);
    CHECK(pool_be_maintainer(other));
    CHECK(pool_be_maintainer(other)); /* it stays so */
    CHECK(!pool_be_maintainer(pool));
    pool_resign(pool); /* which it is not */
    CHECK(!pool_be_maintainer(pool));
    pool_resign(other);
    CHECK(pool_be_maintainer(pool));
    CHECK(!pool_be_maintainer(other));
    struct pool *dead = play_join(pool);
    pool_resign(pool);
    CHECK(pool_be_maintainer(dead));
    CHECK(!pool_be_maintainer(pool));
    play_die(dead); /* the kernel ends it */
    CHECK(pool_be_maintainer(pool));
    recovery_run(pool, true);
    play_end(dead);
    end();
}

/* One that has not said for long that it is at work is helped; it comes back, and the others stop. */
static void a_silent_maintainer(void)
{
    begin(1, 1);
    a64_shm *said = &pool->slab.header->maintained_ns;
    CHECK(pool_be_maintainer(other));
    atomic_store(said, clock_now() - MAINTAINER_PATIENCE_NS + 1000 * PLAY_MS);
    CHECK(!pool_be_maintainer(pool));
    atomic_store(said, clock_now() - MAINTAINER_PATIENCE_NS - PLAY_MS);
    CHECK(pool_be_maintainer(pool));
    CHECK(pool_be_maintainer(other));
    CHECK(!pool_be_maintainer(pool));
    pool_leave(other); /* with its seat goes the lock */
    CHECK_EQ(pool_join(other), POOL_OK);
    CHECK(pool_be_maintainer(pool));
    end();
}

/* ---- leaving and closing ---- */

/* A thread of the leaver dials, for longer than it is waited for: the row stays, and is swept like that of one who died. */
static void leaving_a_dial(void)
{
    begin(1, 1);
    struct pool_claim claim;
    CHECK(pool_take_empty(other, &claim));
    pool_leave(other);
    play_check_workers(pool, 2);
    CHECK_EQ(recovery_run(pool, true), 1);
    CHECK_EQ(play_state(pool, 0), SLOT_EMPTY);
    play_check_workers(pool, 1);
    play_end(other);
    play_leave(pool);
}

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
    CHECK_EQ(play_total(pool, SHM_T_closed_shutdown), 2);
    CHECK_EQ(play_total(pool, SHM_T_closed_owner_died) + play_total(pool, SHM_T_recovered_leases), 0); /* nobody died */
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

/* ---- joining by descriptors that were sent ---- */

enum { SLOTS = 3 };

static struct sockaddr_un newcomers_address;
static socklen_t newcomers_address_size;

/* A pool on which newcomers can ask. */
static struct pool *found_listening(void)
{
    struct slab_layout layout;
    struct slab_identity who = play_identity();
    struct pool_options options = play_options(1);
    struct pool *founded = calloc(1, sizeof *founded);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct sockaddr_un any = {.sun_family = AF_UNIX};
    newcomers_address_size = sizeof newcomers_address;
    CHECK(founded && listener >= 0 && bind(listener, (struct sockaddr *)&any, sizeof any.sun_family) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&newcomers_address, &newcomers_address_size) == 0);
    CHECK(listen(listener, 100) == 0 && slab_layout(&layout, SLOTS, 3, 8));
    CHECK_EQ(pool_create(founded, play_memory(layout.total_size), listener, &layout, &who, &options), POOL_OK);
    return founded;
}

/* What `from` would send; the slab's file by a description of its own, so that no lock of the sender's comes along. */
static struct descriptors set_of(const struct pool *from)
{
    struct descriptors set = from->shared;
    set.slab = file_open_anew(from->slab_fd);
    set.listener = set.listener < 0 ? -1 : dup(set.listener);
    set.mailboxes = malloc(set.count * sizeof *set.mailboxes);
    CHECK(set.slab >= 0 && set.mailboxes);
    for (uint32_t i = 0; i < set.count; i++)
        CHECK((set.mailboxes[i] = dup(from->mailboxes[i])) >= 0);
    return set;
}

static struct pool *attach(struct descriptors set)
{
    enum slab_verdict why;
    struct pool_options options = play_options(1);
    struct pool *attached = calloc(1, sizeof *attached);
    CHECK(attached);
    CHECK_EQ(pool_attach(attached, &set, &options, &why), POOL_OK);
    CHECK_EQ(why, SLAB_OK);
    return attached;
}

/* The set is taken over, also when it is no good. */
static enum pool_verdict refused(struct descriptors set, enum slab_verdict *why)
{
    struct pool_options options = play_options(1);
    struct pool attached;
    enum pool_verdict verdict = pool_attach(&attached, &set, &options, why);
    int error = errno;
    CHECK(verdict != POOL_OK);
    pool_free(&attached);
    errno = error;
    return verdict;
}

static struct descriptors asked(void)
{
    struct descriptors set;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&newcomers_address, newcomers_address_size) == 0);
    CHECK_EQ(descriptors_receive(fd, &set, SETS_LONG_NS), 0);
    close(fd);
    return set;
}

static void used_by_both(struct pool *one, struct pool *two)
{
    int peer;
    char byte;
    back(one, dial(one, 4, 0, &peer));
    struct pool_claim claim = play_lease(two);
    int fd = play_fetch(two, &claim);
    CHECK(fd >= 0 && write(fd, "x", 1) == 1 && read(peer, &byte, 1) == 1);
    CHECK(pool_condemn(two, &claim)); /* ended by one, for all */
    play_retire(two, &claim, SHM_T_closed_error);
    CHECK(at_end(peer));
    close(peer);
}

static void attached_by_a_set(void)
{
    int before = sets_open_descriptors();
    pool = play_found(SLOTS, 3, 8, 1);
    other = attach(set_of(pool));
    CHECK(pool_joined(other) && other->worker != pool->worker && other->slab.header != pool->slab.header);
    CHECK(!other->door);
    play_check_workers(pool, 2);
    used_by_both(pool, other);
    used_by_both(other, pool);
    play_lease_all(other);
    end();
    CHECK_EQ(sets_open_descriptors(), before);
}

/* Members answer, also those that came as newcomers, and the founder may go. */
static void attached_by_asking(void)
{
    int before = sets_open_descriptors();
    pool = found_listening();
    CHECK(rendezvous_is_open(pool->door));
    other = attach(asked());
    used_by_both(pool, other);
    used_by_both(other, pool);
    play_leave(pool);
    pool = attach(asked()); /* by the other */
    used_by_both(pool, other);
    pool_leave(other);
    CHECK(!rendezvous_is_open(other->door)); /* who left sends nobody in */
    CHECK_EQ(pool_join(other), POOL_OK);
    CHECK_EQ(pool_answer(other), 0);
    CHECK_EQ(pool_answer(other), 0);
    CHECK(rendezvous_is_open(other->door));
    end();
    CHECK_EQ(sets_open_descriptors(), before);
}

/* A child answers for itself once it has joined, however it was made; its parent does not. */
static void child_answers(pid_t (*make)(void))
{
    int told[2], hold[2];
    char byte;
    CHECK(pipe(told) == 0 && pipe(hold) == 0);
    pool = found_listening();
    fflush(stdout);
    pid_t child = make();
    if (!child) {
        alarm(30);
        CHECK_EQ(pool_join(pool), POOL_OK);
        CHECK_EQ(pool_answer(pool), 0);
        CHECK(write(told[1], "a", 1) == 1);
        CHECK(read(hold[0], &byte, 1) == 1);
        pool_leave(pool);
        _exit(0);
    }
    close(told[1]);
    close(hold[0]);
    CHECK(read(told[0], &byte, 1) == 1);
    rendezvous_close(pool->door);
    other = attach(asked());
    rendezvous_close(other->door);
    CHECK(write(hold[1], "e", 1) == 1);
    sets_expect_exit(child);
    used_by_both(pool, other);
    end();
    close(told[0]);
    close(hold[1]);
}

static pid_t raw_fork(void) { return (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL); }
static void forked_child_answers(void) { child_answers(fork); }
static void raw_child_answers(void)
{
    if (!sets_skip_raw_clone())
        child_answers(raw_fork);
}

/* A fork ends the thread; the parent's next use of the pool goes the long way once, and begins it again. */
static void parent_answers_again(void)
{
    pool = found_listening();
    uint32_t worker = pool->worker, generation = pool->generation;
    struct pool_claim claim = play_lease(pool);
    fflush(stdout);
    for (int i = 0; i < 3; i++) {
        pid_t child = fork();
        if (!child)
            _exit(pool_joined(pool) || atomic_load(&pool->fork->phase) != FORK_WIPED);
        sets_expect_exit(child);
        CHECK(atomic_load(&pool->fork->phase) == FORK_PARENT && !rendezvous_is_open(pool->door));
        CHECK_EQ(pool_join(pool), POOL_OK);
        CHECK_EQ(pool_answer(pool), 0);
        CHECK(atomic_load(&pool->fork->phase) == FORK_READY && rendezvous_is_open(pool->door));
        CHECK(pool->worker == worker && pool->generation == generation);
        CHECK_EQ(play_state(pool, claim.slot), SLOT_LEASED);
    }
    back(pool, claim);
    other = attach(asked());
    pid_t child = fork();
    if (!child)
        _exit(0);
    sets_expect_exit(child);
    pool_leave(other); /* also when it has not begun again */
    play_check_workers(pool, 1);
    CHECK_EQ(pool_join(other), POOL_OK);
    end();
}

static void swap(int *a, int *b)
{
    int kept = *a;
    *a = *b;
    *b = kept;
}

/* A set of which one descriptor is another than the slab says. */
static void lost(struct descriptors set)
{
    enum slab_verdict why;
    CHECK_EQ(refused(set, &why), POOL_LOST_DESCRIPTORS);
}

static void sets_with_one_wrong(void)
{
    pool = found_listening();
    int before = sets_open_descriptors();
    for (uint32_t i = 0; i < SLOTS; i++) {
        struct descriptors set = set_of(pool);
        int mailbox = mailbox_new();
        swap(&mailbox, &set.mailboxes[i]); /* another mailbox */
        close(mailbox);
        lost(set);
        set = set_of(pool);
        close(set.mailboxes[i]); /* none */
        set.mailboxes[i] = -1;
        lost(set);
        set = set_of(pool);
        swap(&set.mailboxes[i], &set.mailboxes[(i + 1) % SLOTS]); /* that of another slot */
        lost(set);
    }
    struct descriptors set = set_of(pool);
    close(set.listener); /* not that listener */
    set.listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    lost(set);
    set = set_of(pool);
    close(set.listener); /* none */
    set.listener = -1;
    lost(set);
    CHECK_EQ(sets_open_descriptors(), before);
    play_check_workers(pool, 1);
    play_lease_all(pool);
    play_leave(pool);
}

static void sets_of_another_size(void)
{
    pool = play_found(SLOTS, 3, 8, 1);
    int before = sets_open_descriptors();
    struct descriptors set = set_of(pool);
    close(set.mailboxes[--set.count]); /* one too few */
    lost(set);
    set = set_of(pool);
    set.mailboxes = realloc(set.mailboxes, (SLOTS + 1) * sizeof *set.mailboxes);
    CHECK(set.mailboxes);
    set.mailboxes[set.count++] = mailbox_new(); /* one too many */
    lost(set);
    CHECK_EQ(sets_open_descriptors(), before);
    play_check_workers(pool, 1);
    play_leave(pool);
}

/* The slab of one pool with the mailboxes of another; the set of one under the id of another. */
static void sets_of_another_slab(void)
{
    pool = play_found(SLOTS, 3, 8, 1);
    other = play_found(SLOTS, 3, 8, 1);
    int before = sets_open_descriptors();
    struct descriptors ours = set_of(pool), theirs = set_of(other);
    swap(&ours.slab, &theirs.slab);
    lost(ours);
    lost(theirs);
    ours = set_of(pool);
    ours.slab_id[15]++;
    lost(ours);
    CHECK_EQ(sets_open_descriptors(), before);
    for (int i = 0; i < 2; i++) {
        struct pool *one = i ? other : pool;
        play_check_workers(one, 1);
        play_leave(one);
    }
}

/* A set with that file in place of the slab's. */
static void bad_slab(int file, enum slab_verdict expected)
{
    enum slab_verdict why;
    struct descriptors set = set_of(pool);
    CHECK(file >= 0);
    close(set.slab);
    set.slab = file;
    CHECK_EQ(refused(set, &why), POOL_BAD_SLAB);
    CHECK_EQ(why, expected);
}

/* A copy of the slab, of that size. */
static int copy_of_slab(uint64_t size)
{
    uint64_t whole = pool->slab.layout.total_size, part = size < whole ? size : whole;
    int file = play_memory(size);
    CHECK_EQ(pwrite(file, pool->slab.header, part, 0), part);
    return file;
}

static int changed_copy(size_t offset, uint32_t value)
{
    int file = copy_of_slab(pool->slab.layout.total_size);
    CHECK(pwrite(file, &value, sizeof value, (off_t)offset) == sizeof value);
    return file;
}

static void slabs_that_are_none(void)
{
    pool = play_found(SLOTS, 3, 8, 1);
    int before = sets_open_descriptors();
    uint64_t size = pool->slab.layout.total_size;
    bad_slab(copy_of_slab(size - 4096), SLAB_BAD_SIZES);
    bad_slab(copy_of_slab(size + 4096), SLAB_BAD_SIZES);
    bad_slab(copy_of_slab(SHM_HEADER_BYTES), SLAB_TOO_SMALL);
    bad_slab(copy_of_slab(SHM_HEADER_BYTES - 1), SLAB_TOO_SMALL);
    bad_slab(play_memory(0), SLAB_TOO_SMALL);
    bad_slab(play_memory(size), SLAB_NO_MAGIC); /* zeroed */
    bad_slab(changed_copy(offsetof(struct header_shm, version), SHM_VERSION + 1), SLAB_FOREIGN_VERSION);
    bad_slab(changed_copy(offsetof(struct header_shm, format), slab_format() + 1), SLAB_FOREIGN_FORMAT);
    bad_slab(changed_copy(offsetof(struct header_shm, max_slots), SLOTS + 100), SLAB_BAD_SIZES);
    bad_slab(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), SLAB_TOO_SMALL);
    struct descriptors set = set_of(pool);
    close(set.slab); /* none at all */
    set.slab = -1;
    lost(set);
    CHECK_EQ(sets_open_descriptors(), before);
    play_check_workers(pool, 1);
    play_leave(pool);
}

static void slab_of_another_user(void)
{
    if (geteuid()) {
        printf("  not done: only root can give a file away\n");
        return;
    }
    pool = play_found(SLOTS, 3, 8, 1);
    int before = sets_open_descriptors();
    CHECK(fchown(pool->slab_fd, 65534, 65534) == 0);
    lost(set_of(pool));
    CHECK(fchown(pool->slab_fd, 0, 0) == 0);
    other = attach(set_of(pool));
    play_leave(other);
    CHECK_EQ(sets_open_descriptors(), before);
    play_leave(pool);
}

/* It fails at one descriptor after the other, leaves nothing each time, and in the end there is room enough. */
static void attached_without_room(void)
{
    enum slab_verdict why;
    struct pool_options options = play_options(1);
    struct pool attached;
    pool = found_listening();
    int before = sets_open_descriptors(), room = 0;
    for (bool done = false; !done; room++) {
        struct descriptors set = set_of(pool);
        sets_leave_room(room);
        enum pool_verdict verdict = pool_attach(&attached, &set, &options, &why);
        int error = errno;
        sets_make_room();
        done = verdict == POOL_OK;
        CHECK(done || (verdict == POOL_ERRNO && error == EMFILE));
        if (done)
            pool_leave(&attached);
        pool_free(&attached);
        CHECK_EQ(sets_open_descriptors(), before);
    }
    CHECK(room > 3); /* the map, the seat, the thread */
    recovery_run(pool, true); /* who had a place already died in it */
    play_check_workers(pool, 1);
    play_lease_all(pool);
    play_leave(pool);
}

static void attached_without_a_place(void)
{
    enum slab_verdict why;
    pool = play_found(SLOTS, 1, 8, 1);
    int before = sets_open_descriptors();
    CHECK_EQ(refused(set_of(pool), &why), POOL_NO_WORKER);
    CHECK_EQ(sets_open_descriptors(), before);
    other = play_attach(pool);
    before = sets_open_descriptors();
    for (int i = 0; i < 2; i++) /* and not the second time either */
        CHECK_EQ(pool_join(other), POOL_NO_WORKER);
    CHECK_EQ(sets_open_descriptors(), before);
    play_end(other);
    play_leave(pool);
}

/* Who attached is of the family: while it lives, registered or not, the slab is not among the remains of the dead. */
static void attached_is_of_the_family(void)
{
    pool = play_found(SLOTS, 3, 8, 1);
    int witness = file_open_anew(pool->slab_fd);
    other = attach(set_of(pool));
    play_leave(pool);
    CHECK(byte_is_locked(witness, SHM_FAMILY_BYTE));
    pool_leave(other);
    CHECK(byte_is_locked(witness, SHM_FAMILY_BYTE));
    play_end(other);
    CHECK(!byte_is_locked(witness, SHM_FAMILY_BYTE));
    close(witness);
}

int main(void)
{
    sets_make_room();
    RUN(order_of_a_get);
    RUN(kinds);
    RUN(kinds_after_a_resize);
    RUN(times_of_leases);
    RUN(no_descriptor_to_end_with);
    RUN(ended_with_the_spare_descriptor);
    RUN(ended_by_the_letter);
    RUN(abandoned_with_a_letter);
    RUN(dialled_over_a_letter);
    RUN(stale_releases);
    RUN(released_by_two_threads);
    RUN(shared_by_letter);
    RUN(letter_lost);
    RUN(private_connections);
    RUN(unmailed_connections);
    RUN(rows);
    RUN(many_retired_at_once);
    RUN(validated);
    RUN(dials_are_adopted);
    RUN(dials_with_a_caller_are_not);
    RUN(dials_for_other_kinds_are_not);
    RUN(dials_go_on);
    RUN(alone_or_not);
    RUN(unproved);
    RUN(down);
    RUN(checks);
    RUN(checks_of_private_connections);
    RUN(revoked);
    RUN(notes_of_the_ended);
    RUN(notes_of_the_dead);
    RUN(reasons);
    RUN(most_idle);
    RUN(one_maintainer);
    RUN(a_silent_maintainer);
    RUN(leaving);
    RUN(leaving_a_dial);
    RUN(closing);
    RUN(closing_takes_idle_and_offered);
    RUN(promise_returned_after_closing);
    RUN(no_descriptor_leaks);
    RUN(a_given_back_claim_is_stale);
    RUN(attached_by_a_set);
    RUN(attached_by_asking);
    RUN(forked_child_answers);
    RUN(parent_answers_again);
    RUN(raw_child_answers);
    RUN(sets_with_one_wrong);
    RUN(sets_of_another_size);
    RUN(sets_of_another_slab);
    RUN(slabs_that_are_none);
    RUN(slab_of_another_user);
    RUN(attached_without_room);
    RUN(attached_without_a_place);
    RUN(attached_is_of_the_family);
}
