/* test_recovery.c: what the dead held, state by state; once, twice, and by several at a time. */
#include <pthread.h>
#include <sys/wait.h>

#include "play.h"

static struct pool *pool, *dead;

static void begin(uint32_t slots)
{
    pool = play_found(slots, 4, 4, 2);
    dead = play_join(pool);
}

static bool briefly; /* as one looks who waits */

static uint32_t recover(void)
{
    play_die(dead);
    atomic_store(&pool->slab.header->recovery_checked_ns, 0);
    uint32_t freed = recovery_run(pool, !briefly), recoveries = (uint32_t)play_total(pool, SHM_T_recoveries);
    CHECK_EQ(recovery_run(pool, true), 0); /* twice is once */
    CHECK_EQ(play_total(pool, SHM_T_recoveries), recoveries); /* nobody was passed over */
    return freed;
}

static void end(void)
{
    play_check_workers(pool, 1);
    play_check_queue_empty(pool);
    play_end(dead);
    play_lease_all(pool);
    play_leave(pool);
}

static bool at_end(int fd)
{
    char byte;
    return recv(fd, &byte, 1, MSG_DONTWAIT) == 0;
}

/* A connection of the dead one, leased; its peer's end. */
static struct pool_claim leased(int *peer)
{
    struct pool_claim claim;
    CHECK(pool_take_empty(dead, &claim));
    CHECK(play_install_as(dead, &claim, (struct pool_birth){.bucket = 0, .expires_ns = PLAY_NEVER}, peer));
    return claim;
}

static void nothing(void)
{
    begin(2);
    CHECK_EQ(recover(), 0);
    CHECK_EQ(play_total(pool, SHM_T_recoveries), 1);
    CHECK(!byte_is_locked(pool->slab_fd, dead->worker - 1)); /* its index is anybody's */
    end();
}

/* Who has nothing is in nobody's way, and is not looked at. */
static void nothing_briefly(void)
{
    begin(2);
    int peer;
    struct pool_claim claim = leased(&peer);
    CHECK_EQ(play_release(dead, &claim), RELEASED);
    play_die(dead);
    atomic_store(&pool->slab.header->recovery_checked_ns, 0);
    CHECK_EQ(recovery_run(pool, false), 0);
    CHECK_EQ(play_total(pool, SHM_T_recoveries), 0);
    CHECK_EQ(recovery_run(pool, true), 0);
    CHECK_EQ(play_total(pool, SHM_T_recoveries), 1);
    close(peer);
    end();
}

static void listens(void)
{
    begin(2);
    pool->slab.header->listening = 1;
    briefly = true;
    CHECK_EQ(recover(), 0);
    briefly = false;
    pool->slab.header->listening = 0;
    end();
}

static void prober(void)
{
    begin(1);
    atomic_store(&pool->slab.header->upstream, UPSTREAM_PROBING | (uint64_t)dead->worker << UPSTREAM_OWNER_SHIFT);
    CHECK_EQ(recover(), 0);
    CHECK(upstream_state(atomic_load(&pool->slab.header->upstream)) != UPSTREAM_PROBING);
    atomic_store(&pool->slab.header->upstream, 0);
    end();
}

static void lease(void)
{
    int peer;
    begin(2);
    struct pool_claim claim = leased(&peer);
    CHECK_EQ(recovery_run(pool, true), 0); /* the living are left alone */
    CHECK_EQ(play_word(pool, claim.slot), claim.word);
    CHECK_EQ(recover(), 1);
    CHECK_EQ(play_state(pool, claim.slot), SLOT_EMPTY);
    CHECK(at_end(peer)); /* ended through its letter, though the dead one's descriptor is still open here */
    close(peer);
    CHECK_EQ(play_total(pool, SHM_T_recovered_leases), 1);
    CHECK_EQ(play_total(pool, SHM_T_closed_owner_died), 1);
    CHECK_EQ(play_release(dead, &claim), RELEASE_STALE);
    CHECK(!pool_condemn(dead, &claim));
    end();
}

static void dialing(void)
{
    begin(2);
    struct pool_claim early, late;
    int ends[2];
    CHECK(pool_take_empty(dead, &early) && pool_take_empty(dead, &late));
    uint64_t id = pool_name_connection(dead, &late); /* its letter is there, it is not installed */
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    CHECK_EQ(mailbox_deposit(dead->mailboxes[late.slot], dead->slab.header->id, late.slot, id, ends[0], NULL, 0), 0);
    CHECK_EQ(recover(), 2);
    CHECK(at_end(ends[1]));
    close(ends[0]);
    close(ends[1]);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 2);
    CHECK(!play_install(dead, &early)); /* too late */
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 2);
    mailbox_drain(pool->mailboxes[early.slot]);
    end();
}

static void retiring_and_checking(void)
{
    begin(2);
    int peers[2];
    struct pool_claim one = leased(&peers[0]), two = leased(&peers[1]);
    CHECK(pool_condemn(dead, &one));
    CHECK_EQ(play_release(dead, &two), RELEASED);
    uint64_t word = play_word(pool, two.slot);
    CHECK(slot_move(&dead->slab.slots[two.slot], &word, dead->worker, SLOT_CHECKING));
    CHECK_EQ(recover(), 2);
    CHECK(at_end(peers[0]) && at_end(peers[1]));
    close(peers[0]);
    close(peers[1]);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 2);
    end();
}

/* A promise to the dead goes back; the connection lives. */
static void offered(void)
{
    int peer;
    begin(1);
    struct pool_claim claim = leased(&peer);
    struct waiter_place place = {0};
    CHECK_EQ(play_release(dead, &claim), RELEASED);
    claim = play_lease(pool);
    CHECK(waiter_enter(&dead->slab, &place, dead->worker, PLAY_ANY, 1, 1));
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(play_state(pool, 0), SLOT_OFFERED);
    CHECK_EQ(recover(), 0);
    CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    CHECK(!at_end(peer));
    close(peer);
    end();
}

/* What lies idle lives on, and is found without a scan. */
static void idle(void)
{
    int peer;
    begin(1);
    struct pool_claim claim = leased(&peer);
    CHECK_EQ(play_release(dead, &claim), RELEASED);
    CHECK_EQ(recover(), 0);
    CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    claim = play_lease(pool);
    CHECK_EQ(claim.source, SOURCE_FREELIST);
    CHECK(play_fetch(pool, &claim) >= 0 && !at_end(peer));
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    close(peer);
    end();
}

/* But not what only the dead could use. */
static void idle_private(void)
{
    begin(1);
    struct pool_claim claim;
    CHECK(pool_take_empty(dead, &claim));
    CHECK(play_install_as(dead, &claim, (struct pool_birth){.flags = SHM_KIND_PRIVATE, .expires_ns = PLAY_NEVER}, NULL));
    CHECK_EQ(play_release(dead, &claim), RELEASED);
    CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    CHECK_EQ(recover(), 1);
    CHECK_EQ(play_state(pool, 0), SLOT_EMPTY);
    end();
}

static void waiters(void)
{
    begin(1);
    struct waiter_place places[4] = {{0}};
    for (int i = 0; i < 4; i++)
        CHECK(waiter_enter(&dead->slab, &places[i], i == 2 ? pool->worker : dead->worker, 1, 1, 1));
    CHECK_EQ(recover(), 0);
    CHECK_EQ(play_total(pool, SHM_T_recovered_waiters), 3);
    CHECK(atomic_load(&pool->slab.waiters[places[2].cell].futex)); /* the living one is told to look */
    CHECK_EQ(waiter_leave(&pool->slab, &places[2]), -1);
    end();
}

/* Damage is passed over: words of no state, and owners that do not exist. */
static void damaged_words(void)
{
    begin(6);
    for (uint32_t i = 0; i < 5; i++)
        atomic_store(&pool->slab.slots[i].word, slot_word(3, i < 4 ? dead->worker : 5000, (enum slot_state[]){0, 8, 15, 9, 3}[i]));
    struct pool_claim claim = {0}, last;
    CHECK(pool_take_empty(dead, &last));
    CHECK_EQ(recover(), 1);
    CHECK_EQ(play_state(pool, 5), SLOT_EMPTY);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_DAMAGED);
    for (uint32_t i = 0; i < 5; i++)
        atomic_store(&pool->slab.slots[i].word, slot_word(3, 0, SLOT_EMPTY));
    end();
}

/* More than one batch, at the end of the table, too. */
static void many(void)
{
    enum { COUNT = 130 };
    begin(COUNT);
    for (int i = 0; i < COUNT; i++) {
        struct pool_claim claim;
        CHECK(pool_take_empty(dead, &claim));
        CHECK(play_install(dead, &claim));
    }
    uint64_t begun = clock_now();
    CHECK_EQ(recover(), COUNT);
    CHECK(clock_now() - begun < 100 * CONNECTION_LINGER_NS); /* one linger for each batch, not for each */
    CHECK_EQ(play_count(pool, SLOT_EMPTY), COUNT);
    end();
}

/* The seat of the dead is taken by a newcomer, who sweeps it first: no lease of the last holder is his. */
static void swept_by_newcomer(void)
{
    begin(2);
    struct pool *third = play_join(pool), *fourth = play_join(pool);
    struct pool_claim claim = play_lease(dead), stale = claim;
    play_die(dead);
    struct pool *newcomer = play_join(pool);
    CHECK_EQ(newcomer->worker, dead->worker);
    CHECK_EQ(play_state(pool, claim.slot), SLOT_EMPTY);
    CHECK_EQ(recovery_run(pool, true), 0);
    struct pool_claim fresh = play_lease(newcomer);
    CHECK_EQ(play_release(dead, &stale), RELEASE_STALE);
    CHECK_EQ(play_word(pool, fresh.slot), fresh.word);
    CHECK_EQ(play_release(newcomer, &fresh), RELEASED);
    play_leave(newcomer);
    play_leave(third);
    play_leave(fourth);
    end();
}

/* While somebody holds the byte of the dead, nobody else sweeps. */
static void one_at_a_time(void)
{
    begin(1);
    struct pool *other = play_join(pool);
    play_lease(dead);
    play_die(dead);
    CHECK(byte_lock(other->seat->fd, dead->worker - 1));
    CHECK_EQ(recovery_run(pool, true), 0);
    CHECK_EQ(play_state(pool, 0), SLOT_LEASED);
    play_die(other); /* the recoverer dies: the right to recover is free again */
    CHECK_EQ(recovery_run(pool, true), 1);
    play_end(other);
    end();
}

static void interval(void)
{
    begin(1);
    play_lease(dead);
    play_die(dead);
    atomic_store(&pool->slab.header->recovery_checked_ns, clock_coarse());
    CHECK(!recovery_is_due(pool));
    atomic_store(&pool->slab.header->recovery_checked_ns, clock_coarse() - RECOVERY_INTERVAL_NS);
    CHECK(recovery_is_due(pool));
    struct pool_claim claim;
    CHECK_EQ(pool_take(pool, PLAY_ANY, NULL, &claim), TAKEN_RECOVER);
    CHECK_EQ(recovery_run(pool, false), 1); /* it stops at the first that gave something: there may be more */
    CHECK(recovery_is_due(pool));
    CHECK_EQ(recovery_run(pool, false), 0);
    CHECK(!recovery_is_due(pool));
    CHECK_EQ(pool_take(pool, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
    pool_abandon(pool, &claim);
    CHECK_EQ(recover(), 0);
    end();
}

/* Threads of one process: one sweeps, the others go on. */
static void *sweep(void *arg)
{
    return (void *)(uintptr_t)recovery_run(arg, true);
}

static void threads(void)
{
    begin(8);
    for (int round = 0; round < 50; round++) {
        pthread_t running[3];
        for (int i = 0; i < 8; i++)
            play_lease(dead);
        play_die(dead);
        uintptr_t freed = 0;
        for (int i = 0; i < 3; i++)
            CHECK(pthread_create(&running[i], NULL, sweep, pool) == 0);
        for (int i = 0; i < 3; i++) {
            void *result;
            pthread_join(running[i], &result);
            freed += (uintptr_t)result;
        }
        CHECK_EQ(freed, 8);
        play_end(dead);
        dead = play_join(pool);
    }
    play_die(dead);
    recovery_run(pool, true);
    end();
}

/* The pool was made smaller: what the dead held beyond the cap is swept all the same. */
static void beyond_the_cap(void)
{
    begin(3);
    for (int i = 0; i < 3; i++)
        leased(NULL);
    steering_resize(&pool->slab, 1);
    CHECK_EQ(recover(), 3);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 3);
    end();
}

/* A child of a process that swept this moment sweeps too: its parent's thread is not in it. */
static void child_of_a_sweeper(void)
{
    int status;
    begin(1);
    leased(NULL);
    play_die(dead);
    atomic_store(&pool->recovering, true);
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        CHECK_EQ(pool_join(pool), POOL_OK);
        CHECK_EQ(recovery_run(pool, true), 1);
        pool_leave(pool);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    atomic_store(&pool->recovering, false);
    end();
}

int main(void)
{
    RUN(nothing);
    RUN(nothing_briefly);
    RUN(listens);
    for (int way = 0; way < 2; way++) {
        briefly = way;
        RUN(lease);
        RUN(dialing);
        RUN(retiring_and_checking);
        RUN(offered);
        RUN(idle_private);
        RUN(waiters);
        RUN(prober);
    }
    briefly = false;
    RUN(idle);
    RUN(damaged_words);
    RUN(many);
    RUN(swept_by_newcomer);
    RUN(one_at_a_time);
    RUN(interval);
    RUN(threads);
    RUN(beyond_the_cap);
    RUN(child_of_a_sweeper);
}
