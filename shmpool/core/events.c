/* events.c: see events.h. */
#include "events.h"

#include <string.h>
#include <unistd.h>

#include "stats.h"

enum { TEXT_WORDS = SHM_EVENT_TEXT / 8 };

static uint64_t mix(uint64_t sum, uint64_t word)
{
    sum = (sum ^ word) * UINT64_C(0x9e3779b97f4a7c15);
    return sum ^ sum >> 29;
}

static void pack(const struct event *event, uint64_t *words)
{
    words[0] = event->time_ns;
    words[1] = event->connection;
    words[2] = event->value;
    words[3] = (uint64_t)event->slot << 32 | event->pid;
    words[4] = (uint64_t)event->reason << 8 | event->kind;
    memcpy(words + 5, event->text, sizeof event->text);
}

static void unpack(const uint64_t *words, struct event *event)
{
    event->time_ns = words[0];
    event->connection = words[1];
    event->value = words[2];
    event->slot = (uint32_t)(words[3] >> 32);
    event->pid = (uint32_t)words[3];
    event->reason = (uint8_t)(words[4] >> 8);
    event->kind = (uint8_t)words[4];
    memcpy(event->text, words + 5, sizeof event->text);
    event->text[sizeof event->text - 1] = '\0';
}

void event_note(struct slab *slab, struct event event)
{
    uint64_t words[SHM_EVENT_WORDS], ticket = SHM_ADD(event, slab->header->next_event, 1), begun = 2 * ticket + 1, sum = ticket;
    struct event_shm *cell = &slab->events[ticket % SHM_EVENTS];
    uint64_t turn = SHM_LOAD_ACQUIRE(event, cell->turn);
    event.time_ns = clock_read(CLOCK_REALTIME);
    event.pid = event.pid ? event.pid : (uint32_t)getpid();
    event.text[sizeof event.text - 1] = '\0';
    pack(&event, words);
    do
        if (turn >= begun)
            return; /* we were stopped for a whole round */
    while (!SHM_CAS_SEQ(event, cell->turn, &turn, begun));
    for (int i = 0; i < SHM_EVENT_WORDS; i++) {
        SHM_STORE(event_word, cell->words[i], words[i]);
        sum = mix(sum, words[i]);
    }
    SHM_STORE(event_word, cell->sum, sum);
    SHM_CAS_SEQ(event, cell->turn, &begun, begun + 1);
}

uint64_t event_count(const struct slab *slab) { return SHM_LOAD(event, slab->header->next_event); }

enum event_found event_read(const struct slab *slab, uint64_t number, struct event *event)
{
    struct event_shm *cell = &slab->events[number % SHM_EVENTS];
    uint64_t turn = SHM_LOAD_ACQUIRE(event, cell->turn), words[SHM_EVENT_WORDS], sum = number;
    if (turn != 2 * number + 2)
        return turn > 2 * number + 2 ? EVENT_LOST : EVENT_BEGUN;
    for (int i = 0; i < SHM_EVENT_WORDS; i++) {
        words[i] = SHM_LOAD(event_word, cell->words[i]);
        sum = mix(sum, words[i]);
    }
    if (sum != SHM_LOAD(event_word, cell->sum))
        return EVENT_LOST;
    unpack(words, event);
    return event->kind < EVENT_KINDS ? EVENT_WHOLE : EVENT_LOST;
}
