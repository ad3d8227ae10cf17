/* test_slab.c: layout, its limits, and that a slab which is not whole is refused. */
#include <stddef.h>

#include "play.h"

static void layout_limits(void)
{
    struct slab_layout layout;
    CHECK(slab_layout(&layout, 1, 1, 1));
    CHECK(slab_layout(&layout, 100000, 4096, 3968));
    CHECK_EQ(layout.max_slots, 100000);
    CHECK(!slab_layout(&layout, 0, 1, 1));
    CHECK(!slab_layout(&layout, 1, 0, 1));
    CHECK(!slab_layout(&layout, 1, 1, 0));
    CHECK(!slab_layout(&layout, 100001, 1, 1));
    CHECK(!slab_layout(&layout, 1, 4097, 1));
    CHECK(!slab_layout(&layout, 1, 1, 3969));
    CHECK(!slab_layout(&layout, UINT64_MAX, UINT64_MAX, UINT64_MAX));
}

/* Regions follow each other without overlap, each on a line of its own, whatever the capacities. */
static void layout_regions(void)
{
    static const uint32_t slots[] = {1, 2, 63, 64, 65, 511, 512, 513, 4096, 99999, 100000};
    static const uint32_t workers[] = {1, 2, 128, 4095, 4096}, waiters[] = {1, 63, 64, 65, 1024, 3967, 3968};
    for (size_t s = 0; s < sizeof slots / sizeof *slots; s++)
        for (size_t w = 0; w < sizeof workers / sizeof *workers; w++)
            for (size_t q = 0; q < sizeof waiters / sizeof *waiters; q++) {
                struct slab_layout at;
                CHECK(slab_layout(&at, slots[s], workers[w], waiters[q]));
                CHECK(at.totals_offset >= sizeof(struct header_shm));
                CHECK(at.workers_offset >= at.totals_offset + sizeof(struct totals_shm));
                CHECK(at.words_offset >= at.workers_offset + (uint64_t)workers[w] * sizeof(struct worker_shm));
                CHECK(at.waiters_offset >= at.words_offset + (uint64_t)waiters[q] * 8);
                CHECK(at.bitmaps_offset >= at.waiters_offset + (uint64_t)waiters[q] * sizeof(struct waiter_shm));
                CHECK((uint64_t)at.bitmap_words * 64 >= slots[s]);
                CHECK(at.slots_offset >= at.bitmaps_offset + (uint64_t)SHM_BITMAPS * at.bitmap_words * 8);
                CHECK(at.total_size >= at.slots_offset + (uint64_t)slots[s] * sizeof(struct slot_shm));
                CHECK_EQ(at.total_size % 4096, 0);
                CHECK_EQ((at.workers_offset | at.words_offset | at.waiters_offset | at.bitmaps_offset | at.slots_offset) % 64, 0);
            }
}

static void header_is_a_contract(void)
{
    CHECK_EQ(sizeof(struct header_shm), SHM_HEADER_BYTES);
    CHECK_EQ(SHM_HEADER_BYTES, 8192);
    CHECK_EQ(sizeof(struct slot_shm), 128);
    CHECK_EQ(sizeof(struct waiter_shm), 64);
    CHECK_EQ(offsetof(struct header_shm, magic), 0);
    CHECK_EQ(offsetof(struct header_shm, summary) % 64, 0);
    CHECK_EQ(offsetof(struct header_shm, cap) % 64, 0);
    CHECK(slab_format() != 0);
    CHECK_EQ(slab_format(), slab_format());
}

static struct slab_layout the_layout;
static uint8_t *base;
static struct slab slab;

static void format(uint32_t slots, uint32_t workers, uint32_t waiters)
{
    struct slab_identity who = play_identity();
    CHECK(slab_layout(&the_layout, slots, workers, waiters));
    base = mmap(NULL, the_layout.total_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(base != MAP_FAILED);
    slab_format_new(&slab, base, &the_layout, &who);
}

static void unformat(void) { munmap(base, the_layout.total_size); }

static void fresh_slab(void)
{
    struct slab opened;
    format(70, 3, 65);
    CHECK_EQ(slab_open(&opened, base, the_layout.total_size), SLAB_OK);
    CHECK((uint8_t *)opened.slots == base + the_layout.slots_offset);
    for (uint32_t i = 0; i < 70; i++)
        CHECK_EQ(opened.slots[i].word, slot_word(0, 0, SLOT_EMPTY));
    for (uint32_t i = 0; i < 3; i++)
        CHECK_EQ(opened.workers[i].state, SHM_WORKER_FREE);
    for (uint32_t i = 0; i < 65; i++)
        CHECK_EQ(opened.waiter_words[i], WAITER_FREE_WORD);
    for (uint32_t i = 0; i < 70; i++)
        CHECK_EQ(freelist_take(&opened, SHM_EMPTY_LIST, 0), i);
    CHECK_EQ(freelist_take(&opened, SHM_EMPTY_LIST, 0), -1);
    for (unsigned list = 0; list < SHM_BUCKETS; list++)
        CHECK_EQ(freelist_take(&opened, list, 0), -1);
    CHECK_EQ(opened.header->summary, 0);
    CHECK_EQ(opened.header->cap, 70);
    CHECK_EQ(opened.header->bound, 70);
    CHECK_EQ(opened.header->upstream, UPSTREAM_UNPROVED);
    CHECK(opened.header->next_connection > 0);
    unformat();
}

/* A slab with slots to grow into begins with fewer. */
static void capped_slab(void)
{
    struct slab_identity who = play_identity();
    format(70, 3, 65);
    who.cap = 7;
    slab_format_new(&slab, base, &the_layout, &who);
    CHECK_EQ(slab.header->cap, 7);
    CHECK_EQ(slab.header->bound, 7);
    unformat();
}

/* Long texts are cut, and end. */
static void long_texts(void)
{
    char text[5000];
    struct slab opened;
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    struct slab_identity who = play_identity();
    who.name = who.target = who.config = text;
    format(1, 1, 1);
    slab_format_new(&slab, base, &the_layout, &who);
    CHECK_EQ(slab_open(&opened, base, the_layout.total_size), SLAB_OK);
    CHECK_EQ(strlen(opened.header->name), SHM_NAME_BYTES - 1);
    CHECK_EQ(strlen(opened.header->config), SHM_CONFIG_BYTES - 1);
    unformat();
}

static void expect(enum slab_verdict verdict)
{
    struct slab opened;
    CHECK_EQ(slab_open(&opened, base, the_layout.total_size), verdict);
    CHECK(slab_verdict_text(verdict)[0] != 0);
    unformat();
    format(4, 2, 3);
}

static void damaged_slabs(void)
{
    struct slab opened;
    format(4, 2, 3);
    CHECK_EQ(slab_open(&opened, base, 0), SLAB_TOO_SMALL);
    CHECK_EQ(slab_open(&opened, base, 4096), SLAB_TOO_SMALL);
    CHECK_EQ(slab_open(&opened, base, the_layout.total_size - 4096), SLAB_BAD_SIZES);
    CHECK_EQ(slab_open(&opened, base, the_layout.total_size + 4096), SLAB_BAD_SIZES);
    memset(base, 0, the_layout.total_size);
    expect(SLAB_NO_MAGIC); /* zero is damage */
    slab.header->magic ^= 1;
    expect(SLAB_NO_MAGIC);
    slab.header->version++;
    expect(SLAB_FOREIGN_VERSION);
    slab.header->format ^= 1u << 31;
    expect(SLAB_FOREIGN_FORMAT);
    slab.header->max_slots++;
    expect(the_layout.total_size == slab.header->total_size ? SLAB_OK : SLAB_BAD_SIZES);
    slab.header->max_slots = 0;
    expect(SLAB_BAD_SIZES);
    slab.header->max_slots = UINT32_MAX;
    expect(SLAB_BAD_SIZES);
    slab.header->max_workers = 4097;
    expect(SLAB_BAD_SIZES);
    slab.header->max_waiters = 3969;
    expect(SLAB_BAD_SIZES);
    slab.header->total_size += 4096;
    expect(SLAB_BAD_SIZES);
    memset(slab.header->name, 'x', sizeof slab.header->name);
    expect(SLAB_BAD_TEXT);
    memset(slab.header->target, 'x', sizeof slab.header->target);
    expect(SLAB_BAD_TEXT);
    memset(slab.header->config, 'x', sizeof slab.header->config);
    expect(SLAB_BAD_TEXT);
    slab.header->summary = ~UINT64_C(0); /* there is no summary that is wrong */
    expect(SLAB_OK);
    unformat();
}

/* Any single flipped bit in the header's fixed part is refused, or stands in a field that is free text or of no weight. */
static void flipped_bits(void)
{
    const size_t decisive[][2] = {{offsetof(struct header_shm, magic), 8},
                                  {offsetof(struct header_shm, version), 4},
                                  {offsetof(struct header_shm, format), 4},
                                  {offsetof(struct header_shm, total_size), 8},
                                  {offsetof(struct header_shm, max_workers), 4}};
    format(4, 2, 3);
    for (size_t i = 0; i < sizeof decisive / sizeof *decisive; i++)
        for (size_t bit = 0; bit < decisive[i][1] * 8; bit++) {
            struct slab opened;
            base[decisive[i][0] + bit / 8] ^= (uint8_t)(1u << bit % 8);
            CHECK(slab_open(&opened, base, the_layout.total_size) != SLAB_OK);
            base[decisive[i][0] + bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
    unformat();
}

/* Opening writes nothing: an inspector maps the slab read-only. */
static void read_only(void)
{
    struct slab opened;
    format(4, 2, 3);
    CHECK(mprotect(base, the_layout.total_size, PROT_READ) == 0);
    CHECK_EQ(slab_open(&opened, base, the_layout.total_size), SLAB_OK);
    unformat();
}

int main(void)
{
    RUN(layout_limits);
    RUN(layout_regions);
    RUN(header_is_a_contract);
    RUN(fresh_slab);
    RUN(capped_slab);
    RUN(long_texts);
    RUN(damaged_slabs);
    RUN(flipped_bits);
    RUN(read_only);
}
