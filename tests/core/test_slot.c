/* test_slot.c: the slot word, and the table of changes: each allowed one and each forbidden one. */
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "play.h"

/* The table of slot.h, written down a second time. Rows: from; columns: to. */
static const char *const table[SLOT_STATE_COUNT] = {
    /*                  to: -EDLICRO   (- invalid, Empty, Dialing, Leased, Idle, Checking, Retiring, Offered) */
    [SLOT_INVALID] = /*  */ "........",
    [SLOT_EMPTY] = /*    */ "..D.....",
    [SLOT_DIALING] = /*  */ ".E.L..R.",
    [SLOT_LEASED] = /*   */ "....I.RO",
    [SLOT_IDLE] = /*     */ "...L.CR.",
    [SLOT_CHECKING] = /* */ "....I.R.",
    [SLOT_RETIRING] = /* */ ".E....R.",
    [SLOT_OFFERED] = /*  */ "...LI.R.",
};

static void moves(void)
{
    CHECK_EQ(SLOT_STATE_COUNT, 8);
    for (int from = 0; from < SLOT_STATE_COUNT; from++)
        for (int to = 0; to < SLOT_STATE_COUNT; to++)
            CHECK_EQ(slot_may_move((enum slot_state)from, (enum slot_state)to), table[from][to] != '.');
    for (int from = 0; from < 16; from++)
        for (int to = SLOT_STATE_COUNT; to < 16; to++) {
            CHECK(!slot_may_move((enum slot_state)from, (enum slot_state)to));
            CHECK(!slot_may_move((enum slot_state)to, (enum slot_state)from));
        }
}

static void names(void)
{
    CHECK(!strcmp(slot_state_name(SLOT_EMPTY), "empty"));
    CHECK(!strcmp(slot_state_name(SLOT_OFFERED), "offered"));
    CHECK(!strcmp(slot_state_name((enum slot_state)0), "invalid"));
    CHECK(!strcmp(slot_state_name((enum slot_state)15), "invalid"));
}

static void words(void)
{
    const uint64_t sequences[] = {0, 1, 12345, (UINT64_C(1) << 47) - 1};
    const uint32_t owners[] = {0, 1, 4095, 4096};
    for (size_t s = 0; s < 4; s++)
        for (size_t o = 0; o < 4; o++)
            for (int state = 1; state < SLOT_STATE_COUNT; state++) {
                uint64_t word = slot_word(sequences[s], owners[o], (enum slot_state)state);
                CHECK_EQ(slot_sequence(word), sequences[s]);
                CHECK_EQ(slot_owner(word), owners[o]);
                CHECK_EQ(slot_state(word), state);
                CHECK(word != 0);
            }
    CHECK_EQ(slot_state(0), SLOT_INVALID);
    /* the sequence wraps around into nothing but itself */
    uint64_t last = slot_word((UINT64_C(1) << 47) - 1, 4096, SLOT_LEASED), next = slot_next(last, 7, SLOT_IDLE);
    CHECK_EQ(slot_sequence(next), 0);
    CHECK_EQ(slot_owner(next), 7);
    CHECK_EQ(slot_state(next), SLOT_IDLE);
}

static void move_is_a_cas(void)
{
    struct slot_shm slot = {.word = slot_word(5, 0, SLOT_IDLE)};
    uint64_t word = slot_load(&slot), stale = word;
    CHECK(slot_move(&slot, &word, 3, SLOT_LEASED));
    CHECK_EQ(word, slot_word(6, 3, SLOT_LEASED));
    CHECK_EQ(slot_load(&slot), word);
    CHECK(!slot_move(&slot, &stale, 4, SLOT_LEASED));
    CHECK_EQ(stale, slot_word(5, 0, SLOT_IDLE)); /* untouched by failure */
    CHECK_EQ(slot_load(&slot), word);
    /* back and forth: the old word never fits again */
    uint64_t lease = word;
    CHECK(slot_move(&slot, &word, 3, SLOT_IDLE));
    CHECK(slot_move(&slot, &word, 3, SLOT_LEASED));
    CHECK(word != lease);
    CHECK(!slot_move(&slot, &lease, 3, SLOT_IDLE));
}

static void move(int from, int to)
{
    struct slot_shm slot = {.word = slot_word(1, 1, (enum slot_state)from)};
    uint64_t word = slot_load(&slot);
    (void)slot_move(&slot, &word, 1, (enum slot_state)to);
}

/* A change that is not in the table ends the process, with assertions on, before anything is written. */
static void forbidden_moves_trap(void)
{
    struct rlimit no_dumps = {0, 0};
    CHECK(setrlimit(RLIMIT_CORE, &no_dumps) == 0);
    for (int from = 0; from < SLOT_STATE_COUNT; from++)
        for (int to = 1; to < SLOT_STATE_COUNT; to++) {
            fflush(stdout);
            pid_t child = fork();
            CHECK(child >= 0);
            if (!child) {
                move(from, to);
                _exit(0);
            }
            int status;
            CHECK_EQ(waitpid(child, &status, 0), child);
            if (table[from][to] != '.')
                CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
            else /* a trap; a sanitizer reports it and exits */
                CHECK(WIFSIGNALED(status) || WEXITSTATUS(status) != 0);
        }
}

int main(void)
{
    RUN(moves);
    RUN(names);
    RUN(words);
    RUN(move_is_a_cas);
    RUN(forbidden_moves_trap);
}
