/* connection.h: what is done to a connection's descriptor: look whether it lives, empty it, end it.
 *
 * Nothing here knows of slots; the caller holds the slot exclusively.
 */
#ifndef SHMPOOL_CONNECTION_H
#define SHMPOOL_CONNECTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum connection_health { CONNECTION_GOOD, CONNECTION_CLOSED, CONNECTION_DIRTY };

/* One recv(MSG_PEEK | MSG_DONTWAIT): open and silent, ended, or with bytes nobody asked for. */
enum connection_health connection_check(int fd);
/* The same for a datagram socket: throws away up to `max_packets` datagrams within `timeout_ns`; DIRTY when more remain. */
enum connection_health connection_clear(int fd, uint32_t max_packets, uint64_t timeout_ns);

#define CONNECTION_LINGER_NS UINT64_C(20000000)
/* End connections for every process that holds a copy: shutdown for writing, wait until the peers have closed too, at most
 * `linger_ns` for all together, then shut down both ways. After this the servers have let go, so that a permit that is free
 * here is also free there. Descriptors stay open; the caller closes them. Blocks: call it without the GIL. */
void connection_end(const int *fds, size_t count, uint64_t linger_ns);

#endif
