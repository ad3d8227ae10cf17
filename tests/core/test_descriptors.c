/* test_descriptors.c: sets arrive whole and in order, or not at all; what else comes is refused, and nothing leaks. */
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/time.h>

#include "sets.h"
#include "slab.h"

enum { SHORT_NS = 20000000 };
#define STOPPED_WITHIN_NS UINT64_C(10000000000)
enum { MESSAGE = 250 /* mailboxes in one */, MANY = 253 /* the kernel lets no more go at once */ };

static int here = -1, there = -1; /* the sender's end, the receiver's */
static struct descriptors got;

static void begin(void)
{
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    here = ends[0];
    there = ends[1];
}

static void end(void)
{
    close(here);
    close(there);
}

/* As little of a buffer as there is: a few messages. */
static void begin_narrow(void)
{
    int least = 1;
    begin();
    CHECK(setsockopt(here, SOL_SOCKET, SO_SNDBUF, &least, sizeof least) == 0);
}

static void check_nothing_received(void)
{
    CHECK(got.slab == -1 && got.listener == -1 && got.count == 0 && !got.mailboxes);
}

/* ---- sets that arrive ---- */

static void sets_of_every_size(void)
{
    static const uint32_t sizes[] = {1, 2, 249, 250, 251, 500, 1000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int listens = 0; listens <= 1; listens++) {
            int before = sets_open_descriptors();
            struct descriptors set = sets_new(sizes[i], sizes[i], listens);
            begin();
            int with_set = sets_open_descriptors();
            CHECK_EQ(descriptors_send(here, &set, -1, SETS_LONG_NS), 0);
            CHECK_EQ(sets_open_descriptors(), with_set);
            CHECK_EQ(descriptors_receive(there, &got, SETS_LONG_NS), 0);
            sets_check_same(&set, &got);
            CHECK_EQ(sets_open_descriptors(), with_set + 1 + listens + (int)sizes[i]);
            descriptors_close(&got);
            check_nothing_received();
            descriptors_close(&got); /* twice is once */
            CHECK_EQ(sets_open_descriptors(), with_set);
            end();
            descriptors_close(&set);
            CHECK_EQ(sets_open_descriptors(), before);
        }
}

/* Two sets over one socket stay apart. */
static void one_after_the_other(void)
{
    struct descriptors one = sets_new(251, 251, true), two = sets_new(3, 3, false);
    begin();
    CHECK_EQ(descriptors_send(here, &one, -1, SETS_LONG_NS), 0);
    CHECK_EQ(descriptors_send(here, &two, -1, SETS_LONG_NS), 0);
    close(here);
    CHECK_EQ(descriptors_receive(there, &got, SETS_LONG_NS), 0);
    sets_check_same(&one, &got);
    descriptors_close(&got);
    CHECK_EQ(descriptors_receive(there, &got, SETS_LONG_NS), 0);
    sets_check_same(&two, &got);
    descriptors_close(&got);
    CHECK_EQ(descriptors_receive(there, &got, SETS_LONG_NS), ECONNRESET);
    here = -1;
    end();
    descriptors_close(&one);
    descriptors_close(&two);
}

/* More than fits into the buffer goes while the other side reads. */
struct sending {
    const struct descriptors *set;
    int stop;
};
static void *send_it(void *arg)
{
    struct sending *sending = arg;
    return (void *)(intptr_t)descriptors_send(here, sending->set, sending->stop, STOPPED_WITHIN_NS);
}

static void sent_while_it_is_read(void)
{
    enum { COUNT = 20 * MESSAGE, FILES = 7 };
    struct descriptors set = sets_new(COUNT, FILES, true);
    struct sending sending = {&set, -1};
    pthread_t thread;
    void *error;
    begin_narrow();
    CHECK(pthread_create(&thread, NULL, send_it, &sending) == 0);
    CHECK_EQ(descriptors_receive(there, &got, SETS_LONG_NS), 0);
    pthread_join(thread, &error);
    CHECK_EQ((intptr_t)error, 0);
    sets_check_same(&set, &got);
    descriptors_close(&got);
    end();
    sets_free(&set, FILES);
}

/* ---- messages put together by hand ---- */

struct head {
    uint64_t magic;
    uint8_t slab_id[16];
    uint32_t total, first, count, listens;
};

/* What the real messages of a set consist of: theirs are the first `messages` of these. */
enum { TOTAL = 2 * MESSAGE + 1, MESSAGES = 4 };
static struct head genuine[MESSAGES];
static struct descriptors source;

static void learn(void)
{
    source = sets_new(TOTAL, TOTAL, false);
    begin();
    CHECK_EQ(descriptors_send(here, &source, -1, SETS_LONG_NS), 0);
    for (int i = 0; i < MESSAGES; i++)
        CHECK_EQ(recv(there, &genuine[i], sizeof genuine[i], MSG_TRUNC), sizeof genuine[i]);
    CHECK(recv(there, &genuine, sizeof genuine, 0) < 0 && errno == EAGAIN);
    end();
}

static void put(const void *bytes, size_t size, const int *fds, size_t count)
{
    struct iovec part = {(void *)(uintptr_t)bytes, size};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * MANY)];
    } control = {0};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        *rights = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        rights->cmsg_len = CMSG_LEN(sizeof(int) * count);
        memcpy(CMSG_DATA(rights), fds, sizeof(int) * count);
    }
    CHECK_EQ(sendmsg(here, &message, 0), size);
}

static void put_genuine(int index)
{
    const struct head *head = &genuine[index];
    if (index == 0)
        put(head, sizeof *head, &source.slab, 1);
    else
        put(head, sizeof *head, source.mailboxes + head->first, head->count);
}

/* What comes of the messages put since begin(); the socket is closed behind them. */
static int received(int before)
{
    close(here);
    here = -1;
    int error = descriptors_receive(there, &got, SETS_LONG_NS);
    end();
    if (error) {
        check_nothing_received();
        CHECK_EQ(sets_open_descriptors(), before);
    }
    return error;
}

/* Messages in that order; -1 ends it. */
static int received_in_order(const int *order)
{
    int before = sets_open_descriptors();
    begin();
    for (; *order >= 0; order++)
        put_genuine(*order);
    return received(before);
}
#define RECEIVED(...) received_in_order((const int[]){__VA_ARGS__, -1})

/* All messages, `index` with these bytes and so many descriptors. */
static int received_with(int index, const void *bytes, size_t size, size_t count)
{
    int fds[MANY], before = sets_open_descriptors();
    for (int i = 0; i < MANY; i++)
        fds[i] = index == 0 ? source.slab : source.mailboxes[(genuine[index].first + (uint32_t)i) % TOTAL];
    begin();
    for (int i = 0; i < MESSAGES; i++)
        if (i == index)
            put(bytes, size, fds, count);
        else
            put_genuine(i);
    return received(before);
}

static void sender_leaves_after_each_message(void)
{
    CHECK_EQ(RECEIVED(0, 1, 2, 3), 0); /* the copies by hand are right ... */
    sets_check_same(&source, &got);
    descriptors_close(&got);
    CHECK_EQ(RECEIVED(0, 1, 2), ECONNRESET); /* ... and the set is whole or nothing */
    CHECK_EQ(RECEIVED(0, 1), ECONNRESET);
    CHECK_EQ(RECEIVED(0), ECONNRESET);
    int before = sets_open_descriptors();
    begin();
    CHECK_EQ(received(before), ECONNRESET); /* without a word */
}

/* A sender that stops in the middle is not waited for longer than asked. */
static void sender_falls_silent(void)
{
    int before = sets_open_descriptors();
    for (int messages = 0; messages < MESSAGES; messages++) {
        begin();
        for (int i = 0; i < messages; i++)
            put_genuine(i);
        CHECK_EQ(descriptors_receive(there, &got, SHORT_NS), ETIMEDOUT);
        check_nothing_received();
        end();
        CHECK_EQ(sets_open_descriptors(), before);
    }
}

static void wrong_order(void)
{
    CHECK_EQ(RECEIVED(1), EPROTO);
    CHECK_EQ(RECEIVED(3, 0, 1, 2), EPROTO);
    CHECK_EQ(RECEIVED(0, 0, 1, 2, 3), EPROTO);
    CHECK_EQ(RECEIVED(0, 2, 1, 3), EPROTO);
    CHECK_EQ(RECEIVED(0, 1, 1, 2, 3), EPROTO);
    CHECK_EQ(RECEIVED(0, 1, 3), EPROTO);
    CHECK_EQ(RECEIVED(0, 1, 2, 2), EPROTO);
}

/* Each field of each head, changed alone. */
static void wrong_heads(void)
{
    static const size_t counts[MESSAGES] = {1, MESSAGE, MESSAGE, 1};
    for (int i = 0; i < MESSAGES; i++) {
        struct head head = genuine[i];
        head.magic++;
        CHECK_EQ(received_with(i, &head, sizeof head, counts[i]), EPROTO);
        head = genuine[i];
        head.slab_id[15] ^= 1; /* of another slab */
        CHECK_EQ(received_with(i, &head, sizeof head, counts[i]), EPROTO);
        const uint32_t totals[] = {0, 1, MESSAGE, TOTAL - 1, TOTAL + 1, SHM_MAX_SLOTS + 1, UINT32_MAX};
        for (size_t k = 0; k < sizeof totals / sizeof *totals; k++) {
            head = genuine[i];
            head.total = totals[k];
            CHECK_EQ(received_with(i, &head, sizeof head, counts[i]), EPROTO);
        }
        const uint32_t firsts[] = {genuine[i].first + 1, genuine[i].first - 1, UINT32_MAX - MESSAGE + 1};
        for (size_t k = 0; k < sizeof firsts / sizeof *firsts; k++) {
            head = genuine[i];
            head.first = firsts[k];
            CHECK_EQ(received_with(i, &head, sizeof head, counts[i]), EPROTO);
        }
        head = genuine[i];
        head.count++;
        CHECK_EQ(received_with(i, &head, sizeof head, counts[i]), EPROTO);
        head.count -= 2;
        CHECK_EQ(received_with(i, &head, sizeof head, counts[i]), EPROTO);
    }
    struct head head = genuine[0];
    for (head.listens = 1; head.listens; head.listens *= 2) /* a listener that is not there */
        CHECK_EQ(received_with(0, &head, sizeof head, 1), EPROTO);
    head.listens = 2; /* it is there, and there is one too many */
    CHECK_EQ(received_with(0, &head, sizeof head, 3), EPROTO);
}

static void surplus_and_missing_descriptors(void)
{
    for (int i = 0; i < MESSAGES; i++) {
        struct head head = genuine[i];
        size_t count = i == 0 ? 1 : head.count;
        CHECK_EQ(received_with(i, &head, sizeof head, count + 1), EPROTO);
        CHECK_EQ(received_with(i, &head, sizeof head, count - 1), EPROTO);
        CHECK_EQ(received_with(i, &head, sizeof head, 0), EPROTO);
        CHECK_EQ(received_with(i, &head, sizeof head, MANY), EPROTO);
        if (i > 0) { /* the head agrees, and yet there are more than the set has room for */
            head.count = MANY;
            CHECK_EQ(received_with(i, &head, sizeof head, MANY), EPROTO);
        }
    }
}

static void messages_of_other_sizes(void)
{
    struct {
        struct head head;
        char more[8];
    } longer = {.more = "surplus"};
    for (int i = 0; i < MESSAGES; i++) {
        size_t count = i == 0 ? 1 : genuine[i].count;
        longer.head = genuine[i];
        CHECK_EQ(received_with(i, &longer, sizeof longer.head - 1, count), EPROTO);
        CHECK_EQ(received_with(i, &longer, 1, count), EPROTO);
        CHECK_EQ(received_with(i, &longer, sizeof longer.head + 1, count), EPROTO);
        CHECK_EQ(received_with(i, &longer, sizeof longer, count), EPROTO);
        CHECK_EQ(received_with(i, "", 0, count), ECONNRESET); /* an empty message reads as the end */
    }
}

static void garbage(void)
{
    struct check_random random = check_seed(getenv("SHMPOOL_SEED"));
    uint64_t words[8];
    for (int round = 0; round < 200; round++) {
        for (size_t i = 0; i < sizeof words / sizeof *words; i++)
            words[i] = check_random(&random);
        if (round % 2) /* a head that begins well */
            words[0] = genuine[0].magic;
        int before = sets_open_descriptors();
        begin();
        put(words, 1 + check_random(&random) % sizeof words, source.mailboxes, check_random(&random) % 4);
        CHECK_EQ(received(before), EPROTO);
    }
}

/* ---- no room ---- */

static void no_room_for_descriptors(void)
{
    struct descriptors set = sets_new(300, 300, true);
    int before = sets_open_descriptors();
    static const int rooms[] = {0, 1, 2, 3, 100, 251, 252, 301};
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) {
        begin();
        CHECK_EQ(descriptors_send(here, &set, -1, SETS_LONG_NS), 0);
        sets_leave_room(rooms[i]);
        CHECK_EQ(descriptors_receive(there, &got, SETS_LONG_NS), EMFILE);
        sets_make_room();
        check_nothing_received();
        end();
        CHECK_EQ(sets_open_descriptors(), before);
    }
    begin();
    CHECK_EQ(descriptors_send(here, &set, -1, SETS_LONG_NS), 0);
    sets_leave_room(302); /* as many as it takes */
    CHECK_EQ(descriptors_receive(there, &got, SETS_LONG_NS), 0);
    sets_make_room();
    sets_check_same(&set, &got);
    descriptors_close(&got);
    end();
    descriptors_close(&set);
}

/* An ordinary user may not have more descriptors under way than open. */
static void too_many_under_way(void)
{
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        struct descriptors set = sets_new(10 * MESSAGE, 1, false);
        begin();
        CHECK(geteuid() || setuid(65534) == 0);
        sets_leave_room(10);
        CHECK_EQ(descriptors_send(here, &set, -1, SETS_LONG_NS), ETOOMANYREFS);
        _exit(0);
    }
    sets_expect_exit(child);
}

/* ---- the other side ---- */

static void nobody_reads(void)
{
    enum { COUNT = 20 * MESSAGE };
    struct descriptors wide = sets_new(COUNT, 1, false), small = sets_new(3, 3, false);
    int before = sets_open_descriptors();
    begin_narrow();
    CHECK_EQ(descriptors_send(here, &wide, -1, SHORT_NS), ETIMEDOUT);
    close(here);
    CHECK_EQ(descriptors_receive(there, &got, SETS_LONG_NS), ECONNRESET); /* what fitted came, and was not all */
    check_nothing_received();
    here = -1;
    end();
    begin_narrow();
    CHECK_EQ(descriptors_send(here, &wide, -1, 0), ETIMEDOUT); /* at once */
    end();
    begin();
    CHECK_EQ(descriptors_send(here, &small, -1, 0), 0); /* it fits, and waits for its reader */
    CHECK_EQ(descriptors_receive(there, &got, 0), 0);   /* it is there, and needs no time */
    sets_check_same(&small, &got);
    descriptors_close(&got);
    CHECK_EQ(descriptors_receive(there, &got, 0), ETIMEDOUT);
    end();
    CHECK_EQ(sets_open_descriptors(), before);
    sets_free(&wide, 1);
    sets_free(&small, 3);
}

static void stopped(void)
{
    enum { COUNT = 20 * MESSAGE };
    struct descriptors wide = sets_new(COUNT, 1, false), small = sets_new(3, 3, false);
    int stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct sending sending = {&wide, stop};
    pthread_t thread;
    void *error;
    begin_narrow(); /* stopped while it waits for the reader */
    CHECK(pthread_create(&thread, NULL, send_it, &sending) == 0);
    CHECK(eventfd_write(stop, 1) == 0);
    pthread_join(thread, &error);
    CHECK_EQ((intptr_t)error, ECANCELED);
    end();
    begin_narrow(); /* stopped before it began: it does not wait */
    CHECK_EQ(descriptors_send(here, &wide, stop, STOPPED_WITHIN_NS), ECANCELED);
    end();
    begin(); /* what fits goes whole */
    CHECK_EQ(descriptors_send(here, &small, stop, SETS_LONG_NS), 0);
    CHECK_EQ(descriptors_receive(there, &got, SETS_LONG_NS), 0);
    sets_check_same(&small, &got);
    descriptors_close(&got);
    end();
    close(stop);
    sets_free(&wide, 1);
    sets_free(&small, 3);
}

static void *read_one_and_leave(void *arg)
{
    struct head head;
    struct sending *sending = arg;
    while (recv(there, &head, sizeof head, 0) < 0)
        CHECK(errno == EAGAIN);
    CHECK_EQ(head.total, sending->set->count);
    close(there);
    return NULL;
}

/* SIGPIPE would end this process. */
static void receiver_leaves(void)
{
    enum { COUNT = 20 * MESSAGE };
    struct descriptors set = sets_new(COUNT, 1, false);
    struct sending sending = {&set, -1};
    pthread_t thread;
    CHECK(signal(SIGPIPE, SIG_DFL) != SIG_ERR);
    int before = sets_open_descriptors();
    begin();
    close(there);
    CHECK_EQ(descriptors_send(here, &set, -1, SETS_LONG_NS), EPIPE);
    there = -1;
    end();
    begin_narrow();
    CHECK(pthread_create(&thread, NULL, read_one_and_leave, &sending) == 0);
    int error = descriptors_send(here, &set, -1, SETS_LONG_NS); /* left with messages unread, it was reset first */
    CHECK(error == EPIPE || error == ECONNRESET);
    pthread_join(thread, NULL);
    there = -1;
    end();
    CHECK_EQ(sets_open_descriptors(), before);
    sets_free(&set, 1);
}

static void descriptors_that_are_none(void)
{
    struct descriptors set = sets_new(3, 3, false);
    int before = sets_open_descriptors(), mailbox = set.mailboxes[2];
    begin();
    CHECK_EQ(descriptors_send(-1, &set, -1, SETS_LONG_NS), EBADF);
    CHECK_EQ(descriptors_receive(-1, &got, SETS_LONG_NS), EBADF);
    check_nothing_received();
    set.mailboxes[2] = -1;
    CHECK_EQ(descriptors_send(here, &set, -1, SETS_LONG_NS), EBADF);
    set.mailboxes[2] = mailbox;
    end();
    CHECK_EQ(sets_open_descriptors(), before);
    descriptors_close(&set);
}

/* ---- signals ---- */

static void nothing(int number) { (void)number; }

/* Both sides wait on, however often a handler runs; and no longer than asked. */
static void interrupted(void)
{
    enum { COUNT = 20 * MESSAGE };
    struct descriptors set = sets_new(COUNT, 1, false);
    struct sigaction handler = {.sa_handler = nothing}; /* no SA_RESTART */
    struct itimerval often = {{0, 500}, {0, 500}}, never = {{0, 0}, {0, 0}};
    CHECK(sigaction(SIGALRM, &handler, NULL) == 0);
    begin_narrow();
    CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
    CHECK_EQ(descriptors_receive(there, &got, SHORT_NS), ETIMEDOUT);
    CHECK_EQ(descriptors_send(here, &set, -1, SHORT_NS), ETIMEDOUT);
    CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
    CHECK(signal(SIGALRM, SIG_DFL) != SIG_ERR);
    end();
    sets_free(&set, 1);
}

int main(void)
{
    sets_make_room();
    RUN(sets_of_every_size);
    RUN(one_after_the_other);
    RUN(sent_while_it_is_read);
    RUN(learn);
    RUN(sender_leaves_after_each_message);
    RUN(sender_falls_silent);
    RUN(wrong_order);
    RUN(wrong_heads);
    RUN(surplus_and_missing_descriptors);
    RUN(messages_of_other_sizes);
    RUN(garbage);
    descriptors_close(&source);
    RUN(no_room_for_descriptors);
    RUN(too_many_under_way);
    RUN(nobody_reads);
    RUN(stopped);
    RUN(receiver_leaves);
    RUN(descriptors_that_are_none);
    RUN(interrupted);
}
