/* test_upstream.c: every change of the table in upstream.h, who may dial when, and that threads begin one dial in a step. */
#include <pthread.h>

#include "play.h"

enum { THREADS = 4, ROUNDS = 300 };
#define FIRST_NS (100 * PLAY_MS)
#define LAST_NS (1000 * PLAY_MS)
#define PATIENCE_NS (30000 * PLAY_MS)
#define NOW_NS (5000 * PLAY_MS)

static const struct upstream_backoff backoff = {FIRST_NS, LAST_NS, PATIENCE_NS};
static struct pool *pool;
static struct slab *slab;

static void begin(void)
{
    pool = play_found(4, 4, 4, 1);
    slab = &pool->slab;
}
static void end(void) { play_leave(pool); }

static uint64_t word(void) { return atomic_load(&slab->header->upstream); }
static enum upstream_state state(void) { return upstream_state(word()); }
static uint64_t failures(void) { return atomic_load(&slab->header->upstream_failures); }

static enum upstream_answer ask_at(uint32_t owner, uint64_t now, uint64_t *seen)
{
    return upstream_ask(slab, owner, true, now, &backoff, seen);
}
/* A dial that is let through. */
static uint64_t go(uint32_t owner, uint64_t now)
{
    uint64_t seen = 0;
    CHECK_EQ(ask_at(owner, now, &seen), UPSTREAM_GO);
    CHECK_EQ(seen, word());
    return seen;
}
static bool fail(uint64_t seen, uint64_t now) { return upstream_failed(slab, seen, now, &backoff, 0, "refused"); }

/* ---- the table ---- */

static void unproved(void)
{
    uint64_t seen, other;
    begin();
    CHECK_EQ(state(), UPSTREAM_UNPROVED);
    seen = go(1, NOW_NS); /* one, and the others wait for it */
    CHECK_EQ(state(), UPSTREAM_UNPROVED);
    CHECK_EQ(ask_at(2, NOW_NS, &other), UPSTREAM_WAIT);
    CHECK_EQ(ask_at(1, NOW_NS + UPSTREAM_GRACE_NS - PLAY_MS, &other), UPSTREAM_WAIT);
    CHECK_EQ(upstream_ask(slab, 2, false, NOW_NS, &backoff, &other), UPSTREAM_GO); /* who cannot wait does not */
    go(2, NOW_NS + UPSTREAM_GRACE_NS); /* but not for ever */
    CHECK(fail(seen, NOW_NS));
    CHECK_EQ(state(), UPSTREAM_DOWN);
    CHECK_EQ(upstream_step(word()), 1);
    end();
}

static void up(void)
{
    uint64_t seen[3];
    begin();
    CHECK(!upstream_proved(slab)); /* it was not known to be down */
    CHECK_EQ(state(), UPSTREAM_UP);
    for (int i = 0; i < 3; i++)
        seen[i] = go(1, NOW_NS); /* as many as like */
    CHECK(!upstream_proved(slab));
    upstream_untried(slab, seen[0], NOW_NS);
    CHECK_EQ(state(), UPSTREAM_UP);
    CHECK(fail(seen[1], NOW_NS));
    CHECK_EQ(state(), UPSTREAM_DOWN);
    end();
}

static void down_and_up_again(void)
{
    uint64_t seen;
    begin();
    CHECK(fail(go(1, NOW_NS), NOW_NS));
    CHECK_EQ(upstream_left(slab, NOW_NS), FIRST_NS);
    CHECK_EQ(ask_at(1, NOW_NS, &seen), UPSTREAM_NO);
    CHECK_EQ(upstream_ask(slab, 1, false, NOW_NS + FIRST_NS - PLAY_MS, &backoff, &seen), UPSTREAM_NO);
    CHECK_EQ(upstream_left(slab, NOW_NS + FIRST_NS), 0);
    go(3, NOW_NS + FIRST_NS);
    CHECK_EQ(state(), UPSTREAM_PROBING);
    CHECK_EQ(upstream_owner(word()), 3);
    CHECK_EQ(ask_at(1, NOW_NS + FIRST_NS, &seen), UPSTREAM_NO);
    CHECK_EQ(ask_at(3, NOW_NS + FIRST_NS, &seen), UPSTREAM_NO); /* also another thread of the same process */
    CHECK(upstream_proved(slab));
    CHECK_EQ(state(), UPSTREAM_UP);
    CHECK(fail(go(1, NOW_NS), NOW_NS));
    CHECK_EQ(upstream_step(word()), 1); /* it begins anew */
    CHECK(upstream_proved(slab)); /* without a probe: by a dial that began before */
    end();
}

/* Each failed probe doubles the step, up to the last. */
static void steps(void)
{
    uint64_t now = NOW_NS, length = FIRST_NS;
    begin();
    fail(go(1, now), now);
    for (uint32_t step = 2; step < 70; step++) {
        CHECK_EQ(upstream_left(slab, now), length);
        now += length;
        CHECK(!fail(go(1, now), now));
        length = 2 * length < LAST_NS ? 2 * length : LAST_NS;
        CHECK_EQ(upstream_step(word()), step < UPSTREAM_STEP_MAX ? step : UPSTREAM_STEP_MAX);
    }
    CHECK_EQ(upstream_left(slab, now), LAST_NS);
    CHECK_EQ(failures(), 69);
    end();
}

/* A step is shorter at random, by a quarter at most, and never ends early by rounding. */
static void random_steps(void)
{
    struct check_random random = check_seed(NULL);
    uint64_t shortest = UINT64_MAX, longest = 0;
    begin();
    for (int i = 0; i < 2000; i++) {
        uint64_t now = NOW_NS + check_random(&random) % PLAY_MS, left;
        upstream_failed(slab, go(1, now), now, &backoff, (uint32_t)check_random(&random), "refused");
        left = upstream_left(slab, now);
        shortest = left < shortest ? left : shortest;
        longest = left > longest ? left : longest;
        upstream_proved(slab);
    }
    CHECK(shortest >= FIRST_NS * 3 / 4 && shortest < FIRST_NS * 4 / 5);
    CHECK(longest <= FIRST_NS + PLAY_MS && longest > FIRST_NS * 19 / 20);
    end();
}

/* Dials that began while the server was thought to be up fail together: that is one failure. */
static void older_failures_count_once(void)
{
    uint64_t seen[3], before;
    begin();
    upstream_proved(slab);
    for (int i = 0; i < 3; i++)
        seen[i] = go(1, NOW_NS);
    CHECK(fail(seen[0], NOW_NS));
    before = word();
    CHECK(!fail(seen[1], NOW_NS + FIRST_NS / 2));
    CHECK_EQ(word(), before);
    go(2, NOW_NS + FIRST_NS);
    before = word();
    CHECK(!fail(seen[2], NOW_NS + FIRST_NS)); /* the probe goes on */
    CHECK_EQ(word(), before);
    CHECK_EQ(failures(), 1);
    end();
}

/* A prober that takes longer than anybody waits for it: another probes, and the first says nothing any more; but if it succeeds it does. */
static void late_prober(void)
{
    uint64_t late, now = NOW_NS + FIRST_NS, other;
    begin();
    fail(go(1, NOW_NS), NOW_NS);
    late = go(1, now);
    CHECK_EQ(ask_at(2, now + PATIENCE_NS - PLAY_MS, &other), UPSTREAM_NO);
    other = go(2, now + PATIENCE_NS);
    CHECK(!fail(late, now + PATIENCE_NS));
    upstream_untried(slab, late, now + PATIENCE_NS);
    CHECK_EQ(word(), other);
    CHECK(upstream_proved(slab));
    CHECK(fail(other, now + PATIENCE_NS)); /* the latest news counts */
    CHECK_EQ(upstream_step(word()), 1);
    end();
}

static void untried(void)
{
    uint64_t seen, now = NOW_NS + FIRST_NS;
    begin();
    seen = go(1, NOW_NS);
    upstream_untried(slab, seen, NOW_NS);
    CHECK_EQ(state(), UPSTREAM_UNPROVED);
    seen = go(2, NOW_NS); /* another may, at once */
    fail(seen, NOW_NS);
    upstream_untried(slab, seen, NOW_NS); /* of a dial that has told already */
    CHECK_EQ(upstream_left(slab, NOW_NS), FIRST_NS);
    upstream_untried(slab, go(2, now), now);
    CHECK_EQ(state(), UPSTREAM_DOWN);
    CHECK_EQ(upstream_step(word()), 1); /* the same step: nothing was learnt */
    go(3, now);
    CHECK_EQ(failures(), 1);
    end();
}

/* Who ran out of time leaves a doubt, and the next dial is to come to its end; so is every probe. */
static void doubt(void)
{
    uint64_t seen, now = NOW_NS + FIRST_NS;
    begin();
    seen = go(1, NOW_NS);
    CHECK(!upstream_wants_verdict(seen)); /* nobody has ever failed */
    upstream_doubt(slab, seen, NOW_NS);
    upstream_untried(slab, seen, NOW_NS);
    seen = go(2, NOW_NS); /* at once */
    CHECK(upstream_wants_verdict(seen));
    upstream_untried(slab, seen, NOW_NS); /* that one was interrupted: the doubt stays */
    seen = go(3, NOW_NS);
    CHECK(upstream_wants_verdict(seen));
    upstream_doubt(slab, seen, NOW_NS); /* nothing new */
    CHECK_EQ(word(), seen);
    CHECK(!upstream_proved(slab)); /* it was never down */
    seen = go(1, NOW_NS);
    CHECK(!upstream_wants_verdict(seen));
    upstream_doubt(slab, seen, NOW_NS);
    CHECK_EQ(state(), UPSTREAM_UNPROVED);
    CHECK(fail(go(2, NOW_NS), NOW_NS));
    upstream_doubt(slab, seen, NOW_NS); /* what is known is known */
    CHECK_EQ(upstream_left(slab, NOW_NS), FIRST_NS);
    seen = go(2, now);
    CHECK(upstream_wants_verdict(seen));
    upstream_doubt(slab, seen, now);
    CHECK_EQ(state(), UPSTREAM_DOWN);
    CHECK_EQ(upstream_left(slab, now), 0);
    CHECK_EQ(failures(), 1);
    end();
}

static void suspect(void)
{
    uint64_t seen;
    begin();
    upstream_suspect(slab);
    CHECK_EQ(word(), UPSTREAM_UNPROVED);
    upstream_proved(slab);
    upstream_suspect(slab);
    CHECK_EQ(state(), UPSTREAM_UNPROVED);
    seen = go(1, NOW_NS);
    upstream_suspect(slab);
    CHECK_EQ(word(), seen);
    fail(seen, NOW_NS);
    seen = word();
    upstream_suspect(slab);
    CHECK_EQ(word(), seen);
    seen = go(1, NOW_NS + FIRST_NS);
    upstream_suspect(slab);
    CHECK_EQ(word(), seen);
    end();
}

static void forget(void)
{
    uint64_t now = NOW_NS + FIRST_NS, seen;
    begin();
    fail(go(1, NOW_NS), NOW_NS);
    seen = word();
    upstream_forget(slab, 1, now);
    CHECK_EQ(word(), seen);
    seen = go(2, now);
    upstream_forget(slab, 3, now);
    CHECK_EQ(word(), seen);
    upstream_forget(slab, 2, now);
    CHECK_EQ(state(), UPSTREAM_DOWN);
    CHECK_EQ(upstream_step(word()), 1);
    go(3, now);
    end();
}

/* No state that exists: somebody finds out, and it is whole again. */
static void damage(void)
{
    static const uint64_t words[] = {0, 5, 6, 7, UINT64_MAX, UINT64_MAX - 7};
    begin();
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        atomic_store(&slab->header->upstream, words[i]);
        CHECK(upstream_state_name(upstream_state(words[i])) != NULL);
        fail(go(1, NOW_NS), NOW_NS);
        CHECK_EQ(state(), UPSTREAM_DOWN);
        CHECK_EQ(upstream_left(slab, NOW_NS), FIRST_NS);
    }
    end();
}

static void names(void)
{
    static const char *const known[] = {"invalid", "unproved", "up", "down", "probing", "invalid"};
    for (int i = 0; i < 6; i++)
        CHECK(!strcmp(upstream_state_name((enum upstream_state)i), known[i]));
    CHECK(!strcmp(upstream_state_name((enum upstream_state)-1), "invalid"));
    for (int i = 0; i < 5; i++)
        CHECK_EQ(upstream_is_down((uint64_t)i), i >= UPSTREAM_DOWN);
}

/* The text of the last failure, cut to its room. */
static void texts(void)
{
    char text[SHM_ERROR_BYTES], longer[2 * SHM_ERROR_BYTES];
    begin();
    upstream_error(slab, text);
    CHECK_EQ(text[0], 0);
    upstream_failed(slab, go(1, NOW_NS), NOW_NS, &backoff, 0, "connection refused by 10.0.0.1");
    upstream_error(slab, text);
    CHECK(!strcmp(text, "connection refused by 10.0.0.1"));
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    upstream_failed(slab, go(1, NOW_NS + FIRST_NS), NOW_NS + FIRST_NS, &backoff, 0, longer);
    upstream_error(slab, text);
    CHECK_EQ(strlen(text), SHM_ERROR_BYTES - 1);
    CHECK(!memcmp(text, longer, SHM_ERROR_BYTES - 1));
    upstream_failed(slab, go(1, NOW_NS + 9 * FIRST_NS), NOW_NS + 9 * FIRST_NS, &backoff, 0, "short");
    upstream_error(slab, text);
    CHECK(!strcmp(text, "short"));
    end();
}

/* Since when it is down: the first failure, not the last. */
static void since(void)
{
    begin();
    fail(go(1, NOW_NS), NOW_NS);
    fail(go(1, NOW_NS + FIRST_NS), NOW_NS + FIRST_NS);
    CHECK_EQ(atomic_load(&slab->header->upstream_since_ns), NOW_NS);
    end();
}

/* ---- threads ---- */

static pthread_barrier_t barrier;
static a64_shm at_ns;
static a32_shm let_through, told;
static uint64_t seens[THREADS];

static void run_threads(void *(*body)(void *))
{
    pthread_t threads[THREADS];
    uint32_t numbers[THREADS];
    CHECK(pthread_barrier_init(&barrier, NULL, THREADS) == 0);
    for (uint32_t i = 0; i < THREADS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, body, &numbers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&barrier);
}

/* In each round all ask at once, when a step is over. One is let through; it fails, and the next step begins. */
static void *probe_together(void *number)
{
    uint32_t me = *(uint32_t *)number;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t seen, now = atomic_load(&at_ns);
        pthread_barrier_wait(&barrier);
        bool mine = ask_at(me + 1, now, &seen) == UPSTREAM_GO;
        if (mine)
            CHECK_EQ(atomic_fetch_add(&let_through, 1), 0);
        pthread_barrier_wait(&barrier);
        if (mine) {
            CHECK(!fail(seen, now));
            CHECK_EQ(atomic_exchange(&let_through, 0), 1);
            atomic_store(&at_ns, now + upstream_left(slab, now));
        }
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

static void one_dial_in_a_step(void)
{
    begin();
    fail(go(1, NOW_NS), NOW_NS);
    atomic_store(&at_ns, NOW_NS + FIRST_NS);
    run_threads(probe_together);
    CHECK_EQ(failures(), ROUNDS + 1);
    end();
}

/* The same without rounds: whoever is let through puts the clock to the end of the next step. Two at once would find each other. */
static void *probe_all_the_time(void *number)
{
    uint32_t me = *(uint32_t *)number;
    uint64_t seen;
    while (failures() < ROUNDS * THREADS) {
        uint64_t now = atomic_load(&at_ns);
        if (ask_at(me + 1, now, &seen) != UPSTREAM_GO)
            continue;
        CHECK_EQ(atomic_exchange(&let_through, me + 1), 0);
        CHECK_EQ(upstream_state(seen), UPSTREAM_PROBING);
        CHECK_EQ(atomic_exchange(&let_through, 0), me + 1);
        CHECK(!fail(seen, now));
        atomic_store(&at_ns, now + LAST_NS);
    }
    return NULL;
}

static void one_prober_at_a_time(void)
{
    begin();
    fail(go(1, NOW_NS), NOW_NS);
    atomic_store(&at_ns, NOW_NS + FIRST_NS);
    run_threads(probe_all_the_time);
    end();
}

/* The first of a herd is let through, where nothing is known. */
static void *ask_together(void *number)
{
    uint32_t me = *(uint32_t *)number;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t seen;
        pthread_barrier_wait(&barrier);
        if (ask_at(me + 1, NOW_NS, &seen) == UPSTREAM_GO)
            atomic_fetch_add(&let_through, 1);
        pthread_barrier_wait(&barrier);
        if (me == 0) {
            CHECK_EQ(atomic_exchange(&let_through, 0), 1);
            atomic_store(&slab->header->upstream, UPSTREAM_UNPROVED);
        }
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

static void one_of_a_herd(void)
{
    begin();
    run_threads(ask_together);
    end();
}

/* All dial, all fail: one of them tells it, and it is the first step. */
static void *fail_together(void *number)
{
    uint32_t me = *(uint32_t *)number;
    for (int round = 0; round < ROUNDS; round++) {
        CHECK_EQ(ask_at(me + 1, NOW_NS, &seens[me]), UPSTREAM_GO);
        pthread_barrier_wait(&barrier);
        if (fail(seens[me], NOW_NS))
            atomic_fetch_add(&told, 1);
        pthread_barrier_wait(&barrier);
        if (me == 0) {
            CHECK_EQ(atomic_exchange(&told, 0), 1);
            CHECK_EQ(upstream_step(word()), 1);
            CHECK_EQ(failures(), round + 1);
            CHECK(upstream_proved(slab));
        }
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

static void news_is_told_once(void)
{
    begin();
    upstream_proved(slab);
    run_threads(fail_together);
    end();
}

/* ---- with a pool ---- */

/* Whoever has found that the server is down, all know; a dead prober's right is another's as soon as its death is seen. */
static void a_dead_prober(void)
{
    struct pool_claim claim;
    begin();
    pool->options.backoff = backoff;
    struct pool *dead = play_join(pool), *other = play_join(pool);
    CHECK_EQ(play_take(dead, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
    play_fail_dial(dead, &claim);
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &claim), TAKEN_DOWN);
    atomic_store(&slab->header->upstream, word() & ((UINT64_C(1) << UPSTREAM_RETRY_SHIFT) - 1)); /* the step is over */
    CHECK_EQ(play_take(dead, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &claim), TAKEN_DOWN);
    play_die(dead);
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &claim), TAKEN_DOWN); /* nobody has looked */
    CHECK_EQ(recovery_run(other, true), 1);
    uint64_t due = upstream_retry_ns(word());
    while (clock_now() < due) /* a millisecond at most: the word has no finer time */
        ;
    CHECK_EQ(play_take(other, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
    CHECK(play_install(other, &claim));
    CHECK_EQ(state(), UPSTREAM_UP);
    CHECK_EQ(play_release(other, &claim), RELEASED);
    play_end(dead);
    play_leave(other);
    end();
}

/* Without an empty slot there is nothing to dial for, and the right to it goes back. */
static void no_slot_to_dial_on(void)
{
    struct pool_claim claims[4], one_more;
    begin();
    for (int i = 0; i < 4; i++)
        CHECK(pool_take_empty(pool, &claims[i]));
    CHECK_EQ(pool_take_dial(pool, true, &one_more), TAKEN_NOTHING);
    CHECK_EQ(state(), UPSTREAM_UNPROVED);
    CHECK(upstream_left(slab, clock_now() + PLAY_MS) == 0);
    for (int i = 0; i < 4; i++)
        pool_abandon(pool, &claims[i]);
    end();
}

/* Who waits because another finds out is woken by the answer, whichever it is. */
static void the_answer_wakes(void)
{
    struct waiter_place place = {0};
    struct pool_claim claim;
    begin();
    for (int good = 0; good <= 1; good++) {
        atomic_store(&slab->header->upstream, UPSTREAM_UNPROVED);
        CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
        CHECK(waiter_enter(slab, &place, pool->worker, PLAY_ANY, 1, 1));
        CHECK_EQ(play_take(pool, PLAY_ANY, &place, &(struct pool_claim){0}), TAKEN_NOTHING);
        if (good)
            CHECK(play_install(pool, &claim));
        else
            play_fail_dial(pool, &claim);
        CHECK_EQ(atomic_load(&slab->waiters[place.cell].futex), WAITER_WOKEN);
        waiter_leave(slab, &place);
    }
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    end();
}

/* A connection that the server has closed: it may be gone, and one dial finds out. */
static void a_broken_connection_is_a_suspicion(void)
{
    begin();
    for (int broken = 0; broken <= 1; broken++) {
        struct pool_claim claim = play_lease(pool);
        CHECK_EQ(state(), UPSTREAM_UP);
        CHECK(pool_condemn(pool, &claim));
        play_retire(pool, &claim, broken ? SHM_T_closed_broken : SHM_T_closed_error);
        CHECK_EQ(state(), broken ? UPSTREAM_UNPROVED : UPSTREAM_UP);
    }
    end();
}

int main(void)
{
    RUN(unproved);
    RUN(up);
    RUN(down_and_up_again);
    RUN(steps);
    RUN(random_steps);
    RUN(older_failures_count_once);
    RUN(late_prober);
    RUN(untried);
    RUN(doubt);
    RUN(suspect);
    RUN(forget);
    RUN(damage);
    RUN(names);
    RUN(texts);
    RUN(since);
    RUN(one_dial_in_a_step);
    RUN(one_prober_at_a_time);
    RUN(one_of_a_herd);
    RUN(news_is_told_once);
    RUN(a_dead_prober);
    RUN(no_slot_to_dial_on);
    RUN(the_answer_wakes);
    RUN(a_broken_connection_is_a_suspicion);
}
