/* slot.c: the table of slot.h as data: names, and which changes exist. */
#include "slot.h"

#include <assert.h>

#define SHM_SLOT_STATE_NAME(name, text) [SLOT_##name] = text,
static const char *const state_names[SLOT_STATE_COUNT] = {[SLOT_INVALID] = "invalid",
                                                          SHM_SLOT_STATES(SHM_SLOT_STATE_NAME)};

#define TO(state) (1u << SLOT_##state)
static const uint16_t moves[SLOT_STATE_COUNT] = {
    [SLOT_EMPTY] = TO(DIALING),
    [SLOT_DIALING] = TO(LEASED) | TO(EMPTY) | TO(RETIRING),
    [SLOT_LEASED] = TO(IDLE) | TO(OFFERED) | TO(RETIRING),
    [SLOT_IDLE] = TO(LEASED) | TO(CHECKING) | TO(RETIRING),
    [SLOT_CHECKING] = TO(IDLE) | TO(RETIRING),
    [SLOT_OFFERED] = TO(LEASED) | TO(IDLE) | TO(RETIRING),
    [SLOT_RETIRING] = TO(EMPTY) | TO(RETIRING),
};

bool slot_may_move(enum slot_state from, enum slot_state to)
{
    return (unsigned)from < SLOT_STATE_COUNT && (unsigned)to < SLOT_STATE_COUNT && (moves[from] >> to & 1u);
}

const char *slot_state_name(enum slot_state state)
{
    assert((unsigned)SLOT_STATE_COUNT == sizeof state_names / sizeof state_names[0]);
    return (unsigned)state < SLOT_STATE_COUNT ? state_names[state] : "invalid";
}
