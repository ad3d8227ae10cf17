/* slot.h: the slot word, the only truth about a connection's permit.
 *
 *   63                      17 16        4 3     0
 *   +--------------------------+-----------+-------+
 *   | sequence (47 bits)       | owner (13)| state |
 *   +--------------------------+-----------+-------+
 *
 * sequence: raised by every change. A lease remembers the word it was given; its release is a CAS from exactly that word,
 * so a double, late or foreign release fails and changes nothing. Wrap-around: a stale word could match again only after
 * 2^47 changes of one slot; at 20 million changes a second that is 81 days during which one lease is held stale.
 * owner: worker index + 1, or 0. Who may act on the slot; for IDLE, in whose local cache it is (a hint).
 *
 *            dial               install            release
 *   EMPTY ----------> DIALING ----------> LEASED <----------> IDLE <------> CHECKING
 *     ^                  |                 | ^      take        ^    check      |
 *     |   dial failed    |       hand over | | claim            |               |
 *     |<-----------------+                 v |     taken back   |               |
 *     |                                  OFFERED ---------------+               |
 *     |      closed                                                             |
 *     +---------------- RETIRING <---- condemned: every state but EMPTY --------+
 *
 *   from      to        function       who                           meaning
 *   EMPTY     DIALING   slot_move      anyone                        takes the permit to open a connection
 *   DIALING   LEASED    slot_move      the dialler                   connection installed
 *   DIALING   EMPTY     slot_move      the dialler                   dial failed, nothing opened
 *   LEASED    IDLE      slot_move      the holder                    release
 *   LEASED    OFFERED   slot_move      the holder                    hand-over to a waiter of the new owner
 *   OFFERED   LEASED    slot_move      the addressee; after          claim
 *                                      OFFER_TTL anyone
 *   OFFERED   IDLE      slot_move      who offered it; the leaving   take back
 *                                      addressee; recovery
 *   IDLE      LEASED    slot_move      anyone                        take: cache, free-list, steal
 *   IDLE      CHECKING  slot_move      maintenance                   health check
 *   CHECKING  IDLE      slot_move      the checker                   healthy
 *   LEASED, CHECKING, DIALING, IDLE, OFFERED -> RETIRING             holder; recovery; anyone for IDLE, and for a LEASED one
 *                                                                    whose lease is revoked
 *   RETIRING  RETIRING  slot_move      recovery                      the closer died: its recoverer goes on
 *   RETIRING  EMPTY     slot_move      the closer                    closed; permit free
 *
 * What holds in each state: EMPTY: no letter in the mailbox, no open connection. DIALING, LEASED, CHECKING, RETIRING: only
 * a thread of the owner touches row and mailbox. IDLE: row and letter are whole. OFFERED: as IDLE.
 * The number of slots that are not EMPTY is the number of connections. The state 0 does not exist.
 *
 * ORDER(slot): seq_cst. Every change is a CAS here. Its release half publishes the row and the mailbox to the next holder,
 * its acquire half receives them; weaker would hand over a connection with the row of the one before. The total order is
 * needed against the waiter queue, for loads as well: see ORDER(queue) in waiter.h. A decision on a seen word is always
 * confirmed by a CAS from it.
 *
 * Source of the idea: HikariCP's ConcurrentBag (state per entry, CAS, hints beside it); sequence counters as in LMDB's
 * and iceoryx2's tables. Not here: which slot to take (pool.c), the queue (waiter.c).
 */
#ifndef SHMPOOL_SLOT_H
#define SHMPOOL_SLOT_H

#include "slab.h"

#define SHM_SLOT_STATES(X)                                                                                             \
    X(EMPTY, "empty")                                                                                                  \
    X(DIALING, "dialing")                                                                                              \
    X(LEASED, "leased")                                                                                                \
    X(IDLE, "idle")                                                                                                    \
    X(CHECKING, "checking")                                                                                            \
    X(RETIRING, "retiring")                                                                                            \
    X(OFFERED, "offered")

#define SHM_SLOT_STATE_ENUM(name, text) SLOT_##name,
enum slot_state { SLOT_INVALID = 0, SHM_SLOT_STATES(SHM_SLOT_STATE_ENUM) SLOT_STATE_COUNT };

#define SLOT_OWNER_SHIFT 4
#define SLOT_SEQUENCE_SHIFT 17
#define SLOT_OWNER_MASK ((1 << 13) - 1)
#define SLOT_STATE_MASK 15

_Static_assert((int)SHM_MAX_WORKERS <= SLOT_OWNER_MASK, "a worker number fits into the owner field");
_Static_assert((int)SLOT_STATE_COUNT <= SLOT_STATE_MASK, "a state fits into its field");

static inline uint64_t slot_word(uint64_t sequence, uint32_t owner, enum slot_state state)
{
    return sequence << SLOT_SEQUENCE_SHIFT | (uint64_t)owner << SLOT_OWNER_SHIFT | (uint64_t)state;
}
static inline enum slot_state slot_state(uint64_t word) { return (enum slot_state)(word & SLOT_STATE_MASK); }
static inline uint32_t slot_owner(uint64_t word) { return (uint32_t)(word >> SLOT_OWNER_SHIFT) & SLOT_OWNER_MASK; }
static inline uint64_t slot_sequence(uint64_t word) { return word >> SLOT_SEQUENCE_SHIFT; }
/* the word that follows `word`: next sequence, that owner, that state */
static inline uint64_t slot_next(uint64_t word, uint32_t owner, enum slot_state state)
{
    return slot_word(slot_sequence(word) + 1, owner, state);
}

/* Is this a change the table above allows? (owner changes are checked by the callers, in context) */
bool slot_may_move(enum slot_state from, enum slot_state to);
const char *slot_state_name(enum slot_state state);

static inline uint64_t slot_load(struct slot_shm *slot) { return SHM_LOAD_SEQ(slot, slot->word); }

/* Its state as people and statistics have it: a connection that on_created looks at is still being opened.
 * ORDER(shown): acquire. Pairs with the seq_cst that clears the flag when on_created has returned, after the begin of the lease was set (module.c): who
 * finds the flag gone finds that time. Weaker: the hook's time counts for leak_timeout, and a lease is revoked as it begins. */
static inline enum slot_state slot_shown_state(struct slot_shm *slot, uint64_t word)
{
    bool is_shown = slot_state(word) == SLOT_LEASED && SHM_LOAD_ACQUIRE(shown, slot->kind) & SHM_KIND_SHOWN;
    return is_shown ? SLOT_DIALING : slot_state(word);
}

/* The one way to change a slot: from exactly `*word`. On success *word is the new word; else it is untouched. */
static inline bool slot_move(struct slot_shm *slot, uint64_t *word, uint32_t owner, enum slot_state state)
{
    uint64_t expected = *word;
    uint64_t next = slot_next(expected, owner, state);
#ifndef NDEBUG
    if (!slot_may_move(slot_state(expected), state))
        __builtin_trap();
#endif
    if (!SHM_CAS_SEQ(slot, slot->word, &expected, next))
        return false;
    *word = next;
    return true;
}

#endif
