/* slab.h: the byte map of the shared segment, and how it is made, opened and checked.
 *
 *   +-----------------------------+ 0
 *   | header_shm          (8 KiB) |  what the slab is, then the words all processes change
 *   +-----------------------------+ SHM_HEADER_BYTES
 *   | totals_shm                  |  counters and histograms of rare events, of the whole pool
 *   +-----------------------------+ events_offset
 *   | event_shm   x 1024          |  128 bytes each: a ring of what happened last
 *   +-----------------------------+ workers_offset
 *   | worker_shm  x max_workers   |  16 KiB each: who registered, its counters, its histograms
 *   +-----------------------------+ waiters_offset
 *   | waiter words x max_waiters  |  packed: a releaser reads eight waiters with one cache line
 *   | waiter cells x max_waiters  |  64 bytes each: futex and time
 *   +-----------------------------+ bitmaps_offset
 *   | free-lists: 6 bitmaps       |  one per bucket, one of empty slots (hints)
 *   +-----------------------------+ slots_offset
 *   | slot_shm    x max_slots     |  128 bytes each: the hot line, the cold line
 *   +-----------------------------+ total_size
 *
 * Who writes what: see the comment at each field. Fields of type a64_shm / a32_shm change while the pool lives; plain
 * fields are written once, before the slab is published, and never again.
 *
 * Invariants: (1) offsets and sizes follow from the three capacities alone: slab_layout() computes them, slab_check()
 * recomputes and compares, nothing else is believed. (2) A zeroed slab is damaged, not free: magic, slot states and
 * waiter states are never 0. (3) There are no pointers in the slab.
 *
 * Models: SQLite's wal.c and LMDB's mdb.c for a layout that is a contract. Not here: any change of a word (slot.h ...).
 */
#ifndef SHMPOOL_SLAB_H
#define SHMPOOL_SLAB_H

#include <stddef.h>

#include "atomics.h"

enum {
    SHM_MAX_SLOTS = 100000,
    SHM_MAX_WORKERS = 4096,
    SHM_WAITER_GROUP = 64,                      /* waiters that share a bit of the summary */
    SHM_MAX_WAITERS = 62 * SHM_WAITER_GROUP,    /* the summary's upper two bits are the pool's state */
    SHM_BUCKETS = 5,                            /* enum bucket */
    SHM_BITMAPS = SHM_BUCKETS + 1,              /* and the list of EMPTY slots */
    SHM_EMPTY_LIST = SHM_BUCKETS,
    SHM_HEADER_BYTES = 8192,
    SHM_NAME_BYTES = 72,
    SHM_TARGET_BYTES = 256,
    SHM_CONFIG_BYTES = 4096,
    SHM_RENDEZVOUS_BYTES = 512,
    SHM_ERROR_BYTES = 128,
    SHM_EVENTS = 1024,
    SHM_EVENT_TEXT = 64,
    SHM_EVENT_WORDS = 5 + SHM_EVENT_TEXT / 8,
    SHM_HIST_SUB_BITS = 5,                      /* 32 buckets per octave: a bucket is at most 3.1 % wide */
    SHM_HIST_FIRST_OCTAVE = 6,                  /* 64 ns */
    SHM_HIST_OCTAVES = 31,                      /* up to 137 s */
    SHM_HIST_BUCKETS = SHM_HIST_OCTAVES << SHM_HIST_SUB_BITS,
};

/* kinds of connection; the order is that of BUCKETS in shmpool/pool.py */
enum bucket { BUCKET_TCP4, BUCKET_TCP6, BUCKET_UDP4, BUCKET_UDP6, BUCKET_UNIX };
_Static_assert(BUCKET_UNIX + 1 == (int)SHM_BUCKETS, "each bucket has a free-list");

#define SHM_MAGIC UINT64_C(0x6c6f6f706d687301) /* "\x01shmpool" */
#define SHM_VERSION UINT32_C(7)
#define SHM_NO_WORKER UINT32_C(0) /* worker numbers in words are index + 1 */

/* ---- counters: one list yields the enum, the names, the Python side and the table in docs/design.md ---- */

/* of one worker (its own cache lines; cumulative for the index, whoever holds it) */
#define SHM_WORKER_COUNTERS(X)                                                                                         \
    X(hits, "leases served from the local cache")                                                                      \
    X(freelist, "leases served from the shared free-list")                                                             \
    X(steals, "leases taken out of another worker's cache by a scan")                                                  \
    X(dials, "leases served by a new connection")                                                                      \
    X(spoken, "leases of client connections that have spoken again (of a pool that listens)")                          \
    X(handovers, "leases served by a direct hand-over from a releaser")                                                \
    X(waits, "calls that entered the waiter queue")                                                                    \
    X(wait_ns, "nanoseconds spent in the waiter queue")                                                                \
    X(timeouts, "calls that ended with PoolTimeout")                                                                   \
    X(exhausted, "calls that ended with PoolExhausted")                                                                \
    X(refused, "calls that ended with PoolClosed")                                                                     \
    X(dial_errors, "calls that ended with DialError")                                                                  \
    X(interrupted, "calls ended by another exception (signal handler, hook)")                                          \
    X(mailbox_reads, "descriptors fetched from a mailbox")                                                             \
    X(bad_letters, "letters that were missing or did not fit")                                                         \
    X(checks, "liveness checks at lease")                                                                              \
    X(errors, "leases ended by an exception or discard()")

/* of the whole pool (rare events; any worker adds) */
#define SHM_TOTAL_COUNTERS(X)                                                                                          \
    X(dial_attempts, "dials begun")                                                                                    \
    X(lifetime_ns, "nanoseconds that ended connections were open, all together")                                       \
    X(dial_failures, "dials that failed")                                                                              \
    X(failed_deposits, "connections whose descriptor could not be put into the mailbox")                               \
    X(closed_broken, "retired: closed or reset by the peer")                                                           \
    X(closed_dirty, "retired: unread bytes, or the holder's socket could not be put back")                             \
    X(closed_error, "retired: the lease ended with an exception or discard()")                                         \
    X(closed_leaked, "retired: the lease was dropped without release")                                                 \
    X(closed_idle, "retired: idle too long, or more idle than max_idle_connections")                                   \
    X(closed_lifetime, "retired: too old")                                                                             \
    X(closed_refused, "retired: a hook refused it")                                                                    \
    X(closed_evicted, "retired: evict(), or its permit was needed for another kind")                                   \
    X(closed_letter, "retired: its descriptor could not be put into the mailbox, or fetched")                          \
    X(closed_owner_died, "retired: its holder died")                                                                   \
    X(closed_shutdown, "retired: the pool was closed or drained")                                                      \
    X(closed_unhealthy, "retired: its health check failed")                                                            \
    X(closed_resized, "retired: the pool was made smaller")                                                            \
    X(closed_revoked, "retired: its lease was out for too long")                                                       \
    X(recoveries, "dead workers swept")                                                                                \
    X(recovered_leases, "leases of dead workers taken back")                                                           \
    X(recovered_offers, "offers to dead or late waiters taken back")                                                   \
    X(recovered_waiters, "queue places of dead workers freed")                                                         \
    X(leaks, "leases dropped without release")                                                                         \
    X(overdue_leases, "leases reported as out for longer than leak_timeout")                                           \
    X(health_checks, "checks of idle connections in the background")                                                   \
    X(health_failures, "such checks that failed")                                                                      \
    X(late_refusals, "calls that ended with PoolClosed in a process that had given its part back")

#define SHM_COUNTER_ENUM_WORKER(name, text) SHM_W_##name,
#define SHM_COUNTER_ENUM_TOTAL(name, text) SHM_T_##name,
enum { SHM_WORKER_COUNTERS(SHM_COUNTER_ENUM_WORKER) SHM_W_COUNT };
enum { SHM_TOTAL_COUNTERS(SHM_COUNTER_ENUM_TOTAL) SHM_T_COUNT };

/* ---- the structs ---- */

struct hist_shm {
    a64_shm buckets[SHM_HIST_BUCKETS];
};

struct header_shm {
    /* what this is: written before publication, then never again; the magic last (ORDER(publish)) */
    a64_shm magic;
    uint32_t version;
    uint32_t format; /* slab_format(): sizes of everything below, so that a foreign build is refused */
    uint64_t total_size;
    uint8_t id[16]; /* random: a letter of another slab does not fit */
    uint64_t created_realtime_ns;
    uint32_t creator_uid;
    uint32_t creator_pid;
    uint32_t max_slots;
    uint32_t max_workers;
    uint32_t max_waiters;
    uint32_t listening; /* service.h: connections are accepted, not dialled */
    char name[SHM_NAME_BYTES];
    char target[SHM_TARGET_BYTES];
    char config[SHM_CONFIG_BYTES];
    char rendezvous[SHM_RENDEZVOUS_BYTES]; /* path of the socket where newcomers ask; empty: there is none */
    uint64_t listener_inode; /* which socket that is; 0: there is none */
    uint8_t padding_b[2792];

    /* what is steered, and what is noted for all; changed seldom, by anyone */
    _Alignas(64) a32_shm cap; /* slots below this index may open connections; ORDER(cap) in steering.h */
    a32_shm bound;            /* slots from this index on are EMPTY and have always been; never lowered; ORDER(cap) */
    a32_shm prewarm_created, prewarm_failed, prewarm_done;
    a32_shm service_starved;  /* service.h: milliseconds of the clock, never 0; 0: no client waits for a slot */
    a64_shm service_sweep;    /* service.h */
    a64_shm service_due_ns;   /* service.h */
    a64_shm maintained_ns;    /* when the maintainer last said that it is at work (hint) */
    a64_shm upstream;         /* upstream.h */
    a64_shm upstream_failures;
    a64_shm upstream_since_ns; /* when it went down (hint) */
    a64_shm upstream_error[SHM_ERROR_BYTES / 8]; /* the text of the last failure (hint) */

    /* read by every get() and release(): a bit for each group of waiters (waiter.h) and the pool's state in the upper two (steering.h); 0, which is
     * all that a warm call looks for: it is open and nobody waits */
    _Alignas(64) a64_shm summary;

    /* changed now and then, by anyone */
    _Alignas(64) a64_shm next_connection;  /* the id of the next connection */
    a64_shm next_ticket;                   /* the place of the next waiter */
    a64_shm recovery_checked_ns;           /* when somebody last looked for dead workers (hint) */
    a64_shm next_event;                    /* events.h */
    a32_shm listed;                        /* bit i: free-list i may have a bit (hint) */
    a32_shm padding_d;
};

/* who changes it and when: steering.h */
enum pool_state { SHM_POOL_OPEN, SHM_POOL_PAUSED, SHM_POOL_DRAINING, SHM_POOL_CLOSED };
#define SHM_STATE_SHIFT 62
#define SHM_STATE_MASK (UINT64_C(3) << SHM_STATE_SHIFT)

struct totals_shm {
    a64_shm counters[SHM_T_COUNT];
    uint8_t padding[256 - 8 * SHM_T_COUNT];
    struct hist_shm wait; /* time in the waiter queue */
    struct hist_shm dial; /* time of a dial */
};

/* one of the last events; events.h */
struct event_shm {
    a64_shm turn;
    a64_shm words[SHM_EVENT_WORDS];
    a64_shm sum;
    uint8_t padding[128 - 8 * (SHM_EVENT_WORDS + 2)];
};

/* the state of a row changes only under the OFD lock on the byte of its index (worker.h) */
enum worker_state { SHM_WORKER_FREE = 1, SHM_WORKER_ACTIVE = 2 };

struct worker_shm {
    a32_shm state;
    a32_shm pid;
    a64_shm started_ns;
    a64_shm generation; /* how often this index was given out */
    uint8_t padding_a[40];
    _Alignas(64) a64_shm counters[SHM_W_COUNT];
    uint8_t padding_b[512 - 64 - 8 * SHM_W_COUNT];
    struct hist_shm get; /* call of get() to its return */
    struct hist_shm use; /* lease to release */
};

/* the waiter's word (waiter.h) stands apart, packed; the cell is what it sleeps on */
struct waiter_shm {
    a32_shm futex; /* 1: woken; set to 0 by the waiter before it looks and sleeps */
    a32_shm tid;
    a64_shm since_ns; /* when it entered the queue */
    uint8_t padding[48];
};

struct slot_shm {
    /* the hot line: a warm get() and release() touch only this */
    a64_shm word;         /* slot.h; the only truth about the slot */
    a64_shm connection;   /* id of the connection, 0 when there is none; by the holder */
    a64_shm last_used_ns; /* release of the last lease; by the holder */
    a64_shm leased_ns;    /* start of the lease, 0 from its end to the begin of the next; by the holder */
    a64_shm uses;         /* leases of this connection; by the holder */
    a64_shm expires_ns;   /* end of its life, UINT64_MAX when none; by the dialler; SHM_EXPIRES_* by anyone */
    a32_shm kind;         /* bucket | flags; by the dialler; SHM_KIND_ENDING by anyone */
    a32_shm private_owner; /* worker number that alone can use it, or 0; by the dialler */
    a64_shm offered_ns;   /* start of the offer; by the holder */
    /* the cold line */
    a64_shm created_ns;          /* CLOCK_MONOTONIC; by the dialler */
    a64_shm created_realtime_ns; /* by the dialler */
    a64_shm peer[3];             /* address and port: slot_peer; by the dialler */
    uint64_t mailbox_inode;      /* which socket is this slot's mailbox; written before publication, then never again */
    a64_shm mark;                /* the word for which something was said: LEASED: it was reported as overdue; DIALING: nobody waits for it */
    a64_shm checked_ns;          /* the last check of an idle connection; by the dialler and the checker */
};

/* account.h: the connections that a slot has had */
struct account_shm {
    a64_shm lives;
    a64_shm ended[SHM_BUCKETS];
};

enum {
    SHM_KIND_PRIVATE = 1 << 8,  /* only private_owner can use it */
    SHM_KIND_UNMAILED = 1 << 9, /* no letter: ends at its release */
    SHM_KIND_ENDING = 1 << 10,  /* condemned by steering: ends at its release, or when somebody meets it idle */
    SHM_KIND_SHOWN = 1 << 11,   /* new, and with on_created: LEASED, but nobody has it on lease yet; for people it is being dialled */
    SHM_KIND_WANTED_SHIFT = 16, /* DIALING: the buckets that are wanted */
};
/* expires_ns of a connection that is ENDING: why (no clock shows these) */
enum { SHM_EXPIRES_EVICTED = 1, SHM_EXPIRES_RESIZED = 2 };

_Static_assert(offsetof(struct header_shm, summary) == SHM_HEADER_BYTES - 128, "the summary has a line of its own");
_Static_assert(offsetof(struct header_shm, cap) == SHM_HEADER_BYTES - 128 - 256, "what is steered has lines of its own");
_Static_assert(sizeof(struct header_shm) == SHM_HEADER_BYTES, "header");
_Static_assert(sizeof(struct totals_shm) == 256 + 2 * 8 * SHM_HIST_BUCKETS, "totals");
_Static_assert(sizeof(struct event_shm) == 128, "an event is two lines");
_Static_assert(offsetof(struct worker_shm, counters) == 64, "counters start a line");
_Static_assert(offsetof(struct worker_shm, get) == 512, "histograms start a line");
_Static_assert(sizeof(struct worker_shm) == 16384, "a worker costs 16 KiB");
_Static_assert(sizeof(struct waiter_shm) == 64, "a waiter has a line of its own");
_Static_assert(offsetof(struct slot_shm, created_ns) == 64, "hot and cold line");
_Static_assert(sizeof(struct slot_shm) == 128, "a slot is two lines");
_Static_assert(sizeof(struct account_shm) == 48, "an account");

/* ---- layout ---- */

struct slab_layout {
    uint32_t max_slots, max_workers, max_waiters;
    uint32_t bitmap_words; /* per bitmap */
    uint64_t totals_offset, events_offset, workers_offset, words_offset, waiters_offset, bitmaps_offset, slots_offset, accounts_offset,
        total_size;
};

/* The layout for these capacities; false when one is out of range (1..SHM_MAX_*). */
bool slab_layout(struct slab_layout *layout, uint64_t max_slots, uint64_t max_workers, uint64_t max_waiters);

/* A mapped slab: where things are in this process. Private; never in the slab itself. */
struct slab {
    struct header_shm *header;
    struct totals_shm *totals;
    struct event_shm *events;
    struct worker_shm *workers;
    a64_shm *waiter_words;
    struct waiter_shm *waiters;
    a64_shm *bitmaps;
    struct slot_shm *slots;
    struct account_shm *accounts;
    struct slab_layout layout;
};

struct slab_identity {
    const uint8_t *id;
    uint64_t created_realtime_ns;
    uint32_t uid, pid;
    const char *name, *target, *config, *rendezvous;
    uint32_t cap; /* 0: all slots */
};

enum slab_verdict { SLAB_OK, SLAB_TOO_SMALL, SLAB_NO_MAGIC, SLAB_FOREIGN_VERSION, SLAB_FOREIGN_FORMAT, SLAB_BAD_SIZES,
                    SLAB_BAD_TEXT };

/* Write a whole new slab into `size` zeroed bytes at `base` and open it. Only before publication. */
void slab_format_new(struct slab *slab, void *base, const struct slab_layout *layout, const struct slab_identity *who);
/* Check what stands at `base` and open it; writes nothing, so a read-only mapping will do. */
enum slab_verdict slab_open(struct slab *slab, void *base, uint64_t size);
const char *slab_verdict_text(enum slab_verdict verdict);
uint32_t slab_format(void);

#endif
