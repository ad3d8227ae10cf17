/* pool.c: the handle, the order of get() past the local cache, and the ends of connections. See pool.h. */
#include "pool.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "account.h"
#include "connection.h"
#include "events.h"
#include "freelist.h"
#include "recovery.h"
#include "service.h"

/* ---- the handle ---- */

static uint64_t inode_of(int fd)
{
    struct stat status;
    return fd >= 0 && fstat(fd, &status) == 0 ? (uint64_t)status.st_ino : 0;
}

static bool make_mailboxes(struct pool *pool, uint32_t count)
{
    pool->mailboxes = malloc(count * sizeof *pool->mailboxes);
    if (!pool->mailboxes)
        return false;
    pool->shared.count = count;
    for (uint32_t i = 0; i < count; i++)
        pool->mailboxes[i] = -1;
    for (uint32_t i = 0; i < count; i++) {
        if ((pool->mailboxes[i] = mailbox_new()) < 0)
            return false;
        pool->slab.slots[i].mailbox_inode = inode_of(pool->mailboxes[i]);
    }
    return true;
}

/* Are the slab's descriptor, the mailboxes and the listener what they should be? */
static bool descriptors_intact(struct pool *pool)
{
    if (!pool->slab_inode)
        return true;
    for (uint32_t i = 0; i < pool->slab.layout.max_slots; i++)
        if (inode_of(pool->mailboxes[i]) != pool->slab.slots[i].mailbox_inode)
            return false;
    if (pool->slab.header->listener_inode && inode_of(pool->shared.listener) != pool->slab.header->listener_inode)
        return false;
    return inode_of(pool->slab_fd) == pool->slab_inode;
}

static void begin_handle(struct pool *pool, int slab_fd, int listener, const struct pool_options *options)
{
    memset(pool, 0, sizeof *pool);
    pool->slab_fd = slab_fd;
    pool->slab_inode = inode_of(slab_fd);
    pool->shared.listener = listener;
    atomic_store(&pool->spare_fd, -1);
    pool->options = *options;
    pool->cache.size = options->local_cache_size;
    assert(pool->cache.size <= LOCAL_CACHE_MAX);
}

/* A mapping keeps its open file description, and with it every lock that is held through it: so it has one of its own. */
static void *map_anew(int slab_fd, uint64_t size)
{
    int map_fd = file_open_anew(slab_fd);
    void *base = map_fd < 0 ? MAP_FAILED : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, map_fd, 0);
    int error = errno;
    if (map_fd >= 0)
        close(map_fd);
    errno = error;
    return base;
}

/* What every handle needs beside the slab and the mailboxes; false: errno. */
static bool make_private(struct pool *pool)
{
    uint32_t count = pool->slab.layout.max_slots;
    pool->entries = calloc(count, sizeof *pool->entries);
    if (!pool->entries || !(pool->fork = fork_page_new()) || !(pool->seat = seat_take()))
        return false;
    for (uint32_t i = 0; i < count; i++)
        pool->entries[i].fd = -1;
    atomic_store(&pool->spare_fd, open("/dev/null", O_RDONLY | O_CLOEXEC));
    return true;
}

/* The handle is whole: take part. */
static enum pool_verdict begin_part(struct pool *pool)
{
    memcpy(pool->shared.slab_id, pool->slab.header->id, sizeof pool->shared.slab_id);
    pool->shared.slab = pool->slab_fd;
    pool->shared.mailboxes = pool->mailboxes;
    if (!family_join(pool->slab_fd) || (pool->shared.listener >= 0 && !(pool->door = rendezvous_take())))
        return POOL_ERRNO;
    enum pool_verdict verdict = pool_join(pool);
    if (verdict == POOL_OK && (errno = pool_answer(pool)) && errno != EAGAIN) /* no thread now: the next use tries again */
        return POOL_ERRNO;
    return verdict;
}

enum pool_verdict pool_create(struct pool *pool, int slab_fd, int listener, const struct slab_layout *layout,
                              const struct slab_identity *who, const struct pool_options *options)
{
    begin_handle(pool, slab_fd, listener, options);
    void *base = map_anew(slab_fd, layout->total_size);
    if (base == MAP_FAILED)
        return POOL_ERRNO;
    slab_format_new(&pool->slab, base, layout, who);
    pool->slab.header->listener_inode = inode_of(listener);
    return make_private(pool) && make_mailboxes(pool, layout->max_slots) ? begin_part(pool) : POOL_ERRNO;
}

/* The count first: descriptors_intact() believes it. */
static bool is_of_set(const struct slab *slab, const struct descriptors *set)
{
    return set->count == slab->layout.max_slots && memcmp(slab->header->id, set->slab_id, sizeof set->slab_id) == 0;
}

/* Map the slab of the set and see that all belongs together and to this user. */
static enum pool_verdict open_set(struct pool *pool, const struct descriptors *set, enum slab_verdict *why)
{
    struct stat status;
    *why = SLAB_TOO_SMALL;
    if (fstat(set->slab, &status) || status.st_uid != geteuid())
        return POOL_LOST_DESCRIPTORS;
    uint64_t size = (uint64_t)status.st_size;
    if (size < SHM_HEADER_BYTES)
        return POOL_BAD_SLAB;
    void *base = map_anew(set->slab, size);
    if (base == MAP_FAILED)
        return POOL_ERRNO;
    if ((*why = slab_open(&pool->slab, base, size)) != SLAB_OK) {
        munmap(base, size);
        pool->slab.header = NULL;
        return POOL_BAD_SLAB;
    }
    return is_of_set(&pool->slab, set) && descriptors_intact(pool) ? POOL_OK : POOL_LOST_DESCRIPTORS;
}

/* The listening socket of the service, of a pool that has one. */
static enum pool_verdict open_service(struct pool *pool)
{
    errno = pool->slab.header->listening ? service_open(pool) : 0;
    return !errno ? POOL_OK : errno == ENOENT ? POOL_LOST_DESCRIPTORS : POOL_ERRNO;
}

enum pool_verdict pool_attach(struct pool *pool, struct descriptors *set, const struct pool_options *options, enum slab_verdict *why)
{
    begin_handle(pool, set->slab, set->listener, options);
    pool->mailboxes = set->mailboxes;
    pool->shared.count = set->count;
    enum pool_verdict verdict = open_set(pool, set, why);
    if (verdict == POOL_OK) {
        verdict = make_private(pool) ? open_service(pool) : POOL_ERRNO;
        return verdict == POOL_OK ? begin_part(pool) : verdict;
    }
    int error = errno;
    pool->mailboxes = NULL;
    pool->slab_fd = pool->shared.listener = -1;
    descriptors_close(set);
    errno = error;
    return verdict;
}

int pool_answer(struct pool *pool)
{
    uint32_t phase = FORK_PARENT;
    if (!pool->door || !pool_is_open(pool))
        return 0; /* a closed pool has no newcomers */
    if (SHM_UNLIKELY(!pool_is_settled(pool)))
        SHM_CAS_SEQ(private, pool->fork->phase, &phase, FORK_READY);
    if (rendezvous_is_open(pool->door))
        return 0;
    return rendezvous_open(pool->door, &pool->shared, pool->fork);
}

int pool_listen(struct pool *pool, int listener)
{
    if (!pool->door && !(pool->door = rendezvous_take()))
        return ENOMEM;
    rendezvous_close(pool->door);
    int before = pool->shared.listener;
    pool->shared.listener = listener;
    int error = pool_answer(pool);
    if (error)
        pool->shared.listener = before;
    else if (before >= 0)
        close(before);
    return error;
}

void pool_release_descriptors(struct pool *pool)
{
    if (pool->door)
        rendezvous_close(pool->door);
    service_close(pool);
    bool ours = !pool->mailboxes || !pool->slab.slots || descriptors_intact(pool); /* else the program has closed them, and may use the numbers again */
    for (uint32_t i = 0; pool->mailboxes && i < pool->shared.count; i++) {
        if (pool->mailboxes[i] >= 0 && (ours || inode_of(pool->mailboxes[i]) == pool->slab.slots[i].mailbox_inode))
            close(pool->mailboxes[i]);
        pool->mailboxes[i] = -1;
    }
    if (pool->seat)
        pool->seat->slab_fd = -1;
    if (pool->slab_fd >= 0 && (ours || inode_of(pool->slab_fd) == pool->slab_inode))
        close(pool->slab_fd);
    pool->slab_fd = -1;
    if (pool->shared.listener >= 0 && (ours || inode_of(pool->shared.listener) == pool->slab.header->listener_inode))
        close(pool->shared.listener);
    pool->shared.listener = -1;
    struct stat status;
    int spare = atomic_exchange(&pool->spare_fd, -1);
    if (spare > 0 && (ours || (fstat(spare, &status) == 0 && S_ISCHR(status.st_mode))))
        close(spare);
}

void pool_free(struct pool *pool)
{
    int error = errno;
    pool_release_descriptors(pool);
    free(pool->mailboxes);
    free(pool->entries);
    free(pool->service);
    for (struct ended *note = pool_take_ended(pool), *next; note; note = next) {
        next = note->next;
        free(note);
    }
    if (pool->door)
        rendezvous_give_back(pool->door);
    if (pool->seat)
        seat_give_back(pool->seat);
    if (pool->fork)
        fork_page_free(pool->fork);
    if (pool->slab.header)
        munmap(pool->slab.header, pool->slab.layout.total_size);
    memset(pool, 0, sizeof *pool);
    pool->slab_fd = pool->shared.listener = -1;
    errno = error;
}

/* ---- registration ---- */

/* The lock of this index is ours: sweep what is left there and sit down. */
static void sit_down(struct pool *pool, uint32_t index)
{
    struct worker_shm *row = &pool->slab.workers[index];
    uint32_t dead = SHM_LOAD_ACQUIRE(worker, row->state) == SHM_WORKER_ACTIVE ? SHM_LOAD(hint, row->pid) : 0;
    pool->worker = index + 1;
    pool->row = row;
    SHM_STORE(hint, row->pid, pool->pid);
    SHM_STORE(hint, row->started_ns, clock_now());
    SHM_ADD(hint, row->generation, 1);
    SHM_STORE_RELEASE(worker, row->state, SHM_WORKER_ACTIVE); /* before the sweep: if we die in it, others go on with it */
    uint32_t freed = recovery_sweep(pool, pool->worker); /* also when the row is FREE: a thread of one that left may have come too late */
    if (dead)
        event_note(&pool->slab, (struct event){.kind = EVENT_died, .slot = EVENT_NO_SLOT, .pid = dead, .value = freed});
    event_note(&pool->slab, (struct event){.kind = EVENT_joined, .slot = EVENT_NO_SLOT});
}

/* First the indices given back, then those whose holders died. */
static bool find_place(struct pool *pool, int fd)
{
    for (int also_dead = 0; also_dead <= 1; also_dead++)
        for (uint32_t index = 0; index < pool->slab.layout.max_workers; index++) {
            bool is_free = SHM_LOAD_ACQUIRE(worker, pool->slab.workers[index].state) == SHM_WORKER_FREE;
            if ((!is_free && !also_dead) || !byte_lock(fd, index))
                continue;
            sit_down(pool, index);
            return true;
        }
    return false;
}

static enum pool_verdict register_anew(struct pool *pool)
{
    pool->generation++;
    pool->worker = SHM_NO_WORKER;
    pool->pid = (uint32_t)getpid();
    local_cache_clear(&pool->cache);
    atomic_store_explicit(&pool->recovering, false, memory_order_relaxed);
    if (!descriptors_intact(pool))
        return POOL_LOST_DESCRIPTORS;
    seat_close(pool->seat); /* a child made without libc's fork() still has its parent's, */
    if (pool->door)
        rendezvous_close(pool->door); /* and thinks that its parent's thread is its own */
    int error = seat_open(pool->seat, pool->slab_fd);
    if (error) {
        errno = error;
        return POOL_ERRNO;
    }
    int fd = atomic_load_explicit(&pool->seat->fd, memory_order_acquire);
    for (int tries = 0; tries < 50; tries++) { /* a free place may be locked by a recoverer for a moment */
        if (find_place(pool, fd))
            return POOL_OK;
        usleep(1000);
    }
    seat_close(pool->seat);
    return POOL_NO_WORKER;
}

enum pool_verdict pool_join(struct pool *pool)
{
    for (;;) {
        uint32_t phase = FORK_WIPED;
        if (SHM_CAS_SEQ(private, pool->fork->phase, &phase, FORK_CHANGING)) {
            enum pool_verdict verdict = register_anew(pool);
            SHM_STORE_RELEASE(private, pool->fork->phase, verdict == POOL_OK ? FORK_READY : FORK_WIPED);
            return verdict;
        }
        if (phase >= FORK_READY)
            return POOL_OK;
        sched_yield(); /* another thread of this process is registering */
    }
}

bool pool_holds_any(struct pool *pool)
{
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++) {
        uint64_t word = slot_load(&pool->slab.slots[slot]);
        if (slot_owner(word) == pool->worker && slot_state(word) != SLOT_IDLE && slot_state(word) != SLOT_EMPTY)
            return true;
    }
    return false;
}

void pool_leave(struct pool *pool)
{
    uint32_t phase = FORK_READY;
    if (pool->door)
        rendezvous_close(pool->door);
    while (!SHM_CAS_SEQ(private, pool->fork->phase, &phase, FORK_CHANGING))
        if (phase < FORK_READY)
            return; /* not registered, or a fork of one that was */
    while (atomic_exchange_explicit(&pool->recovering, true, memory_order_acquire))
        sched_yield(); /* a thread of ours sweeps with the seat that we are about to close */
    recovery_sweep_own(pool);
    for (int tries = 0; tries < 100 && pool_holds_any(pool); tries++)
        usleep(1000);
    if (!pool_holds_any(pool)) /* else the row stays ACTIVE, and whoever comes sweeps it */
        SHM_STORE_RELEASE(worker, pool->row->state, SHM_WORKER_FREE);
    event_note(&pool->slab, (struct event){.kind = EVENT_left, .slot = EVENT_NO_SLOT});
    pool->generation++;
    seat_close(pool->seat);
    atomic_store_explicit(&pool->recovering, false, memory_order_release);
    SHM_STORE_RELEASE(private, pool->fork->phase, FORK_WIPED);
}

/* ---- get ---- */

enum { UNENDED_JUST_NOW = UINT32_MAX >> 1 }; /* pool_empty() will say why */

enum { SAW_OFFER = 1, SAW_EMPTY = 2, SAW_OTHER = 4, SAW_DAMAGE = 8, SAW_LOST = 16 /* an idle slot was taken under our hands */,
       SAW_BUSY = 32, SAW_DIAL = 64 };

static bool claim_offer(struct pool *pool, uint32_t slot, uint64_t word, uint32_t mask, struct pool_claim *claim)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    if (!pool_fits(pool, row, SHM_LOAD(row, row->kind), mask) || !slot_move(row, &word, pool->worker, SLOT_LEASED))
        return false;
    *claim = (struct pool_claim){.slot = slot, .source = SOURCE_OFFER, .word = word};
    return true;
}

static bool take_promised(struct pool *pool, uint32_t mask, struct waiter_place *place, struct pool_claim *claim)
{
    int64_t slot = waiter_promised(&pool->slab, place);
    if (slot < 0)
        return false;
    uint64_t word = slot_load(&pool->slab.slots[slot]);
    return slot_state(word) == SLOT_OFFERED && slot_owner(word) == pool->worker &&
           claim_offer(pool, (uint32_t)slot, word, mask, claim);
}

static bool take_listed(struct pool *pool, uint32_t mask, struct pool_claim *claim)
{
    uint32_t start = pool->worker * 64 % pool->slab.layout.max_slots; /* workers search from different places */
    for (unsigned bucket = 0; bucket < SHM_BUCKETS; bucket++) {
        int64_t slot;
        while ((mask >> bucket & 1) && (slot = freelist_take(&pool->slab, bucket, start)) >= 0) {
            uint64_t word = slot_load(&pool->slab.slots[slot]);
            if (slot_state(word) == SLOT_IDLE && pool_lease_idle(pool, (uint32_t)slot, mask, word, claim)) {
                claim->source = SOURCE_FREELIST;
                return true;
            }
        }
    }
    return false;
}

static bool offer_expired(struct pool *pool, uint32_t slot, uint64_t now)
{
    uint64_t since = SHM_LOAD(row, pool->slab.slots[slot].offered_ns);
    return now > since && now - since > WAITER_OFFER_TTL_NS;
}

/* Look at every slot word; take the first that is idle and fits. *saw tells what else is there. */
static bool steal(struct pool *pool, uint32_t mask, struct pool_claim *claim, unsigned *saw)
{
    uint32_t count = steering_bound(&pool->slab), slot = pool->worker * 7 % count;
    for (uint32_t i = 0; i < count; i++, slot = slot + 1 < count ? slot + 1 : 0) {
        uint64_t word = slot_load(&pool->slab.slots[slot]);
        switch (slot_state(word)) {
        case SLOT_IDLE:
            if (pool_lease_idle(pool, slot, mask, word, claim)) {
                claim->source = SOURCE_STEAL;
                return true;
            }
            *saw |= slot_load(&pool->slab.slots[slot]) == word ? SAW_OTHER : SAW_LOST;
            break;
        case SLOT_OFFERED:
            *saw |= SAW_OFFER | SAW_BUSY;
            break;
        case SLOT_EMPTY:
            *saw |= SAW_EMPTY; /* beyond the cap it is no permit: steering_has_room() */
            break;
        case SLOT_DIALING:
            *saw |= SAW_DIAL | SAW_BUSY;
            break;
        case SLOT_LEASED:
        case SLOT_CHECKING:
            *saw |= SAW_BUSY;
            break;
        case SLOT_RETIRING:
            break;
        default:
            *saw |= SAW_DAMAGE;
        }
    }
    return false;
}

/* An offer that its addressee has not claimed in time belongs to whoever comes. */
static bool take_expired_offer(struct pool *pool, uint32_t mask, struct pool_claim *claim)
{
    uint64_t now = clock_now();
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++) {
        uint64_t word = slot_load(&pool->slab.slots[slot]);
        if (slot_state(word) == SLOT_OFFERED && offer_expired(pool, slot, now) &&
            claim_offer(pool, slot, word, mask, claim)) {
            pool_count_total(pool, SHM_T_recovered_offers, 1);
            return true;
        }
    }
    return false;
}

enum empty_taken { EMPTY_TAKEN, EMPTY_NOT /* not empty, or beyond the cap */, EMPTY_NO_PERMIT /* enough is open beyond the cap */ };

static enum empty_taken take_empty_slot(struct pool *pool, uint32_t slot, struct pool_claim *claim)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    uint64_t word = slot_load(row);
    if (slot_state(word) != SLOT_EMPTY || slot >= steering_cap(&pool->slab) || !slot_move(row, &word, pool->worker, SLOT_DIALING))
        return EMPTY_NOT;
    if (SHM_LIKELY(steering_has_permit(&pool->slab, slot))) {
        *claim = (struct pool_claim){.slot = slot, .source = SOURCE_DIAL, .word = word};
        return EMPTY_TAKEN;
    }
    if (slot_move(row, &word, SHM_NO_WORKER, SLOT_EMPTY))
        freelist_put(&pool->slab, SHM_EMPTY_LIST, slot);
    if (steering_has_room(&pool->slab)) /* two that came here at once have both stepped back */
        waiter_wake_first(&pool->slab, WAITER_ANY_BUCKET);
    return EMPTY_NO_PERMIT;
}

bool pool_take_empty(struct pool *pool, struct pool_claim *claim)
{
    int64_t listed;
    uint32_t bound = steering_bound(&pool->slab);
    enum empty_taken taken = EMPTY_NOT;
    while (taken == EMPTY_NOT && (listed = freelist_take(&pool->slab, SHM_EMPTY_LIST, 0)) >= 0)
        taken = take_empty_slot(pool, (uint32_t)listed, claim);
    for (uint32_t slot = 0; taken == EMPTY_NOT && slot < bound; slot++)
        taken = take_empty_slot(pool, slot, claim);
    return taken == EMPTY_TAKEN;
}

enum pool_taken pool_take_dial(struct pool *pool, bool waits, struct pool_claim *claim)
{
    uint64_t seen, now = clock_now();
    switch (upstream_ask(&pool->slab, pool->worker, waits, now, &pool->options.backoff, &seen)) {
    case UPSTREAM_GO:
        break;
    case UPSTREAM_WAIT:
        return TAKEN_NOTHING;
    case UPSTREAM_NO:
        return TAKEN_DOWN;
    }
    if (!pool_take_empty(pool, claim)) {
        upstream_untried(&pool->slab, seen, now);
        return TAKEN_NOTHING;
    }
    claim->upstream = seen;
    return TAKEN_DIAL;
}

/* A dial that nobody waits for becomes ours to wait for. */
static bool adopt_dial(struct pool *pool, uint32_t mask, struct pool_claim *claim)
{
    for (uint32_t slot = 0; slot < steering_bound(&pool->slab); slot++) {
        struct slot_shm *row = &pool->slab.slots[slot];
        uint64_t word = slot_load(row), marked = word;
        uint32_t wanted = SHM_LOAD(row, row->kind) >> SHM_KIND_WANTED_SHIFT;
        if (slot_state(word) != SLOT_DIALING || !wanted || (wanted & ~mask) || !SHM_CAS_SEQ(queue, row->mark, &marked, 0))
            continue;
        *claim = (struct pool_claim){.slot = slot, .source = SOURCE_DIAL, .word = word};
        return true;
    }
    return false;
}

void pool_announce_dial(struct pool *pool, const struct pool_claim *claim, uint32_t mask, bool orphan)
{
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    assert(mask && slot_state(claim->word) == SLOT_DIALING);
    SHM_STORE(row, row->kind, mask << SHM_KIND_WANTED_SHIFT);
    if (orphan)
        pool_orphan_dial(pool, claim);
}

void pool_orphan_dial(struct pool *pool, const struct pool_claim *claim)
{
    /* If the dial ends meanwhile, the mark is a word that this slot never has again. */
    if (slot_load(&pool->slab.slots[claim->slot]) == claim->word)
        SHM_STORE(hint, pool->slab.slots[claim->slot].mark, claim->word);
}

/* An idle connection that this get() cannot use, but whose permit it can. */
static bool take_other(struct pool *pool, uint32_t mask, struct pool_claim *claim)
{
    for (uint32_t slot = 0; slot < steering_bound(&pool->slab); slot++) {
        struct slot_shm *row = &pool->slab.slots[slot];
        uint64_t word = slot_load(row);
        uint32_t kind = SHM_LOAD(row, row->kind);
        if (slot_state(word) != SLOT_IDLE || pool_fits(pool, row, kind, mask) ||
            !slot_move(row, &word, pool->worker, SLOT_RETIRING))
            continue;
        *claim = (struct pool_claim){.slot = slot, .source = SOURCE_DIAL, .word = word};
        return true;
    }
    return false;
}

static enum pool_taken search(struct pool *pool, uint32_t mask, const struct waiter_place *place, struct pool_claim *claim, unsigned *saw)
{
    for (int tries = 0; tries < 4; tries++) {
        *saw = 0;
        if (steal(pool, mask, claim, saw))
            return TAKEN_LEASED;
        if (!(*saw & SAW_LOST))
            break; /* else who took it may have left another, passed before, to us */
    }
    if (*saw & SAW_DAMAGE)
        return TAKEN_DAMAGED;
    if ((*saw & SAW_OFFER) && take_expired_offer(pool, mask, claim))
        return TAKEN_LEASED;
    if (place && place->dialling)
        return TAKEN_NOTHING;
    if (place && (*saw & SAW_DIAL) && adopt_dial(pool, mask, claim))
        return TAKEN_ADOPTED;
    enum pool_taken taken = *saw & SAW_EMPTY ? pool_take_dial(pool, place != NULL, claim) : TAKEN_NOTHING;
    if (taken == TAKEN_DIAL)
        claim->alone = !(*saw & SAW_BUSY);
    if (taken == TAKEN_DOWN && place && (*saw & SAW_BUSY))
        return TAKEN_NOTHING; /* something may be returned */
    return taken;
}

/* May this caller have something in the state that the pool is in? */
static enum pool_taken admit(struct pool *pool, const struct waiter_place *place)
{
    switch (steering_now(&pool->slab)) {
    case SHM_POOL_OPEN:
        return TAKEN_LEASED;
    case SHM_POOL_PAUSED:
        return TAKEN_PAUSED;
    case SHM_POOL_DRAINING:
        return place && place->queued ? TAKEN_LEASED : TAKEN_DRAINING;
    case SHM_POOL_CLOSED:
        break;
    }
    return TAKEN_CLOSED;
}

enum pool_taken pool_take(struct pool *pool, uint32_t mask, struct waiter_place *place, struct pool_claim *claim)
{
    unsigned saw;
    assert(mask && mask <= WAITER_ANY_BUCKET);
    if (!pool_is_plain(pool)) {
        enum pool_taken refused = admit(pool, place);
        if (refused != TAKEN_LEASED)
            return refused;
    }
    if ((place && place->queued && take_promised(pool, mask, place, claim)) || pool_take_cached(pool, mask, claim) ||
        take_listed(pool, mask, claim))
        return TAKEN_LEASED;
    enum pool_taken taken = search(pool, mask, place, claim, &saw);
    if ((taken == TAKEN_NOTHING || taken == TAKEN_DOWN) && recovery_is_due(pool))
        return TAKEN_RECOVER;
    bool has_room = (saw & SAW_EMPTY) && steering_has_room(&pool->slab);
    if (taken == TAKEN_NOTHING && (saw & SAW_OTHER) && !has_room && take_other(pool, mask, claim))
        return TAKEN_EVICTED;
    return taken;
}

enum pool_condition pool_check(struct pool *pool, uint32_t slot, int fd)
{
    uint32_t kind = SHM_LOAD(row, pool->slab.slots[slot].kind);
    bool datagrams = bucket_is_udp(kind_bucket(kind));
    pool_count(pool, SHM_W_checks, 1);
    enum connection_health health;
    if (datagrams && pool->options.clear_udp_buffer)
        health = connection_clear(fd, pool->options.udp_clear_max_packets, pool->options.udp_clear_timeout_ns);
    else
        health = connection_check(fd);
    if (health == CONNECTION_DIRTY && ((kind & SHM_KIND_PRIVATE) || (datagrams && !pool->options.clear_udp_buffer)))
        health = CONNECTION_GOOD; /* TLS has records of its own (session tickets); datagrams were wanted */
    return health == CONNECTION_GOOD ? CONDITION_GOOD : health == CONNECTION_DIRTY ? CONDITION_DIRTY : CONDITION_BROKEN;
}

/* ---- a connection's life ---- */

uint64_t pool_name_connection(struct pool *pool, struct pool_claim *claim)
{
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    uint64_t id = SHM_ADD(hint, pool->slab.header->next_connection, 1);
    mailbox_drain(pool->mailboxes[claim->slot]); /* empty by the invariant; a letter here would be another connection's */
    pool_count_total(pool, SHM_T_dial_attempts, 1);
    SHM_STORE(row, row->connection, id); /* from now on its failure counts, whoever finds it */
    return id;
}

bool pool_install(struct pool *pool, struct pool_claim *claim, const struct pool_birth *birth)
{
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    uint64_t now = clock_coarse(); /* the clock of leases: they compare their begin with last_used_ns */
    assert(birth->bucket < SHM_BUCKETS);
    SHM_STORE(row, row->created_ns, clock_now());
    SHM_STORE(row, row->created_realtime_ns, clock_read(CLOCK_REALTIME));
    SHM_STORE(row, row->last_used_ns, now);
    SHM_STORE(row, row->leased_ns, now);
    SHM_STORE(row, row->checked_ns, now);
    SHM_STORE(row, row->uses, 0);
    SHM_STORE(row, row->expires_ns, birth->expires_ns);
    SHM_STORE(row, row->private_owner, birth->flags & (SHM_KIND_PRIVATE | SHM_KIND_UNMAILED) ? pool->worker : SHM_NO_WORKER);
    for (int i = 0; i < 3; i++)
        SHM_STORE(row, row->peer[i], birth->peer[i]);
    account_begin(&pool->slab.accounts[claim->slot], birth->bucket);
    SHM_STORE(row, row->kind, birth->bucket | birth->flags); /* no dial any more */
    if (!slot_move(row, &claim->word, pool->worker, SLOT_LEASED))
        return false;
    event_note(&pool->slab, (struct event){.kind = EVENT_opened, .slot = claim->slot, .connection = SHM_LOAD(row, row->connection),
                                           .value = birth->took_ns});
    if (birth->flags & SHM_KIND_UNMAILED)
        pool_count_total(pool, SHM_T_failed_deposits, 1);
    if (claim->slot >= steering_cap(&pool->slab)) /* the pool was made smaller meanwhile, by somebody who saw no connection here */
        steering_condemn(&pool->slab, claim->slot, SHM_LOAD(row, row->connection), SHM_EXPIRES_RESIZED);
    return true;
}

/* The slot, RETIRING or DIALING by us, has no connection and no letter any more. */
static void make_empty(struct pool *pool, struct pool_claim *claim)
{
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    bool dial_failed = SHM_LOAD(row, row->connection) && SHM_LOAD(row, row->kind) >> SHM_KIND_WANTED_SHIFT;
    SHM_STORE(row, row->connection, 0);
    SHM_STORE(row, row->kind, 0);
    SHM_STORE(row, row->private_owner, SHM_NO_WORKER);
    if (!slot_move(row, &claim->word, SHM_NO_WORKER, SLOT_EMPTY))
        return;
    if (dial_failed) /* else it had not begun */
        pool_count_total(pool, SHM_T_dial_failures, 1);
    freelist_put(&pool->slab, SHM_EMPTY_LIST, claim->slot);
    if (SHM_LOAD_SEQ(queue, pool->slab.header->summary))
        waiter_wake_first(&pool->slab, WAITER_ANY_BUCKET);
    service_slot_emptied(pool);
}

/* The letter's descriptor, as mailbox_peek. When this process has none left to receive it with, it gives its spare one up for the
 * moment, ends the connection at once and takes the spare again. MAILBOX_NO_ROOM: another thread was faster to use it. */
static int peek_for_end(struct pool *pool, uint32_t slot, uint64_t linger_ns)
{
    struct letter letter;
    uint64_t connection = SHM_LOAD(row, pool->slab.slots[slot].connection);
    int fd = mailbox_peek(pool->mailboxes[slot], pool->slab.header->id, slot, connection, &letter), none = -1;
    if (fd != MAILBOX_NO_ROOM)
        return fd;
    int spare = atomic_exchange(&pool->spare_fd, -1);
    if (spare > 0)
        close(spare);
    fd = mailbox_peek(pool->mailboxes[slot], pool->slab.header->id, slot, connection, &letter);
    bool found = fd >= 0;
    if (found) {
        connection_end(&fd, 1, linger_ns);
        close(fd);
    }
    spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (spare >= 0 && !atomic_compare_exchange_strong(&pool->spare_fd, &none, spare))
        close(spare); /* another thread has taken one */
    return found ? MAILBOX_NONE : fd;
}

void pool_abandon(struct pool *pool, struct pool_claim *claim)
{
    int fd = peek_for_end(pool, claim->slot, CONNECTION_LINGER_NS);
    if (fd >= 0) { /* a forked copy of the socket may live, and may even be connecting still */
        connection_end(&fd, 1, CONNECTION_LINGER_NS);
        close(fd);
    }
    mailbox_drain(pool->mailboxes[claim->slot]);
    make_empty(pool, claim);
}

bool pool_condemn(struct pool *pool, struct pool_claim *claim)
{
    return slot_move(&pool->slab.slots[claim->slot], &claim->word, pool->worker, SLOT_RETIRING);
}

/* Gather a descriptor of each connection of claims[0..count) into `ends`: the caller's, else the letter's, which also goes to
 * `ours`. Returns how many there are. */
static size_t gather_ends(struct pool *pool, struct pool_claim *claims, const int *fds, size_t count, int *ends, int *ours,
                          uint64_t linger_ns)
{
    size_t found = 0;
    for (size_t i = 0; i < count; i++) {
        bool given = fds && fds[i] >= 0;
        ours[i] = given ? MAILBOX_NONE : peek_for_end(pool, claims[i].slot, linger_ns);
        if (ours[i] == MAILBOX_NO_ROOM)
            SHM_STORE(private, pool->entries[claims[i].slot].unended, UNENDED_JUST_NOW);
        int fd = given ? fds[i] : ours[i];
        if (fd >= 0)
            ends[found++] = fd;
    }
    return found;
}

void pool_end(struct pool *pool, struct pool_claim *claims, const int *fds, size_t count, uint64_t linger_ns)
{
    enum { FEW = 64 };
    int few[2 * FEW] = {0}, *space = count <= FEW ? few : malloc(2 * count * sizeof *space);
    if (!space) { /* no memory: in pieces that fit on the stack */
        for (size_t i = 0; i < count; i += FEW)
            pool_end(pool, claims + i, fds ? fds + i : NULL, count - i < FEW ? count - i : FEW, linger_ns);
        return;
    }
    int *ours = space + count;
    size_t ends = gather_ends(pool, claims, fds, count, space, ours, linger_ns);
    connection_end(space, ends, linger_ns);
    for (size_t i = 0; i < count; i++)
        if (ours[i] >= 0)
            close(ours[i]);
    if (space != few)
        free(space);
}

static struct ended *note_ended(struct pool *pool, uint32_t slot, unsigned reason)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    struct ended *note = pool->notes_ended && SHM_LOAD(row, row->created_ns) ? malloc(sizeof *note) : NULL;
    if (!note)
        return NULL; /* without memory nobody is told */
    *note = (struct ended){.connection = SHM_LOAD(row, row->connection), .uses = SHM_LOAD(row, row->uses),
                           .age_ns = clock_now() - SHM_LOAD(row, row->created_ns), .slot = slot,
                           .kind = SHM_LOAD(row, row->kind), .reason = reason};
    for (int i = 0; i < 3; i++)
        note->peer[i] = SHM_LOAD(row, row->peer[i]);
    return note;
}

void pool_empty(struct pool *pool, struct pool_claim *claim, unsigned reason)
{
    assert(slot_state(claim->word) == SLOT_RETIRING);
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    if (SHM_UNLIKELY(SHM_LOAD(private, pool->entries[claim->slot].unended) == UNENDED_JUST_NOW)) {
        SHM_STORE(private, pool->entries[claim->slot].unended, 1 + reason);
        SHM_ADD(private, pool->unended, 1);
        return;
    }
    if (slot_load(row) != claim->word)
        return; /* not ours any more: recovered by somebody who took us for dead, or damage */
    struct account_shm *account = &pool->slab.accounts[claim->slot];
    bool was_there = account_is_open(account_lives(account)); /* else its process died in a dial, or in the middle of this */
    struct ended *note = was_there ? note_ended(pool, claim->slot, reason) : NULL;
    uint64_t created_ns = SHM_LOAD(row, row->created_ns), age_ns = created_ns ? clock_now() - created_ns : 0;
    if (was_there)
        event_note(&pool->slab, (struct event){.kind = EVENT_closed, .reason = (uint8_t)reason, .slot = claim->slot,
                                               .connection = SHM_LOAD(row, row->connection), .value = age_ns});
    mailbox_drain(pool->mailboxes[claim->slot]);
    if (was_there) {
        SHM_AND(row, row->kind, (UINT32_C(1) << SHM_KIND_WANTED_SHIFT) - 1); /* its dial did not fail */
        if (account_end(account)) {
            SHM_ADD_SEQ(account, pool->slab.totals->counters[reason], 1);
            pool_count_total(pool, SHM_T_lifetime_ns, age_ns);
        }
    }
    if (reason == SHM_T_closed_broken)
        upstream_suspect(&pool->slab);
    make_empty(pool, claim);
    if (!note)
        return;
    note->next = atomic_load(&pool->ended);
    while (!atomic_compare_exchange_weak(&pool->ended, &note->next, note))
        ;
}

void pool_end_again(struct pool *pool)
{
    if (SHM_LIKELY(!SHM_LOAD(private, pool->unended)) || !pool_joined(pool))
        return;
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++) {
        struct pool_claim claim = {.slot = slot, .word = slot_load(&pool->slab.slots[slot])};
        uint32_t reason = SHM_LOAD(private, pool->entries[slot].unended);
        if (!reason || reason == UNENDED_JUST_NOW || !SHM_CAS_SEQ(private, pool->entries[slot].unended, &reason, 0))
            continue;
        SHM_ADD(private, pool->unended, -1u);
        if (slot_state(claim.word) != SLOT_RETIRING || slot_owner(claim.word) != pool->worker)
            continue; /* of a process that we were forked from */
        pool_end(pool, &claim, NULL, 1, CONNECTION_LINGER_NS);
        pool_empty(pool, &claim, reason - 1);
    }
}

struct ended *pool_take_ended(struct pool *pool)
{
    return atomic_load_explicit(&pool->ended, memory_order_relaxed) ? atomic_exchange(&pool->ended, NULL) : NULL;
}

unsigned pool_over_reason(struct pool *pool, uint32_t slot)
{
    switch (SHM_LOAD(row, pool->slab.slots[slot].expires_ns)) {
    case SHM_EXPIRES_EVICTED:
        return SHM_T_closed_evicted;
    case SHM_EXPIRES_RESIZED:
        return SHM_T_closed_resized;
    default:
        return SHM_T_closed_lifetime;
    }
}

unsigned pool_retire_reason(struct pool *pool, uint32_t slot)
{
    uint32_t kind = SHM_LOAD(row, pool->slab.slots[slot].kind);
    enum pool_state state = steering_now(&pool->slab);
    if (kind & SHM_KIND_ENDING)
        return pool_over_reason(pool, slot);
    if ((kind & SHM_KIND_UNMAILED) || (pool->service && (kind & SHM_KIND_PRIVATE)))
        return SHM_T_closed_letter;
    if (pool->service && SHM_LOAD(row, pool->slab.slots[slot].expires_ns) <= clock_coarse())
        return pool_over_reason(pool, slot);
    return state == SHM_POOL_CLOSED || state == SHM_POOL_DRAINING ? SHM_T_closed_shutdown : SHM_T_closed_idle;
}

/* ---- counts ---- */

static uint32_t count_states(struct pool *pool, unsigned states)
{
    uint32_t found = 0;
    for (uint32_t slot = 0; slot < steering_bound(&pool->slab); slot++)
        found += states >> slot_state(slot_load(&pool->slab.slots[slot])) & 1;
    return found;
}

uint32_t pool_count_used(struct pool *pool) { return count_states(pool, ~(1u << SLOT_EMPTY)); }
uint32_t pool_count_idle(struct pool *pool) { return count_states(pool, 1u << SLOT_IDLE | 1u << SLOT_CHECKING); }

/* ---- health checks ---- */

static bool check_is_due(struct pool *pool, struct slot_shm *row, uint64_t now, uint64_t interval_ns, bool only_private)
{
    uint64_t used = SHM_LOAD(row, row->last_used_ns), checked = SHM_LOAD(row, row->checked_ns), last = used > checked ? used : checked;
    bool is_private = SHM_LOAD(row, row->kind) & SHM_KIND_PRIVATE;
    bool usable = is_private ? SHM_LOAD(row, row->private_owner) == pool->worker : !only_private;
    return usable && now > last && now - last >= interval_ns;
}

bool pool_begin_check(struct pool *pool, uint32_t *from, uint64_t interval_ns, bool only_private, struct pool_claim *claim)
{
    uint64_t now = clock_now();
    for (uint32_t slot = *from; slot < steering_bound(&pool->slab); slot++) {
        struct slot_shm *row = &pool->slab.slots[slot];
        uint64_t word = slot_load(row);
        if (slot_state(word) != SLOT_IDLE || !check_is_due(pool, row, now, interval_ns, only_private) ||
            !slot_move(row, &word, pool->worker, SLOT_CHECKING))
            continue;
        SHM_STORE(row, row->checked_ns, now);
        *claim = (struct pool_claim){.slot = slot, .source = SOURCE_STEAL, .word = word};
        *from = slot + 1;
        pool_count_total(pool, SHM_T_health_checks, 1);
        return true;
    }
    return false;
}

bool pool_end_check(struct pool *pool, struct pool_claim *claim)
{
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    if (!slot_move(row, &claim->word, pool->worker, SLOT_IDLE))
        return false;
    freelist_put_idle(&pool->slab, claim->slot);
    if (SHM_LOAD_SEQ(queue, pool->slab.header->summary))
        pool_release_late(pool, claim->slot);
    if (pool->service)
        service_watch_letter(pool, claim->slot);
    return true;
}

/* ---- release ---- */

void pool_forget_cached(struct pool *pool, uint32_t slot)
{
    if (slot_state(slot_load(&pool->slab.slots[slot])) == SLOT_IDLE)
        freelist_put_idle(&pool->slab, slot);
}

/* Leave the slot free for all and wake somebody who can use it. */
static enum pool_released release_and_wake(struct pool *pool, struct pool_claim *claim, uint32_t mask)
{
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    if (!slot_move(row, &claim->word, pool->worker, SLOT_IDLE))
        return RELEASE_STALE;
    claim->word = 0;
    uint32_t out = local_cache_note(&pool->cache, claim->slot, &pool->entries[claim->slot].place);
    if (out != LOCAL_CACHE_NONE)
        pool_forget_cached(pool, out);
    waiter_wake_first(&pool->slab, mask);
    if (!pool_is_plain(pool))
        pool_release_late(pool, claim->slot);
    return RELEASED;
}

/* The state is not OPEN, or was not a moment ago. */
static enum pool_released release_steered(struct pool *pool, struct pool_claim *claim, uint32_t mask, bool *settled)
{
    struct waiter_seen seen;
    *settled = true;
    switch (steering_now(&pool->slab)) {
    case SHM_POOL_PAUSED:
        return release_and_wake(pool, claim, mask);
    case SHM_POOL_DRAINING:
        if (!waiter_first(&pool->slab, mask, &seen))
            return RELEASE_RETIRE;
        break;
    case SHM_POOL_CLOSED:
        return RELEASE_RETIRE;
    case SHM_POOL_OPEN:
        break;
    }
    *settled = false;
    return RELEASED;
}

enum pool_released pool_release_contended(struct pool *pool, struct pool_claim *claim)
{
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    struct waiter_seen seen;
    uint32_t mask = kind_mask(SHM_LOAD(row, row->kind));
    if (!pool_is_plain(pool)) {
        bool settled;
        enum pool_released released = release_steered(pool, claim, mask, &settled);
        if (settled)
            return released;
    }
    if ((SHM_LOAD(row, row->kind) & SHM_KIND_PRIVATE) || !waiter_first(&pool->slab, mask, &seen))
        return release_and_wake(pool, claim, WAITER_ANY_BUCKET); /* its permit is of use to them: they may evict it */
    uint64_t now = clock_now(), since = waiter_since(&pool->slab, &seen);
    if (now > since && now - since >= WAITER_HANDOVER_AFTER_NS)
        switch (waiter_offer(&pool->slab, claim->slot, &claim->word, mask, now)) {
        case WAITER_OFFERED:
            claim->word = 0;
            return RELEASED;
        case WAITER_LOST:
            return RELEASE_STALE;
        case WAITER_NOBODY:
            break;
        }
    return release_and_wake(pool, claim, mask);
}

void pool_release_late(struct pool *pool, uint32_t slot)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    struct pool_claim claim = {.slot = slot, .word = slot_load(row)};
    struct waiter_seen seen;
    uint32_t mask = kind_mask(SHM_LOAD(row, row->kind));
    bool fits = waiter_first(&pool->slab, mask, &seen);
    enum pool_state state = steering_now(&pool->slab);
    if (state == SHM_POOL_OPEN || (state == SHM_POOL_DRAINING && fits))
        waiter_wake_first(&pool->slab, fits ? mask : WAITER_ANY_BUCKET);
    else if (state != SHM_POOL_PAUSED && slot_state(claim.word) == SLOT_IDLE && pool_condemn(pool, &claim)) {
        pool_end(pool, &claim, NULL, 1, CONNECTION_LINGER_NS);
        pool_empty(pool, &claim, SHM_T_closed_shutdown);
    }
}

void pool_return_promise(struct pool *pool, int64_t slot)
{
    if (slot < 0)
        return;
    struct slot_shm *row = &pool->slab.slots[slot];
    uint64_t word = slot_load(row);
    if (slot_state(word) != SLOT_OFFERED || slot_owner(word) != pool->worker ||
        !slot_move(row, &word, SHM_NO_WORKER, SLOT_IDLE))
        return;
    freelist_put_idle(&pool->slab, (uint32_t)slot);
    pool_release_late(pool, (uint32_t)slot);
}

/* ---- closing ---- */

void pool_shut(struct pool *pool)
{
    steering_state(&pool->slab, SHM_POOL_CLOSED);
    service_shut(pool);
}

/* ---- the maintainer ---- */

bool pool_be_maintainer(struct pool *pool)
{
    int fd = atomic_load_explicit(&pool->seat->fd, memory_order_acquire);
    uint64_t now = clock_now(), last = SHM_LOAD(hint, pool->slab.header->maintained_ns);
    if (fd >= 0 && byte_lock(fd, SHM_MAINTAINER_BYTE)) {
        SHM_STORE(hint, pool->slab.header->maintained_ns, now);
        return true;
    }
    return fd >= 0 && last && now > last && now - last > MAINTAINER_PATIENCE_NS;
}

void pool_resign(struct pool *pool)
{
    int fd = atomic_load_explicit(&pool->seat->fd, memory_order_acquire);
    if (fd >= 0)
        byte_unlock(fd, SHM_MAINTAINER_BYTE);
}
