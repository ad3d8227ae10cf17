/* waiter.h: the queue of those who wait for a connection, and the direct hand-over to the first of them.
 *
 * A waiter is a word (packed, eight to a cache line) and a cell (a line of its own with the futex it sleeps on):
 *
 *   63        37 36     20 19     7 6    2 1     0
 *   +-----------+---------+--------+------+-------+
 *   | ticket 27 | slot 17 | owner13| mask5| state |   state: FREE = 1, WAITING = 2, MATCHED = 3; 0 is damage
 *   +-----------+---------+--------+------+-------+
 *
 *   from      to        function          who
 *   FREE      WAITING   waiter_enter      a thread that found nothing; ticket = its place
 *   WAITING   MATCHED   waiter_offer      a releaser that will offer `slot` to it
 *   MATCHED   WAITING   waiter_rematch    the waiter, when a look finds no offer: it is not made yet, was taken, or will never come
 *   any       FREE      waiter_leave      the waiter: served, timed out, interrupted
 *   any       FREE      waiter_forget     recovery of a dead owner
 *
 * The slot word stays the only truth: MATCHED is a promise, OFFERED (slot.h) is the deed. A waiter never sleeps MATCHED without an
 * offer: it stands in the queue again, and a releaser that comes late with the deed sees that and takes it back. An offer that is not claimed within OFFER_TTL may be claimed by anyone, so a
 * stopped or dead addressee costs the others no more than that.
 *
 * Wake-ups without a hand-over: as long as the first waiter has waited less than HANDOVER_AFTER, a released slot stays
 * free for all and the waiter is only woken (waiter_wake_first): a running process may take it first, and no connection lies idle
 * for the 20 microseconds that a wake-up takes. From HANDOVER_AFTER on the slot is offered to it and nobody else can take it.
 *
 * A waiter that was woken and found nothing becomes patient: it is not woken again but for an offer, and sleeps until twice
 * HANDOVER_AFTER at most. Else each release would wake somebody in vain while running processes take and return connections
 * faster than anyone wakes up. So a wait costs at most one vain wake-up, and a slot that comes free meanwhile and is not taken by a
 * running process lies idle for at most that long. (Twice: where others release, the offer comes before it looks by itself.)
 *
 * A summary word in the header has a bit for each group of 64 waiters: 0 means that nobody waits, and is all that a warm
 * get() or release() reads of this file. It is a hint: set by each waiter before it looks for the last time, and again at every
 * slice; cleared by whoever finds a group empty.
 *
 * Invariant (no lost wake-up): a waiter publishes its word and summary bit and *then* looks at the slots; a releaser publishes
 * the slot and *then* looks at the summary. ORDER(queue): seq_cst on both sides, together with ORDER(slot): with anything weaker
 * both may look before either has published, and the waiter sleeps beside a free slot. All the same no sleep is longer
 * than a slice: a wake-up can die with the process it was meant for.
 * ORDER(offer): seq_cst. The releaser moves the slot to OFFERED and then reads the waiter's word; the leaving waiter frees its
 * word and then reads the slot: one of them sees the other and takes the offer back. Weaker: an offer that nobody knows of.
 * ORDER(futex): seq_cst. The waiter clears the futex and then looks; the waker publishes and then sets it. A waiter that leaves
 * frees its word and then reads the futex, the waker sets the futex and then reads the word again: a wake-up that came too late
 * for a leaver is passed on by one of the two. Weaker: it dies with the leaver, and the next sleeps a slice beside a free slot.
 *
 * Wrap-around of tickets (2^27 waits): the order is compared modulo 2^27; an exact repetition of a word names the same cell and
 * owner in the state WAITING, so a late CAS matches a waiter that does wait.
 */
#ifndef SHMPOOL_WAITER_H
#define SHMPOOL_WAITER_H

#include "slot.h"

enum waiter_state { WAITER_INVALID = 0, WAITER_FREE = 1, WAITER_WAITING = 2, WAITER_MATCHED = 3 };
enum {
    WAITER_STATE_MASK = 3,
    WAITER_MASK_SHIFT = 2,
    WAITER_OWNER_SHIFT = 7,
    WAITER_SLOT_SHIFT = 20,
    WAITER_TICKET_SHIFT = 37,
    WAITER_ANY_BUCKET = (1 << SHM_BUCKETS) - 1,
};
#define WAITER_FREE_WORD ((uint64_t)WAITER_FREE)
_Static_assert(SHM_MAX_SLOTS <= 1 << 17, "a slot index fits into the waiter's word");

#define WAITER_HANDOVER_AFTER_NS UINT64_C(450000) /* chosen by measurement: docs/design.md, "waiter" */
#define WAITER_OFFER_TTL_NS UINT64_C(25000000)
#define WAITER_SLICE_NS UINT64_C(20000000)

static inline enum waiter_state waiter_state(uint64_t word) { return (enum waiter_state)(word & WAITER_STATE_MASK); }
static inline uint32_t waiter_mask(uint64_t word) { return (uint32_t)(word >> WAITER_MASK_SHIFT) & WAITER_ANY_BUCKET; }
static inline uint32_t waiter_owner(uint64_t word) { return (uint32_t)(word >> WAITER_OWNER_SHIFT) & SLOT_OWNER_MASK; }
static inline uint32_t waiter_slot(uint64_t word) { return (uint32_t)(word >> WAITER_SLOT_SHIFT) & 0x1ffff; }
static inline uint32_t waiter_ticket(uint64_t word) { return (uint32_t)(word >> WAITER_TICKET_SHIFT); }
/* does ticket a stand before ticket b? */
static inline bool waiter_before(uint32_t a, uint32_t b) { return (int32_t)((a - b) << 5) < 0; }

/* what a waiter's futex says */
enum waiter_futex { WAITER_ASLEEP = 0, WAITER_WOKEN = 1, WAITER_PATIENT = 2 /* asleep, to be woken for an offer only */ };

/* A waiter's own place in the queue; private, on the waiter's stack. */
struct waiter_place {
    bool queued;
    bool patient;
    bool dialling; /* a dial is under way for this caller (pool.h): it takes no empty slot */
    uint32_t cell;
    uint32_t owner, mask, ticket;
    uint64_t since_ns;
};

/* Another's place, as seen. */
struct waiter_seen {
    uint32_t cell;
    uint64_t word;
};

/* Join the queue behind all others; false when max_waiters wait already. */
bool waiter_enter(struct slab *slab, struct waiter_place *place, uint32_t owner, uint32_t mask, uint32_t tid, uint64_t now);
/* Leave it. Returns the slot that was promised meanwhile, or -1: the caller gives a slot OFFERED to it back. */
int64_t waiter_leave(struct slab *slab, struct waiter_place *place);
/* Before each look: clear the futex and repeat the summary bit. */
void waiter_prepare(struct slab *slab, struct waiter_place *place);
/* The slot promised to this place, or -1. */
int64_t waiter_promised(struct slab *slab, struct waiter_place *place);
/* A look found no offer: stand in the queue again, at the same place. Returns the slot that was promised, or -1: the offer may
 * have come this moment, and the caller gives it back like a leaver. */
int64_t waiter_rematch(struct slab *slab, struct waiter_place *place);
/* The last look, after a wake-up, found nothing: be patient. False: woken again meanwhile, look again. */
bool waiter_be_patient(struct slab *slab, struct waiter_place *place);
/* Sleep until woken, a signal, or for `timeout_ns`; any wake-up means: look again. True: it was a wake-up. */
bool waiter_sleep(struct slab *slab, struct waiter_place *place, uint64_t timeout_ns);

/* The first in the queue that is WAITING and accepts one of the buckets in `mask`. */
bool waiter_first(struct slab *slab, uint32_t mask, struct waiter_seen *seen);
uint64_t waiter_since(struct slab *slab, const struct waiter_seen *seen);
/* Wake the first fitting waiter that is neither woken already nor patient, without promising it anything. */
void waiter_wake_first(struct slab *slab, uint32_t mask);
void waiter_wake_all(struct slab *slab);

enum waiter_offered { WAITER_OFFERED, WAITER_NOBODY, WAITER_LOST };
/* Offer the slot, LEASED by us with `*word`, to the first fitting waiter. NOBODY: none fits, the slot is as before.
 * LOST: the slot is not ours any more. */
enum waiter_offered waiter_offer(struct slab *slab, uint32_t slot, uint64_t *word, uint32_t mask, uint64_t now);

/* Recovery: free the places of a dead owner; returns how many there were. */
uint32_t waiter_forget(struct slab *slab, uint32_t owner);

#endif
