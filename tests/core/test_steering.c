/* test_steering.c: the states of a pool and who gets what in them, the cap, evictions; and all of it by threads at once. */
#include <pthread.h>
#include <sched.h>

#include "play.h"

enum { SLOTS = 6, THREADS = 4 };

static struct pool *pool, *other;
static struct slab *slab;

static void begin(uint32_t slots, uint32_t cap)
{
    pool = play_found_capped(slots, cap, THREADS + 3, 8, 1);
    other = play_join(pool);
    slab = &pool->slab;
}
static void end(void)
{
    play_check_queue_empty(pool);
    play_leave(other);
    play_check_workers(pool, 1);
    steering_state(slab, SHM_POOL_OPEN);
    if (pool_is_open(pool))
        play_lease_all(pool);
    play_leave(pool);
}

static enum pool_taken take(struct pool_claim *claim) { return play_take(other, PLAY_ANY, NULL, claim); }
static uint64_t connection_of(const struct pool_claim *claim) { return atomic_load(&slab->slots[claim->slot].connection); }

static void back(struct pool *who, struct pool_claim claim, enum pool_released expected) { CHECK_EQ(play_release(who, &claim), expected); }

static void enter(struct waiter_place *place, uint64_t since)
{
    *place = (struct waiter_place){0};
    CHECK(waiter_enter(slab, place, other->worker, PLAY_ANY, 1, since));
}
static uint32_t futex_of(const struct waiter_place *place) { return atomic_load(&slab->waiters[place->cell].futex); }
static void sleep_again(const struct waiter_place *place) { atomic_store(&slab->waiters[place->cell].futex, WAITER_ASLEEP); }

/* ---- states ---- */

static void names(void)
{
    static const char *const known[] = {"open", "paused", "draining", "closed"};
    enum pool_state state;
    for (int i = 0; i < 4; i++) {
        CHECK(!strcmp(steering_state_name((enum pool_state)i), known[i]));
        CHECK(steering_state_named(known[i], &state) && (int)state == i);
    }
    CHECK(!steering_state_named("invalid", &state));
    CHECK(!steering_state_named("", &state));
}

/* Every change of the table; each wakes all who wait. */
static void table(void)
{
    struct waiter_place place;
    for (int from = SHM_POOL_OPEN; from <= SHM_POOL_CLOSED; from++)
        for (int to = SHM_POOL_OPEN; to <= SHM_POOL_CLOSED; to++) {
            begin(1, 1);
            CHECK_EQ(steering_state(slab, (enum pool_state)from), from != SHM_POOL_OPEN);
            enter(&place, 1);
            bool changes = from != SHM_POOL_CLOSED && from != to;
            CHECK_EQ(steering_state(slab, (enum pool_state)to), changes);
            CHECK(!changes || futex_of(&place) == WAITER_WOKEN);
            CHECK_EQ(steering_now(slab), from == SHM_POOL_CLOSED ? from : to);
            CHECK_EQ(pool_is_plain(pool), steering_now(slab) == SHM_POOL_OPEN);
            waiter_leave(slab, &place);
            end();
        }
}

static void paused(void)
{
    struct waiter_place place = {0}, new = {0};
    struct pool_claim claim, held;
    begin(2, 2);
    held = play_lease(pool);
    back(pool, play_lease(pool), RELEASED);
    CHECK(steering_state(slab, SHM_POOL_PAUSED));
    CHECK_EQ(take(&claim), TAKEN_PAUSED); /* not the idle one, nor one by a dial */
    enter(&place, 1);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_PAUSED);
    CHECK_EQ(play_take(other, PLAY_ANY, &new, &claim), TAKEN_PAUSED);
    CHECK_EQ(play_get_any(pool, PLAY_ANY, 2 * PLAY_MS, &claim), PLAY_TIMED_OUT); /* nor one from the cache */
    back(pool, held, RELEASED); /* what is out comes back, and stays */
    CHECK_EQ(play_state(pool, held.slot), SLOT_IDLE);
    CHECK_EQ(play_count(pool, SLOT_OFFERED), 0);
    CHECK(steering_state(slab, SHM_POOL_OPEN));
    CHECK_EQ(futex_of(&place), WAITER_WOKEN);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_LEASED);
    play_leave_queue(other, &place);
    back(other, claim, RELEASED);
    CHECK_EQ(play_total(pool, SHM_T_closed_shutdown), 0);
    end();
}

/* A release that sees the pause only after it: the connection stays, and nobody is woken in vain. */
static void paused_after_a_release(void)
{
    struct waiter_place place;
    begin(1, 1);
    struct pool_claim claim = play_lease(pool);
    back(pool, claim, RELEASED);
    enter(&place, 1);
    CHECK(steering_state(slab, SHM_POOL_PAUSED));
    sleep_again(&place);
    pool_release_late(pool, claim.slot);
    CHECK_EQ(play_state(pool, claim.slot), SLOT_IDLE);
    CHECK_EQ(futex_of(&place), WAITER_ASLEEP);
    CHECK(steering_state(slab, SHM_POOL_OPEN));
    sleep_again(&place);
    pool_release_late(pool, claim.slot);
    CHECK_EQ(futex_of(&place), WAITER_WOKEN);
    waiter_leave(slab, &place);
    end();
}

/* What was promised to a waiter before the pause is not had in it, and is not lost. */
static void paused_with_a_promise(void)
{
    struct waiter_place place;
    struct pool_claim claim;
    begin(1, 1);
    struct pool_claim held = play_lease(pool);
    enter(&place, 1);
    back(pool, held, RELEASED);
    CHECK_EQ(play_state(pool, 0), SLOT_OFFERED);
    CHECK(steering_state(slab, SHM_POOL_PAUSED));
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_PAUSED);
    play_leave_queue(other, &place);
    CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    end();
}

static void draining(void)
{
    struct waiter_place queued[2], late = {0};
    struct pool_claim claim, held[2], again;
    begin(2, 2);
    held[0] = play_lease(pool);
    held[1] = play_lease(pool);
    enter(&queued[0], 1);
    CHECK(steering_state(slab, SHM_POOL_DRAINING));
    CHECK_EQ(take(&claim), TAKEN_DRAINING);
    CHECK_EQ(play_take(other, PLAY_ANY, &late, &claim), TAKEN_DRAINING);
    CHECK_EQ(play_get_any(pool, PLAY_ANY, PLAY_NEVER, &claim), PLAY_CLOSED);
    back(pool, held[0], RELEASED); /* to who waits since before */
    CHECK_EQ(play_take(other, PLAY_ANY, &queued[0], &claim), TAKEN_LEASED);
    play_leave_queue(other, &queued[0]);
    back(pool, held[1], RELEASE_RETIRE); /* nobody waits */
    CHECK_EQ(play_total(pool, SHM_T_closed_shutdown), 1);
    enter(&queued[1], 1); /* it looked before, and is in the queue only now */
    CHECK_EQ(play_take(other, PLAY_ANY, &queued[1], &again), TAKEN_DIAL);
    CHECK(play_install(other, &again));
    play_leave_queue(other, &queued[1]);
    back(other, again, RELEASE_RETIRE);
    back(other, claim, RELEASE_RETIRE);
    CHECK_EQ(play_total(pool, SHM_T_closed_shutdown), 3);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 2);
    end();
}

/* What becomes idle while the pool drains or is closed ends, whichever way it comes back: by a release that saw the change too
 * late, by a check, by a promise that is not kept. */
static void what_comes_back_ends(void)
{
    for (int state = SHM_POOL_DRAINING; state <= SHM_POOL_CLOSED; state++) {
        struct pool_claim claims[3], check;
        struct waiter_place place;
        uint32_t from = 0;
        begin(3, 3);
        for (int i = 0; i < 3; i++)
            claims[i] = play_lease(pool);
        back(pool, claims[0], RELEASED);
        back(pool, claims[1], RELEASED);
        atomic_store(&slab->slots[claims[1].slot].last_used_ns, 1);
        atomic_store(&slab->slots[claims[1].slot].checked_ns, 1);
        CHECK(pool_begin_check(pool, &from, 1000 * PLAY_MS, false, &check));
        enter(&place, 1);
        back(pool, claims[2], RELEASED);
        CHECK_EQ(play_state(pool, claims[2].slot), SLOT_OFFERED);
        steering_state(slab, (enum pool_state)state);
        play_leave_queue(other, &place);
        CHECK_EQ(play_state(pool, claims[2].slot), SLOT_EMPTY);
        CHECK(pool_end_check(pool, &check));
        CHECK_EQ(play_state(pool, claims[1].slot), SLOT_EMPTY);
        pool_release_late(pool, claims[0].slot);
        CHECK_EQ(play_state(pool, claims[0].slot), SLOT_EMPTY);
        CHECK_EQ(play_total(pool, SHM_T_closed_shutdown), 3);
        end();
    }
}

static void closed(void)
{
    struct waiter_place place;
    struct pool_claim claim, held;
    begin(1, 1);
    held = play_lease(pool);
    enter(&place, 1);
    pool_shut(pool);
    CHECK_EQ(take(&claim), TAKEN_CLOSED);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_CLOSED); /* also who waits since before */
    back(pool, held, RELEASE_RETIRE);
    CHECK_EQ(play_total(pool, SHM_T_closed_shutdown), 1);
    for (int state = SHM_POOL_OPEN; state <= SHM_POOL_CLOSED; state++)
        CHECK(!steering_state(slab, (enum pool_state)state));
    CHECK(!pool_is_open(pool));
    play_leave_queue(other, &place);
    end();
}

/* ---- the cap ---- */

static uint32_t take_all(struct pool_claim *claims)
{
    uint32_t got = 0;
    while (play_try(pool, &claims[got]))
        got++;
    return got;
}

static void grows(void)
{
    struct pool_claim claims[SLOTS + 1];
    struct waiter_place place;
    begin(SLOTS, 2);
    CHECK_EQ(steering_cap(slab), 2);
    CHECK_EQ(steering_bound(slab), 2);
    CHECK_EQ(take_all(claims), 2);
    enter(&place, 1);
    CHECK_EQ(steering_resize(slab, 5), 2);
    CHECK_EQ(futex_of(&place), WAITER_WOKEN); /* there is room for it */
    waiter_leave(slab, &place);
    CHECK_EQ(steering_bound(slab), 5);
    CHECK_EQ(take_all(claims + 2), 3);
    CHECK_EQ(steering_resize(slab, SLOTS), 5);
    CHECK_EQ(take_all(claims + 5), 1);
    for (uint32_t i = 0; i < SLOTS; i++)
        back(pool, claims[i], RELEASED);
    end();
}

/* Leased connections stay until they are returned; nothing is opened as long as too many are there. */
static void shrinks(void)
{
    struct pool_claim claims[SLOTS + 1], claim, below[2];
    begin(SLOTS, SLOTS);
    CHECK_EQ(take_all(claims), SLOTS);
    CHECK_EQ(steering_resize(slab, 2), SLOTS);
    CHECK_EQ(steering_bound(slab), SLOTS);
    for (uint32_t i = 0; i < SLOTS; i++)
        if (claims[i].slot >= 2) {
            CHECK_EQ(take(&claim), TAKEN_NOTHING);
            back(pool, claims[i], RELEASE_RETIRE);
        } else
            below[claims[i].slot] = claims[i];
    CHECK_EQ(play_total(pool, SHM_T_closed_resized), SLOTS - 2);
    CHECK_EQ(take(&claim), TAKEN_NOTHING);
    back(pool, below[0], RELEASED);
    back(pool, below[1], RELEASED);
    CHECK_EQ(pool_count_used(pool), 2);
    CHECK_EQ(steering_resize(slab, SLOTS), 2);
    end();
}

/* Slots below the cap are empty, and those beyond it are not: their number counts, not where they are. */
static void permits_are_counted(void)
{
    struct pool_claim claims[SLOTS], fresh[2], claim;
    begin(SLOTS, SLOTS);
    for (uint32_t i = 0; i < SLOTS; i++)
        CHECK(pool_take_empty(pool, &claims[i]));
    for (uint32_t i = 0; i < SLOTS; i++)
        if (claims[i].slot < SLOTS - 2)
            pool_abandon(pool, &claims[i]);
        else
            CHECK(play_install(pool, &claims[i]));
    steering_resize(slab, 3);
    CHECK(pool_take_empty(pool, &fresh[0])); /* the third */
    CHECK(!pool_take_empty(pool, &claim));
    CHECK(!pool_take_empty(other, &claim));
    CHECK_EQ(pool_count_used(pool), 3);
    CHECK(!steering_has_permit(slab, 3));
    for (uint32_t i = 0; i < SLOTS; i++)
        if (claims[i].slot == SLOTS - 1)
            back(pool, claims[i], RELEASE_RETIRE);
    CHECK(pool_take_empty(other, &fresh[1]));
    CHECK(!pool_take_empty(pool, &claim));
    pool_abandon(pool, &fresh[0]);
    pool_abandon(other, &fresh[1]);
    for (uint32_t i = 0; i < SLOTS; i++)
        if (claims[i].slot == SLOTS - 2)
            back(pool, claims[i], RELEASE_RETIRE);
    end();
}

/* A dial that began before the pool was made smaller, on a slot beyond: it serves once. */
static void dials_under_way(void)
{
    struct pool_claim claims[SLOTS];
    for (int named = 0; named <= 1; named++) {
        begin(SLOTS, SLOTS);
        for (uint32_t i = 0; i < SLOTS; i++)
            CHECK(pool_take_empty(pool, &claims[i]));
        if (named)
            pool_name_connection(pool, &claims[SLOTS - 1]);
        steering_resize(slab, 1);
        for (uint32_t i = 0; i < SLOTS; i++) {
            CHECK(play_install(pool, &claims[i]));
            back(pool, claims[i], claims[i].slot ? RELEASE_RETIRE : RELEASED);
        }
        CHECK_EQ(play_total(pool, SHM_T_closed_resized), SLOTS - 1);
        end();
    }
}

/* The same size again: what somebody began who died in the middle of it is done. */
static void resized_again(void)
{
    struct pool_claim claims[SLOTS + 1];
    begin(SLOTS, SLOTS);
    CHECK_EQ(take_all(claims), SLOTS);
    atomic_store(&slab->header->cap, 1);
    CHECK_EQ(steering_resize(slab, 1), 1);
    for (uint32_t i = 0; i < SLOTS; i++)
        back(pool, claims[i], claims[i].slot ? RELEASE_RETIRE : RELEASED);
    end();
}

/* Figures from shared memory are not believed beyond what there is. */
static void damaged_cap(void)
{
    begin(2, 2);
    atomic_store(&slab->header->cap, UINT32_MAX);
    atomic_store(&slab->header->bound, UINT32_MAX);
    CHECK_EQ(steering_cap(slab), 2);
    CHECK_EQ(steering_bound(slab), 2);
    play_lease_all(pool);
    end();
}

/* ---- evictions ---- */

/* A connection to a peer that begins with these bytes, idle. */
static struct pool_claim idle_to(const char *peer)
{
    struct pool_birth birth = {.expires_ns = PLAY_NEVER};
    struct pool_claim claim;
    memcpy(birth.peer, peer, strlen(peer));
    CHECK(pool_take_empty(pool, &claim));
    CHECK(play_install_as(pool, &claim, birth, NULL));
    struct pool_claim was = claim;
    back(pool, claim, RELEASED);
    return was;
}

static void evicts(void)
{
    begin(3, 3);
    struct pool_claim claims[3] = {idle_to("10.0.0.1 80"), idle_to("10.0.0.1 81"), idle_to("10.0.0.2 80")}, claim;
    uint64_t first = connection_of(&claims[0]);
    CHECK_EQ(steering_evict(slab, first + 1000, "", 0, true), 0);
    CHECK_EQ(steering_evict(slab, 0, "10.0.0.3", 8, true), 0);
    CHECK_EQ(steering_evict(slab, first, "10.0.0.2", 8, true), 0); /* both must fit */
    CHECK_EQ(steering_evict(slab, 0, "10.0.0.1 80 and more than a peer can be", 39, true), 0);
    CHECK_EQ(steering_evict(slab, first, "", 0, false), 1);
    CHECK_EQ(steering_evict(slab, 0, "10.0.0.2", 8, false), 1);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(pool_validate(pool, claims[i].slot, -1, clock_coarse()), i == 1 ? CONDITION_GOOD : CONDITION_LIFETIME);
        if (i != 1)
            CHECK_EQ(pool_over_reason(pool, claims[i].slot), SHM_T_closed_evicted);
    }
    for (int i = 0; i < 3; i++)
        claims[i] = play_lease(other); /* it met those two, and opened others */
    CHECK_EQ(play_total(pool, SHM_T_closed_evicted), 2);
    CHECK_EQ(steering_evict(slab, 0, "", 0, false), 0); /* none is idle */
    CHECK_EQ(steering_evict(slab, connection_of(&claims[0]), "", 0, true), 1);
    CHECK_EQ(slot_load(&slab->slots[claims[0].slot]), claims[0].word); /* the lease goes on */
    back(other, claims[0], RELEASE_RETIRE);
    CHECK_EQ(play_total(pool, SHM_T_closed_evicted), 3);
    CHECK_EQ(take(&claim), TAKEN_DIAL);
    pool_abandon(other, &claim);
    back(other, claims[1], RELEASED);
    back(other, claims[2], RELEASED);
    end();
}

/* Also what is offered or being checked. */
static void evicts_what_is_in_nobodys_hands(void)
{
    struct waiter_place place;
    struct pool_claim claims[2], check;
    uint32_t from = 0;
    begin(2, 2);
    claims[0] = play_lease(pool);
    claims[1] = play_lease(pool);
    back(pool, claims[0], RELEASED);
    atomic_store(&slab->slots[claims[0].slot].last_used_ns, 1);
    atomic_store(&slab->slots[claims[0].slot].checked_ns, 1);
    CHECK(pool_begin_check(pool, &from, 1000 * PLAY_MS, false, &check));
    enter(&place, 1);
    back(pool, claims[1], RELEASED);
    CHECK_EQ(steering_evict(slab, 0, "", 0, false), 0);
    CHECK_EQ(steering_evict(slab, 0, "", 0, true), 2);
    CHECK(pool_end_check(pool, &check));
    play_leave_queue(other, &place);
    for (int i = 0; i < 2; i++)
        claims[i] = play_lease(pool);
    CHECK_EQ(play_total(pool, SHM_T_closed_evicted), 2);
    back(pool, claims[0], RELEASED);
    back(pool, claims[1], RELEASED);
    end();
}

static void condemns_the_right_one(void)
{
    begin(1, 1);
    struct pool_claim claim = play_lease(pool);
    uint64_t id = connection_of(&claim);
    CHECK(!steering_condemn(slab, 0, id + 1, SHM_EXPIRES_EVICTED));
    CHECK(steering_condemn(slab, 0, id, SHM_EXPIRES_RESIZED));
    back(pool, claim, RELEASE_RETIRE);
    CHECK_EQ(play_total(pool, SHM_T_closed_resized), 1);
    CHECK(!steering_condemn(slab, 0, 0, SHM_EXPIRES_EVICTED)); /* there is none */
    claim = play_lease(pool);
    CHECK(!steering_condemn(slab, 0, id, SHM_EXPIRES_EVICTED));
    back(pool, claim, RELEASED);
    end();
}

/* ---- threads ---- */

static struct pool *players[THREADS];
static struct check_random randoms[THREADS + 1];
static uint64_t rounds = 3000;
static atomic_bool over;
static a32_shm opened, epoch; /* connections that are counted; odd: the cap changes this moment */
static a64_shm leases;

static struct check_random seeds;

static void begin_players(uint32_t slots)
{
    begin(slots, slots);
    for (int i = 0; i < THREADS; i++)
        players[i] = play_join(pool);
    for (int i = 0; i <= THREADS; i++)
        randoms[i].state = check_random(&seeds) | 1;
    atomic_store(&over, false);
    atomic_store(&leases, 0);
}
static void end_players(void)
{
    for (int i = 0; i < THREADS; i++)
        play_leave(players[i]);
    end();
}

/* All players do `body`, while this thread does `steer`, until it returns. */
static void run_players(void *(*body)(void *), void (*steer)(void))
{
    pthread_t threads[THREADS];
    static uint32_t numbers[THREADS];
    for (uint32_t i = 0; i < THREADS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, body, &numbers[i]) == 0);
    }
    steer();
    atomic_store(&over, true);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

/* Who opens a connection after the cap was changed, and before it is changed again, makes it one of `cap` at most. Counted are those that
 * are open for sure: from after it was allowed to before it ends. */
static enum pool_taken lease_or_open(struct pool *who, struct pool_claim *claim)
{
    uint32_t before = atomic_load(&epoch), cap = steering_cap(slab);
    enum pool_taken taken = pool_take(who, PLAY_ANY, NULL, claim);
    if (taken != TAKEN_DIAL)
        return taken;
    uint32_t now = atomic_fetch_add(&opened, 1) + 1;
    if (!(before & 1) && atomic_load(&epoch) == before && now > cap) {
        fprintf(stderr, "%u connections, and the cap is %u\n", now, cap);
        abort();
    }
    return taken;
}

static void end_one(struct pool *who, struct pool_claim *claim, unsigned reason)
{
    if (!pool_condemn(who, claim))
        return;
    atomic_fetch_sub(&opened, 1);
    play_retire(who, claim, reason);
}

/* A connection in the hands of this player; false: there was none to be had, or the dial failed. */
static bool get_one(struct pool *who, struct pool_claim *claim, bool fails)
{
    switch (lease_or_open(who, claim)) {
    case TAKEN_LEASED:
        return true;
    case TAKEN_DIAL:
        if (!fails)
            return play_install(who, claim);
        atomic_fetch_sub(&opened, 1);
        upstream_untried(slab, claim->upstream, clock_now());
        pool_abandon(who, claim);
        return false;
    case TAKEN_RECOVER:
        recovery_run(who, false);
        return false;
    default:
        return false;
    }
}

static void *open_and_lease(void *number)
{
    uint32_t me = *(uint32_t *)number;
    struct pool *who = players[me];
    while (!atomic_load(&over)) {
        struct pool_claim claim;
        uint64_t draw = check_random(&randoms[me]) % 8;
        if (!get_one(who, &claim, draw == 0))
            continue;
        atomic_fetch_add(&leases, 1);
        if (draw == 1)
            sched_yield();
        if (draw == 2 || pool_release(who, &claim, clock_coarse()) == RELEASE_RETIRE)
            end_one(who, &claim, SHM_T_closed_error);
    }
    return NULL;
}

/* End what is idle beyond the cap, as maintenance does. */
static void end_surplus(void)
{
    for (uint32_t slot = 0; slot < steering_bound(slab); slot++) {
        struct pool_claim claim = {.slot = slot, .word = slot_load(&slab->slots[slot])};
        bool ends = atomic_load(&slab->slots[slot].expires_ns) <= clock_coarse() || pool_count_used(pool) > steering_cap(slab);
        if (slot_state(claim.word) == SLOT_IDLE && ends)
            end_one(pool, &claim, SHM_T_closed_resized);
    }
}

static void resize_all_the_time(void)
{
    for (uint64_t round = 0; round < rounds; round++) {
        uint32_t cap = (uint32_t)(check_random(&randoms[THREADS]) % SLOTS) + 1;
        atomic_fetch_add(&epoch, 1);
        steering_resize(slab, cap);
        atomic_fetch_add(&epoch, 1);
        if (round % 4)
            continue;
        uint64_t before = atomic_load(&leases);
        do { /* what is returned ends, until it fits; and it goes on */
            end_surplus();
            sched_yield();
        } while (atomic_load(&opened) > cap || atomic_load(&leases) < before + 8);
    }
}

static void the_cap_holds(void)
{
    begin_players(SLOTS);
    upstream_proved(slab);
    atomic_store(&opened, 0);
    run_players(open_and_lease, resize_all_the_time);
    printf("%" PRIu64 " leases\n", atomic_load(&leases));
    steering_resize(slab, SLOTS);
    end_players();
}

/* ---- */

static void *steer_at_random(void *number)
{
    static const enum pool_state states[] = {SHM_POOL_OPEN, SHM_POOL_PAUSED, SHM_POOL_DRAINING};
    struct check_random *random = &randoms[*(uint32_t *)number];
    while (!atomic_load(&over))
        for (int i = 0; i < 100; i++)
            steering_state(slab, states[check_random(random) % 3]);
    return NULL;
}

static void close_under_way(void)
{
    sched_yield();
    pool_shut(pool);
    for (int i = 0; i < 5; i++) {
        CHECK(!pool_is_open(pool));
        sched_yield();
    }
}

/* Closed is closed, whatever the others say meanwhile. */
static void closed_is_for_ever(void)
{
    for (int i = 0; i < 20; i++) {
        begin_players(1);
        run_players(steer_at_random, close_under_way);
        CHECK(!pool_is_open(pool));
        end_players();
    }
}

/* ---- */

static a32_shm pause_number; /* odd: from a pause that is done to before the resume */

static void *lease_unless_paused(void *number)
{
    uint32_t me = *(uint32_t *)number;
    while (!atomic_load(&over)) {
        struct pool_claim claim;
        uint32_t before = atomic_load(&pause_number);
        if (play_get_any(players[me], PLAY_ANY, 1000000 * PLAY_MS, &claim) != PLAY_GOT)
            abort();
        CHECK(!(before & 1) || atomic_load(&pause_number) != before);
        atomic_fetch_add(&leases, 1);
        CHECK(play_release(players[me], &claim) != RELEASE_STALE);
    }
    return NULL;
}

static void pause_and_resume(void)
{
    for (uint64_t round = 0; round < rounds / 4; round++) {
        uint64_t before = atomic_load(&leases);
        while (atomic_load(&leases) < before + THREADS) /* after each resume all are served */
            sched_yield();
        CHECK(steering_state(slab, SHM_POOL_PAUSED));
        atomic_fetch_add(&pause_number, 1);
        for (int i = 0; i < 4; i++)
            sched_yield();
        atomic_fetch_add(&pause_number, 1);
        CHECK(steering_state(slab, SHM_POOL_OPEN));
    }
}

static void nobody_gets_anything_in_a_pause(void)
{
    begin_players(2);
    run_players(lease_unless_paused, pause_and_resume);
    CHECK_EQ(play_total(pool, SHM_T_closed_shutdown), 0);
    end_players();
}

/* ---- */

static a32_shm refused, served;

static void *get_once(void *number)
{
    struct pool *who = players[*(uint32_t *)number];
    struct pool_claim claim;
    enum play_got got = play_get_any(who, PLAY_ANY, PLAY_NEVER, &claim);
    CHECK(got == PLAY_GOT || got == PLAY_CLOSED);
    atomic_fetch_add(got == PLAY_GOT ? &served : &refused, 1);
    if (got == PLAY_GOT)
        CHECK(play_release(who, &claim) != RELEASE_STALE);
    return NULL;
}

static struct pool_claim kept;
static uint32_t wanted; /* how many wait before the pool is drained */

static uint32_t count_waiting(void)
{
    uint32_t count = 0;
    for (uint32_t cell = 0; cell < slab->layout.max_waiters; cell++)
        count += atomic_load(&slab->waiter_words[cell]) != WAITER_FREE_WORD;
    return count;
}

static void drain_when_they_wait(void)
{
    while (count_waiting() < wanted)
        sched_yield();
    CHECK(steering_state(slab, SHM_POOL_DRAINING));
    CHECK(play_release(other, &kept) != RELEASE_STALE);
}

/* Whoever waits in the queue when the pool is drained is served; who comes later is refused. Then nothing is open. */
static void who_waits_is_served(void)
{
    for (int round = 0; round < 200; round++) {
        struct pool_claim claim;
        begin_players(1);
        atomic_store(&served, 0);
        atomic_store(&refused, 0);
        kept = play_lease(other);
        wanted = (uint32_t)round % (THREADS + 1);
        run_players(get_once, drain_when_they_wait);
        CHECK_EQ(atomic_load(&served) + atomic_load(&refused), THREADS);
        CHECK(atomic_load(&served) >= wanted);
        CHECK_EQ(take(&claim), TAKEN_DRAINING);
        CHECK_EQ(play_count(pool, SLOT_EMPTY), 1);
        steering_state(slab, SHM_POOL_OPEN);
        end_players();
    }
}

int main(void)
{
    seeds = check_seed(getenv("SHMPOOL_SEED"));
    RUN(names);
    RUN(table);
    RUN(paused);
    RUN(paused_after_a_release);
    RUN(paused_with_a_promise);
    RUN(draining);
    RUN(what_comes_back_ends);
    RUN(closed);
    RUN(grows);
    RUN(shrinks);
    RUN(permits_are_counted);
    RUN(dials_under_way);
    RUN(damaged_cap);
    RUN(evicts);
    RUN(evicts_what_is_in_nobodys_hands);
    RUN(condemns_the_right_one);
    RUN(the_cap_holds);
    RUN(closed_is_for_ever);
    RUN(nobody_gets_anything_in_a_pause);
    RUN(who_waits_is_served);
    RUN(resized_again);
}
