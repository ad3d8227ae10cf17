/* module_care.c: what is done to a pool besides leasing: recovery, expiry, health checks, overdue leases, steering, closing.
 *
 * All of it is called by Python (maintenance.py, pool.py), by any thread, at once with leases. What ends connections here tells Python of it
 * afterwards (tell_ended). Not here: when it is done (maintenance.py), the warm path (module.c), decisions about slots (pool.c, steering.c).
 */
#include "module.h"

#include <string.h>
#include <unistd.h>

#include "connection.h"
#include "events.h"
#include "recovery.h"
#include "service.h"

/* _recover() -> int: look for dead workers now; slots freed. */
PyObject *care_recover(PoolObject *self, PyObject *unused)
{
    (void)unused;
    uint32_t freed;
    if (!check_made(self) || self->finished)
        return check_made(self) ? PyLong_FromLong(0) : NULL;
    if (!ensure_joined(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    freed = recovery_run(&self->pool, true);
    Py_END_ALLOW_THREADS
    tell_ended(self);
    return PyLong_FromUnsignedLong(freed);
}

/* ---- ending idle connections ---- */

/* Which idle connections end: a counter SHM_T_closed_* says why, -1: not this one. */
typedef int (*judge)(struct pool *pool, uint32_t slot, void *with);

struct condemned {
    struct pool_claim *claims;
    int *fds, *reasons;
    uint32_t count;
};

static bool condemned_new(struct condemned *found, uint32_t most)
{
    *found = (struct condemned){PyMem_Calloc(most, sizeof *found->claims), PyMem_Calloc(most, sizeof *found->fds),
                                PyMem_Calloc(most, sizeof *found->reasons), 0};
    return found->claims && found->fds && found->reasons;
}

static void condemned_free(struct condemned *found)
{
    PyMem_Free(found->claims);
    PyMem_Free(found->fds);
    PyMem_Free(found->reasons);
}

static void condemn_idle(struct pool *pool, struct condemned *found, judge judge, void *with)
{
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++) {
        struct pool_claim claim = {.slot = slot, .word = slot_load(&pool->slab.slots[slot])};
        bool is_idle = slot_state(claim.word) == SLOT_IDLE || slot_state(claim.word) == SLOT_OFFERED;
        int reason = is_idle ? judge(pool, slot, with) : -1;
        if (reason < 0 || !pool_condemn(pool, &claim))
            continue;
        found->claims[found->count] = claim;
        found->reasons[found->count++] = reason;
    }
}

/* End every idle connection that the judge condemns; returns how many, or -1 with an exception. */
static int64_t retire_idle(PoolObject *self, judge judge, void *with)
{
    struct pool *pool = &self->pool;
    struct condemned found;
    uint32_t generation = pool->generation;
    if (!condemned_new(&found, pool->slab.layout.max_slots)) {
        condemned_free(&found);
        PyErr_NoMemory();
        return -1;
    }
    condemn_idle(pool, &found, judge, with);
    for (uint32_t i = 0; i < found.count; i++) {
        entry_drop_session(&pool->entries[found.claims[i].slot]);
        found.fds[i] = entry_fd(pool, found.claims[i].slot);
    }
    if (found.count && !forked_since(self, generation)) {
        Py_BEGIN_ALLOW_THREADS
        pool_end(pool, found.claims, found.fds, found.count, CONNECTION_LINGER_NS);
        Py_END_ALLOW_THREADS
        for (uint32_t i = 0; i < found.count; i++)
            empty_slot(self, &found.claims[i], (unsigned)found.reasons[i], generation);
        tell_ended(self);
    }
    condemned_free(&found);
    return (int64_t)found.count;
}

static int ends_with_the_pool(struct pool *pool, uint32_t slot, void *unused)
{
    (void)pool, (void)slot, (void)unused;
    return SHM_T_closed_shutdown;
}

/* What is left of a round of expiry. */
struct expiry {
    uint64_t now;
    uint32_t used, minimum; /* connections there are, less those that are over; not fewer for being idle */
    uint32_t idle;          /* idle ones, less those that are over */
    uint32_t cap;
    bool draining;
};

/* Idle connections that end in any case. */
static uint32_t count_over(struct pool *pool, uint64_t now)
{
    uint32_t over = 0;
    for (uint32_t slot = 0; slot < steering_bound(&pool->slab); slot++)
        over += slot_state(slot_load(&pool->slab.slots[slot])) == SLOT_IDLE && SHM_LOAD(row, pool->slab.slots[slot].expires_ns) <= now;
    return over;
}

static int is_over(struct pool *pool, uint32_t slot, void *with)
{
    struct expiry *expiry = with;
    struct slot_shm *row = &pool->slab.slots[slot];
    uint64_t used = SHM_LOAD(row, row->last_used_ns);
    bool too_long = expiry->now > used && expiry->now - used > pool->options.idle_timeout_ns && expiry->used > expiry->minimum;
    bool surplus = pool->options.idle_limit && expiry->idle >= pool->options.idle_limit;
    if (SHM_LOAD(row, row->expires_ns) <= expiry->now)
        return expiry->draining ? SHM_T_closed_shutdown : (int)pool_over_reason(pool, slot);
    int reason = expiry->draining             ? SHM_T_closed_shutdown
                 : expiry->used > expiry->cap ? SHM_T_closed_resized
                 : too_long || surplus        ? SHM_T_closed_idle
                                              : -1;
    if (reason >= 0 && pool->service && service_has_spoken(pool, slot)) /* it waits to be served */
        return -1;
    if (reason >= 0) {
        expiry->used -= expiry->used > 0;
        expiry->idle -= expiry->idle > 0;
    }
    return reason;
}

/* _expire(minimum) -> int: end idle connections past their lifetime (all, in a pool that is drained), condemned ones, those beyond the cap or max_idle_connections, and those idle
 * too long while more than `minimum` connections stay. */
PyObject *care_expire(PoolObject *self, PyObject *args)
{
    unsigned minimum;
    struct pool *pool = &self->pool;
    if (!check_made(self) || !PyArg_ParseTuple(args, "I", &minimum))
        return NULL;
    if (self->finished || !pool_is_open(pool))
        return PyLong_FromLong(0);
    if (!ensure_joined(self))
        return NULL;
    steering_enforce(&pool->slab);
    uint64_t now = clock_now();
    uint32_t over = count_over(pool, now), used = pool_count_used(pool), idle = pool_count_idle(pool);
    struct expiry expiry = {now, used > over ? used - over : 0, minimum, idle > over ? idle - over : 0, steering_cap(&pool->slab),
                            steering_now(&pool->slab) == SHM_POOL_DRAINING};
    int64_t ended = retire_idle(self, is_over, &expiry);
    return ended < 0 ? NULL : PyLong_FromLongLong(ended);
}

/* _retire_idle() -> int: end every idle connection: the pool is drained. */
PyObject *care_retire_idle(PoolObject *self, PyObject *unused)
{
    (void)unused;
    if (!check_made(self))
        return NULL;
    if (self->finished)
        return PyLong_FromLong(0);
    if (!ensure_joined(self))
        return NULL;
    int64_t ended = retire_idle(self, ends_with_the_pool, NULL);
    return ended < 0 ? NULL : PyLong_FromLongLong(ended);
}

/* _close_stale() -> int: close this process's copies of connections that have ended. */
static PyObject *care_close_stale_alone(PoolObject *self)
{
    if (!check_made(self) || self->finished)
        return check_made(self) ? PyLong_FromLong(0) : NULL;
    if (!ensure_joined(self))
        return NULL;
    struct pool *pool = &self->pool;
    long closed = 0;
    Py_BEGIN_ALLOW_THREADS
    pool_end_again(pool);
    Py_END_ALLOW_THREADS
    tell_ended(self);
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++) {
        struct slot_shm *row = &pool->slab.slots[slot];
        uint64_t word = slot_load(row);
        if (!pool->entries[slot].connection || pool->entries[slot].connection == SHM_LOAD(row, row->connection) ||
            (slot_state(word) != SLOT_IDLE && slot_owner(word) == pool->worker))
            continue; /* ours to the connection's end, or in a thread's hands here */
        parts_let_go(&pool->entries[slot]);
        closed++;
    }
    return PyLong_FromLong(closed);
}

/* _shut() -> int: close the pool for all processes, retire what is idle; number retired. */
static PyObject *care_shut_alone(PoolObject *self)
{
    if (!check_made(self))
        return NULL;
    struct pool *pool = &self->pool;
    if (self->finished) {
        finish_for_parent(self);
        return PyLong_FromLong(0);
    }
    if (!ensure_joined(self))
        return NULL;
    pool_shut(pool);
    Py_BEGIN_ALLOW_THREADS
    recovery_run(pool, true);
    Py_END_ALLOW_THREADS
    tell_ended(self);
    int64_t retired = retire_idle(self, ends_with_the_pool, NULL);
    return retired < 0 ? NULL : PyLong_FromLongLong(retired);
}

ALONE(care_close_stale)
ALONE(care_shut)

/* _counts() -> {state: slots in it} */
PyObject *care_counts(PoolObject *self, PyObject *unused)
{
    (void)unused;
    unsigned long counts[SLOT_STATE_COUNT] = {0};
    if (!check_made(self))
        return NULL;
    uint32_t bound = steering_bound(&self->pool.slab), cap = steering_cap(&self->pool.slab);
    for (uint32_t slot = 0; slot < bound; slot++) {
        struct slot_shm *row = &self->pool.slab.slots[slot];
        unsigned state = slot_shown_state(row, slot_load(row));
        counts[state < SLOT_STATE_COUNT ? state : SLOT_INVALID]++;
    }
    unsigned long used = bound - counts[SLOT_EMPTY];
    counts[SLOT_EMPTY] = cap > used ? cap - used : 0; /* permits, as long as a smaller cap is not reached yet */
    PyObject *dict = PyDict_New();
    for (unsigned state = SLOT_EMPTY; dict && state < SLOT_STATE_COUNT; state++) {
        PyObject *value = PyLong_FromUnsignedLong(counts[state]);
        if (!value || PyDict_SetItemString(dict, slot_state_name(state), value))
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

/* ---- the maintainer ---- */

/* _maintainer() -> bool: is this process the one that looks after the pool for all? It becomes it if nobody is. */
PyObject *care_maintainer(PoolObject *self, PyObject *unused)
{
    (void)unused;
    if (!check_made(self))
        return NULL;
    if (self->finished || !pool_is_open(&self->pool))
        Py_RETURN_FALSE;
    return ensure_joined(self) ? PyBool_FromLong(pool_be_maintainer(&self->pool)) : NULL;
}

/* _resign() -> None */
PyObject *care_resign(PoolObject *self, PyObject *unused)
{
    (void)unused;
    if (self->made && !self->finished && pool_joined(&self->pool))
        pool_resign(&self->pool);
    Py_RETURN_NONE;
}

/* _ended_elsewhere() -> bool: the pool was closed, and this process has not given its part back. */
PyObject *care_ended_elsewhere(PoolObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(self->made && !self->finished && !pool_is_open(&self->pool));
}

/* _dial_threads() -> int: dials of this process that go on in threads of their own */
PyObject *care_dial_threads(PoolObject *self, PyObject *unused)
{
    (void)unused;
    bool ours = self->made && pool_joined(&self->pool) && self->generation == self->pool.generation; /* else they are the parent's */
    return PyLong_FromUnsignedLong(ours ? SHM_LOAD(private, self->dial_threads) : 0);
}

/* ---- health checks ---- */

/* The connection of the claim, CHECKING by us, as this process has it. False: it was unfit and has ended, or an exception. */
static bool fetch_for_check(PoolObject *self, struct pool_claim *claim)
{
    struct pool *pool = &self->pool;
    struct entry *entry = &pool->entries[claim->slot];
    uint32_t generation = pool->generation;
    bool known = entry->connection == SHM_LOAD(row, pool->slab.slots[claim->slot].connection);
    int fetched = known && (!*entry->dirty || entry->dirty == always_dirty) ? 1 : entry_fetch(self, claim->slot);
    if (forked_since(self, generation))
        return false;
    if (fetched < 0)
        pool_end_check(pool, claim);
    else if (!fetched)
        retire_leased(self, claim, SHM_T_closed_letter);
    return fetched > 0;
}

static unsigned unfit_reason(enum pool_condition condition)
{
    return condition == CONDITION_DIRTY ? SHM_T_closed_dirty : SHM_T_closed_broken;
}

static bool check_arguments(PoolObject *self, PyObject *args, uint64_t *interval_ns, bool *only_private)
{
    double interval;
    int private;
    if (!check_made(self) || !PyArg_ParseTuple(args, "dp", &interval, &private))
        return false;
    *interval_ns = interval > 9e9 ? NEVER : (uint64_t)(interval * 1e9);
    *only_private = private != 0;
    return ensure_joined(self);
}

static bool may_check(PoolObject *self) { return self->made && !self->finished && pool_is_open(&self->pool); }

/* _look_over(interval, only_private) -> int: look at each idle connection that nobody has used or looked at for that long; how many ended. */
PyObject *care_look_over(PoolObject *self, PyObject *args)
{
    struct pool *pool = &self->pool;
    struct pool_claim claim;
    uint64_t interval_ns;
    bool only_private;
    long ended = 0;
    if (!may_check(self))
        return PyLong_FromLong(0);
    if (!check_arguments(self, args, &interval_ns, &only_private))
        return NULL;
    if (pool->service) /* clients that speak, or close, are events */
        return PyLong_FromLong(0);
    for (uint32_t from = 0; may_check(self) && pool_begin_check(pool, &from, interval_ns, only_private, &claim);) {
        if (!fetch_for_check(self, &claim)) {
            if (PyErr_Occurred())
                return NULL;
            ended++;
            continue;
        }
        enum pool_condition condition = pool_check(pool, claim.slot, pool->entries[claim.slot].fd);
        if (condition == CONDITION_GOOD)
            pool_end_check(pool, &claim);
        else {
            pool_count_total(pool, SHM_T_health_failures, 1);
            ended += retire_leased(self, &claim, unfit_reason(condition));
        }
    }
    return PyLong_FromLong(ended);
}

/* _check_begin(interval, only_private) -> PooledConnection or None: the next idle connection that nobody has used or checked for that long, in
 * the state CHECKING. One that turns out closed ends on the way. */
PyObject *care_check_begin(PoolObject *self, PyObject *args)
{
    struct pool *pool = &self->pool;
    struct pool_claim claim;
    uint64_t interval_ns;
    bool only_private;
    if (!may_check(self))
        Py_RETURN_NONE;
    if (!check_arguments(self, args, &interval_ns, &only_private))
        return NULL;
    for (uint32_t from = 0; pool_begin_check(pool, &from, interval_ns, only_private, &claim);) {
        if (!fetch_for_check(self, &claim)) {
            if (PyErr_Occurred())
                return NULL;
            continue;
        }
        LeaseObject *shown = lease_new(self, &claim, 0, 0);
        if (!shown) {
            pool_end_check(pool, &claim);
            return NULL;
        }
        shown->shown = true;
        return (PyObject *)shown;
    }
    Py_RETURN_NONE;
}

static LeaseObject *checked_lease(PoolObject *self, PyObject *conn)
{
    LeaseObject *lease = (LeaseObject *)conn;
    if (Py_TYPE(conn) == lease_type && lease->shown && (!lease->owner || lease->owner == self))
        return lease;
    PyErr_Format(PyExc_TypeError, "not a connection that is being checked: %R", conn);
    return NULL;
}

/* Put the socket's mode back after a check; a socket that the check has closed is none for the next user. */
static bool restore_checked(PoolObject *self, LeaseObject *lease)
{
    PyObject *socket = lease->entry->socket;
    if (!socket || !*lease->entry->dirty)
        return true;
    PyObject *result = PyObject_CallMethod((PyObject *)self, "_restore", "O", socket);
    bool good = result == Py_True;
    if (!result)
        PyErr_Clear(); /* a socket that cannot be put back is unfit: that is the answer */
    Py_XDECREF(result);
    return good;
}

/* _check_end(conn, healthy) -> bool: it is idle again, or ended; False when it was not ours any more. */
PyObject *care_check_end(PoolObject *self, PyObject *args)
{
    PyObject *conn;
    int healthy;
    if (!PyArg_ParseTuple(args, "Op", &conn, &healthy))
        return NULL;
    LeaseObject *lease = checked_lease(self, conn);
    if (!lease)
        return NULL;
    if (!lease->active || forked_since(self, lease->generation))
        Py_RETURN_FALSE;
    struct pool *pool = &self->pool;
    healthy = healthy && restore_checked(self, lease);
    lease->active = false;
    enum pool_condition condition = CONDITION_GOOD;
    if (healthy) /* what the check has left unread shall reach nobody */
        condition = pool_check(pool, lease->claim.slot, lease->entry->fd);
    bool ours;
    if (healthy && condition == CONDITION_GOOD)
        ours = pool_end_check(pool, &lease->claim);
    else {
        pool_count_total(pool, SHM_T_health_failures, 1);
        ours = retire_leased(self, &lease->claim, healthy ? unfit_reason(condition) : SHM_T_closed_unhealthy);
    }
    tell_ended(self);
    if (!pool_is_open(pool)) /* closed meanwhile, by the check itself perhaps: this was the last that we held */
        finish(self);
    lease_end(lease);
    return PyBool_FromLong(ours);
}

/* _check_cut(conn) -> None: shut the connection down for everybody: whoever waits on it in the check wakes up. */
PyObject *care_check_cut(PoolObject *self, PyObject *args)
{
    PyObject *conn;
    if (!PyArg_ParseTuple(args, "O", &conn))
        return NULL;
    LeaseObject *lease = checked_lease(self, conn);
    if (!lease)
        return NULL;
    if (lease->active && !forked_since(self, lease->generation)) {
        int fd = entry_fd(&self->pool, lease->claim.slot);
        Py_BEGIN_ALLOW_THREADS
        pool_end(&self->pool, &lease->claim, &fd, 1, 0);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

/* ---- overdue leases ---- */

/* Is the slot leased since `age_ns`, and has nobody said so? */
static bool is_overdue(struct pool *pool, uint32_t slot, uint64_t word, uint64_t now, uint64_t age_ns)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    bool is_leased = slot_shown_state(row, word) == SLOT_LEASED; /* before the time: on_created's does not count */
    uint64_t since = SHM_LOAD(row, row->leased_ns);
    return is_leased && SHM_LOAD(hint, row->mark) != word && since && now > since && now - since > age_ns && slot_load(row) == word;
}

/* _overdue(age, only_own) -> [(slot, word, connection, pid, held), ...]: leases that have been out for longer and were not reported */
PyObject *care_overdue(PoolObject *self, PyObject *args)
{
    double age;
    int only_own;
    struct pool *pool = &self->pool;
    if (!check_made(self) || !PyArg_ParseTuple(args, "dp", &age, &only_own))
        return NULL;
    PyObject *list = PyList_New(0);
    uint64_t now = clock_now(), age_ns = age > 9e9 ? NEVER : (uint64_t)(age * 1e9);
    for (uint32_t slot = 0; list && !self->finished && slot < steering_bound(&pool->slab); slot++) {
        struct slot_shm *row = &pool->slab.slots[slot];
        uint64_t word = slot_load(row);
        uint32_t owner = slot_owner(word);
        if ((only_own && owner != pool->worker) || !is_overdue(pool, slot, word, now, age_ns) || !owner ||
            owner > pool->slab.layout.max_workers)
            continue;
        PyObject *tuple = Py_BuildValue("IKKId", slot, (unsigned long long)word, (unsigned long long)SHM_LOAD(row, row->connection),
                                        SHM_LOAD(hint, pool->slab.workers[owner - 1].pid),
                                        (double)(now - SHM_LOAD(row, row->leased_ns)) / 1e9);
        if (!tuple || PyList_Append(list, tuple))
            Py_CLEAR(list);
        Py_XDECREF(tuple);
    }
    return list;
}

static bool leased_word(PoolObject *self, PyObject *args, uint32_t *slot, uint64_t *word)
{
    unsigned index;
    unsigned long long seen;
    if (!check_made(self) || !PyArg_ParseTuple(args, "IK", &index, &seen))
        return false;
    *slot = index;
    *word = seen;
    if (index < self->pool.slab.layout.max_slots && slot_state(seen) == SLOT_LEASED)
        return true;
    PyErr_Format(PyExc_ValueError, "slot %u with the word %llu is no lease", index, seen);
    return false;
}

static void note_overdue(struct pool *pool, uint32_t slot, uint64_t word)
{
    struct slot_shm *row = &pool->slab.slots[slot];
    uint32_t owner = slot_owner(word);
    pool_count_total(pool, SHM_T_overdue_leases, 1);
    event_note(&pool->slab, (struct event){.kind = EVENT_overdue, .slot = slot, .connection = SHM_LOAD(row, row->connection),
                                           .pid = owner && owner <= pool->slab.layout.max_workers ? SHM_LOAD(hint, pool->slab.workers[owner - 1].pid) : 0,
                                           .value = clock_now() - SHM_LOAD(row, row->leased_ns)});
}

/* _report_leak(slot, word) -> bool: True: the caller reports this lease; False: it is over, or somebody else does. */
PyObject *care_report_leak(PoolObject *self, PyObject *args)
{
    uint32_t slot;
    uint64_t word;
    if (!leased_word(self, args, &slot, &word))
        return NULL;
    struct slot_shm *row = &self->pool.slab.slots[slot];
    uint64_t marked = SHM_LOAD(hint, row->mark);
    if (slot_load(row) != word || marked == word || !SHM_CAS_SEQ(queue, row->mark, &marked, word))
        Py_RETURN_FALSE;
    note_overdue(&self->pool, slot, word);
    Py_RETURN_TRUE;
}

/* _note_frame(slot, connection, text) -> None: of the stack where this process took a lease that is overdue */
PyObject *care_note_frame(PoolObject *self, PyObject *args)
{
    struct event event = {.kind = EVENT_taken_at};
    unsigned long long connection;
    PyObject *text;
    if (!check_made(self) || !PyArg_ParseTuple(args, "IKU", &event.slot, &connection, &text))
        return NULL;
    event.connection = connection;
    if (note_text(text, event.text))
        event_note(&self->pool.slab, event);
    Py_RETURN_NONE;
}

/* _revoke(slot, word) -> bool: take the lease's slot back and end its connection; the holder's next use of it raises LeaseExpired. What the holder
 * has in its hands (socket, session) is left to it: it may be in the middle of a call. */
PyObject *care_revoke(PoolObject *self, PyObject *args)
{
    struct pool_claim claim = {0};
    if (!leased_word(self, args, &claim.slot, &claim.word))
        return NULL;
    struct pool *pool = &self->pool;
    if (self->finished || !ensure_joined(self))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    bool ours = slot_owner(claim.word) == pool->worker;
    if (!ours && (SHM_LOAD(row, pool->slab.slots[claim.slot].kind) & SHM_KIND_UNMAILED))
        Py_RETURN_FALSE; /* there is no letter: its own process alone can end it */
    struct pool_claim lease = claim;
    bool reported = SHM_LOAD(hint, pool->slab.slots[claim.slot].mark) == claim.word;
    if (!pool_condemn(pool, &claim))
        Py_RETURN_FALSE;
    if (!reported)
        note_overdue(pool, claim.slot, lease.word);
    struct parts parts = {.fd = -1};
    int fd = ours ? entry_fd(pool, claim.slot) : -1;
    if (ours)
        parts = entry_take(&pool->entries[claim.slot]);
    if (parts.socket || parts.session) /* before its holder, whom the end of the connection wakes, can have ended the lease */
        revoked_keep(self, &lease, parts.socket, parts.session);
    Py_BEGIN_ALLOW_THREADS
    pool_end(pool, &claim, &fd, 1, CONNECTION_LINGER_NS);
    pool_empty(pool, &claim, SHM_T_closed_revoked);
    Py_END_ALLOW_THREADS
    if (parts.fd >= 0)
        close(parts.fd);
    Py_XDECREF(parts.socket);
    Py_XDECREF(parts.session);
    Py_XDECREF(parts.note);
    tell_ended(self);
    Py_RETURN_TRUE;
}

/* ---- what is noted for all ---- */

/* _prewarm_note(created, failed, done) -> None: add to the figures of prewarming */
PyObject *care_prewarm_note(PoolObject *self, PyObject *args)
{
    unsigned created, failed;
    int done;
    if (!check_made(self) || !PyArg_ParseTuple(args, "IIp", &created, &failed, &done))
        return NULL;
    struct header_shm *header = self->pool.slab.header;
    SHM_ADD(hint, header->prewarm_created, created);
    SHM_ADD(hint, header->prewarm_failed, failed);
    if (done)
        SHM_STORE(hint, header->prewarm_done, 1);
    Py_RETURN_NONE;
}

/* _prewarm_is_done() -> bool */
PyObject *care_prewarm_is_done(PoolObject *self, PyObject *unused)
{
    (void)unused;
    return check_made(self) ? PyBool_FromLong(SHM_LOAD(hint, self->pool.slab.header->prewarm_done) != 0) : NULL;
}

/* _upstream_words() -> ("unproved", "up", "down" or "probing", seconds to the next dial, text of the last failure, failures so far) */
PyObject *care_upstream(PoolObject *self, PyObject *unused)
{
    (void)unused;
    char text[SHM_ERROR_BYTES];
    if (!check_made(self))
        return NULL;
    struct header_shm *header = self->pool.slab.header;
    uint64_t word = SHM_LOAD_SEQ(upstream, header->upstream), now = clock_now(), retry = upstream_retry_ns(word);
    upstream_error(&self->pool.slab, text);
    PyObject *error = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
    return Py_BuildValue("sdNK", upstream_state_name(upstream_state(word)), retry > now ? (double)(retry - now) / 1e9 : 0.0, error,
                         (unsigned long long)SHM_LOAD(hint, header->upstream_failures));
}

/* _upstream_failed(seen, text) -> bool: a dial that upstream_ask() let through with `seen` has failed; True: this is news. */
PyObject *care_upstream_failed(PoolObject *self, PyObject *args)
{
    unsigned long long seen;
    const char *text;
    if (!check_made(self) || !PyArg_ParseTuple(args, "Ky", &seen, &text))
        return NULL;
    uint64_t now = clock_now();
    return PyBool_FromLong(upstream_failed(&self->pool.slab, seen, now, &self->pool.options.backoff, (uint32_t)(now ^ now >> 17), text));
}

/* _upstream_untried(seen) -> None: that dial says nothing about the server. */
PyObject *care_upstream_untried(PoolObject *self, PyObject *args)
{
    unsigned long long seen;
    if (!check_made(self) || !PyArg_ParseTuple(args, "K", &seen))
        return NULL;
    upstream_untried(&self->pool.slab, seen, clock_now());
    Py_RETURN_NONE;
}

/* _upstream_doubt(seen) -> None: the time of that dial's caller was over before the server answered. */
PyObject *care_upstream_doubt(PoolObject *self, PyObject *args)
{
    unsigned long long seen;
    if (!check_made(self) || !PyArg_ParseTuple(args, "K", &seen))
        return NULL;
    upstream_doubt(&self->pool.slab, seen, clock_now());
    Py_RETURN_NONE;
}

/* ---- steering ---- */

/* _steer(state) -> bool: "open", "paused" or "draining"; False when it is so already, or closed */
PyObject *care_steer(PoolObject *self, PyObject *args)
{
    const char *name;
    if (!check_made(self) || !PyArg_ParseTuple(args, "s", &name))
        return NULL;
    enum pool_state state;
    if (!steering_state_named(name, &state) || state == SHM_POOL_CLOSED)
        return PyErr_Format(PyExc_ValueError, "a pool is not steered to be %s", name);
    return PyBool_FromLong(steering_state(&self->pool.slab, state));
}

/* _waiters() -> int: calls in the queue, of all processes */
PyObject *care_waiters(PoolObject *self, PyObject *unused)
{
    (void)unused;
    unsigned long waiting = 0;
    if (!check_made(self))
        return NULL;
    for (uint32_t i = 0; i < self->pool.slab.layout.max_waiters; i++)
        waiting += SHM_LOAD_SEQ(queue, self->pool.slab.waiter_words[i]) != WAITER_FREE_WORD;
    return PyLong_FromUnsignedLong(waiting);
}

/* _state() -> "open", "paused", "draining" or "closed" */
PyObject *care_state(PoolObject *self, PyObject *unused)
{
    (void)unused;
    return check_made(self) ? PyUnicode_FromString(steering_state_name(steering_now(&self->pool.slab))) : NULL;
}

/* _limits() -> (cap, slots): the most connections now, and the most that resize() can make of it */
PyObject *care_limits(PoolObject *self, PyObject *unused)
{
    (void)unused;
    uint32_t reserved = self->made && self->pool.slab.header->listening ? SERVICE_RESERVED : 0;
    return check_made(self) ? Py_BuildValue("II", steering_cap(&self->pool.slab), self->pool.slab.layout.max_slots - reserved) : NULL;
}

/* _resize(cap) -> int: what it was */
PyObject *care_resize(PoolObject *self, PyObject *args)
{
    unsigned cap;
    if (!check_made(self) || !PyArg_ParseTuple(args, "I", &cap))
        return NULL;
    if (!cap || cap > self->pool.slab.layout.max_slots)
        return PyErr_Format(PyExc_ValueError, "a pool of %u slots cannot have %u connections", self->pool.slab.layout.max_slots, cap);
    return PyLong_FromUnsignedLong(steering_resize(&self->pool.slab, cap));
}

/* _evict(connection or 0, peer or b"", leased) -> int: condemn the idle (and leased) connections that fit both; how many. Leased ones end at their
 * return, idle ones with the next _expire(), or when somebody meets them. */
PyObject *care_evict(PoolObject *self, PyObject *args)
{
    long long connection;
    const char *peer;
    Py_ssize_t peer_size;
    int leased;
    if (!check_made(self) || !PyArg_ParseTuple(args, "Ly#p", &connection, &peer, &peer_size, &leased))
        return NULL;
    if (self->finished)
        return PyLong_FromLong(0);
    return PyLong_FromUnsignedLong(steering_evict(&self->pool.slab, (uint64_t)connection, peer, (size_t)peer_size, leased != 0));
}
