/* atomics.h: the only way to shared words.
 *
 * Every operation names an ORDER tag. The tag is explained by an `ORDER(tag):` comment that states the ordering, its
 * partner, what it publishes and what breaks if it were weaker; tests/test_tidy.py refuses a tag without one.
 * The tags shared by all files are explained here; the others stand beside the code that uses them.
 *
 * ORDER(hint): relaxed. The value is a hint or a figure for people: it is checked against a slot word before anyone
 *   relies on it, or nobody relies on it at all. Nothing is published, so nothing can be reordered to harm.
 * ORDER(count): relaxed. A statistics counter: each is exact by itself, none orders anything.
 * ORDER(row): relaxed. A field of a slot row: written only by the process that holds the slot exclusively, published to
 *   the next holder by the slot word (ORDER(slot)). A reader without the slot gets a whole but perhaps older value.
 * ORDER(private): relaxed or acquire/release between threads of one process; never crosses the process border.
 *
 * With SHMPOOL_HOOKS each operation first calls shmpool_hook(tag): crash and interleaving tests stop or end a "process"
 * there. Not here: which words exist (slab.h) and what they mean (slot.h, waiter.h, ...).
 */
#ifndef SHMPOOL_ATOMICS_H
#define SHMPOOL_ATOMICS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef _Atomic(uint64_t) a64_shm;
typedef _Atomic(uint32_t) a32_shm;

_Static_assert(sizeof(a64_shm) == 8 && sizeof(a32_shm) == 4, "atomic words have the size of plain words");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2,
               "a hidden lock would live in one process only: such a machine cannot run shmpool");

#ifdef SHMPOOL_HOOKS
void shmpool_hook(const char *tag);
#define SHM_STEP(tag) shmpool_hook(#tag)
#else
#define SHM_STEP(tag) ((void)0)
#endif

#define SHM_LOAD(tag, word) (SHM_STEP(tag), atomic_load_explicit(&(word), memory_order_relaxed))
#define SHM_LOAD_ACQUIRE(tag, word) (SHM_STEP(tag), atomic_load_explicit(&(word), memory_order_acquire))
#define SHM_LOAD_SEQ(tag, word) (SHM_STEP(tag), atomic_load_explicit(&(word), memory_order_seq_cst))
#define SHM_STORE(tag, word, value) (SHM_STEP(tag), atomic_store_explicit(&(word), (value), memory_order_relaxed))
#define SHM_STORE_RELEASE(tag, word, value) (SHM_STEP(tag), atomic_store_explicit(&(word), (value), memory_order_release))
#define SHM_ADD(tag, word, value) (SHM_STEP(tag), atomic_fetch_add_explicit(&(word), (value), memory_order_relaxed))
#define SHM_ADD_SEQ(tag, word, value) (SHM_STEP(tag), atomic_fetch_add_explicit(&(word), (value), memory_order_seq_cst))
#define SHM_OR(tag, word, value) (SHM_STEP(tag), atomic_fetch_or_explicit(&(word), (value), memory_order_relaxed))
#define SHM_AND(tag, word, value) (SHM_STEP(tag), atomic_fetch_and_explicit(&(word), (value), memory_order_relaxed))
#define SHM_OR_SEQ(tag, word, value) (SHM_STEP(tag), atomic_fetch_or_explicit(&(word), (value), memory_order_seq_cst))
#define SHM_AND_SEQ(tag, word, value) (SHM_STEP(tag), atomic_fetch_and_explicit(&(word), (value), memory_order_seq_cst))
#define SHM_SWAP_SEQ(tag, word, value) (SHM_STEP(tag), atomic_exchange_explicit(&(word), (value), memory_order_seq_cst))
/* true when `word` held *expected and now holds `desired`; else *expected is what it held */
#define SHM_CAS_SEQ(tag, word, expected, desired)                                                                      \
    (SHM_STEP(tag), atomic_compare_exchange_strong_explicit(&(word), (expected), (desired), memory_order_seq_cst,      \
                                                            memory_order_seq_cst))

#define SHM_LIKELY(condition) __builtin_expect(!!(condition), 1)
#define SHM_UNLIKELY(condition) __builtin_expect(!!(condition), 0)

#endif
