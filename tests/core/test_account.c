/* test_account.c: what a slot has had: whole to every reader, whoever dies in the middle. */
#include <pthread.h>
#include <stdatomic.h>

#include "account.h"
#include "check.h"

enum { LIVES = 300000 };

static struct account_shm row;

static struct account look(void)
{
    struct account found;
    CHECK(account_read(&row, account_lives(&row), &found));
    return found;
}

static uint64_t begun(const struct account *account)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < SHM_BUCKETS; i++)
        sum += account->begun[i];
    return sum;
}

static void clear(void) { row = (struct account_shm){0}; }

static void each_kind(void)
{
    clear();
    CHECK(look().open == SHM_BUCKETS && !account_end(&row));
    for (unsigned bucket = 0; bucket < SHM_BUCKETS; bucket++)
        for (unsigned i = 0; i <= bucket; i++) {
            account_begin(&row, bucket);
            CHECK(look().open == bucket && account_is_open(account_lives(&row)));
            CHECK_EQ(look().begun[bucket], i + 1);
            CHECK(account_end(&row) && !account_end(&row));
            CHECK(look().open == SHM_BUCKETS && !account_is_open(account_lives(&row)));
            CHECK_EQ(look().begun[bucket], i + 1);
        }
    struct account found = look();
    CHECK_EQ(begun(&found), 1 + 2 + 3 + 4 + 5);
}

/* Who died after the first step of an end is not counted twice, neither by a reader nor by who goes on. */
static void death_in_an_end(void)
{
    clear();
    account_begin(&row, 2);
    account_end(&row);
    account_begin(&row, 2);
    row.ended[2]++;
    CHECK(look().open == 2);
    CHECK_EQ(look().begun[2], 2);
    CHECK(account_end(&row));
    CHECK_EQ(row.ended[2], 2);
    CHECK(look().open == SHM_BUCKETS);
    CHECK_EQ(look().begun[2], 2);
}

/* A reader that saw another word is told so. */
static void between(void)
{
    clear();
    struct account found;
    uint64_t before = account_lives(&row);
    account_begin(&row, 1);
    CHECK(!account_read(&row, before, &found));
    before = account_lives(&row);
    account_end(&row);
    account_begin(&row, 1);
    CHECK(!account_read(&row, before, &found));
}

/* Damage: no bucket is trusted. */
static void damage(void)
{
    clear();
    for (uint64_t bucket = SHM_BUCKETS; bucket < 8; bucket++) {
        row.lives = 7 << 4 | bucket << 1 | 1;
        CHECK(look().open == SHM_BUCKETS && !account_end(&row));
    }
}

static atomic_bool over;

static void *live(void *unused)
{
    (void)unused;
    for (unsigned i = 0; i < LIVES; i++) {
        account_begin(&row, i % SHM_BUCKETS);
        CHECK(account_end(&row));
    }
    atomic_store(&over, true);
    return NULL;
}

/* What a reader is told is true of one moment: the numbers of the kinds differ by one at most, in their order, and never fall. */
static void *watch(void *unused)
{
    (void)unused;
    uint64_t last = 0;
    while (!atomic_load(&over)) {
        struct account found;
        uint64_t lives = account_lives(&row);
        if (!account_read(&row, lives, &found))
            continue;
        uint64_t sum = begun(&found);
        CHECK(sum >= last);
        last = sum;
        for (unsigned i = 0; i < SHM_BUCKETS; i++)
            CHECK_EQ(found.begun[i], (sum + SHM_BUCKETS - 1 - i) / SHM_BUCKETS);
        CHECK(found.open == SHM_BUCKETS || found.open == (sum - 1) % SHM_BUCKETS);
    }
    return NULL;
}

static void readers(void)
{
    clear();
    pthread_t threads[3];
    CHECK(!pthread_create(&threads[0], NULL, watch, NULL) && !pthread_create(&threads[1], NULL, watch, NULL));
    CHECK(!pthread_create(&threads[2], NULL, live, NULL));
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    struct account found = look();
    CHECK_EQ(begun(&found), LIVES);
}

int main(void)
{
    RUN(each_kind);
    RUN(death_in_an_end);
    RUN(between);
    RUN(damage);
    RUN(readers);
    return 0;
}
