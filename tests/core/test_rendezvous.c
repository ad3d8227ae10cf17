/* test_rendezvous.c: members answer newcomers, also beside stopped ones; no fork sees the thread, and nothing leaks. */
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "rendezvous.h"
#include "sets.h"
#include "slab.h"

enum { SHORT_NS = 50000000, STUCK_AFTER_S = 30 };

static struct descriptors set, got;
static struct rendezvous *door;
static struct sockaddr_un address;
static socklen_t address_size;

/* A listening socket under a name that the kernel chose, and a set with it. */
static void begin_with(uint32_t count)
{
    set = sets_new(count, 3, true);
    address_size = sizeof address;
    address = (struct sockaddr_un){.sun_family = AF_UNIX};
    CHECK(bind(set.listener, (struct sockaddr *)&address, sizeof address.sun_family) == 0);
    CHECK(getsockname(set.listener, (struct sockaddr *)&address, &address_size) == 0);
    CHECK(listen(set.listener, 4096) == 0);
    CHECK((door = rendezvous_take()) != NULL);
    CHECK(!rendezvous_is_open(door));
}

static void begin(void) { begin_with(3); }

static void end(void)
{
    rendezvous_give_back(door);
    sets_free(&set, 3);
}

static void open_door(void)
{
    CHECK_EQ(rendezvous_open(door, &set, NULL), 0);
    CHECK(rendezvous_is_open(door));
}

static int ask(void)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&address, address_size) == 0);
    return fd;
}

/* Who answered: each member may put a number of its own into the id of the set that it sends. */
static int answered(int fd)
{
    CHECK_EQ(descriptors_receive(fd, &got, SETS_LONG_NS), 0);
    close(fd);
    int who = got.slab_id[0];
    memcpy(got.slab_id, set.slab_id, sizeof got.slab_id);
    sets_check_same(&set, &got);
    descriptors_close(&got);
    return who;
}

static int threads(void)
{
    char text[1024];
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC), count = -1;
    ssize_t size = read(fd, text, sizeof text - 1);
    CHECK(size > 0);
    text[size] = 0;
    close(fd);
    const char *field = strrchr(text, ')'); /* the end of the second; the twentieth is wanted */
    for (int i = 2; field && i < 20; i++)
        field = strchr(field + 1, ' ');
    CHECK(field && sscanf(field, "%d", &count) == 1);
    return count;
}

/* Descriptors of that kind that this process has open; of pipes those in non-blocking mode, which no test has. */
static int open_of(const char *kind)
{
    char path[64], what[128];
    int count = 0;
    for (int fd = 0; fd < 100; fd++) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t size = readlink(path, what, sizeof what - 1);
        what[size < 0 ? 0 : size] = 0;
        bool blocks = !strncmp(what, "pipe:", 5) && !(fcntl(fd, F_GETFL) & O_NONBLOCK);
        count += !strncmp(what, kind, strlen(kind)) && !blocks;
    }
    return count;
}

static int open_of_a_door(void) { return open_of("anon_inode:[eventpoll]") + open_of("pipe:"); }

static pid_t raw_fork(void) { return (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL); }

/* A child that ends, by a signal, when it hangs. */
static pid_t child_by(pid_t (*make)(void))
{
    fflush(stdout);
    pid_t child = make();
    CHECK(child >= 0);
    if (!child)
        alarm(STUCK_AFTER_S);
    return child;
}

/* A process that does nothing but answer, with `who` in the id; it has opened when this returns. */
static pid_t member(int who, int room)
{
    int told[2];
    char byte;
    CHECK(pipe(told) == 0);
    pid_t child = child_by(fork);
    if (!child) {
        set.slab_id[0] = (uint8_t)who;
        open_door();
        if (room >= 0)
            sets_leave_room(room);
        CHECK(write(told[1], "o", 1) == 1);
        for (;;)
            pause();
    }
    close(told[1]);
    CHECK(read(told[0], &byte, 1) == 1);
    close(told[0]);
    return child;
}

static void end_member(pid_t child)
{
    CHECK(kill(child, SIGKILL) == 0);
    CHECK_EQ(waitpid(child, NULL, 0), child);
}

static void stop_member(pid_t child)
{
    int status;
    CHECK(kill(child, SIGSTOP) == 0);
    CHECK_EQ(waitpid(child, &status, WUNTRACED), child);
    CHECK(WIFSTOPPED(status));
}

static void await_message(int fd)
{
    struct pollfd one = {.fd = fd, .events = POLLIN};
    CHECK_EQ(poll(&one, 1, SETS_LONG_NS / 1000000), 1);
}

/* Whose answer begins; the rest of it is not looked at. */
static int begun_by(int fd)
{
    struct {
        uint64_t magic;
        uint8_t slab_id[16];
    } head;
    await_message(fd);
    CHECK_EQ(recv(fd, &head, sizeof head, MSG_PEEK), sizeof head);
    return head.slab_id[0];
}

/* Read on, without the descriptors, until the member's end is closed: before the set was whole. */
static void ends_early(int fd)
{
    char head[64];
    int messages = 0;
    for (;; messages++) {
        await_message(fd);
        ssize_t size = recv(fd, head, sizeof head, 0);
        if (size <= 0) {
            CHECK(size == 0 || errno == ECONNRESET);
            break;
        }
    }
    CHECK(messages < (int)set.count / 250);
    close(fd);
}

/* More messages than the kernel's buffer takes: one who does not read holds the sender up. False: not allowed here. */
static bool begin_endless(void)
{
    bool allowed = sets_make_room() > 10 * SHM_MAX_SLOTS;
    if (allowed)
        begin_with(SHM_MAX_SLOTS);
    else
        printf("  not done: this user may not have so many descriptors under way\n");
    return allowed;
}

/* ---- answers ---- */

static void one_member_answers(void)
{
    int before = sets_open_descriptors();
    begin();
    open_door();
    for (int i = 0; i < 50; i++)
        CHECK_EQ(answered(ask()), set.slab_id[0]);
    rendezvous_close(door);
    CHECK(!rendezvous_is_open(door));
    int late = ask();
    CHECK_EQ(descriptors_receive(late, &got, SHORT_NS), ETIMEDOUT);
    open_door(); /* who came while it was closed is answered now */
    answered(late);
    end();
    CHECK_EQ(sets_open_descriptors(), before);
}

static void many_at_once(void)
{
    enum { COUNT = 200 };
    int newcomers[COUNT];
    begin();
    open_door();
    for (int i = 0; i < COUNT; i++)
        newcomers[i] = ask();
    for (int i = COUNT - 1; i >= 0; i--)
        answered(newcomers[i]);
    end();
}

/* Opening and closing twice is once; a place given back is taken again. */
static void twice_is_once(void)
{
    int alone = threads(), before = sets_open_descriptors();
    begin();
    open_door();
    int of_a_door = open_of_a_door();
    CHECK(of_a_door >= 2);
    open_door();
    CHECK_EQ(threads(), alone + 1);
    CHECK_EQ(open_of_a_door(), of_a_door);
    answered(ask());
    rendezvous_close(door);
    rendezvous_close(door);
    CHECK_EQ(threads(), alone);
    struct rendezvous *first = door, *second = rendezvous_take();
    CHECK(second && second != first);
    open_door();
    rendezvous_give_back(first); /* closes */
    CHECK_EQ(threads(), alone);
    CHECK(rendezvous_take() == first);
    rendezvous_give_back(second);
    end();
    CHECK_EQ(sets_open_descriptors(), before);
}

/* Who goes before the answer, or says what nobody asked, spoils nothing for the next. */
static void newcomers_that_leave(void)
{
    begin();
    int before = sets_open_descriptors();
    open_door();
    for (int i = 0; i < 200; i++)
        close(ask());
    for (int i = 0; i < 10; i++) {
        int talker = ask();
        CHECK(send(talker, "unasked", 7, MSG_NOSIGNAL) == 7 || errno == EPIPE || errno == ECONNRESET);
        close(talker);
    }
    answered(ask());
    rendezvous_close(door);
    CHECK_EQ(sets_open_descriptors(), before);
    end();
}

static void handler_not_here(int number)
{
    (void)number;
    CHECK(!"a handler of the program ran on the thread");
}

/* The thread takes no signals, whatever the mask of the one who opened. */
static void no_handler_on_the_thread(void)
{
    sigset_t user, pending;
    sigemptyset(&user);
    sigaddset(&user, SIGUSR1);
    begin();
    CHECK(signal(SIGUSR1, handler_not_here) != SIG_ERR);
    open_door();
    CHECK(pthread_sigmask(SIG_BLOCK, &user, NULL) == 0);
    CHECK(kill(getpid(), SIGUSR1) == 0);
    answered(ask());
    CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1));
    CHECK(signal(SIGUSR1, SIG_IGN) != SIG_ERR); /* drops it */
    CHECK(pthread_sigmask(SIG_UNBLOCK, &user, NULL) == 0);
    end();
}

static void what_cannot_be_opened(void)
{
    begin();
    int before = sets_open_descriptors(), alone = threads();
    for (int room = 0; room <= 1; room++) {
        sets_leave_room(room);
        CHECK_EQ(rendezvous_open(door, &set, NULL), EMFILE);
        sets_make_room();
        CHECK(!rendezvous_is_open(door));
        CHECK_EQ(sets_open_descriptors(), before);
    }
    struct descriptors file = set;
    file.listener = set.slab;
    CHECK_EQ(rendezvous_open(door, &file, NULL), EPERM); /* a file is nothing to wait for */
    CHECK(!rendezvous_is_open(door));
    CHECK_EQ(sets_open_descriptors(), before);
    CHECK_EQ(threads(), alone);
    open_door(); /* it is as good as before */
    answered(ask());
    end();
}

/* ---- several members ---- */

/* As many newcomers that read nothing as there are members: each holds one member up. (For a second; a member that was
 * let go by the clock may get two: then once more.) */
static void members_share_the_work(void)
{
    enum { MEMBERS = 3 };
    pid_t members[MEMBERS];
    if (!begin_endless())
        return;
    for (int i = 0; i < MEMBERS; i++)
        members[i] = member(i + 1, -1);
    bool all = false;
    for (int round = 0; round < 20 && !all; round++) {
        int newcomers[MEMBERS], seen = 0;
        for (int i = 0; i < MEMBERS; i++) {
            newcomers[i] = ask();
            seen |= 1 << begun_by(newcomers[i]);
        }
        all = seen == 2 + 4 + 8;
        for (int i = 0; i < MEMBERS; i++)
            close(newcomers[i]);
    }
    CHECK(all);
    for (int i = 0; i < MEMBERS; i++)
        end_member(members[i]);
    end();
}

static void stopped_member_swallows_nobody(void)
{
    begin();
    pid_t first = member(1, -1), second = member(2, -1), third = member(3, -1);
    stop_member(first);
    for (int i = 0; i < 20; i++)
        CHECK(answered(ask()) != 1);
    stop_member(third);
    for (int i = 0; i < 20; i++)
        CHECK_EQ(answered(ask()), 2);
    CHECK(kill(first, SIGCONT) == 0);
    end_member(second);
    for (int i = 0; i < 20; i++)
        CHECK_EQ(answered(ask()), 1);
    end_member(first);
    end_member(third);
    end();
}

/* A member that is stopped in the middle of an answer holds up this newcomer alone; when it dies, that one knows. */
static void stopped_in_the_middle(void)
{
    if (!begin_endless())
        return;
    pid_t first = member(1, -1);
    int held_up = ask();
    await_message(held_up);
    stop_member(first);
    pid_t second = member(2, -1);
    for (int i = 0; i < 3; i++) {
        int newcomer = ask();
        CHECK_EQ(begun_by(newcomer), 2);
        close(newcomer);
    }
    end_member(first);
    ends_early(held_up);
    held_up = ask();
    CHECK_EQ(begun_by(held_up), 2);
    close(held_up);
    end_member(second);
    end();
}

/* A member with no descriptor left to accept with does not keep others from answering. */
static void member_without_room(void)
{
    begin();
    pid_t full = member(1, 0), other = member(2, -1);
    for (int i = 0; i < 20; i++)
        answered(ask());
    end_member(full);
    end_member(other);
    end();
}

/* When it gets room again, it answers who came meanwhile. */
static void room_comes_back(void)
{
    begin();
    open_door();
    int newcomer = ask();
    answered(newcomer);
    int waiting = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    sets_leave_room(0);
    CHECK(waiting >= 0 && connect(waiting, (struct sockaddr *)&address, address_size) == 0);
    CHECK(descriptors_receive(waiting, &got, SHORT_NS) != 0); /* nor could this process receive any */
    sets_make_room();
    answered(ask());
    close(waiting);
    sets_leave_room(0);
    rendezvous_close(door); /* it does not hang there either */
    sets_make_room();
    end();
}

/* Another user's process gets nothing but the end. */
static void another_user_is_refused(void)
{
    if (geteuid()) {
        printf("  not done: only root can become another user\n");
        return;
    }
    begin();
    pid_t child = child_by(fork);
    if (!child) {
        CHECK(seteuid(65534) == 0);
        int before = sets_open_descriptors(), fd = ask();
        await_message(fd);
        CHECK_EQ(descriptors_receive(fd, &got, SETS_LONG_NS), ECONNRESET);
        fd = (close(fd), ask());
        char byte;
        await_message(fd);
        CHECK_EQ(recv(fd, &byte, 1, 0), 0); /* not one message */
        close(fd);
        CHECK_EQ(sets_open_descriptors(), before);
        CHECK(seteuid(0) == 0);
        _exit(0);
    }
    open_door();
    sets_expect_exit(child);
    answered(ask());
    end();
}

/* ---- closing ---- */

static void opened_and_closed_often(void)
{
    int alone = threads();
    begin();
    int before = sets_open_descriptors();
    for (int i = 0; i < 500; i++) {
        open_door();
        if (i % 10 == 0)
            answered(ask());
        rendezvous_close(door);
        CHECK_EQ(threads(), alone);
    }
    CHECK_EQ(sets_open_descriptors(), before);
    end();
}

/* Closing does not wait for newcomers that do not read, however many stand there. */
static void closed_while_nobody_reads(void)
{
    enum { COUNT = STUCK_AFTER_S + 10 };
    int newcomers[COUNT];
    if (!begin_endless())
        return;
    open_door();
    for (int i = 0; i < COUNT; i++)
        newcomers[i] = ask();
    await_message(newcomers[0]);
    alarm(STUCK_AFTER_S);
    rendezvous_close(door);
    alarm(0);
    for (int i = 0; i < COUNT; i++)
        close(newcomers[i]);
    end();
}

/* Nor does it answer all who stand there first. (Now and then it may have, before it was told: then once more.) */
static void closed_before_the_queue_is_empty(void)
{
    enum { COUNT = 500 };
    int newcomers[COUNT], left = 0;
    begin();
    for (int round = 0; round < 50 && !left; round++) {
        for (int i = 0; i < COUNT; i++)
            newcomers[i] = ask();
        open_door();
        rendezvous_close(door);
        for (int i = 0; i < COUNT; i++) {
            struct pollfd one = {.fd = newcomers[i], .events = POLLIN};
            left += poll(&one, 1, 0) == 0;
            close(newcomers[i]);
        }
    }
    CHECK(left > 0);
    end();
}

static atomic_bool enough;

static void *ask_and_leave(void *arg)
{
    (void)arg;
    while (!atomic_load(&enough)) {
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        (void)!connect(fd, (struct sockaddr *)&address, address_size); /* EAGAIN: the queue is full */
        close(fd);
    }
    return NULL;
}

/* Nor for newcomers that never end. */
static void closed_under_a_flood(void)
{
    enum { FLOOD = 4 };
    pthread_t flood[FLOOD];
    begin();
    open_door();
    atomic_store(&enough, false);
    for (int i = 0; i < FLOOD; i++)
        CHECK(pthread_create(&flood[i], NULL, ask_and_leave, NULL) == 0);
    alarm(STUCK_AFTER_S);
    for (int i = 0; i < 20; i++) {
        rendezvous_close(door);
        open_door();
    }
    alarm(0);
    atomic_store(&enough, true);
    for (int i = 0; i < FLOOD; i++)
        pthread_join(flood[i], NULL);
    end();
}

static void *open_and_close(void *arg)
{
    (void)arg;
    while (!atomic_load(&enough)) {
        CHECK_EQ(rendezvous_open(door, &set, NULL), 0); /* and closed again, maybe, by another thread */
        rendezvous_close(door);
    }
    return NULL;
}

/* Threads open and close one door while others fork. */
static void threads_open_close_and_fork(void)
{
    enum { THREADS = 2 };
    pthread_t busy[THREADS];
    int alone = threads();
    begin();
    int before = sets_open_descriptors();
    atomic_store(&enough, false);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&busy[i], NULL, open_and_close, NULL) == 0);
    for (int i = 0; i < 200; i++) {
        pid_t child = child_by(fork);
        if (!child)
            _exit(rendezvous_is_open(door) || open_of_a_door() != 0);
        sets_expect_exit(child);
    }
    atomic_store(&enough, true);
    for (int i = 0; i < THREADS; i++)
        pthread_join(busy[i], NULL);
    CHECK_EQ(threads(), alone);
    CHECK_EQ(sets_open_descriptors(), before);
    open_door();
    answered(ask());
    end();
}

/* ---- forks ---- */

/* At the moment fork() returns the thread is gone, on both sides, and so are its descriptors. */
static void gone_when_fork_returns(void)
{
    int alone = threads();
    begin();
    int before = sets_open_descriptors();
    for (int i = 0; i < 1000; i++) {
        open_door();
        pid_t child = child_by(fork);
        if (!child)
            _exit(threads() != alone || rendezvous_is_open(door) || sets_open_descriptors() != before);
        CHECK_EQ(threads(), alone);
        CHECK(!rendezvous_is_open(door));
        CHECK_EQ(sets_open_descriptors(), before);
        sets_expect_exit(child);
    }
    end();
}

/* The thread of the only door, once it has named itself. */
static pid_t answering_thread(void)
{
    pid_t found = 0;
    while (!found) {
        DIR *listing = opendir("/proc/self/task");
        CHECK(listing);
        for (struct dirent *entry; !found && (entry = readdir(listing));) {
            char path[300], name[32] = "";
            snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd >= 0 && read(fd, name, sizeof name - 1) > 0 && !strcmp(name, "shmpool-answers\n"))
                found = atoi(entry->d_name);
            if (fd >= 0)
                close(fd);
        }
        closedir(listing);
    }
    return found;
}

/* Also for who looks at once: joined, a thread is in the kernel's list for some microseconds more. */
static void gone_when_closed(void)
{
    begin();
    for (int i = 0; i < 3000; i++) {
        open_door();
        pid_t thread = answering_thread();
        rendezvous_close(door);
        CHECK(syscall(SYS_tgkill, getpid(), thread, 0) < 0 && errno == ESRCH);
    }
    end();
}

/* Each side opens again when it wants to, and each answers alone. */
static void both_sides_open_again(pid_t (*make)(void))
{
    int told[2], hold[2], alone = threads();
    char byte;
    CHECK(pipe(told) == 0 && pipe(hold) == 0);
    begin();
    open_door();
    int of_a_door = open_of_a_door();
    pid_t child = child_by(make);
    if (!child) {
        set.slab_id[0] = 1;
        open_door();
        CHECK_EQ(open_of_a_door(), of_a_door); /* its own, and not its parent's */
        CHECK(write(told[1], "o", 1) == 1);
        CHECK(read(hold[0], &byte, 1) == 1);
        rendezvous_close(door);
        CHECK_EQ(open_of_a_door(), 0);
        CHECK(write(told[1], "c", 1) == 1);
        CHECK(read(hold[0], &byte, 1) == 1);
        _exit(0);
    }
    close(told[1]);
    close(hold[0]);
    CHECK(read(told[0], &byte, 1) == 1);
    rendezvous_close(door);
    CHECK_EQ(threads(), alone);
    CHECK_EQ(answered(ask()), 1); /* the child alone */
    open_door();
    CHECK(write(hold[1], "c", 1) == 1 && read(told[0], &byte, 1) == 1);
    CHECK_EQ(answered(ask()), set.slab_id[0]); /* the parent alone */
    CHECK(write(hold[1], "e", 1) == 1);
    sets_expect_exit(child);
    close(told[0]);
    close(hold[1]);
    end();
    CHECK_EQ(threads(), alone);
}

static void both_sides_after_fork(void) { both_sides_open_again(fork); }
static void both_sides_after_raw_clone(void)
{
    if (!sets_skip_raw_clone())
        both_sides_open_again(raw_fork);
}

/* A child by the bare system call has the descriptors and not the thread: it closes the ones and does nothing to the
 * other, which is its parent's. */
static void raw_child_closes(void)
{
    if (sets_skip_raw_clone())
        return;
    begin();
    int before = sets_open_descriptors(), alone = threads();
    open_door();
    pid_t child = child_by(raw_fork);
    if (!child) {
        CHECK(open_of_a_door() >= 2);
        rendezvous_close(door);
        CHECK_EQ(sets_open_descriptors(), before);
        open_door();
        pid_t grandchild = child_by(fork); /* the handlers of libc work there too */
        if (!grandchild)
            _exit(rendezvous_is_open(door) || open_of_a_door() != 0 || threads() != 1);
        sets_expect_exit(grandchild);
        _exit(rendezvous_is_open(door) || open_of_a_door() != 0);
    }
    sets_expect_exit(child);
    CHECK(rendezvous_is_open(door));
    CHECK_EQ(threads(), alone + 1);
    answered(ask());
    end();
}

/* A fork ends the threads of all pools of the process. */
static void every_door_is_closed(void)
{
    int alone = threads();
    begin();
    struct rendezvous *doors[3] = {door, rendezvous_take(), rendezvous_take()};
    for (int i = 0; i < 3; i++)
        CHECK_EQ(rendezvous_open(doors[i], &set, NULL), 0);
    CHECK_EQ(threads(), alone + 3);
    pid_t child = child_by(fork);
    if (!child)
        _exit(open_of_a_door() != 0);
    CHECK_EQ(threads(), alone);
    sets_expect_exit(child);
    rendezvous_give_back(doors[1]);
    rendezvous_give_back(doors[2]);
    end();
}

/* A fork does not wait for newcomers either. */
static void forked_while_nobody_reads(void)
{
    if (!begin_endless())
        return;
    open_door();
    int newcomer = ask();
    await_message(newcomer);
    pid_t child = child_by(fork);
    if (!child)
        _exit(rendezvous_is_open(door));
    sets_expect_exit(child);
    ends_early(newcomer); /* it asks again */
    end();
}

int main(void)
{
    sets_make_room();
    RUN(one_member_answers);
    RUN(many_at_once);
    RUN(twice_is_once);
    RUN(newcomers_that_leave);
    RUN(no_handler_on_the_thread);
    RUN(what_cannot_be_opened);
    RUN(room_comes_back);
    RUN(another_user_is_refused);
    RUN(opened_and_closed_often);
    RUN(gone_when_fork_returns);
    RUN(gone_when_closed);
    RUN(both_sides_after_fork);
    RUN(both_sides_after_raw_clone);
    RUN(raw_child_closes);
    RUN(every_door_is_closed);
    RUN(threads_open_close_and_fork);
    RUN(stopped_member_swallows_nobody);
    RUN(stopped_in_the_middle);
    RUN(members_share_the_work);
    RUN(closed_while_nobody_reads);
    RUN(forked_while_nobody_reads);
    RUN(closed_before_the_queue_is_empty);
    RUN(closed_under_a_flood);
    RUN(member_without_room);
}
