/* module.h: what the files that know Python share: module.c (leases, get), module_entry.c (what a process has of a connection, and its end), module_join.c
 * (making, joining and leaving a pool), module_care.c (what is done to it besides leasing), module_view.c (looking at it). The rest of the core includes
 * neither this nor Python.h. */
#ifndef SHMPOOL_MODULE_H
#define SHMPOOL_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "pool.h"

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

/* The slab as a dict; `fd` tells which workers are alive, -1: all are taken to be. Works on a read-only mapping. */
PyObject *snapshot_build(struct slab *slab, int fd);
/* Raise ValueError(what is wrong, whether it is a matter of versions); NULL. */
PyObject *raise_bad_slab(enum slab_verdict verdict);
/* (next, lost, [(number, kind, reason, time, connection, slot or -1, pid, value, text), ...]): the events from number `first` on that are still there. `lost`
 * of them were overwritten, or their writers died. `patient`: stop at one that is being written; else that is lost too. */
PyObject *events_build(const struct slab *slab, uint64_t first, bool patient);
extern PyType_Spec view_spec;

/* ---- pools and leases (module.c) ---- */

typedef struct LeaseObject LeaseObject;

typedef struct {
    PyObject_HEAD
    struct pool pool;
    bool made;            /* pool_create succeeded */
    bool finished;        /* resources given back, or being given back by `finisher` */
    pid_t finisher;
    uint32_t generation;  /* of pool.generation when sessions were last looked at */
    uint32_t mask;        /* buckets that get() takes when it is not told */
    uint64_t default_timeout_ns;
    uint32_t dial_retries;
    bool wait_when_down;
    bool accepts_by_hand; /* an acceptor of the program's takes clients from the listener */
    PyObject *on_borrow, *on_return, *on_created;
    bool remind;          /* _remind() was called */
    bool cannot_mail;     /* the last connection opened here found no room in the mailbox: it can serve nobody but who dials it */
    PyObject *revoked;    /* {(slot, word of the lease): (socket, session)}, or NULL */
    a32_shm dial_threads; /* private: dials that go on in threads of their own */
} PoolObject;

struct LeaseObject {
    PyObject_HEAD
    PoolObject *owner;   /* NULL once the lease is over: what is kept of it keeps no pool */
    struct pool_claim claim;
    struct entry *entry;
    uint64_t begun_ns;   /* start of the lease, when it is timed */
    uint32_t weight;     /* of this sample; 0: not timed */
    uint32_t generation;
    bool active;
    bool returning;      /* on_return runs: a release() in it does not run it again */
    bool shown;          /* to on_created or a health check, which look at it: nobody has it on lease */
    uint64_t id;         /* of the connection, for the texts of errors */
    LeaseObject *next;   /* among the spares */
};

#define NEVER UINT64_MAX

/* Free-threaded builds: the slow paths of one Pool object exclude each other (the section is left while a thread blocks), as
 * the GIL makes them do elsewhere. The warm path needs nothing: it only takes slots that are idle in the slab. */
#if PY_VERSION_HEX < 0x030d0000
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif

/* The methods that give things back, each alone on its pool. */
#define ALONE(name)                                                                                                    \
    PyObject *name(PoolObject *self, PyObject *unused)                                                                 \
    {                                                                                                                  \
        PyObject *result;                                                                                              \
        (void)unused;                                                                                                  \
        Py_BEGIN_CRITICAL_SECTION(self);                                                                               \
        result = name##_alone(self);                                                                                   \
        Py_END_CRITICAL_SECTION();                                                                                     \
        return result;                                                                                                 \
    }
/* What an entry has, taken out of it, so that the slot can be passed on before it is dropped. The socket object is made when the
 * holder first asks for it; until then the entry's bare descriptor is ours to close. */
struct parts {
    PyObject *socket, *session, *note;
    int fd;
};

/* Raise what self._error(kind, ...) makes. */
PyObject *raise_error(PoolObject *self, const char *kind, uint32_t mask, uint64_t waited_ns, uint64_t timeout_ns);
/* False, with an exception, when there is no pool behind the object. */
bool check_made(PoolObject *self);
/* Register this process if a fork (or the first call) makes it necessary; false with an exception. */
bool ensure_joined(PoolObject *self);
/* Seconds as a Python float (or int) to nanoseconds; false with an exception. inf is NEVER. */
bool seconds_ns(PyObject *value, const char *what, uint64_t *ns);

/* Keep what a revoked lease's holder may have in use until the lease object ends. */
void revoked_keep(PoolObject *self, const struct pool_claim *claim, PyObject *socket, PyObject *session);
LeaseObject *lease_new(PoolObject *self, const struct pool_claim *claim, uint32_t weight, uint64_t begun_ns);
/* The lease is over. This may end the pool object: nothing of it is touched afterwards. */
void lease_end(LeaseObject *lease);
/* The beginning of a text, as an event can hold it; false: it is empty, or no UTF-8. */
bool note_text(PyObject *from, char *text);
extern PyTypeObject *lease_type;

/* ---- module_entry.c ---- */

extern PyObject *lease_expired; /* of shmpool.errors */
extern PyObject *socket_close;  /* of _socket.socket */
extern const char always_dirty[1];
extern const char *const total_names[]; /* in the order of SHM_TOTAL_COUNTERS */

/* Raise LeaseExpired; NULL. */
PyObject *raise_expired(uint64_t connection, const char *reason);
/* Did a fork happen since `generation` (in a signal handler, in dial)? Then nothing we held is ours. */
bool forked_since(PoolObject *self, uint32_t generation);
struct parts entry_take(struct entry *entry);
void parts_drop_session(struct parts *parts);
void parts_close(struct parts *parts);
void parts_let_go(struct entry *entry);
/* Our descriptor of a connection, for ending it; -1 when there is none, or when it may have been closed behind our back. */
int entry_fd(struct pool *pool, uint32_t slot);
void entry_drop_session(struct entry *entry);
/* This process's socket object of a leased connection, borrowed; NULL with an exception. */
PyObject *entry_socket(PoolObject *self, uint32_t slot);
/* This process has not seen the slot's connection: drop what it has of an older one and fetch this one from the mailbox.
 * 1: done; 0: there is no letter that fits; -1: exception, the connection may be good. */
int entry_fetch(PoolObject *self, uint32_t slot);
/* Close what we have of the ended connection, then free its permit, unless this is a child forked since `generation`. */
void empty_slot(PoolObject *self, struct pool_claim *claim, unsigned reason, uint32_t generation);
/* The claim is RETIRING by us: end it, waiting for the peer at most *linger_ns, from which the wait is taken off. Releases the GIL; keeps a
 * pending exception. */
void retire_condemned(PoolObject *self, struct pool_claim *claim, unsigned reason, uint64_t *linger_ns);
/* LEASED (or CHECKING) by us -> ended. False: it was not ours any more. */
bool retire_leased(PoolObject *self, struct pool_claim *claim, unsigned reason);
/* Tell Python (the log, on_close) which connections this process has ended. Keeps a pending exception; raises none. */
void tell_ended(PoolObject *self);
/* After a fork: drop what was copied but is not for us. */
void forget_foreign(PoolObject *self);
/* The parent was giving its part back when it forked this child: give our copies back. */
void finish_for_parent(PoolObject *self);
/* The pool is closed: once this process holds nothing, give everything back. */
void finish(PoolObject *self);
/* Close all that this process has of connections. */
void drop_entries(PoolObject *self);

/* ---- module_care.c ---- */

#define CARE_METHODS(X)                                                                                                \
    X("_recover", care_recover, METH_NOARGS)                                                                           \
    X("_expire", care_expire, METH_VARARGS)                                                                            \
    X("_close_stale", care_close_stale, METH_NOARGS)                                                                   \
    X("_shut", care_shut, METH_NOARGS)                                                                                 \
    X("_retire_idle", care_retire_idle, METH_NOARGS)                                                                   \
    X("_counts", care_counts, METH_NOARGS)                                                                             \
    X("_maintainer", care_maintainer, METH_NOARGS)                                                                     \
    X("_resign", care_resign, METH_NOARGS)                                                                             \
    X("_look_over", care_look_over, METH_VARARGS)                                                                      \
    X("_check_begin", care_check_begin, METH_VARARGS)                                                                  \
    X("_check_end", care_check_end, METH_VARARGS)                                                                      \
    X("_check_cut", care_check_cut, METH_VARARGS)                                                                      \
    X("_overdue", care_overdue, METH_VARARGS)                                                                          \
    X("_report_leak", care_report_leak, METH_VARARGS)                                                                  \
    X("_note_frame", care_note_frame, METH_VARARGS)                                                                    \
    X("_revoke", care_revoke, METH_VARARGS)                                                                            \
    X("_ended_elsewhere", care_ended_elsewhere, METH_NOARGS)                                                           \
    X("_prewarm_note", care_prewarm_note, METH_VARARGS)                                                                \
    X("_prewarm_is_done", care_prewarm_is_done, METH_NOARGS)                                                           \
    X("_upstream_words", care_upstream, METH_NOARGS)                                                                   \
    X("_upstream_failed", care_upstream_failed, METH_VARARGS)                                                          \
    X("_upstream_untried", care_upstream_untried, METH_VARARGS)                                                        \
    X("_upstream_doubt", care_upstream_doubt, METH_VARARGS)                                                            \
    X("_steer", care_steer, METH_VARARGS)                                                                              \
    X("_state", care_state, METH_NOARGS)                                                                               \
    X("_waiters", care_waiters, METH_NOARGS)                                                                           \
    X("_limits", care_limits, METH_NOARGS)                                                                             \
    X("_resize", care_resize, METH_VARARGS)                                                                            \
    X("_evict", care_evict, METH_VARARGS)                                                                              \
    X("_dial_threads", care_dial_threads, METH_NOARGS)

/* ---- module_join.c ---- */

#define JOIN_METHODS(X)                                                                                                \
    X("_create", join_create, METH_VARARGS)                                                                            \
    X("_attach", join_attach, METH_VARARGS)                                                                            \
    X("_attach_copies", join_attach_copies, METH_VARARGS)                                                              \
    X("_answer", join_answer, METH_VARARGS)                                                                            \
    X("_serve", join_serve, METH_VARARGS)                                                                              \
    X("_listener", join_listener, METH_NOARGS)                                                                         \
    X("_note_path", join_note_path, METH_VARARGS)                                                                      \
    X("_identity", join_identity, METH_NOARGS)                                                                         \
    X("_finish", join_finish, METH_NOARGS)                                                                             \
    X("_leave", join_leave, METH_NOARGS)                                                                               \
    X("_unmake", join_unmake, METH_NOARGS)                                                                             \
    X("_left", join_left, METH_NOARGS)

#define METHOD_DECLARATION(name, function, flags) PyObject *function(PoolObject *self, PyObject *args);
CARE_METHODS(METHOD_DECLARATION)
JOIN_METHODS(METHOD_DECLARATION)

#endif
