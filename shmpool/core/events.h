/* events.h: what happened to the pool: the last SHM_EVENTS events, noted by all processes, read by anyone.
 *
 * A ring of cells. Who notes an event draws a ticket; the cell is ticket % SHM_EVENTS.
 *
 *   cell.turn    2 x ticket + 1: being written      2 x ticket + 2: whole      0: never used
 *
 * A turn only grows, so a writer that was stopped for a whole round finds its cell taken and drops its event. And a cell proves itself: `sum` is
 * over the ticket and all words. A writer that dies in the middle, one that goes on in a cell that was taken from it, a reader that comes in the
 * middle: in each case the sum does not fit, and the event counts as lost. So no order between the words is needed, and nobody waits.
 * ORDER(event): relaxed for the ticket; acquire to read the turn, seq_cst to change it, so that a reader that sees a whole turn sees the words, but for
 * those of a writer that goes on in a cell that is not its own any more; the sum tells. Weaker would lose events, not mix them. ORDER(event_word): relaxed, see above.
 *
 * Invariant: what event_read() returns was noted as it stands, by one call of event_note().
 * Source: the sequence lock (as in Boehm, "Can seqlocks get along with programming language memory models?", 2012), with a sum in place of the
 * reader's second look, because a writer may die. Not here: texts for people (shmpool/events.py), the log of each process (pool.py).
 */
#ifndef SHMPOOL_EVENTS_H
#define SHMPOOL_EVENTS_H

#include "slab.h"

/* `reason` and `value` of each; names and order are those of shmpool/events.py */
#define SHM_EVENT_KINDS(X)                                                                                             \
    X(opened, "a connection was opened; value: nanoseconds the dial took, 0 when not known")                           \
    X(closed, "a connection ended; reason: SHM_T_closed_*; value: its age in nanoseconds") \
    X(discarded, "a holder said why its connection is not to be used again; text: its words")                         \
    X(dial_failed, "a dial failed; text: why")                                                                         \
    X(down, "the server was found down; text: why")                                                                    \
    X(up, "the server answers again; value: nanoseconds it was down")                                                  \
    X(overdue, "a lease is out for longer than leak_timeout; pid: its holder; value: nanoseconds")                     \
    X(taken_at, "where an overdue lease was taken, a frame each, innermost first; text: the frame")                    \
    X(died, "a process died and was recovered; pid: whose; value: slots taken back")                                   \
    X(joined, "a process takes part")                                                                                  \
    X(left, "a process has given its part back")                                                                       \
    X(state, "the pool was steered; reason: enum pool_state")                                                          \
    X(resized, "the cap was changed; value: what it is")                                                               \
    X(evicted, "connections were condemned by evict(); value: how many")

#define SHM_EVENT_ENUM(name, text) EVENT_##name,
enum event_kind { SHM_EVENT_KINDS(SHM_EVENT_ENUM) EVENT_KINDS };

#define EVENT_NO_SLOT UINT32_MAX

struct event {
    uint64_t time_ns; /* CLOCK_REALTIME; event_note() fills it in */
    uint64_t connection, value;
    uint32_t slot; /* EVENT_NO_SLOT: none */
    uint32_t pid;  /* 0: event_note() fills in the caller's */
    uint8_t kind, reason;
    char text[SHM_EVENT_TEXT]; /* ends with 0 */
};

/* Note an event: any thread of any process that has the slab writable. */
void event_note(struct slab *slab, struct event event);

/* The number of events that were ever begun. */
uint64_t event_count(const struct slab *slab);

enum event_found { EVENT_WHOLE, EVENT_LOST /* overwritten, or its writer died */, EVENT_BEGUN /* being written, or its writer died */ };
/* Event `number`, 0 the first of all. Works on a read-only mapping. */
enum event_found event_read(const struct slab *slab, uint64_t number, struct event *event);

#endif
