/* test_connection.c: alive, ended, with unread bytes; emptied; ended for everyone. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>

#include "connection.h"
#include "play.h"

static int ends[2];

static void streams(void) { CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0); }
static void datagrams(void) { CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) == 0); }
static void done(void)
{
    close(ends[0]);
    close(ends[1]);
}

static void checked(void)
{
    streams();
    CHECK_EQ(connection_check(ends[0]), CONNECTION_GOOD);
    CHECK(write(ends[1], "xy", 2) == 2);
    CHECK_EQ(connection_check(ends[0]), CONNECTION_DIRTY);
    CHECK_EQ(connection_check(ends[0]), CONNECTION_DIRTY); /* it only looked */
    char bytes[2];
    CHECK(read(ends[0], bytes, 2) == 2);
    CHECK_EQ(connection_check(ends[0]), CONNECTION_GOOD);
    shutdown(ends[1], SHUT_WR);
    CHECK_EQ(connection_check(ends[0]), CONNECTION_CLOSED);
    done();
    CHECK_EQ(connection_check(ends[0]), CONNECTION_CLOSED); /* no descriptor at all */
}

/* It never blocks, whatever mode the descriptor is in. */
static void checked_in_blocking_mode(void)
{
    streams();
    CHECK_EQ(fcntl(ends[0], F_GETFL) & O_NONBLOCK, 0);
    CHECK_EQ(connection_check(ends[0]), CONNECTION_GOOD);
    CHECK_EQ(connection_clear(ends[0], 4, 1000000), CONNECTION_GOOD);
    done();
}

static void cleared(void)
{
    datagrams();
    CHECK_EQ(connection_clear(ends[0], 4, 1000000000), CONNECTION_GOOD);
    for (int i = 0; i < 4; i++)
        CHECK(send(ends[1], "d", 1, 0) == 1);
    CHECK_EQ(connection_clear(ends[0], 4, 1000000000), CONNECTION_GOOD);
    CHECK_EQ(connection_check(ends[0]), CONNECTION_GOOD);
    for (int i = 0; i < 6; i++)
        CHECK(send(ends[1], "d", 1, 0) == 1);
    CHECK_EQ(connection_clear(ends[0], 4, 1000000000), CONNECTION_DIRTY);
    CHECK_EQ(connection_clear(ends[0], 4, 1000000000), CONNECTION_GOOD); /* four of six were taken */
    CHECK(send(ends[1], "", 0, 0) == 0); /* an empty datagram is one */
    CHECK_EQ(connection_clear(ends[0], 1, 1000000000), CONNECTION_GOOD);
    CHECK(send(ends[1], "d", 1, 0) == 1);
    CHECK_EQ(connection_clear(ends[0], 0, 1000000000), CONNECTION_DIRTY);
    done();
}

/* Time runs out, too: with 0 ns one datagram is taken and the next look is the last. */
static void cleared_in_time(void)
{
    datagrams();
    for (int i = 0; i < 3; i++)
        CHECK(send(ends[1], "d", 1, 0) == 1);
    CHECK_EQ(connection_clear(ends[0], 1000, 0), CONNECTION_DIRTY);
    done();
}

/* An answer "port unreachable" to an earlier datagram is taken off; the socket is good. */
static void refused_datagram(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int closed = socket(AF_INET, SOCK_DGRAM, 0), fd = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK(bind(closed, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(getsockname(closed, (struct sockaddr *)&address, &size) == 0);
    close(closed);
    CHECK(connect(fd, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(send(fd, "d", 1, 0) == 1);
    CHECK_EQ(connection_clear(fd, 4, 1000000), CONNECTION_GOOD);
    CHECK_EQ(connection_clear(fd, 4, 1000000), CONNECTION_GOOD);
    close(fd);
}

static bool at_end(int fd)
{
    char byte;
    return recv(fd, &byte, 1, MSG_DONTWAIT) == 0;
}

static void ended_for_every_copy(void)
{
    streams();
    int copy = dup(ends[0]);
    connection_end(ends, 1, CONNECTION_LINGER_NS);
    CHECK(at_end(ends[1]));
    CHECK(at_end(copy));
    CHECK(send(copy, "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE);
    close(copy);
    done();
}

/* A peer that closes in answer is waited for: when connection_end() returns, it has. */
static void *closing_peer(void *arg)
{
    int fd = *(int *)arg;
    char byte;
    while (read(fd, &byte, 1) > 0)
        ;
    CHECK(write(fd, "bye", 3) == 3);
    close(fd);
    return NULL;
}

static void waits_for_the_peer(void)
{
    pthread_t thread;
    streams();
    CHECK(pthread_create(&thread, NULL, closing_peer, &ends[1]) == 0);
    uint64_t begun = clock_now();
    connection_end(ends, 1, CONNECTION_LINGER_NS);
    CHECK(clock_now() - begun < 10 * CONNECTION_LINGER_NS);
    CHECK(at_end(ends[0])); /* the last bytes were thrown away */
    pthread_join(thread, NULL);
    close(ends[0]);
}

/* All together wait no longer than one linger; descriptors that are none do no harm. */
static void many_at_once(void)
{
    int fds[41], peers[40];
    for (int i = 0; i < 40; i++) {
        streams();
        fds[i] = ends[0];
        peers[i] = ends[1];
    }
    fds[40] = -1;
    uint64_t begun = clock_now();
    connection_end(fds, 41, CONNECTION_LINGER_NS);
    CHECK(clock_now() - begun < 20 * CONNECTION_LINGER_NS); /* one after the other would be 40 */
    for (int i = 0; i < 40; i++) {
        CHECK(at_end(peers[i]));
        close(fds[i]);
        close(peers[i]);
    }
    connection_end(NULL, 0, CONNECTION_LINGER_NS);
}

int main(void)
{
    RUN(checked);
    RUN(checked_in_blocking_mode);
    RUN(cleared);
    RUN(cleared_in_time);
    RUN(refused_datagram);
    RUN(ended_for_every_copy);
    RUN(waits_for_the_peer);
    RUN(many_at_once);
}
