/* litmus.c: the memory of weak.h, by programs whose outcomes under C11 are known.
 *
 * A program is a few threads of a few operations each. All orders of operations, and all choices of older values, are walked depth first; an
 * outcome is what the loads have read, thread after thread. The set of outcomes is asserted exactly: neither more order than C11 asks for, nor less.
 *
 * Not here: the core (interleave.c).
 */
#include "weak.h"

enum { THREADS = 4, LENGTH = 4, DEPTH = 64, OUTCOMES = 256 };

enum call { END, STORE, LOAD, ADD, FAIL /* a compare-and-swap that finds another value: a load */ };
struct step {
    enum call call;
    a64_shm *word;
    uint64_t value;
    memory_order order;
};
struct litmus {
    const char *name;
    struct step threads[THREADS][LENGTH];
    const char *outcomes; /* sorted */
};

static a64_shm x, y;
static const struct litmus *litmus;
static unsigned taken[DEPTH], width[DEPTH], depth, planned;

static unsigned choose(unsigned options)
{
    CHECK(depth < DEPTH);
    unsigned choice = depth < planned ? taken[depth] : 0;
    taken[depth] = choice;
    width[depth++] = options;
    return choice;
}

static unsigned weak_choose(const char *tag, const uint64_t *values, unsigned count)
{
    (void)tag, (void)values;
    return choose(count);
}

static bool next_plan(void)
{
    while (depth && taken[depth - 1] + 1 == width[depth - 1])
        depth--;
    if (!depth)
        return false;
    taken[depth - 1]++;
    planned = depth;
    return true;
}

/* ---- programs ---- */

/* What it has read; of a store and an addition nothing. */
static int do_step(const struct step *step)
{
    uint64_t expected = UINT64_MAX;
    switch (step->call) {
    case STORE:
        shmpool_store("litmus", step->word, 8, step->value, step->order);
        return -1;
    case LOAD:
        return (int)shmpool_load("litmus", step->word, 8, step->order);
    case ADD:
        shmpool_fetch_add("litmus", step->word, 8, step->value, step->order);
        return -1;
    case FAIL:
        CHECK(!shmpool_compare_exchange_strong("litmus", step->word, 8, &expected, 0, step->order, step->order));
        return (int)expected;
    case END:
        break;
    }
    CHECK(!"no such call");
    return -1;
}

/* One run; what was read, as text. */
static void run(char outcome[THREADS * LENGTH + 1])
{
    int read[THREADS * LENGTH];
    unsigned at[THREADS] = {0}, length = 0;
    atomic_store(&x, 0);
    atomic_store(&y, 0);
    weak_begin();
    weak_running = true;
    depth = 0;
    memset(read, -1, sizeof read);
    for (;;) {
        unsigned able[THREADS], count = 0;
        for (unsigned i = 0; i < THREADS; i++)
            if (at[i] < LENGTH && litmus->threads[i][at[i]].call != END)
                able[count++] = i;
        if (!count)
            break;
        weak_thread = able[choose(count)];
        unsigned step = at[weak_thread]++;
        read[weak_thread * LENGTH + step] = do_step(&litmus->threads[weak_thread][step]);
    }
    weak_running = false;
    for (unsigned i = 0; i < THREADS * LENGTH; i++)
        if (read[i] >= 0)
            outcome[length++] = (char)('0' + read[i]);
    outcome[length] = '\0';
}

static int compare(const void *a, const void *b) { return strcmp(a, b); }

static void walk(void)
{
    static char found[OUTCOMES][THREADS * LENGTH + 1];
    char all[OUTCOMES * (LENGTH + 2)] = "";
    unsigned count = 0, runs = 0;
    planned = 0;
    do {
        unsigned i = 0;
        CHECK(count < OUTCOMES);
        run(found[count]);
        while (strcmp(found[i], found[count]))
            i++;
        count += i == count;
        runs++;
    } while (next_plan());
    qsort(found, count, sizeof *found, compare);
    for (unsigned i = 0; i < count; i++)
        strcat(strcat(all, i ? " " : ""), found[i]);
    printf("%-28s %6u runs: %s\n", litmus->name, runs, all);
    fflush(stdout);
    if (strcmp(all, litmus->outcomes))
        fprintf(stderr, "%s: not %s\n", litmus->name, litmus->outcomes);
    CHECK(!strcmp(all, litmus->outcomes));
}

#define RELAXED memory_order_relaxed
#define ACQUIRE memory_order_acquire
#define RELEASE memory_order_release
#define ACQ_REL memory_order_acq_rel
#define SEQ_CST memory_order_seq_cst

static const struct litmus programs[] = {
    /* MP: a message and its flag */
    {"MP, relaxed", {{{STORE, &x, 1, RELAXED}, {STORE, &y, 1, RELAXED}}, {{LOAD, &y, 0, RELAXED}, {LOAD, &x, 0, RELAXED}}}, "00 01 10 11"},
    {"MP, release alone", {{{STORE, &x, 1, RELAXED}, {STORE, &y, 1, RELEASE}}, {{LOAD, &y, 0, RELAXED}, {LOAD, &x, 0, RELAXED}}}, "00 01 10 11"},
    {"MP, acquire alone", {{{STORE, &x, 1, RELAXED}, {STORE, &y, 1, RELAXED}}, {{LOAD, &y, 0, ACQUIRE}, {LOAD, &x, 0, RELAXED}}}, "00 01 10 11"},
    {"MP, release/acquire", {{{STORE, &x, 1, RELAXED}, {STORE, &y, 1, RELEASE}}, {{LOAD, &y, 0, ACQUIRE}, {LOAD, &x, 0, RELAXED}}}, "00 01 11"},
    {"MP, failed CAS acquires", {{{STORE, &x, 1, RELAXED}, {STORE, &y, 1, RELEASE}}, {{FAIL, &y, 0, ACQUIRE}, {LOAD, &x, 0, RELAXED}}}, "00 01 11"},
    {"MP, failed CAS relaxed", {{{STORE, &x, 1, RELAXED}, {STORE, &y, 1, RELEASE}}, {{FAIL, &y, 0, RELEASE}, {LOAD, &x, 0, RELAXED}}}, "00 01 10 11"},
    /* a relaxed change in between hands on what was released; a store does not */
    {"release sequence", {{{STORE, &x, 1, RELAXED}, {STORE, &y, 1, RELEASE}}, {{ADD, &y, 2, RELAXED}},
                          {{LOAD, &y, 0, ACQUIRE}, {LOAD, &x, 0, RELAXED}}}, "00 01 11 20 21 31"},
    {"release sequence, broken", {{{STORE, &x, 1, RELAXED}, {STORE, &y, 1, RELEASE}}, {{STORE, &y, 2, RELAXED}},
                                  {{LOAD, &y, 0, ACQUIRE}, {LOAD, &x, 0, RELAXED}}}, "00 01 11 20 21"},
    /* SB: each stores, then looks at the other's */
    {"SB, relaxed", {{{STORE, &x, 1, RELAXED}, {LOAD, &y, 0, RELAXED}}, {{STORE, &y, 1, RELAXED}, {LOAD, &x, 0, RELAXED}}}, "00 01 10 11"},
    {"SB, release/acquire", {{{STORE, &x, 1, RELEASE}, {LOAD, &y, 0, ACQUIRE}}, {{STORE, &y, 1, RELEASE}, {LOAD, &x, 0, ACQUIRE}}}, "00 01 10 11"},
    {"SB, changes acq_rel", {{{ADD, &x, 1, ACQ_REL}, {LOAD, &y, 0, ACQUIRE}}, {{ADD, &y, 1, ACQ_REL}, {LOAD, &x, 0, ACQUIRE}}}, "00 01 10 11"},
    {"SB, one load acquire", {{{STORE, &x, 1, SEQ_CST}, {LOAD, &y, 0, SEQ_CST}}, {{STORE, &y, 1, SEQ_CST}, {LOAD, &x, 0, ACQUIRE}}}, "00 01 10 11"},
    {"SB, seq_cst", {{{STORE, &x, 1, SEQ_CST}, {LOAD, &y, 0, SEQ_CST}}, {{STORE, &y, 1, SEQ_CST}, {LOAD, &x, 0, SEQ_CST}}}, "01 10 11"},
    {"SB, changes seq_cst", {{{ADD, &x, 1, SEQ_CST}, {LOAD, &y, 0, SEQ_CST}}, {{ADD, &y, 1, SEQ_CST}, {LOAD, &x, 0, SEQ_CST}}}, "01 10 11"},
    {"SB, failed CAS seq_cst", {{{STORE, &x, 1, SEQ_CST}, {FAIL, &y, 0, SEQ_CST}}, {{STORE, &y, 1, SEQ_CST}, {FAIL, &x, 0, SEQ_CST}}}, "01 10 11"},
    {"SB, failed CAS acq_rel", {{{STORE, &x, 1, SEQ_CST}, {FAIL, &y, 0, ACQ_REL}}, {{STORE, &y, 1, SEQ_CST}, {FAIL, &x, 0, ACQ_REL}}}, "00 01 10 11"},
    /* IRIW: do two who look see two stores in one order? */
    {"IRIW, release/acquire", {{{STORE, &x, 1, RELEASE}}, {{STORE, &y, 1, RELEASE}}, {{LOAD, &x, 0, ACQUIRE}, {LOAD, &y, 0, ACQUIRE}},
                               {{LOAD, &y, 0, ACQUIRE}, {LOAD, &x, 0, ACQUIRE}}},
     "0000 0001 0010 0011 0100 0101 0110 0111 1000 1001 1010 1011 1100 1101 1110 1111"},
    {"IRIW, seq_cst", {{{STORE, &x, 1, SEQ_CST}}, {{STORE, &y, 1, SEQ_CST}}, {{LOAD, &x, 0, SEQ_CST}, {LOAD, &y, 0, SEQ_CST}},
                       {{LOAD, &y, 0, SEQ_CST}, {LOAD, &x, 0, SEQ_CST}}},
     "0000 0001 0010 0011 0100 0101 0110 0111 1000 1001 1011 1100 1101 1110 1111"},
    /* CoRR: one word is never seen to go back; CoWR: nor behind what one has stored */
    {"CoRR, relaxed", {{{STORE, &x, 1, RELAXED}, {STORE, &x, 2, RELAXED}}, {{LOAD, &x, 0, RELAXED}, {LOAD, &x, 0, RELAXED}}}, "00 01 02 11 12 22"},
    {"CoWR, relaxed", {{{STORE, &x, 1, RELAXED}, {LOAD, &x, 0, RELAXED}}, {{STORE, &x, 2, RELAXED}}}, "1 2"},
    /* WRC: who has read passes on what he has read */
    {"WRC, relaxed", {{{STORE, &x, 1, RELAXED}}, {{LOAD, &x, 0, RELAXED}, {STORE, &y, 1, RELAXED}}, {{LOAD, &y, 0, RELAXED}, {LOAD, &x, 0, RELAXED}}},
     "000 001 010 011 100 101 110 111"},
    {"WRC, release/acquire", {{{STORE, &x, 1, RELAXED}}, {{LOAD, &x, 0, RELAXED}, {STORE, &y, 1, RELEASE}},
                              {{LOAD, &y, 0, ACQUIRE}, {LOAD, &x, 0, RELAXED}}}, "000 001 010 011 100 101 111"},
    /* where there is less order here than in C11: a store of the same thread, which does not pass on what was released before it */
    {"release sequence, own store", {{{STORE, &x, 1, RELAXED}, {STORE, &y, 1, RELEASE}, {STORE, &y, 2, RELAXED}},
                                     {{LOAD, &y, 0, ACQUIRE}, {LOAD, &x, 0, RELAXED}}}, "00 01 11 20 21"},
    /* the limit: LB, in which both read 1, is allowed by C11 when relaxed */
    {"LB, relaxed: not walked", {{{LOAD, &x, 0, RELAXED}, {STORE, &y, 1, RELAXED}}, {{LOAD, &y, 0, RELAXED}, {STORE, &x, 1, RELAXED}}}, "00 01 10"},
};

int main(void)
{
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++) {
        litmus = &programs[i];
        walk();
    }
}
