/* service.c: see service.h. */
#include "service.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "connection.h"
#include "freelist.h"

/* ---- events ---- */

enum { EVENT_SLOT_BITS = 17, CLOSE_TRIES = 200 };
#define EVENT_SLOT_MASK ((UINT64_C(1) << EVENT_SLOT_BITS) - 1)
#define EVENT_OF_LISTENER UINT64_MAX
_Static_assert(SHM_MAX_SLOTS < EVENT_SLOT_MASK, "a slot index fits into an event, and is not the listener's");

/* What the registrations of a connection say: its slot and the low bits of its id. */
static uint64_t event_of(uint32_t slot, uint64_t connection) { return connection << EVENT_SLOT_BITS | slot; }

/* Arm the registration of `fd`, or make it. 0 or errno. */
static int arm(int epoll, int fd, uint64_t event)
{
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLRDHUP | EPOLLONESHOT, .data.u64 = event};
    assert(epoll >= 0);
    if (epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &wanted) == 0)
        return 0;
    if (errno == ENOENT && epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &wanted) == 0)
        return 0;
    if (errno == EEXIST && epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &wanted) == 0) /* another process was faster with the same number */
        return 0;
    return errno;
}

/* Is there something to read, or an end? `events`: which. */
static bool is_ready(int fd, short events)
{
    struct pollfd look = {.fd = fd, .events = events};
    return poll(&look, 1, 0) == 1 && look.revents & (events | POLLERR | POLLHUP);
}

/* ---- the descriptors ---- */

static uint32_t slots_for_connections(const struct slab *slab) { return slab->layout.max_slots - SERVICE_RESERVED; }
static uint32_t listener_slot(const struct slab *slab) { return slots_for_connections(slab); }
static uint32_t epoll_slot(const struct slab *slab) { return slots_for_connections(slab) + 1; }

static uint64_t inode_of(int fd)
{
    struct stat status;
    return fstat(fd, &status) == 0 ? (uint64_t)status.st_ino : 0;
}

/* Use the descriptors: the epoll, or -1 when they are closed. Paired with leave(), also then. */
static int enter(struct pool *pool, int *listener)
{
    SHM_ADD_SEQ(users, pool->fork->service_users, 1);
    *listener = atomic_load(&pool->service->listener);
    return atomic_load(&pool->service->epoll);
}

static void leave(struct pool *pool)
{
    uint32_t users = SHM_ADD_SEQ(users, pool->fork->service_users, UINT32_MAX);
    assert(users > 0);
    (void)users;
}

/* Keep the descriptors in the handle. 0; or errno, and both are the caller's. */
static int keep(struct pool *pool, int listener, int epoll)
{
    struct service *service = malloc(sizeof *service);
    assert(!pool->service && listener >= 0 && epoll >= 0);
    if (!service)
        return ENOMEM;
    atomic_init(&service->listener, listener);
    atomic_init(&service->epoll, epoll);
    service->listener_inode = inode_of(listener);
    pool->service = service;
    return 0;
}

static int deposit(struct pool *pool, uint32_t slot, int fd)
{
    assert(slot >= slots_for_connections(&pool->slab));
    return mailbox_deposit(pool->mailboxes[slot], pool->slab.header->id, slot, SERVICE_LETTER, fd, NULL, 0);
}

int service_create(struct pool *pool, int listener)
{
    assert(!pool->service && pool->slab.layout.max_slots > SERVICE_RESERVED);
    int flags = fcntl(listener, F_GETFL);
    if (flags < 0 || fcntl(listener, F_SETFL, flags | O_NONBLOCK) < 0)
        return errno;
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    int error = epoll < 0 ? errno : deposit(pool, listener_slot(&pool->slab), listener);
    if (!error)
        error = deposit(pool, epoll_slot(&pool->slab), epoll);
    if (!error)
        error = arm(epoll, listener, EVENT_OF_LISTENER);
    if (!error)
        error = keep(pool, listener, epoll);
    if (!error) {
        pool->slab.header->listening = 1;
        return 0;
    }
    mailbox_drain(pool->mailboxes[listener_slot(&pool->slab)]);
    mailbox_drain(pool->mailboxes[epoll_slot(&pool->slab)]);
    if (epoll >= 0)
        close(epoll);
    return error;
}

static int peek(struct pool *pool, uint32_t slot)
{
    struct letter letter;
    return mailbox_peek(pool->mailboxes[slot], pool->slab.header->id, slot, SERVICE_LETTER, &letter);
}

int service_open(struct pool *pool)
{
    if (pool->slab.layout.max_slots <= SERVICE_RESERVED || !pool->slab.header->listening)
        return ENOENT;
    assert(!pool->service);
    int listener = peek(pool, listener_slot(&pool->slab)), epoll = peek(pool, epoll_slot(&pool->slab));
    int error = listener == MAILBOX_NO_ROOM || epoll == MAILBOX_NO_ROOM ? EMFILE
                : listener < 0 || epoll < 0                             ? ENOENT
                                                                        : keep(pool, listener, epoll);
    if (error && listener >= 0)
        close(listener);
    if (error && epoll >= 0)
        close(epoll);
    return error;
}

void service_close(struct pool *pool)
{
    struct service *service = pool->service;
    int listener = service ? atomic_exchange(&service->listener, -1) : -1;
    if (listener < 0)
        return;
    int epoll = atomic_exchange(&service->epoll, -1);
    for (int tries = 0; tries < CLOSE_TRIES && SHM_LOAD_SEQ(users, pool->fork->service_users); tries++)
        usleep(500); /* a thread of ours waits there, for no longer than a slice */
    struct stat status;
    if (fstat(listener, &status) || status.st_ino != service->listener_inode)
        return; /* the program has closed both: the numbers may be its own by now */
    if (arm(epoll, listener, EVENT_OF_LISTENER) == 0) /* it is an epoll; harmless if it were the program's own */
        close(epoll);
    close(listener);
}

void service_shut(struct pool *pool)
{
    int listener = pool->service ? atomic_load(&pool->service->listener) : -1;
    if (listener >= 0 && inode_of(listener) == pool->service->listener_inode)
        shutdown(listener, SHUT_RDWR);
}

/* ---- the listener ---- */

void service_listen_on(struct pool *pool)
{
    int listener, epoll = enter(pool, &listener);
    if (epoll >= 0 && listener >= 0)
        arm(epoll, listener, EVENT_OF_LISTENER);
    leave(pool);
}

void service_slot_emptied(struct pool *pool)
{
    struct header_shm *header = pool->slab.header;
    if (SHM_LIKELY(!pool->service) || !SHM_LOAD_SEQ(service, header->service_starved))
        return;
    if (SHM_SWAP_SEQ(service, header->service_starved, 0))
        service_listen_on(pool);
}

static uint32_t starved_at(uint64_t now_ns) { return (uint32_t)(now_ns / 1000000) | 1; }

/* An empty slot for a client; without one the listener is left alone until there is. */
static bool take_room(struct pool *pool, struct pool_claim *claim)
{
    uint32_t nobody = 0;
    bool taken = pool_take_empty(pool, claim);
    if (!taken) {
        SHM_CAS_SEQ(service, pool->slab.header->service_starved, &nobody, starved_at(clock_coarse()));
        taken = pool_take_empty(pool, claim); /* if it was emptied just before, who did it has seen nothing */
    }
    if (taken)
        pool_announce_dial(pool, claim, WAITER_ANY_BUCKET, false); /* if we die before it is installed, it never was */
    return taken;
}

/* The idle connection that was used longest ago, its word and when that was; false: none is idle. */
static bool find_most_silent(struct pool *pool, uint32_t *slot, uint64_t *word, uint64_t *used_ns)
{
    *used_ns = UINT64_MAX;
    for (uint32_t i = 0; i < slots_for_connections(&pool->slab); i++) {
        uint64_t seen = slot_load(&pool->slab.slots[i]), used = SHM_LOAD(row, pool->slab.slots[i].last_used_ns);
        if (slot_state(seen) == SLOT_IDLE && used < *used_ns)
            *slot = i, *word = seen, *used_ns = used;
    }
    return *used_ns != UINT64_MAX;
}

/* A client waits, and no slot is empty: take the most silent connection, to end it, if it is time for that. */
static bool take_silent(struct pool *pool, struct pool_claim *claim)
{
    struct header_shm *header = pool->slab.header;
    uint32_t slot = 0, since = SHM_LOAD_SEQ(service, header->service_starved);
    uint64_t word = 0, used_ns, now = clock_coarse();
    if (!since || !find_most_silent(pool, &slot, &word, &used_ns))
        return false;
    bool is_silent = now > used_ns && now - used_ns >= SERVICE_PATIENCE_NS;
    bool is_patience_over = (uint32_t)(starved_at(now) - since) >= SERVICE_PATIENCE_NS / 1000000;
    if ((!is_silent && !is_patience_over) || !SHM_CAS_SEQ(service, header->service_starved, &since, starved_at(now)))
        return false; /* too early, or another has just done it */
    claim->source = SOURCE_SPOKE;
    return pool_lease_idle(pool, slot, WAITER_ANY_BUCKET, word, claim);
}

/* Perhaps a client is there. */
static enum service_found meet_client(struct pool *pool, struct pool_claim *claim, enum service_found otherwise)
{
    return take_room(pool, claim) ? SERVICE_CLIENT : take_silent(pool, claim) ? SERVICE_CROWDED : otherwise;
}

/* Clients have waited for a slot for long, and nobody had the time to look at them. */
static enum service_found meet_starved(struct pool *pool, int listener, struct pool_claim *claim)
{
    uint32_t since = SHM_LOAD(hint, pool->slab.header->service_starved);
    if (SHM_LIKELY(!since) || (uint32_t)(starved_at(clock_coarse()) - since) < SERVICE_PATIENCE_NS / 1000000)
        return SERVICE_NOTHING;
    if (is_ready(listener, POLLIN))
        return meet_client(pool, claim, SERVICE_NOTHING);
    service_slot_emptied(pool); /* they have gone: watch for others */
    return SERVICE_NOTHING;
}

void service_give_up(struct pool *pool, struct pool_claim *claim)
{
    assert(slot_state(claim->word) == SLOT_DIALING && claim->slot < slots_for_connections(&pool->slab));
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    SHM_STORE(row, row->connection, 0);
    SHM_STORE(row, row->kind, 0);
    if (!slot_move(row, &claim->word, SHM_NO_WORKER, SLOT_EMPTY))
        return;
    freelist_put(&pool->slab, SHM_EMPTY_LIST, claim->slot);
    service_slot_emptied(pool);
}

bool service_is_short(int error) { return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM; }

int service_accept(struct pool *pool, struct pool_claim *claim, bool *mailed)
{
    int listener, epoll = enter(pool, &listener), error = EBADF, fd = -1;
    assert(slot_state(claim->word) == SLOT_DIALING);
    if (epoll >= 0 && listener >= 0) {
        forks_hold(); /* a child made between the two would keep a connection open that nobody knows of */
        if ((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) < 0)
            error = errno;
        else {
            uint64_t id = pool_name_connection(pool, claim);
            *mailed = !mailbox_deposit(pool->mailboxes[claim->slot], pool->slab.header->id, claim->slot, id, fd, NULL, 0);
        }
        forks_release();
        if (fd >= 0 || (error != EAGAIN && error != EINVAL)) /* EINVAL: the pool is closed, see service_shut() */
            arm(epoll, listener, EVENT_OF_LISTENER);
    }
    leave(pool);
    if (fd < 0) {
        service_give_up(pool, claim);
        errno = error;
    }
    return fd;
}

/* ---- idle connections ---- */

bool service_take(struct pool *pool, uint64_t event, struct pool_claim *claim)
{
    uint64_t slot = event & EVENT_SLOT_MASK;
    if (slot >= slots_for_connections(&pool->slab))
        return false;
    struct slot_shm *row = &pool->slab.slots[slot];
    uint64_t word = slot_load(row);
    if (slot_state(word) != SLOT_IDLE || event_of((uint32_t)slot, SHM_LOAD(row, row->connection)) != event)
        return false; /* the id is loaded after the word: if the CAS from that succeeds, it was that of this idle connection */
    claim->source = SOURCE_SPOKE;
    return pool_lease_idle(pool, (uint32_t)slot, WAITER_ANY_BUCKET, word, claim);
}

int service_watch(struct pool *pool, uint32_t slot, uint64_t connection, int fd)
{
    assert(slot < slots_for_connections(&pool->slab));
    int listener, epoll = enter(pool, &listener), error = epoll < 0 ? EBADF : arm(epoll, fd, event_of(slot, connection));
    leave(pool);
    return error;
}

/* Arm an idle connection by its letter, which anyone may peek at: its head says whose it is. `always`: also when it has nothing to read. */
static void arm_by_letter(struct pool *pool, int epoll, uint32_t slot, bool always)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    struct letter letter;
    uint64_t word = slot_load(row), connection = SHM_LOAD(row, row->connection);
    assert(slot < slots_for_connections(&pool->slab));
    if (slot_state(word) != SLOT_IDLE)
        return;
    int fd = mailbox_peek(pool->mailboxes[slot], pool->slab.header->id, slot, connection, &letter);
    if (fd < 0)
        return;
    if (slot_load(row) == word && (always || is_ready(fd, POLLIN | POLLRDHUP)))
        arm(epoll, fd, event_of(slot, connection)); /* the registration stays when our copy goes */
    close(fd);
}

bool service_has_spoken(struct pool *pool, uint32_t slot)
{
    struct letter letter;
    uint64_t connection = SHM_LOAD(row, pool->slab.slots[slot].connection);
    int fd = mailbox_peek(pool->mailboxes[slot], pool->slab.header->id, slot, connection, &letter);
    if (fd < 0)
        return false;
    bool has = connection_check(fd) == CONNECTION_DIRTY;
    close(fd);
    return has;
}

void service_watch_letter(struct pool *pool, uint32_t slot)
{
    int listener, epoll = enter(pool, &listener);
    if (epoll >= 0)
        arm_by_letter(pool, epoll, slot, true);
    leave(pool);
}

enum pool_released service_release(struct pool *pool, struct pool_claim *claim, uint64_t now_coarse, int fd)
{
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    uint32_t slot = claim->slot;
    uint64_t connection = SHM_LOAD(row, row->connection);
    if (slot_load(row) != claim->word)
        return RELEASE_STALE;
    if ((SHM_LOAD(row, row->kind) & SHM_KIND_PRIVATE) || SHM_LOAD(row, row->expires_ns) <= now_coarse)
        return RELEASE_RETIRE;
    enum pool_released released = pool_release(pool, claim, now_coarse);
    if (released == RELEASED)
        service_watch(pool, slot, connection, fd); /* after it is IDLE: (2) */
    return released;
}

/* ---- the sweep ---- */

/* The word: pieces handed out, and the number below which they are urgent. */
static uint32_t sweep_handed(uint64_t word) { return (uint32_t)word; }
static uint32_t sweep_urgent(uint64_t word) { return (uint32_t)(word >> 32); }
static uint64_t sweep_word(uint32_t handed, uint32_t urgent) { return (uint64_t)urgent << 32 | handed; }
static bool sweep_is_urgent(uint64_t word) { return (int32_t)(sweep_urgent(word) - sweep_handed(word)) > 0; }

static uint32_t sweep_pieces(const struct slab *slab)
{
    return (slots_for_connections(slab) + SERVICE_PIECE_SLOTS - 1) / SERVICE_PIECE_SLOTS;
}

void service_doubt(struct slab *slab)
{
    if (!slab->header->listening || slab->layout.max_slots <= SERVICE_RESERVED)
        return;
    uint64_t word = SHM_LOAD_SEQ(sweep, slab->header->service_sweep), next;
    do
        next = sweep_word(sweep_handed(word), sweep_handed(word) + sweep_pieces(slab));
    while (!SHM_CAS_SEQ(sweep, slab->header->service_sweep, &word, next));
}

enum sweep_due { SWEEP_NOT, SWEEP_WHEN_QUIET, SWEEP_NOW };

static enum sweep_due sweep_due(struct pool *pool)
{
    struct header_shm *header = pool->slab.header;
    if (sweep_is_urgent(SHM_LOAD_SEQ(sweep, header->service_sweep)))
        return SWEEP_NOW;
    uint64_t now = clock_coarse(), due = SHM_LOAD(hint, header->service_due_ns);
    if (now < due)
        return due - now < 2 * SERVICE_LATE_NS ? SWEEP_NOT : SWEEP_NOW; /* nobody puts it off for longer than that: it is damaged */
    return now - due < SERVICE_LATE_NS ? SWEEP_WHEN_QUIET : SWEEP_NOW;
}

/* Sweep the next piece, unless another has just taken it. */
static void sweep(struct pool *pool, int epoll)
{
    struct header_shm *header = pool->slab.header;
    uint64_t begun = clock_now(), word = SHM_LOAD_SEQ(sweep, header->service_sweep);
    bool urgent = sweep_is_urgent(word);
    uint32_t count = slots_for_connections(&pool->slab), pieces = sweep_pieces(&pool->slab), handed = sweep_handed(word);
    if (!SHM_CAS_SEQ(sweep, header->service_sweep, &word, sweep_word(handed + 1, urgent ? sweep_urgent(word) : handed + 1)))
        return;
    SHM_STORE(hint, header->service_due_ns, begun + SERVICE_ROUND_NS / pieces);
    uint32_t first = handed % pieces * SERVICE_PIECE_SLOTS;
    for (uint32_t slot = first; slot < first + SERVICE_PIECE_SLOTS && slot < count; slot++)
        if (urgent || begun > SHM_LOAD(row, pool->slab.slots[slot].last_used_ns) + SERVICE_FRESH_NS)
            arm_by_letter(pool, epoll, slot, urgent);
    uint64_t now = clock_now(), rest = SERVICE_SWEEP_SHARE * (now - begun);
    if (rest > SERVICE_ROUND_NS / pieces) /* SERVICE_LATE_NS: we were stopped meanwhile */
        SHM_STORE(hint, header->service_due_ns, now + (rest < SERVICE_LATE_NS ? rest : SERVICE_LATE_NS));
}

/* ---- waiting ---- */

static int milliseconds(uint64_t timeout_ns)
{
    return timeout_ns >= SERVICE_SLICE_MS * UINT64_C(1000000) ? SERVICE_SLICE_MS : (int)((timeout_ns + 999999) / 1000000);
}

static enum service_found await_event(struct pool *pool, int epoll, int timeout_ms, struct pool_claim *claim)
{
    struct epoll_event event;
    int got = epoll_wait(epoll, &event, 1, timeout_ms);
    if (got < 0)
        return errno == EINTR ? SERVICE_NOTHING : SERVICE_LOST;
    if (!got)
        return SERVICE_NOTHING;
    if (!pool_is_plain(pool)) { /* paused meanwhile: nobody gets anything, and this event is needed afterwards */
        service_doubt(&pool->slab);
        return SERVICE_NOTHING;
    }
    if (event.data.u64 == EVENT_OF_LISTENER)
        return meet_client(pool, claim, SERVICE_AGAIN);
    return service_take(pool, event.data.u64, claim) ? SERVICE_SPOKE : SERVICE_AGAIN;
}

enum service_found service_next(struct pool *pool, uint64_t timeout_ns, struct pool_claim *claim)
{
    int listener, epoll = enter(pool, &listener), wait_ms = milliseconds(timeout_ns);
    enum service_found found = SERVICE_NOTHING;
    assert(pool->worker);
    if (epoll < 0 || listener < 0)
        goto out;
    if (pool_is_plain(pool) && (found = meet_starved(pool, listener, claim)) != SERVICE_NOTHING)
        goto out;
    enum sweep_due due = sweep_due(pool);
    if (due == SWEEP_WHEN_QUIET && (found = await_event(pool, epoll, 0, claim)) != SERVICE_NOTHING)
        goto out;
    if (due != SWEEP_NOT)
        sweep(pool, epoll);
    bool more = due == SWEEP_NOW && sweep_due(pool) == SWEEP_NOW;
    found = await_event(pool, epoll, more ? 0 : wait_ms, claim);
    if (found == SERVICE_NOTHING && pool_is_plain(pool)) {
        if (is_ready(listener, POLLIN)) /* whoever had its event has not come back */
            found = meet_client(pool, claim, found);
        if (found == SERVICE_NOTHING && more)
            found = SERVICE_AGAIN;
    }
out:
    leave(pool);
    return found;
}
