/* upstream.c: see upstream.h. */
#include "upstream.h"

#include <assert.h>
#include <string.h>

#include "events.h"
#include "stats.h"
#include "waiter.h"

const char *upstream_state_name(enum upstream_state state)
{
    static const char *const names[] = {"invalid", "unproved", "up", "down", "probing"};
    return (unsigned)state < sizeof names / sizeof *names ? names[state] : names[0];
}

static uint64_t upstream_word(uint64_t retry_ns, uint32_t step, uint32_t owner, enum upstream_state state)
{
    assert(step <= UPSTREAM_STEP_MAX && owner <= SHM_MAX_WORKERS);
    uint64_t retry_ms = (retry_ns + 999999) / 1000000; /* rounded up: never early */
    return retry_ms << UPSTREAM_RETRY_SHIFT | (uint64_t)step << UPSTREAM_STEP_SHIFT |
           (uint64_t)owner << UPSTREAM_OWNER_SHIFT | (uint64_t)state;
}

static uint64_t load(struct slab *slab) { return SHM_LOAD_SEQ(upstream, slab->header->upstream); }

enum upstream_answer upstream_ask(struct slab *slab, uint32_t owner, bool waits, uint64_t now, const struct upstream_backoff *backoff,
                                  uint64_t *seen)
{
    uint64_t word = load(slab), next;
    do {
        bool due = now >= upstream_retry_ns(word);
        switch (upstream_state(word)) {
        case UPSTREAM_UP:
            *seen = word;
            return UPSTREAM_GO;
        case UPSTREAM_UNPROVED:
            if (!due && waits)
                return UPSTREAM_WAIT;
            next = upstream_word(now + UPSTREAM_GRACE_NS, upstream_step(word), 0, UPSTREAM_UNPROVED);
            break;
        case UPSTREAM_DOWN:
        case UPSTREAM_PROBING:
            if (!due)
                return UPSTREAM_NO;
            next = upstream_word(now + backoff->patience_ns, upstream_step(word), owner, UPSTREAM_PROBING);
            break;
        default: /* damage: find out */
            next = upstream_word(now + UPSTREAM_GRACE_NS, 0, 0, UPSTREAM_UNPROVED);
        }
    } while (!SHM_CAS_SEQ(upstream, slab->header->upstream, &word, next));
    *seen = next;
    return UPSTREAM_GO;
}

uint64_t upstream_left(struct slab *slab, uint64_t now)
{
    uint64_t word = load(slab), retry = upstream_retry_ns(word);
    return upstream_state(word) != UPSTREAM_UP && retry > now ? retry - now : 0;
}

static uint64_t step_ns(const struct upstream_backoff *backoff, uint32_t step, uint32_t random)
{
    uint64_t length = backoff->first_ns;
    while (--step && length < backoff->last_ns)
        length *= 2;
    if (length > backoff->last_ns)
        length = backoff->last_ns;
    return length - length / 4 * (random % 256) / 256;
}

static void note_error(struct slab *slab, const char *text)
{
    uint64_t words[SHM_ERROR_BYTES / 8] = {0};
    memcpy(words, text, strnlen(text, SHM_ERROR_BYTES - 1));
    for (int i = 0; i < SHM_ERROR_BYTES / 8; i++)
        SHM_STORE(hint, slab->header->upstream_error[i], words[i]);
}

void upstream_error(struct slab *slab, char *text)
{
    uint64_t words[SHM_ERROR_BYTES / 8];
    for (int i = 0; i < SHM_ERROR_BYTES / 8; i++)
        words[i] = SHM_LOAD(hint, slab->header->upstream_error[i]);
    memcpy(text, words, SHM_ERROR_BYTES);
    text[SHM_ERROR_BYTES - 1] = '\0';
}

bool upstream_failed(struct slab *slab, uint64_t seen, uint64_t now, const struct upstream_backoff *backoff, uint32_t random,
                     const char *text)
{
    uint64_t word = load(slab), next;
    do {
        if (upstream_is_down(word) && word != seen)
            return false; /* another dial has said so since this one began */
        uint32_t step = upstream_is_down(word) ? upstream_step(word) + 1 : 1;
        step = step > UPSTREAM_STEP_MAX ? UPSTREAM_STEP_MAX : step;
        next = upstream_word(now + step_ns(backoff, step, random), step, 0, UPSTREAM_DOWN);
        if (step == 1)
            SHM_STORE(hint, slab->header->upstream_since_ns, now);
        note_error(slab, text); /* before it can be read */
    } while (!SHM_CAS_SEQ(upstream, slab->header->upstream, &word, next));
    SHM_ADD(hint, slab->header->upstream_failures, 1);
    struct event event = {.kind = upstream_is_down(word) ? EVENT_dial_failed : EVENT_down, .slot = EVENT_NO_SLOT};
    memcpy(event.text, text, strnlen(text, sizeof event.text - 1));
    event_note(slab, event);
    return !upstream_is_down(word);
}

bool upstream_proved(struct slab *slab)
{
    uint64_t word = load(slab);
    while (upstream_state(word) != UPSTREAM_UP)
        if (SHM_CAS_SEQ(upstream, slab->header->upstream, &word, UPSTREAM_UP)) {
            waiter_wake_all(slab); /* those who waited for this dial to find out */
            if (upstream_is_down(word))
                event_note(slab, (struct event){.kind = EVENT_up, .slot = EVENT_NO_SLOT,
                                                .value = clock_now() - SHM_LOAD(hint, slab->header->upstream_since_ns)});
            return upstream_is_down(word);
        }
    return false;
}

void upstream_untried(struct slab *slab, uint64_t seen, uint64_t now)
{
    uint64_t word = seen, next;
    if (upstream_state(seen) == UPSTREAM_UP)
        return;
    bool probed = upstream_state(seen) == UPSTREAM_PROBING;
    next = upstream_word(now, upstream_step(seen), 0, probed ? UPSTREAM_DOWN : UPSTREAM_UNPROVED);
    SHM_CAS_SEQ(upstream, slab->header->upstream, &word, next);
}

void upstream_doubt(struct slab *slab, uint64_t seen, uint64_t now)
{
    if (upstream_state(seen) == UPSTREAM_PROBING) {
        upstream_untried(slab, seen, now);
        return;
    }
    uint64_t word = load(slab);
    while (!upstream_is_down(word) && !upstream_wants_verdict(word))
        if (SHM_CAS_SEQ(upstream, slab->header->upstream, &word, upstream_word(now, 1, 0, UPSTREAM_UNPROVED)))
            return;
}

void upstream_suspect(struct slab *slab)
{
    uint64_t word = UPSTREAM_UP;
    SHM_CAS_SEQ(upstream, slab->header->upstream, &word, UPSTREAM_UNPROVED);
}

void upstream_forget(struct slab *slab, uint32_t dead, uint64_t now)
{
    uint64_t word = load(slab);
    if (upstream_state(word) == UPSTREAM_PROBING && upstream_owner(word) == dead)
        upstream_untried(slab, word, now);
}
