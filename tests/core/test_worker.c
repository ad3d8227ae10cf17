/* test_worker.c: registration, liveness by byte locks, and forks of every kind. */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "play.h"

static void expect_exit(pid_t child)
{
    int status;
    pid_t ended = waitpid(child, &status, 0);
    CHECK(ended > 0 && (ended == child || child == -1));
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);
}

/* A child by the bare system call: no handler of libc runs. */
static pid_t raw_fork(void) { return (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL); }

static void locks(void)
{
    int fd = play_memory(4096);
    struct seat *one = seat_take(), *two = seat_take();
    CHECK(one && two && one != two);
    CHECK_EQ(seat_open(one, fd), 0);
    CHECK_EQ(seat_open(two, fd), 0);
    CHECK(fcntl(one->fd, F_GETFD) & FD_CLOEXEC);
    CHECK(byte_lock(one->fd, 3) && byte_lock(one->fd, 3));
    CHECK(!byte_lock(two->fd, 3));
    CHECK(byte_lock(two->fd, 2) && byte_lock(two->fd, 4));
    CHECK(byte_is_locked(two->fd, 3) && byte_is_locked(fd, 3));
    CHECK(!byte_is_locked(one->fd, 3)); /* one's own does not count */
    CHECK(!byte_is_locked(fd, 5));
    close(dup(fd)); /* closing another descriptor of the file does not drop it, as it would with POSIX locks */
    CHECK(byte_is_locked(two->fd, 3));
    byte_unlock(one->fd, 3);
    CHECK(!byte_is_locked(two->fd, 3) && byte_lock(two->fd, 3));
    seat_close(two);
    seat_close(two); /* twice is once */
    CHECK(byte_lock(one->fd, 3) && byte_lock(one->fd, 2));
    int number = one->fd; /* the program closes the seat, and has a pipe of its own by that number */
    int ends[2];
    CHECK(pipe(ends) == 0 && dup2(ends[0], number) == number);
    seat_close(one);
    CHECK(fcntl(number, F_GETFD) >= 0);
    close(number);
    close(ends[0]);
    close(ends[1]);
    CHECK(byte_is_locked(-1, 3)); /* cannot tell: alive */
    CHECK(!byte_lock(-1, 3));
    seat_give_back(one);
    seat_give_back(two);
    CHECK(seat_take() && seat_take()); /* the nodes are used again */
    CHECK_EQ(seat_open(one, -1), ENOENT);
    CHECK_EQ(one->fd, -1);
    close(fd);
}

/* The look needs no right to write. */
static void read_only_look(void)
{
    char path[64];
    struct pool *pool = play_found(1, 2, 1, 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", pool->slab_fd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && byte_is_locked(fd, pool->worker - 1) && !byte_is_locked(fd, pool->worker));
    CHECK(byte_is_locked(fd, SHM_FAMILY_BYTE)); /* the family's read lock bars a write lock */
    close(fd);
    play_leave(pool);
}

static void family_byte(void)
{
    char path[64];
    struct pool *pool = play_found(1, 2, 1, 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", pool->slab_fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(byte_is_locked(fd, SHM_FAMILY_BYTE));
    pool_leave(pool);
    CHECK(byte_is_locked(fd, SHM_FAMILY_BYTE)); /* still in the family */
    play_end(pool);
    CHECK(!byte_is_locked(fd, SHM_FAMILY_BYTE));
    CHECK(family_join(fd));
    close(fd);
}

static void full_table(void)
{
    struct pool *pool = play_found(1, 2, 1, 0), *two = play_join(pool), *three = play_attach(pool);
    CHECK_EQ(pool_join(three), POOL_NO_WORKER);
    CHECK_EQ(three->seat->fd, -1);
    CHECK_EQ(pool_join(three), POOL_NO_WORKER);
    pool_leave(two);
    CHECK_EQ(pool_join(three), POOL_OK);
    CHECK_EQ(three->worker, 2);
    CHECK_EQ(pool_join(three), POOL_OK); /* once more is nothing */
    CHECK_EQ(three->generation, 3);      /* three tries were made, one of them good */
    CHECK_EQ(pool_join(two), POOL_NO_WORKER);
    play_leave(three);
    CHECK_EQ(pool_join(two), POOL_OK);
    play_leave(two);
    play_check_workers(pool, 1);
    play_leave(pool);
}

/* All 4096 places, most of them held by one lock over many bytes; the next one is refused. */
static void every_place(void)
{
    enum { MOST = 4096 };
    struct pool *first = play_found(1, MOST, 1, 0), *last = play_attach(first), *late = play_attach(first);
    struct seat *seat = seat_take();
    struct flock many = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 1, .l_len = MOST - 2};
    CHECK_EQ(seat_open(seat, first->slab_fd), 0);
    CHECK(fcntl(seat->fd, F_OFD_SETLK, &many) == 0);
    CHECK_EQ(pool_join(last), POOL_OK);
    CHECK_EQ(last->worker, MOST);
    CHECK_EQ(pool_join(late), POOL_NO_WORKER);
    struct pool_claim claim = play_lease(last); /* the largest owner fits into the word */
    CHECK_EQ(slot_owner(claim.word), MOST);
    play_die(last);
    CHECK_EQ(pool_join(late), POOL_OK); /* in the dead one's place, which it swept first */
    CHECK_EQ(late->worker, MOST);
    CHECK_EQ(play_state(late, 0), SLOT_EMPTY);
    CHECK_EQ(play_release(last, &claim), RELEASE_STALE);
    seat_give_back(seat);
    play_leave(late);
    play_end(last);
    play_leave(first);
}

/* An index is only given out under its lock: a living holder keeps it though its row says FREE. */
static void lock_before_row(void)
{
    struct pool *pool = play_found(1, 2, 1, 0), *two = play_attach(pool);
    atomic_store(&pool->row->state, SHM_WORKER_FREE);
    CHECK_EQ(pool_join(two), POOL_OK);
    CHECK_EQ(two->worker, 2);
    atomic_store(&pool->row->state, SHM_WORKER_ACTIVE);
    play_leave(two);
    play_leave(pool);
}

/* ---- forks ---- */

/* In the child nothing of the parent's is ours; it registers anew, as another worker, with an empty cache. */
static void child_registers_anew(pid_t (*make)(void))
{
    struct pool *pool = play_found(3, 4, 1, 2);
    struct pool_claim leased = play_lease(pool), cached = play_lease(pool), got;
    CHECK_EQ(play_release(pool, &cached), RELEASED);
    uint32_t generation = pool->generation, worker = pool->worker;
    CHECK(pool_joined(pool));
    fflush(stdout);
    pid_t child = make();
    if (!child) {
        CHECK(!pool_joined(pool));
        pool_leave(pool); /* not registered: does nothing */
        CHECK_EQ(play_state(pool, leased.slot), SLOT_LEASED);
        CHECK_EQ(pool_join(pool), POOL_OK);
        CHECK(pool_joined(pool));
        CHECK(pool->worker != worker && pool->generation != generation);
        CHECK_EQ(pool->pid, getpid());
        CHECK(!pool_take_cached(pool, PLAY_ANY, &got));
        got = play_lease(pool); /* the parent's cached one is there for all */
        CHECK_EQ(got.slot, cached.slot);
        CHECK(play_fetch(pool, &got) >= 0);
        pool_leave(pool); /* leases that are out are retired */
        CHECK_EQ(play_state(pool, got.slot), SLOT_EMPTY);
        CHECK_EQ(play_state(pool, leased.slot), SLOT_LEASED);
        _exit(0);
    }
    expect_exit(child);
    CHECK(pool_joined(pool));
    CHECK_EQ(pool->worker, worker);
    CHECK_EQ(play_release(pool, &leased), RELEASED);
    play_lease_all(pool);
    play_check_workers(pool, 1);
    play_leave(pool);
}

static void after_fork(void) { child_registers_anew(fork); }
static void after_raw_clone(void) { child_registers_anew(raw_fork); }

/* A parent with a lease makes a child that does not touch the pool, then is killed while the child lives on: seen at once. */
static void parent_killed(bool child_joins, pid_t (*make)(void))
{
    struct pool *pool = play_found(2, 4, 1, 1);
    int told[2], hold[2];
    char byte;
    CHECK(pipe(told) == 0 && pipe(hold) == 0);
    fflush(stdout);
    pid_t parent = fork();
    if (!parent) {
        CHECK_EQ(pool_join(pool), POOL_OK);
        struct pool_claim claim = play_lease(pool);
        (void)claim;
        if (!make()) {
            if (child_joins)
                CHECK_EQ(pool_join(pool), POOL_OK);
            close(hold[1]);
            CHECK(write(told[1], "c", 1) == 1);
            CHECK(read(hold[0], &byte, 1) == 0); /* lives until the test lets go */
            _exit(0);
        }
        for (;;)
            pause();
    }
    CHECK(read(told[0], &byte, 1) == 1);
    CHECK_EQ(play_count(pool, SLOT_LEASED), 1);
    CHECK_EQ(recovery_run(pool, true), 0); /* alive */
    CHECK(kill(parent, SIGKILL) == 0);
    CHECK_EQ(waitpid(parent, NULL, 0), parent);
    CHECK_EQ(recovery_run(pool, true), 1);
    CHECK_EQ(play_count(pool, SLOT_LEASED), 0);
    play_check_workers(pool, child_joins ? 2 : 1);
    close(hold[1]);
    expect_exit(-1); /* the orphan came to us */
    recovery_run(pool, true);
    play_check_workers(pool, 1);
    close(told[0]);
    close(told[1]);
    close(hold[0]);
    play_lease_all(pool);
    play_leave(pool);
}

static void parent_killed_idle_child(void) { parent_killed(false, fork); }
static void parent_killed_joined_child(void) { parent_killed(true, fork); }
/* Made by the bare system call, a child that joins has closed its parent's seat. (One that never does keeps the parent's lock.) */
static void parent_killed_raw_child(void) { parent_killed(true, raw_fork); }

/* Children of a process with several handles close every seat. */
static void every_seat_is_closed(void)
{
    struct pool *one = play_found(1, 3, 1, 0), *two = play_join(one), *apart = play_found(1, 3, 1, 0);
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        CHECK_EQ(one->seat->fd, -1);
        CHECK_EQ(two->seat->fd, -1);
        CHECK_EQ(apart->seat->fd, -1);
        CHECK_EQ(pool_join(two), POOL_OK);
        CHECK_EQ(two->worker, 3);
        play_leave(two);
        _exit(0);
    }
    expect_exit(child);
    CHECK(one->seat->fd >= 0 && two->seat->fd >= 0 && apart->seat->fd >= 0);
    play_leave(two);
    play_leave(one);
    play_leave(apart);
}

/* Forks while other threads open and close seats: a child never keeps one. */
static atomic_bool enough;
static void *register_and_leave(void *arg)
{
    struct pool *pool = arg;
    while (!atomic_load(&enough)) {
        CHECK_EQ(pool_join(pool), POOL_OK);
        pool_leave(pool);
    }
    return NULL;
}

static void forks_beside_registrations(void)
{
    pthread_t threads[2];
    struct pool *pool = play_found(1, 4, 1, 0), *others[2] = {play_attach(pool), play_attach(pool)};
    atomic_store(&enough, false);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, register_and_leave, others[i]) == 0);
    for (int i = 0; i < 200; i++) {
        pid_t child = fork();
        if (!child)
            _exit(others[0]->seat->fd >= 0 || others[1]->seat->fd >= 0);
        expect_exit(child);
    }
    atomic_store(&enough, true);
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        play_end(others[i]);
    }
    play_leave(pool);
}

static void fork_page(void)
{
    struct fork_page *page = fork_page_new();
    CHECK(page);
    CHECK_EQ(page->phase, FORK_WIPED);
    atomic_store(&page->phase, FORK_READY);
    for (int raw = 0; raw <= 1; raw++) {
        pid_t child = raw ? raw_fork() : fork();
        if (!child) {
            int wrong = atomic_load(&page->phase) != FORK_WIPED;
            pid_t grandchild = fork();
            if (!grandchild)
                _exit(atomic_load(&page->phase) != FORK_WIPED);
            expect_exit(grandchild);
            _exit(wrong);
        }
        expect_exit(child);
        CHECK_EQ(atomic_load(&page->phase), FORK_READY);
    }
    fork_page_free(page);
}

/* A zombie is dead, a stopped process is alive. */
static void zombie_and_stopped(void)
{
    struct pool *pool = play_found(2, 3, 1, 0);
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        CHECK_EQ(pool_join(pool), POOL_OK);
        play_lease(pool);
        raise(SIGSTOP);
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, WUNTRACED), child);
    CHECK(WIFSTOPPED(status));
    CHECK_EQ(recovery_run(pool, true), 0);
    CHECK_EQ(play_count(pool, SLOT_LEASED), 1);
    CHECK(kill(child, SIGCONT) == 0);
    siginfo_t info;
    CHECK(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT) == 0); /* it has ended and is not collected */
    CHECK_EQ(recovery_run(pool, true), 1);
    expect_exit(child);
    play_lease_all(pool);
    play_leave(pool);
}

/* Several threads find out at once that they are in a new process: one registers. */
static void *join_it(void *arg)
{
    CHECK_EQ(pool_join(arg), POOL_OK);
    return NULL;
}

static void threads_join_once(void)
{
    pthread_t threads[4];
    struct pool *pool = play_found(1, 4, 1, 0), *other = play_attach(pool);
    for (int round = 0; round < 50; round++) {
        uint32_t generation = other->generation;
        for (int i = 0; i < 4; i++)
            CHECK(pthread_create(&threads[i], NULL, join_it, other) == 0);
        for (int i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
        CHECK_EQ(other->generation, generation + 1);
        play_check_workers(pool, 2);
        pool_leave(other);
    }
    play_end(other);
    play_leave(pool);
}

int main(void)
{
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0); /* grandchildren whose parent was killed can be waited for */
    RUN(locks);
    RUN(read_only_look);
    RUN(family_byte);
    RUN(full_table);
    RUN(every_place);
    RUN(lock_before_row);
    RUN(fork_page);
    RUN(after_fork);
    RUN(after_raw_clone);
    RUN(parent_killed_idle_child);
    RUN(parent_killed_joined_child);
    RUN(parent_killed_raw_child);
    RUN(every_seat_is_closed);
    RUN(forks_beside_registrations);
    RUN(zombie_and_stopped);
    RUN(threads_join_once);
}
