/* test_freelist.c: hints: idempotent, found from any start, never trusted. */
#include "play.h"

static struct pool *pool;

static void clear(unsigned list)
{
    while (freelist_take(&pool->slab, list, 0) >= 0)
        ;
}

static void idempotent(void)
{
    pool = play_found(130, 1, 1, 0);
    for (unsigned list = 0; list < SHM_BITMAPS; list++) {
        clear(list);
        for (int i = 0; i < 3; i++)
            freelist_put(&pool->slab, list, 77);
        CHECK_EQ(freelist_take(&pool->slab, list, 0), 77);
        CHECK_EQ(freelist_take(&pool->slab, list, 0), -1);
    }
    play_leave(pool);
}

/* One bit is found from every start; of two, the next one at or above it, else around. */
static void around(void)
{
    static const uint32_t sizes[] = {1, 63, 64, 65, 130, 600};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        uint32_t size = sizes[s];
        pool = play_found(size, 1, 1, 0);
        for (uint32_t bit = 0; bit < size; bit += size > 70 ? 13 : 1)
            for (uint32_t start = 0; start < size; start++) {
                freelist_put(&pool->slab, 1, bit);
                CHECK_EQ(freelist_take(&pool->slab, 1, start), bit);
            }
        for (uint32_t start = 0; size > 1 && start < size; start++) {
            freelist_put(&pool->slab, 1, 0);
            freelist_put(&pool->slab, 1, size - 1);
            CHECK_EQ(freelist_take(&pool->slab, 1, start), start == 0 ? 0 : size - 1);
            CHECK_EQ(freelist_take(&pool->slab, 1, start), start == 0 ? size - 1 : 0);
        }
        play_leave(pool);
    }
}

/* Bits beyond the last slot (damage) are passed over. */
static void beyond_the_end(void)
{
    pool = play_found(70, 1, 1, 0);
    for (uint32_t word = 0; word < pool->slab.layout.bitmap_words; word++)
        pool->slab.bitmaps[word] = UINT64_MAX;
    pool->slab.header->listed = UINT32_MAX;
    uint32_t taken = 0;
    int64_t slot;
    while ((slot = freelist_take(&pool->slab, 0, 69)) >= 0) {
        CHECK(slot < 70);
        CHECK(++taken <= 70);
    }
    CHECK(taken >= 69); /* a word whose bit was beyond the end may cost one look */
    play_leave(pool);
}

/* The word that says which lists have any bit is a hint as well: wrong either way, nothing is lost but time. */
static void wrong_summary(void)
{
    pool = play_found(3, 1, 1, 0);
    pool->slab.header->listed = 0;
    play_lease_all(pool);
    CHECK_EQ(freelist_take(&pool->slab, SHM_EMPTY_LIST, 0), -1);
    pool->slab.header->listed = UINT32_MAX;
    CHECK_EQ(freelist_take(&pool->slab, 2, 0), -1);
    CHECK_EQ(freelist_take(&pool->slab, 2, 0), -1);
    freelist_put(&pool->slab, 2, 1);
    CHECK_EQ(freelist_take(&pool->slab, 2, 0), 1);
    play_lease_all(pool);
    play_leave(pool);
}

/* Kinds come from shared memory. */
static void damaged_kind(void)
{
    pool = play_found(8, 1, 1, 0);
    clear(SHM_EMPTY_LIST);
    for (uint32_t kind = SHM_BUCKETS; kind < 256; kind++) {
        pool->slab.slots[3].kind = kind;
        freelist_put_idle(&pool->slab, 3);
    }
    for (unsigned list = 0; list < SHM_BITMAPS; list++)
        CHECK_EQ(freelist_take(&pool->slab, list, 0), -1);
    pool->slab.slots[3].kind = 4 | SHM_KIND_PRIVATE;
    freelist_put_idle(&pool->slab, 3);
    CHECK_EQ(freelist_take(&pool->slab, 4, 0), 3);
    play_leave(pool);
}

/* Wrong hints of both kinds harm nobody: set for a slot that is leased, missing for one that is idle. */
static void wrong_hints(void)
{
    pool = play_found(3, 2, 1, 0);
    play_lease_all(pool);
    struct pool *other = play_join(pool);
    struct pool_claim one = play_lease(pool);
    freelist_put(&pool->slab, 0, one.slot);
    freelist_put(&pool->slab, SHM_EMPTY_LIST, one.slot);
    struct pool_claim two = play_lease(other), three = play_lease(other), four;
    CHECK(two.slot != one.slot && three.slot != one.slot);
    CHECK(!play_try(other, &four));
    CHECK_EQ(play_release(pool, &one), RELEASED);
    clear(0);
    CHECK(play_try(other, &four));
    CHECK_EQ(four.source, SOURCE_STEAL);
    CHECK_EQ(play_release(other, &two), RELEASED);
    CHECK_EQ(play_release(other, &three), RELEASED);
    CHECK_EQ(play_release(other, &four), RELEASED);
    play_leave(other);
    play_lease_all(pool);
    play_leave(pool);
}

int main(void)
{
    RUN(idempotent);
    RUN(around);
    RUN(beyond_the_end);
    RUN(wrong_summary);
    RUN(damaged_kind);
    RUN(wrong_hints);
}
