/* check.h: assertions for the tests of the core. They say where, what and with which values, then abort. */
#ifndef CHECK_H
#define CHECK_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: in %s(): not so: %s\n", __FILE__, __LINE__, __func__, #condition);                 \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#define CHECK_EQ(left, right)                                                                                          \
    do {                                                                                                               \
        int64_t check_left = (int64_t)(left), check_right = (int64_t)(right);                                          \
        if (check_left != check_right) {                                                                               \
            fprintf(stderr, "%s:%d: in %s(): %s is %" PRId64 ", not %s (%" PRId64 ")\n", __FILE__, __LINE__, __func__, \
                    #left, check_left, #right, check_right);                                                           \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Run one test and name it, so that a hang or a crash says where. */
#define RUN(test)                                                                                                      \
    do {                                                                                                               \
        printf("%s\n", #test);                                                                                         \
        fflush(stdout);                                                                                                \
        test();                                                                                                        \
    } while (0)

/* xorshift64*: the seed is printed, so that a failure can be run again. */
struct check_random {
    uint64_t state;
};

static inline uint64_t check_random(struct check_random *random)
{
    random->state ^= random->state >> 12;
    random->state ^= random->state << 25;
    random->state ^= random->state >> 27;
    return random->state * UINT64_C(0x2545f4914f6cdd1d);
}

static inline struct check_random check_seed(const char *text)
{
    struct check_random random = {text ? strtoull(text, NULL, 0) : UINT64_C(0x9e3779b97f4a7c15)};
    if (!random.state)
        random.state = 1;
    printf("seed %" PRIu64 "\n", random.state);
    fflush(stdout);
    return random;
}

#endif
