/* weak.h: shared memory as C11 allows it on a weak machine: a load may read an older value. For SHMPOOL_MACHINE (atomics.h).
 *
 * A location is a word that was stored to since weak_begin(). It has its messages in modification order, each a value and the view that it publishes.
 * A thread has a view: for each location the oldest message that it may still read. Before weak_begin() all has been seen by all.
 *
 *   load       reads any message from its view on, and raises its view to it; acquire: joins the view that the message publishes
 *   store      appends a message; release: it publishes the thread's view; relaxed: none
 *   change     (RMW) reads the last message and appends one, which publishes what that one published as well: a release sequence
 *   seq_cst    acquire and release, and a load reads nothing older than the last seq_cst store or change; a compare-and-swap that fails is a load
 *
 * Which message a load reads is a choice of the caller, weak_choose(), where values differ. Memory holds the last value of each location, so
 * whoever reads it plainly sees the truth; nobody may write it plainly between weak_begin() and the end of the run.
 *
 * Decisions. What the kernel orders, the caller says: weak_publish() by who lets go, weak_join() by who gets. A store does not continue the
 * release sequence of its own thread (as in C++20: less order than C11). A seq_cst load orders only by seq_cst stores, as in C11; in C++20 also by
 * seq_cst loads, so here is less order. Limits: messages are appended only (no store comes before an older one: 2+2W); no load reads a store of
 * later in the run (no load buffering, nothing out of thin air); the order of seq_cst is that of the run. Of messages with one value the latest is
 * read, and an older one than the last WEAK_CHOICES values never. There are no fences: the core has none. Plain data are not followed:
 * ThreadSanitizer does that.
 *
 * Source: the view machines of Kang et al., "A promising semantics for relaxed-memory concurrency", 2017, without promises; release sequences as
 * in Lahav et al., "Repairing sequential consistency in C/C++11", 2017. Not here: who runs when (interleave.c, litmus.c).
 */
#ifndef WEAK_H
#define WEAK_H

#include <string.h>

#include "atomics.h"
#include "check.h"

#define WEAK __attribute__((unused)) static

enum { WEAK_THREADS = 4, WEAK_LOCATIONS = 4096, WEAK_TABLE = 4 * WEAK_LOCATIONS, WEAK_MESSAGES = 1 << 16, WEAK_ROOM = 1 << 24, WEAK_CHOICES = 16 };

/* A view that was published: times by location, in weak_room. */
struct weak_view {
    uint32_t begin, count;
};
struct weak_message {
    uint64_t value;
    struct weak_view view;
    uint32_t before; /* the message before it; of the first: itself */
    uint16_t time;   /* its place in the modification order */
};
struct weak_location {
    uint32_t last; /* message */
    uint16_t seq;  /* time of the last seq_cst store */
};

static bool weak_running; /* else words are read and written plainly */
static unsigned weak_thread;
static uint16_t weak_seen[WEAK_THREADS][WEAK_LOCATIONS]; /* times */
static struct weak_location weak_locations[WEAK_LOCATIONS];
static struct weak_message weak_messages[WEAK_MESSAGES];
static uint16_t weak_room[WEAK_ROOM];
static uint32_t weak_location_count, weak_message_count, weak_room_used, weak_run;
static struct {
    const volatile void *word;
    uint32_t run, location;
} weak_table[WEAK_TABLE];

/* One order that is weaker than the core asks for: of each `call` with `tag` and `from`. */
static struct {
    char tag[16], call[32];
    memory_order from, to;
} weak_fault;

/* Which of values[0..count), the last one first, does a load read? */
static unsigned weak_choose(const char *tag, const uint64_t *values, unsigned count);

WEAK void weak_begin(void)
{
    for (unsigned i = 0; i < WEAK_THREADS; i++)
        memset(weak_seen[i], 0, weak_location_count * sizeof *weak_seen[i]);
    weak_location_count = weak_message_count = weak_room_used = 0;
    weak_run++;
}

/* ---- views ---- */

/* What `thread` has seen, and what `also` has. */
WEAK struct weak_view weak_publish(unsigned thread, struct weak_view also)
{
    struct weak_view view = {weak_room_used, weak_location_count};
    CHECK(weak_room_used + view.count <= WEAK_ROOM);
    memcpy(&weak_room[view.begin], weak_seen[thread], view.count * sizeof *weak_room);
    for (uint32_t i = 0; i < also.count; i++)
        if (weak_room[view.begin + i] < weak_room[also.begin + i])
            weak_room[view.begin + i] = weak_room[also.begin + i];
    weak_room_used += view.count;
    return view;
}

WEAK void weak_join(struct weak_view view)
{
    uint16_t *seen = weak_seen[weak_thread];
    for (uint32_t i = 0; i < view.count; i++)
        if (seen[i] < weak_room[view.begin + i])
            seen[i] = weak_room[view.begin + i];
}

/* ---- locations ---- */

static uint64_t weak_memory(const volatile void *word, size_t size)
{
    return size == 4 ? *(const volatile uint32_t *)word : *(const volatile uint64_t *)word;
}

static void weak_set_memory(volatile void *word, size_t size, uint64_t value)
{
    if (size == 4)
        *(volatile uint32_t *)word = (uint32_t)value;
    else
        *(volatile uint64_t *)word = value;
}

static uint32_t weak_append(uint32_t before, uint16_t time, uint64_t value, struct weak_view view)
{
    CHECK(weak_message_count < WEAK_MESSAGES && time < UINT16_MAX);
    weak_messages[weak_message_count] = (struct weak_message){value, view, before, time};
    return weak_message_count++;
}

/* The number of the word's location. There is none: it is made, if `make`; else -1. */
static int weak_find(const volatile void *word, size_t size, bool make)
{
    uint32_t at = (uint32_t)(((uintptr_t)word >> 2) * UINT64_C(0x9e3779b97f4a7c15) >> 40) % WEAK_TABLE;
    while (weak_table[at].run == weak_run && weak_table[at].word != word)
        at = (at + 1) % WEAK_TABLE;
    if (weak_table[at].run == weak_run) {
        uint32_t location = weak_table[at].location;
        CHECK_EQ(weak_memory(word, size), weak_messages[weak_locations[location].last].value);
        return (int)location;
    }
    if (!make)
        return -1;
    CHECK(weak_location_count < WEAK_LOCATIONS);
    weak_table[at].word = word;
    weak_table[at].run = weak_run;
    weak_table[at].location = weak_location_count;
    weak_locations[weak_location_count] =
        (struct weak_location){weak_append(weak_message_count, 0, weak_memory(word, size), (struct weak_view){0}), 0};
    return (int)weak_location_count++;
}

/* ---- orders ---- */

static bool weak_acquires(memory_order order)
{
    return order == memory_order_acquire || order == memory_order_acq_rel || order == memory_order_seq_cst;
}

static bool weak_releases(memory_order order)
{
    return order == memory_order_release || order == memory_order_acq_rel || order == memory_order_seq_cst;
}

static memory_order weak_order(const char *tag, const char *call, memory_order order)
{
    bool is_fault = weak_fault.tag[0] && order == weak_fault.from && !strcmp(tag, weak_fault.tag) && !strcmp(call, weak_fault.call);
    return is_fault ? weak_fault.to : order;
}

/* "tag:call:from:to", as in stdatomic.h; false: it is none. */
WEAK bool weak_set_fault(const char *text)
{
    static const char *const names[] = {"relaxed", "acquire", "release", "acq_rel", "seq_cst"};
    static const memory_order orders[] = {memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel,
                                          memory_order_seq_cst};
    char from[16], to[16];
    unsigned known = 0;
    if (sscanf(text, "%15[a-z_]:%31[a-z_]:%15[a-z_]:%15[a-z_]", weak_fault.tag, weak_fault.call, from, to) != 4)
        return false;
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        if (!strcmp(from, names[i]))
            weak_fault.from = orders[i], known |= 1;
        if (!strcmp(to, names[i]))
            weak_fault.to = orders[i], known |= 2;
    }
    return known == 3;
}

/* ---- operations ---- */

/* The message that a load reads. `wanted`: of a compare-and-swap, which succeeds with the last message alone. */
static struct weak_message weak_read(const char *tag, uint32_t location, memory_order order, const uint64_t *wanted)
{
    const struct weak_location *at = &weak_locations[location];
    uint16_t *seen = &weak_seen[weak_thread][location], oldest = order == memory_order_seq_cst && *seen < at->seq ? at->seq : *seen;
    uint64_t values[WEAK_CHOICES];
    uint32_t found[WEAK_CHOICES];
    unsigned count = 0;
    for (uint32_t i = at->last; count < WEAK_CHOICES && weak_messages[i].time >= oldest; i = weak_messages[i].before) {
        bool offered = count && wanted && weak_messages[i].value == *wanted;
        for (unsigned k = 0; k < count; k++)
            offered |= values[k] == weak_messages[i].value;
        if (!offered)
            values[count] = weak_messages[i].value, found[count++] = i;
        if (weak_messages[i].before == i)
            break;
    }
    struct weak_message message = weak_messages[found[count > 1 ? weak_choose(tag, values, count) : 0]];
    if (*seen < message.time)
        *seen = message.time;
    if (weak_acquires(order))
        weak_join(message.view);
    return message;
}

static void weak_write(uint32_t location, volatile void *word, size_t size, uint64_t value, memory_order order, struct weak_view inherited)
{
    struct weak_location *at = &weak_locations[location];
    uint16_t time = (uint16_t)(weak_messages[at->last].time + 1);
    weak_set_memory(word, size, value);
    weak_seen[weak_thread][location] = time;
    at->last = weak_append(at->last, time, weak_memory(word, size), weak_releases(order) ? weak_publish(weak_thread, inherited) : inherited);
    if (order == memory_order_seq_cst)
        at->seq = time;
}

/* A change whatever the value is; returns the one before. */
static uint64_t weak_change(volatile void *word, size_t size, memory_order order, uint64_t keep, uint64_t add, uint64_t set)
{
    uint64_t before = weak_memory(word, size), after = ((before & keep) + add) | set;
    if (!weak_running) {
        weak_set_memory(word, size, after);
        return before;
    }
    uint32_t location = (uint32_t)weak_find(word, size, true);
    struct weak_view inherited = weak_messages[weak_locations[location].last].view;
    if (weak_acquires(order))
        weak_join(inherited);
    weak_write(location, word, size, after, order, inherited);
    return before;
}

uint64_t shmpool_load(const char *tag, const volatile void *word, size_t size, memory_order order)
{
    int location = weak_running ? weak_find(word, size, false) : -1;
    return location < 0 ? weak_memory(word, size) : weak_read(tag, (uint32_t)location, weak_order(tag, "load", order), NULL).value;
}

uint64_t shmpool_store(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order)
{
    if (weak_running)
        weak_write((uint32_t)weak_find(word, size, true), word, size, value, weak_order(tag, "store", order), (struct weak_view){0});
    else
        weak_set_memory(word, size, value);
    return value;
}

uint64_t shmpool_fetch_add(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order)
{
    return weak_change(word, size, weak_order(tag, "fetch_add", order), UINT64_MAX, value, 0);
}

uint64_t shmpool_fetch_or(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order)
{
    return weak_change(word, size, weak_order(tag, "fetch_or", order), UINT64_MAX, 0, value);
}

uint64_t shmpool_fetch_and(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order)
{
    return weak_change(word, size, weak_order(tag, "fetch_and", order), value, 0, 0);
}

uint64_t shmpool_exchange(const char *tag, volatile void *word, size_t size, uint64_t value, memory_order order)
{
    return weak_change(word, size, weak_order(tag, "exchange", order), 0, 0, value);
}

/* The order of a failure follows from that of a success. */
uint64_t shmpool_compare_exchange_strong(const char *tag, volatile void *word, size_t size, void *expected, uint64_t desired, memory_order order,
                                         memory_order order_of_failure)
{
    uint64_t wanted = weak_memory(expected, size);
    struct weak_message message = {.value = weak_memory(word, size)};
    order = weak_order(tag, "compare_exchange_strong", order);
    if (order != memory_order_seq_cst)
        order_of_failure = weak_acquires(order) ? memory_order_acquire : memory_order_relaxed;
    int location = weak_running ? weak_find(word, size, message.value == wanted) : -1;
    if (location >= 0)
        message = weak_read(tag, (uint32_t)location, order_of_failure, &wanted);
    if (message.value != wanted) {
        weak_set_memory(expected, size, message.value);
        return false;
    }
    if (location >= 0)
        weak_write((uint32_t)location, word, size, desired, order, message.view);
    else
        weak_set_memory(word, size, desired);
    return true;
}

#endif
