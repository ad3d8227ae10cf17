/* mailbox.c: letters with descriptors; see mailbox.h. Findings 8 of the descriptor-passing experiments bind it: a large control
 * buffer (a small one has room for a surplus descriptor and sets no flag), MSG_CMSG_CLOEXEC always.
 */
#include "mailbox.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define LETTER_MAGIC UINT64_C(0x726574746c6d6873) /* "shmlettr" */
enum { MANY_DESCRIPTORS = 64 };

_Static_assert(sizeof(struct letter_head) == 40, "head");
_Static_assert(offsetof(struct letter, note) == sizeof(struct letter_head), "the note follows the head");

int mailbox_new(void)
{
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    socklen_t size = sizeof(sa_family_t); /* only the family: autobind to a free abstract name, unix(7) */
    if (bind(fd, (struct sockaddr *)&address, size) == 0) {
        size = sizeof address;
        if (getsockname(fd, (struct sockaddr *)&address, &size) == 0 && connect(fd, (struct sockaddr *)&address, size) == 0)
            return fd;
    }
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

int mailbox_deposit(int mailbox, const uint8_t slab_id[16], uint32_t slot, uint64_t connection, int fd, const void *note,
                    size_t note_size)
{
    assert(note_size <= MAILBOX_NOTE_MAX);
    struct letter_head head = {.magic = LETTER_MAGIC, .connection = connection, .slot = slot, .note_size = (uint32_t)note_size};
    memcpy(head.slab_id, slab_id, sizeof head.slab_id);
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)(uintptr_t)note, note_size}};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = note_size ? 2 : 1, .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    ssize_t sent;
    do
        sent = sendmsg(mailbox, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? errno : 0;
}

/* Receive one letter. Returns its size or -1; the descriptors in it go to `fds`, their number to *count; *cut: there were more. */
static ssize_t receive(int mailbox, int flags, struct letter *letter, int *fds, int *count, bool *cut)
{
    struct iovec part = {letter, sizeof *letter};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * MANY_DESCRIPTORS)];
    } control;
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    ssize_t size;
    do
        size = recvmsg(mailbox, &message, flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (size < 0 && errno == EINTR);
    *count = 0;
    *cut = size >= 0 && (message.msg_flags & MSG_CTRUNC);
    if (size < 0)
        return -1;
    for (struct cmsghdr *part_of = CMSG_FIRSTHDR(&message); part_of; part_of = CMSG_NXTHDR(&message, part_of)) {
        if (part_of->cmsg_level != SOL_SOCKET || part_of->cmsg_type != SCM_RIGHTS)
            continue;
        int inside = (int)((part_of->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (int i = 0; i < inside && *count < MANY_DESCRIPTORS; i++)
            memcpy(&fds[(*count)++], CMSG_DATA(part_of) + sizeof(int) * (size_t)i, sizeof(int));
    }
    return size;
}

static bool fits(const struct letter *letter, ssize_t size, const uint8_t slab_id[16], uint32_t slot, uint64_t connection)
{
    return size >= (ssize_t)sizeof letter->head && letter->head.magic == LETTER_MAGIC &&
           memcmp(letter->head.slab_id, slab_id, 16) == 0 && letter->head.slot == slot &&
           letter->head.connection == connection && letter->head.note_size <= MAILBOX_NOTE_MAX &&
           (size_t)size == sizeof letter->head + letter->head.note_size;
}

int mailbox_peek(int mailbox, const uint8_t slab_id[16], uint32_t slot, uint64_t connection, struct letter *letter)
{
    int fds[MANY_DESCRIPTORS], count;
    bool cut;
    ssize_t size = receive(mailbox, MSG_PEEK, letter, fds, &count, &cut);
    bool good = size >= 0 && fits(letter, size, slab_id, slot, connection);
    if (good && count == 1)
        return fds[0];
    for (int i = 0; i < count; i++)
        close(fds[i]);
    return good && count == 0 && cut ? MAILBOX_NO_ROOM : MAILBOX_NONE;
}

void mailbox_drain(int mailbox)
{
    int fds[MANY_DESCRIPTORS], count;
    bool cut;
    struct letter letter;
    while (receive(mailbox, 0, &letter, fds, &count, &cut) >= 0)
        for (int i = 0; i < count; i++)
            close(fds[i]);
}
