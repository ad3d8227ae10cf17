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
 * there. With SHMPOOL_MACHINE it also goes to a function of the test, which may give a load an older value, as a weak machine
 * may (tests/core/weak.h). Not here: which words exist (slab.h) and what they mean (slot.h, waiter.h, ...).
 */
#ifndef SHMPOOL_ATOMICS_H
#define SHMPOOL_ATOMICS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef _Atomic(uint64_t) a64_shm;
typedef _Atomic(uint32_t) a32_shm;

_Static_assert(sizeof(a64_shm) == 8 && sizeof(a32_shm) == 4, "atomic words have the size of plain words");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2,
               "a hidden lock would live in one process only: such a machine cannot run shmpool");

#if defined SHMPOOL_HOOKS || defined SHMPOOL_MACHINE
void shmpool_hook(const char *tag);
#define SHM_STEP(tag) shmpool_hook(#tag)
#else
#define SHM_STEP(tag) ((void)0)
#endif

/* `call` is one of stdatomic.h, without its atomic_ and _explicit; what follows `word` are its further arguments. */
#ifdef SHMPOOL_MACHINE
uint64_t shmpool_load(const char *tag, const volatile void *word, size_t size, memory_order order);
uint64_t shmpool_store(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order);
uint64_t shmpool_fetch_add(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order);
uint64_t shmpool_fetch_or(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order);
uint64_t shmpool_fetch_and(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order);
uint64_t shmpool_exchange(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order);
uint64_t shmpool_compare_exchange_strong(const char *tag, volatile void *word, size_t size, void *expected, uint64_t desired,
                                         memory_order order, memory_order order_of_failure);
#define SHM_CALL(tag, call, word, ...)                                                                                 \
    (SHM_STEP(tag), (__typeof__((word) + 0))shmpool_##call(#tag, &(word), sizeof(word), __VA_ARGS__))
#else
#define SHM_CALL(tag, call, word, ...) (SHM_STEP(tag), atomic_##call##_explicit(&(word), __VA_ARGS__))
#endif

#define SHM_LOAD(tag, word) SHM_CALL(tag, load, word, memory_order_relaxed)
#define SHM_LOAD_ACQUIRE(tag, word) SHM_CALL(tag, load, word, memory_order_acquire)
#define SHM_LOAD_SEQ(tag, word) SHM_CALL(tag, load, word, memory_order_seq_cst)
#define SHM_STORE(tag, word, value) SHM_CALL(tag, store, word, (value), memory_order_relaxed)
#define SHM_STORE_RELEASE(tag, word, value) SHM_CALL(tag, store, word, (value), memory_order_release)
#define SHM_ADD(tag, word, value) SHM_CALL(tag, fetch_add, word, (value), memory_order_relaxed)
#define SHM_ADD_SEQ(tag, word, value) SHM_CALL(tag, fetch_add, word, (value), memory_order_seq_cst)
#define SHM_OR(tag, word, value) SHM_CALL(tag, fetch_or, word, (value), memory_order_relaxed)
#define SHM_AND(tag, word, value) SHM_CALL(tag, fetch_and, word, (value), memory_order_relaxed)
#define SHM_OR_SEQ(tag, word, value) SHM_CALL(tag, fetch_or, word, (value), memory_order_seq_cst)
#define SHM_AND_SEQ(tag, word, value) SHM_CALL(tag, fetch_and, word, (value), memory_order_seq_cst)
#define SHM_SWAP_SEQ(tag, word, value) SHM_CALL(tag, exchange, word, (value), memory_order_seq_cst)
/* true when `word` held *expected and now holds `desired`; else *expected is what it held */
#define SHM_CAS_SEQ(tag, word, expected, desired)                                                                      \
    SHM_CALL(tag, compare_exchange_strong, word, (expected), (desired), memory_order_seq_cst, memory_order_seq_cst)

#define SHM_LIKELY(condition) __builtin_expect(!!(condition), 1)
#define SHM_UNLIKELY(condition) __builtin_expect(!!(condition), 0)

#endif
