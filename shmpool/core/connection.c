/* connection.c: see connection.h. */
#include "connection.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "stats.h"

enum connection_health connection_check(int fd)
{
    char byte;
    ssize_t got;
    do
        got = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got > 0)
        return CONNECTION_DIRTY;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return CONNECTION_GOOD;
    return CONNECTION_CLOSED;
}

enum connection_health connection_clear(int fd, uint32_t max_packets, uint64_t timeout_ns)
{
    char byte;
    uint64_t begun = 0;
    for (uint32_t packets = 0;; packets++) {
        bool last_look = packets >= max_packets || (begun && clock_now() - begun > timeout_ns);
        ssize_t got = recv(fd, &byte, 1, MSG_DONTWAIT | (last_look ? MSG_PEEK : 0));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return CONNECTION_GOOD;
        if (got < 0) /* ECONNREFUSED: an ICMP answer to an earlier datagram, which this call has taken off the socket */
            return errno == ECONNREFUSED && !last_look ? CONNECTION_GOOD : CONNECTION_CLOSED;
        if (last_look)
            return CONNECTION_DIRTY;
        if (!begun)
            begun = clock_now();
    }
}

/* Is it a stream whose peer can tell us that it has closed? */
static bool can_end(int fd)
{
    int type;
    socklen_t size = sizeof type;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM;
}

/* Throw away what still comes; true when the peer has closed. */
static bool has_ended(int fd)
{
    char bytes[4096];
    for (int i = 0; i < 64; i++) { /* a peer that sends for ever is not waited for longer than the linger */
        ssize_t got = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR))
            return true;
        if (got < 0 && errno != EINTR)
            return false;
    }
    return false;
}

static void await_ends(struct pollfd *polls, size_t count, uint64_t linger_ns)
{
    uint64_t deadline = clock_now() + linger_ns;
    size_t open = 0;
    for (size_t i = 0; i < count; i++)
        open += polls[i].fd >= 0;
    while (open) {
        uint64_t now = clock_now();
        if (now >= deadline)
            return;
        struct timespec left = {0, (long)(deadline - now)};
        if (ppoll(polls, count, &left, NULL) < 0 && errno != EINTR)
            return;
        for (size_t i = 0; i < count; i++)
            if (polls[i].fd >= 0 && polls[i].revents && has_ended(polls[i].fd))
                polls[i].fd = -1, open--; /* ppoll passes over negative descriptors */
    }
}

void connection_end(const int *fds, size_t count, uint64_t linger_ns)
{
    struct pollfd *polls = count ? calloc(count, sizeof *polls) : NULL;
    for (size_t i = 0; polls && i < count; i++) {
        bool ends = shutdown(fds[i], SHUT_WR) == 0 && can_end(fds[i]) && !has_ended(fds[i]);
        polls[i] = (struct pollfd){.fd = ends ? fds[i] : -1, .events = POLLIN | POLLRDHUP};
    }
    if (polls)
        await_ends(polls, count, linger_ns);
    for (size_t i = 0; i < count; i++)
        shutdown(fds[i], SHUT_RDWR);
    free(polls);
}
