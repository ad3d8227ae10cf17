/* mailbox.h: how a connection's descriptor reaches every process.
 *
 * Each slot has an AF_UNIX datagram socket, autobound and connected to itself, made with the pool and inherited by the family.
 * Whoever opens a connection puts one letter into it: the descriptor (SCM_RIGHTS) with who it is. Whoever leases a connection that its
 * process has not seen reads the letter with MSG_PEEK, which makes a duplicate of the descriptor and leaves the letter.
 * Draining the letter drops that reference. A socket connected to itself refuses letters of strangers (EPERM).
 *
 * Invariant: only the process that holds the slot exclusively (DIALING, LEASED, CHECKING, RETIRING) puts a letter into its mailbox or takes
 * it out, so it holds at most one; an EMPTY slot's mailbox is empty. Anyone may peek: the head says whose the letter is. A letter that does not fit slab, slot and connection is refused
 * and every descriptor in it closed.
 *
 * Not here: what is done when a letter is missing (module.c retires the connection and dials anew).
 */
#ifndef SHMPOOL_MAILBOX_H
#define SHMPOOL_MAILBOX_H

#include <stddef.h>
#include <stdbool.h>
#include <stdint.h>

enum { MAILBOX_NOTE_MAX = 4096 }; /* bytes of metadata a letter can carry */

struct letter_head {
    uint64_t magic;
    uint8_t slab_id[16];
    uint64_t connection;
    uint32_t slot;
    uint32_t note_size;
};

struct letter {
    struct letter_head head;
    uint8_t note[MAILBOX_NOTE_MAX];
};

/* A new mailbox; its descriptor, or -1 (errno). */
int mailbox_new(void);
/* Put the letter for (slab_id, slot, connection) with descriptor `fd` and the note; 0 or errno (ETOOMANYREFS ...). */
int mailbox_deposit(int mailbox, const uint8_t slab_id[16], uint32_t slot, uint64_t connection, int fd, const void *note,
                    size_t note_size);
enum { MAILBOX_NONE = -1, MAILBOX_NO_ROOM = -2 };
/* Duplicate the descriptor of the letter without taking it, and fill `letter`. MAILBOX_NONE: there is none, or it does not fit.
 * MAILBOX_NO_ROOM: this process has no descriptor left to receive it with. */
int mailbox_peek(int mailbox, const uint8_t slab_id[16], uint32_t slot, uint64_t connection, struct letter *letter);
/* Take and drop every letter, closing the descriptors in them. */
void mailbox_drain(int mailbox);

#endif
