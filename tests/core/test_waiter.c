/* test_waiter.c: the queue's order, promises and offers, and that a summary that lies heals. */
#include <sched.h>
#include <pthread.h>

#include "play.h"

static struct pool *pool, *other;

static void begin(uint32_t slots, uint32_t waiters)
{
    pool = play_found(slots, 3, waiters, 2);
    other = play_join(pool);
}

static void end(void)
{
    play_check_queue_empty(pool);
    play_leave(other);
    play_lease_all(pool);
    play_leave(pool);
}

static void enter(struct waiter_place *place, struct pool *who, uint32_t mask, uint64_t since)
{
    *place = (struct waiter_place){0};
    CHECK(waiter_enter(&who->slab, place, who->worker, mask, 7, since));
}

static uint64_t word_of(const struct waiter_place *place) { return atomic_load(&pool->slab.waiter_words[place->cell]); }
static bool woken(const struct waiter_place *place) { return atomic_load(&pool->slab.waiters[place->cell].futex) == WAITER_WOKEN; }

static void words(void)
{
    begin(1, 1);
    struct waiter_place place;
    atomic_store(&pool->slab.header->next_ticket, (1u << 27) - 1);
    enter(&place, pool, 0x15, 5);
    uint64_t word = word_of(&place);
    CHECK_EQ(waiter_state(word), WAITER_WAITING);
    CHECK_EQ(waiter_mask(word), 0x15);
    CHECK_EQ(waiter_owner(word), pool->worker);
    CHECK_EQ(waiter_ticket(word), (1 << 27) - 1);
    CHECK_EQ(pool->slab.waiters[place.cell].tid, 7);
    CHECK_EQ(pool->slab.waiters[place.cell].since_ns, 5);
    CHECK(!place.dialling);
    CHECK_EQ(waiter_leave(&pool->slab, &place), -1);
    CHECK(!place.queued);
    place.dialling = true; /* who has a dial under way keeps it */
    CHECK(waiter_enter(&pool->slab, &place, pool->worker, 1, 7, 5) && place.dialling);
    waiter_leave(&pool->slab, &place);
    end();
}

static void ticket_order(void)
{
    const uint32_t last = (1u << 27) - 1;
    CHECK(waiter_before(1, 2) && !waiter_before(2, 1) && !waiter_before(2, 2));
    CHECK(waiter_before(last, 0) && waiter_before(last - 5, 3) && !waiter_before(0, last));
    CHECK(waiter_before(0, (1u << 26) - 1) && !waiter_before((1u << 26) - 1, 0));
}

/* First come, first served, over all cells and groups, also where the tickets wrap around. */
static void order(void)
{
    enum { COUNT = 150 };
    static struct waiter_place places[COUNT];
    begin(1, COUNT);
    atomic_store(&pool->slab.header->next_ticket, (UINT64_C(1) << 27) - COUNT / 2);
    struct waiter_place early[COUNT];
    for (int i = 0; i < COUNT; i++) /* leave and come back in an order of their own: cells are not tickets */
        enter(&early[i], pool, 1, 0);
    for (int i = 0; i < COUNT; i++) {
        int at = i * 7 % COUNT;
        waiter_leave(&pool->slab, &early[at]);
        enter(&places[i], i % 2 ? pool : other, 1, 0);
        CHECK_EQ(places[i].cell, early[at].cell);
    }
    for (int i = 0; i < COUNT; i++) {
        struct waiter_seen seen;
        CHECK(waiter_first(&pool->slab, 1, &seen));
        CHECK_EQ(seen.cell, places[i].cell);
        CHECK(!woken(&places[i]));
        waiter_wake_first(&pool->slab, 1);
        CHECK(woken(&places[i]));
        waiter_prepare(&pool->slab, &places[i]);
        waiter_leave(&pool->slab, &places[i]);
    }
    struct waiter_seen seen;
    CHECK(!waiter_first(&pool->slab, 1, &seen));
    CHECK_EQ(pool->slab.header->summary, 0); /* who looked has cleared it */
    end();
}

static void masks(void)
{
    begin(1, 4);
    struct waiter_place udp, tcp, all;
    struct waiter_seen seen;
    enter(&udp, pool, 4, 0);
    enter(&tcp, pool, 1, 0);
    enter(&all, pool, PLAY_ANY, 0);
    CHECK(waiter_first(&pool->slab, 1, &seen) && seen.cell == tcp.cell);
    CHECK(waiter_first(&pool->slab, 4, &seen) && seen.cell == udp.cell);
    CHECK(waiter_first(&pool->slab, 16, &seen) && seen.cell == all.cell);
    waiter_wake_first(&pool->slab, 16);
    CHECK(woken(&all) && !woken(&udp) && !woken(&tcp));
    waiter_wake_first(&pool->slab, 1);
    CHECK(woken(&tcp) && !woken(&udp));
    waiter_wake_first(&pool->slab, 1); /* those who wake already are passed over: nobody is left */
    CHECK(!woken(&udp));
    waiter_wake_all(&pool->slab);
    CHECK(woken(&udp));
    waiter_prepare(&pool->slab, &udp);
    CHECK(!woken(&udp));
    waiter_leave(&pool->slab, &udp);
    waiter_leave(&pool->slab, &tcp);
    waiter_leave(&pool->slab, &all);
    end();
}

static void full_table(void)
{
    enum { MOST = 3968 };
    static struct waiter_place places[MOST], one_more;
    begin(1, MOST);
    for (int i = 0; i < MOST; i++)
        enter(&places[i], pool, 1, 0);
    CHECK_EQ(pool->slab.header->summary, ~SHM_STATE_MASK);
    CHECK(pool_is_open(pool)); /* 62 groups leave the state alone */
    CHECK(!waiter_enter(&pool->slab, &one_more, pool->worker, 1, 0, 0));
    CHECK(!one_more.queued);
    CHECK_EQ(waiter_leave(&pool->slab, &places[3900]), -1);
    enter(&one_more, pool, 1, 0);
    CHECK_EQ(one_more.cell, 3900);
    CHECK_EQ(waiter_forget(&pool->slab, other->worker), 0);
    CHECK_EQ(waiter_forget(&pool->slab, pool->worker), MOST);
    CHECK_EQ(waiter_leave(&pool->slab, &one_more), -1); /* gone under its feet: it says so */
    end();
}

/* The summary is a hint. Lost while somebody waits: he repeats it. Set for nobody: who looks clears it. */
static void summary_heals(void)
{
    begin(1, 130);
    struct waiter_place place;
    struct waiter_seen seen;
    enter(&place, pool, 1, 0);
    atomic_store(&pool->slab.header->summary, 0);
    CHECK(!waiter_first(&pool->slab, 1, &seen));
    waiter_prepare(&pool->slab, &place);
    CHECK(waiter_first(&pool->slab, 1, &seen));
    waiter_leave(&pool->slab, &place);
    atomic_store(&pool->slab.header->summary, ~SHM_STATE_MASK); /* also bits of groups that do not exist */
    CHECK(!waiter_first(&pool->slab, 1, &seen));
    CHECK_EQ(pool->slab.header->summary, 0);
    /* a release with a wrong summary is a release all the same */
    atomic_store(&pool->slab.header->summary, 6);
    struct pool_claim claim = play_lease(pool);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    end();
}

/* Damaged waiter words: of no state, of the wrong owner, with slots that do not exist. */
static void damaged_words(void)
{
    begin(2, 4);
    struct waiter_place place;
    struct pool_claim claim;
    enter(&place, pool, 1, 0);
    uint64_t word = word_of(&place);
    atomic_store(&pool->slab.waiter_words[place.cell], word | 3 | UINT64_C(0x1ffff) << WAITER_SLOT_SHIFT);
    CHECK_EQ(waiter_promised(&pool->slab, &place), -1);
    CHECK_EQ(play_take(pool, PLAY_ANY, &place, &claim), TAKEN_DIAL);
    CHECK_EQ(waiter_leave(&pool->slab, &place), -1);
    pool_abandon(pool, &claim);
    atomic_store(&pool->slab.waiter_words[1], 0);
    atomic_store(&pool->slab.waiter_words[2], UINT64_MAX);
    struct waiter_seen seen;
    CHECK(!waiter_first(&pool->slab, PLAY_ANY, &seen));
    waiter_wake_all(&pool->slab);
    enter(&place, pool, 1, 0);
    atomic_store(&pool->slab.waiter_words[place.cell], 0);
    CHECK_EQ(waiter_promised(&pool->slab, &place), -1);
    CHECK_EQ(waiter_rematch(&pool->slab, &place), -1);
    CHECK_EQ(waiter_leave(&pool->slab, &place), -1);
    for (int i = 0; i < 4; i++)
        atomic_store(&pool->slab.waiter_words[i], WAITER_FREE_WORD);
    end();
}

/* ---- offers ---- */

static struct pool_claim held(void)
{
    struct pool_claim claim = play_lease(pool);
    return claim;
}

/* Waits long enough: the slot goes to it and to nobody else. */
static void offered_and_claimed(void)
{
    begin(1, 4);
    struct pool_claim claim = held(), stale = claim, got;
    struct waiter_place place, later;
    enter(&place, other, PLAY_ANY, 1);
    enter(&later, other, PLAY_ANY, 1);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(play_state(pool, 0), SLOT_OFFERED);
    CHECK_EQ(slot_owner(play_word(pool, 0)), other->worker);
    CHECK(woken(&place) && !woken(&later));
    CHECK_EQ(play_release(pool, &stale), RELEASE_STALE);
    CHECK_EQ(waiter_promised(&pool->slab, &place), 0);
    CHECK(!play_try(pool, &got));
    CHECK_EQ(play_take(other, PLAY_ANY, &later, &got), TAKEN_NOTHING); /* the same process, another place */
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &got), TAKEN_LEASED);
    CHECK_EQ(got.source, SOURCE_OFFER);
    int64_t promised = waiter_leave(&pool->slab, &place);
    pool_return_promise(other, promised); /* what we took is not given back */
    CHECK_EQ(play_state(pool, 0), SLOT_LEASED);
    waiter_leave(&pool->slab, &later);
    CHECK_EQ(play_release(other, &got), RELEASED);
    end();
}

/* A promise names any slot there is. */
static void offered_from_far(void)
{
    enum { SLOTS = 70 };
    static struct pool_claim claims[SLOTS];
    struct pool_claim got;
    struct waiter_place place;
    begin(SLOTS, 4);
    for (int i = 0; i < SLOTS; i++)
        claims[i] = held();
    enter(&place, other, PLAY_ANY, 1);
    for (int i = 0; i < SLOTS; i++)
        if (claims[i].slot == SLOTS - 1)
            CHECK_EQ(play_release(pool, &claims[i]), RELEASED);
    CHECK_EQ(waiter_promised(&pool->slab, &place), SLOTS - 1);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &got), TAKEN_LEASED);
    CHECK_EQ(got.source, SOURCE_OFFER);
    waiter_leave(&pool->slab, &place);
    CHECK_EQ(play_release(other, &got), RELEASED);
    for (int i = 0; i < SLOTS; i++)
        if (claims[i].slot != SLOTS - 1)
            CHECK_EQ(play_release(pool, &claims[i]), RELEASED);
    end();
}

/* A promise that was not kept: the slot is offered, but to another. */
static void offered_to_another(void)
{
    begin(1, 4);
    struct pool_claim claim = held(), got;
    struct waiter_place place, in_vain;
    enter(&place, other, PLAY_ANY, 1);
    enter(&in_vain, pool, PLAY_ANY, 1);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    atomic_store(&pool->slab.waiter_words[in_vain.cell], (word_of(&in_vain) & ~UINT64_C(3)) | WAITER_MATCHED);
    CHECK_EQ(waiter_promised(&pool->slab, &in_vain), 0);
    CHECK_EQ(play_take(pool, PLAY_ANY, &in_vain, &got), TAKEN_NOTHING);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &got), TAKEN_LEASED);
    waiter_leave(&pool->slab, &place);
    pool_return_promise(pool, waiter_leave(&pool->slab, &in_vain));
    CHECK_EQ(play_release(other, &got), RELEASED);
    end();
}

/* Waits briefly: woken, but a running process may be quicker. */
static void woken_only(void)
{
    begin(1, 4);
    struct pool_claim claim = held(), got;
    struct waiter_place place;
    enter(&place, other, PLAY_ANY, clock_now() + 1000 * PLAY_MS);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    CHECK(woken(&place));
    CHECK(play_try(pool, &got));
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_NOTHING);
    waiter_leave(&pool->slab, &place);
    CHECK_EQ(play_release(pool, &got), RELEASED);
    end();
}

static void promise_returned_by_leaver(void)
{
    begin(1, 4);
    struct pool_claim claim = held(), got;
    struct waiter_place place, later;
    enter(&place, other, PLAY_ANY, 1);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    enter(&later, pool, PLAY_ANY, 1);
    CHECK_EQ(waiter_leave(&pool->slab, &place), 0);
    CHECK_EQ(play_state(pool, 0), SLOT_OFFERED);
    pool_return_promise(other, 0);
    CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    CHECK(woken(&later)); /* the next one is told */
    pool_return_promise(other, 0); /* and nothing happens twice */
    pool_return_promise(pool, 0);
    CHECK_EQ(play_take(pool, PLAY_ANY, &later, &got), TAKEN_LEASED);
    waiter_leave(&pool->slab, &later);
    CHECK_EQ(play_release(pool, &got), RELEASED);
    end();
}

/* The addressee is stopped: after OFFER_TTL the offer is anyone's, and the late claim fails. */
static void offer_expires(void)
{
    begin(1, 4);
    struct pool_claim claim = held(), got;
    struct waiter_place place;
    enter(&place, other, PLAY_ANY, 1);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &got), TAKEN_NOTHING);
    atomic_store(&pool->slab.slots[0].offered_ns, clock_now() + 1000 * PLAY_MS); /* made since we looked at the clock */
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &got), TAKEN_NOTHING);
    atomic_store(&pool->slab.slots[0].offered_ns, clock_now() - WAITER_OFFER_TTL_NS - 1);
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &got), TAKEN_LEASED);
    CHECK_EQ(got.source, SOURCE_OFFER);
    CHECK_EQ(play_total(pool, SHM_T_recovered_offers), 1);
    CHECK(play_take(other, PLAY_ANY, &place, &claim) != TAKEN_LEASED);
    pool_return_promise(other, waiter_leave(&pool->slab, &place));
    CHECK_EQ(play_state(pool, 0), SLOT_LEASED);
    CHECK_EQ(play_release(pool, &got), RELEASED);
    end();
}

static void addressee_dead(void)
{
    begin(1, 4);
    struct pool_claim claim = held();
    struct waiter_place place;
    enter(&place, other, PLAY_ANY, 1);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    play_die(other);
    recovery_run(pool, true);
    CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    play_check_queue_empty(pool);
    CHECK_EQ(play_total(pool, SHM_T_recovered_waiters), 1);
    play_end(other);
    other = play_join(pool);
    end();
}

/* Nobody fits: the slot is as before. The promise is to one who leaves before the deed: taken back, given to the next. */
static void nobody_fits(void)
{
    begin(1, 4);
    struct pool_claim claim = held();
    uint64_t word = claim.word;
    struct waiter_place place;
    CHECK_EQ(waiter_offer(&pool->slab, 0, &claim.word, 1, clock_now()), WAITER_NOBODY);
    enter(&place, other, 2, 1);
    CHECK_EQ(waiter_offer(&pool->slab, 0, &claim.word, 1, clock_now()), WAITER_NOBODY);
    CHECK_EQ(claim.word, word);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(play_state(pool, 0), SLOT_IDLE);
    CHECK(woken(&place)); /* its permit is of use to it */
    waiter_leave(&pool->slab, &place);
    end();
}

/* A wake-up that comes after the last look of one who leaves is passed on to the next. */
static void wakeup_passed_on(void)
{
    begin(1, 4);
    struct waiter_place place, later, last;
    struct pool_claim claim = held(); /* nothing is free that anybody could be told of */
    enter(&place, other, 1, 1);
    enter(&later, other, 2, 1);
    enter(&last, other, 1, 1);
    waiter_wake_first(&pool->slab, PLAY_ANY);
    CHECK(woken(&place) && !woken(&later) && !woken(&last));
    waiter_leave(&pool->slab, &place);
    CHECK(woken(&later)); /* what it was woken for may suit anyone: it may be an empty slot */
    waiter_prepare(&pool->slab, &later);
    waiter_leave(&pool->slab, &later);
    CHECK(!woken(&last)); /* it had looked since */
    waiter_leave(&pool->slab, &last);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    end();
}

/* An offer comes to one who was woken for something else: that is passed on, to whoever can use it. */
static void wakeup_before_an_offer(void)
{
    begin(1, 4);
    struct pool_claim claim = held();
    struct waiter_place place, later;
    enter(&place, other, 1, 1);
    enter(&later, other, 2, 1);
    waiter_wake_first(&pool->slab, 1);
    CHECK(woken(&place) && !woken(&later));
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(play_state(pool, 0), SLOT_OFFERED);
    CHECK(woken(&later));
    waiter_leave(&pool->slab, &later);
    pool_return_promise(other, waiter_leave(&pool->slab, &place));
    end();
}

/* The slot was taken from the offerer (two threads release one lease): the waiter finds that out by itself. */
static void lost_while_offering(void)
{
    begin(1, 4);
    struct pool_claim claim = held(), twin = claim;
    struct waiter_place place;
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    enter(&place, other, PLAY_ANY, 1);
    CHECK_EQ(waiter_offer(&pool->slab, 0, &twin.word, 1, clock_now()), WAITER_LOST);
    CHECK(woken(&place)); /* another releaser may have passed it over while it was promised something */
    CHECK_EQ(waiter_promised(&pool->slab, &place), 0);
    CHECK_EQ(play_take(other, PLAY_ANY, &place, &claim), TAKEN_LEASED); /* not by the promise: it is idle */
    CHECK_EQ(claim.source, SOURCE_STEAL);
    CHECK_EQ(play_release(other, &claim), RELEASED);
    CHECK_EQ(waiter_rematch(&pool->slab, &place), 0);
    CHECK_EQ(waiter_state(word_of(&place)), WAITER_WAITING);
    waiter_leave(&pool->slab, &place);
    end();
}

/* Who was woken in vain is passed over by wake-ups, not by offers; a wake-up that comes first wins. */
static void patience(void)
{
    begin(1, 4);
    struct waiter_place place, later;
    enter(&place, other, 1, 1);
    enter(&later, other, 1, 1);
    CHECK(waiter_be_patient(&pool->slab, &place));
    waiter_wake_first(&pool->slab, 1);
    CHECK(!woken(&place) && woken(&later));
    CHECK(!waiter_be_patient(&pool->slab, &later));
    uint64_t begun = clock_now();
    CHECK(!waiter_sleep(&pool->slab, &place, PLAY_MS));
    CHECK(clock_now() - begun >= PLAY_MS);
    struct pool_claim claim = play_lease(pool);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(waiter_promised(&pool->slab, &place), 0);
    CHECK(woken(&place));
    CHECK(waiter_sleep(&pool->slab, &place, 3600 * 1000 * PLAY_MS));
    pool_return_promise(other, waiter_leave(&pool->slab, &place));
    waiter_leave(&pool->slab, &later);
    end();
}

/* A promise whose giver was stopped: after a look the waiter stands in the queue again, at its old place. */
static void rematch(void)
{
    begin(1, 4);
    struct waiter_place place, later;
    struct waiter_seen seen;
    enter(&place, other, 0x15, 1);
    enter(&later, other, PLAY_ANY, 1);
    uint64_t waiting = word_of(&place);
    atomic_store(&pool->slab.waiter_words[place.cell], (waiting & ~UINT64_C(3)) | WAITER_MATCHED);
    CHECK(waiter_first(&pool->slab, 1, &seen) && seen.cell == later.cell);
    CHECK_EQ(waiter_promised(&pool->slab, &place), 0);
    CHECK_EQ(waiter_rematch(&pool->slab, &place), 0); /* the promise is the caller's to give back */
    CHECK_EQ(word_of(&place), waiting);
    CHECK(waiter_first(&pool->slab, 1, &seen) && seen.cell == place.cell);
    CHECK_EQ(waiter_rematch(&pool->slab, &place), -1); /* once more does nothing */
    CHECK_EQ(word_of(&place), waiting);
    waiter_leave(&pool->slab, &place);
    waiter_leave(&pool->slab, &later);
    end();
}

/* A place that was taken from its waiter (recovery took it for dead) is another's: told by the ticket, and by the owner.
 * Whoever sleeps there is woken. */
static void forgotten(void)
{
    begin(1, 1);
    struct waiter_place place, next;
    for (int i = 0; i < 2; i++) {
        enter(&place, pool, 1, 1);
        CHECK_EQ(waiter_forget(&pool->slab, pool->worker), 1);
        CHECK(woken(&place));
        if (i)
            atomic_store(&pool->slab.header->next_ticket, place.ticket);
        enter(&next, i ? other : pool, 1, 1);
        CHECK_EQ(next.cell, place.cell);
        waiter_leave(&pool->slab, &place);
        CHECK_EQ(waiter_state(word_of(&next)), WAITER_WAITING);
        waiter_leave(&pool->slab, &next);
    }
    end();
}

/* ---- sleeping ---- */

static void *release_when_queued(void *arg)
{
    struct pool_claim *claim = arg;
    struct waiter_seen seen;
    while (!waiter_first(&pool->slab, PLAY_ANY, &seen))
        sched_yield();
    CHECK_EQ(play_release(pool, claim), RELEASED);
    return NULL;
}

static void sleeps_and_wakes(void)
{
    pthread_t thread;
    begin(1, 4);
    for (int i = 0; i < 20; i++) {
        struct pool_claim claim = held(), got;
        CHECK(pthread_create(&thread, NULL, release_when_queued, &claim) == 0);
        CHECK_EQ(play_get_any(other, PLAY_ANY, 60000 * PLAY_MS, &got), PLAY_GOT);
        pthread_join(thread, NULL);
        CHECK_EQ(play_release(other, &got), RELEASED);
    }
    end();
}

/* A wake-up before the sleep is not lost; none at all costs the time that was asked for. */
static void futex(void)
{
    begin(1, 4);
    struct waiter_place place;
    enter(&place, pool, 1, 0);
    waiter_wake_first(&pool->slab, 1);
    waiter_sleep(&pool->slab, &place, 3600 * 1000 * PLAY_MS);
    waiter_prepare(&pool->slab, &place);
    uint64_t begun = clock_now();
    waiter_sleep(&pool->slab, &place, 2 * PLAY_MS);
    CHECK(clock_now() - begun >= 2 * PLAY_MS);
    waiter_leave(&pool->slab, &place);
    end();
}

int main(void)
{
    RUN(words);
    RUN(ticket_order);
    RUN(order);
    RUN(masks);
    RUN(full_table);
    RUN(summary_heals);
    RUN(damaged_words);
    RUN(offered_and_claimed);
    RUN(offered_from_far);
    RUN(offered_to_another);
    RUN(woken_only);
    RUN(promise_returned_by_leaver);
    RUN(offer_expires);
    RUN(addressee_dead);
    RUN(nobody_fits);
    RUN(wakeup_passed_on);
    RUN(wakeup_before_an_offer);
    RUN(lost_while_offering);
    RUN(patience);
    RUN(rematch);
    RUN(forgotten);
    RUN(sleeps_and_wakes);
    RUN(futex);
}
