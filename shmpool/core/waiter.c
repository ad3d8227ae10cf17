/* waiter.c: the queue, the wake-up and the hand-over. See waiter.h for the states and the invariants. */
#include "waiter.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t waiter_word(uint32_t ticket, uint32_t slot, uint32_t owner, uint32_t mask, enum waiter_state state)
{
    assert(mask && mask <= WAITER_ANY_BUCKET && owner <= SHM_MAX_WORKERS);
    return (uint64_t)ticket << WAITER_TICKET_SHIFT | (uint64_t)slot << WAITER_SLOT_SHIFT |
           (uint64_t)owner << WAITER_OWNER_SHIFT | (uint64_t)mask << WAITER_MASK_SHIFT | (uint64_t)state;
}

/* Shared, not private: the sleeper and the waker are different processes. */
static void futex_wake(a32_shm *futex) { syscall(SYS_futex, futex, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

static uint64_t group_bit(uint32_t cell) { return UINT64_C(1) << (cell / SHM_WAITER_GROUP); }

static void assert_summary(struct slab *slab, uint32_t cell)
{
    if (!(SHM_LOAD_SEQ(queue, slab->header->summary) & group_bit(cell)))
        SHM_OR_SEQ(queue, slab->header->summary, group_bit(cell));
}

/* ---- the waiter's side ---- */

bool waiter_enter(struct slab *slab, struct waiter_place *place, uint32_t owner, uint32_t mask, uint32_t tid, uint64_t now)
{
    assert(!place->queued && owner);
    uint32_t ticket = (uint32_t)SHM_ADD(hint, slab->header->next_ticket, 1) & ((1u << 27) - 1);
    uint64_t wanted = waiter_word(ticket, 0, owner, mask, WAITER_WAITING);
    for (uint32_t cell = 0; cell < slab->layout.max_waiters; cell++) {
        uint64_t word = SHM_LOAD(hint, slab->waiter_words[cell]);
        if (word != WAITER_FREE_WORD || !SHM_CAS_SEQ(queue, slab->waiter_words[cell], &word, wanted))
            continue;
        *place = (struct waiter_place){.queued = true, .dialling = place->dialling, .cell = cell, .owner = owner, .mask = mask,
                                      .ticket = ticket, .since_ns = now};
        SHM_STORE(hint, slab->waiters[cell].since_ns, now);
        SHM_STORE(hint, slab->waiters[cell].tid, tid);
        waiter_prepare(slab, place);
        return true;
    }
    return false;
}

void waiter_prepare(struct slab *slab, struct waiter_place *place)
{
    assert(place->queued);
    SHM_SWAP_SEQ(futex, slab->waiters[place->cell].futex, WAITER_ASLEEP);
    place->patient = false;
    assert_summary(slab, place->cell);
}

/* Is `word` still this place, in whatever state? */
static bool same_place(const struct waiter_place *place, uint64_t word)
{
    return waiter_ticket(word) == place->ticket && waiter_owner(word) == place->owner &&
           (waiter_state(word) == WAITER_WAITING || waiter_state(word) == WAITER_MATCHED);
}

static int64_t promised_slot(struct slab *slab, uint64_t word)
{
    bool promised = waiter_state(word) == WAITER_MATCHED && waiter_slot(word) < slab->layout.max_slots;
    return promised ? (int64_t)waiter_slot(word) : -1;
}

int64_t waiter_promised(struct slab *slab, struct waiter_place *place)
{
    uint64_t word = SHM_LOAD_SEQ(offer, slab->waiter_words[place->cell]);
    return same_place(place, word) ? promised_slot(slab, word) : -1;
}

int64_t waiter_rematch(struct slab *slab, struct waiter_place *place)
{
    uint64_t word = SHM_LOAD_SEQ(offer, slab->waiter_words[place->cell]);
    uint64_t again = waiter_word(place->ticket, 0, place->owner, place->mask, WAITER_WAITING);
    bool matched = same_place(place, word) && waiter_state(word) == WAITER_MATCHED;
    if (!matched || !SHM_CAS_SEQ(offer, slab->waiter_words[place->cell], &word, again))
        return -1;
    return promised_slot(slab, word);
}

int64_t waiter_leave(struct slab *slab, struct waiter_place *place)
{
    assert(place->queued);
    place->queued = false;
    uint64_t word = SHM_LOAD_SEQ(offer, slab->waiter_words[place->cell]);
    while (same_place(place, word)) { /* a matcher may change it under us; it cannot do so for ever: its slot is one */
        if (!SHM_CAS_SEQ(offer, slab->waiter_words[place->cell], &word, WAITER_FREE_WORD))
            continue;
        if (SHM_LOAD_SEQ(futex, slab->waiters[place->cell].futex) == WAITER_WOKEN) /* woken since the last look: that is for another now */
            waiter_wake_first(slab, WAITER_ANY_BUCKET); /* what it was for is not known: any may use it */
        return promised_slot(slab, word);
    }
    return -1; /* recovered under our feet: damage or a bug elsewhere; the place is not ours */
}

bool waiter_be_patient(struct slab *slab, struct waiter_place *place)
{
    uint32_t asleep = WAITER_ASLEEP;
    place->patient = SHM_CAS_SEQ(futex, slab->waiters[place->cell].futex, &asleep, WAITER_PATIENT);
    return place->patient;
}

bool waiter_sleep(struct slab *slab, struct waiter_place *place, uint64_t timeout_ns)
{
    struct timespec time = {(time_t)(timeout_ns / 1000000000), (long)(timeout_ns % 1000000000)};
    a32_shm *futex = &slab->waiters[place->cell].futex;
    SHM_STEP(futex);
    syscall(SYS_futex, futex, FUTEX_WAIT, place->patient ? WAITER_PATIENT : WAITER_ASLEEP, &time, NULL, 0);
    return SHM_LOAD_SEQ(futex, *futex) == WAITER_WOKEN;
}

/* ---- the releaser's side ---- */

static void wake(struct slab *slab, uint32_t cell)
{
    if (SHM_SWAP_SEQ(futex, slab->waiters[cell].futex, WAITER_WOKEN) != WAITER_WOKEN)
        futex_wake(&slab->waiters[cell].futex);
}

/* Best fitting waiter of one group; returns false when every place in it is FREE. */
static bool search_group(struct slab *slab, uint32_t group, uint32_t mask, struct waiter_seen *best, bool *found)
{
    bool occupied = false;
    uint32_t end = (group + 1) * SHM_WAITER_GROUP;
    if (end > slab->layout.max_waiters)
        end = slab->layout.max_waiters;
    for (uint32_t cell = group * SHM_WAITER_GROUP; cell < end; cell++) {
        uint64_t word = SHM_LOAD_SEQ(queue, slab->waiter_words[cell]);
        if (word == WAITER_FREE_WORD)
            continue;
        occupied = true;
        if (waiter_state(word) != WAITER_WAITING || !(waiter_mask(word) & mask))
            continue;
        if (!*found || waiter_before(waiter_ticket(word), waiter_ticket(best->word)))
            *best = (struct waiter_seen){cell, word};
        *found = true;
    }
    return occupied;
}

/* Clear the bit of a group seen empty; look again, because somebody may have entered and found the bit still set. */
static void clear_group(struct slab *slab, uint32_t group)
{
    struct waiter_seen seen;
    bool found = false;
    SHM_AND_SEQ(queue, slab->header->summary, ~(UINT64_C(1) << group));
    if (!search_group(slab, group, WAITER_ANY_BUCKET, &seen, &found))
        return;
    SHM_OR_SEQ(queue, slab->header->summary, UINT64_C(1) << group);
    uint32_t first = group * SHM_WAITER_GROUP, end = first + SHM_WAITER_GROUP;
    for (uint32_t cell = first; cell < end && cell < slab->layout.max_waiters; cell++)
        if (waiter_state(SHM_LOAD_SEQ(queue, slab->waiter_words[cell])) == WAITER_WAITING)
            wake(slab, cell); /* releasers may have missed them meanwhile */
}

bool waiter_first(struct slab *slab, uint32_t mask, struct waiter_seen *seen)
{
    bool found = false;
    uint64_t groups = SHM_LOAD_SEQ(queue, slab->header->summary) & ~SHM_STATE_MASK;
    for (; groups; groups &= groups - 1) {
        uint32_t group = (uint32_t)__builtin_ctzll(groups);
        if (!search_group(slab, group, mask, seen, &found))
            clear_group(slab, group);
    }
    return found;
}

uint64_t waiter_since(struct slab *slab, const struct waiter_seen *seen)
{
    return SHM_LOAD(hint, slab->waiters[seen->cell].since_ns);
}

/* The first fitting waiter that sleeps, or soon will. */
static bool first_asleep(struct slab *slab, uint32_t mask, struct waiter_seen *best)
{
    bool found = false;
    uint64_t groups = SHM_LOAD_SEQ(queue, slab->header->summary) & ~SHM_STATE_MASK;
    for (; groups; groups &= groups - 1) {
        uint32_t first = (uint32_t)__builtin_ctzll(groups) * SHM_WAITER_GROUP, end = first + SHM_WAITER_GROUP;
        for (uint32_t cell = first; cell < end && cell < slab->layout.max_waiters; cell++) {
            uint64_t word = SHM_LOAD_SEQ(queue, slab->waiter_words[cell]);
            if (waiter_state(word) != WAITER_WAITING || !(waiter_mask(word) & mask) ||
                SHM_LOAD_SEQ(futex, slab->waiters[cell].futex) != WAITER_ASLEEP)
                continue;
            if (!found || waiter_before(waiter_ticket(word), waiter_ticket(best->word)))
                *best = (struct waiter_seen){cell, word};
            found = true;
        }
    }
    return found;
}

void waiter_wake_first(struct slab *slab, uint32_t mask)
{
    struct waiter_seen seen;
    while (first_asleep(slab, mask, &seen)) {
        uint32_t asleep = WAITER_ASLEEP;
        if (!SHM_CAS_SEQ(futex, slab->waiters[seen.cell].futex, &asleep, WAITER_WOKEN))
            continue; /* another releaser woke it, for another slot; or it became patient */
        futex_wake(&slab->waiters[seen.cell].futex);
        if (SHM_LOAD_SEQ(futex, slab->waiter_words[seen.cell]) == seen.word)
            return; /* else it was leaving: the wake-up is for the next */
    }
}

void waiter_wake_all(struct slab *slab)
{
    for (uint32_t cell = 0; cell < slab->layout.max_waiters; cell++)
        if (SHM_LOAD_SEQ(queue, slab->waiter_words[cell]) != WAITER_FREE_WORD) {
            SHM_SWAP_SEQ(futex, slab->waiters[cell].futex, WAITER_WOKEN);
            futex_wake(&slab->waiters[cell].futex);
        }
}

/* Wake the waiter that `matched` an offer. If it had been woken for something else before, or has served itself meanwhile, there
 * is one wake-up too many in it: that one is passed on, because what it was for may lie free. */
static void wake_for_offer(struct slab *slab, uint32_t cell, uint64_t matched)
{
    bool had = SHM_SWAP_SEQ(futex, slab->waiters[cell].futex, WAITER_WOKEN) == WAITER_WOKEN;
    if (!had)
        futex_wake(&slab->waiters[cell].futex);
    if (had || SHM_LOAD_SEQ(offer, slab->waiter_words[cell]) != matched)
        waiter_wake_first(slab, WAITER_ANY_BUCKET);
}

enum waiter_offered waiter_offer(struct slab *slab, uint32_t slot, uint64_t *word, uint32_t mask, uint64_t now)
{
    struct slot_shm *row = &slab->slots[slot];
    uint32_t me = slot_owner(*word);
    struct waiter_seen seen;
    SHM_STORE(row, row->offered_ns, now); /* ours to write, the slot is still LEASED by us */
    while (waiter_first(slab, mask, &seen)) {
        uint32_t owner = waiter_owner(seen.word);
        uint64_t matched =
            waiter_word(waiter_ticket(seen.word), slot, owner, waiter_mask(seen.word), WAITER_MATCHED);
        if (!SHM_CAS_SEQ(offer, slab->waiter_words[seen.cell], &seen.word, matched))
            continue;
        if (!slot_move(row, word, owner, SLOT_OFFERED)) {
            wake(slab, seen.cell); /* it finds no offer and stands in the queue again by itself: the match may be another's by now */
            return WAITER_LOST;
        }
        if (SHM_LOAD_SEQ(offer, slab->waiter_words[seen.cell]) == matched) {
            wake_for_offer(slab, seen.cell, matched);
            return WAITER_OFFERED;
        }
        /* it has left: take the offer back, unless it or a thief was quicker */
        if (!slot_move(row, word, me, SLOT_LEASED)) {
            waiter_wake_first(slab, WAITER_ANY_BUCKET); /* the addressee may have had a wake-up for another slot */
            return WAITER_OFFERED;
        }
    }
    return WAITER_NOBODY;
}

uint32_t waiter_forget(struct slab *slab, uint32_t owner)
{
    uint32_t freed = 0;
    for (uint32_t cell = 0; cell < slab->layout.max_waiters; cell++) {
        uint64_t word = SHM_LOAD_SEQ(offer, slab->waiter_words[cell]);
        while (word != WAITER_FREE_WORD && waiter_owner(word) == owner)
            if (SHM_CAS_SEQ(offer, slab->waiter_words[cell], &word, WAITER_FREE_WORD)) {
                freed++, word = WAITER_FREE_WORD;
                wake(slab, cell); /* a process that leaves may have threads asleep there */
            }
    }
    return freed;
}
