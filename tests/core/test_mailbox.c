/* test_mailbox.c: letters reach everyone and stay; what does not fit is refused, and nothing leaks. */
#include <fcntl.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "play.h"
#include "sets.h"

static const uint8_t id[16] = "slab of a test..", other_id[16] = "another one.....";
static int mailbox, ends[2];
static struct letter letter;

static void begin(void)
{
    mailbox = mailbox_new();
    CHECK(mailbox >= 0 && (fcntl(mailbox, F_GETFD) & FD_CLOEXEC));
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
}

static void end(void)
{
    close(mailbox);
    close(ends[0]);
    close(ends[1]);
}

static bool same_file(int a, int b)
{
    struct stat left, right;
    CHECK(fstat(a, &left) == 0 && fstat(b, &right) == 0);
    return left.st_ino == right.st_ino && left.st_dev == right.st_dev;
}

static void peeked_again_and_again(void)
{
    begin();
    CHECK_EQ(mailbox_peek(mailbox, id, 3, 9, &letter), MAILBOX_NONE); /* empty */
    CHECK_EQ(mailbox_deposit(mailbox, id, 3, 9, ends[0], "hello", 5), 0);
    int before = sets_open_descriptors();
    for (int i = 0; i < 5; i++) {
        int fd = mailbox_peek(mailbox, id, 3, 9, &letter);
        CHECK(fd >= 0 && same_file(fd, ends[0]) && (fcntl(fd, F_GETFD) & FD_CLOEXEC));
        CHECK_EQ(letter.head.note_size, 5);
        CHECK(!memcmp(letter.note, "hello", 5));
        close(fd);
    }
    CHECK_EQ(sets_open_descriptors(), before);
    CHECK_EQ(mailbox_deposit(mailbox, id, 3, 9, ends[0], "again", 5), 0);
    mailbox_drain(mailbox); /* of all that is there */
    CHECK_EQ(mailbox_peek(mailbox, id, 3, 9, &letter), MAILBOX_NONE);
    mailbox_drain(mailbox); /* nothing there: nothing done */
    CHECK_EQ(sets_open_descriptors(), before);
    end();
}

/* The connection outlives every descriptor but the letter's; draining ends it. */
static void letter_keeps_it_alive(void)
{
    char byte;
    begin();
    CHECK_EQ(mailbox_deposit(mailbox, id, 0, 1, ends[0], NULL, 0), 0);
    close(ends[0]);
    CHECK(write(ends[1], "x", 1) == 1);
    int fd = mailbox_peek(mailbox, id, 0, 1, &letter);
    CHECK(fd >= 0 && read(fd, &byte, 1) == 1);
    close(fd);
    mailbox_drain(mailbox);
    CHECK_EQ(recv(ends[1], &byte, 1, MSG_DONTWAIT), 0);
    ends[0] = dup(ends[1]);
    end();
}

static void notes_of_every_size(void)
{
    uint8_t note[MAILBOX_NOTE_MAX];
    begin();
    for (size_t i = 0; i < sizeof note; i++)
        note[i] = (uint8_t)(i * 7);
    static const size_t sizes[] = {0, 1, 100, MAILBOX_NOTE_MAX - 1, MAILBOX_NOTE_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        CHECK_EQ(mailbox_deposit(mailbox, id, 1, 2, ends[0], note, sizes[i]), 0);
        int fd = mailbox_peek(mailbox, id, 1, 2, &letter);
        CHECK(fd >= 0);
        close(fd);
        CHECK_EQ(letter.head.note_size, sizes[i]);
        CHECK(!memcmp(letter.note, note, sizes[i]));
        mailbox_drain(mailbox);
    }
    end();
}

static void letters_of_others(void)
{
    begin();
    CHECK_EQ(mailbox_deposit(mailbox, id, 3, 9, ends[0], NULL, 0), 0);
    int before = sets_open_descriptors();
    CHECK_EQ(mailbox_peek(mailbox, other_id, 3, 9, &letter), MAILBOX_NONE);
    CHECK_EQ(mailbox_peek(mailbox, id, 4, 9, &letter), MAILBOX_NONE);
    CHECK_EQ(mailbox_peek(mailbox, id, 3, 10, &letter), MAILBOX_NONE);
    CHECK_EQ(mailbox_peek(mailbox, id, 3, 0, &letter), MAILBOX_NONE);
    CHECK_EQ(sets_open_descriptors(), before); /* the refused descriptor is closed each time */
    end();
}

/* A letter put together by hand. */
static void put(const void *bytes, size_t size, const int *fds, size_t count)
{
    struct iovec part = {(void *)(uintptr_t)bytes, size};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * 200)];
    } control = {0};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        *rights = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int) * count)};
        memcpy(CMSG_DATA(rights), fds, sizeof(int) * count);
    }
    CHECK_EQ(sendmsg(mailbox, &message, 0), size);
}

/* What a real letter for (id, 3, 9) consists of. */
static size_t genuine(struct letter *copy)
{
    CHECK_EQ(mailbox_deposit(mailbox, id, 3, 9, ends[0], "note", 4), 0);
    ssize_t size = recv(mailbox, copy, sizeof *copy, MSG_DONTWAIT);
    CHECK_EQ(size, sizeof copy->head + 4);
    return (size_t)size;
}

static void refused(const void *bytes, size_t size, const int *fds, size_t count)
{
    int before = sets_open_descriptors();
    put(bytes, size, fds, count);
    CHECK_EQ(mailbox_peek(mailbox, id, 3, 9, &letter), MAILBOX_NONE);
    CHECK_EQ(sets_open_descriptors(), before);
    mailbox_drain(mailbox);
    CHECK_EQ(sets_open_descriptors(), before);
}

static void letters_that_do_not_fit(void)
{
    struct letter copy, changed;
    int many[200];
    begin();
    size_t size = genuine(&copy);
    int before = sets_open_descriptors();
    put(&copy, size, ends, 1);
    int fd = mailbox_peek(mailbox, id, 3, 9, &letter); /* the copy by hand is right ... */
    CHECK(fd >= 0);
    close(fd);
    mailbox_drain(mailbox);
    refused(&copy, size, NULL, 0); /* ... without a descriptor it is not */
    refused(&copy, size, ends, 2); /* nor with two */
    for (int i = 0; i < 200; i++)
        many[i] = ends[0];
    refused(&copy, size, many, 64);
    refused(&copy, size, many, 200); /* more than fit into the buffer */
    refused(&copy, size - 1, ends, 1);
    refused(&copy, sizeof copy.head - 1, ends, 1);
    refused("", 0, ends, 1);
    refused("x", 1, ends, 1);
    refused(&copy, size + 1, ends, 1);
    changed = copy;
    changed.head.magic++;
    refused(&changed, size, ends, 1);
    changed = copy;
    changed.head.note_size = MAILBOX_NOTE_MAX + 1;
    refused(&changed, size, ends, 1);
    changed.head.note_size = UINT32_MAX;
    refused(&changed, size, ends, 1);
    CHECK_EQ(sets_open_descriptors(), before);
    end();
}

/* A process that was not given the mailbox cannot write to it, though its name is abstract and thus no secret. */
static void strangers_are_refused(void)
{
    struct sockaddr_un address;
    socklen_t size = sizeof address;
    begin();
    CHECK(getsockname(mailbox, (struct sockaddr *)&address, &size) == 0);
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        int stranger = socket(AF_UNIX, SOCK_DGRAM, 0);
        CHECK(sendto(stranger, "x", 1, 0, (struct sockaddr *)&address, size) < 0 && errno == EPERM);
        CHECK(connect(stranger, (struct sockaddr *)&address, size) < 0 && errno == EPERM);
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    CHECK_EQ(mailbox_peek(mailbox, id, 0, 0, &letter), MAILBOX_NONE);
    end();
}

/* The user's limit on descriptors in flight: the deposit says so. (Root has none.) */
static void deposits_that_fail(void)
{
    begin();
    CHECK_EQ(mailbox_deposit(-1, id, 0, 1, ends[0], NULL, 0), EBADF);
    CHECK_EQ(mailbox_deposit(mailbox, id, 0, 1, -1, NULL, 0), EBADF);
    /* a full mailbox (a letter stays when nobody drains): no blocking */
    int error = 0;
    for (int i = 0; i < 100000 && !error; i++)
        error = mailbox_deposit(mailbox, id, 0, 1, ends[0], NULL, 0);
    CHECK(error == EAGAIN || error == ETOOMANYREFS);
    mailbox_drain(mailbox);
    CHECK_EQ(mailbox_deposit(mailbox, id, 0, 1, ends[0], NULL, 0), 0);
    end();
}

/* A child without free descriptors finds no letter, and the letter stays for the others. */
static void no_descriptor_left(void)
{
    begin();
    CHECK_EQ(mailbox_deposit(mailbox, id, 0, 1, ends[0], NULL, 0), 0);
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        struct rlimit none = {0, 0};
        CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
        CHECK_EQ(mailbox_peek(mailbox, id, 0, 1, &letter), MAILBOX_NO_ROOM);
        CHECK_EQ(mailbox_peek(mailbox, id, 0, 2, &letter), MAILBOX_NONE);
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    int fd = mailbox_peek(mailbox, id, 0, 1, &letter);
    CHECK(fd >= 0);
    close(fd);
    end();
}

int main(void)
{
    RUN(peeked_again_and_again);
    RUN(letter_keeps_it_alive);
    RUN(notes_of_every_size);
    RUN(letters_of_others);
    RUN(letters_that_do_not_fit);
    RUN(strangers_are_refused);
    RUN(deposits_that_fail);
    RUN(no_descriptor_left);
}
