/* module_entry.c: what this process has of a connection (its entry: descriptor, socket object, session, note), and the end of connections: closing
 * what we have, telling Python, giving this process's part back. Not here: who may end what (pool.c), leases (module.c). */
#include "module.h"

#include <errno.h>
#include <unistd.h>

#include "connection.h"
#include "recovery.h"

PyObject *lease_expired, *socket_close;

PyObject *raise_expired(uint64_t id, const char *reason)
{
    PyObject *arguments = PyTuple_New(0);
    PyObject *evidence = Py_BuildValue("{sKss}", "connection_id", (unsigned long long)id, "reason", reason);
    PyObject *error = arguments && evidence ? PyObject_Call(lease_expired, arguments, evidence) : NULL;
    if (error)
        PyErr_SetObject(lease_expired, error);
    Py_XDECREF(error);
    Py_XDECREF(arguments);
    Py_XDECREF(evidence);
    return NULL;
}

/* ---- entries: what this process has of a connection ---- */

/* What a socket's mark says (PooledSocket in shmpool/pool.py). A TLS socket of the user's own has no mark: always CHANGED. */
enum { MARK_CHANGED = 1, MARK_RUINED = 2 };
const char always_dirty[1] = {MARK_CHANGED};
static const char never_dirty[1] = {0};

struct parts entry_take(struct entry *entry)
{
    struct parts parts = {entry->socket, entry->session, entry->note, entry->socket ? -1 : entry->fd};
    entry->connection = 0;
    entry->fd = -1;
    entry->dirty = always_dirty;
    entry->socket = entry->session = entry->note = NULL;
    return parts;
}

/* Drop the session first (it may still say good-bye), then close our copy. Errors of either go to the unraisable hook. */
void parts_drop_session(struct parts *parts) { Py_CLEAR(parts->session); }

/* Does a makefile() of the socket exist, which shares its descriptor? Then Python's close() leaves it to that. Else it is closed without a
 * step of Python, in which a signal handler could raise or fork. */
static bool socket_has_files(PyObject *socket)
{
    PyObject *count = PyObject_GetAttrString(socket, "_io_refs");
    bool has = count && PyObject_IsTrue(count) > 0;
    Py_XDECREF(count);
    PyErr_Clear();
    return has;
}

void parts_close(struct parts *parts)
{
    if (parts->fd >= 0)
        close(parts->fd);
    parts->fd = -1;
    if (parts->socket) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        PyObject *result = socket_has_files(parts->socket) ? PyObject_CallMethod(parts->socket, "close", NULL)
                                                           : PyObject_CallOneArg(socket_close, parts->socket);
        if (!result)
            PyErr_WriteUnraisable(parts->socket);
        Py_XDECREF(result);
        PyErr_Restore(type, value, traceback);
    }
    Py_CLEAR(parts->socket);
    Py_CLEAR(parts->note);
}

/* What we have of a connection that has ended elsewhere. Our own holder of it, whose lease was revoked, may be in the middle of a call: its
 * socket object is closed when nobody has it any more (PooledSocket.__del__). */
void parts_let_go(struct entry *entry)
{
    bool noted = entry->dirty != always_dirty;
    struct parts old = entry_take(entry);
    parts_drop_session(&old);
    if (noted)
        Py_CLEAR(old.socket);
    parts_close(&old);
}

/* This process has not seen the slot's connection: drop what it has of an older one and fetch this one from the mailbox.
 * 1: done; 0: there is no letter that fits; -1: exception, the connection may be good. */
int entry_fetch(PoolObject *self, uint32_t slot)
{
    struct pool *pool = &self->pool;
    struct entry *entry = &pool->entries[slot];
    struct slot_shm *row = &pool->slab.slots[slot];
    parts_let_go(entry);
    uint64_t connection = SHM_LOAD(row, row->connection);
    struct letter letter;
    int fd = mailbox_peek(pool->mailboxes[slot], pool->slab.header->id, slot, connection, &letter);
    if (fd == MAILBOX_NO_ROOM) {
        errno = EMFILE;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    pool_count(pool, fd < 0 ? SHM_W_bad_letters : SHM_W_mailbox_reads, 1);
    if (fd < 0)
        return 0;
    PyObject *note = PyBytes_FromStringAndSize((const char *)letter.note, letter.head.note_size);
    if (!note) {
        close(fd);
        return -1;
    }
    entry->dirty = never_dirty;
    entry->note = note;
    entry->fd = fd;
    entry->connection = connection; /* last: a child forked in between sees nothing */
    return 1;
}

/* This process's socket object of a leased connection, borrowed; NULL with an exception. */
PyObject *entry_socket(PoolObject *self, uint32_t slot)
{
    struct entry *entry = &self->pool.entries[slot];
    if (SHM_LIKELY(entry->socket != NULL))
        return entry->socket;
    unsigned bucket = kind_bucket(SHM_LOAD(row, self->pool.slab.slots[slot].kind));
    int fd = entry->fd;
    uint64_t connection = entry->connection;
    entry->fd = -1; /* _wrap's from now on; in its Python another thread may revoke this lease, or fork */
    entry->connection = 0;
    PyObject *pair = PyObject_CallMethod((PyObject *)self, "_wrap", "iI", fd, bucket);
    bool is_ours = !entry->connection && !entry->socket && entry->fd < 0;
    if (!pair) { /* it has closed the descriptor; the next lease fetches another */
        if (is_ours) {
            struct parts parts = entry_take(entry);
            parts_drop_session(&parts);
            parts_close(&parts);
        }
        return NULL;
    }
    PyObject *mark = PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2 ? PyTuple_GET_ITEM(pair, 1) : NULL;
    if (!is_ours)
        raise_expired(connection, "it was taken away");
    else if (mark && PyByteArray_Check(mark)) {
        entry->socket = Py_NewRef(PyTuple_GET_ITEM(pair, 0));
        entry->dirty = PyByteArray_AS_STRING(mark); /* the socket object keeps the bytearray */
        entry->fd = fd;
        entry->connection = connection;
    } else
        PyErr_SetString(PyExc_TypeError, "_wrap must return (socket, bytearray)");
    Py_DECREF(pair);
    return PyErr_Occurred() ? NULL : entry->socket;
}

/* ---- ends of connections ---- */

const char *const total_names[] = {
#define TOTAL_NAME(name, text) #name,
    SHM_TOTAL_COUNTERS(TOTAL_NAME)};

/* [(connection, slot, bucket, peer, reason, age, uses), ...], oldest first, of notes that are freed; NULL with an exception */
static PyObject *ended_list(struct ended *notes)
{
    PyObject *list = PyList_New(0);
    for (struct ended *next; notes; notes = next) {
        next = notes->next;
        PyObject *row = list ? Py_BuildValue("KIIy#sdK", (unsigned long long)notes->connection, notes->slot, kind_bucket(notes->kind),
                                             (const char *)notes->peer, (Py_ssize_t)sizeof notes->peer,
                                             total_names[notes->reason] + sizeof "closed_" - 1, (double)notes->age_ns / 1e9,
                                             (unsigned long long)notes->uses)
                             : NULL;
        if (list && (!row || PyList_Append(list, row)))
            Py_CLEAR(list);
        Py_XDECREF(row);
        free(notes);
    }
    if (list && PyList_Reverse(list))
        Py_CLEAR(list);
    return list;
}

static int raise_now(void *error)
{
    PyErr_SetObject((PyObject *)Py_TYPE((PyObject *)error), error);
    Py_DECREF((PyObject *)error);
    return -1;
}

/* A signal handler has raised (nothing else does) where nobody can hear it: it is raised again at the next step of the main thread, in which
 * handlers run. */
static void raise_soon(PyObject *where)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    if (gettid() != getpid() || Py_AddPendingCall(raise_now, Py_NewRef(value))) {
        PyErr_Restore(type, value, traceback);
        PyErr_WriteUnraisable(where);
        return;
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* Tell Python (the log, on_close) which connections this process has ended. Keeps a pending exception; raises none. */
void tell_ended(PoolObject *self)
{
    struct ended *notes = pool_take_ended(&self->pool);
    if (SHM_LIKELY(!notes))
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *list = ended_list(notes);
    PyObject *result = list ? PyObject_CallMethod((PyObject *)self, "_ended", "O", list) : NULL;
    if (!result)
        raise_soon((PyObject *)self);
    Py_XDECREF(result);
    Py_XDECREF(list);
    PyErr_Restore(type, value, traceback);
}

/* Did a fork happen since `generation` (in a signal handler, in dial)? Then nothing we held is ours. */
bool forked_since(PoolObject *self, uint32_t generation)
{
    return !pool_joined(&self->pool) || self->pool.generation != generation;
}

/* Our descriptor of a connection, for ending it; -1 when there is none, or when it may have been closed behind our back. */
int entry_fd(struct pool *pool, uint32_t slot)
{
    struct entry *entry = &pool->entries[slot];
    bool current = entry->connection && entry->connection == SHM_LOAD(row, pool->slab.slots[slot].connection);
    bool noted = entry->dirty != always_dirty; /* else nobody notes what becomes of the socket: the letter has the connection */
    return current && noted && !(*entry->dirty & MARK_RUINED) ? entry->fd : -1;
}

void entry_drop_session(struct entry *entry)
{
    PyObject *session = entry->session;
    entry->session = NULL;
    Py_XDECREF(session);
}

/* Close what we have of the ended connection, then free its permit. */
void empty_slot(PoolObject *self, struct pool_claim *claim, unsigned reason, uint32_t generation)
{
    struct parts parts = entry_take(&self->pool.entries[claim->slot]);
    parts_close(&parts);
    if (!forked_since(self, generation)) /* else the slot is the parent's */
        pool_empty(&self->pool, claim, reason);
}

/* The claim is RETIRING by us: end it, waiting for the peer at most *linger_ns, from which the wait is taken off. The entry stays
 * as it is meanwhile: a child forked in between finds it there and closes its copy. Releases the GIL; keeps a pending exception. */
void retire_condemned(PoolObject *self, struct pool_claim *claim, unsigned reason, uint64_t *linger_ns)
{
    struct pool *pool = &self->pool;
    PyObject *type, *value, *traceback;
    uint32_t generation = pool->generation;
    Py_BEGIN_CRITICAL_SECTION(self);
    PyErr_Fetch(&type, &value, &traceback);
    entry_drop_session(&pool->entries[claim->slot]);
    if (!forked_since(self, generation)) { /* else the slot is the parent's, which goes on with it */
        int fd = entry_fd(pool, claim->slot);
        uint64_t begun = clock_now();
        Py_BEGIN_ALLOW_THREADS
        pool_end(pool, claim, &fd, 1, *linger_ns);
        Py_END_ALLOW_THREADS
        uint64_t waited = clock_now() - begun;
        *linger_ns = waited < *linger_ns ? *linger_ns - waited : 0;
        empty_slot(self, claim, reason, generation);
        tell_ended(self);
    }
    if (!pool_is_open(pool))
        finish(self);
    PyErr_Restore(type, value, traceback);
    Py_END_CRITICAL_SECTION();
}

/* LEASED by us -> ended. False: it was not ours any more. */
bool retire_leased(PoolObject *self, struct pool_claim *claim, unsigned reason)
{
    uint64_t linger_ns = CONNECTION_LINGER_NS;
    if (!pool_condemn(&self->pool, claim))
        return false;
    retire_condemned(self, claim, reason, &linger_ns);
    return true;
}

void drop_entries(PoolObject *self)
{
    struct pool *pool = &self->pool;
    for (uint32_t slot = 0; pool->entries && slot < pool->slab.layout.max_slots; slot++) {
        struct parts parts = entry_take(&pool->entries[slot]);
        parts_drop_session(&parts);
        parts_close(&parts);
    }
}

/* After a fork: what was copied but is not for us. Sessions are the parent's: they are left alone for ever, because ending one
 * here could end its connection there. A socket object whose mode the parent's holder had changed would lie about the
 * description's mode; it is dropped, the next lease fetches the connection anew. */
void forget_foreign(PoolObject *self)
{
    struct pool *pool = &self->pool;
    if (pool_joined(pool) && self->generation == pool->generation)
        return;
    self->generation = pool->generation;
    SHM_STORE(private, self->dial_threads, 0);
    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++) {
        struct entry *entry = &pool->entries[slot];
        entry->session = NULL;
        if (!entry->connection || !*entry->dirty)
            continue;
        struct parts parts = entry_take(entry);
        parts_close(&parts);
    }
}

/* The parent was giving its part back when it forked this child: give our copies back. */
void finish_for_parent(PoolObject *self)
{
    if (!self->made || !self->finished || self->pool.slab_fd < 0 || self->finisher == getpid())
        return;
    self->finisher = getpid();
    forget_foreign(self);
    drop_entries(self);
    pool_release_descriptors(&self->pool);
}

/* The pool is closed: once this process holds nothing, give everything back but the mapping, after a last look for the dead, whose
 * connections would else stay open for as long as somebody has their letters. */
void finish(PoolObject *self)
{
    struct pool *pool = &self->pool;
    if (self->made && !self->finished && pool->door && pool_joined(pool)) {
        Py_BEGIN_ALLOW_THREADS
        rendezvous_close(pool->door); /* also when something is held here yet: there are no newcomers to answer any more */
        Py_END_ALLOW_THREADS
    }
    if (!self->made || self->finished || (pool_joined(pool) && pool_holds_any(pool))) {
        finish_for_parent(self);
        return;
    }
    self->finished = true;
    self->finisher = getpid();
    forget_foreign(self);
    Py_BEGIN_ALLOW_THREADS
    if (pool_joined(pool))
        recovery_run(pool, true);
    pool_leave(pool);
    Py_END_ALLOW_THREADS
    drop_entries(self);
    tell_ended(self);
    pool_release_descriptors(pool);
}
