/* module_view.c: the slab as Python objects, for whoever looks: snapshots, and SlabView, a read-only mapping of a slab.
 *
 * Reading writes nothing and takes no lock. A slot is read between two equal words, so that its fields belong to one moment; the
 * whole is not a cut: it is read in some tens of microseconds while the pool goes on. What is read is bounds-checked by
 * slab_open(); a state that does not exist is named "invalid".
 *
 * ORDER(snapshot): acquire. The fields are loaded before the word is loaded again. Pairs with the CAS in slot_move(), after which
 * alone a holder writes them; weaker would take a row of two moments for one. Nobody but a reader of figures relies on it.
 *
 * Not here: figures made of a snapshot (shmpool/stats.py), finding a segment and checking whose it is (shmpool/inspector.py).
 */
#include "module.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pool.h"

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
        PyObject *value = PyLong_FromUnsignedLongLong(SHM_LOAD(count, counters[i]));
        if (!value || PyDict_SetItemString(dict, names[i], value))
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

#define COUNTER_NAME(name, text) #name,
static const char *const worker_counter_names[] = {SHM_WORKER_COUNTERS(COUNTER_NAME)};
static const char *const total_counter_names[] = {SHM_TOTAL_COUNTERS(COUNTER_NAME)};

/* One slot; the row is read between two equal words, so that it belongs to one moment, or after a few tries as it is. */
static PyObject *slot_tuple(struct slab *slab, uint32_t index)
{
    struct slot_shm *row = &slab->slots[index];
    uint64_t word = 0, fields[6], peer[3];
    uint32_t kind = 0;
    for (int tries = 0; tries < 4; tries++) {
        word = slot_load(row);
        a64_shm *const from[] = {&row->connection, &row->created_ns, &row->last_used_ns, &row->leased_ns, &row->uses,
                                 &row->created_realtime_ns};
        for (int i = 0; i < 6; i++)
            fields[i] = SHM_LOAD_ACQUIRE(snapshot, *from[i]);
        for (int i = 0; i < 3; i++)
            peer[i] = SHM_LOAD_ACQUIRE(snapshot, row->peer[i]);
        kind = SHM_LOAD_ACQUIRE(snapshot, row->kind);
        if (slot_load(row) == word)
            break;
    }
    return Py_BuildValue("IsiKIy#KKKKI", index, slot_state_name(slot_state(word)), (int)slot_owner(word) - 1,
                         (unsigned long long)fields[0], kind_bucket(kind), (const char *)peer, (Py_ssize_t)sizeof peer,
                         (unsigned long long)fields[1], (unsigned long long)fields[2], (unsigned long long)fields[3],
                         (unsigned long long)fields[4], kind >> 8);
}

static PyObject *slot_list(struct slab *slab)
{
    PyObject *list = PyList_New(slab->layout.max_slots);
    for (uint32_t i = 0; list && i < slab->layout.max_slots; i++) {
        PyObject *row = slot_tuple(slab, i);
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

PyObject *snapshot_build(struct slab *slab, int fd)
{
    struct header_shm *header = slab->header;
    bool open = SHM_LOAD(hint, header->state) == SHM_POOL_OPEN;
    return Py_BuildValue(
        "{sssssssIsIsdsKsssIsIsIsK sN sN s(sssssssssss) sN s(ssssssss) sN s(ssssss) sN sN}", "name", header->name, "target",
        header->target, "config", header->config, "uid", header->creator_uid, "creator_pid", header->creator_pid, "created_at",
        (double)header->created_realtime_ns / 1e9, "now", (unsigned long long)clock_now(), "state", open ? "open" : "closed",
        "max_connections", header->max_slots, "max_workers", header->max_workers, "max_waiters", header->max_waiters, "size",
        (unsigned long long)header->total_size, "totals",
        counter_dict(slab->totals->counters, total_counter_names, SHM_T_COUNT), "slots", slot_list(slab), "slot_fields",
        "index", "state", "owner", "id", "bucket", "peer", "created_ns", "last_used_ns", "leased_ns", "uses", "flags",
        "workers", worker_list(slab, fd), "worker_fields", "index", "pid", "alive", "started_ns", "generation", "counters",
        "get_hist", "use_hist", "waiters", waiter_list(slab), "waiter_fields", "index", "worker", "tid", "mask", "since_ns",
        "state", "wait_hist", hist_list(&slab->totals->wait), "dial_hist", hist_list(&slab->totals->dial));
}

/* ---- SlabView ---- */

typedef struct {
    PyObject_HEAD
    struct slab slab;
    int fd;
} ViewObject;

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

/* SlabView(fd): map the segment of `fd` read-only and check it. The view keeps a duplicate of the descriptor. */
static int view_init(ViewObject *self, PyObject *args, PyObject *names)
{
    static char *known[] = {"fd", NULL};
    int fd;
    struct stat status;
    if (!PyArg_ParseTupleAndKeywords(args, names, "i:SlabView", known, &fd))
        return -1;
    if (self->slab.header) {
        PyErr_SetString(PyExc_RuntimeError, "a SlabView is opened once");
        return -1;
    }
    if (fstat(fd, &status)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    size_t size = (size_t)status.st_size;
    enum slab_verdict verdict = SLAB_TOO_SMALL;
    if (size >= SHM_HEADER_BYTES) {
        void *base = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
        if (base == MAP_FAILED) {
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        verdict = slab_open(&self->slab, base, size);
        if (verdict != SLAB_OK) {
            munmap(base, size);
            self->slab.header = NULL;
        }
    }
    if (verdict != SLAB_OK) {
        raise_bad_slab(verdict);
        return -1;
    }
    self->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    return 0;
}

/* Is the mapping there and whole? An exception is set when not. */
static bool view_is_whole(ViewObject *self)
{
    struct stat status;
    if (!self->slab.header)
        return PyErr_Format(PyExc_ValueError, "the view is closed") != NULL;
    if (fstat(self->fd, &status) || (uint64_t)status.st_size < self->slab.layout.total_size) /* cut: reading would SIGBUS */
        return PyErr_Format(PyExc_ValueError, "the segment was cut to %lld bytes", (long long)status.st_size) != NULL;
    return true;
}

static PyObject *view_snapshot(ViewObject *self, PyObject *unused)
{
    (void)unused;
    return view_is_whole(self) ? snapshot_build(&self->slab, self->fd) : NULL;
}

/* identity() -> (id, name, config, rendezvous, listener's inode, creator's pid, open?): what never changes, and whether the pool is open. */
static PyObject *view_identity(ViewObject *self, PyObject *unused)
{
    (void)unused;
    if (!view_is_whole(self))
        return NULL;
    struct header_shm *header = self->slab.header;
    return Py_BuildValue("y#sssKIN", header->id, (Py_ssize_t)sizeof header->id, header->name, header->config, header->rendezvous,
                         (unsigned long long)header->listener_inode, header->creator_pid, PyBool_FromLong(SHM_LOAD(hint, header->state) == SHM_POOL_OPEN));
}

/* mailboxes() -> [inode of each slot's mailbox] */
static PyObject *view_mailboxes(ViewObject *self, PyObject *unused)
{
    (void)unused;
    if (!view_is_whole(self))
        return NULL;
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
static PyObject *view_workers(ViewObject *self, PyObject *unused)
{
    (void)unused;
    PyObject *list = view_is_whole(self) ? PyList_New(0) : NULL;
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
    return PyBool_FromLong(self->slab.header && byte_is_locked(self->fd, SHM_FAMILY_BYTE));
}

static PyObject *view_close(ViewObject *self, PyObject *unused)
{
    (void)unused;
    if (self->slab.header) {
        munmap(self->slab.header, self->slab.layout.total_size);
        close(self->fd);
        self->slab.header = NULL;
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

static PyMethodDef view_methods[] = {
    {"snapshot", FASTCALL(view_snapshot), METH_NOARGS, PyDoc_STR("snapshot() -> dict")},
    {"identity", FASTCALL(view_identity), METH_NOARGS, PyDoc_STR("identity() -> (id, name, config, rendezvous, listener's inode, creator's pid, open)")},
    {"mailboxes", FASTCALL(view_mailboxes), METH_NOARGS, PyDoc_STR("mailboxes() -> [inode of each slot's mailbox]")},
    {"workers", FASTCALL(view_workers), METH_NOARGS, PyDoc_STR("workers() -> [pid of each living member]")},
    {"in_use", FASTCALL(view_in_use), METH_NOARGS, PyDoc_STR("in_use() -> bool: does any process still hold the slab?")},
    {"close", FASTCALL(view_close), METH_NOARGS, PyDoc_STR("close() -> None")},
    {NULL},
};
static PyType_Slot view_slots[] = {
    {Py_tp_init, view_init},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_methods, view_methods},
    {Py_tp_doc, (void *)PyDoc_STR("SlabView(fd): a read-only look at a slab; ValueError((why, is_version)) when it is none.")},
    {0, NULL},
};
PyType_Spec view_spec = {"shmpool._core.SlabView", sizeof(ViewObject), 0, Py_TPFLAGS_DEFAULT, view_slots};
