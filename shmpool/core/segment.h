/* segment.h: the slab as a file: when its name may go, and taking it away.
 *
 * Two may find the same remains at once, and a new pool may take the name between one's look and its unlink(). So removers exclude each other
 * by a lock in the very file: as a name is given to a new file only while it is free, nobody else can change whose name it is. Remains are
 * what the remover can take the family's byte of, for itself alone: nobody can become a member until they are gone.
 *
 * At exit() of a process whose program did not leave (an embedded interpreter that is not finalized: uWSGI's master), a handler of libc
 * removes the name if that process was the last member. It takes no lock and ends no connection: the kernel does that in a moment.
 *
 * Not here: making a segment, giving it its name, who asks (shmpool/slab.py).
 */
#ifndef SHMPOOL_SEGMENT_H
#define SHMPOOL_SEGMENT_H

#include <stdbool.h>
#include <stdint.h>

#include "worker.h"

/* Remove the slab at `path`, and the socket that it names: if no process holds it, or, with an `id`, if it is that slab. True: the name was
 * free, or is now. */
bool segment_remove(const char *path, const uint8_t *id);
/* Note where the segment of this seat's handle is, for the end of the process. */
void segment_note(struct seat *seat, int slab_fd, const char *path);

#endif
