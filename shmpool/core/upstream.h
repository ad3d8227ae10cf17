/* upstream.h: whether the server answers, as all processes together know it, so that a dead one is noticed once.
 *
 *   63            22 21   16 15     3 2     0
 *   +---------------+-------+--------+-------+
 *   | retry (42) ms | step 6| owner13| state |
 *   +---------------+-------+--------+-------+
 *
 *   UNPROVED  nothing is known: at the start, and after a connection was found closed. Until one dial has succeeded, another
 *             may begin only every UPSTREAM_GRACE_NS (`retry`): callers wait for the first instead of dialling in a herd.
 *   UP        a dial has succeeded: anyone may dial.
 *   DOWN      a dial has failed: nobody may dial before `retry`.
 *   PROBING   `owner` dials; nobody else may before `retry`, when it is taken for stopped.
 *
 *   from                to        function            who
 *   UNPROVED            UNPROVED  upstream_ask        who is let through: `retry` moves on (who cannot wait is always let through)
 *   DOWN, PROBING       PROBING   upstream_ask        the first to come after `retry`
 *   UNPROVED, UP        DOWN      upstream_failed     a dialler; step 1
 *   PROBING (its own)   DOWN      upstream_failed     the prober; next step
 *   any                 UP        upstream_proved     a dialler
 *   PROBING (its own)   DOWN      upstream_untried    the prober, whose dial said nothing (interrupted); upstream_forget: recovery
 *   UP                  UNPROVED  upstream_suspect    who found a connection closed by the server
 *   UP, UNPROVED        UNPROVED  upstream_doubt      a dialler that ran out of time before the server answered; `step` 1 says so
 *   PROBING (its own)   DOWN      upstream_doubt      the prober, likewise
 *
 * A dial that is cut short proves nothing, and callers with little time could go on with such dials for ever. So a dial that follows on one, or that
 * is a probe, is not cut short (upstream_wants_verdict): a thread of its own brings it to its end while the caller waits (dial_apart() in module.c).
 *
 * A step is the time from a failure to the next probe: backoff_first, twice that, ... backoff_last, each less a quarter at random, so
 * that hosts do not probe in step. Failures of dials that began before the last change of state are not counted twice.
 *
 * Invariant: from one failure to the end of its step at most one dial begins over all processes.
 * ORDER(upstream): seq_cst CAS. The word stands for itself; who is let through goes on to claim a slot, which orders the rest. Weaker
 * would do for safety; success must be seen by a waiter that looks after it was woken for it (ORDER(queue)).
 *
 * Source: the circuit breaker of M. Nygard, "Release It!"; one word for all processes is our own. Not here: dialling (pool.py), waiting.
 */
#ifndef SHMPOOL_UPSTREAM_H
#define SHMPOOL_UPSTREAM_H

#include "slab.h"

enum upstream_state { UPSTREAM_INVALID = 0, UPSTREAM_UNPROVED = 1, UPSTREAM_UP = 2, UPSTREAM_DOWN = 3, UPSTREAM_PROBING = 4 };
enum { UPSTREAM_STATE_MASK = 7, UPSTREAM_OWNER_SHIFT = 3, UPSTREAM_STEP_SHIFT = 16, UPSTREAM_STEP_MAX = 63, UPSTREAM_RETRY_SHIFT = 22 };

#define UPSTREAM_GRACE_NS UINT64_C(50000000)
#define UPSTREAM_NEAR_NS UINT64_C(100000000) /* a probe that is due so soon is worth waiting for, by who does not want to wait for the server */

/* "unproved", "up", ...; "invalid" for what is no state */
const char *upstream_state_name(enum upstream_state state);
static inline enum upstream_state upstream_state(uint64_t word) { return (enum upstream_state)(word & UPSTREAM_STATE_MASK); }
static inline uint32_t upstream_owner(uint64_t word) { return (uint32_t)(word >> UPSTREAM_OWNER_SHIFT) & ((1 << 13) - 1); }
static inline uint32_t upstream_step(uint64_t word) { return (uint32_t)(word >> UPSTREAM_STEP_SHIFT) & UPSTREAM_STEP_MAX; }
static inline uint64_t upstream_retry_ns(uint64_t word) { return (word >> UPSTREAM_RETRY_SHIFT) * 1000000; }
/* Has a dial failed, and none succeeded since? */
static inline bool upstream_is_down(uint64_t word) { return upstream_state(word) >= UPSTREAM_DOWN; }

struct upstream_backoff {
    uint64_t first_ns, last_ns;
    uint64_t patience_ns; /* longer than a dial lasts */
};

enum upstream_answer { UPSTREAM_GO, UPSTREAM_WAIT /* somebody is finding out */, UPSTREAM_NO /* it is down */ };

/* May `owner` dial at `now`? On GO *seen is what the end of the dial is told to: one of failed, proved, untried. `waits`: it can wait for
 * others to find out. */
enum upstream_answer upstream_ask(struct slab *slab, uint32_t owner, bool waits, uint64_t now, const struct upstream_backoff *backoff,
                                  uint64_t *seen);
/* Nanoseconds until the next dial may begin; 0: now, or nobody is kept from it. */
uint64_t upstream_left(struct slab *slab, uint64_t now);
/* The dial failed. `random`: any number. True when this is news: it was not known to be down. */
bool upstream_failed(struct slab *slab, uint64_t seen, uint64_t now, const struct upstream_backoff *backoff, uint32_t random,
                     const char *text);
/* The dial succeeded; all waiters are woken when that was not known. True when the server was known to be down. */
bool upstream_proved(struct slab *slab);
/* The dial said nothing. */
void upstream_untried(struct slab *slab, uint64_t seen, uint64_t now);
/* The time of the dial's caller was over before the server answered. */
void upstream_doubt(struct slab *slab, uint64_t seen, uint64_t now);
/* Must the dial that was let through with `seen` come to an end of its own? */
static inline bool upstream_wants_verdict(uint64_t seen)
{
    return upstream_state(seen) == UPSTREAM_PROBING || (upstream_state(seen) == UPSTREAM_UNPROVED && upstream_step(seen));
}
/* A connection was found closed by the server. */
void upstream_suspect(struct slab *slab);
/* Recovery: `dead` does not probe any more. */
void upstream_forget(struct slab *slab, uint32_t dead, uint64_t now);
/* The text of the last failure; SHM_ERROR_BYTES of room. A hint: it may be torn when two fail at once. */
void upstream_error(struct slab *slab, char *text);

#endif
