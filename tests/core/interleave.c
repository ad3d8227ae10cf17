/* interleave.c: every order of steps, within bounds, of a few workers over the real core.
 *
 * Each worker is a fiber on a stack of its own. At each shared step the core calls shmpool_hook(), and there a choice is made: go on,
 * let another go on (a preemption), let a sleeper's slice end (a timeout), die here, or stop here for ever. A run is the list of
 * its choices; the next run is the same list with the last choice that can be raised, raised: a depth-first walk over all runs
 * within the bounds, repeated with wider bounds until the time is up, and then a random walk. Between any two steps the words of
 * upstream.h and steering.h change only as their tables allow. After each run: no slot had two
 * holders, none is lost, nobody slept beside a free slot (unless somebody died or stopped), and old leases fit nowhere.
 *
 * With SHMPOOL_MACHINE instead of SHMPOOL_HOOKS memory is that of weak.h: a load that may read an older value is a choice as well, with a bound
 * of its own (stale). What the kernel orders there: who locks a byte has seen what its last holder had when it unlocked it, closed the seat or
 * died, and recovery needs that; a lock that is refused, and a look at one, order nothing. Who gets an event of the epoll has seen what who armed
 * it had. FUTEX_WAIT compares with the last value; neither it nor FUTEX_WAKE orders anything, nor do clocks and sched_yield(). There are no letters
 * here (play_bare): what comes with a slot comes by its word alone. Threads of one process share its private words, which are words like others;
 * the `fd` of a seat, `recovering` and the descriptors of a service, which are no words of atomics.h, are always the last.
 *
 *   interleave [SCENARIO|all|I/N] [seconds for each] [seed] walk; I/N: the scenarios I, I + N, I + 2N, ...
 *   interleave SCENARIO replay 3,0,1,0,1/0,0,2,1,...        one run, told step by step: its bounds, its choices
 *   interleave weaken=TAG:CALL:FROM:TO ...                  first: each CALL (load, fetch_or, ...) with the tag and the order FROM has the order TO
 *
 * Stand-ins, by macros given to the compiler: the futex system call, the clock, usleep() and sched_yield() everywhere; seats and byte locks
 * in worker.c; the listener and the epoll in service.c. Everything else is the core as it is shipped.
 */
#include <linux/futex.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>

#include "events.h"
#include "play.h"
#include "service.h"
#include "weak.h"

#ifdef SHMPOOL_MACHINE
enum { IS_WEAK = 1 };
#else
enum { IS_WEAK = 0 };
#endif
enum { FIBERS = 4, STACK = 128 * 1024, DEPTH = 4000, STEPS = 20000, SLOTS = 3, BYTES = 16, SEATS = 64, ROUNDS = 12, EVENTS = 64 };
_Static_assert((int)FIBERS <= (int)WEAK_THREADS, "each fiber has a view");

enum fiber_state { READY, ASLEEP, FINISHED, DEAD, STOPPED };
struct fiber {
    ucontext_t context;
    jmp_buf at;
    char *stack;
    void (*body)(void);
    struct pool *pool;
    enum fiber_state state;
    bool begun, has;
    a32_shm *futex;
    struct pool_claim claim; /* what it holds, when `has` */
};

struct bounds {
    unsigned preemptions, timeouts, kills, stops, stale;
};

struct scenario {
    const char *name;
    uint32_t slots, workers;
    unsigned fibers;
    uint64_t clock_step; /* how far each look at the clock moves it: 0: waiters wait briefly; else slots are handed over */
    void (*prepare)(void);
    void (*bodies[FIBERS])(void);
    void (*after)(void);
    unsigned flags;
    uint32_t cap; /* 0: all slots */
};
enum {
    CLOSES = 1,      /* a return may end the connection; at the end there is none */
    ONE_PROCESS = 2, /* the first two fibers are threads of one process, which die together or not at all */
    STEERS = 4,      /* looks at the cap are steps too; a return may end the connection */
    BY_TIME = 8,     /* what some wait for is that time passes */
    LOOKS = 16,      /* accounts are looked at: what is done to them is a step too */
    NOTES = 32,      /* events are read: noting one is several steps */
};

static const struct scenario *scenario;
static struct fiber fibers[FIBERS], *current;
static struct pool *checker; /* takes no part in the run; looks at what is left */
static jmp_buf back;
static bool running, tracing, walking_randomly;
static struct check_random draws;
static const char *weakened = ""; /* the argument, and a space */

static struct bounds bounds, used;
static uint16_t taken[DEPTH], width[DEPTH];
static unsigned depth, planned, steps, rounds;
static uint64_t now_ns, runs;
static int lock_of[BYTES]; /* the seat that holds each byte, 0: nobody */
static struct weak_view left_at[BYTES]; /* what who unlocked it last had seen */
static bool seat_is_open[SEATS];
static int next_seat;
static int holder[SLOTS]; /* fiber + 1 */
static struct pool_claim old[32];
static unsigned old_count;
static unsigned twins_released;
static bool paused;                     /* somebody has paused the pool, and not begun to resume it */
static unsigned pauses, shrunk, opened; /* how often; the cap once resize() is done, 0 before; connections there are */
static struct service service;          /* of all who listen, by numbers that are no descriptors */
static bool listener_is_armed, epoll_is_closed;
static unsigned clients;                /* that wait at the listener */
static struct weak_view armed_at;       /* what who armed it had seen */
static unsigned adopted;                /* how often the dial of the run was */

/* ---- failing ---- */

static void tell_choices(void)
{
    unsigned end = depth;
    while (end && !taken[end - 1])
        end--;
    fprintf(stderr, "interleave: scenario %s fails after %" PRIu64 " runs (preemptions %u, timeouts %u, kills %u, stops %u, stale %u)\n",
            scenario->name, runs, used.preemptions, used.timeouts, used.kills, used.stops, used.stale);
    fprintf(stderr, "replay: interleave %s%s replay %u,%u,%u,%u,%u/", weakened, scenario->name, bounds.preemptions, bounds.timeouts, bounds.kills,
            bounds.stops, bounds.stale);
    for (unsigned i = 0; i < end; i++)
        fprintf(stderr, "%s%u", i ? "," : "", taken[i]);
    fprintf(stderr, "%s\n", end ? "" : "0");
    for (uint32_t slot = 0; slot < scenario->slots; slot++)
        fprintf(stderr, "slot %u: %s of worker %u\n", slot, slot_state_name(play_state(checker, slot)), slot_owner(play_word(checker, slot)));
    fflush(stderr);
}

static void on_signal(int number)
{
    fprintf(stderr, "signal %d\n", number);
    tell_choices();
    _exit(1);
}

/* ---- the scheduler ---- */

static unsigned choose(unsigned options)
{
    if (options < 2)
        return 0;
    CHECK(depth < DEPTH);
    unsigned choice = 0;
    if (depth < planned)
        choice = taken[depth];
    else if (walking_randomly && (current->state != READY || check_random(&draws) % 6 == 0))
        choice = (unsigned)(check_random(&draws) % options);
    if (choice >= options) {
        fprintf(stderr, "interleave: choice %u of %u: the list is not of this build\n", choice, options);
        _exit(2);
    }
    taken[depth] = (uint16_t)choice;
    width[depth++] = (uint16_t)options;
    return choice;
}

static void resume(struct fiber *next)
{
    current = next;
    weak_thread = (unsigned)(next - fibers);
    if (next->begun)
        _longjmp(next->at, 1);
    next->begun = true;
    setcontext(&next->context);
}

static void switch_to(struct fiber *next)
{
    if (next == current)
        return;
    if (!_setjmp(current->at))
        resume(next);
}

static void unlock(int byte, unsigned thread)
{
    lock_of[byte] = 0;
    left_at[byte] = weak_publish(thread, (struct weak_view){0});
}

static void drop_locks(const struct fiber *fiber)
{
    for (int byte = 0; byte < BYTES; byte++)
        if (lock_of[byte] && lock_of[byte] == atomic_load(&fiber->pool->seat->fd))
            unlock(byte, (unsigned)(fiber - fibers));
}

static void time_out(struct fiber *fiber)
{
    fiber->state = READY;
    now_ns += WAITER_SLICE_NS;
}

/* Is there anything a waiter could have? */
static bool free_in_reach(void)
{
    uint32_t empty = 0;
    if (steering_now(&checker->slab) != SHM_POOL_OPEN)
        return false;
    for (uint32_t slot = 0; slot < scenario->slots; slot++) {
        enum slot_state state = play_state(checker, slot);
        if (state == SLOT_IDLE || state == SLOT_OFFERED)
            return true;
        empty += state == SLOT_EMPTY;
    }
    return scenario->slots - empty < atomic_load(&checker->slab.header->cap);
}

/* Those who were woken in vain and asked not to be woken again soon sleep less than a slice. */
static bool end_patience(void)
{
    bool any = false;
    for (unsigned i = 0; i < scenario->fibers; i++)
        if (fibers[i].state == ASLEEP && atomic_load(fibers[i].futex) == WAITER_PATIENT) {
            fibers[i].state = READY;
            any = true;
        }
    if (any)
        now_ns += WAITER_HANDOVER_AFTER_NS;
    return any;
}

/* Nobody can run. Sleepers: with nobody dead or stopped they should not be there; else their slices end. */
static bool end_slices(void)
{
    unsigned asleep = 0;
    for (unsigned i = 0; i < scenario->fibers; i++)
        asleep += fibers[i].state == ASLEEP;
    if (!asleep)
        return false;
    if (end_patience())
        return true;
    if (!used.kills && !used.stops && !(scenario->flags & BY_TIME)) {
        fprintf(stderr, "interleave: %u asleep for ever%s\n", asleep, free_in_reach() ? ", beside a free slot" : "");
        tell_choices();
        _exit(1);
    }
    if (++rounds > (scenario->flags & BY_TIME ? 5 * ROUNDS : ROUNDS)) {
        if (free_in_reach()) {
            fprintf(stderr, "interleave: %u cannot have the slot that is free\n", asleep);
            tell_choices();
            _exit(1);
        }
        return false; /* a stopped one holds what they wait for */
    }
    for (unsigned i = 0; i < scenario->fibers; i++)
        if (fibers[i].state == ASLEEP)
            time_out(&fibers[i]);
    return true;
}

/* The current fiber cannot go on: somebody else does, or the run is over. */
static void yield_for_good(void)
{
    struct fiber *able[FIBERS];
    unsigned count;
    do {
        count = 0;
        for (unsigned i = 0; i < scenario->fibers; i++)
            if (fibers[i].state == READY)
                able[count++] = &fibers[i];
    } while (!count && end_slices());
    if (!count)
        _longjmp(back, 1);
    struct fiber *next = able[choose(count)];
    if (tracing)
        printf("  -> %d\n", (int)(next - fibers));
    switch_to(next);
}

enum move { GO_ON, SWITCH, TIMEOUT, KILL, STOP };

static void step(const char *tag)
{
    struct {
        enum move move;
        struct fiber *fiber;
    } moves[2 * FIBERS + 3] = {{GO_ON, current}};
    unsigned count = 1;
    CHECK(++steps < STEPS);
    for (unsigned i = 0; i < scenario->fibers && used.preemptions < bounds.preemptions; i++) {
        if (&fibers[i] != current && fibers[i].state == READY)
            moves[count].move = SWITCH, moves[count++].fiber = &fibers[i];
        if (fibers[i].state == ASLEEP && used.timeouts < bounds.timeouts)
            moves[count].move = TIMEOUT, moves[count++].fiber = &fibers[i];
    }
    if (used.kills < bounds.kills)
        moves[count++].move = KILL;
    if (used.stops < bounds.stops)
        moves[count++].move = STOP;
    unsigned choice = choose(count);
    if (tracing)
        printf("fiber %d: %-9s%s\n", (int)(current - fibers), tag,
               (const char *[]){"", " preempted", " preempted, another's slice ends", " dies here", " stops here"}[moves[choice].move]);
    switch (moves[choice].move) {
    case GO_ON:
        return;
    case TIMEOUT:
        used.timeouts++;
        time_out(moves[choice].fiber);
        /* fall through */
    case SWITCH:
        used.preemptions++;
        switch_to(moves[choice].fiber);
        return;
    case KILL:
        used.kills++;
        current->state = DEAD;
        drop_locks(current);
        break;
    case STOP:
        used.stops++;
        current->state = STOPPED;
    }
    yield_for_good();
}

static unsigned weak_choose(const char *tag, const uint64_t *values, unsigned count)
{
    unsigned choice = used.stale < bounds.stale ? choose(count) : 0;
    used.stale += choice != 0;
    if (tracing && choice)
        printf("fiber %d: %-9s reads %" PRIx64 ", which is older than %" PRIx64 "\n", (int)(current - fibers), tag, values[choice], values[0]);
    return choice;
}

/* ---- what may never happen, whatever the order: looked at between any two steps ---- */

static uint64_t upstream_before;
static uint32_t state_before, bound_before;

/* The table of upstream.h. A time that has come is one of the clock, which only goes on. */
static bool upstream_may_become(uint64_t before, uint64_t after)
{
    uint32_t step = upstream_step(before), next = upstream_step(after);
    bool due = now_ns >= upstream_retry_ns(before);
    switch (upstream_state(after)) {
    case UPSTREAM_UP:
        return true;
    case UPSTREAM_UNPROVED:
        return !upstream_is_down(before);
    case UPSTREAM_PROBING:
        return upstream_is_down(before) && due && next == step;
    case UPSTREAM_DOWN:
        return upstream_state(before) == UPSTREAM_PROBING ? next == step || next == step + 1
                                                          : !upstream_is_down(before) && next == 1;
    default:
        return false;
    }
}

static void watch(void)
{
    const struct header_shm *header = checker->slab.header;
    uint64_t upstream = atomic_load_explicit(&header->upstream, memory_order_relaxed);
    enum pool_state state = (enum pool_state)(atomic_load_explicit(&header->summary, memory_order_relaxed) >> SHM_STATE_SHIFT);
    uint32_t bound = atomic_load_explicit(&header->bound, memory_order_relaxed);
    CHECK(upstream == upstream_before || upstream_may_become(upstream_before, upstream));
    CHECK(state == state_before || state_before != SHM_POOL_CLOSED);
    CHECK(bound >= bound_before && atomic_load_explicit(&header->cap, memory_order_relaxed) <= bound);
    upstream_before = upstream;
    state_before = state;
    bound_before = bound;
}

/* Slot, queue, offer, futex, worker, upstream, service, users; "lock" and "use" are ours. Steps on private words, hints, counters, rows and
 * accounts are of no weight to the others. */
static bool is_step(const char *tag)
{
    static const char weighty[] = "sl qu of fu wo up se lo us";
    if (tag[0] == 'c')
        return (scenario->flags & STEERS) && tag[1] == 'a';
    if (tag[0] == 'a')
        return scenario->flags & LOOKS;
    if (!strcmp(tag, "event"))
        return scenario->flags & NOTES;
    for (const char *of = weighty; of < weighty + sizeof weighty; of += 3)
        if (of[0] == tag[0] && of[1] == tag[1])
            return true;
    return false;
}

void shmpool_hook(const char *tag)
{
    if (!running)
        return;
    watch();
    if (is_step(tag))
        step(tag);
}

/* ---- stand-ins ---- */

long stand_in_syscall(long number, ...);
int stand_in_clock_gettime(clockid_t clock, struct timespec *time);
int stand_in_usleep(useconds_t us);
int stand_in_sched_yield(void);

long stand_in_syscall(long number, ...)
{
    va_list list;
    va_start(list, number);
    a32_shm *futex = va_arg(list, a32_shm *);
    int operation = va_arg(list, int);
    uint32_t value = va_arg(list, uint32_t);
    va_end(list);
    CHECK_EQ(number, SYS_futex);
    if (!running)
        return 0;
    if (operation == FUTEX_WAIT) {
        if (atomic_load(futex) != value)
            return -1;
        current->state = ASLEEP;
        current->futex = futex;
        yield_for_good();
        return 0; /* nobody looks at it */
    }
    CHECK_EQ(operation, FUTEX_WAKE);
    for (unsigned i = 0; i < scenario->fibers; i++)
        if (fibers[i].state == ASLEEP && fibers[i].futex == futex)
            fibers[i].state = READY;
    return 0;
}

int stand_in_clock_gettime(clockid_t clock, struct timespec *time)
{
    if (running && clock == CLOCK_MONOTONIC)
        now_ns += scenario->clock_step;
    *time = (struct timespec){(time_t)(now_ns / 1000000000), (long)(now_ns % 1000000000)};
    return 0;
}

int stand_in_sched_yield(void)
{
    if (!running)
        return 0;
    CHECK(++steps < STEPS);
    for (unsigned i = 1; i < scenario->fibers; i++) {
        struct fiber *next = &fibers[(current - fibers + i) % scenario->fibers];
        if (next->state == READY) {
            switch_to(next);
            break;
        }
    }
    return 0;
}

int stand_in_usleep(useconds_t us)
{
    now_ns += us * UINT64_C(1000);
    return stand_in_sched_yield();
}

/* Seats are numbers, byte locks a table: closed by death at once. */
int seat_open(struct seat *seat, int slab_fd)
{
    (void)slab_fd;
    CHECK(++next_seat < SEATS);
    seat_is_open[next_seat] = true;
    atomic_store(&seat->fd, next_seat);
    return 0;
}

void seat_close(struct seat *seat)
{
    int fd = atomic_exchange(&seat->fd, -1);
    if (fd > 0)
        seat_is_open[fd] = false;
    for (int byte = 0; byte < BYTES; byte++)
        if (fd > 0 && lock_of[byte] == fd)
            unlock(byte, weak_thread);
}

/* A number that was closed may be another file's by now. */
static void check_open(int fd) { CHECK(fd < SEATS && (fd <= 0 || seat_is_open[fd])); }

static int64_t place_of(int64_t byte)
{
    CHECK(byte < BYTES - 1 || byte == SHM_MAINTAINER_BYTE);
    return byte < BYTES - 1 ? byte : BYTES - 1;
}

bool byte_lock(int fd, int64_t byte)
{
    shmpool_hook("lock");
    check_open(fd);
    byte = place_of(byte);
    if (fd <= 0 || (lock_of[byte] && lock_of[byte] != fd))
        return false;
    lock_of[byte] = fd;
    weak_join(left_at[byte]);
    return true;
}

void byte_unlock(int fd, int64_t byte)
{
    shmpool_hook("lock");
    check_open(fd);
    byte = place_of(byte);
    CHECK_EQ(lock_of[byte], fd);
    unlock((int)byte, weak_thread);
}

bool byte_is_locked(int fd, int64_t byte)
{
    shmpool_hook("lock");
    check_open(fd);
    byte = place_of(byte);
    return lock_of[byte] && lock_of[byte] != fd;
}

bool family_join(int fd)
{
    (void)fd;
    return true;
}

/* service.c: the listener with its clients, and the epoll in which it is. */
enum { LISTENER = 1000, EPOLL, LISTENER_INODE };
int stand_in_epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event);
int stand_in_epoll_wait(int epoll, struct epoll_event *events, int room, int timeout_ms);
int stand_in_poll(struct pollfd *looks, nfds_t count, int timeout_ms);
int stand_in_fstat(int fd, struct stat *status);
int stand_in_close(int fd);

int stand_in_epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    (void)operation, (void)event;
    shmpool_hook("use");
    CHECK(epoll == EPOLL && fd == LISTENER && !epoll_is_closed);
    listener_is_armed = true;
    armed_at = weak_publish(weak_thread, (struct weak_view){0});
    return 0;
}

int stand_in_epoll_wait(int epoll, struct epoll_event *events, int room, int timeout_ms)
{
    (void)timeout_ms;
    shmpool_hook("use");
    CHECK(epoll == EPOLL && room == 1 && !epoll_is_closed);
    if (!listener_is_armed || !clients)
        return 0;
    listener_is_armed = false;
    weak_join(armed_at);
    events[0].data.u64 = UINT64_MAX; /* the listener's */
    return 1;
}

int stand_in_poll(struct pollfd *looks, nfds_t count, int timeout_ms)
{
    CHECK(looks->fd == LISTENER && count == 1 && !timeout_ms);
    looks->revents = clients ? POLLIN : 0;
    return clients != 0;
}

int stand_in_fstat(int fd, struct stat *status)
{
    CHECK_EQ(fd, LISTENER);
    status->st_ino = LISTENER_INODE;
    return 0;
}

int stand_in_close(int fd)
{
    CHECK(fd == EPOLL || fd == LISTENER);
    epoll_is_closed |= fd == EPOLL;
    return 0;
}

/* ---- one run ---- */

struct saved {
    struct pool pool;
    struct entry entries[SLOTS];
    uint32_t phase;
    int seat;
};
static struct saved saved[FIBERS + 1];
static uint8_t *saved_slab;
static uint64_t saved_now_ns;
static int saved_locks[BYTES], saved_holder[SLOTS], saved_next_seat;
static bool saved_open[SEATS];
static unsigned saved_opened;
static struct fiber saved_fibers[FIBERS];

static void entry_point(void)
{
    current->body();
    current->state = FINISHED;
    yield_for_good();
}

static struct pool *player(unsigned i) { return i < FIBERS ? fibers[i].pool : checker; }

/* The parts of the slab that a run changes: all but the texts, the histograms, and events that nobody reads. */
static void copy_slab(uint8_t *to, const uint8_t *from)
{
    const struct slab_layout *layout = &checker->slab.layout;
    size_t changing = offsetof(struct header_shm, cap);
    memcpy(to + changing, from + changing, SHM_HEADER_BYTES - changing);
    memcpy(to + layout->totals_offset, from + layout->totals_offset, 256);
    if (scenario->flags & NOTES)
        memcpy(to + layout->events_offset, from + layout->events_offset, EVENTS * sizeof(struct event_shm));
    for (uint32_t i = 0; i < layout->max_workers; i++) {
        size_t row = layout->workers_offset + i * sizeof(struct worker_shm);
        memcpy(to + row, from + row, offsetof(struct worker_shm, get));
    }
    memcpy(to + layout->words_offset, from + layout->words_offset, layout->total_size - layout->words_offset);
}

static void save(void)
{
    for (unsigned i = 0; i <= FIBERS; i++) {
        struct pool *pool = player(i);
        memcpy(&saved[i].pool, pool, sizeof *pool);
        memcpy(saved[i].entries, pool->entries, scenario->slots * sizeof *pool->entries);
        saved[i].phase = atomic_load(&pool->fork->phase);
        saved[i].seat = atomic_load(&pool->seat->fd);
    }
    saved_now_ns = now_ns;
    saved_slab = malloc(checker->slab.layout.total_size);
    CHECK(saved_slab);
    copy_slab(saved_slab, (uint8_t *)checker->slab.header);
    memcpy(saved_locks, lock_of, sizeof lock_of);
    memcpy(saved_open, seat_is_open, sizeof seat_is_open);
    saved_next_seat = next_seat;
    saved_opened = opened;
    memcpy(saved_holder, holder, sizeof holder);
    for (unsigned i = 0; i < FIBERS; i++) {
        saved_fibers[i].has = fibers[i].has;
        saved_fibers[i].claim = fibers[i].claim;
    }
}

static void restore(void)
{
    for (unsigned i = 0; i <= FIBERS; i++) {
        struct pool *pool = player(i);
        memcpy(pool, &saved[i].pool, sizeof *pool);
        memcpy(pool->entries, saved[i].entries, scenario->slots * sizeof *pool->entries);
        atomic_store(&pool->fork->phase, saved[i].phase);
        atomic_store(&pool->seat->fd, saved[i].seat);
    }
    copy_slab((uint8_t *)checker->slab.header, saved_slab);
    memcpy(lock_of, saved_locks, sizeof lock_of);
    memcpy(seat_is_open, saved_open, sizeof seat_is_open);
    next_seat = saved_next_seat;
    memcpy(holder, saved_holder, sizeof holder);
    now_ns = saved_now_ns;
    atomic_store(&checker->slab.header->recovery_checked_ns, now_ns);
    depth = steps = rounds = old_count = twins_released = pauses = shrunk = adopted = 0;
    paused = epoll_is_closed = false;
    atomic_init(&service.listener, LISTENER);
    atomic_init(&service.epoll, EPOLL);
    service.listener_inode = LISTENER_INODE;
    listener_is_armed = true;
    clients = 1;
    armed_at = (struct weak_view){0};
    opened = saved_opened;
    used = (struct bounds){0};
    upstream_before = atomic_load(&checker->slab.header->upstream);
    state_before = steering_now(&checker->slab);
    bound_before = atomic_load(&checker->slab.header->bound);
    for (unsigned i = 0; i < scenario->fibers; i++) {
        struct fiber *fiber = &fibers[i];
        fiber->state = READY;
        fiber->begun = false;
        fiber->has = saved_fibers[i].has;
        fiber->claim = saved_fibers[i].claim;
        fiber->body = scenario->bodies[i];
        fiber->context.uc_stack.ss_sp = fiber->stack;
        fiber->context.uc_stack.ss_size = STACK;
        fiber->context.uc_link = NULL;
        makecontext(&fiber->context, entry_point, 0);
    }
}

/* Everybody who lives gives back what he holds; then nothing may be missing. */
static void look_at_the_end(void)
{
    unsigned gone = 0;
    if (scenario->after)
        scenario->after();
    for (unsigned i = 0; i < scenario->fibers; i++) {
        struct fiber *fiber = &fibers[i];
        if (fiber->state != FINISHED) {
            drop_locks(fiber);
            gone++;
        } else if (fiber->has) {
            holder[fiber->claim.slot] = 0;
            CHECK(play_release(fiber->pool, &fiber->claim) != RELEASE_STALE);
        }
    }
    now_ns += 1000 * PLAY_MS;
    recovery_run(checker, true);
    now_ns += PLAY_MS; /* the time of the next dial is one of whole milliseconds */
    steering_resize(&checker->slab, steering_cap(&checker->slab)); /* who was at it may be dead */
    steering_state(&checker->slab, SHM_POOL_OPEN); /* who would have opened it again may be dead */
    for (unsigned i = 0; i < old_count; i++)
        CHECK_EQ(pool_release(checker, &old[i], now_ns), RELEASE_STALE);
    play_check_queue_empty(checker);
    play_check_accounts(checker, gone);
    if (!(scenario->flags & CLOSES))
        play_lease_all(checker);
    else if (!gone)
        CHECK_EQ(play_count(checker, SLOT_EMPTY), scenario->slots);
    for (uint32_t index = 0; index < scenario->workers; index++) /* an index that nobody holds is free for all, and no other */
        CHECK_EQ(atomic_load(&checker->slab.workers[index].state), lock_of[index] ? SHM_WORKER_ACTIVE : SHM_WORKER_FREE);
}

static void start(void)
{
    struct fiber nobody = {.state = FINISHED};
    current = &nobody;
    yield_for_good();
}

static void run(void)
{
    restore();
    weak_begin();
    memset(left_at, 0, sizeof left_at);
    running = weak_running = true;
    if (!_setjmp(back))
        start();
    running = weak_running = false;
    look_at_the_end();
    runs++;
}

/* The next list of choices; false when all are done. */
static bool next_plan(void)
{
    while (depth && taken[depth - 1] + 1 >= width[depth - 1])
        depth--;
    if (!depth)
        return false;
    taken[depth - 1]++;
    planned = depth;
    return true;
}

static uint64_t real_ns(void)
{
    struct timespec time;
    timespec_get(&time, TIME_UTC);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* ---- what the workers do ---- */

static void check_last_64(a64_shm *word) { CHECK_EQ(SHM_LOAD(row, *word), atomic_load(word)); }
static void check_last_32(a32_shm *word, uint32_t but) { CHECK_EQ(SHM_LOAD(row, *word) & ~but, atomic_load(word) & ~but); }

/* Whoever has a slot sees the row as the last holder left it, but for what anybody may say to end the connection; and counts its use, as module.c
 * does, so that each holder leaves another row. Not the times of a release: a lease that two give back at once has them from both, perhaps late. */
static void check_row(uint32_t slot)
{
    struct slot_shm *row = &current->pool->slab.slots[slot];
    a64_shm *const words[] = {&row->connection, &row->uses, &row->created_ns, &row->created_realtime_ns, &row->peer[0], &row->checked_ns};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        check_last_64(words[i]);
    check_last_32(&row->kind, SHM_KIND_ENDING);
    check_last_32(&row->private_owner, 0);
    if (atomic_load(&row->expires_ns) > SHM_EXPIRES_RESIZED)
        check_last_64(&row->expires_ns);
    SHM_STORE(row, row->uses, SHM_LOAD(row, row->uses) + 1);
}

static void hold(const struct pool_claim *claim)
{
    int *mine = &holder[claim->slot];
    CHECK(!*mine || fibers[*mine - 1].state == DEAD);
    *mine = (int)(current - fibers) + 1;
    current->has = true;
    current->claim = *claim;
    check_row(claim->slot);
    shmpool_hook("use");
    CHECK_EQ(*mine, current - fibers + 1);
}

static enum play_got get(uint64_t timeout_ns)
{
    struct pool_claim claim;
    unsigned begun = paused ? pauses : 0;
    enum play_got got = play_get_any(current->pool, PLAY_ANY, timeout_ns, &claim);
    CHECK(got != PLAY_GOT || !begun || begun != pauses || !paused); /* nobody gets anything in a pause */
    if (got == PLAY_GOT)
        hold(&claim);
    return got;
}

static void give(void)
{
    struct pool_claim claim = current->claim;
    CHECK_EQ(holder[claim.slot], current - fibers + 1);
    holder[claim.slot] = 0;
    current->has = false;
    CHECK(old_count < 32);
    old[old_count++] = claim;
    enum pool_released released = play_release(current->pool, &claim);
    CHECK(released == RELEASED || ((scenario->flags & (CLOSES | STEERS)) && released == RELEASE_RETIRE));
}

static void body_lease(void)
{
    CHECK_EQ(get(PLAY_NEVER), PLAY_GOT);
    give();
}
static void body_lease_twice(void)
{
    body_lease();
    body_lease();
}
static void body_get(void) { CHECK_EQ(get(PLAY_NEVER), PLAY_GOT); }
static void body_get_briefly(void)
{
    if (get(WAITER_SLICE_NS) == PLAY_GOT)
        give();
}
static void body_give(void) { give(); }
static void body_give_and_lease(void)
{
    give();
    body_lease();
}
static void body_recover(void) { recovery_run(current->pool, true); }
static void body_recover_and_get(void)
{
    recovery_run(current->pool, true);
    body_get();
}
static void body_recover_and_lease(void)
{
    recovery_run(current->pool, true);
    body_lease();
}
static void body_newcomer(void)
{
    if (pool_join(current->pool) != POOL_OK)
        return; /* the place it could have was being swept */
    body_lease();
}
static void body_leave(void)
{
    body_lease();
    pool_leave(current->pool);
}
static void body_discard(void)
{
    CHECK_EQ(get(PLAY_NEVER), PLAY_GOT);
    holder[current->claim.slot] = 0;
    current->has = false;
    old[old_count++] = current->claim;
    struct pool_claim claim = current->claim;
    CHECK(pool_condemn(current->pool, &claim));
    play_retire(current->pool, &claim, SHM_T_closed_error);
}
/* What ended has ended before its reason is counted. */
static void check_reasons(void)
{
    const struct slab *slab = &current->pool->slab;
    uint64_t reasons = 0, ended = 0;
    for (unsigned reason = SHM_T_closed_broken; reason <= SHM_T_closed_revoked; reason++)
        reasons += SHM_LOAD_ACQUIRE(account, slab->totals->counters[reason]);
    for (uint32_t slot = 0; slot < scenario->slots; slot++) {
        struct account account;
        if (!account_read(&slab->accounts[slot], account_lives(&slab->accounts[slot]), &account))
            return;
        for (unsigned i = 0; i < SHM_BUCKETS; i++)
            ended += account.begun[i];
        ended -= account.open < SHM_BUCKETS;
    }
    CHECK(reasons <= ended);
}
/* Who looks at the figures: what an account says is true of the word, and no number falls. */
static void body_look(void)
{
    uint64_t before[SLOTS] = {0};
    check_reasons();
    for (uint32_t turn = 0; turn < 4 * scenario->slots; turn++) {
        uint32_t slot = turn % scenario->slots;
        struct account account;
        struct account_shm *row = &current->pool->slab.accounts[slot];
        uint64_t lives = account_lives(row);
        enum slot_state state = slot_state(slot_load(&current->pool->slab.slots[slot]));
        if (!account_read(row, lives, &account))
            continue;
        bool is_open = account.open < SHM_BUCKETS;
        CHECK(state == SLOT_DIALING || state == SLOT_RETIRING || is_open == (state != SLOT_EMPTY));
        CHECK(account.begun[0] >= before[slot]);
        before[slot] = account.begun[0];
    }
}
static void body_close(void)
{
    struct pool_claim claim;
    pool_shut(current->pool);
    while (play_take_idle(current->pool, &claim))
        play_retire(current->pool, &claim, SHM_T_closed_shutdown);
}
static void body_keep(void) {}

/* ---- steering ---- */

static void body_drain(void)
{
    struct pool_claim claim;
    CHECK(steering_state(&current->pool->slab, SHM_POOL_DRAINING));
    while (play_take_idle(current->pool, &claim))
        play_retire(current->pool, &claim, SHM_T_closed_shutdown);
}
static void body_pause(void) { steering_state(&current->pool->slab, SHM_POOL_PAUSED); }
static void body_resume(void) { steering_state(&current->pool->slab, SHM_POOL_OPEN); }
static void body_pause_and_resume(void)
{
    body_pause();
    pauses++;
    paused = true;
    shmpool_hook("use");
    paused = false;
    body_resume();
}
static void body_shut(void) { pool_shut(current->pool); }

static void resize(uint32_t cap)
{
    steering_resize(&current->pool->slab, cap);
    shrunk = cap;
}
static void body_shrink(void) { resize(scenario->slots - 1); }
static void body_shrink_to_one(void) { resize(1); }
static void body_grow(void) { resize(scenario->slots); }

/* Open a connection, if there is a permit. Who asks when the pool has been made smaller gets none that there are already. */
static void body_open(void)
{
    struct pool_claim claim;
    unsigned cap = shrunk;
    if (!pool_take_empty(current->pool, &claim))
        return;
    opened++;
    CHECK(!cap || opened <= cap);
    CHECK(play_install(current->pool, &claim));
    hold(&claim);
}
static void body_end(void)
{
    struct pool_claim claim = current->claim;
    holder[claim.slot] = 0;
    current->has = false;
    opened--;
    CHECK(pool_condemn(current->pool, &claim));
    play_retire(current->pool, &claim, SHM_T_closed_error);
}

static void body_evict_all(void) { steering_evict(&current->pool->slab, 0, "", 0, true); }

/* The lease that the first fiber holds is taken back from it. */
static void body_revoke(void)
{
    struct pool_claim claim = fibers[0].claim;
    if (!pool_condemn(current->pool, &claim))
        return;
    twins_released++;
    if (holder[claim.slot] == 1)
        holder[claim.slot] = 0;
    fibers[0].has = false;
    play_retire(current->pool, &claim, SHM_T_closed_revoked);
}

/* ---- dials that are under way ---- */

static struct waiter_place waiting; /* of the second fiber, for which the first dials */

/* As a thread of its own does. */
static void body_dial_succeeds(void)
{
    struct pool_claim claim = current->claim;
    CHECK(play_install(current->pool, &claim));
    CHECK(play_release(current->pool, &claim) != RELEASE_STALE);
    waiter_wake_first(&current->pool->slab, PLAY_ANY); /* who waited for this very dial may have to look for another */
}
static void body_dial_fails(void)
{
    struct pool_claim claim = current->claim;
    play_fail_dial(current->pool, &claim);
}
/* Whoever may dial finds that the server does not answer. */
static void body_dial_in_vain(void)
{
    struct pool_claim claim;
    if (pool_take_dial(current->pool, true, &claim) == TAKEN_DIAL)
        play_fail_dial(current->pool, &claim);
}
static void body_dial_interrupted(void)
{
    struct pool_claim claim;
    if (pool_take_dial(current->pool, true, &claim) != TAKEN_DIAL)
        return;
    upstream_untried(&current->pool->slab, claim.upstream, clock_now());
    pool_abandon(current->pool, &claim);
    waiter_wake_all(&current->pool->slab);
}

/* Wait for the dial that nobody waits for, if there is one. */
static void body_adopt(void)
{
    struct waiter_place place = {0};
    struct pool_claim claim;
    enum pool_taken taken = play_take(current->pool, PLAY_ANY, &place, &claim);
    adopted += taken == TAKEN_ADOPTED;
    CHECK(adopted <= 1);
    if (taken != TAKEN_LEASED)
        return;
    hold(&claim);
    give();
}

/* The caller for whom a dial is under way: in the queue since before, until it is served or its time is over. */
static void wait_on(uint64_t timeout_ns)
{
    struct play_request request = play_request(PLAY_ANY, timeout_ns);
    struct pool_claim claim;
    enum play_got got;
    request.place = waiting;
    request.under_way = fibers[0].claim;
    request.adopted_ns = clock_now();
    while (!play_look(current->pool, &request, &claim, &got))
        ;
    play_end_request(current->pool, &request);
    if (got != PLAY_GOT)
        return;
    hold(&claim);
    give();
}
static void body_wait_on(void) { wait_on(PLAY_NEVER); }
static void body_wait_on_briefly(void) { wait_on(WAITER_SLICE_NS); }

/* ---- checks ---- */

/* Look after idle connections: all are well; or none. */
static void check_all(bool well)
{
    struct pool_claim claim;
    for (uint32_t from = 0; pool_begin_check(current->pool, &from, PLAY_MS, false, &claim);) {
        int *mine = &holder[claim.slot];
        CHECK(!*mine || fibers[*mine - 1].state == DEAD);
        *mine = (int)(current - fibers) + 1;
        check_row(claim.slot);
        shmpool_hook("use");
        CHECK_EQ(*mine, current - fibers + 1);
        *mine = 0;
        if (well)
            CHECK(pool_end_check(current->pool, &claim));
        else if (pool_condemn(current->pool, &claim))
            play_retire(current->pool, &claim, SHM_T_closed_unhealthy);
    }
}
static void body_check_well(void) { check_all(true); }
static void body_check_ill(void) { check_all(false); }

static void body_get_unless_closed(void)
{
    enum play_got got = get(PLAY_NEVER);
    CHECK(got == PLAY_GOT || got == PLAY_CLOSED);
    if (got == PLAY_GOT)
        give();
}

/* ---- who looks ---- */

static void body_note(void)
{
    for (unsigned i = 0; i < 2; i++)
        event_note(&current->pool->slab, (struct event){.kind = EVENT_evicted, .slot = EVENT_NO_SLOT, .value = i + 1, .text = "a text"});
}
/* No writer dies or is overtaken: no event is lost, and each that is whole is one that was noted. */
static void body_read_events(void)
{
    const struct slab *slab = &current->pool->slab;
    struct event event;
    CHECK(event_count(slab) < EVENTS);
    for (uint64_t number = atomic_load(&slab->header->next_event); number--;) {
        enum event_found found = event_read(slab, number, &event);
        CHECK(found != EVENT_LOST);
        CHECK(found == EVENT_BEGUN || event.kind != EVENT_evicted || ((event.value == 1 || event.value == 2) && !strcmp(event.text, "a text")));
    }
}

static void body_join(void)
{
    CHECK_EQ(pool_join(current->pool), POOL_OK);
    CHECK(atomic_load(&current->pool->fork->phase) >= FORK_READY); /* also when a thread of the process was at it; told by nobody, as pool_joined() would */
}
/* Who finds a row ACTIVE that was FREE finds in it who that is. */
static void body_look_at_workers(void)
{
    for (uint32_t index = 0; index < scenario->workers; index++) {
        struct worker_shm *row = &current->pool->slab.workers[index];
        if (SHM_LOAD_ACQUIRE(worker, row->state) == SHM_WORKER_ACTIVE)
            CHECK_EQ(SHM_LOAD(hint, row->started_ns), atomic_load(&row->started_ns));
    }
}
/* Who finds that a thread of its process has joined finds the cache as that thread left it. */
static void body_join_after(void)
{
    struct pool *pool = current->pool;
    if (!pool_joined(pool))
        body_join();
    CHECK_EQ(SHM_LOAD(private, pool->cache.entries[0]), atomic_load(&pool->cache.entries[0]));
}

/* As module.c, when on_created has returned. */
static void body_show(void)
{
    struct slot_shm *row = &current->pool->slab.slots[current->claim.slot];
    SHM_STORE(row, row->leased_ns, now_ns + 1);
    SHM_AND_SEQ(shown, row->kind, ~(uint32_t)SHM_KIND_SHOWN);
}
static void body_look_at_leases(void)
{
    for (uint32_t slot = 0; slot < scenario->slots; slot++) {
        struct slot_shm *row = &current->pool->slab.slots[slot];
        if (slot_shown_state(row, slot_load(row)) == SLOT_LEASED)
            CHECK_EQ(SHM_LOAD(row, row->leased_ns), atomic_load(&row->leased_ns));
    }
}

/* ---- a pool that listens ---- */

/* One look for an event. A client that comes is a connection of its own. */
static void body_serve(void)
{
    struct pool_claim claim;
    if (service_next(current->pool, 0, &claim) != SERVICE_CLIENT)
        return;
    clients--;
    CHECK(play_install(current->pool, &claim));
    hold(&claim);
}
static void body_close_service(void) { service_close(current->pool); }
/* A client waits beside an empty slot, and nobody watches: who has the event is dead or stopped. */
static void clients_are_watched(void)
{
    CHECK(!clients || listener_is_armed || play_state(checker, 0) != SLOT_EMPTY || used.kills || used.stops);
}

/* ---- how it begins ---- */

static void fill(void)
{
    struct pool_claim claims[SLOTS];
    uint32_t cap = steering_cap(&checker->slab);
    for (uint32_t i = 0; i < cap; i++)
        claims[i] = play_lease(checker);
    for (uint32_t i = 0; i < cap; i++)
        CHECK_EQ(play_release(checker, &claims[i]), RELEASED);
    local_cache_clear(&checker->cache);
}

static void holds(unsigned fiber)
{
    fibers[fiber].claim = play_lease(fibers[fiber].pool);
    fibers[fiber].has = true;
    holder[fibers[fiber].claim.slot] = (int)fiber + 1;
}

static void nothing_open(void) {}
static void all_idle(void) { fill(); }
static void first_holds(void)
{
    fill();
    holds(0);
}
static void first_two_hold(void)
{
    first_holds();
    holds(1);
}
/* The summary says that somebody waits, and nobody does. */
static void stale_summary(void)
{
    first_holds();
    atomic_store(&checker->slab.header->summary, 1);
}

static void stale_summary_of_two(void)
{
    first_two_hold();
    atomic_store(&checker->slab.header->summary, 1);
}

/* A death is swept once; once more where a recoverer died in that. */
static void deaths_are_counted_once(void) { CHECK(play_total(checker, SHM_T_recoveries) <= 1 + 2 * used.kills); }

/* A worker that is no fiber of the run leased everything, and is dead. */
static void dead_holder(void)
{
    fill();
    for (unsigned i = 0; i < FIBERS; i++)
        if (fibers[i].body == body_newcomer)
            pool_leave(fibers[i].pool); /* the dead one had the only place that it can get */
    struct pool *dead = play_attach(checker);
    CHECK_EQ(pool_join(dead), POOL_OK);
    for (uint32_t i = 0; i < scenario->slots; i++)
        play_lease(dead);
    seat_close(dead->seat);
}

/* The same, and it had a place in the queue to which the other slot was offered. */
/* The dead one stands in the queue, and nobody has offered it anything yet. */
static void dead_in_queue(void)
{
    struct waiter_place place = {0};
    fill();
    struct pool *dead = play_attach(checker);
    CHECK_EQ(pool_join(dead), POOL_OK);
    CHECK(waiter_enter(&dead->slab, &place, dead->worker, PLAY_ANY, 1, 1));
    now_ns += 1000 * PLAY_MS;
    seat_close(dead->seat);
}
static void dead_waiter(void)
{
    struct waiter_place place = {0};
    fill();
    struct pool *dead = play_attach(checker);
    CHECK_EQ(pool_join(dead), POOL_OK);
    play_lease(dead);
    struct pool_claim claim = play_lease(checker);
    CHECK(waiter_enter(&dead->slab, &place, dead->worker, PLAY_ANY, 1, 1));
    now_ns += 1000 * PLAY_MS;
    CHECK_EQ(play_release(checker, &claim), RELEASED);
    CHECK_EQ(play_state(checker, claim.slot), SLOT_OFFERED);
    seat_close(dead->seat);
}

/* Two threads of one process hold one lease between them: both give it back. */
static void twins(void)
{
    first_holds();
    fibers[1].pool = fibers[0].pool;
    fibers[1].claim = fibers[0].claim;
}
static void body_twin(void)
{
    struct pool_claim claim = current->claim;
    if (holder[claim.slot] == 1)
        holder[claim.slot] = 0;
    current->has = false;
    enum pool_released released = play_release(current->pool, &claim);
    twins_released += released == RELEASED;
    CHECK(released != RELEASE_RETIRE);
}
static void one_twin_released(void)
{
    if (fibers[0].state == FINISHED && fibers[1].state == FINISHED)
        CHECK_EQ(twins_released, 1);
}

/* One thread sweeps, another leaves; a third process waits for what the dead one holds. */
static void sweep_and_leave(void)
{
    dead_holder();
    fibers[1].pool = fibers[0].pool;
}
static void body_leave_now(void) { pool_leave(current->pool); }

/* A connection that only the checker could use; the others may have its permit. */
static void private_idle(void)
{
    struct pool_claim claim;
    CHECK(pool_take_empty(checker, &claim));
    CHECK(play_install_as(checker, &claim, (struct pool_birth){.flags = SHM_KIND_PRIVATE, .expires_ns = PLAY_NEVER}, NULL));
    CHECK_EQ(play_release(checker, &claim), RELEASED);
}

/* The first fiber has a dial under way, for nobody. */
static void orphan_dial(void)
{
    upstream_proved(&checker->slab);
    CHECK_EQ(play_take(fibers[0].pool, PLAY_ANY, NULL, &fibers[0].claim), TAKEN_DIAL);
    pool_announce_dial(fibers[0].pool, &fibers[0].claim, PLAY_ANY, true);
}
/* It is for the second, which waits in the queue. */
static void dial_for_second(void)
{
    orphan_dial();
    atomic_store(&checker->slab.slots[fibers[0].claim.slot].mark, 0);
    waiting = (struct waiter_place){.dialling = true};
    CHECK(waiter_enter(&fibers[1].pool->slab, &waiting, fibers[1].pool->worker, PLAY_ANY, 1, now_ns));
}
static void down(void)
{
    struct pool_claim claim;
    CHECK_EQ(play_take(checker, PLAY_ANY, NULL, &claim), TAKEN_DIAL);
    play_fail_dial(checker, &claim);
    CHECK_EQ(upstream_step(atomic_load(&checker->slab.header->upstream)), 1);
}
/* The server is down, and a probe is due; the first fiber's dial began before. */
static void down_with_older_dial(void)
{
    orphan_dial();
    atomic_store(&checker->slab.slots[fibers[0].claim.slot].mark, 0);
    down();
    now_ns += PLAY_FIRST_STEP_NS;
}
static void paused_and_held(void)
{
    first_holds();
    CHECK(steering_state(&checker->slab, SHM_POOL_PAUSED));
}
/* Idle for longer than the interval of the checks. */
static void idle_for_long(void)
{
    fill();
    now_ns += 1000 * PLAY_MS;
}
/* A connection in the last slot, held by the third fiber; the others are empty. */
static void last_is_held(void)
{
    struct pool_claim claims[SLOTS];
    for (uint32_t i = 0; i < scenario->slots; i++)
        CHECK(pool_take_empty(fibers[2].pool, &claims[i]));
    for (uint32_t i = 0; i + 1 < scenario->slots; i++)
        pool_abandon(fibers[2].pool, &claims[i]);
    fibers[2].claim = claims[scenario->slots - 1];
    CHECK(play_install(fibers[2].pool, &fibers[2].claim));
    fibers[2].has = true;
    holder[fibers[2].claim.slot] = 3;
    opened = 1;
}
/* What was left for a waiter that gave up meanwhile is ended by maintenance. */
static void idle_end(void)
{
    struct pool_claim claim;
    while (play_take_idle(checker, &claim))
        play_retire(checker, &claim, SHM_T_closed_shutdown);
}

/* The first fiber has not joined yet. */
static void first_is_out(void)
{
    first_holds();
    CHECK_EQ(play_release(fibers[0].pool, &fibers[0].claim), RELEASED);
    fibers[0].has = false;
    holder[fibers[0].claim.slot] = 0;
    pool_leave(fibers[0].pool);
}
/* The only place that is free is the first one's, once it has left. */
static void second_is_out(void)
{
    fill();
    pool_leave(fibers[1].pool);
    CHECK_EQ(pool_join(play_attach(checker)), POOL_OK);
}
static void two_threads_are_out(void)
{
    first_is_out();
    fibers[1].pool = fibers[0].pool;
}
static void first_is_shown(void)
{
    first_holds();
    atomic_fetch_or(&checker->slab.slots[fibers[0].claim.slot].kind, SHM_KIND_SHOWN);
}

/* The one slot for connections is held, and a client waits. */
static void listening(void)
{
    first_holds();
    opened = 1;
    atomic_store(&checker->slab.header->service_due_ns, PLAY_NEVER); /* no sweep */
    for (unsigned i = 0; i < FIBERS; i++)
        fibers[i].pool->service = &service;
}
static void two_threads_listen(void)
{
    listening();
    fibers[1].pool = fibers[0].pool;
}

#define HANDOVER (WAITER_HANDOVER_AFTER_NS + 1)
static const struct scenario scenarios[] = {
    {"lease", 1, 4, 2, 0, all_idle, {body_lease_twice, body_lease_twice}, NULL, 0, 0},
    {"lease-handover", 1, 4, 2, HANDOVER, all_idle, {body_lease_twice, body_lease_twice}, NULL, 0, 0},
    {"lease-three", 2, 5, 3, 0, all_idle, {body_lease, body_lease, body_lease}, NULL, 0, 0},
    {"dial", 1, 4, 2, 0, nothing_open, {body_lease, body_lease}, NULL, 0, 0},
    {"account", 1, 5, 3, 0, all_idle, {body_discard, body_discard, body_look}, NULL, LOOKS, 0},
    {"discard", 1, 4, 3, HANDOVER, all_idle, {body_discard, body_lease, body_lease}, NULL, 0, 0},
    {"wait", 1, 4, 2, 0, first_holds, {body_give, body_get}, NULL, 0, 0},
    {"wait-handover", 1, 4, 2, HANDOVER, first_holds, {body_give, body_get}, NULL, 0, 0},
    {"wait-barging", 1, 4, 2, 0, first_holds, {body_give_and_lease, body_lease}, NULL, 0, 0},
    {"two-waiters", 2, 5, 4, 0, first_two_hold, {body_give, body_give, body_get, body_get}, NULL, 0, 0},
    {"two-waiters-handover", 2, 5, 4, HANDOVER, first_two_hold, {body_give, body_give, body_get, body_get}, NULL, 0, 0},
    {"summary", 1, 4, 2, 0, stale_summary, {body_give, body_get}, NULL, 0, 0},
    {"summary-two", 2, 5, 4, 0, stale_summary_of_two, {body_give, body_give, body_get, body_get}, NULL, 0, 0},
    {"offer-or-leave", 1, 5, 3, HANDOVER, first_holds, {body_give, body_get_briefly, body_lease}, NULL, 0, 0},
    {"twins", 1, 5, 3, HANDOVER, twins, {body_twin, body_twin, body_get}, one_twin_released, ONE_PROCESS, 0},
    {"twins-quiet", 1, 5, 3, 0, twins, {body_twin, body_twin, body_lease}, one_twin_released, ONE_PROCESS, 0},
    {"evict", 1, 4, 2, 0, private_idle, {body_lease, body_lease}, NULL, 0, 0},
    {"close", 2, 5, 3, HANDOVER, first_two_hold, {body_give, body_give, body_close}, NULL, CLOSES, 0},
    {"close-waiting", 1, 5, 3, HANDOVER, first_holds, {body_give, body_get_unless_closed, body_close}, NULL, CLOSES, 0},
    {"leave", 1, 4, 2, HANDOVER, all_idle, {body_leave, body_lease}, NULL, 0, 0},
    {"leave-under-sweep", 1, 5, 3, 0, sweep_and_leave, {body_recover, body_leave_now, body_recover_and_get}, NULL, ONE_PROCESS, 0},
    {"recover", 1, 5, 2, 0, dead_holder, {body_recover, body_recover_and_get}, deaths_are_counted_once, 0, 0},
    {"recover-waiter", 2, 5, 3, HANDOVER, dead_waiter, {body_recover, body_recover_and_get, body_lease}, NULL, 0, 0},
    {"recover-queued", 1, 5, 2, HANDOVER, dead_in_queue, {body_recover, body_lease}, NULL, 0, 0},
    {"newcomer", 1, 2, 2, 0, dead_holder, {body_recover_and_lease, body_newcomer}, NULL, 0, 0},
    {"herd", 3, 5, 3, 0, nothing_open, {body_get, body_get, body_get}, NULL, 0, 0},
    {"adopt", 1, 5, 3, 0, orphan_dial, {body_dial_succeeds, body_lease, body_lease}, NULL, 0, 0},
    {"adopt-alone", 2, 5, 2, 0, orphan_dial, {body_dial_succeeds, body_get}, NULL, 0, 0},
    {"adopt-once", 1, 5, 3, 0, orphan_dial, {body_dial_succeeds, body_adopt, body_adopt}, NULL, 0, 0},
    {"adopt-two", 2, 5, 3, 0, orphan_dial, {body_dial_succeeds, body_get, body_get}, NULL, 0, 0},
    {"adopt-and-fail", 1, 5, 3, 0, orphan_dial, {body_dial_fails, body_lease, body_lease}, NULL, BY_TIME, 0},
    {"orphan", 1, 5, 3, 0, dial_for_second, {body_dial_succeeds, body_wait_on_briefly, body_lease}, NULL, 0, 0},
    {"wait-on", 1, 5, 3, HANDOVER, dial_for_second, {body_dial_succeeds, body_wait_on, body_lease}, NULL, 0, 0},
    {"probe", 3, 5, 4, 0, down_with_older_dial, {body_dial_succeeds, body_dial_in_vain, body_dial_in_vain, body_get}, NULL, BY_TIME, 0},
    {"probe-late-failure", 2, 5, 3, 0, down_with_older_dial, {body_dial_fails, body_dial_in_vain, body_get}, NULL, BY_TIME, 0},
    {"probe-interrupted", 2, 5, 3, PLAY_FIRST_STEP_NS, down, {body_dial_interrupted, body_dial_in_vain, body_lease}, NULL, BY_TIME, 0},
    {"pause", 1, 5, 3, 0, first_holds, {body_give, body_lease, body_pause_and_resume}, NULL, 0, 0},
    {"pause-handover", 1, 5, 3, HANDOVER, first_holds, {body_give, body_lease, body_pause_and_resume}, NULL, 0, 0},
    {"resume", 1, 5, 3, 0, paused_and_held, {body_give, body_lease, body_resume}, NULL, 0, 0},
    {"steer-and-close", 1, 5, 3, 0, nothing_open, {body_pause, body_resume, body_shut}, NULL, CLOSES, 0},
    {"drain", 1, 5, 3, 0, first_holds, {body_give, body_get_unless_closed, body_drain}, NULL, CLOSES, 0},
    {"drain-handover", 1, 5, 3, HANDOVER, first_holds, {body_give, body_get_unless_closed, body_drain}, NULL, CLOSES, 0},
    {"drain-briefly", 1, 5, 3, 0, first_holds, {body_give, body_get_briefly, body_drain}, idle_end, CLOSES, 0},
    {"revoke", 1, 5, 3, 0, first_holds, {body_twin, body_revoke, body_get}, one_twin_released, 0, 0},
    {"revoke-handover", 1, 5, 3, HANDOVER, first_holds, {body_twin, body_revoke, body_get}, one_twin_released, 0, 0},
    {"check", 1, 5, 3, 0, idle_for_long, {body_check_well, body_lease, body_lease}, NULL, 0, 0},
    {"check-handover", 1, 5, 3, HANDOVER, idle_for_long, {body_check_well, body_get, body_check_well}, NULL, 0, 0},
    {"check-ill", 1, 5, 3, 0, idle_for_long, {body_check_ill, body_lease, body_lease}, NULL, 0, 0},
    {"evict-all", 1, 5, 3, 0, first_holds, {body_give, body_evict_all, body_lease}, NULL, STEERS, 0},
    {"grow", 2, 5, 3, 0, first_holds, {body_keep, body_get, body_grow}, NULL, STEERS, 1},
    {"shrink", 2, 5, 3, 0, first_two_hold, {body_give, body_give, body_shrink}, NULL, STEERS, 0},
    {"shrink-waiting", 2, 5, 4, 0, first_two_hold, {body_give, body_give, body_shrink, body_lease}, NULL, STEERS, 0},
    {"last-permit", 3, 5, 4, 0, last_is_held, {body_open, body_open, body_end, body_shrink}, NULL, STEERS, 0},
    {"events", 1, 5, 3, 0, nothing_open, {body_note, body_note, body_read_events}, NULL, NOTES, 0},
    {"join", 1, 4, 2, HANDOVER, first_is_out, {body_join, body_look_at_workers}, NULL, 0, 0},
    {"leave-and-join", 1, 2, 2, 0, second_is_out, {body_leave, body_newcomer}, NULL, 0, 0},
    {"join-threads", 1, 4, 2, 0, two_threads_are_out, {body_join, body_join_after}, NULL, ONE_PROCESS, 0},
    {"serve", 3, 4, 2, 0, listening, {body_end, body_serve}, clients_are_watched, 0, 1},
    {"serve-two", 3, 5, 3, 0, listening, {body_end, body_serve, body_serve}, clients_are_watched, 0, 1},
    {"serve-and-close", 3, 4, 2, 0, two_threads_listen, {body_serve, body_close_service}, NULL, ONE_PROCESS, 1},
    {"shown", 1, 4, 2, 0, first_is_shown, {body_show, body_look_at_leases}, NULL, 0, 0},
    {"last-permit-waiting", 3, 5, 4, 0, last_is_held, {body_lease, body_lease, body_give, body_shrink_to_one}, NULL, STEERS, 0},
};

static void begin(const struct scenario *which)
{
    scenario = which;
    play_bare = play_one_mapping = true; /* a futex has one address */
    now_ns = 1000 * PLAY_MS;
    memset(lock_of, 0, sizeof lock_of);
    next_seat = 0;
    memset(holder, 0, sizeof holder);
    memset(fibers, 0, sizeof fibers);
    checker = play_found_capped(which->slots, which->cap ? which->cap : which->slots, which->workers + 1, 4, 1);
    for (uint32_t i = 0; i < which->slots; i++) {
        close(checker->mailboxes[i]);
        checker->mailboxes[i] = -1;
    }
    for (unsigned i = 0; i < FIBERS; i++) {
        struct fiber *fiber = &fibers[i];
        fiber->pool = play_attach(checker);
        fiber->body = which->bodies[i];
        fiber->stack = malloc(STACK);
        CHECK(fiber->stack && getcontext(&fiber->context) == 0);
        if (i < which->fibers)
            CHECK_EQ(pool_join(fiber->pool), POOL_OK);
    }
    which->prepare();
    save();
}

/* From few to many. What needs no older value the first build finds. */
static const struct bounds ladder[] = {
#ifdef SHMPOOL_MACHINE
    {0, 0, 0, 0, 1}, {1, 0, 0, 0, 1}, {0, 0, 0, 0, 2}, {1, 1, 0, 0, 1}, {1, 0, 1, 0, 1}, {1, 0, 0, 1, 1}, {0, 0, 0, 0, 3}, {1, 0, 0, 0, 2},
    {2, 0, 0, 0, 1}, {2, 0, 1, 0, 1}, {1, 0, 1, 0, 2}, {2, 1, 0, 0, 1}, {2, 0, 0, 0, 2}, {3, 0, 0, 0, 1}, {2, 1, 1, 1, 2}, {3, 2, 2, 1, 3},
#else
    {0, 0, 0, 0, 0}, {1, 0, 0, 0, 0}, {1, 1, 0, 0, 0}, {1, 0, 1, 0, 0}, {1, 0, 0, 1, 0}, {2, 0, 0, 0, 0}, {2, 1, 0, 0, 0},
    {2, 0, 1, 0, 0}, {2, 0, 0, 1, 0}, {1, 0, 2, 0, 0}, {3, 0, 0, 0, 0}, {3, 1, 0, 0, 0}, {2, 1, 1, 0, 0}, {3, 0, 1, 0, 0},
    {3, 2, 0, 0, 0}, {2, 0, 2, 0, 0}, {3, 1, 1, 1, 0}, {3, 0, 2, 0, 0}, {3, 2, 2, 1, 0},
#endif
};

/* All runs within these bounds, until `deadline`; false when it came first. */
static bool walk(struct bounds within, uint64_t deadline)
{
    bounds = within;
    if ((scenario->flags & ONE_PROCESS))
        bounds.kills = bounds.stops = 0;
    planned = 0;
    do {
        run();
        if (runs % 64 == 0 && real_ns() > deadline)
            return false;
    } while (next_plan());
    return true;
}

static void explore(const struct scenario *which, double seconds)
{
    uint64_t begun = real_ns(), end = begun + (uint64_t)(seconds * 1e9);
    unsigned level = 0, levels = sizeof ladder / sizeof *ladder;
    begin(which);
    runs = 0;
    walking_randomly = false;
    while (level < levels && walk(ladder[level], begun + (end - begun) * 3 / 4))
        level++;
    uint64_t whole = runs;
    walking_randomly = level < levels;
    for (bounds = (struct bounds){3, 2, 2, 1, IS_WEAK ? 3 : 0}; walking_randomly && real_ns() < end;) {
        planned = 0;
        bounds.kills = (scenario->flags & ONE_PROCESS) ? 0 : runs % 3; /* a third without any death: there nobody may rely on slices */
        bounds.stops = bounds.kills == 1;
        run();
    }
    printf("%-22s %8" PRIu64 " runs in order, %u of %u bounds whole, %8" PRIu64 " at random, %.2f s\n", which->name, whole, level, levels,
           runs - whole, (double)(real_ns() - begun) / 1e9);
    fflush(stdout);
}

static void replay(const struct scenario *which, const char *list)
{
    begin(which);
    CHECK_EQ(sscanf(list, "%u,%u,%u,%u,%u", &bounds.preemptions, &bounds.timeouts, &bounds.kills, &bounds.stops, &bounds.stale), 5);
    CHECK(list = strchr(list, '/'));
    list++;
    setvbuf(stdout, NULL, _IOLBF, 0);
    tracing = true;
    planned = 0;
    for (char *end; *list; list = *end ? end + 1 : end) {
        CHECK(planned < DEPTH);
        taken[planned++] = (uint16_t)strtoul(list, &end, 10);
        CHECK(end != list);
    }
    run();
    printf("the run is good\n");
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strncmp(argv[1], "weaken=", 7)) {
        static char text[96];
        CHECK(IS_WEAK && weak_set_fault(argv[1] + 7));
        snprintf(text, sizeof text, "%s ", argv[1]);
        weakened = text;
        argc--, argv++;
    }
    const char *wanted = argc > 1 ? argv[1] : "all";
    static char alternate[65536];
    stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    CHECK(sigaltstack(&stack, NULL) == 0);
    for (size_t i = 0; i < 4; i++)
        sigaction((int[]){SIGABRT, SIGILL, SIGSEGV, SIGTRAP}[i], &action, NULL);
    bool replays = argc > 3 && !strcmp(argv[2], "replay");
    if (!replays)
        draws = check_seed(argc > 3 ? argv[3] : NULL);
    bool any = false;
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        unsigned part, parts;
        bool by_part = sscanf(wanted, "%u/%u", &part, &parts) == 2;
        if (by_part ? i % parts != part : strcmp(wanted, "all") && strcmp(wanted, scenarios[i].name))
            continue;
        any = true;
        if (replays)
            replay(&scenarios[i], argv[3]);
        else
            explore(&scenarios[i], argc > 2 ? atof(argv[2]) : 0.5);
    }
    CHECK(any);
}
