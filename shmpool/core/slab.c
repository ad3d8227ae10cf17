/* slab.c: layout, formatting and checking of the shared segment. See slab.h for the map.
 *
 * Not here: making the segment and giving it a name (shmpool/pool.py), mapping it (pool.c, inspector), changing words.
 */
#include "slab.h"

#include <assert.h>
#include <string.h>

#include "slot.h"
#include "upstream.h"
#include "waiter.h"

static uint64_t round_up(uint64_t size, uint64_t unit) { return (size + unit - 1) / unit * unit; }

bool slab_layout(struct slab_layout *layout, uint64_t max_slots, uint64_t max_workers, uint64_t max_waiters)
{
    if (max_slots < 1 || max_slots > SHM_MAX_SLOTS || max_workers < 1 || max_workers > SHM_MAX_WORKERS ||
        max_waiters < 1 || max_waiters > SHM_MAX_WAITERS)
        return false;
    layout->max_slots = (uint32_t)max_slots;
    layout->max_workers = (uint32_t)max_workers;
    layout->max_waiters = (uint32_t)max_waiters;
    layout->bitmap_words = (uint32_t)(round_up(max_slots, 512) / 64);
    layout->totals_offset = SHM_HEADER_BYTES;
    layout->events_offset = round_up(layout->totals_offset + sizeof(struct totals_shm), 4096);
    layout->workers_offset = round_up(layout->events_offset + SHM_EVENTS * sizeof(struct event_shm), 4096);
    layout->words_offset = layout->workers_offset + max_workers * sizeof(struct worker_shm);
    layout->waiters_offset = round_up(layout->words_offset + round_up(max_waiters, SHM_WAITER_GROUP) * sizeof(a64_shm), 64);
    layout->bitmaps_offset = layout->waiters_offset + max_waiters * sizeof(struct waiter_shm);
    layout->slots_offset = layout->bitmaps_offset + (uint64_t)SHM_BITMAPS * layout->bitmap_words * sizeof(a64_shm);
    layout->accounts_offset = layout->slots_offset + max_slots * sizeof(struct slot_shm);
    layout->total_size = round_up(layout->accounts_offset + max_slots * sizeof(struct account_shm), 4096);
    assert(layout->slots_offset % 64 == 0 && layout->bitmaps_offset % 64 == 0);
    return true;
}

/* FNV-1a over every size that two builds must agree on. */
uint32_t slab_format(void)
{
    const uint32_t sizes[] = {
        sizeof(struct header_shm), sizeof(struct totals_shm), sizeof(struct worker_shm),  sizeof(struct waiter_shm),
        sizeof(struct slot_shm),   SHM_W_COUNT,               SHM_T_COUNT,                SHM_BITMAPS,
        SHM_HIST_BUCKETS,          SHM_HIST_FIRST_OCTAVE,     SLOT_SEQUENCE_SHIFT,        WAITER_TICKET_SHIFT,
        SHM_WAITER_GROUP,          sizeof(void *),            SHM_MAX_WAITERS,            UINT32_C(0x01020304),
        SHM_EVENTS,                sizeof(struct event_shm),  sizeof(struct account_shm),
    };
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        hash = (hash ^ sizes[i]) * 16777619u;
    return hash;
}

static void slab_point(struct slab *slab, void *base, const struct slab_layout *layout)
{
    uint8_t *bytes = base;
    slab->layout = *layout;
    slab->header = base;
    slab->totals = (struct totals_shm *)(bytes + layout->totals_offset);
    slab->events = (struct event_shm *)(bytes + layout->events_offset);
    slab->workers = (struct worker_shm *)(bytes + layout->workers_offset);
    slab->waiter_words = (a64_shm *)(bytes + layout->words_offset);
    slab->waiters = (struct waiter_shm *)(bytes + layout->waiters_offset);
    slab->bitmaps = (a64_shm *)(bytes + layout->bitmaps_offset);
    slab->slots = (struct slot_shm *)(bytes + layout->slots_offset);
    slab->accounts = (struct account_shm *)(bytes + layout->accounts_offset);
}

static void copy_text(char *to, size_t size, const char *text)
{
    size_t length = strnlen(text, size - 1);
    memcpy(to, text, length);
    memset(to + length, 0, size - length);
}

void slab_format_new(struct slab *slab, void *base, const struct slab_layout *layout, const struct slab_identity *who)
{
    slab_point(slab, base, layout);
    struct header_shm *header = slab->header;
    header->version = SHM_VERSION;
    header->format = slab_format();
    header->total_size = layout->total_size;
    memcpy(header->id, who->id, sizeof header->id);
    header->created_realtime_ns = who->created_realtime_ns;
    header->creator_uid = who->uid;
    header->creator_pid = who->pid;
    header->max_slots = layout->max_slots;
    header->max_workers = layout->max_workers;
    header->max_waiters = layout->max_waiters;
    copy_text(header->name, sizeof header->name, who->name);
    copy_text(header->target, sizeof header->target, who->target);
    copy_text(header->config, sizeof header->config, who->config);
    copy_text(header->rendezvous, sizeof header->rendezvous, who->rendezvous);
    SHM_STORE(hint, header->next_connection, 1);
    SHM_STORE(hint, header->next_ticket, 1);
    uint32_t cap = who->cap ? who->cap : layout->max_slots;
    assert(cap <= layout->max_slots);
    SHM_STORE(hint, header->cap, cap);
    SHM_STORE(hint, header->bound, cap);
    SHM_STORE(hint, header->upstream, UPSTREAM_UNPROVED);
    SHM_STORE(hint, header->listed, 1u << SHM_EMPTY_LIST);
    for (uint32_t i = 0; i < layout->max_workers; i++)
        SHM_STORE(hint, slab->workers[i].state, SHM_WORKER_FREE);
    for (uint64_t i = 0; i < round_up(layout->max_waiters, SHM_WAITER_GROUP); i++)
        SHM_STORE(hint, slab->waiter_words[i], WAITER_FREE_WORD);
    for (uint32_t i = 0; i < layout->max_slots; i++) {
        SHM_STORE(hint, slab->slots[i].word, slot_word(0, SHM_NO_WORKER, SLOT_EMPTY));
        a64_shm *bits = &slab->bitmaps[(size_t)SHM_EMPTY_LIST * layout->bitmap_words + i / 64];
        SHM_STORE(hint, *bits, SHM_LOAD(hint, *bits) | UINT64_C(1) << (i % 64));
    }
    /* ORDER(publish): release. Pairs with the acquire in slab_open(): who sees the magic sees a whole header. The file's
     * name, given only after this (pool.py), is the real publication; weaker would still be wrong for a slab that is
     * opened through an inherited descriptor. */
    SHM_STORE_RELEASE(publish, header->magic, SHM_MAGIC);
}

static bool text_ends(const char *text, size_t size) { return strnlen(text, size) < size; }

enum slab_verdict slab_open(struct slab *slab, void *base, uint64_t size)
{
    struct header_shm *header = base;
    if (size < SHM_HEADER_BYTES + sizeof(struct totals_shm))
        return SLAB_TOO_SMALL;
    if (SHM_LOAD_ACQUIRE(publish, header->magic) != SHM_MAGIC)
        return SLAB_NO_MAGIC;
    if (header->version != SHM_VERSION)
        return SLAB_FOREIGN_VERSION;
    if (header->format != slab_format())
        return SLAB_FOREIGN_FORMAT;
    struct slab_layout layout;
    if (!slab_layout(&layout, header->max_slots, header->max_workers, header->max_waiters) ||
        layout.total_size != header->total_size || layout.total_size != size)
        return SLAB_BAD_SIZES;
    if (!text_ends(header->name, sizeof header->name) || !text_ends(header->target, sizeof header->target) ||
        !text_ends(header->config, sizeof header->config) || !text_ends(header->rendezvous, sizeof header->rendezvous))
        return SLAB_BAD_TEXT;
    slab_point(slab, base, &layout);
    return SLAB_OK;
}

const char *slab_verdict_text(enum slab_verdict verdict)
{
    static const char *const texts[] = {
        [SLAB_OK] = "whole",
        [SLAB_TOO_SMALL] = "it is smaller than a header",
        [SLAB_NO_MAGIC] = "it does not begin with shmpool's magic: it is not a shmpool slab, or it was zeroed or cut",
        [SLAB_FOREIGN_VERSION] = "it was written by another version of shmpool",
        [SLAB_FOREIGN_FORMAT] = "it was written by a build of shmpool with another layout",
        [SLAB_BAD_SIZES] = "its sizes contradict each other or the size of the segment",
        [SLAB_BAD_TEXT] = "a text in its header does not end, or is no UTF-8",
    };
    assert((size_t)verdict < sizeof texts / sizeof texts[0]);
    return texts[verdict];
}
