/* service.h: a pool that accepts connections: the listening socket, and client connections that are watched until they speak.
 *
 * All members share the listening socket and one epoll instance. Both are letters, in the mailboxes of the two last slots, which stay EMPTY
 * for ever (they are beyond every cap): the creator deposits them, who joins peeks, who is forked inherits. A registration in the
 * epoll belongs to (file, descriptor number) and says slot and connection; it is EPOLLONESHOT: it is armed, and when the client speaks (or
 * closes) exactly one waiter of all processes gets one event, and the registration is disarmed. It goes when the last copy of the file does.
 *
 *                accept                release, then arm
 *      client ----------> LEASED --------------------------> IDLE, armed
 *                            ^                                   | the client speaks: the event disarms, and one waiter gets it
 *                            |      CAS from that word           v
 *                            +---------------------------- IDLE, an event in somebody's hands
 *
 * Nothing in the slab says whether a registration is armed. The slot word stays the only truth, an event is a hint: who gets one
 * may have the connection if its CAS IDLE -> LEASED succeeds, and drops the event if not.
 *
 * Invariants:
 *  (1) A file is one connection for all its life, so every registration of it, by whatever number and however old, says the same slot and
 *      connection. An event of an older connection of the slot names another connection than the row and is dropped; late arming by one
 *      that was stopped in between arms either the same connection again or a dead one.
 *  (2) Who makes a slot IDLE arms *afterwards*. So an IDLE slot is armed, or its event is in the hands of a waiter that has not looked at
 *      the word since it became IDLE, or its releaser has not armed yet. Armed before: the event comes while the slot is LEASED, is dropped,
 *      and nobody hears the client again.
 *  (3) An event is dropped only when the slot is not IDLE (then whoever makes it IDLE arms), or has another connection, or the pool was paused
 *      meanwhile (then who drops it asks for a sweep: service_doubt).
 *  (4) Events may come twice (two processes have armed, each by a descriptor number of its own) or for nothing. So who has leased looks
 *      whether there is something to read (connection_check), and gives back a connection that is silent, which arms it again.
 *  (5) The listener is armed, or its event is in somebody's hands, or no slot is empty and `service_starved` says since when: then who empties
 *      a slot arms it. Its event is used up by an accept that succeeds or fails by a fault; one that finds nobody was somebody else's
 *      event too, and that one arms: so of several registrations of the listener all but one go to sleep.
 *
 * What the invariants cannot promise: a process that is killed or stopped between an event and its CAS, or between release and arming,
 * leaves a connection IDLE and disarmed (a kernel that refuses to arm does the same). So there is a sweep. It arms again what is idle, by the
 * letters, in pieces of 64 slots handed out by CAS: after a death, and when a pause met an event, a whole round at once (service_doubt), else a piece now and
 * then, only for connections that have something to read, and for at most 1 % of one core in all. Events go before pieces that are
 * merely due, but not for longer than a second. The listener needs none: who has waited in vain looks at it itself.
 *
 * A connection's last user is its IDLE word's owner, not its watcher: nobody is. A member that leaves takes nothing along.
 *
 * At the cap, clients wait at the listener. So that a few that keep their connections open do not keep all others out, one that has been silent
 * for SERVICE_PATIENCE_NS makes room for one that waits: the one that has been silent longest. When all are more talkative than that, every
 * SERVICE_PATIENCE_NS one does all the same.
 *
 * ORDER(service): seq_cst. Who finds no slot empty sets `service_starved` and then looks at the slots once more; who empties a slot makes it
 *   EMPTY and then looks at `service_starved`. Weaker: both look too early, and clients wait at a listener that nobody watches (20 ms, until
 *   somebody's wait ends).
 * ORDER(sweep): seq_cst CAS. Who wins it has that piece to itself; nothing is published by it.
 * ORDER(users): seq_cst, private. Who uses the descriptors counts itself and then reads them; who closes them takes them away and then waits for
 *   the count. Weaker: a thread waits at a number that is somebody else's by now. The count stands in the page that a fork wipes: threads of
 *   the parent are not in the child.
 *
 * TLS and other connections that one process alone can use (SHM_KIND_PRIVATE) serve one lease: no other process could hear them.
 *
 * Sources: EPOLLONESHOT and rearming: epoll(7); leaving a listener alone at the cap, and ending silent connections for new ones: nginx's
 * ngx_event_accept.c, ngx_drain_connections(). Not here: Python's acceptor, hooks, waiting for several slices (module.c), how connections end (pool.c).
 */
#ifndef SHMPOOL_SERVICE_H
#define SHMPOOL_SERVICE_H

#include "pool.h"

enum {
    SERVICE_RESERVED = 2,      /* slots that a listening pool has beside those for connections */
    SERVICE_LETTER = 1,        /* the connection that the letters in their mailboxes name */
    SERVICE_PIECE_SLOTS = 64,  /* of the sweep */
    SERVICE_SLICE_MS = 20,     /* nobody waits longer without a look at the pool's state */
};
#define SERVICE_ROUND_NS UINT64_C(200000000) /* of the sweep, at least, when nobody died */
#define SERVICE_SWEEP_SHARE 100              /* a piece that took t is followed by that times t of rest */
#define SERVICE_FRESH_NS UINT64_C(50000000)  /* released since: not swept, unless somebody died */
#define SERVICE_PATIENCE_NS UINT64_C(1000000000) /* of clients who wait for a slot */
#define SERVICE_LATE_NS UINT64_C(1000000000) /* a piece that is due for that long goes before events */

struct service {
    _Atomic(int) listener, epoll; /* -1: closed */
    uint64_t listener_inode;      /* the program may have closed it behind our back, and use the number again */
};

/* ---- the descriptors ---- */

/* The creator, before publication: watch `listener` (made non-blocking, ours from now on). 0; or errno, and nothing has changed. */
int service_create(struct pool *pool, int listener);
/* A member that did not inherit: peek at the letters. 0 or errno (ENOENT: there are none). */
int service_open(struct pool *pool);
/* Close this process's descriptors, when no thread of it waits there any more. */
void service_close(struct pool *pool);
/* The pool was closed: refuse new clients from now on, for all processes. */
void service_shut(struct pool *pool);

/* ---- waiting ---- */

enum service_found {
    SERVICE_SPOKE,   /* a connection that was idle is ours (LEASED): connection_check() tells what it has to say */
    SERVICE_CLIENT,  /* perhaps a new client, and an empty slot is ours (DIALING): service_accept(), or service_give_up() */
    SERVICE_CROWDED, /* a client waits for a slot: one that has been silent for long is ours (LEASED); end it, unless it has something to say now */
    SERVICE_AGAIN,   /* an event, but of no use: wait again, also when there is no time left */
    SERVICE_NOTHING, /* the time or the slice is over, or a signal came */
    SERVICE_LOST,    /* the epoll is not what it was: this process has closed the pool's descriptors */
};
/* Wait for one event, at most `timeout_ns` and a slice. Blocks: call it without the GIL. */
enum service_found service_next(struct pool *pool, uint64_t timeout_ns, struct pool_claim *claim);
/* Take the connection that an event names: LEASED. False: it is not for us (any more). */
bool service_take(struct pool *pool, uint64_t event, struct pool_claim *claim);

/* ---- a client's connection ---- */

/* DIALING: accept a client, name its connection and put its letter into the mailbox (*mailed tells whether that went well). Its descriptor; or
 * -1 and errno, and the slot is given up. EAGAIN: nobody is there; see service_is_short() for the rest. */
int service_accept(struct pool *pool, struct pool_claim *claim, bool *mailed);
/* DIALING -> EMPTY: no client came of it, and nothing is in the mailbox. */
void service_give_up(struct pool *pool, struct pool_claim *claim);
/* A client was taken from the listener by other means than service_accept(), or the look at it failed: watch it again. */
void service_listen_on(struct pool *pool);
/* Does that errno of an accept mean that this process or machine has no room, rather than that a client has gone? */
bool service_is_short(int error);
/* LEASED -> IDLE, and watched: pool_release(), then service_watch(). `fd` is this process's descriptor of the connection. */
enum pool_released service_release(struct pool *pool, struct pool_claim *claim, uint64_t now_coarse, int fd);
/* The slot has become IDLE by us: hear it when it speaks. `connection` and `fd` are from when it was ours. 0 or errno: the sweep hears it. */
int service_watch(struct pool *pool, uint32_t slot, uint64_t connection, int fd);
/* The same, by the letter. */
void service_watch_letter(struct pool *pool, uint32_t slot);
/* Is there something to read that nobody has come to yet? Of an idle connection: it is not to end for being idle. */
bool service_has_spoken(struct pool *pool, uint32_t slot);

/* ---- for who changes slots elsewhere ---- */

/* A slot has become EMPTY, or the cap was raised. */
void service_slot_emptied(struct pool *pool);
/* Events may have been lost (a death, a pause): sweep a whole round now. */
void service_doubt(struct slab *slab);

#endif
