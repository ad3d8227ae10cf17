/* module_view.c: the slab as Python objects, for whoever looks: snapshots, and SlabView, a mapping of a slab: read-only, or writable for
 * who steers the pool without being a member of it.
 *
 * Reading writes nothing and takes no lock; what steering writes is in steering.h. A slot is read between two equal words, so that its fields belong to one moment, and
 * together with its account (account.h), so that in each snapshot created - closed = open, for each kind. Other counters are as they are at some moment of the
 * tens of microseconds that it takes, while the pool goes on. What is read is bounds-checked by slab_open(); a state that does not exist is named "invalid".
 * Texts are bounded, and decoded whatever they are, at each reading: whoever damages a slab may do it after it was checked.
 *
 * ORDER(snapshot): acquire. The fields are loaded before the word is loaded again. Pairs with the CAS in slot_move(), after which
 * alone a holder writes them; weaker would take a row of two moments for one. Nobody but a reader of figures relies on it.
 *
 * Not here: figures made of a snapshot (shmpool/stats.py), finding a segment and checking whose it is (shmpool/inspector.py).
 */
#include "module.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "account.h"
#include "events.h"
#include "pool.h"
#include "service.h"

/* ---- snapshots ---- */

static PyObject *hist_list(struct hist_shm *hist)
{
    PyObject *list = PyList_New(0);
    for (uint32_t bucket = 0; list && bucket < SHM_HIST_BUCKETS; bucket++) {
        unsigned long long count = SHM_LOAD(count, hist->buckets[bucket]);
        if (!count)
            continue;
        PyObject *row = Py_BuildValue("KKK", (unsigned long long)hist_lower(bucket),
                                      (unsigned long long)hist_lower(bucket + 1), count);
        if (!row || PyList_Append(list, row))
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

/* {name: value} of a block of counters; `names` stands in the order of the enum */
static PyObject *counter_dict(a64_shm *counters, const char *const *names, size_t count)
{
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < count; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(SHM_LOAD_ACQUIRE(account, counters[i]));
        if (!value || PyDict_SetItemString(dict, names[i], value))
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

#define COUNTER_NAME(name, text) #name,
static const char *const worker_counter_names[] = {SHM_WORKER_COUNTERS(COUNTER_NAME)};

/* Of each kind of connection: how many there have been, are there, and of those are idle, and leased or offered. */
struct kinds {
    uint64_t created[SHM_BUCKETS];
    uint32_t open[SHM_BUCKETS], idle[SHM_BUCKETS], active[SHM_BUCKETS];
};

/* One slot's row; `word`, its account and what that says of the word's state belong to one moment, and so do the fields, or, of a slot that never stands
 * still, they are as they are after a few tries. */
struct slot_seen {
    uint64_t word, mark, fields[6], peer[3];
    uint32_t kind;
    struct account account;
};

enum { TRIES_WHOLE = 4, TRIES_ACCOUNT = 64 };

static void slot_see(struct slab *slab, uint32_t index, struct slot_seen *seen)
{
    struct slot_shm *row = &slab->slots[index];
    for (int tries = 0; tries < TRIES_ACCOUNT; tries++) {
        uint64_t lives = account_lives(&slab->accounts[index]);
        seen->word = slot_load(row);
        a64_shm *const from[] = {&row->connection, &row->created_ns, &row->last_used_ns, &row->leased_ns, &row->uses,
                                 &row->checked_ns};
        for (int i = 0; i < 6; i++)
            seen->fields[i] = SHM_LOAD_ACQUIRE(snapshot, *from[i]);
        for (int i = 0; i < 3; i++)
            seen->peer[i] = SHM_LOAD_ACQUIRE(snapshot, row->peer[i]);
        seen->kind = SHM_LOAD_ACQUIRE(snapshot, row->kind);
        seen->mark = SHM_LOAD_ACQUIRE(snapshot, row->mark);
        bool stood = slot_load(row) == seen->word;
        if (account_read(&slab->accounts[index], lives, &seen->account) && (stood || tries >= TRIES_WHOLE))
            return;
    }
}

/* A dial that has just been counted, and whose slot says so the next moment, is not there yet. */
static void slot_count(struct kinds *kinds, const struct slot_seen *seen)
{
    enum slot_state state = slot_state(seen->word);
    unsigned open = seen->account.open;
    for (unsigned i = 0; i < SHM_BUCKETS; i++)
        kinds->created[i] += seen->account.begun[i];
    if (open == SHM_BUCKETS)
        return;
    kinds->created[open] -= state == SLOT_DIALING;
    kinds->open[open] += state != SLOT_DIALING;
    kinds->idle[open] += state == SLOT_IDLE;
    kinds->active[open] += state == SLOT_OFFERED || (state == SLOT_LEASED && !(seen->kind & SHM_KIND_SHOWN));
}

/* The bits of shmpool/stats.py's _FLAGS. Of a dial kind has the buckets that are wanted. */
static uint32_t slot_flags(const struct slot_seen *seen)
{
    bool is_overdue = slot_state(seen->word) == SLOT_LEASED && seen->mark == seen->word;
    return slot_state(seen->word) == SLOT_DIALING ? 0 : (seen->kind >> 8 & 7) | (uint32_t)is_overdue << 3;
}

static PyObject *slot_tuple(uint32_t index, const struct slot_seen *seen)
{
    enum slot_state state = slot_state(seen->word);
    const uint64_t *fields = seen->fields;
    return Py_BuildValue("IsiKIy#KKKKIK", index, slot_state_name(state == SLOT_LEASED && seen->kind & SHM_KIND_SHOWN ? SLOT_DIALING : state),
                         (int)slot_owner(seen->word) - 1, (unsigned long long)fields[0], kind_bucket(seen->kind), (const char *)seen->peer,
                         (Py_ssize_t)sizeof seen->peer, (unsigned long long)fields[1], (unsigned long long)fields[2],
                         (unsigned long long)fields[3], (unsigned long long)fields[4],
                         slot_flags(seen),
                         (unsigned long long)fields[5]);
}

static PyObject *slot_list(struct slab *slab, struct kinds *kinds)
{
    uint32_t bound = steering_bound(slab);
    PyObject *list = PyList_New(bound);
    for (uint32_t i = 0; list && i < bound; i++) {
        struct slot_seen seen = {0};
        slot_see(slab, i, &seen);
        slot_count(kinds, &seen);
        PyObject *row = slot_tuple(i, &seen);
        if (row)
            PyList_SET_ITEM(list, i, row);
        else
            Py_CLEAR(list);
    }
    return list;
}

/* [(created, open, idle, active), ...] by bucket */
static PyObject *kind_list(const struct kinds *kinds)
{
    PyObject *list = PyList_New(SHM_BUCKETS);
    for (Py_ssize_t i = 0; list && i < (Py_ssize_t)SHM_BUCKETS; i++) {
        PyObject *row = Py_BuildValue("KIII", (unsigned long long)kinds->created[i], kinds->open[i], kinds->idle[i], kinds->active[i]);
        if (row)
            PyList_SET_ITEM(list, i, row);
        else
            Py_CLEAR(list);
    }
    return list;
}

/* `fd` tells who is alive; -1 (cannot tell) counts as alive. */
static PyObject *worker_list(struct slab *slab, int fd)
{
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list && i < slab->layout.max_workers; i++) {
        struct worker_shm *row = &slab->workers[i];
        if (!SHM_LOAD(hint, row->generation))
            continue;
        bool active = SHM_LOAD_ACQUIRE(worker, row->state) == SHM_WORKER_ACTIVE;
        bool alive = active && (fd < 0 || byte_is_locked(fd, i));
        PyObject *tuple = Py_BuildValue(
            "IINKKNNN", i, SHM_LOAD(hint, row->pid), PyBool_FromLong(alive), (unsigned long long)SHM_LOAD(hint, row->started_ns),
            (unsigned long long)SHM_LOAD(hint, row->generation), counter_dict(row->counters, worker_counter_names, SHM_W_COUNT),
            hist_list(&row->get), hist_list(&row->use));
        if (!tuple || PyList_Append(list, tuple))
            Py_CLEAR(list);
        Py_XDECREF(tuple);
    }
    return list;
}

static PyObject *waiter_list(struct slab *slab)
{
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list && i < slab->layout.max_waiters; i++) {
        uint64_t word = SHM_LOAD_SEQ(queue, slab->waiter_words[i]);
        if (waiter_state(word) != WAITER_WAITING && waiter_state(word) != WAITER_MATCHED)
            continue;
        PyObject *tuple = Py_BuildValue("IiIIKs", i, (int)waiter_owner(word) - 1, SHM_LOAD(hint, slab->waiters[i].tid),
                                        waiter_mask(word), (unsigned long long)SHM_LOAD(hint, slab->waiters[i].since_ns),
                                        waiter_state(word) == WAITER_WAITING ? "waiting" : "matched");
        if (!tuple || PyList_Append(list, tuple))
            Py_CLEAR(list);
        Py_XDECREF(tuple);
    }
    return list;
}

/* {"state", "step", "retry_ns", "since_ns", "failures", "error"} */
static PyObject *upstream_dict(struct slab *slab)
{
    char text[SHM_ERROR_BYTES];
    struct header_shm *header = slab->header;
    uint64_t word = SHM_LOAD_SEQ(upstream, header->upstream);
    upstream_error(slab, text);
    return Py_BuildValue("{sssIsKsKsKsN}", "state", upstream_state_name(upstream_state(word)), "step", upstream_step(word), "retry_ns",
                         (unsigned long long)upstream_retry_ns(word), "since_ns",
                         (unsigned long long)SHM_LOAD(hint, header->upstream_since_ns), "failures",
                         (unsigned long long)SHM_LOAD(hint, header->upstream_failures), "error",
                         PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace"));
}

static bool put_number(PyObject *dict, const char *name, uint64_t number)
{
    PyObject *value = PyLong_FromUnsignedLongLong(number);
    bool done = value && !PyDict_SetItemString(dict, name, value);
    Py_XDECREF(value);
    return done;
}

/* The counters of the whole pool, `created` among them, and the slots, as two new references. What counts ends is read before the slots, and
 * what counts begins after them: nobody is seen to have ended who was not seen to begin. */
static bool lives_build(struct slab *slab, struct kinds *kinds, PyObject **totals, PyObject **slots)
{
    *totals = counter_dict(slab->totals->counters, total_names, SHM_T_COUNT);
    *slots = *totals ? slot_list(slab, kinds) : NULL;
    uint64_t created = 0;
    for (unsigned i = 0; i < SHM_BUCKETS; i++)
        created += kinds->created[i];
    return *slots && put_number(*totals, "created", created) &&
           put_number(*totals, total_names[SHM_T_dial_attempts], SHM_LOAD_ACQUIRE(account, slab->totals->counters[SHM_T_dial_attempts]));
}

/* A text of the header, up to its end or that of its field. */
#define TEXT(field) PyUnicode_DecodeUTF8(field, (Py_ssize_t)strnlen(field, sizeof field), "replace")

/* The most that resize() can make of the cap. */
static uint32_t most_connections(const struct slab *slab)
{
    uint32_t slots = slab->layout.max_slots, reserved = slab->header->listening ? SERVICE_RESERVED : 0;
    return slots > reserved ? slots - reserved : 0;
}

PyObject *snapshot_build(struct slab *slab, int fd)
{
    struct header_shm *header = slab->header;
    struct kinds kinds = {0};
    PyObject *totals, *slots;
    if (!lives_build(slab, &kinds, &totals, &slots)) {
        Py_XDECREF(totals);
        Py_XDECREF(slots);
        return NULL;
    }
    return Py_BuildValue(
        "{sNsNsNsIsIsdsKsssIsIsIsIsK sK sN s(III) sN sN sN s(ssssssssssss) sN s(ssssssss) sN s(ssssss) sN sN}", "name", TEXT(header->name),
        "target", TEXT(header->target), "config", TEXT(header->config), "uid", header->creator_uid, "creator_pid", header->creator_pid, "created_at",
        (double)header->created_realtime_ns / 1e9, "now", (unsigned long long)clock_now(), "state",
        steering_state_name(steering_now(slab)), "max_connections", steering_cap(slab), "resize_limit",
        most_connections(slab), "max_workers", slab->layout.max_workers, "max_waiters", slab->layout.max_waiters, "size",
        (unsigned long long)slab->layout.total_size, "maintained_ns", (unsigned long long)SHM_LOAD(hint, header->maintained_ns), "upstream",
        upstream_dict(slab), "prewarm", SHM_LOAD(hint, header->prewarm_created),
        SHM_LOAD(hint, header->prewarm_failed), SHM_LOAD(hint, header->prewarm_done), "totals", totals, "kinds", kind_list(&kinds),
        "slots", slots, "slot_fields", "index", "state", "owner", "id", "bucket", "peer", "created_ns", "last_used_ns", "leased_ns", "uses",
        "flags", "checked_ns", "workers", worker_list(slab, fd), "worker_fields", "index", "pid", "alive", "started_ns", "generation",
        "counters", "get_hist", "use_hist", "waiters", waiter_list(slab), "waiter_fields", "index", "worker", "tid", "mask", "since_ns",
        "state", "wait_hist", hist_list(&slab->totals->wait), "dial_hist", hist_list(&slab->totals->dial));
}

/* ---- SlabView ---- */

typedef struct {
    PyObject_HEAD
    struct slab slab;
    void *base; /* NULL: closed */
    size_t size;
    int fd;
    bool writable;
    volatile sig_atomic_t cut; /* by look_on_bus_error(): what is mapped is not the segment any more */
} ViewObject;

/* ---- a segment that is cut while somebody looks ---- */

/* A file may be cut at any moment, also between a check of its size and the next load, which would be a SIGBUS then and the end of the process. So
 * for the time of a look SIGBUS is ours: the handler puts zeroes in place of the mapping, the look goes on, and is thrown away at its end. Source:
 * wl_shm_buffer_begin_access() of libwayland. Per thread; innermost first, because a finalizer that runs during a look may look as well. */
struct look {
    ViewObject *view;
    struct look *outer;
};

static _Thread_local struct look *looking;
static struct sigaction before_looks; /* what SIGBUS did; forks_hold() guards it, */
static unsigned looks;                /* and how many are under way in this process */

static void look_on_bus_error(int number, siginfo_t *info, void *context)
{
    (void)context;
    int error = errno;
    for (struct look *look = looking; look; look = look->outer) {
        ViewObject *view = look->view;
        if ((uintptr_t)info->si_addr - (uintptr_t)view->base >= view->size)
            continue;
        view->cut = mmap(view->base, view->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == view->base;
        errno = error;
        if (view->cut)
            return;
    }
    sigaction(number, &before_looks, NULL); /* not ours: a fault comes again when this returns, */
    if (info->si_code <= 0)                 /* a signal that was sent does not */
        raise(number);
}

static void look_begin(struct look *look, ViewObject *view)
{
    struct sigaction ours = {.sa_sigaction = look_on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    forks_hold();
    if (!looks++)
        sigaction(SIGBUS, &ours, &before_looks);
    *look = (struct look){view, looking};
    looking = look;
    forks_release();
}

static void look_end(struct look *look)
{
    forks_hold();
    looking = look->outer;
    if (!--looks)
        sigaction(SIGBUS, &before_looks, NULL);
    forks_release();
}

/* ValueError(what is wrong, whether it is a matter of versions) */
PyObject *raise_bad_slab(enum slab_verdict verdict)
{
    PyObject *evidence = Py_BuildValue("sN", slab_verdict_text(verdict), PyBool_FromLong(verdict == SLAB_FOREIGN_VERSION ||
                                                                                         verdict == SLAB_FOREIGN_FORMAT));
    if (evidence)
        PyErr_SetObject(PyExc_ValueError, evidence);
    Py_XDECREF(evidence);
    return NULL;
}

static bool is_utf8(const char *text, size_t size)
{
    PyObject *decoded = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strnlen(text, size), NULL);
    PyErr_Clear();
    Py_XDECREF(decoded);
    return decoded != NULL;
}

/* Take what is mapped at `base`, if it is a slab; else unmap it. The target may have been cut in the middle of a character. */
static enum slab_verdict view_check(ViewObject *self, void *base, size_t size)
{
    struct look look;
    self->base = base;
    self->size = size;
    look_begin(&look, self);
    enum slab_verdict verdict = slab_open(&self->slab, base, size);
    struct header_shm *header = base;
    if (verdict == SLAB_OK && !(is_utf8(header->name, sizeof header->name) && is_utf8(header->config, sizeof header->config) &&
                                is_utf8(header->rendezvous, sizeof header->rendezvous)))
        verdict = SLAB_BAD_TEXT;
    look_end(&look);
    if (self->cut)
        verdict = SLAB_TOO_SMALL;
    if (verdict != SLAB_OK) {
        munmap(base, size);
        self->base = self->slab.header = NULL;
    }
    return verdict;
}

/* SlabView(fd, writable=False): map the segment of `fd` and check it. The view keeps a duplicate of the descriptor. */
static int view_init(ViewObject *self, PyObject *args, PyObject *names)
{
    static char *known[] = {"fd", "writable", NULL};
    int fd, writable = 0;
    struct stat status;
    if (!PyArg_ParseTupleAndKeywords(args, names, "i|$p:SlabView", known, &fd, &writable))
        return -1;
    if (self->base) {
        PyErr_SetString(PyExc_RuntimeError, "a SlabView is opened once");
        return -1;
    }
    if (fstat(fd, &status)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    enum slab_verdict verdict = SLAB_TOO_SMALL;
    if (status.st_size >= SHM_HEADER_BYTES) {
        void *base = mmap(NULL, (size_t)status.st_size, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
        if (base == MAP_FAILED) {
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        verdict = view_check(self, base, (size_t)status.st_size);
    }
    if (verdict != SLAB_OK) {
        raise_bad_slab(verdict);
        return -1;
    }
    if ((self->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3)) < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        munmap(self->base, self->size);
        self->base = NULL;
        return -1;
    }
    self->writable = writable != 0;
    return 0;
}

/* Is the mapping there and whole? An exception, in place of any that is set, when not. */
static bool view_is_whole(ViewObject *self)
{
    struct stat status;
    if (!self->base)
        return PyErr_Format(PyExc_ValueError, "the view is closed") != NULL;
    if (self->cut || fstat(self->fd, &status))
        return PyErr_Format(PyExc_ValueError, "the segment was cut while it was read") != NULL;
    if ((uint64_t)status.st_size < self->size)
        return PyErr_Format(PyExc_ValueError, "the segment was cut to %lld bytes", (long long)status.st_size) != NULL;
    return true;
}

typedef PyObject *(*view_take)(ViewObject *, PyObject *);

/* What `take` finds, if the segment is whole before and after. */
static PyObject *view_look(ViewObject *self, view_take take, PyObject *args)
{
    struct look look;
    if (!view_is_whole(self))
        return NULL;
    look_begin(&look, self);
    PyObject *found = take(self, args);
    look_end(&look);
    if (!view_is_whole(self))
        Py_CLEAR(found);
    return found;
}

/* Of view_x_whole(), which reads the segment: view_x(), which anybody may call. */
#define LOOK(x) static PyObject *view_##x(ViewObject *self, PyObject *args) { return view_look(self, view_##x##_whole, args); }

static PyObject *view_snapshot_whole(ViewObject *self, PyObject *unused)
{
    (void)unused;
    return snapshot_build(&self->slab, self->fd);
}

static const char *const event_names[] = {
#define EVENT_NAME(name, text) #name,
    SHM_EVENT_KINDS(EVENT_NAME)};

static const char *reason_name(const struct event *event)
{
    if (event->kind == EVENT_closed && event->reason >= SHM_T_closed_broken && event->reason <= SHM_T_closed_revoked)
        return total_names[event->reason] + sizeof "closed_" - 1;
    if (event->kind == EVENT_state && event->reason <= SHM_POOL_CLOSED)
        return steering_state_name((enum pool_state)event->reason);
    return "";
}

static PyObject *event_tuple(uint64_t number, const struct event *event)
{
    return Py_BuildValue("KssdKiIKN", (unsigned long long)number, event_names[event->kind], reason_name(event), (double)event->time_ns / 1e9,
                         (unsigned long long)event->connection, event->slot == EVENT_NO_SLOT ? -1 : (int)event->slot, event->pid,
                         (unsigned long long)event->value, PyUnicode_DecodeUTF8(event->text, (Py_ssize_t)strlen(event->text), "ignore"));
}

PyObject *events_build(const struct slab *slab, uint64_t first, bool patient)
{
    PyObject *list = PyList_New(0);
    uint64_t count = event_count(slab), next = first < count ? first : count, lost = 0;
    if (count - next > SHM_EVENTS) {
        lost = count - SHM_EVENTS - next;
        next = count - SHM_EVENTS;
    }
    for (; list && next < count; next++) {
        struct event event;
        enum event_found found = event_read(slab, next, &event);
        if (found == EVENT_BEGUN && patient)
            break;
        if (found != EVENT_WHOLE) {
            lost++;
            continue;
        }
        PyObject *tuple = event_tuple(next, &event);
        if (!tuple || PyList_Append(list, tuple))
            Py_CLEAR(list);
        Py_XDECREF(tuple);
    }
    return list ? Py_BuildValue("KKN", (unsigned long long)next, (unsigned long long)lost, list) : NULL;
}

/* events(first, patient) -> (next, lost, [event, ...]): see events_build() */
static PyObject *view_events_whole(ViewObject *self, PyObject *args)
{
    unsigned long long first;
    int patient;
    if (!PyArg_ParseTuple(args, "Kp:events", &first, &patient))
        return NULL;
    return events_build(&self->slab, first, patient != 0);
}

/* capacity() -> slots: as many mailboxes does each member need. */
static PyObject *view_capacity(ViewObject *self, PyObject *unused)
{
    (void)unused;
    if (!self->base)
        return PyErr_Format(PyExc_ValueError, "the view is closed");
    return PyLong_FromUnsignedLong(self->slab.layout.max_slots);
}

/* identity() -> (id, name, config, rendezvous, listener's inode, creator's pid, open?): what never changes, and whether the pool is open. */
static PyObject *view_identity_whole(ViewObject *self, PyObject *unused)
{
    (void)unused;
    struct header_shm *header = self->slab.header;
    return Py_BuildValue("y#NNNKIN", header->id, (Py_ssize_t)sizeof header->id, TEXT(header->name), TEXT(header->config), TEXT(header->rendezvous),
                         (unsigned long long)header->listener_inode, header->creator_pid, PyBool_FromLong(steering_now(&self->slab) != SHM_POOL_CLOSED));
}

/* mailboxes() -> [inode of each slot's mailbox] */
static PyObject *view_mailboxes_whole(ViewObject *self, PyObject *unused)
{
    (void)unused;
    PyObject *list = PyList_New(self->slab.layout.max_slots);
    for (uint32_t i = 0; list && i < self->slab.layout.max_slots; i++) {
        PyObject *inode = PyLong_FromUnsignedLongLong(self->slab.slots[i].mailbox_inode);
        if (inode)
            PyList_SET_ITEM(list, i, inode);
        else
            Py_CLEAR(list);
    }
    return list;
}

/* workers() -> [pid of each living member] */
static PyObject *view_workers_whole(ViewObject *self, PyObject *unused)
{
    (void)unused;
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list && i < self->slab.layout.max_workers; i++) {
        struct worker_shm *row = &self->slab.workers[i];
        if (SHM_LOAD_ACQUIRE(worker, row->state) != SHM_WORKER_ACTIVE || !byte_is_locked(self->fd, i))
            continue;
        PyObject *pid = PyLong_FromUnsignedLong(SHM_LOAD(hint, row->pid));
        if (!pid || PyList_Append(list, pid))
            Py_CLEAR(list);
        Py_XDECREF(pid);
    }
    return list;
}

/* in_use() -> bool: does any process still hold this slab? */
static PyObject *view_in_use(ViewObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(self->base && byte_is_locked(self->fd, SHM_FAMILY_BYTE));
}

/* members() -> [(index, generation, pid, alive)]: every process that has a place. One that is not alive has not been swept yet. */
static PyObject *view_members_whole(ViewObject *self, PyObject *unused)
{
    (void)unused;
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list && i < self->slab.layout.max_workers; i++) {
        struct worker_shm *row = &self->slab.workers[i];
        if (SHM_LOAD_ACQUIRE(worker, row->state) != SHM_WORKER_ACTIVE)
            continue;
        PyObject *tuple = Py_BuildValue("IKIN", i, (unsigned long long)SHM_LOAD(hint, row->generation), SHM_LOAD(hint, row->pid),
                                        PyBool_FromLong(byte_is_locked(self->fd, i)));
        if (!tuple || PyList_Append(list, tuple))
            Py_CLEAR(list);
        Py_XDECREF(tuple);
    }
    return list;
}

/* maintained() -> bool: is a process elected to look after the pool? */
static PyObject *view_maintained(ViewObject *self, PyObject *unused)
{
    (void)unused;
    return view_is_whole(self) ? PyBool_FromLong(byte_is_locked(self->fd, SHM_MAINTAINER_BYTE)) : NULL;
}

/* limits() -> (cap, the most that resize() can make of it) */
static PyObject *view_limits_whole(ViewObject *self, PyObject *unused)
{
    (void)unused;
    return Py_BuildValue("II", steering_cap(&self->slab), most_connections(&self->slab));
}

/* ---- steering from outside ---- */

/* The slab of a view that may write; NULL with an exception. */
static struct slab *view_to_steer(ViewObject *self)
{
    if (self->writable)
        return &self->slab;
    PyErr_SetString(PyExc_ValueError, "the view is read-only");
    return NULL;
}

/* steer(state) -> bool: "open", "paused", "draining" or "closed"; False: it is so already, or closed */
static PyObject *view_steer_whole(ViewObject *self, PyObject *args)
{
    const char *name;
    struct slab *slab = view_to_steer(self);
    if (!slab || !PyArg_ParseTuple(args, "s:steer", &name))
        return NULL;
    enum pool_state state;
    if (!steering_state_named(name, &state))
        return PyErr_Format(PyExc_ValueError, "no pool is %s", name);
    return PyBool_FromLong(steering_state(slab, state));
}

/* resize(cap) -> int: what it was */
static PyObject *view_resize_whole(ViewObject *self, PyObject *args)
{
    unsigned cap;
    struct slab *slab = view_to_steer(self);
    if (!slab || !PyArg_ParseTuple(args, "I:resize", &cap))
        return NULL;
    if (!cap || cap > slab->layout.max_slots)
        return PyErr_Format(PyExc_ValueError, "a pool of %u slots cannot have %u connections", slab->layout.max_slots, cap);
    return PyLong_FromUnsignedLong(steering_resize(slab, cap));
}

/* evict(connection or 0, peer or b"", leased) -> int: condemn what fits both; how many */
static PyObject *view_evict_whole(ViewObject *self, PyObject *args)
{
    unsigned long long connection;
    const char *peer;
    Py_ssize_t peer_size;
    int leased;
    struct slab *slab = view_to_steer(self);
    if (!slab || !PyArg_ParseTuple(args, "Ky#p:evict", &connection, &peer, &peer_size, &leased))
        return NULL;
    return PyLong_FromUnsignedLong(steering_evict(slab, connection, peer, (size_t)peer_size, leased != 0));
}

static PyObject *view_close(ViewObject *self, PyObject *unused)
{
    (void)unused;
    if (self->base) {
        munmap(self->base, self->size);
        close(self->fd);
        self->base = NULL;
    }
    Py_RETURN_NONE;
}

static void view_dealloc(ViewObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(view_close(self, NULL));
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

LOOK(snapshot)
LOOK(events)
LOOK(identity)
LOOK(mailboxes)
LOOK(workers)
LOOK(members)
LOOK(limits)
LOOK(steer)
LOOK(resize)
LOOK(evict)

static PyMethodDef view_methods[] = {
    {"snapshot", FASTCALL(view_snapshot), METH_NOARGS, PyDoc_STR("snapshot() -> dict")},
    {"events", FASTCALL(view_events), METH_VARARGS, PyDoc_STR("events(first, patient) -> (next, lost, [(number, kind, reason, time, connection, slot, pid, value, text)])")},
    {"capacity", FASTCALL(view_capacity), METH_NOARGS, PyDoc_STR("capacity() -> slots")},
    {"identity", FASTCALL(view_identity), METH_NOARGS, PyDoc_STR("identity() -> (id, name, config, rendezvous, listener's inode, creator's pid, open)")},
    {"mailboxes", FASTCALL(view_mailboxes), METH_NOARGS, PyDoc_STR("mailboxes() -> [inode of each slot's mailbox]")},
    {"workers", FASTCALL(view_workers), METH_NOARGS, PyDoc_STR("workers() -> [pid of each living member]")},
    {"in_use", FASTCALL(view_in_use), METH_NOARGS, PyDoc_STR("in_use() -> bool: does any process still hold the slab?")},
    {"members", FASTCALL(view_members), METH_NOARGS, PyDoc_STR("members() -> [(index, generation, pid, alive)] of who has a place")},
    {"maintained", FASTCALL(view_maintained), METH_NOARGS, PyDoc_STR("maintained() -> bool: is a process elected to look after the pool?")},
    {"limits", FASTCALL(view_limits), METH_NOARGS, PyDoc_STR("limits() -> (cap, the most that resize() can make of it)")},
    {"steer", FASTCALL(view_steer), METH_VARARGS, PyDoc_STR("steer(state) -> bool: False: it is so already, or closed")},
    {"resize", FASTCALL(view_resize), METH_VARARGS, PyDoc_STR("resize(cap) -> int: what it was")},
    {"evict", FASTCALL(view_evict), METH_VARARGS, PyDoc_STR("evict(connection or 0, peer or b\"\", leased) -> int: how many were condemned")},
    {"close", FASTCALL(view_close), METH_NOARGS, PyDoc_STR("close() -> None")},
    {NULL},
};
static PyType_Slot view_slots[] = {
    {Py_tp_init, view_init},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_methods, view_methods},
    {Py_tp_doc, (void *)PyDoc_STR("SlabView(fd, *, writable=False): a look at a slab, or a hand on it; ValueError((why, is_version)) when it is none.")},
    {0, NULL},
};
PyType_Spec view_spec = {"shmpool._core.SlabView", sizeof(ViewObject), 0, Py_TPFLAGS_DEFAULT, view_slots};
