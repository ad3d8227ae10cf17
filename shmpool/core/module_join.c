/* module_join.c: how a PoolBase comes by its pool and leaves it: makes it, joins it with the descriptors of another process, answers newcomers, gives its
 * part back. Not here: who is asked for them (shmpool/rendezvous.py), what they are (descriptors.h), the end of a closed pool (module_entry.c). */
#include "module.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "segment.h"
#include "service.h"

#define RECEIVE_TIMEOUT_NS UINT64_C(200000000)

static uint64_t limited_ns(double seconds) { return seconds > 9e9 ? NEVER : (uint64_t)(seconds * 1e9); }

static void take_hook(PyObject **to, PyObject *hook) { Py_XSETREF(*to, hook == Py_None ? NULL : Py_NewRef(hook)); }

/* What this process wants of the pool, the same for a pool that it makes and one that it joins: (local_cache_size, alive_bypass,
 * idle_timeout, clear_udp_buffer, udp_clear_timeout, udp_clear_max_packets, stats, min_connections, idle_limit), (first and longest
 * backoff, connection_timeout, dial_retries, wait when down), get_timeout, mask, on_borrow, on_return, on_created, is there an acceptor. */
static bool take_settings(PoolObject *self, PyObject *settings, struct pool_options *options)
{
    unsigned cache, udp_packets, mask, minimum, idle_limit, retries;
    int clear_udp, stats, wait_when_down, by_hand;
    double bypass, idle, udp_timeout, first, last, dial_limit;
    uint64_t timeout_ns;
    PyObject *timeout, *on_borrow, *on_return, *on_created;
    if (!PyArg_ParseTuple(settings, "(IddpdIpII)(dddIp)OIOOOp:settings", &cache, &bypass, &idle, &clear_udp, &udp_timeout, &udp_packets,
                          &stats, &minimum, &idle_limit, &first, &last, &dial_limit, &retries, &wait_when_down, &timeout, &mask,
                          &on_borrow, &on_return, &on_created, &by_hand) ||
        !seconds_ns(timeout, "get_timeout", &timeout_ns))
        return false;
    if (self->made || cache > LOCAL_CACHE_MAX || !mask || mask > WAITER_ANY_BUCKET)
        return PyErr_Format(PyExc_ValueError, "a pool is made once, and its settings are in range") != NULL;
    struct upstream_backoff backoff = {limited_ns(first), limited_ns(last), limited_ns(dial_limit + 1)};
    *options = (struct pool_options){cache, limited_ns(bypass), limited_ns(idle), (uint64_t)(udp_timeout * 1e9), udp_packets,
                                     clear_udp != 0, stats != 0, minimum, idle_limit, backoff};
    self->mask = mask;
    self->default_timeout_ns = timeout_ns;
    self->dial_retries = retries;
    self->wait_when_down = wait_when_down != 0;
    self->accepts_by_hand = by_hand != 0;
    take_hook(&self->on_borrow, on_borrow);
    take_hook(&self->on_return, on_return);
    take_hook(&self->on_created, on_created);
    return true;
}

static void begin_use(PoolObject *self)
{
    self->made = true;
    self->pool.notes_ended = true;
    for (uint32_t slot = 0; slot < self->pool.slab.layout.max_slots; slot++)
        entry_take(&self->pool.entries[slot]);
    self->generation = self->pool.generation;
}

/* _create(fd, listener, (cap, slots, workers, waiters), (id, created, uid, name, target, config, rendezvous), settings): the descriptors are
 * ours, also if this raises: whoever looks at a signal in between cannot close them twice. */
PyObject *join_create(PoolObject *self, PyObject *args)
{
    unsigned cap, slots, workers, waiters, uid;
    int fd = -1, listener = -1;
    const char *id, *name, *target, *config, *rendezvous;
    Py_ssize_t id_size;
    double created;
    PyObject *settings;
    struct slab_layout layout;
    struct pool_options options;
    bool good = PyArg_ParseTuple(args, "ii(IIII)(y#dIssss)O!", &fd, &listener, &cap, &slots, &workers, &waiters, &id, &id_size, &created,
                                 &uid, &name, &target, &config, &rendezvous, &PyTuple_Type, &settings);
    if (good && (id_size != 16 || !slab_layout(&layout, slots, workers, waiters) || !cap || cap > slots))
        good = PyErr_Format(PyExc_ValueError, "_create: a capacity is out of range") != NULL;
    if (!good || !take_settings(self, settings, &options)) {
        if (fd >= 0)
            close(fd);
        if (listener >= 0)
            close(listener);
        return NULL;
    }
    struct slab_identity who = {(const uint8_t *)id, (uint64_t)(created * 1e9), uid, (uint32_t)getpid(), name, target, config,
                                rendezvous, cap};
    forks_hold();
    bool made = pool_create(&self->pool, fd, listener, &layout, &who, &options) == POOL_OK;
    if (made)
        begin_use(self);
    else
        pool_free(&self->pool);
    forks_release();
    return made ? Py_NewRef(Py_None) : PyErr_SetFromErrno(PyExc_OSError);
}

/* _serve(listener): accept clients from that listening socket, which is ours from now on; before the pool is published. If this raises, it is not. */
PyObject *join_serve(PoolObject *self, PyObject *args)
{
    int listener;
    if (!check_made(self) || !PyArg_ParseTuple(args, "i", &listener))
        return NULL;
    forks_hold();
    int error = service_create(&self->pool, listener);
    forks_release();
    errno = error;
    return error ? PyErr_SetFromErrno(PyExc_OSError) : Py_NewRef(Py_None);
}

/* _listener() -> int: this process's descriptor of the socket from which clients are accepted, -1: there is none. */
PyObject *join_listener(PoolObject *self, PyObject *unused)
{
    (void)unused;
    struct service *service = self->made ? self->pool.service : NULL;
    return PyLong_FromLong(service ? atomic_load(&service->listener) : -1);
}

/* Join with a set that is ours, which takes it over. Forks of other threads wait from the moment in which the set began to be ours: a child
 * would have the descriptors and no handle of them, and keep the pool's name from others for as long as it lives. Runs without the GIL. */
static enum pool_verdict join_with(PoolObject *self, struct descriptors *set, const char *id, const struct pool_options *options,
                                   enum slab_verdict *why)
{
    if (memcmp(set->slab_id, id, sizeof set->slab_id)) {
        descriptors_close(set);
        return POOL_LOST_DESCRIPTORS;
    }
    enum pool_verdict verdict = pool_attach(&self->pool, set, options, why);
    if (verdict == POOL_OK)
        begin_use(self);
    else
        pool_free(&self->pool);
    return verdict;
}

/* None, or what is wrong with the set: ValueError(why, is a matter of versions): the slab is none; LookupError: it is of another pool, or of
 * none; IndexError: there is no place for a worker; OSError (errno): it did not come whole. */
static PyObject *joined_or_raise(enum pool_verdict verdict, enum slab_verdict why)
{
    switch (verdict) {
    case POOL_OK:
        Py_RETURN_NONE;
    case POOL_BAD_SLAB:
        return raise_bad_slab(why);
    case POOL_LOST_DESCRIPTORS:
        return PyErr_Format(PyExc_LookupError, "the descriptors are not those of the pool");
    case POOL_NO_WORKER:
        return PyErr_Format(PyExc_IndexError, "every place for a worker is taken");
    default:
        return PyErr_SetFromErrno(PyExc_OSError);
    }
}

/* _attach(socket, timeout, id, settings): join the pool whose descriptors arrive over the socket; see joined_or_raise(). */
PyObject *join_attach(PoolObject *self, PyObject *args)
{
    int from;
    double timeout;
    const char *id;
    Py_ssize_t id_size;
    PyObject *settings;
    struct pool_options options;
    struct descriptors set;
    enum slab_verdict why = SLAB_OK;
    enum pool_verdict verdict = POOL_ERRNO;
    if (!PyArg_ParseTuple(args, "idy#O!", &from, &timeout, &id, &id_size, &PyTuple_Type, &settings) ||
        !take_settings(self, settings, &options))
        return NULL;
    if (id_size != sizeof set.slab_id)
        return PyErr_Format(PyExc_ValueError, "_attach: an id has 16 bytes");
    Py_BEGIN_ALLOW_THREADS
    int error = descriptors_await(from, (uint64_t)(timeout * 1e9));
    if (!error) {
        forks_hold(); /* who has begun to send goes on, or is gone */
        if (!(error = descriptors_receive(from, &set, RECEIVE_TIMEOUT_NS)))
            verdict = join_with(self, &set, id, &options, &why);
        forks_release();
    }
    if (error)
        errno = error;
    Py_END_ALLOW_THREADS
    return joined_or_raise(verdict, why);
}

/* The system calls by number: the headers of many build machines are older than they. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

/* Duplicates of another process's descriptors `theirs`: [mailboxes], then the listener if `listens`. 0 or errno. */
static int copy_set(pid_t pid, const int *theirs, bool listens, struct descriptors *set, uint32_t count)
{
    int error = 0, process = (int)syscall(SYS_pidfd_open, pid, 0);
    if (process < 0)
        return errno;
    for (uint32_t i = 0; !error && i < count + listens; i++) {
        int ours = (int)syscall(SYS_pidfd_getfd, process, theirs[i], 0); /* close-on-exec */
        if (ours < 0)
            error = errno;
        else if (i < count)
            set->mailboxes[set->count++] = ours;
        else
            set->listener = ours;
    }
    close(process);
    return error;
}

/* _attach_copies(pid, slab, id, [descriptors of that process: mailboxes, listener], has a listener, settings): join with duplicates of what
 * another process has, where the kernel lets us (pidfd_getfd(2)), and of our own descriptor of the segment. */
PyObject *join_attach_copies(PoolObject *self, PyObject *args)
{
    int pid, slab, listens;
    const char *id;
    Py_ssize_t id_size;
    PyObject *list, *settings;
    struct pool_options options;
    struct descriptors set = {.slab = -1, .listener = -1};
    enum slab_verdict why = SLAB_OK;
    enum pool_verdict verdict = POOL_ERRNO;
    if (!PyArg_ParseTuple(args, "iiy#O!pO!", &pid, &slab, &id, &id_size, &PyList_Type, &list, &listens, &PyTuple_Type, &settings) ||
        !take_settings(self, settings, &options))
        return NULL;
    Py_ssize_t all = PyList_GET_SIZE(list);
    if (id_size != sizeof set.slab_id || all <= listens || all > (Py_ssize_t)SHM_MAX_SLOTS + 1)
        return PyErr_Format(PyExc_ValueError, "_attach_copies: an id has 16 bytes, and a pool a mailbox");
    int *theirs = PyMem_Calloc((size_t)all, sizeof *theirs);
    set.mailboxes = malloc((size_t)all * sizeof *set.mailboxes); /* descriptors_close() frees it */
    for (Py_ssize_t i = 0; theirs && i < all && !PyErr_Occurred(); i++)
        theirs[i] = (int)PyLong_AsLong(PyList_GET_ITEM(list, i));
    if (!theirs || !set.mailboxes || PyErr_Occurred()) {
        PyMem_Free(theirs);
        free(set.mailboxes);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    memcpy(set.slab_id, id, sizeof set.slab_id);
    Py_BEGIN_ALLOW_THREADS
    forks_hold();
    set.slab = fcntl(slab, F_DUPFD_CLOEXEC, 3);
    int error = set.slab < 0 ? errno : copy_set(pid, theirs, listens, &set, (uint32_t)(all - listens));
    if (!error)
        verdict = join_with(self, &set, id, &options, &why);
    else
        descriptors_close(&set);
    forks_release();
    if (error)
        errno = error;
    Py_END_ALLOW_THREADS
    PyMem_Free(theirs);
    return joined_or_raise(verdict, why);
}

/* _answer(listener): answer newcomers who come to that listening socket, from now on; it is ours, also if this raises. -1: to the one that
 * we have. */
PyObject *join_answer(PoolObject *self, PyObject *args)
{
    int listener;
    if (!PyArg_ParseTuple(args, "i", &listener))
        return NULL;
    bool open = self->made && !self->finished && pool_is_open(&self->pool);
    if (open && ensure_joined(self)) { /* also begins to answer again after a fork */
        errno = listener < 0 ? 0 : pool_listen(&self->pool, listener);
        if (!errno)
            Py_RETURN_NONE;
        PyErr_SetFromErrno(PyExc_OSError);
    }
    if (listener >= 0)
        close(listener);
    return open ? NULL : raise_error(self, "closed", 0, 0, 0);
}

/* _finish() -> bool: give this process's part back if it holds no lease; whether it is done. */
static PyObject *join_finish_alone(PoolObject *self)
{
    if (!check_made(self))
        return NULL;
    finish(self);
    return PyBool_FromLong(self->finished);
}

/* _leave() -> None: this process takes no further part; the pool lives on for the others. */
static PyObject *join_leave_alone(PoolObject *self)
{
    finish_for_parent(self);
    if (self->made && !self->finished) {
        self->finished = true;
        self->finisher = getpid();
        forget_foreign(self);
        Py_BEGIN_ALLOW_THREADS
        pool_leave(&self->pool);
        Py_END_ALLOW_THREADS
        drop_entries(self);
        tell_ended(self);
        pool_release_descriptors(&self->pool);
    }
    Py_RETURN_NONE;
}

/* _unmake() -> None: leave, and be as if never made: another process was first to publish. */
static PyObject *join_unmake_alone(PoolObject *self)
{
    Py_XDECREF(join_leave_alone(self));
    if (self->made)
        pool_free(&self->pool);
    self->made = self->finished = false;
    Py_RETURN_NONE;
}

ALONE(join_finish)
ALONE(join_leave)
ALONE(join_unmake)

/* _note_path(path) -> None: where the segment is, for a process that ends without leaving. */
PyObject *join_note_path(PoolObject *self, PyObject *args)
{
    const char *path;
    if (!check_made(self) || !PyArg_ParseTuple(args, "s", &path))
        return NULL;
    if (!self->finished)
        segment_note(self->pool.seat, self->pool.slab_fd, path);
    Py_RETURN_NONE;
}

/* _identity() -> (id of the slab, path of the socket for newcomers); (b"", "") before there is one. */
PyObject *join_identity(PoolObject *self, PyObject *unused)
{
    (void)unused;
    if (!self->made)
        return Py_BuildValue("y#s", "", (Py_ssize_t)0, "");
    struct header_shm *header = self->pool.slab.header;
    return Py_BuildValue("y#s", header->id, (Py_ssize_t)sizeof header->id, header->rendezvous);
}

/* _left() -> bool: this process has left the pool, which is open for others. */
PyObject *join_left(PoolObject *self, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(self->made && self->finished && pool_is_open(&self->pool));
}
