/* test_local_cache.c: the slots used last: found first, bounded, given away when there is no place. */
#include "play.h"

static struct local_cache cache;
static a32_shm places[200];

static void begin(uint32_t size)
{
    cache.size = size;
    local_cache_clear(&cache);
    cache.hand = 0;
    for (size_t i = 0; i < 200; i++)
        places[i] = 0;
}

static uint32_t note(uint32_t slot) { return local_cache_note(&cache, slot, &places[slot]); }

static void without_places(void)
{
    begin(0);
    CHECK_EQ(note(5), 5); /* no cache: everything goes to the shared list */
    CHECK_EQ(note(5), 5);
}

static void keeps_its_place(void)
{
    begin(2);
    CHECK_EQ(note(7), LOCAL_CACHE_NONE);
    CHECK_EQ(note(7), LOCAL_CACHE_NONE);
    CHECK_EQ(cache.entries[cache.last], 7);
    CHECK_EQ(note(8), LOCAL_CACHE_NONE);
    CHECK_EQ(cache.entries[cache.last], 8);
    CHECK_EQ(note(7), LOCAL_CACHE_NONE); /* it still stands there */
    CHECK_EQ(cache.entries[cache.last], 7);
    CHECK_EQ(note(9), 7); /* the oldest place is given away */
    CHECK_EQ(note(7), 8);
}

/* Whatever is put in, what loses its place is returned: nothing vanishes. */
static void nothing_vanishes(void)
{
    struct check_random random = check_seed(NULL);
    for (uint32_t size = 1; size <= LOCAL_CACHE_MAX; size += 21) {
        bool inside[200] = {0};
        begin(size);
        for (int i = 0; i < 20000; i++) {
            uint32_t slot = (uint32_t)(check_random(&random) % 200), out = note(slot);
            inside[slot] = true;
            if (out != LOCAL_CACHE_NONE)
                inside[out] = false;
            uint32_t count = 0;
            for (uint32_t at = 0; at < size; at++)
                if (cache.entries[at] != LOCAL_CACHE_NONE) {
                    CHECK(inside[cache.entries[at]]);
                    count++;
                }
            for (uint32_t j = 0; j < 200; j++)
                count -= inside[j];
            CHECK_EQ(count, 0);
        }
    }
}

static void served_from_it(void)
{
    struct pool *pool = play_found(4, 2, 1, 2), *other = play_join(pool);
    struct pool_claim claim = play_lease(pool);
    uint32_t slot = claim.slot;
    CHECK_EQ(claim.source, SOURCE_DIAL);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    for (int i = 0; i < 3; i++) {
        claim = play_lease(pool);
        CHECK_EQ(claim.source, SOURCE_CACHE);
        CHECK_EQ(claim.slot, slot);
        CHECK_EQ(play_release(pool, &claim), RELEASED);
    }
    /* another takes it by CAS; then it is in its cache, and out of ours without a word to us */
    claim = play_lease(other);
    CHECK_EQ(claim.source, SOURCE_STEAL);
    CHECK_EQ(claim.slot, slot);
    CHECK_EQ(play_release(other, &claim), RELEASED);
    CHECK(!pool_take_cached(pool, PLAY_ANY, &claim));
    CHECK(pool_take_cached(other, PLAY_ANY, &claim));
    CHECK_EQ(play_release(other, &claim), RELEASED);
    play_leave(other);
    play_leave(pool);
}

/* A full cache lets the oldest go, to where everybody finds it without a scan. */
static void overflow_is_listed(void)
{
    struct pool *pool = play_found(4, 2, 1, 1), *other = play_join(pool);
    struct pool_claim one = play_lease(pool), two = play_lease(pool);
    CHECK_EQ(play_release(pool, &one), RELEASED);
    CHECK_EQ(play_release(pool, &two), RELEASED);
    struct pool_claim first = play_lease(other);
    CHECK_EQ(first.source, SOURCE_FREELIST);
    CHECK_EQ(first.slot, one.slot);
    CHECK_EQ(play_release(other, &first), RELEASED);
    play_leave(other);
    play_leave(pool);
}

/* Damaged or foreign entries cannot be served: mask, state and owner are looked at. */
static void entries_are_hints(void)
{
    struct pool *pool = play_found(4, 1, 1, 4);
    struct pool_claim claim = play_lease(pool), again;
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK(!pool_take_cached(pool, 1u << 1, &again));
    CHECK(pool_take_cached(pool, 1u << 0, &again));
    CHECK(!pool_take_cached(pool, PLAY_ANY, &claim)); /* it is leased */
    CHECK_EQ(play_release(pool, &again), RELEASED);
    for (uint32_t i = 0; i < 4; i++)
        pool->cache.entries[i] = i; /* EMPTY ones, and the same slot twice */
    pool->cache.entries[0] = pool->cache.entries[1] = again.slot;
    CHECK(pool_take_cached(pool, PLAY_ANY, &again));
    CHECK(!pool_take_cached(pool, PLAY_ANY, &claim));
    CHECK_EQ(play_release(pool, &again), RELEASED);
    play_lease_all(pool);
    play_leave(pool);
}

int main(void)
{
    RUN(without_places);
    RUN(keeps_its_place);
    RUN(nothing_vanishes);
    RUN(served_from_it);
    RUN(overflow_is_listed);
    RUN(entries_are_hints);
}
