/*
 * What the machine itself charges: the floors the pool is measured against.
 *
 * Nothing here is part of shmpool. Each function does the least that some step of the pool must do (call a C method,
 * enter a guard, swap a word, look at a socket, wake a sleeper, take a copy of a descriptor), so that a bench can divide
 * by it. Built by floor.py at the first use, for the running interpreter.
 *
 * Not here: anything with a policy, anything that survives the bench.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(_Atomic uint64_t) == 8, "a word is 8 bytes in every process");

enum { WORDS = 512, PEEK_BATCH = 64, LETTER_BYTES = 256, PATIENCE_S = 30 };

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- guards: what `with` costs when the guard is C ------------------------------------------------------------- */

enum guard_kind { GUARD_EMPTY = 0, GUARD_CAS = 1, GUARD_CLOCK = 2 };

typedef struct {
    PyObject_HEAD
    PyObject *socket;
    _Atomic uint64_t *word_shm; /* one word on MAP_SHARED memory; NULL in an empty guard */
    int kind;
    uint64_t entered_ns, held_ns;
} Guard;

static PyObject *guard_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int kind = GUARD_EMPTY;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Guard takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "|i", &kind)) return NULL;
    Guard *self = (Guard *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->kind = kind;
    self->socket = Py_None;
    Py_INCREF(Py_None);
    if (kind == GUARD_EMPTY) return (PyObject *)self;
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) {
        Py_DECREF(self);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    self->word_shm = page;
    return (PyObject *)self;
}

static void guard_dealloc(Guard *self)
{
    if (self->word_shm != NULL) munmap((void *)self->word_shm, 4096);
    Py_XDECREF(self->socket);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int guard_swap(Guard *self, uint64_t from, uint64_t to)
{
    if (atomic_compare_exchange_strong_explicit(self->word_shm, &from, to, memory_order_acq_rel, memory_order_acquire))
        return 0;
    PyErr_SetString(PyExc_RuntimeError, "the guard is entered already");
    return -1;
}

static PyObject *guard_enter(PyObject *op, PyObject *unused)
{
    (void)unused;
    Guard *self = (Guard *)op;
    if (self->kind != GUARD_EMPTY && guard_swap(self, 0, 1) < 0) return NULL;
    if (self->kind == GUARD_CLOCK) self->entered_ns = now_ns();
    Py_INCREF(op);
    return op;
}

static PyObject *guard_exit(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    (void)args;
    (void)nargs;
    Guard *self = (Guard *)op;
    if (self->kind == GUARD_CLOCK) self->held_ns += now_ns() - self->entered_ns;
    if (self->kind != GUARD_EMPTY && guard_swap(self, 1, 0) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *guard_get(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *names)
{
    (void)args;
    (void)nargs;
    (void)names;
    Py_INCREF(op);
    return op;
}

static PyMethodDef guard_methods[] = {
    {"__enter__", guard_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))guard_exit, METH_FASTCALL, NULL},
    {"get", (PyCFunction)(void (*)(void))guard_get, METH_FASTCALL | METH_KEYWORDS, "the guard itself"},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef guard_members[] = {
    {"socket", T_OBJECT, offsetof(Guard, socket), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject GuardType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "benches._floor.Guard",
    .tp_basicsize = sizeof(Guard),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = guard_new,
    .tp_dealloc = (destructor)guard_dealloc,
    .tp_methods = guard_methods,
    .tp_members = guard_members,
};

/* ---- words shared by forked processes, and the bare futex ------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    _Atomic uint64_t *words_shm; /* WORDS of them, each alone on its cache line */
} Words;

enum { WORD_STRIDE = 8 };

static PyObject *words_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args;
    (void)kwargs;
    Words *self = (Words *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    void *pages = mmap(NULL, WORDS * WORD_STRIDE * 8, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) {
        Py_DECREF(self);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    self->words_shm = pages;
    return (PyObject *)self;
}

static void words_dealloc(Words *self)
{
    if (self->words_shm != NULL) munmap((void *)self->words_shm, WORDS * WORD_STRIDE * 8);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static _Atomic uint64_t *word_at(PyObject *op, unsigned index)
{
    if (index < WORDS) return ((Words *)op)->words_shm + (size_t)index * WORD_STRIDE;
    PyErr_SetString(PyExc_IndexError, "no such word");
    return NULL;
}

static PyObject *words_load(PyObject *op, PyObject *args)
{
    unsigned index;
    if (!PyArg_ParseTuple(args, "I", &index)) return NULL;
    _Atomic uint64_t *word = word_at(op, index);
    return word == NULL ? NULL : PyLong_FromUnsignedLongLong(atomic_load(word));
}

static PyObject *words_store(PyObject *op, PyObject *args)
{
    unsigned index;
    unsigned long long value;
    if (!PyArg_ParseTuple(args, "IK", &index, &value)) return NULL;
    _Atomic uint64_t *word = word_at(op, index);
    if (word == NULL) return NULL;
    atomic_store(word, value);
    Py_RETURN_NONE;
}

/* Spins, without the interpreter lock, until the word is the value or the time is over; says whether it is the value. */
static PyObject *words_spin(PyObject *op, PyObject *args)
{
    unsigned index;
    unsigned long long value, limit_ns;
    if (!PyArg_ParseTuple(args, "IKK", &index, &value, &limit_ns)) return NULL;
    _Atomic uint64_t *word = word_at(op, index);
    if (word == NULL) return NULL;
    int seen = 0;
    Py_BEGIN_ALLOW_THREADS
    uint64_t deadline_ns = now_ns() + limit_ns;
    while (!(seen = atomic_load(word) == value) && now_ns() < deadline_ns) continue;
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(seen);
}

static long futex(_Atomic uint64_t *word, int op, uint32_t value, const struct timespec *timeout)
{
    return syscall(SYS_futex, (uint32_t *)word, op, value, timeout, NULL, 0); /* little endian: the word's low half */
}

/* False: it was the value for PATIENCE_S, and whoever was to change it has probably died. */
static int sleep_while(_Atomic uint64_t *word, uint64_t value)
{
    const struct timespec patience = {.tv_sec = PATIENCE_S};
    while (atomic_load(word) == value)
        if (futex(word, FUTEX_WAIT, (uint32_t)value, &patience) < 0 && errno == ETIMEDOUT) return 0;
    return 1;
}

static PyObject *words_sleep_while(PyObject *op, PyObject *args)
{
    unsigned index;
    unsigned long long value;
    if (!PyArg_ParseTuple(args, "IK", &index, &value)) return NULL;
    _Atomic uint64_t *word = word_at(op, index);
    if (word == NULL) return NULL;
    int changed;
    Py_BEGIN_ALLOW_THREADS
    changed = sleep_while(word, value);
    Py_END_ALLOW_THREADS
    if (changed) Py_RETURN_NONE;
    PyErr_SetString(PyExc_TimeoutError, "the other process does not answer");
    return NULL;
}

static PyObject *words_wake(PyObject *op, PyObject *args)
{
    unsigned index;
    unsigned long long value;
    if (!PyArg_ParseTuple(args, "IK", &index, &value)) return NULL;
    _Atomic uint64_t *word = word_at(op, index);
    if (word == NULL) return NULL;
    atomic_store(word, value);
    futex(word, FUTEX_WAKE, 1, NULL);
    Py_RETURN_NONE;
}

/* A bare hand-over there and back, `turns` times: side 0 begins. Returns the nanoseconds of one way. */
static PyObject *words_ping_pong(PyObject *op, PyObject *args)
{
    unsigned index, side, turns;
    if (!PyArg_ParseTuple(args, "III", &index, &side, &turns)) return NULL;
    _Atomic uint64_t *word = word_at(op, index);
    if (word == NULL) return NULL;
    uint64_t taken_ns = 0;
    int answered = 1;
    Py_BEGIN_ALLOW_THREADS
    uint64_t began_ns = now_ns();
    for (unsigned i = 0; i < turns; i++) {
        if (!(answered = sleep_while(word, 1 - side))) break;
        atomic_store(word, 1 - side);
        futex(word, FUTEX_WAKE, 1, NULL);
    }
    taken_ns = now_ns() - began_ns;
    Py_END_ALLOW_THREADS
    if (!answered) {
        PyErr_SetString(PyExc_TimeoutError, "the other process does not answer");
        return NULL;
    }
    return PyFloat_FromDouble((double)taken_ns / (2.0 * (turns ? turns : 1)));
}

static PyMethodDef words_methods[] = {
    {"load", words_load, METH_VARARGS, "load(index) -> value"},
    {"store", words_store, METH_VARARGS, "store(index, value)"},
    {"spin", words_spin, METH_VARARGS, "spin(index, value, limit_ns) -> bool"},
    {"sleep_while", words_sleep_while, METH_VARARGS, "sleep_while(index, value): FUTEX_WAIT until it differs, else TimeoutError"},
    {"wake", words_wake, METH_VARARGS, "wake(index, value): store, then FUTEX_WAKE one"},
    {"ping_pong", words_ping_pong, METH_VARARGS, "ping_pong(index, side, turns) -> ns of one way"},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject WordsType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "benches._floor.Words",
    .tp_basicsize = sizeof(Words),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = words_new,
    .tp_dealloc = (destructor)words_dealloc,
    .tp_methods = words_methods,
};

/* ---- single calls -------------------------------------------------------------------------------------------- */

static PyObject *nothing(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    Py_RETURN_NONE;
}

/* recv(MSG_PEEK | MSG_DONTWAIT) on a quiet socket, n times: the liveness look. Returns nanoseconds in all. */
static PyObject *look_at_socket(PyObject *module, PyObject *args)
{
    (void)module;
    int fd;
    unsigned n;
    if (!PyArg_ParseTuple(args, "iI", &fd, &n)) return NULL;
    char byte;
    unsigned quiet = 0;
    uint64_t began_ns = now_ns();
    for (unsigned i = 0; i < n; i++) quiet += recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN;
    uint64_t taken_ns = now_ns() - began_ns;
    if (quiet != n) {
        PyErr_SetString(PyExc_RuntimeError, "the socket is closed or has something to read");
        return NULL;
    }
    return PyLong_FromUnsignedLongLong(taken_ns);
}

/* 0 -> 1 -> 0 by compare-and-swap on shared memory, n times: the least a lease and its return must do. In nanoseconds. */
static PyObject *swap_pairs(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned n;
    if (!PyArg_ParseTuple(args, "I", &n)) return NULL;
    Guard *guard = (Guard *)PyObject_CallFunction((PyObject *)&GuardType, "i", GUARD_CAS);
    if (guard == NULL) return NULL;
    int failed = 0;
    uint64_t began_ns = now_ns();
    for (unsigned i = 0; i < n && !failed; i++) failed = guard_swap(guard, 0, 1) < 0 || guard_swap(guard, 1, 0) < 0;
    uint64_t taken_ns = now_ns() - began_ns;
    Py_DECREF(guard);
    return failed ? NULL : PyLong_FromUnsignedLongLong(taken_ns);
}

static int peek_letter(int fd)
{
    char text[LETTER_BYTES];
    union {
        char bytes[CMSG_SPACE(sizeof(int) * 4)];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = text, .iov_len = sizeof text};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1,
                             .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    if (recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC) < 0) return -1;
    struct cmsghdr *first = CMSG_FIRSTHDR(&message);
    if (first == NULL || first->cmsg_type != SCM_RIGHTS) return -1;
    int copy;
    memcpy(&copy, CMSG_DATA(first), sizeof copy);
    return copy;
}

/* Takes a copy of the descriptor in a mailbox, n times; closing the copies is not timed. Returns nanoseconds in all. */
static PyObject *peek_mailbox(PyObject *module, PyObject *args)
{
    (void)module;
    int fd, copies[PEEK_BATCH];
    unsigned n;
    if (!PyArg_ParseTuple(args, "iI", &fd, &n)) return NULL;
    uint64_t taken_ns = 0;
    for (unsigned done = 0; done < n;) {
        unsigned batch = n - done < PEEK_BATCH ? n - done : PEEK_BATCH;
        uint64_t began_ns = now_ns();
        for (unsigned i = 0; i < batch; i++) copies[i] = peek_letter(fd);
        taken_ns += now_ns() - began_ns;
        for (unsigned i = 0; i < batch; i++) {
            if (copies[i] < 0 || close(copies[i]) < 0) return PyErr_SetFromErrno(PyExc_OSError);
        }
        done += batch;
    }
    return PyLong_FromUnsignedLongLong(taken_ns);
}

/* A worker does not outlive the process that forked it. */
static PyObject *die_with_parent(PyObject *module, PyObject *args)
{
    (void)module;
    int parent;
    if (!PyArg_ParseTuple(args, "i", &parent)) return NULL;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0) return PyErr_SetFromErrno(PyExc_OSError);
    if (getppid() != parent) raise(SIGKILL); /* it died before we asked */
    Py_RETURN_NONE;
}

/* So that a sleep of 100 us is not one of 150 us: the kernel may add "slack" to any timer of a normal process. */
static PyObject *timer_slack(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned long slack_ns;
    if (!PyArg_ParseTuple(args, "k", &slack_ns)) return NULL;
    if (prctl(PR_SET_TIMERSLACK, slack_ns, 0, 0, 0) < 0) return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyMethodDef floor_methods[] = {
    {"nothing", nothing, METH_NOARGS, "a C call that does nothing"},
    {"look_at_socket", look_at_socket, METH_VARARGS, "look_at_socket(fd, n) -> ns"},
    {"swap_pairs", swap_pairs, METH_VARARGS, "swap_pairs(n) -> ns"},
    {"peek_mailbox", peek_mailbox, METH_VARARGS, "peek_mailbox(fd, n) -> ns"},
    {"die_with_parent", die_with_parent, METH_VARARGS, "die_with_parent(its pid)"},
    {"timer_slack", timer_slack, METH_VARARGS, "timer_slack(ns)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef floor_module = {
    PyModuleDef_HEAD_INIT, .m_name = "_floor", .m_doc = "floors for the benches", .m_size = -1, .m_methods = floor_methods,
};

PyMODINIT_FUNC PyInit__floor(void)
{
    if (PyType_Ready(&GuardType) < 0 || PyType_Ready(&WordsType) < 0) return NULL;
    PyObject *module = PyModule_Create(&floor_module);
    if (module == NULL) return NULL;
    Py_INCREF(&GuardType);
    Py_INCREF(&WordsType);
    if (PyModule_AddObject(module, "Guard", (PyObject *)&GuardType) < 0
        || PyModule_AddObject(module, "Words", (PyObject *)&WordsType) < 0
        || PyModule_AddIntConstant(module, "EMPTY", GUARD_EMPTY) < 0
        || PyModule_AddIntConstant(module, "CAS", GUARD_CAS) < 0
        || PyModule_AddIntConstant(module, "CLOCK", GUARD_CLOCK) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
