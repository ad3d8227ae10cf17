/* freelist.c: idempotent bitmaps; see freelist.h. */
#include "freelist.h"

#include <assert.h>

void freelist_put(struct slab *slab, unsigned list, uint32_t slot)
{
    assert(list < SHM_BITMAPS && slot < slab->layout.max_slots);
    a64_shm *word = &slab->bitmaps[(uint64_t)list * slab->layout.bitmap_words + slot / 64];
    uint64_t bit = UINT64_C(1) << (slot % 64);
    if (!(SHM_LOAD(freelist, *word) & bit)) /* reading first keeps the line shared when the bit is there already */
        SHM_OR(freelist, *word, bit);
    if (!(SHM_LOAD(freelist, slab->header->listed) >> list & 1))
        SHM_OR(freelist, slab->header->listed, 1u << list);
}

void freelist_put_idle(struct slab *slab, uint32_t slot)
{
    uint32_t bucket = SHM_LOAD(row, slab->slots[slot].kind) & 0xff;
    if (bucket < SHM_BUCKETS)
        freelist_put(slab, bucket, slot);
}

/* Take one bit at or above position `from` of a word; -1 when there is none. */
static int take_bit(a64_shm *word, unsigned from)
{
    uint64_t seen = SHM_LOAD(freelist, *word) & (~UINT64_C(0) << from);
    while (seen) {
        uint64_t bit = seen & -seen;
        uint64_t before = SHM_AND(freelist, *word, ~bit);
        if (before & bit)
            return __builtin_ctzll(bit);
        seen = before & ~(bit | (bit - 1));
    }
    return -1;
}

int64_t freelist_take(struct slab *slab, unsigned list, uint32_t start)
{
    assert(list < SHM_BITMAPS && start < slab->layout.max_slots);
    if (!(SHM_LOAD(freelist, slab->header->listed) >> list & 1))
        return -1;
    uint32_t words = slab->layout.bitmap_words, first = start / 64;
    a64_shm *bitmap = &slab->bitmaps[(uint64_t)list * words];
    for (uint32_t i = 0; i <= words; i++) { /* the first word twice: above `start`, at last below it */
        uint32_t at = first + i < words ? first + i : first + i - words;
        int bit = take_bit(&bitmap[at], i == 0 ? start % 64 : 0);
        if (bit < 0)
            continue;
        uint32_t slot = at * 64 + (uint32_t)bit;
        if (slot < slab->layout.max_slots) /* read from shared memory: validated, never trusted */
            return slot;
    }
    SHM_AND(freelist, slab->header->listed, ~(1u << list)); /* a bit set this moment is forgotten: a scan will find its slot */
    return -1;
}
