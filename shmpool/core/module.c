/* module.c: the extension shmpool._core, of which only the files module*.c know Python (module.h).
 *
 *   PoolBase           one process's pool: get() and its variants in C from end to end; falls into Python (methods of its
 *                      subclass shmpool.Pool) for dialling, wrapping a descriptor, hooks and the making of errors
 *   PooledConnection   one lease
 *   SlabView           a read-only look at a slab (module_view.c)
 *
 * What the subclass provides: _dial(mask, left, slot, id, timeout, attempt, upstream) -> (socket, mark, fd, bucket, private, mailed, lifetime,
 * peer, metadata); _wrap(fd, bucket) -> (socket, mark); _restore(socket) -> bool; _peer(bucket, address, socket); _error(kind, mask, waited,
 * timeout) -> exception; _refused(cause, attempt, upstream) -> exception; _ended(rows), _joined(), _upstream_is_up(), _forget_thread(): to be told.
 *
 * Threads: with the GIL all of this is serialised except where it is released (sleeping, dialling, ending connections). Without it
 * (free-threaded builds) what belongs to a slot is touched only by the thread that holds the slot, and a lease belongs to the
 * thread that uses it. Fork: every entry first looks at the page that a fork wipes (worker.h).
 *
 * Not here: any decision about slots (pool.c).
 */
#include "module.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "connection.h"
#include "events.h"
#include "recovery.h"
#include "segment.h"
#include "service.h"

enum { SPARE_LEASES = 8, LATE_LOOKS = 4 };
#define ADOPTED_PATIENCE_NS UINT64_C(200000000) /* a dial of another process that takes longer may be one that is stopped */

PyTypeObject *lease_type;
static PyTypeObject *pool_type, *view_type;
#ifndef Py_GIL_DISABLED
static LeaseObject *spares; /* dead leases to be used again; the GIL guards them */
static int spare_count;
#endif
static PyObject *pool_closed, *pool_exhausted, *dial_error; /* of shmpool.errors */

/* ---- small helpers ---- */

/* Seconds as a Python float (or int, None) to nanoseconds; false with an exception set. inf is NEVER. */
bool seconds_ns(PyObject *value, const char *what, uint64_t *ns)
{
    double seconds = PyFloat_AsDouble(value);
    if (seconds == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            PyErr_Format(PyExc_TypeError, "%s must be seconds as a number, not %R", what, value);
        return false;
    }
    if (!(seconds >= 0)) {
        PyErr_Format(PyExc_ValueError, "%s must be seconds >= 0, not %R", what, value);
        return false;
    }
    *ns = seconds >= 9e9 ? NEVER : (uint64_t)(seconds * 1e9);
    return true;
}

/* Raise what self._error(kind, ...) makes; `cause` may be NULL. */
PyObject *raise_error(PoolObject *self, const char *kind, uint32_t mask, uint64_t waited_ns, uint64_t timeout_ns)
{
    double timeout = timeout_ns == NEVER ? Py_HUGE_VAL : (double)timeout_ns / 1e9;
    PyObject *error = PyObject_CallMethod((PyObject *)self, "_error", "sIdd", kind, (unsigned)mask, (double)waited_ns / 1e9,
                                          timeout);
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return NULL;
}

/* The arguments of a call by place or by name: values[i] is that of names[i], None when it was not given. */
static bool parse_call(const char *function, const char *const *known, int most, PyObject *const *args, Py_ssize_t count,
                       PyObject *names, PyObject **values)
{
    for (int i = 0; i < most; i++)
        values[i] = i < count ? args[i] : NULL;
    if (count > most)
        return PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments (%zd given)", function, most, count) != NULL;
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); i++) {
        PyObject *name = PyTuple_GET_ITEM(names, i);
        int at = 0;
        while (at < most && PyUnicode_CompareWithASCIIString(name, known[at]))
            at++;
        if (at == most || values[at])
            return PyErr_Format(PyExc_TypeError, "%s() got %s argument %R", function,
                                at == most ? "an unexpected" : "a repeated", name) != NULL;
        values[at] = args[count + i];
    }
    for (int i = 0; i < most; i++)
        values[i] = values[i] ? values[i] : Py_None;
    return true;
}

/* ---- leases ---- */

LeaseObject *lease_new(PoolObject *self, const struct pool_claim *claim, uint32_t weight, uint64_t begun_ns)
{
    LeaseObject *lease;
#ifndef Py_GIL_DISABLED
    if (SHM_LIKELY(spares != NULL)) {
        lease = spares;
        spares = lease->next;
        spare_count--;
        PyObject_Init((PyObject *)lease, lease_type);
    } else
#endif
        lease = PyObject_New(LeaseObject, lease_type);
    if (!lease)
        return NULL;
    lease->owner = (PoolObject *)Py_NewRef((PyObject *)self);
    lease->claim = *claim;
    lease->entry = &self->pool.entries[claim->slot];
    lease->weight = weight;
    lease->begun_ns = begun_ns;
    lease->generation = self->pool.generation;
    lease->id = lease->entry->connection;
    lease->active = true;
    lease->returning = lease->shown = false;
    return lease;
}

/* What a revoked lease's holder may have in use: kept until the lease object ends. Keeps a pending exception. */
void revoked_keep(PoolObject *self, const struct pool_claim *claim, PyObject *socket, PyObject *session)
{
    if (!self->revoked)
        self->revoked = PyDict_New();
    PyObject *key = self->revoked ? Py_BuildValue("IK", claim->slot, (unsigned long long)claim->word) : NULL;
    PyObject *kept = key ? PyTuple_Pack(2, socket ? socket : Py_None, session ? session : Py_None) : NULL;
    if (!kept || PyDict_SetItem(self->revoked, key, kept))
        PyErr_WriteUnraisable((PyObject *)self);
    Py_XDECREF(kept);
    Py_XDECREF(key);
}

static void revoked_forget(PoolObject *self, const struct pool_claim *claim)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *key = Py_BuildValue("IK", claim->slot, (unsigned long long)claim->word);
    if (!key || (PyDict_DelItem(self->revoked, key) && !PyErr_ExceptionMatches(PyExc_KeyError)))
        PyErr_WriteUnraisable((PyObject *)self);
    PyErr_Clear();
    Py_XDECREF(key);
    PyErr_Restore(type, value, traceback);
}

/* The lease is over. This may end the pool object: nothing of it is touched afterwards. */
void lease_end(LeaseObject *lease)
{
    PoolObject *owner = lease->owner;
    lease->active = false;
    lease->owner = NULL;
    if (SHM_UNLIKELY(owner && owner->revoked != NULL))
        revoked_forget(owner, &lease->claim);
    Py_XDECREF((PyObject *)owner);
}

static struct slot_shm *lease_row(LeaseObject *lease) { return &lease->owner->pool.slab.slots[lease->claim.slot]; }

/* Is the lease of this process and not given back? */
static inline bool lease_is_ours(LeaseObject *lease)
{
    if (SHM_UNLIKELY(!lease->active))
        return false;
    struct pool *pool = &lease->owner->pool;
    return SHM_LIKELY(pool_joined(pool) && lease->generation == pool->generation);
}

static PyObject *lease_refuse(LeaseObject *lease)
{
    if (!lease->active)
        return raise_expired(lease->id, "the lease is over (released, discarded or retired)");
    if (lease->shown && lease_is_ours(lease))
        return raise_expired(lease->id, "it is shown to on_created or a health check, which says by its return what becomes of it");
    return raise_expired(lease->id, lease_is_ours(lease) ? "it was taken away"
                                                   : "it belongs to another process (a fork), or this one has left the pool");
}

/* May the lease be used? Also sees that it was taken away. */
static inline bool lease_usable(LeaseObject *lease)
{
    if (SHM_LIKELY(lease_is_ours(lease) && slot_load(lease_row(lease)) == lease->claim.word))
        return true;
    lease_refuse(lease);
    return false;
}

static bool run_hook(PyObject *hook, LeaseObject *lease)
{
    PyObject *result = PyObject_CallOneArg(hook, (PyObject *)lease);
    Py_XDECREF(result);
    return result != NULL;
}

static inline void count_source(struct pool *pool, enum pool_source source);

/* The lease begins: figures, hook. NULL with an exception: the hook refused; the connection is retired. NULL without: it took so long that the lease
 * was taken away meanwhile; search on. */
static PyObject *lease_begin(PoolObject *self, LeaseObject *lease, uint64_t now, enum pool_source source)
{
    struct slot_shm *row = lease_row(lease);
    SHM_STORE(row, row->leased_ns, now);
    SHM_STORE(row, row->uses, SHM_LOAD(row, row->uses) + 1);
    if (SHM_UNLIKELY(self->on_borrow != NULL)) {
        bool is_welcome = run_hook(self->on_borrow, lease), is_ours = lease_is_ours(lease); /* else the hook has ended it, or forked */
        bool was_taken = is_ours && slot_load(row) != lease->claim.word;
        if (was_taken && !is_welcome && PyErr_ExceptionMatches(lease_expired))
            PyErr_Clear();
        if (!is_welcome || was_taken) {
            if (is_ours) {
                lease->active = false;
                retire_leased(self, &lease->claim, SHM_T_closed_refused);
            }
            Py_DECREF(lease);
            return NULL;
        }
    }
    count_source(&self->pool, source);
    return (PyObject *)lease;
}

/* End the lease by retiring its connection. */
static bool lease_discard_as(LeaseObject *lease, unsigned reason)
{
    lease->active = false;
    pool_count(&lease->owner->pool, SHM_W_errors, 1);
    bool ours = retire_leased(lease->owner, &lease->claim, reason);
    lease_end(lease);
    return ours;
}

/* Put the socket's mode back; false when it is not fit for the next holder (or an exception is set). */
static bool lease_restore(LeaseObject *lease)
{
    PyObject *result = PyObject_CallMethod((PyObject *)lease->owner, "_restore", "O", lease->entry->socket);
    bool good = result == Py_True;
    Py_XDECREF(result);
    return good;
}

static void lease_time_use(LeaseObject *lease)
{
    if (lease->weight)
        hist_add(&lease->owner->pool.row->use, clock_now() - lease->begun_ns, lease->weight);
}

/* The slow part of a release: something was changed, or somebody wants to know. False: it is over, perhaps with an exception.
 * Both calls run Python, in which the lease may be given back, or the process fork: each is followed by a look. */
static bool lease_prepare_return(LeaseObject *lease)
{
    if (!lease_usable(lease))
        return false;
    if (lease->owner->on_return && !lease->returning) {
        lease->returning = true;
        bool content = run_hook(lease->owner->on_return, lease);
        if (!content && lease_is_ours(lease))
            lease_discard_as(lease, SHM_T_closed_error);
        if (!content || !lease_is_ours(lease)) /* refused, or given back by the hook, with the whole pool perhaps */
            return false;
        if (!lease_usable(lease)) /* revoked meanwhile: the entry may be another's */
            return false;
    }
    if (*lease->entry->dirty) {
        bool good = lease_restore(lease);
        if (!lease_is_ours(lease)) {
            if (!PyErr_Occurred())
                lease_refuse(lease);
            return false;
        }
        if (!good) {
            if (!lease_discard_as(lease, SHM_T_closed_dirty) && !PyErr_Occurred())
                lease_refuse(lease);
            return false;
        }
    }
    return lease_usable(lease);
}

/* LEASED -> IDLE; in a pool that listens the connection is watched from then on, by our descriptor, which no other thread closes meanwhile. */
static enum pool_released release_claim(PoolObject *self, struct pool_claim *claim, uint64_t now_coarse)
{
    struct pool *pool = &self->pool;
    enum pool_released released;
    if (SHM_LIKELY(!pool->service))
        return pool_release(pool, claim, now_coarse);
    Py_BEGIN_CRITICAL_SECTION(self);
    released = service_release(pool, claim, now_coarse, pool->entries[claim->slot].fd);
    Py_END_CRITICAL_SECTION();
    return released;
}

static PyObject *lease_release(LeaseObject *lease, PyObject *unused)
{
    (void)unused;
    PoolObject *self = lease->owner;
    if (SHM_UNLIKELY(!lease_is_ours(lease) || lease->shown))
        return lease_refuse(lease);
    if (SHM_UNLIKELY(*lease->entry->dirty || self->on_return) && !lease_prepare_return(lease)) {
        if (PyErr_Occurred())
            return NULL;
        Py_RETURN_NONE;
    }
    lease_time_use(lease);
    lease->active = false;
    enum pool_released released = release_claim(self, &lease->claim, clock_coarse());
    if (SHM_UNLIKELY(released == RELEASE_RETIRE))
        retire_leased(self, &lease->claim, pool_retire_reason(&self->pool, lease->claim.slot));
    lease_end(lease);
    if (SHM_UNLIKELY(released == RELEASE_STALE))
        return raise_expired(lease->id, "it was taken away");
    Py_RETURN_NONE;
}

bool note_text(PyObject *from, char *text)
{
    Py_ssize_t size = 0;
    const char *utf8 = PyUnicode_AsUTF8AndSize(from, &size);
    PyErr_Clear();
    if (size >= SHM_EVENT_TEXT)
        size = SHM_EVENT_TEXT - 1;
    if (size)
        memcpy(text, utf8, (size_t)size);
    return size > 0;
}

static PyObject *lease_discard(LeaseObject *lease, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    static const char *const known[] = {"reason"};
    PyObject *reason;
    if (!parse_call("discard", known, 1, args, count, names, &reason))
        return NULL;
    if (reason != Py_None && !PyUnicode_Check(reason))
        return PyErr_Format(PyExc_TypeError, "discard() wants a text for its reason, not %R", reason);
    if (!lease_is_ours(lease) || lease->shown)
        return lease_refuse(lease);
    struct event event = {.kind = EVENT_discarded, .slot = lease->claim.slot, .connection = lease->id};
    if (reason != Py_None && note_text(reason, event.text))
        event_note(&lease->owner->pool.slab, event);
    if (!lease_discard_as(lease, SHM_T_closed_error))
        return raise_expired(lease->id, "it was taken away");
    Py_RETURN_NONE;
}

static PyObject *lease_enter(LeaseObject *lease, PyObject *unused)
{
    (void)unused;
    if (SHM_UNLIKELY(!lease_is_ours(lease)))
        return lease_refuse(lease);
    return Py_NewRef((PyObject *)lease);
}

static PyObject *lease_exit(LeaseObject *lease, PyObject *const *args, Py_ssize_t count)
{
    if (SHM_UNLIKELY(!lease->active)) /* released or discarded inside the block */
        Py_RETURN_NONE;
    if (SHM_LIKELY(count == 0 || args[0] == Py_None))
        return lease_release(lease, NULL);
    /* An exception: the protocol's state is unknown. If the lease is not ours any more, the exception says enough. */
    if (lease_is_ours(lease) && !lease->shown)
        lease_discard_as(lease, SHM_T_closed_error);
    Py_RETURN_NONE;
}

/* Dropped without release: take it back, retire it, say so. */
static void lease_finalize(LeaseObject *lease)
{
    if (!lease->active || !lease_is_ours(lease))
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    lease->active = false;
    if (lease->shown) { /* to a check that an exception has cut short */
        retire_leased(lease->owner, &lease->claim, SHM_T_closed_unhealthy);
        PyErr_Restore(type, value, traceback);
        return;
    }
    pool_count_total(&lease->owner->pool, SHM_T_leaks, 1);
    if (retire_leased(lease->owner, &lease->claim, SHM_T_closed_leaked)) {
        if (PyErr_WarnFormat(PyExc_ResourceWarning, 1,
                             "shmpool: the lease of connection %llu was dropped without release; the connection was "
                             "retired. Use `with pool.get() as conn:` or call conn.release()", (unsigned long long)lease->id))
            PyErr_WriteUnraisable((PyObject *)lease->owner);
    }
    PyErr_Restore(type, value, traceback);
}

static void lease_dealloc(LeaseObject *lease)
{
    PyTypeObject *type = Py_TYPE(lease);
    if (SHM_UNLIKELY(lease->active) && PyObject_CallFinalizerFromDealloc((PyObject *)lease) < 0)
        return; /* the code that the warning ran kept it */
    if (SHM_UNLIKELY(lease->owner != NULL))
        lease_end(lease);
#ifndef Py_GIL_DISABLED
    if (SHM_LIKELY(spare_count < SPARE_LEASES)) {
        lease->next = spares;
        spares = lease;
        spare_count++;
    } else
#endif
        PyObject_Free(lease);
    Py_DECREF(type);
}

static PyObject *lease_get_socket(LeaseObject *lease, void *unused)
{
    (void)unused;
    if (SHM_UNLIKELY(!lease_usable(lease)))
        return NULL;
    PyObject *socket = entry_socket(lease->owner, lease->claim.slot);
    return socket ? Py_NewRef(socket) : NULL;
}

static PyObject *lease_get_session(LeaseObject *lease, void *unused)
{
    (void)unused;
    if (!lease_usable(lease))
        return NULL;
    PyObject *session = lease->entry->session;
    return Py_NewRef(session ? session : Py_None);
}

static int lease_set_session(LeaseObject *lease, PyObject *value, void *unused)
{
    (void)unused;
    if (!lease_usable(lease))
        return -1;
    PyObject *old = lease->entry->session;
    lease->entry->session = value && value != Py_None ? Py_NewRef(value) : NULL;
    Py_XDECREF(old);
    return 0;
}

enum lease_field { FIELD_ID, FIELD_SLOT, FIELD_BUCKET, FIELD_PEER, FIELD_CREATED, FIELD_AGE, FIELD_USES, FIELD_NOTE };

static PyObject *lease_peer(LeaseObject *lease, unsigned bucket)
{
    struct slot_shm *row = lease_row(lease);
    uint64_t address[3];
    PyObject *socket = entry_socket(lease->owner, lease->claim.slot);
    if (!socket)
        return NULL;
    for (int i = 0; i < 3; i++)
        address[i] = SHM_LOAD(row, row->peer[i]);
    return PyObject_CallMethod((PyObject *)lease->owner, "_peer", "Iy#O", bucket, (const char *)address,
                               (Py_ssize_t)sizeof address, socket);
}

static PyObject *lease_get_field(LeaseObject *lease, void *which)
{
    if (!lease_usable(lease))
        return NULL;
    struct slot_shm *row = lease_row(lease);
    unsigned bucket = kind_bucket(SHM_LOAD(row, row->kind));
    switch ((enum lease_field)(intptr_t)which) {
    case FIELD_ID:
        return PyLong_FromUnsignedLongLong(SHM_LOAD(row, row->connection));
    case FIELD_SLOT:
        return PyLong_FromUnsignedLong(lease->claim.slot);
    case FIELD_BUCKET:
        return PyLong_FromUnsignedLong(bucket);
    case FIELD_PEER:
        return lease_peer(lease, bucket);
    case FIELD_CREATED:
        return PyFloat_FromDouble((double)SHM_LOAD(row, row->created_realtime_ns) / 1e9);
    case FIELD_AGE:
        return PyFloat_FromDouble((double)(clock_now() - SHM_LOAD(row, row->created_ns)) / 1e9);
    case FIELD_USES:
        return PyLong_FromUnsignedLongLong(SHM_LOAD(row, row->uses) - 1);
    case FIELD_NOTE:
        return Py_NewRef((PyObject *)lease->entry->note);
    }
    Py_UNREACHABLE();
}

static PyObject *lease_named_field(LeaseObject *lease, void *name)
{
    PyObject *bucket = lease_get_field(lease, (void *)FIELD_BUCKET);
    PyObject *result = bucket ? PyObject_CallMethod((PyObject *)lease->owner, (const char *)name, "O", bucket) : NULL;
    Py_XDECREF(bucket);
    return result;
}

static PyObject *lease_repr(LeaseObject *lease)
{
    const char *state = !lease->active ? "over" : lease_is_ours(lease) ? "leased" : "of another process";
    return PyUnicode_FromFormat("<shmpool.PooledConnection %llu, %s>", (unsigned long long)lease->id, state);
}

static PyObject *lease_reduce(LeaseObject *lease, PyObject *unused)
{
    (void)lease, (void)unused;
    PyErr_SetString(PyExc_TypeError, "a lease cannot be pickled: it belongs to this process. Let the other process get() one of its own");
    return NULL;
}

static PyMethodDef lease_methods[] = {
    {"release", FASTCALL(lease_release), METH_NOARGS,
     PyDoc_STR("release($self)\n--\n\nGive the connection back to the pool.\n\n"
               "The socket's mode is put back; a socket that was closed, detached or shut down has its connection retired.\n"
               "Raises LeaseExpired when the lease is over already, or belongs to another process.")},
    {"discard", FASTCALL(lease_discard), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("discard($self, reason='')\n--\n\nRetire the connection instead of giving it back.\n\n"
               "It is shut down for all processes, and its permit is free. The reason, up to 63 bytes of it, is among the pool's\n"
               "events (shmpool events).\n"
               "Raises LeaseExpired as release() does.")},
    {"__reduce__", FASTCALL(lease_reduce), METH_NOARGS, NULL},
    {"__enter__", FASTCALL(lease_enter), METH_NOARGS, NULL},
    {"__exit__", FASTCALL(lease_exit), METH_FASTCALL, NULL},
    {NULL},
};

#define FIELD(name, field, text) {name, (getter)lease_get_field, NULL, PyDoc_STR(text), (void *)(field)}
static PyGetSetDef lease_getset[] = {
    {"socket", (getter)lease_get_socket, NULL, PyDoc_STR("this process's socket.socket of the connection"), NULL},
    {"session", (getter)lease_get_session, (setter)lease_set_session,
     PyDoc_STR("any object of this process for this connection; None until set; dropped with the connection"), NULL},
    FIELD("id", FIELD_ID, "number of the connection, unique in the pool"),
    FIELD("_slot", FIELD_SLOT, "index of its slot"),
    FIELD("peer", FIELD_PEER, "(host, port), or the path of a unix socket"),
    FIELD("created_at", FIELD_CREATED, "when it was opened, time.time()"),
    FIELD("age", FIELD_AGE, "seconds since it was opened"),
    FIELD("reuse_count", FIELD_USES, "leases of this connection before this one"),
    FIELD("metadata", FIELD_NOTE, "what dial returned beside the socket, b'' if nothing"),
    {"protocol", (getter)lease_named_field, NULL, PyDoc_STR("Protocol"), (void *)"_protocol_of"},
    {"ip_version", (getter)lease_named_field, NULL, PyDoc_STR("IPVersion, or None for unix"), (void *)"_ip_version_of"},
    {NULL},
};

PyDoc_STRVAR(lease_doc, "One lease of one connection, made by Pool.get().\n\n"
                        "Use it in a with statement: at the end the connection goes back to the pool, after an exception it is\n"
                        "retired. Or call release() or discard(), once. A lease is of one use: afterwards, and in a forked child of\n"
                        "the process that took it, every access raises LeaseExpired and changes nothing. One that is dropped\n"
                        "without release is retired with a ResourceWarning.");

static PyType_Slot lease_slots[] = {
    {Py_tp_dealloc, lease_dealloc}, {Py_tp_finalize, lease_finalize}, {Py_tp_repr, lease_repr},
    {Py_tp_methods, lease_methods}, {Py_tp_getset, lease_getset},     {Py_tp_doc, (void *)lease_doc},
    {0, NULL},
};
static PyType_Spec lease_spec = {"shmpool.PooledConnection", sizeof(LeaseObject), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, lease_slots};

/* ---- get ---- */

/* Register this process if a fork (or the first call) makes it necessary; false with an exception. */
bool ensure_joined(PoolObject *self)
{
    struct pool *pool = &self->pool;
    bool is_new = !pool_joined(pool);
    if (is_new) {
        enum pool_verdict verdict;
        Py_BEGIN_ALLOW_THREADS
        verdict = pool_join(pool);
        Py_END_ALLOW_THREADS
        if (verdict == POOL_NO_WORKER)
            return raise_error(self, "workers", 0, 0, 0) != NULL;
        if (verdict == POOL_LOST_DESCRIPTORS)
            return raise_error(self, "descriptors", 0, 0, 0) != NULL;
        if (verdict == POOL_ERRNO && errno == EACCES)
            return raise_error(self, "user", 0, 0, 0) != NULL;
        if (verdict != POOL_OK)
            return raise_error(self, "system", (uint32_t)errno, 0, 0) != NULL;
    }
    forget_foreign(self);
    /* Again, after a fork. That no thread can be made here is no fault of the caller's: other members answer, and the next use tries. */
    (void)pool_answer(pool);
    if (!is_new)
        return true;
    PyObject *result = PyObject_CallMethod((PyObject *)self, "_joined", NULL);
    Py_XDECREF(result);
    return result != NULL;
}

static inline void count_hot(struct pool *pool, unsigned counter)
{
    a64_shm *word = &pool->row->counters[counter];
#ifdef Py_GIL_DISABLED
    SHM_ADD(count, *word, 1);
#else
    SHM_STORE(count, *word, SHM_LOAD(count, *word) + 1); /* the GIL makes this counter's writer one */
#endif
}

static inline void count_source(struct pool *pool, enum pool_source source)
{
    static const unsigned counters[] = {[SOURCE_CACHE] = SHM_W_hits,
                                        [SOURCE_FREELIST] = SHM_W_freelist,
                                        [SOURCE_STEAL] = SHM_W_steals,
                                        [SOURCE_OFFER] = SHM_W_handovers,
                                        [SOURCE_DIAL] = SHM_W_dials,
                                        [SOURCE_SPOKE] = SHM_W_spoken};
    count_hot(pool, counters[source]);
}

static unsigned condition_reason(struct pool *pool, uint32_t slot, enum pool_condition condition)
{
    static const unsigned reasons[] = {[CONDITION_BROKEN] = SHM_T_closed_broken,
                                       [CONDITION_DIRTY] = SHM_T_closed_dirty,
                                       [CONDITION_IDLE] = SHM_T_closed_idle};
    return condition == CONDITION_LIFETIME ? pool_over_reason(pool, slot) : reasons[condition];
}

/* One call of get(), past the warm path. */
struct request {
    uint32_t mask;
    bool may_wait;
    uint64_t timeout_ns, begun_ns, deadline_ns; /* without may_wait the deadline is NEVER: only a dial takes time */
    uint64_t linger_ns;   /* what is left of the time for peers to close, over all connections that this call ends */
    uint32_t generation;  /* of the handle when it began, or began anew after a fork */
    bool resorted;        /* last_resort() was tried */
    bool woken;           /* the last sleep in the queue ended by a wake-up */
    struct waiter_place place;
    struct pool_claim under_way; /* place.dialling: the dial that goes on for this call in another thread, perhaps of another process */
    uint64_t adopted_ns;  /* when we began to wait for another's dial */
    PyObject *outcome;    /* a list: where a dial thread of this call says that it is done: its error, or None; NULL: there is none */
    bool dialled_apart;   /* it was, with success */
    PyObject *failure;    /* the last DialError of this call, or NULL */
    uint32_t late_looks;  /* looks without a result when the time was over */
    uint32_t attempts;    /* dials of this call */
    uint64_t patience;    /* failures of the upstream, of whosever dials, from which on this call may give up */
};

static struct request request_new(uint32_t mask, uint64_t timeout_ns, bool may_wait)
{
    uint64_t now = clock_now();
    return (struct request){.mask = mask, .may_wait = may_wait, .timeout_ns = timeout_ns, .begun_ns = now,
                            .deadline_ns = !may_wait || timeout_ns >= NEVER - now ? NEVER : now + timeout_ns,
                            .linger_ns = CONNECTION_LINGER_NS};
}

/* An existing connection turned out unfit: end it. Peers that do not answer cost one call CONNECTION_LINGER_NS in all, and
 * nothing past its deadline. */
static void retire_unfit(PoolObject *self, struct pool_claim *claim, unsigned reason, struct request *request)
{
    uint64_t now = clock_now(), left = request->deadline_ns > now ? request->deadline_ns - now : 0;
    if (request->linger_ns > left)
        request->linger_ns = left;
    if (pool_condemn(&self->pool, claim))
        retire_condemned(self, claim, reason, &request->linger_ns);
}

/* This process could not take the connection's descriptor (exception set): it goes back untouched. */
static void give_back(PoolObject *self, struct pool_claim *claim)
{
    if (release_claim(self, claim, SHM_LOAD(row, self->pool.slab.slots[claim->slot].last_used_ns)) == RELEASE_RETIRE)
        retire_leased(self, claim, pool_retire_reason(&self->pool, claim->slot));
}

/* Was our socket object closed or changed while nobody leased the connection here (a client object that died, a socket kept
 * beyond its lease)? The connection itself is good; it is fetched anew. */
static bool entry_is_spoilt(const struct entry *entry) { return *entry->dirty && entry->dirty != always_dirty; }

static void leave_queue(PoolObject *self, struct request *request);

/* See that this process has the existing connection, LEASED by the claim. False: it was unfit and is retired, or there is an exception. */
static bool fetch_for_lease(PoolObject *self, struct pool_claim *claim, struct request *request)
{
    struct entry *entry = &self->pool.entries[claim->slot];
    struct slot_shm *row = &self->pool.slab.slots[claim->slot];
    if (entry->connection == SHM_LOAD(row, row->connection) && !entry_is_spoilt(entry))
        return true;
    uint32_t generation = self->pool.generation;
    int fetched = entry_fetch(self, claim->slot);
    if (forked_since(self, generation))
        return false;
    if (fetched < 0)
        give_back(self, claim);
    else if (!fetched)
        retire_unfit(self, claim, SHM_T_closed_letter, request);
    return fetched > 0;
}

/* A lease on a connection that is fit for use, LEASED by the claim. */
static PyObject *lease_fit(PoolObject *self, struct pool_claim *claim, struct request *request, uint64_t now)
{
    struct pool *pool = &self->pool;
    struct slot_shm *row = &pool->slab.slots[claim->slot];
    uint64_t got = clock_now();
    LeaseObject *lease = lease_new(self, claim, 1, got);
    if (!lease) {
        retire_leased(self, claim, SHM_T_closed_error);
        return NULL;
    }
    hist_add(&pool->row->get, got - request->begun_ns, 1);
    leave_queue(self, request);
    bool is_ours = (request->outcome || request->dialled_apart) && !SHM_LOAD(row, row->uses); /* what our thread dialled, or another's came first */
    return lease_begin(self, lease, now, is_ours ? SOURCE_DIAL : claim->source);
}

/* A lease on an existing connection, LEASED by the claim. NULL without exception: it was unfit and is retired; search on.
 * `known`: its condition, when it was looked at already. */
static PyObject *lease_existing(PoolObject *self, struct pool_claim *claim, struct request *request,
                                const enum pool_condition *known)
{
    if (!fetch_for_lease(self, claim, request))
        return NULL;
    uint64_t now = clock_coarse();
    enum pool_condition condition = known ? *known : pool_validate(&self->pool, claim->slot, self->pool.entries[claim->slot].fd, now);
    if (condition == CONDITION_GOOD)
        return lease_fit(self, claim, request, now);
    retire_unfit(self, claim, condition_reason(&self->pool, claim->slot, condition), request);
    return NULL;
}

/* Fill entry and row from what _dial returned; false with an exception. */
static bool install(PoolObject *self, struct pool_claim *claim, uint64_t id, PyObject *dialled, uint64_t took_ns)
{
    struct pool *pool = &self->pool;
    PyObject *socket, *mark, *note;
    const char *address;
    Py_ssize_t address_size;
    int fd, private, mailed;
    unsigned bucket;
    double lifetime;
    if (!PyArg_ParseTuple(dialled, "OO!iIppdy#S:_dial", &socket, &PyByteArray_Type, &mark, &fd, &bucket,
                          &private, &mailed, &lifetime, &address, &address_size, &note))
        return false;
    struct pool_birth birth = {.bucket = bucket, .took_ns = took_ns};
    birth.flags = (private ? SHM_KIND_PRIVATE : 0) | (self->on_created ? SHM_KIND_SHOWN : 0);
    memcpy(birth.peer, address, (size_t)address_size < sizeof birth.peer ? (size_t)address_size : sizeof birth.peer);
    birth.expires_ns = lifetime > 9e9 ? NEVER : clock_now() + (uint64_t)(lifetime * 1e9);
    if (!mailed) {
        mailbox_drain(pool->mailboxes[claim->slot]); /* dial may have put an earlier socket there */
        if (mailbox_deposit(pool->mailboxes[claim->slot], pool->slab.header->id, claim->slot, id, fd,
                            PyBytes_AS_STRING(note), (size_t)PyBytes_GET_SIZE(note)))
            birth.flags |= SHM_KIND_UNMAILED;
        self->cannot_mail = birth.flags & SHM_KIND_UNMAILED;
    }
    struct entry *entry = &pool->entries[claim->slot];
    struct parts old = entry_take(entry);
    entry->socket = Py_NewRef(socket);
    entry->note = Py_NewRef(note);
    entry->dirty = private ? always_dirty : PyByteArray_AS_STRING(mark);
    entry->fd = fd;
    entry->connection = id;
    bool installed = pool_install(pool, claim, &birth);
    parts_drop_session(&old);
    parts_close(&old);
    if (!installed)
        PyErr_SetString(PyExc_RuntimeError, "shmpool: the slot of a dial was taken away; this is a bug");
    return installed;
}

/* Show the new connection, LEASED by the claim, to on_created. False with an exception: it was refused, and is retired. */
static bool created_is_welcome(PoolObject *self, struct pool_claim *claim)
{
    LeaseObject *shown = lease_new(self, claim, 0, 0);
    PyObject *answer = NULL;
    uint32_t generation = self->pool.generation;
    if (shown) {
        shown->shown = true;
        answer = PyObject_CallOneArg(self->on_created, (PyObject *)shown);
        if (answer == Py_False)
            PyErr_SetString(PyExc_ConnectionError, "on_created refused the connection");
        if (!forked_since(self, generation)) {
            struct slot_shm *row = &self->pool.slab.slots[claim->slot];
            SHM_STORE(row, row->leased_ns, clock_coarse()); /* from now on it may be out for as long as any */
            SHM_AND_SEQ(shown, row->kind, ~(uint32_t)SHM_KIND_SHOWN);
        }
        shown->active = false;
        lease_end(shown);
        Py_DECREF(shown);
    }
    Py_XDECREF(answer);
    if (!PyErr_Occurred())
        return true;
    if (!forked_since(self, generation)) /* else it is the parent's */
        retire_leased(self, claim, SHM_T_closed_refused);
    return false;
}

/* What on_created raised becomes the cause of a DialError. */
static void refused_by_hook(PoolObject *self, uint32_t attempt, uint64_t seen)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    PyObject *error = PyObject_CallMethod((PyObject *)self, "_refused", "OIK", value, (unsigned)attempt, (unsigned long long)seen);
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* The dial has failed, with an exception that stays set: the permit is free again, and the upstream hears of it. */
static void abandon(PoolObject *self, struct pool_claim *claim)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (!type || !PyErr_GivenExceptionMatches(type, dial_error)) /* else _dial has said so */
        upstream_untried(&self->pool.slab, claim->upstream, clock_now());
    Py_BEGIN_ALLOW_THREADS
    pool_abandon(&self->pool, claim);
    waiter_wake_all(&self->pool.slab); /* who waits for this dial, or wants to hear that the server is down */
    Py_END_ALLOW_THREADS
    PyErr_Restore(type, value, traceback);
}

/* Open a connection on the DIALING claim, which has been announced; then it is LEASED. False with an exception, or without one (a fork):
 * search on. */
static bool dial(PoolObject *self, struct pool_claim *claim, const struct request *request)
{
    struct pool *pool = &self->pool;
    uint32_t generation = pool->generation;
    uint64_t id = pool_name_connection(pool, claim), begun = clock_now();
    bool unlimited = request->deadline_ns == NEVER || !request->timeout_ns; /* 0: wait for nobody; a dial has its own limit */
    double left = unlimited                      ? Py_HUGE_VAL
                  : request->deadline_ns > begun ? (double)(request->deadline_ns - begun) / 1e9
                                                 : 0.0;
    double timeout = request->timeout_ns == NEVER ? Py_HUGE_VAL : (double)request->timeout_ns / 1e9;
    PyObject *dialled = PyObject_CallMethod((PyObject *)self, "_dial", "IdIKdIK", (unsigned)request->mask, left,
                                            (unsigned)claim->slot, (unsigned long long)id, timeout, (unsigned)request->attempts,
                                            (unsigned long long)claim->upstream);
    if (SHM_UNLIKELY(forked_since(self, generation))) {
        Py_XDECREF(dialled); /* our copy goes; the parent goes on with its own */
        return false;
    }
    uint64_t took_ns = clock_now() - begun;
    hist_add(&pool->slab.totals->dial, took_ns, 1);
    bool installed = dialled && install(self, claim, id, dialled, took_ns);
    Py_XDECREF(dialled);
    if (!installed) {
        abandon(self, claim);
        return false;
    }
    if (!pool_is_open(pool)) {
        retire_leased(self, claim, SHM_T_closed_shutdown);
        raise_error(self, "closed", request->mask, 0, 0);
        return false;
    }
    if (self->on_created && !created_is_welcome(self, claim)) {
        if (!forked_since(self, generation))
            refused_by_hook(self, request->attempts, claim->upstream);
        waiter_wake_all(&pool->slab);
        return false;
    }
    if (forked_since(self, generation))
        return false;
    if (upstream_proved(&pool->slab)) {
        PyObject *result = PyObject_CallMethod((PyObject *)self, "_upstream_is_up", NULL);
        if (!result)
            PyErr_WriteUnraisable((PyObject *)self);
        Py_XDECREF(result);
    }
    return true;
}

/* ---- dials in threads of their own ---- */

/* What such a thread has with it. */
struct errand {
    PoolObject *self;
    struct pool_claim claim;
    uint32_t mask, attempt, generation;
    PyObject *outcome;
};

/* Say that the dial is done: its error, or None. */
static void errand_done(struct errand *errand)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    if (PyList_Append(errand->outcome, value ? value : Py_None))
        PyErr_WriteUnraisable((PyObject *)errand->self);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

static void errand_run(void *argument)
{
    struct errand *errand = argument;
    PyGILState_STATE state = PyGILState_Ensure();
    PoolObject *self = errand->self;
    struct request request = {.mask = errand->mask, .timeout_ns = NEVER, .deadline_ns = NEVER, .attempts = errand->attempt};
    Py_BEGIN_CRITICAL_SECTION(self);
    if (!forked_since(self, errand->generation) && dial(self, &errand->claim, &request) &&
        pool_release(&self->pool, &errand->claim, clock_coarse()) == RELEASE_RETIRE)
        retire_leased(self, &errand->claim, pool_retire_reason(&self->pool, errand->claim.slot));
    bool failed = PyErr_Occurred() != NULL;
    errand_done(errand);
    if (failed)
        waiter_wake_all(&self->pool.slab); /* again: now the error is there */
    else
        waiter_wake_first(&self->pool.slab, WAITER_ANY_BUCKET); /* who waited for this very dial may have to look for another */
    Py_END_CRITICAL_SECTION();
    PyObject *forgotten = PyObject_CallMethod((PyObject *)self, "_forget_thread", NULL);
    if (!forgotten)
        PyErr_WriteUnraisable((PyObject *)self);
    Py_XDECREF(forgotten);
    SHM_ADD(private, self->dial_threads, -1u);
    Py_DECREF(errand->outcome);
    Py_DECREF((PyObject *)self);
    PyMem_Free(errand);
    PyGILState_Release(state);
}

/* Let a thread of its own dial on the claim, while this call waits. False: there is no thread to be had. */
static bool dial_apart(PoolObject *self, struct pool_claim *claim, struct request *request)
{
    struct errand *errand = PyMem_Malloc(sizeof *errand);
    PyObject *outcome = errand ? PyList_New(0) : NULL;
    if (!outcome) {
        PyMem_Free(errand);
        PyErr_Clear();
        return false;
    }
    *errand = (struct errand){self, *claim, request->mask, request->attempts, self->pool.generation, Py_NewRef(outcome)};
    Py_INCREF((PyObject *)self);
    SHM_ADD(private, self->dial_threads, 1);
    if (PyThread_start_new_thread(errand_run, errand) == PYTHREAD_INVALID_THREAD_ID) {
        SHM_ADD(private, self->dial_threads, -1u);
        Py_DECREF((PyObject *)self);
        Py_DECREF(outcome);
        Py_DECREF(outcome);
        PyMem_Free(errand);
        return false;
    }
    Py_XSETREF(request->outcome, outcome);
    request->place.dialling = true;
    request->under_way = *claim;
    return true;
}

/* Does this call wait for others (their connections, their dials)? */
static bool request_waits(const struct request *request) { return request->may_wait && request->timeout_ns; }

/* Is it time for this call to give up hope of the server? It has tried as often as it may; or others have, and the next probe is not worth
 * waiting for. */
static bool patience_is_over(PoolObject *self, const struct request *request)
{
    struct slab *slab = &self->pool.slab;
    if (self->wait_when_down && request_waits(request))
        return false;
    return request->attempts > self->dial_retries || (SHM_LOAD(hint, slab->header->upstream_failures) >= request->patience &&
                                                      upstream_left(slab, clock_now()) > UPSTREAM_NEAR_NS);
}

/* A dial of this call has failed, with an exception. If it may go on, the exception is kept for later; else it stays. */
static void dial_failed(PoolObject *self, struct request *request)
{
    bool late = request->timeout_ns && clock_now() >= request->deadline_ns;
    if (late || !PyErr_ExceptionMatches(dial_error) || patience_is_over(self, request))
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    Py_XSETREF(request->failure, value);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
}

/* The error of our dial thread is raised, or kept when this call goes on. */
static void take_outcome(PoolObject *self, struct request *request)
{
    PyObject *error = Py_NewRef(PyList_GET_ITEM(request->outcome, 0));
    Py_CLEAR(request->outcome);
    if (error == Py_None)
        request->dialled_apart = true;
    else if (!PyErr_GivenExceptionMatches(error, dial_error) || patience_is_over(self, request))
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    else
        Py_XSETREF(request->failure, Py_NewRef(error));
    Py_DECREF(error);
}

/* The dial that went on for this call, has it ended? Our own has when its thread says so; another's when its slot does, or when it takes so
 * long that its process may be stopped. */
static void look_after_dial(PoolObject *self, struct request *request)
{
    if (!request->place.dialling)
        return;
    bool goes_on = request->outcome ? !PyList_GET_SIZE(request->outcome)
                                    : clock_now() < request->adopted_ns + ADOPTED_PATIENCE_NS &&
                                          pool_dial_goes_on(&self->pool, &request->under_way);
    if (goes_on)
        return;
    request->place.dialling = false;
    if (request->outcome)
        take_outcome(self, request);
}

static PyObject *lease_dialled(PoolObject *self, struct pool_claim *claim, struct request *request)
{
    struct pool *pool = &self->pool;
    if (!dial(self, claim, request)) {
        if (PyErr_Occurred() && !forked_since(self, request->generation))
            dial_failed(self, request);
        return NULL;
    }
    if (SHM_UNLIKELY(!pool_is_plain(pool)) && steering_now(&pool->slab) == SHM_POOL_PAUSED) { /* meanwhile: nothing is given out */
        if (pool_release(pool, claim, clock_coarse()) == RELEASE_RETIRE)
            retire_leased(self, claim, pool_retire_reason(pool, claim->slot));
        return NULL;
    }
    uint64_t done = clock_now();
    LeaseObject *lease = lease_new(self, claim, 1, done);
    if (!lease) {
        retire_leased(self, claim, SHM_T_closed_error);
        return NULL;
    }
    hist_add(&pool->row->get, done - request->begun_ns, 1);
    leave_queue(self, request);
    return lease_begin(self, lease, clock_coarse(), SOURCE_DIAL);
}

/* Leave the queue, if we stand in it, giving back what was promised meanwhile (unless it is what we took): before hooks run. A dial that goes on is free for others. */
static void leave_queue(PoolObject *self, struct request *request)
{
    struct pool *pool = &self->pool;
    if (!self->made || forked_since(self, request->generation))
        return;
    if (request->place.dialling)
        pool_orphan_dial(pool, &request->under_way);
    request->place.dialling = false;
    if (!request->place.queued)
        return;
    uint64_t waited = clock_now() - request->place.since_ns;
    pool_return_promise(pool, waiter_leave(&pool->slab, &request->place));
    pool_count(pool, SHM_W_wait_ns, waited);
    hist_add(&pool->slab.totals->wait, waited, 1);
}

/* Before a call gives up: what the dead hold may not have been looked for in the last moment. True: look once more. */
static bool last_resort(PoolObject *self, struct request *request)
{
    if (request->resorted)
        return false;
    request->resorted = true;
    Py_BEGIN_ALLOW_THREADS
    recovery_run(&self->pool, true);
    Py_END_ALLOW_THREADS
    return true;
}

/* Nothing is free, and there is no time to wait, or no place. True: look once more; false with an exception. */
static bool give_up(PoolObject *self, struct request *request, const char *kind)
{
    if (last_resort(self, request))
        return true;
    raise_error(self, kind, request->mask, clock_now() - request->begun_ns, request->timeout_ns);
    if (request->failure && PyErr_ExceptionMatches(PyExc_TimeoutError)) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        PyErr_NormalizeException(&type, &value, &traceback);
        PyException_SetCause(value, Py_NewRef(request->failure));
        PyErr_Restore(type, value, traceback);
    }
    return false;
}

/* Sleep in the queue, until woken or for a slice. False with an exception. */
static bool sleep_in_queue(PoolObject *self, struct request *request, uint64_t now)
{
    struct pool *pool = &self->pool;
    uint64_t waited = now - request->place.since_ns, slice = WAITER_SLICE_NS;
    if (request->woken && waited < WAITER_HANDOVER_AFTER_NS) { /* woken in vain */
        if (!waiter_be_patient(&pool->slab, &request->place)) {
            waiter_prepare(&pool->slab, &request->place);
            return true;
        }
        slice = 2 * WAITER_HANDOVER_AFTER_NS - waited;
    }
    if (slice > request->deadline_ns - now)
        slice = request->deadline_ns - now;
    uint64_t probe = upstream_left(&pool->slab, now); /* then one of those who wait may dial */
    if (probe && slice > probe)
        slice = probe;
    Py_BEGIN_ALLOW_THREADS
    request->woken = waiter_sleep(&pool->slab, &request->place, slice);
    Py_END_ALLOW_THREADS
    bool interrupted = PyErr_CheckSignals() != 0; /* a handler may have forked, or closed the pool */
    if (!interrupted && !forked_since(self, request->generation))
        waiter_prepare(&pool->slab, &request->place);
    return !interrupted;
}

static bool enter_queue(PoolObject *self, struct request *request)
{
    struct pool *pool = &self->pool;
    if (request->place.queued)
        return true;
    if (!waiter_enter(&pool->slab, &request->place, pool->worker, request->mask, (uint32_t)gettid(), clock_now()))
        return false;
    pool_count(pool, SHM_W_waits, 1);
    return true;
}

/* Nothing is free: join the queue, or sleep in it. True: look again; false with an exception. */
static bool wait_turn(PoolObject *self, struct request *request)
{
    struct pool *pool = &self->pool;
    uint64_t now = clock_now();
    if (!request->may_wait)
        return give_up(self, request, "exhausted");
    if (now >= request->deadline_ns)
        return give_up(self, request, "timeout");
    if (request->place.queued && waiter_promised(&pool->slab, &request->place) >= 0) {
        /* Promised, but the look did not find the offer. */
        pool_return_promise(pool, waiter_rematch(&pool->slab, &request->place));
        waiter_prepare(&pool->slab, &request->place);
        return true;
    }
    if (request->place.queued)
        return sleep_in_queue(self, request, now);
    if (!enter_queue(self, request))
        return give_up(self, request, "waiters");
    return true; /* look once more, now that everybody can see that we wait */
}

/* Has this call less time than a dial may take, and the dial to come to its end all the same? */
static bool dial_may_outlast(const PoolObject *self, const struct pool_claim *claim, const struct request *request)
{
    return upstream_wants_verdict(claim->upstream) && request->deadline_ns != NEVER &&
           clock_now() + self->pool.options.backoff.patience_ns > request->deadline_ns;
}

/* An empty slot is ours: dial here, or let a thread dial and wait for whatever is there first. */
static PyObject *begin_dial(PoolObject *self, struct pool_claim *claim, struct request *request)
{
    request->attempts++;
    pool_announce_dial(&self->pool, claim, request->mask, false);
    bool apart = !claim->alone || dial_may_outlast(self, claim, request);
    if (apart && request_waits(request) && !self->cannot_mail && enter_queue(self, request) && dial_apart(self, claim, request))
        return NULL;
    return lease_dialled(self, claim, request);
}

/* Sleep, without the GIL; a signal handler may raise. */
static bool nap(uint64_t ns)
{
    struct timespec pause = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    Py_BEGIN_ALLOW_THREADS
    nanosleep(&pause, NULL);
    Py_END_ALLOW_THREADS
    return PyErr_CheckSignals() == 0;
}

/* Nobody may dial: the server is down. */
static PyObject *wait_for_server(PoolObject *self, struct request *request)
{
    if (request_waits(request) && !patience_is_over(self, request)) {
        wait_turn(self, request);
        return NULL;
    }
    if (!request->failure)
        return raise_error(self, "down", request->mask, clock_now() - request->begun_ns, request->timeout_ns);
    PyErr_SetObject((PyObject *)Py_TYPE(request->failure), request->failure);
    return NULL;
}

/* ---- a pool that listens (service.h) ---- */

/* The event of a client's connection, LEASED by the claim: it has spoken, or closed, or another was faster; `crowded`: it is one that has been
 * silent while others wait for its slot. As lease_existing(). */
static PyObject *lease_spoken(PoolObject *self, struct pool_claim *claim, struct request *request, bool crowded)
{
    struct pool *pool = &self->pool;
    if (!fetch_for_lease(self, claim, request))
        return NULL;
    pool_count(pool, SHM_W_checks, 1);
    switch (connection_check(pool->entries[claim->slot].fd)) {
    case CONNECTION_DIRTY: /* a request; it is served whatever the connection's age */
        if (!(SHM_LOAD(row, pool->slab.slots[claim->slot].kind) & SHM_KIND_ENDING))
            return lease_fit(self, claim, request, clock_coarse());
        retire_unfit(self, claim, pool_over_reason(pool, claim->slot), request);
        break;
    case CONNECTION_GOOD:
        if (!crowded)
            give_back(self, claim);
        else if (pool_condemn(pool, claim))
            retire_condemned(self, claim, SHM_T_closed_evicted, &(uint64_t){0}); /* nothing is under way that its client should get first */
        break;
    case CONNECTION_CLOSED:
        retire_unfit(self, claim, SHM_T_closed_broken, request);
    }
    return NULL;
}

/* on_created did not want the client (exception set): Python says what becomes of that. */
static void client_refused(PoolObject *self, uint32_t slot, uint64_t id)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    PyObject *result = PyObject_CallMethod((PyObject *)self, "_client_refused", "OIK", value, (unsigned)slot, (unsigned long long)id);
    Py_XDECREF(result);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* No client came of the DIALING claim that has a name already. Keeps a pending exception. */
static void abandon_client(PoolObject *self, struct pool_claim *claim)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    Py_BEGIN_ALLOW_THREADS
    pool_abandon(&self->pool, claim);
    Py_END_ALLOW_THREADS
    PyErr_Restore(type, value, traceback);
}

/* The client that the program's acceptor takes from the listener; the claim is given up when there is none. NULL: none, or an exception. */
static PyObject *take_client(PoolObject *self, struct pool_claim *claim)
{
    uint32_t generation = self->pool.generation;
    PyObject *taken = PyObject_CallMethod((PyObject *)self, "_take_client", NULL);
    if (forked_since(self, generation)) {
        Py_XDECREF(taken);
        return NULL;
    }
    if (taken != Py_None) /* else nobody was there, and who was faster watches the listener */
        service_listen_on(&self->pool);
    if (taken && PyTuple_Check(taken)) {
        pool_name_connection(&self->pool, claim);
        return taken;
    }
    service_give_up(&self->pool, claim);
    Py_XDECREF(taken);
    return NULL;
}

/* A client was accepted on the DIALING claim: as `fd`, named and perhaps mailed; or is to be, by the program's acceptor (fd is -1). A lease; or
 * NULL, perhaps with an exception: wait on. */
static PyObject *lease_client(PoolObject *self, struct pool_claim *claim, struct request *request, int fd, bool mailed)
{
    struct pool *pool = &self->pool;
    uint32_t generation = pool->generation;
    PyObject *taken = fd >= 0 ? Py_NewRef(Py_None) : take_client(self, claim);
    if (!taken)
        return NULL;
    uint64_t id = SHM_LOAD(row, pool->slab.slots[claim->slot].connection);
    PyObject *client = PyObject_CallMethod((PyObject *)self, "_accept_client", "IKiNN", (unsigned)claim->slot, (unsigned long long)id, fd,
                                           PyBool_FromLong(mailed), taken);
    bool forked = forked_since(self, generation); /* then our copy goes; the parent goes on with its own */
    bool installed = !forked && client && client != Py_None && install(self, claim, id, client, 0);
    Py_XDECREF(client);
    if (forked)
        return NULL;
    if (!installed) {
        abandon_client(self, claim);
        return NULL;
    }
    if (self->on_created && !created_is_welcome(self, claim)) {
        client_refused(self, claim->slot, id);
        return NULL;
    }
    if (forked_since(self, generation))
        return NULL;
    claim->source = SOURCE_DIAL;
    return lease_fit(self, claim, request, clock_coarse());
}

/* The pool is not open as usual: wait, or refuse. */
static void wait_or_refuse(PoolObject *self, struct request *request, uint64_t left_ns)
{
    uint64_t waited = clock_now() - request->begun_ns, slice = WAITER_SLICE_NS;
    switch (steering_now(&self->pool.slab)) {
    case SHM_POOL_OPEN:
        return;
    case SHM_POOL_PAUSED:
        if (!request->may_wait)
            raise_error(self, "paused", request->mask, waited, request->timeout_ns);
        else if (!left_ns)
            give_up(self, request, "timeout");
        else
            nap(left_ns < slice ? left_ns : slice);
        return;
    case SHM_POOL_DRAINING:
        raise_error(self, "draining", request->mask, 0, 0);
        return;
    case SHM_POOL_CLOSED:
        raise_error(self, "closed", request->mask, 0, 0);
        return;
    }
    Py_UNREACHABLE();
}

/* One look of a pool that listens: the next client that is new or has spoken; waits for one slice. As look(). */
static PyObject *look_for_client(PoolObject *self, struct request *request)
{
    struct pool *pool = &self->pool;
    struct pool_claim claim = {0};
    enum service_found found;
    uint64_t now = clock_now(), left_ns = request->may_wait && request->deadline_ns > now ? request->deadline_ns - now : 0;
    int fd = -1, error = 0;
    bool mailed = false;
    if (!pool_is_plain(pool)) {
        wait_or_refuse(self, request, left_ns);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    found = service_next(pool, left_ns, &claim);
    if (found == SERVICE_CLIENT && !self->accepts_by_hand && (fd = service_accept(pool, &claim, &mailed)) < 0)
        error = errno;
    if (found == SERVICE_NOTHING && recovery_is_due(pool))
        recovery_run(pool, false);
    Py_END_ALLOW_THREADS
    switch (found) {
    case SERVICE_SPOKE:
    case SERVICE_CROWDED:
        return lease_spoken(self, &claim, request, found == SERVICE_CROWDED);
    case SERVICE_CLIENT:
        if (!error)
            return lease_client(self, &claim, request, fd, mailed);
        errno = error;
        return service_is_short(error) ? PyErr_SetFromErrno(PyExc_OSError) : NULL;
    case SERVICE_AGAIN:
        return NULL;
    case SERVICE_NOTHING:
        tell_ended(self);
        if (!PyErr_CheckSignals() && !left_ns)
            give_up(self, request, request->may_wait ? "timeout" : "silent");
        return NULL;
    case SERVICE_LOST:
        return raise_error(self, "descriptors", 0, 0, 0);
    }
    Py_UNREACHABLE();
}

/* ---- looking ---- */

/* One look at everything. A lease; or NULL with an exception; or NULL without: look again. */
static PyObject *look(PoolObject *self, struct request *request)
{
    struct pool *pool = &self->pool;
    struct pool_claim claim;
    if (pool->service)
        return look_for_client(self, request);
    look_after_dial(self, request);
    if (PyErr_Occurred())
        return NULL;
    switch (pool_take(pool, request->mask, request_waits(request) ? &request->place : NULL, &claim)) {
    case TAKEN_LEASED:
        return lease_existing(self, &claim, request, NULL);
    case TAKEN_DIAL:
        return begin_dial(self, &claim, request);
    case TAKEN_ADOPTED:
        request->place.dialling = true;
        request->under_way = claim;
        request->adopted_ns = clock_now();
        return NULL;
    case TAKEN_EVICTED:
        retire_condemned(self, &claim, SHM_T_closed_evicted, &request->linger_ns);
        return NULL;
    case TAKEN_RECOVER:
        Py_BEGIN_ALLOW_THREADS
        recovery_run(pool, false);
        Py_END_ALLOW_THREADS
        tell_ended(self);
        return NULL;
    case TAKEN_NOTHING:
        wait_turn(self, request);
        return NULL;
    case TAKEN_DOWN:
        return wait_for_server(self, request);
    case TAKEN_PAUSED:
        if (request->may_wait)
            wait_turn(self, request);
        else
            raise_error(self, "paused", request->mask, clock_now() - request->begun_ns, request->timeout_ns);
        return NULL;
    case TAKEN_CLOSED:
        return raise_error(self, "closed", request->mask, 0, 0);
    case TAKEN_DRAINING:
        return raise_error(self, "draining", request->mask, 0, 0);
    case TAKEN_DAMAGED:
        return raise_error(self, "damaged", request->mask, 0, 0);
    }
    Py_UNREACHABLE();
}

/* A call ends with the exception that is set: count it. */
static void count_failure(PoolObject *self)
{
    struct pool *pool = &self->pool;
    if (!self->made)
        return;
    if (self->finished || !pool_joined(pool)) { /* no row is ours */
        if (PyErr_ExceptionMatches(pool_closed))
            pool_count_total(pool, SHM_T_late_refusals, 1);
        return;
    }
    pool_count(pool, PyErr_ExceptionMatches(pool_closed)              ? SHM_W_refused
                     : PyErr_ExceptionMatches(pool_exhausted)         ? SHM_W_exhausted
                     : PyErr_ExceptionMatches(PyExc_TimeoutError)     ? SHM_W_timeouts
                     : PyErr_ExceptionMatches(dial_error)             ? SHM_W_dial_errors
                                                                      : SHM_W_interrupted, 1);
}

/* Python wants to be told once more that this process takes part. False with an exception. */
static bool remind(PoolObject *self)
{
    self->remind = false;
    PyObject *result = PyObject_CallMethod((PyObject *)self, "_joined", NULL);
    Py_XDECREF(result);
    return result != NULL;
}

/* Be sure that this call is of a process that takes part: at its begin, and after a fork in its middle. False with an exception. */
static bool take_part(PoolObject *self, struct request *request)
{
    struct pool *pool = &self->pool;
    if (SHM_LIKELY(self->made && !self->finished && !forked_since(self, request->generation) && self->generation == pool->generation))
        return true;
    Py_CLEAR(request->outcome);
    request->place.queued = request->place.dialling = false; /* after a fork the place is the parent's; after finish() it is gone */
    if (!self->made || self->finished || !pool_is_open(pool)) {
        finish(self);
        return raise_error(self, "closed", request->mask, 0, 0) != NULL;
    }
    if ((SHM_UNLIKELY(self->remind) && !remind(self)) || !ensure_joined(self))
        return false;
    request->generation = pool->generation;
    bool down = upstream_is_down(SHM_LOAD_SEQ(upstream, pool->slab.header->upstream));
    request->patience = SHM_LOAD(hint, pool->slab.header->upstream_failures) + (down ? 0 : self->dial_retries + 1);
    return true;
}

/* A look has brought nothing, not even a wait: what it found could not be used. That may go on for as long as there is more of it; but not when the
 * time is over. False with an exception. */
static bool may_look_again(PoolObject *self, struct request *request)
{
    if (PyErr_Occurred() || PyErr_CheckSignals())
        return false;
    bool is_late = !request->may_wait || (request->deadline_ns != NEVER && clock_now() >= request->deadline_ns);
    uint32_t most = request->timeout_ns ? LATE_LOOKS : LATE_LOOKS + self->pool.slab.layout.max_slots;
    if (!is_late || !self->made || ++request->late_looks <= most)
        return true;
    request->resorted = true;
    return give_up(self, request, request->may_wait ? "timeout" : self->pool.service ? "silent" : "exhausted");
}

static PyObject *search_and_wait(PoolObject *self, uint32_t mask, uint64_t timeout_ns, bool may_wait)
{
    struct pool *pool = &self->pool;
    struct request request = request_new(mask, timeout_ns, may_wait);
    PyObject *lease = NULL;
    if (self->made && !self->finished && pool_joined(pool))
        (void)pool_answer(pool); /* see ensure_joined */
    do
        lease = take_part(self, &request) ? look(self, &request) : NULL;
    while (!lease && may_look_again(self, &request));
    if (!lease)
        count_failure(self);
    leave_queue(self, &request);
    Py_XDECREF(request.outcome);
    Py_XDECREF(request.failure);
    if (self->made && !pool_is_open(pool))
        finish(self);
    return lease;
}

static PyObject *get_slow(PoolObject *self, uint32_t mask, uint64_t timeout_ns, bool may_wait)
{
    PyObject *lease;
    Py_BEGIN_CRITICAL_SECTION(self);
    lease = search_and_wait(self, mask, timeout_ns, may_wait);
    Py_END_CRITICAL_SECTION();
    return lease;
}

/* What is left of the timeout of a call that began then; 0 stays 0. */
static uint64_t timeout_left(uint64_t timeout_ns, uint64_t since_coarse)
{
    uint64_t spent = clock_coarse() - since_coarse;
    return timeout_ns == NEVER || !timeout_ns ? timeout_ns : spent < timeout_ns ? timeout_ns - spent : 1;
}

static inline PyObject *get_lease(PoolObject *self, uint32_t mask, uint64_t timeout_ns, bool may_wait)
{
    struct pool *pool = &self->pool;
    struct pool_claim claim;
    if (SHM_UNLIKELY(!self->made || !pool_is_plain(pool) || !pool_is_settled(pool) || self->generation != pool->generation))
        return get_slow(self, mask, timeout_ns, may_wait);
    uint64_t now = clock_coarse(), begun = 0;
    uint32_t weight = pool->options.stats ? pool_timing_due(pool, now) : 0;
    if (SHM_UNLIKELY(weight))
        begun = clock_now();
    if (SHM_UNLIKELY(!pool_take_cached(pool, mask, &claim))) {
        pool_timing_undo(pool, weight);
        return get_slow(self, mask, timeout_ns, may_wait);
    }
    struct entry *entry = &pool->entries[claim.slot];
    struct slot_shm *row = &pool->slab.slots[claim.slot];
    enum pool_condition condition = CONDITION_GOOD;
    if (SHM_UNLIKELY(entry->connection != SHM_LOAD(row, row->connection) || *entry->dirty ||
                     (condition = pool_validate(pool, claim.slot, entry->fd, now)) != CONDITION_GOOD)) {
        struct request request = request_new(mask, timeout_ns, may_wait);
        pool_timing_undo(pool, weight);
        PyObject *lease = lease_existing(self, &claim, &request, condition == CONDITION_GOOD ? NULL : &condition);
        if (!lease && PyErr_Occurred())
            count_failure(self);
        return lease || PyErr_Occurred() ? lease : get_slow(self, mask, timeout_ns, may_wait);
    }
    uint64_t got = 0;
    if (SHM_UNLIKELY(weight)) {
        got = clock_now();
        hist_add(&pool->row->get, got - begun, weight);
    }
    LeaseObject *lease = lease_new(self, &claim, weight, got);
    if (SHM_UNLIKELY(!lease)) {
        retire_leased(self, &claim, SHM_T_closed_error);
        return NULL;
    }
    PyObject *begun_lease = lease_begin(self, lease, now, SOURCE_CACHE);
    if (SHM_LIKELY(begun_lease != NULL))
        return begun_lease;
    if (!PyErr_Occurred())
        return get_slow(self, mask, timeout_left(timeout_ns, now), may_wait);
    count_failure(self);
    return NULL;
}

bool check_made(PoolObject *self)
{
    if (!self->made)
        PyErr_SetString(PyExc_RuntimeError, "the pool was not created");
    return self->made;
}

enum {
    TCP_MASK = 1 << BUCKET_TCP4 | 1 << BUCKET_TCP6,
    UDP_MASK = 1 << BUCKET_UDP4 | 1 << BUCKET_UDP6,
    IPV4_MASK = 1 << BUCKET_TCP4 | 1 << BUCKET_UDP4,
    IPV6_MASK = 1 << BUCKET_TCP6 | 1 << BUCKET_UDP6,
};

/* The buckets of a protocol name and of an IP version; 0 for what is neither. */
static uint32_t protocol_mask(PyObject *protocol)
{
    static const struct {
        const char *name;
        uint32_t mask;
    } known[] = {{"tcp", TCP_MASK}, {"udp", UDP_MASK}, {"unix", 1 << BUCKET_UNIX}};
    if (protocol == Py_None)
        return WAITER_ANY_BUCKET;
    for (size_t i = 0; PyUnicode_Check(protocol) && i < 3; i++)
        if (PyUnicode_CompareWithASCIIString(protocol, known[i].name) == 0)
            return known[i].mask;
    return 0;
}

static uint32_t version_mask(PyObject *version)
{
    if (version == Py_None)
        return WAITER_ANY_BUCKET;
    int overflow = 0;
    long value = PyLong_Check(version) ? PyLong_AsLongAndOverflow(version, &overflow) : 0;
    return value == 4 ? IPV4_MASK : value == 6 ? IPV6_MASK : 0;
}

/* The buckets that a call wants; 0 with an exception when this pool can never have one. */
static uint32_t wanted_mask(PoolObject *self, PyObject *protocol, PyObject *ip_version)
{
    uint32_t mask = self->mask & protocol_mask(protocol) & version_mask(ip_version);
    if (mask)
        return mask;
    PyObject *error = PyObject_CallMethod((PyObject *)self, "_no_such_kind", "OO", protocol, ip_version);
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    return 0;
}

static PyObject *get_with(PoolObject *self, PyObject *timeout, PyObject *protocol, PyObject *ip_version, bool may_wait)
{
    uint64_t timeout_ns = self->default_timeout_ns;
    if (timeout != Py_None && !seconds_ns(timeout, "timeout", &timeout_ns))
        return NULL;
    uint32_t mask = check_made(self) ? wanted_mask(self, protocol, ip_version) : 0;
    return mask ? get_lease(self, mask, timeout_ns, may_wait) : NULL;
}

static const char *const get_arguments[] = {"timeout", "protocol", "ip_version"};

static PyObject *pool_get(PoolObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    PyObject *values[3];
    if (SHM_LIKELY(count == 0 && !names))
        return get_lease(self, self->mask, self->default_timeout_ns, true);
    if (!parse_call("get", get_arguments, 3, args, count, names, values))
        return NULL;
    return get_with(self, values[0], values[1], values[2], true);
}

static PyObject *pool_try_get(PoolObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    PyObject *values[2];
    if (!parse_call("try_get", get_arguments + 1, 2, args, count, names, values))
        return NULL;
    return get_with(self, Py_None, values[0], values[1], false);
}

/* get_tcp() and its like: get() restricted to `mask`. */
static PyObject *get_kind(PoolObject *self, const char *function, uint32_t mask, const char *protocol, int version,
                          PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    PyObject *timeout;
    if (!parse_call(function, get_arguments, 1, args, count, names, &timeout))
        return NULL;
    uint64_t timeout_ns = self->default_timeout_ns;
    if (timeout != Py_None && !seconds_ns(timeout, "timeout", &timeout_ns))
        return NULL;
    if (SHM_LIKELY(self->mask & mask))
        return get_lease(self, self->mask & mask, timeout_ns, true);
    PyObject *kind = protocol ? PyUnicode_FromString(protocol) : PyLong_FromLong(version);
    if (kind)
        wanted_mask(self, protocol ? kind : Py_None, protocol ? Py_None : kind);
    Py_XDECREF(kind);
    return NULL;
}

#define GET_KIND(name, mask, protocol, version)                                                                        \
    static PyObject *pool_##name(PoolObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)           \
    {                                                                                                                  \
        return get_kind(self, #name, mask, protocol, version, args, count, names);                                     \
    }
GET_KIND(get_tcp, TCP_MASK, "tcp", 0)
GET_KIND(get_udp, UDP_MASK, "udp", 0)
GET_KIND(get_ipv4, IPV4_MASK, NULL, 4)
GET_KIND(get_ipv6, IPV6_MASK, NULL, 6)

/* ---- the other methods of PoolBase ---- */

/* _mail(slot, id, fd) -> bool: put the descriptor of a connection that is being dialled into the slot's mailbox, in place of an
 * earlier one, so that recovery can end it if this process dies before the dial is done. */
static PyObject *pool_mail(PoolObject *self, PyObject *args)
{
    unsigned slot;
    unsigned long long id;
    int fd;
    if (!check_made(self) || !PyArg_ParseTuple(args, "IKi", &slot, &id, &fd))
        return NULL;
    struct pool *pool = &self->pool;
    if (slot >= pool->slab.layout.max_slots || !pool_joined(pool))
        Py_RETURN_FALSE;
    uint64_t word = slot_load(&pool->slab.slots[slot]);
    if (slot_state(word) != SLOT_DIALING || slot_owner(word) != pool->worker ||
        SHM_LOAD(row, pool->slab.slots[slot].connection) != id)
        Py_RETURN_FALSE;
    mailbox_drain(pool->mailboxes[slot]);
    return PyBool_FromLong(mailbox_deposit(pool->mailboxes[slot], pool->slab.header->id, slot, id, fd, NULL, 0) == 0);
}

static PyObject *pool_is_open_(PoolObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(self->made && !self->finished && pool_is_open(&self->pool));
}

/* _open(mask, limit) -> bool: open a connection within `limit` seconds and leave it idle; False when no slot is empty, the server is known to be down, or the pool
 * is drained. on_created runs,
 * on_borrow and on_return do not. */
static PyObject *pool_open_(PoolObject *self, PyObject *args)
{
    struct pool_claim claim;
    unsigned mask;
    PyObject *limit = NULL;
    uint64_t limit_ns = NEVER;
    if (!check_made(self) || !PyArg_ParseTuple(args, "I|O", &mask, &limit) || (limit && !seconds_ns(limit, "timeout", &limit_ns)))
        return NULL;
    if (self->finished || !pool_is_open(&self->pool))
        return raise_error(self, "closed", mask, 0, 0);
    if (!ensure_joined(self))
        return NULL;
    if (self->pool.service || steering_now(&self->pool.slab) == SHM_POOL_DRAINING)
        Py_RETURN_FALSE;
    enum pool_taken taken = pool_take_dial(&self->pool, true, &claim);
    uint64_t left = upstream_left(&self->pool.slab, clock_now());
    if (taken != TAKEN_DIAL && left && left <= UPSTREAM_NEAR_NS) {
        if (!nap(left) || !ensure_joined(self))
            return NULL;
        taken = pool_take_dial(&self->pool, true, &claim);
    }
    if (taken != TAKEN_DIAL)
        Py_RETURN_FALSE;
    struct request request = request_new(mask, limit_ns, true);
    request.attempts = 1;
    pool_announce_dial(&self->pool, &claim, mask, true);
    bool kept = dial(self, &claim, &request);
    if (kept && pool_release(&self->pool, &claim, clock_coarse()) == RELEASE_RETIRE) {
        retire_leased(self, &claim, pool_retire_reason(&self->pool, claim.slot));
        kept = false; /* without a letter it serves one lease, and there is none here */
    }
    if (PyErr_Occurred()) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        if (!pool_is_open(&self->pool))
            finish(self);
        PyErr_Restore(type, value, traceback);
        return NULL;
    }
    return PyBool_FromLong(kept);
}

static PyObject *pool_snapshot(PoolObject *self, PyObject *unused)
{
    (void)unused;
    return check_made(self) ? snapshot_build(&self->pool.slab, self->pool.slab_fd) : NULL;
}

/* _remind() -> None: call _joined() again at the next get() that finds nothing in the local cache. */
static PyObject *pool_remind(PoolObject *self, PyObject *unused)
{
    (void)unused;
    self->remind = true;
    Py_RETURN_NONE;
}

/* _events(first, patient): see events_build() */
static PyObject *pool_events(PoolObject *self, PyObject *args)
{
    unsigned long long first;
    int patient;
    if (!check_made(self) || !PyArg_ParseTuple(args, "Kp", &first, &patient))
        return NULL;
    return events_build(&self->pool.slab, first, patient != 0);
}

static int pool_traverse(PoolObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->on_borrow);
    Py_VISIT(self->on_return);
    Py_VISIT(self->on_created);
    Py_VISIT(self->revoked);
    for (uint32_t slot = 0; self->made && slot < self->pool.slab.layout.max_slots; slot++) {
        Py_VISIT((PyObject *)self->pool.entries[slot].socket);
        Py_VISIT((PyObject *)self->pool.entries[slot].session);
    }
    return 0;
}

static int pool_clear(PoolObject *self)
{
    Py_CLEAR(self->on_borrow);
    Py_CLEAR(self->on_return);
    Py_CLEAR(self->on_created);
    Py_CLEAR(self->revoked);
    return 0;
}

static void pool_dealloc(PoolObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->made) {
        Py_XDECREF(join_leave(self, NULL));
        pool_free(&self->pool);
    }
    pool_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

#define METHOD_ENTRY(name, function, flags) {name, FASTCALL(function), flags, NULL},
static PyMethodDef pool_methods[] = {
    {"get", FASTCALL(pool_get), METH_FASTCALL | METH_KEYWORDS, PyDoc_STR("get($self, timeout=None, protocol=None, ip_version=None)\n--\n\n"
               "Lease a connection, waiting up to timeout seconds (None: the pool's get_timeout; 0: for nobody's return).\n\n"
               "In order: an idle connection this process used last; one from the shared list; one out of another process's\n"
               "cache; a new one, if the cap allows; what a dead process held; else the first that is returned, in order of\n"
               "arrival. protocol ('tcp', 'udp', 'unix') and ip_version (4, 6) restrict the choice.\n\n"
               "Raises PoolTimeout, PoolClosed, DialError (the server cannot be reached), PoolExhausted (more than max_waiters\n"
               "wait, or more than max_workers processes take part), NoConnectionForProtocol, NoConnectionForIPVersion, or what\n"
               "a signal handler raised. Threads may call it at once; forked children use it as it is.")},
    {"try_get", FASTCALL(pool_try_get), METH_FASTCALL | METH_KEYWORDS, PyDoc_STR("try_get($self, protocol=None, ip_version=None)\n--\n\n"
               "Lease a connection without waiting for anybody's return: an idle one, or a new one if the cap allows.\n\n"
               "Raises PoolExhausted when there is neither; otherwise as get().")},
    {"get_tcp", FASTCALL(pool_get_tcp), METH_FASTCALL | METH_KEYWORDS, PyDoc_STR("get_tcp($self, timeout=None)\n--\n\nget(timeout, protocol='tcp').")},
    {"get_udp", FASTCALL(pool_get_udp), METH_FASTCALL | METH_KEYWORDS, PyDoc_STR("get_udp($self, timeout=None)\n--\n\nget(timeout, protocol='udp').")},
    {"get_ipv4", FASTCALL(pool_get_ipv4), METH_FASTCALL | METH_KEYWORDS, PyDoc_STR("get_ipv4($self, timeout=None)\n--\n\nget(timeout, ip_version=4).")},
    {"get_ipv6", FASTCALL(pool_get_ipv6), METH_FASTCALL | METH_KEYWORDS, PyDoc_STR("get_ipv6($self, timeout=None)\n--\n\nget(timeout, ip_version=6).")},
    {"_mail", FASTCALL(pool_mail), METH_VARARGS, NULL},
    {"_is_open", FASTCALL(pool_is_open_), METH_NOARGS, NULL},
    {"_snapshot", FASTCALL(pool_snapshot), METH_NOARGS, NULL},
    {"_events", FASTCALL(pool_events), METH_VARARGS, NULL},
    {"_remind", FASTCALL(pool_remind), METH_NOARGS, NULL},
    {"_open", FASTCALL(pool_open_), METH_VARARGS, NULL},
    JOIN_METHODS(METHOD_ENTRY)
    CARE_METHODS(METHOD_ENTRY)
    {NULL},
};

static PyType_Slot pool_slots[] = {
    {Py_tp_dealloc, pool_dealloc}, {Py_tp_traverse, pool_traverse}, {Py_tp_clear, pool_clear},
    {Py_tp_methods, pool_methods}, {Py_tp_doc, (void *)PyDoc_STR("The C half of shmpool.Pool.")},
    {0, NULL},
};
static PyType_Spec pool_spec = {"shmpool._core.PoolBase", sizeof(PoolObject), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, pool_slots};

/* ---- the module ---- */

/* layout(slots, workers, waiters) -> (total bytes, bytes a slot, bytes a worker); ValueError when out of range. */
static PyObject *core_layout(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned long long slots, workers, waiters;
    struct slab_layout layout;
    if (!PyArg_ParseTuple(args, "KKK:layout", &slots, &workers, &waiters))
        return NULL;
    if (!slab_layout(&layout, slots, workers, waiters))
        return PyErr_Format(PyExc_ValueError, "layout(%llu, %llu, %llu): a capacity is out of range", slots, workers, waiters);
    return Py_BuildValue("KII", (unsigned long long)layout.total_size, (unsigned)(sizeof(struct slot_shm) + sizeof(struct account_shm)),
                         (unsigned)sizeof(struct worker_shm));
}

/* byte_is_locked(fd, byte) -> bool; worker i is alive while byte i is locked. */
static PyObject *core_byte_is_locked(PyObject *module, PyObject *args)
{
    (void)module;
    int fd;
    long long byte;
    if (!PyArg_ParseTuple(args, "iL:byte_is_locked", &fd, &byte))
        return NULL;
    return PyBool_FromLong(byte_is_locked(fd, byte));
}

/* remove_segment(path, id) -> bool: see segment.h; id b"": only if no process holds it. */
static PyObject *core_remove_segment(PyObject *module, PyObject *args)
{
    (void)module;
    const char *path, *id;
    Py_ssize_t id_size;
    if (!PyArg_ParseTuple(args, "sy#:remove_segment", &path, &id, &id_size))
        return NULL;
    if (id_size != 0 && id_size != 16)
        return PyErr_Format(PyExc_ValueError, "remove_segment: an id has 16 bytes, or none");
    return PyBool_FromLong(segment_remove(path, id_size ? (const uint8_t *)id : NULL));
}

/* family_join(fd) -> None: hold the segment: nobody takes it for the remains of the dead while `fd` is open. */
static PyObject *core_family_join(PyObject *module, PyObject *args)
{
    (void)module;
    int fd;
    if (!PyArg_ParseTuple(args, "i:family_join", &fd))
        return NULL;
    return family_join(fd) ? Py_NewRef(Py_None) : PyErr_SetFromErrno(PyExc_OSError);
}

/* publish(private path, public path): rename that fails (FileExistsError) when the public name exists. */
static PyObject *core_publish(PyObject *module, PyObject *args)
{
    (void)module;
    const char *from, *to;
    if (!PyArg_ParseTuple(args, "ss:publish", &from, &to))
        return NULL;
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE))
        return PyErr_SetFromErrnoWithFilename(PyExc_OSError, to);
    Py_RETURN_NONE;
}

static int soon(void *callable)
{
    PyObject *result = PyObject_CallNoArgs(callable);
    Py_XDECREF(result);
    Py_DECREF((PyObject *)callable);
    return result ? 0 : -1; /* what it raised, a signal handler has: the main thread hears it */
}

/* call_soon(callable) -> None: in the main thread: call it at its next step of Python; elsewhere: nothing. */
static PyObject *core_call_soon(PyObject *module, PyObject *callable)
{
    (void)module;
    if (gettid() != getpid())
        Py_RETURN_NONE;
    if (Py_AddPendingCall(soon, Py_NewRef(callable)) == 0)
        Py_RETURN_NONE;
    Py_DECREF(callable);
    return PyErr_Format(PyExc_RuntimeError, "no room for another pending call");
}

static PyMethodDef core_methods[] = {
    {"layout", core_layout, METH_VARARGS, PyDoc_STR("layout(slots, workers, waiters) -> (total, per slot, per worker) bytes")},
    {"byte_is_locked", core_byte_is_locked, METH_VARARGS, PyDoc_STR("byte_is_locked(fd, byte) -> bool")},
    {"remove_segment", core_remove_segment, METH_VARARGS, PyDoc_STR("remove_segment(path, id) -> bool")},
    {"call_soon", core_call_soon, METH_O, PyDoc_STR("call_soon(callable) -> None")},
    {"family_join", core_family_join, METH_VARARGS, PyDoc_STR("family_join(fd) -> None")},
    {"publish", core_publish, METH_VARARGS, PyDoc_STR("publish(private_path, public_path) -> None")},
    {NULL},
};

static bool add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type, const char *name)
{
    *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *type && PyModule_AddObjectRef(module, name, (PyObject *)*type) == 0;
}

/* SLAB_MAGIC: the bytes that a slab begins with */
static int add_magic(PyObject *module)
{
    uint64_t magic = SHM_MAGIC;
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)&magic, sizeof magic);
    int result = bytes ? PyModule_AddObjectRef(module, "SLAB_MAGIC", bytes) : -1;
    Py_XDECREF(bytes);
    return result;
}

/* What the core needs of Python modules: errors that it raises or recognises itself, and how a socket is closed. */
static bool take_imports(void)
{
    static const struct {
        const char *name;
        PyObject **to;
    } wanted[] = {{"LeaseExpired", &lease_expired}, {"PoolClosed", &pool_closed}, {"PoolExhausted", &pool_exhausted},
                  {"DialError", &dial_error}};
    PyObject *errors = PyImport_ImportModule("shmpool.errors");
    for (size_t i = 0; errors && i < sizeof wanted / sizeof wanted[0]; i++)
        Py_XSETREF(*wanted[i].to, PyObject_GetAttrString(errors, wanted[i].name));
    Py_XDECREF(errors);
    PyObject *sockets = PyImport_ImportModule("_socket"), *type = sockets ? PyObject_GetAttrString(sockets, "socket") : NULL;
    Py_XSETREF(socket_close, type ? PyObject_GetAttrString(type, "close") : NULL);
    Py_XDECREF(type);
    Py_XDECREF(sockets);
    return socket_close && lease_expired && pool_closed && pool_exhausted && dial_error;
}

static int core_exec(PyObject *module)
{
    if (!take_imports() || !add_type(module, &lease_spec, &lease_type, "PooledConnection") ||
        !add_type(module, &pool_spec, &pool_type, "PoolBase") || !add_type(module, &view_spec, &view_type, "SlabView"))
        return -1;
    return PyModule_AddIntConstant(module, "MAX_SLOTS", SHM_MAX_SLOTS) ||
           PyModule_AddIntConstant(module, "MAX_WORKERS", SHM_MAX_WORKERS) ||
           PyModule_AddIntConstant(module, "MAX_WAITERS", SHM_MAX_WAITERS) ||
           PyModule_AddIntConstant(module, "MAX_METADATA", MAILBOX_NOTE_MAX) ||
           PyModule_AddIntConstant(module, "FAMILY_BYTE", (long)SHM_FAMILY_BYTE) ||
           PyModule_AddIntConstant(module, "SLAB_VERSION", SHM_VERSION) || add_magic(module)
               ? -1
               : 0;
}

static PyModuleDef_Slot core_slots[] = {
    {Py_mod_exec, core_exec},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030d0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};
static struct PyModuleDef core_module = {PyModuleDef_HEAD_INIT, .m_name = "shmpool._core", .m_methods = core_methods,
                                         .m_doc = PyDoc_STR("The C core of shmpool; see shmpool/core/module.c."),
                                         .m_slots = core_slots};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&core_module); }
