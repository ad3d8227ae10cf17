/* test_events.c: an event is read as it was noted, or not at all, whoever dies, stops or writes at once. */
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "events.h"
#include "play.h"

enum { THREADS = 4 };

static struct pool *pool;
static struct slab *slab;
static uint64_t first; /* the next event, when a test began: joining is one */

static void begin(void)
{
    pool = play_found(1, 2, 1, 0);
    slab = &pool->slab;
    first = event_count(slab);
}
static void end(void) { play_leave(pool); }

/* An event all of whose parts follow from one number, so that a mixture of two is seen. */
static struct event event_of(uint64_t number)
{
    struct event event = {.kind = EVENT_discarded, .reason = (uint8_t)number, .slot = (uint32_t)number, .pid = (uint32_t)number | 1,
                          .connection = number * 3, .value = number * 5};
    for (int i = 0; i < SHM_EVENT_TEXT - 1; i++)
        event.text[i] = (char)('a' + (number + (uint64_t)i) % 26);
    return event;
}
static void check_event(const struct event *event)
{
    struct event wanted = event_of(event->connection / 3);
    wanted.time_ns = event->time_ns;
    CHECK_EQ(event->kind, wanted.kind);
    CHECK_EQ(event->reason, wanted.reason);
    CHECK_EQ(event->slot, wanted.slot);
    CHECK_EQ(event->pid, wanted.pid);
    CHECK_EQ(event->value, wanted.value);
    CHECK(!memcmp(event->text, wanted.text, sizeof wanted.text));
}

static struct event_shm *cell_of(uint64_t number) { return &slab->events[number % SHM_EVENTS]; }

/* ---- one writer ---- */

static void as_noted(void)
{
    struct event event;
    begin();
    CHECK_EQ(event_read(slab, first, &event), EVENT_BEGUN); /* there is none yet */
    event_note(slab, event_of(7));
    CHECK_EQ(event_count(slab), first + 1);
    CHECK_EQ(event_read(slab, first, &event), EVENT_WHOLE);
    check_event(&event);
    CHECK(event.time_ns > UINT64_C(1600000000000000000));
    event_note(slab, (struct event){.kind = EVENT_joined});
    CHECK_EQ(event_read(slab, first + 1, &event), EVENT_WHOLE);
    CHECK_EQ(event.pid, (uint32_t)getpid()); /* filled in */
    end();
}

static void a_text_that_does_not_end(void)
{
    struct event event = {.kind = EVENT_down};
    begin();
    memset(event.text, 'x', sizeof event.text);
    event_note(slab, event);
    CHECK_EQ(event_read(slab, first, &event), EVENT_WHOLE);
    CHECK_EQ(strnlen(event.text, sizeof event.text), sizeof event.text - 1);
    end();
}

static void the_last_ones_are_kept(void)
{
    struct event event;
    begin();
    for (uint64_t i = 0; i < 2 * SHM_EVENTS + 5; i++)
        event_note(slab, event_of(i));
    uint64_t count = event_count(slab);
    CHECK_EQ(event_read(slab, count - SHM_EVENTS - 1, &event), EVENT_LOST);
    for (uint64_t number = count - SHM_EVENTS; number < count; number++) {
        CHECK_EQ(event_read(slab, number, &event), EVENT_WHOLE);
        check_event(&event);
        CHECK_EQ(event.connection, (number - first) * 3);
    }
    CHECK_EQ(event_read(slab, count, &event), EVENT_BEGUN);
    end();
}

/* ---- writers that do not come to their end ---- */

/* Dead in the middle: that event is lost, its cell serves again. */
static void a_dead_writer(void)
{
    struct event event;
    begin();
    event_note(slab, event_of(1));
    atomic_fetch_add(&slab->header->next_event, 1); /* drew a ticket and died */
    uint64_t begun = event_count(slab);
    atomic_fetch_add(&slab->header->next_event, 1);
    atomic_store(&cell_of(begun)->turn, 2 * begun + 1); /* and one that had begun to write */
    event_note(slab, event_of(2));
    CHECK_EQ(event_read(slab, first + 1, &event), EVENT_BEGUN);
    CHECK_EQ(event_read(slab, begun, &event), EVENT_BEGUN);
    CHECK_EQ(event_read(slab, begun + 1, &event), EVENT_WHOLE);
    for (uint64_t i = 0; i < SHM_EVENTS; i++)
        event_note(slab, event_of(i));
    CHECK_EQ(event_read(slab, begun, &event), EVENT_LOST);
    CHECK_EQ(event_read(slab, begun + SHM_EVENTS, &event), EVENT_WHOLE);
    check_event(&event);
    end();
}

/* Stopped for a whole round before its first word: it drops its event, and the later one stands. */
static void late_to_begin(void)
{
    struct event event;
    begin();
    uint64_t late = event_count(slab);
    atomic_store(&cell_of(late)->turn, 2 * (late + SHM_EVENTS) + 2); /* the cell has been used for the next round */
    event_note(slab, event_of(1));
    CHECK_EQ(atomic_load(&cell_of(late)->turn), 2 * (late + SHM_EVENTS) + 2);
    CHECK_EQ(event_read(slab, late, &event), EVENT_LOST);
    end();
}

/* Stopped for a whole round in the middle of its words: whichever of them it still writes into the later event, that one is not believed. */
static void late_to_end(void)
{
    struct event event;
    begin();
    for (int word = 0; word < SHM_EVENT_WORDS; word++)
        for (uint64_t bit = 1; bit; bit <<= 1) {
            uint64_t number = event_count(slab);
            event_note(slab, event_of(number));
            CHECK_EQ(event_read(slab, number, &event), EVENT_WHOLE);
            atomic_fetch_xor(&cell_of(number)->words[word], bit);
            CHECK_EQ(event_read(slab, number, &event), EVENT_LOST);
        }
    end();
}

/* What was whole in one round is not that of another, whoever writes an old turn back. */
static void a_turn_that_lies(void)
{
    struct event event;
    begin();
    uint64_t number = event_count(slab);
    event_note(slab, event_of(1));
    atomic_store(&cell_of(number)->turn, 2 * (number + SHM_EVENTS) + 2);
    CHECK_EQ(event_read(slab, number + SHM_EVENTS, &event), EVENT_LOST);
    end();
}

static void no_such_kind(void)
{
    struct event event = event_of(1);
    begin();
    event.kind = EVENT_KINDS;
    event_note(slab, event);
    CHECK_EQ(event_read(slab, first, &event), EVENT_LOST);
    end();
}

/* ---- at once ---- */

static a32_shm over;
static uint64_t rounds = 20000;

static void *note_all_the_time(void *start)
{
    uint64_t number = *(uint64_t *)start;
    for (uint64_t i = 0; i < rounds; i++)
        event_note(slab, event_of(number + i));
    return NULL;
}

static uint64_t read_what_there_is(uint64_t next)
{
    uint64_t count = event_count(slab), whole = 0;
    struct event event;
    for (next = count > next + SHM_EVENTS ? count - SHM_EVENTS : next; next < count; next++)
        if (event_read(slab, next, &event) == EVENT_WHOLE) {
            check_event(&event);
            whole++;
        }
    return whole;
}

static void *read_all_the_time(void *found)
{
    uint64_t *whole = found;
    while (!atomic_load(&over))
        *whole += read_what_there_is(first);
    return NULL;
}

/* Threads write round after round over each other, readers look on. Nothing is read that nobody wrote, and what the last round left is whole. */
static void threads_at_once(void)
{
    pthread_t writers[THREADS], readers[2];
    uint64_t starts[THREADS], whole[2] = {0}, counted = 0;
    struct event event;
    begin();
    atomic_store(&over, 0);
    for (uint64_t i = 0; i < 2; i++)
        CHECK(pthread_create(&readers[i], NULL, read_all_the_time, &whole[i]) == 0);
    for (uint64_t i = 0; i < THREADS; i++) {
        starts[i] = i * 1000000007;
        CHECK(pthread_create(&writers[i], NULL, note_all_the_time, &starts[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(writers[i], NULL);
    atomic_store(&over, 1);
    for (int i = 0; i < 2; i++)
        pthread_join(readers[i], NULL);
    uint64_t count = event_count(slab);
    CHECK_EQ(count, first + THREADS * rounds);
    for (uint64_t number = count - SHM_EVENTS; number < count; number++)
        counted += event_read(slab, number, &event) == EVENT_WHOLE;
    CHECK(counted + THREADS >= SHM_EVENTS); /* a writer that was overtaken by a round has dropped its own */
    CHECK(whole[0] + whole[1] > 0);
    end();
}

/* Processes that are killed while they write: at most one event each is lost. */
static void killed_writers(void)
{
    enum { KILLED = 20 };
    struct event event;
    begin();
    for (int i = 0; i < KILLED; i++) {
        pid_t child = fork();
        if (!child)
            for (uint64_t number = 0;; number++)
                event_note(slab, event_of(number));
        usleep(1000 + 200 * (useconds_t)i);
        CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
        read_what_there_is(first);
    }
    uint64_t count = event_count(slab), lost = 0;
    for (uint64_t number = count > SHM_EVENTS ? count - SHM_EVENTS : first; number < count; number++)
        lost += event_read(slab, number, &event) != EVENT_WHOLE;
    CHECK(lost <= KILLED);
    end();
}

int main(int argc, char **argv)
{
    rounds = argc > 1 ? strtoull(argv[1], NULL, 0) : rounds;
    RUN(as_noted);
    RUN(a_text_that_does_not_end);
    RUN(the_last_ones_are_kept);
    RUN(a_dead_writer);
    RUN(late_to_begin);
    RUN(late_to_end);
    RUN(a_turn_that_lies);
    RUN(no_such_kind);
    RUN(threads_at_once);
    RUN(killed_writers);
    return 0;
}
