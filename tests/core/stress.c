/* stress.c: threads play workers, at random, over the real core; for the sanitizers.
 *
 * Some handles are shared by two threads, as in a process with threads; one thread makes short-lived workers that die with
 * leases; one checks idle connections, makes the pool smaller and larger, pauses it, evicts, fails dials. Each holder of a slot
 * writes to a payload of plain memory: ThreadSanitizer reports a race when a slot changes hands in an order that is too weak, and a
 * second holder is found by everyone. At the end the pool is closed under way.
 *
 *   stress [ROUNDS of each thread] [SEED]
 */
#include <pthread.h>
#include <sched.h>

#include "play.h"

enum { SLOTS = 3, HANDLES = 3, THREADS = 2 * HANDLES };

static struct payload {
    uint64_t uses;
    int holder;
} payloads[SLOTS];

static struct pool *first;
static uint64_t rounds;
static a64_shm leases, deaths, finished;

struct player {
    struct pool *pool;
    int number;
    struct check_random random;
};

static void hold(struct player *player, const struct pool_claim *claim)
{
    struct payload *payload = &payloads[claim->slot];
    CHECK_EQ(payload->holder, 0);
    payload->holder = player->number;
    payload->uses++;
    if (check_random(&player->random) % 8 == 0)
        sched_yield();
    CHECK(play_fetch(player->pool, claim) >= 0);
    CHECK_EQ(payload->holder, player->number);
    payload->holder = 0;
}

static void use(struct player *player, const struct pool_claim *claim)
{
    hold(player, claim);
    atomic_fetch_add_explicit(&leases, 1, memory_order_relaxed);
}

static void end_lease(struct player *player, struct pool_claim *claim)
{
    struct pool_claim stale = *claim;
    if (check_random(&player->random) % 16 == 0) {
        CHECK(pool_condemn(player->pool, claim));
        play_retire(player->pool, claim, SHM_T_closed_error);
    } else
        CHECK(play_release(player->pool, claim) != RELEASE_STALE);
    CHECK_EQ(play_release(player->pool, &stale), RELEASE_STALE);
}

static void check_idle(struct player *player)
{
    struct pool_claim claim;
    for (uint32_t from = 0; pool_begin_check(player->pool, &from, 0, false, &claim);) {
        hold(player, &claim);
        if (check_random(&player->random) % 4)
            CHECK(pool_end_check(player->pool, &claim));
        else {
            CHECK(pool_condemn(player->pool, &claim));
            play_retire(player->pool, &claim, SHM_T_closed_unhealthy);
        }
    }
}

/* A dial for nobody: it may be adopted, and succeeds or not. */
static void dial_for_nobody(struct player *player)
{
    struct pool_claim claim;
    if (pool_take_dial(player->pool, true, &claim) != TAKEN_DIAL)
        return;
    pool_announce_dial(player->pool, &claim, PLAY_ANY, true);
    sched_yield();
    if (check_random(&player->random) % 2) {
        play_fail_dial(player->pool, &claim);
        upstream_proved(&player->pool->slab); /* another dial of that moment has succeeded */
        return;
    }
    CHECK(play_install(player->pool, &claim));
    play_release(player->pool, &claim);
}

static void *steer(void *arg)
{
    struct player *player = arg;
    struct slab *slab = &player->pool->slab;
    while (atomic_load(&finished) < THREADS && pool_is_open(player->pool)) {
        uint64_t draw = check_random(&player->random);
        if (draw % 4 == 0)
            steering_resize(slab, (uint32_t)(draw / 8 % SLOTS) + 1);
        else if (draw % 4 == 1)
            steering_evict(slab, 0, "", 0, draw / 8 % 2);
        else if (draw % 4 == 2)
            check_idle(player);
        else
            dial_for_nobody(player);
        if (draw % 32 == 7)
            steering_state(slab, SHM_POOL_PAUSED);
        sched_yield();
        if (draw % 32 == 7)
            steering_state(slab, SHM_POOL_OPEN);
        pool_be_maintainer(player->pool);
    }
    return NULL;
}

static void dial_private(struct player *player)
{
    struct pool_claim claim;
    if (!pool_take_empty(player->pool, &claim))
        return;
    if (check_random(&player->random) % 2) {
        pool_name_connection(player->pool, &claim);
        pool_abandon(player->pool, &claim);
        return;
    }
    CHECK(play_install_as(player->pool, &claim, (struct pool_birth){.flags = SHM_KIND_PRIVATE, .expires_ns = PLAY_NEVER}, NULL));
    use(player, &claim);
    end_lease(player, &claim);
}

static void *play(void *arg)
{
    struct player *player = arg;
    for (uint64_t i = 0; i < rounds; i++) {
        struct pool_claim claim;
        uint64_t draw = check_random(&player->random) % 32;
        if (draw == 0)
            recovery_run(player->pool, true);
        if (draw == 1)
            dial_private(player);
        uint64_t timeout_ns = draw < 4 ? 0 : draw < 8 ? PLAY_MS / 10 : PLAY_NEVER;
        enum play_got got = play_get_any(player->pool, PLAY_ANY, timeout_ns, &claim);
        if (got == PLAY_CLOSED)
            break;
        if (got != PLAY_GOT)
            continue;
        use(player, &claim);
        end_lease(player, &claim);
    }
    atomic_fetch_add(&finished, 1);
    return NULL;
}

/* Workers that die while they lease, dial or wait. They leave the payload alone: a death orders nothing that TSan could see. */
static void *die_and_come_again(void *arg)
{
    struct check_random *random = arg;
    while (atomic_load(&finished) < THREADS && pool_is_open(first)) {
        struct pool_claim claim;
        struct waiter_place place = {0};
        struct pool *pool = play_attach(first);
        if (pool_join(pool) == POOL_OK) {
            uint64_t draw = check_random(random) % 4;
            if (draw == 0)
                waiter_enter(&pool->slab, &place, pool->worker, PLAY_ANY, 1, clock_now());
            else if (draw == 1)
                (void)pool_take_empty(pool, &claim);
            else
                play_get_any(pool, PLAY_ANY, PLAY_MS, &claim);
            play_die(pool);
            atomic_fetch_add(&deaths, 1);
        }
        play_end(pool);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    rounds = argc > 1 ? strtoull(argv[1], NULL, 0) : 2000;
    struct check_random random = check_seed(argc > 2 ? argv[2] : NULL);
    struct player players[THREADS];
    pthread_t threads[THREADS], mortal, steersman;
    play_one_mapping = true;
    first = play_found(SLOTS, HANDLES + 4, 6, 2);
    for (int i = 0; i < THREADS; i++) {
        struct pool *pool = i % 2 ? players[i - 1].pool : play_join(first);
        players[i] = (struct player){pool, i + 1, {check_random(&random) | 1}};
    }
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, play, &players[i]) == 0);
    struct player steering = {play_join(first), THREADS + 1, {check_random(&random) | 1}};
    CHECK(pthread_create(&steersman, NULL, steer, &steering) == 0);
    CHECK(pthread_create(&mortal, NULL, die_and_come_again, &random) == 0);
    while (atomic_load(&finished) < THREADS / 2) /* the others are still at it */
        sched_yield();
    pool_shut(first);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    pthread_join(mortal, NULL);
    pthread_join(steersman, NULL);
    play_leave(steering.pool);
    for (int i = 0; i < THREADS; i += 2)
        play_leave(players[i].pool);
    struct pool_claim claim;
    recovery_run(first, true);
    while (play_take_idle(first, &claim))
        play_retire(first, &claim, SHM_T_closed_shutdown);
    CHECK_EQ(play_count(first, SLOT_EMPTY), SLOTS);
    play_check_queue_empty(first);
    play_check_accounts(first, atomic_load(&deaths));
    play_check_workers(first, 1);
    printf("%" PRIu64 " leases, %" PRIu64 " deaths\n", atomic_load(&leases), atomic_load(&deaths));
    play_leave(first);
}
