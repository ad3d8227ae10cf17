/* descriptors.c: see descriptors.h. */
#include "descriptors.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "slab.h"
#include "stats.h"

#define SET_MAGIC UINT64_C(0x7374657364706873) /* "shpdsets" */
enum { PER_MESSAGE = 250 /* the kernel allows 253 */, ROOM_PAUSE_NS = 2000000 };

struct set_head {
    uint64_t magic;
    uint8_t slab_id[16];
    uint32_t total, first, count, listens;
};
_Static_assert(sizeof(struct set_head) == 40, "head");

union rights_buffer {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(sizeof(int) * (PER_MESSAGE + 3))]; /* whatever the kernel can deliver at once */
};

/* Wait until `fd` is ready for `events`, or `stop` is readable; 0 or errno. */
static int await(int fd, short events, int stop, uint64_t deadline)
{
    struct pollfd both[2] = {{.fd = fd, .events = events}, {.fd = stop, .events = POLLIN}};
    for (;;) {
        uint64_t now = clock_now();
        if (now >= deadline)
            return ETIMEDOUT;
        uint64_t left_ms = (deadline - now) / 1000000 + 1;
        int count = poll(both, stop < 0 ? 1 : 2, left_ms > 1000 ? 1000 : (int)left_ms);
        if (count < 0 && errno != EINTR)
            return errno;
        if (count > 0 && stop >= 0 && both[1].revents)
            return ECANCELED;
        if (count > 0 && both[0].revents)
            return 0;
    }
}

/* Wait a little; 0: try again. At the deadline ETOOMANYREFS. */
static int await_room(int to, int stop, uint64_t deadline)
{
    uint64_t until = clock_now() + ROOM_PAUSE_NS;
    if (until >= deadline)
        return ETOOMANYREFS;
    int error = await(to, 0, stop, until);
    return error == ETIMEDOUT ? 0 : error;
}

static int send_one(int to, const struct set_head *head, const int *fds, uint32_t count, int stop, uint64_t deadline)
{
    union rights_buffer control;
    struct iovec part = {(void *)(uintptr_t)head, sizeof *head};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                             .msg_controllen = CMSG_SPACE(sizeof(int) * count)};
    assert(count > 0 && count <= PER_MESSAGE);
    memset(&control, 0, sizeof control);
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int) * count);
    memcpy(CMSG_DATA(rights), fds, sizeof(int) * count);
    for (;;) {
        if (sendmsg(to, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
            return 0;
        int error = errno;
        if (error == EAGAIN)
            error = await(to, POLLOUT, stop, deadline);
        else if (error == ETOOMANYREFS) /* of all pools of this user: the others' newcomers read theirs in a moment */
            error = await_room(to, stop, deadline);
        if (error && error != EINTR)
            return error;
    }
}

int descriptors_send(int to, const struct descriptors *set, int stop, uint64_t timeout_ns)
{
    uint64_t deadline = clock_now() + timeout_ns;
    const int first[2] = {set->slab, set->listener};
    struct set_head head = {.magic = SET_MAGIC, .total = set->count, .listens = set->listener >= 0};
    memcpy(head.slab_id, set->slab_id, sizeof head.slab_id);
    int error = send_one(to, &head, first, 1 + head.listens, stop, deadline);
    while (!error && head.first < set->count) {
        uint32_t left = set->count - head.first;
        head.count = left < PER_MESSAGE ? left : PER_MESSAGE;
        error = send_one(to, &head, set->mailboxes + head.first, head.count, stop, deadline);
        head.first += head.count;
    }
    return error;
}

/* One message: its head, and its descriptors in `fds` (at most PER_MESSAGE + 3), their number in *count. 0 or errno; then none is open. */
static int receive_one(int from, struct set_head *head, int *fds, uint32_t *count, uint64_t deadline)
{
    union rights_buffer control;
    struct iovec part = {head, sizeof *head};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    ssize_t size;
    while ((size = recvmsg(from, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)) < 0) {
        int error = errno == EINTR ? 0 : errno == EAGAIN ? await(from, POLLIN, -1, deadline) : errno;
        if (error)
            return error;
    }
    *count = 0;
    for (struct cmsghdr *rights = CMSG_FIRSTHDR(&message); rights; rights = CMSG_NXTHDR(&message, rights)) {
        if (rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS)
            continue;
        uint32_t inside = (uint32_t)((rights->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds + *count, CMSG_DATA(rights), sizeof(int) * inside);
        *count += inside;
    }
    int error = size == 0 ? ECONNRESET : message.msg_flags & MSG_CTRUNC ? EMFILE : 0;
    if (!error && (size != sizeof *head || message.msg_flags & MSG_TRUNC || head->magic != SET_MAGIC))
        error = EPROTO;
    for (uint32_t i = 0; error && i < *count; i++)
        close(fds[i]);
    return error;
}

static bool begins_a_set(const struct set_head *head, uint32_t count)
{
    return head->first == 0 && head->count == 0 && head->total >= 1 && head->total <= SHM_MAX_SLOTS && head->listens <= 1 &&
           count == 1 + head->listens;
}

static bool continues(const struct set_head *head, const struct set_head *first, uint32_t have, uint32_t count)
{
    return head->total == first->total && memcmp(head->slab_id, first->slab_id, sizeof head->slab_id) == 0 && head->first == have &&
           head->count == count && count >= 1 && count <= head->total - have;
}

int descriptors_await(int from, uint64_t timeout_ns) { return await(from, POLLIN, -1, clock_now() + timeout_ns); }

int descriptors_receive(int from, struct descriptors *set, uint64_t timeout_ns)
{
    uint64_t deadline = clock_now() + timeout_ns;
    struct set_head first, head;
    int fds[PER_MESSAGE + 3];
    uint32_t count;
    *set = (struct descriptors){.slab = -1, .listener = -1};
    int error = receive_one(from, &first, fds, &count, deadline);
    if (error)
        return error;
    bool good = begins_a_set(&first, count);
    if (good && (set->mailboxes = malloc(first.total * sizeof *set->mailboxes))) {
        memcpy(set->slab_id, first.slab_id, sizeof set->slab_id);
        set->slab = fds[0];
        set->listener = first.listens ? fds[1] : -1;
    } else {
        for (uint32_t i = 0; i < count; i++)
            close(fds[i]);
        return good ? ENOMEM : EPROTO;
    }
    while (!error && set->count < first.total) {
        if ((error = receive_one(from, &head, fds, &count, deadline)))
            break;
        if (!continues(&head, &first, set->count, count)) {
            for (uint32_t i = 0; i < count; i++)
                close(fds[i]);
            error = EPROTO;
            break;
        }
        memcpy(set->mailboxes + set->count, fds, sizeof(int) * count);
        set->count += count;
    }
    if (error)
        descriptors_close(set);
    return error;
}

void descriptors_close(struct descriptors *set)
{
    for (uint32_t i = 0; i < set->count; i++)
        close(set->mailboxes[i]);
    if (set->slab >= 0)
        close(set->slab);
    if (set->listener >= 0)
        close(set->listener);
    free(set->mailboxes);
    *set = (struct descriptors){.slab = -1, .listener = -1};
}
