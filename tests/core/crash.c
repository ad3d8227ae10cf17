/* crash.c: a worker ends, or stops for ever, at every step of every operation; the others go on and nothing is lost.
 *
 * For each operation, for k = 1, 2, 3, ... until the operation is done before its k-th step: a forked child does it and ends (by
 * exit, by SIGKILL in turn) or stops (SIGSTOP) at the k-th step.
 *   ended    a survivor recovers: twice is once, every slot can be leased once, no place in queue or table is lost. For each
 *            state of the slab that was not seen before the recovery itself is ended at each step j, and then done by another.
 *   stopped  whatever is idle, empty or offered is had by others, who never wait for the stopped one; it is then killed, and as above.
 * What was left half done (a pause, a smaller cap) is done again by a survivor, and is then whole.
 *
 *   killed   on the code as it is shipped, without hooks, run an instruction at a time (ptrace): the child is killed right after the k-th instruction that
 *            changed the slab or entered the kernel; a survivor recovers, as above. Between two such instructions nobody can see how far it was. What is
 *            only counted (totals, histograms, events) is not looked at.
 *   twice    as killed; and for each state of the slab that was not seen before, the recovery itself is killed so, after each j-th of its instructions
 *            that leave a trace, and then done by another.
 *
 *   crash [OPERATION|all|I/N] [ended|stopped|killed|twice|both]     I/N: the operations I, I + N, I + 2N, ...; both: ended and stopped
 *
 * The clock is a stand-in that can be put forward, so nobody waits for time to pass.
 */
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>

#include "play.h"

#define HOUR_NS (UINT64_C(3600) * 1000 * PLAY_MS)
enum { SLOTS = 3, WORKERS = 6, WAITERS = 3, SEEN = 1 << 16 };

/* ---- steps ---- */

static unsigned armed, steps; /* end at this step, 0: never */
static int ending;            /* 0: by exit, else by this signal */

void shmpool_hook(const char *tag)
{
    if (!armed || !strcmp(tag, "private") || ++steps != armed)
        return;
    if (!ending)
        _exit(77);
    armed = 0;
    raise(ending);
}

static uint64_t put_forward_ns;
int stand_in_clock_gettime(clockid_t clock, struct timespec *time);
int stand_in_clock_gettime(clockid_t clock, struct timespec *time)
{
    extern int clock_gettime_of_libc(clockid_t, struct timespec *) __asm__("clock_gettime");
    int result = clock_gettime_of_libc(clock, time);
    uint64_t ns = (uint64_t)time->tv_sec * 1000000000 + (uint64_t)time->tv_nsec + put_forward_ns;
    *time = (struct timespec){(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    return result;
}

/* ---- operations ---- */

static struct pool *pool;  /* of the child, and the survivor's own before the fork */
static struct pool *third; /* somebody else who is alive */
static struct pool *dead;  /* somebody who has died */

struct operation {
    const char *name;
    void (*prepare)(void); /* by the survivor, before the fork */
    void (*begin)(void);   /* by the child, registered, before steps count */
    void (*act)(void);     /* the steps that count */
    void (*again)(void);   /* by the survivor, after the recovery; may be NULL */
};

static struct pool_claim mine, thirds;
static struct waiter_place place;

static void nothing(void) {}
static void registered(void) { CHECK_EQ(pool_join(pool), POOL_OK); }

static void all_idle(void)
{
    struct pool_claim claims[SLOTS];
    for (int i = 0; i < SLOTS; i++)
        claims[i] = play_lease(third);
    for (int i = 0; i < SLOTS; i++)
        CHECK_EQ(play_release(third, &claims[i]), RELEASED);
}

static void one_empty_leased_by_third(void)
{
    struct pool_claim claims[SLOTS];
    for (int i = 0; i < SLOTS; i++)
        claims[i] = play_lease(third);
    CHECK_EQ(play_release(third, &claims[0]), RELEASED);
}

static void third_waits_long(void)
{
    all_idle();
    place = (struct waiter_place){0};
    CHECK(waiter_enter(&third->slab, &place, third->worker, PLAY_ANY, 1, clock_now() - 1000 * PLAY_MS));
}

static void third_waits_briefly(void)
{
    all_idle();
    place = (struct waiter_place){0};
    CHECK(waiter_enter(&third->slab, &place, third->worker, PLAY_ANY, 1, clock_now() + 1000 * PLAY_MS));
}

static void somebody_died(void)
{
    struct waiter_place its = {0};
    struct pool_claim claim = play_lease(third);
    play_lease(dead);
    CHECK(waiter_enter(&dead->slab, &its, dead->worker, PLAY_ANY, 1, clock_now() - 1000 * PLAY_MS));
    CHECK_EQ(play_release(third, &claim), RELEASED); /* offered to it */
    CHECK(pool_take_empty(dead, &claim));
    play_die(dead);
}

/* A dial has failed, and the time of the next has come. */
static void server_is_down(void)
{
    CHECK_EQ(pool_take_dial(third, true, &thirds), TAKEN_DIAL);
    play_fail_dial(third, &thirds);
    put_forward_ns += PLAY_LAST_STEP_NS;
}

static void third_dials_for_nobody(void)
{
    CHECK_EQ(pool_take_dial(third, true, &thirds), TAKEN_DIAL);
    pool_announce_dial(third, &thirds, PLAY_ANY, true);
}

static void third_holds_all(void)
{
    for (int i = 0; i < SLOTS; i++)
        thirds = play_lease(third);
}

static void all_idle_for_long(void)
{
    all_idle();
    put_forward_ns += 1000 * PLAY_MS;
}

/* Some are leased and some idle, on both sides of what the cap will be. */
static void half_leased_by_third(void)
{
    struct pool_claim claims[SLOTS];
    for (int i = 0; i < SLOTS; i++)
        claims[i] = play_lease(third);
    CHECK_EQ(play_release(third, &claims[0]), RELEASED);
    CHECK_EQ(play_release(third, &claims[SLOTS - 1]), RELEASED);
}

static void small_and_leased_by_third(void)
{
    third_holds_all();
    steering_resize(&pool->slab, 1);
}

static void is_paused(void)
{
    third_waits_briefly();
    CHECK(steering_state(&pool->slab, SHM_POOL_PAUSED));
    atomic_store(&pool->slab.waiters[place.cell].futex, WAITER_ASLEEP);
}

static void holds_one(void)
{
    registered();
    mine = play_lease(pool);
}

static void holds_all(void)
{
    registered();
    for (int i = 0; i < SLOTS; i++)
        mine = play_lease(pool);
}

static void queued(void)
{
    holds_one(); /* of the three; the others go to nobody */
    CHECK_EQ(play_release(pool, &mine), RELEASED);
    place = (struct waiter_place){0};
    CHECK(waiter_enter(&pool->slab, &place, pool->worker, PLAY_ANY, 1, clock_now()));
}

/* In the queue, with a promise: kept (the slot is OFFERED), or not. */
static void promised(void)
{
    queued();
    struct pool_claim claim = play_lease(third);
    put_forward_ns += 2 * WAITER_HANDOVER_AFTER_NS;
    CHECK_EQ(play_release(third, &claim), RELEASED);
    CHECK(waiter_promised(&pool->slab, &place) >= 0);
}

static void promised_in_vain(void)
{
    queued();
    uint64_t word = atomic_load(&pool->slab.waiter_words[place.cell]);
    atomic_store(&pool->slab.waiter_words[place.cell], (word & ~UINT64_C(3)) | WAITER_MATCHED);
}

static void has_private(void)
{
    registered();
    CHECK(pool_take_empty(pool, &mine));
    CHECK(play_install_as(pool, &mine, (struct pool_birth){.flags = SHM_KIND_PRIVATE, .expires_ns = PLAY_NEVER}, NULL));
    CHECK_EQ(play_release(pool, &mine), RELEASED);
}

static void act_take(void) { mine = play_lease(pool); }
static void act_dial_and_abandon(void)
{
    int ends[2];
    CHECK(pool_take_empty(pool, &mine));
    uint64_t id = pool_name_connection(pool, &mine);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    CHECK_EQ(mailbox_deposit(pool->mailboxes[mine.slot], pool->slab.header->id, mine.slot, id, ends[0], NULL, 0), 0);
    pool_abandon(pool, &mine);
    close(ends[0]);
    close(ends[1]);
}
static void act_take_dead_or_alive(void) { play_try(pool, &mine); }
static void act_release(void) { CHECK_EQ(play_release(pool, &mine), RELEASED); }
static void act_retire(void)
{
    CHECK(pool_condemn(pool, &mine));
    play_retire(pool, &mine, SHM_T_closed_error);
}
static void act_enter_and_leave(void)
{
    place = (struct waiter_place){0};
    CHECK(waiter_enter(&pool->slab, &place, pool->worker, PLAY_ANY, 1, clock_now()));
    waiter_prepare(&pool->slab, &place);
    play_leave_queue(pool, &place);
}
static void act_leave_queue(void) { play_leave_queue(pool, &place); }
static void act_claim_promise(void)
{
    CHECK_EQ(play_take(pool, PLAY_ANY, &place, &mine), TAKEN_LEASED);
    play_leave_queue(pool, &place);
}
static void act_rematch(void)
{
    pool_return_promise(pool, waiter_rematch(&pool->slab, &place));
    waiter_prepare(&pool->slab, &place);
}
static void act_expired_offer(void)
{
    put_forward_ns += 2 * WAITER_OFFER_TTL_NS;
    for (int i = 0; i < SLOTS; i++)
        play_try(pool, &mine);
}
static void act_recover(void) { recovery_run(pool, true); }
static void act_register(void) { registered(); }
static void act_leave(void) { pool_leave(pool); }
static void act_close(void)
{
    pool_shut(pool);
    while (play_take_idle(pool, &mine))
        play_retire(pool, &mine, SHM_T_closed_shutdown);
}
static void dial(void)
{
    CHECK_EQ(pool_take_dial(pool, true, &mine), TAKEN_DIAL);
    pool_announce_dial(pool, &mine, PLAY_ANY, false);
}
static void act_dial_fails(void)
{
    dial();
    pool_name_connection(pool, &mine);
    play_fail_dial(pool, &mine);
}
static void act_dial_interrupted(void)
{
    dial();
    upstream_untried(&pool->slab, mine.upstream, clock_now());
    pool_abandon(pool, &mine);
}
static void act_dial_succeeds(void)
{
    dial();
    CHECK(play_install(pool, &mine));
    CHECK_EQ(play_release(pool, &mine), RELEASED);
}
/* A dial goes on, and its caller leaves the queue before it is done. */
static void act_orphan(void)
{
    dial();
    place = (struct waiter_place){.dialling = true};
    CHECK(waiter_enter(&pool->slab, &place, pool->worker, PLAY_ANY, 1, clock_now()));
    pool_orphan_dial(pool, &mine);
    play_leave_queue(pool, &place);
    CHECK(play_install(pool, &mine));
    CHECK_EQ(play_release(pool, &mine), RELEASED);
}
static void act_adopt(void)
{
    place = (struct waiter_place){0};
    CHECK_EQ(play_take(pool, PLAY_ANY, &place, &mine), TAKEN_ADOPTED);
    place.dialling = true;
    CHECK(waiter_enter(&pool->slab, &place, pool->worker, PLAY_ANY, 1, clock_now()));
    pool_orphan_dial(pool, &mine);
    play_leave_queue(pool, &place);
}
static void act_check_well(void)
{
    for (uint32_t from = 0; pool_begin_check(pool, &from, PLAY_MS, false, &mine);)
        CHECK(pool_end_check(pool, &mine));
}
static void act_check_ill(void)
{
    for (uint32_t from = 0; pool_begin_check(pool, &from, PLAY_MS, false, &mine);) {
        CHECK(pool_condemn(pool, &mine));
        play_retire(pool, &mine, SHM_T_closed_unhealthy);
    }
}
static void act_revoke(void)
{
    mine = thirds;
    CHECK(pool_condemn(pool, &mine));
    play_retire(pool, &mine, SHM_T_closed_revoked);
}
static void act_shrink(void) { steering_resize(&pool->slab, 1); }
static void act_grow(void) { steering_resize(&pool->slab, SLOTS); }
static void act_evict(void) { steering_evict(&pool->slab, 0, "", 0, true); }
static void act_pause(void) { steering_state(&pool->slab, SHM_POOL_PAUSED); }
static void act_resume(void) { steering_state(&pool->slab, SHM_POOL_OPEN); }
static void act_drain(void)
{
    steering_state(&pool->slab, SHM_POOL_DRAINING);
    while (play_take_idle(pool, &mine))
        play_retire(pool, &mine, SHM_T_closed_shutdown);
}
static void act_maintain(void)
{
    CHECK(pool_be_maintainer(pool));
    pool_resign(pool);
    CHECK(pool_be_maintainer(pool));
}

/* ---- and again, by the survivor ---- */

static void third_ends_its_dial(void)
{
    CHECK(play_install(third, &thirds));
    CHECK_EQ(play_release(third, &thirds), RELEASED);
}
/* Its lease may be gone; it knows nothing of that. */
static void third_returns(void) { play_release(third, &thirds); }

static void resume_again(void)
{
    act_resume();
    CHECK(pool_is_plain(pool));
    CHECK(!place.queued || atomic_load(&pool->slab.waiters[place.cell].futex) == WAITER_WOKEN);
}
static void pause_again(void)
{
    struct pool_claim claim;
    act_pause();
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_PAUSED);
    resume_again();
}
static void drain_again(void)
{
    struct pool_claim claim;
    act_drain();
    CHECK_EQ(play_take(pool, PLAY_ANY, NULL, &claim), TAKEN_DRAINING);
    resume_again();
}
static void close_again(void)
{
    pool_shut(pool);
    CHECK(!pool_is_open(pool));
}
/* What is idle beyond the cap ends where it is met; what is leased there, at its return. */
static void shrink_again(void)
{
    struct pool_claim claim;
    act_shrink();
    pool_leave(third);
    while (play_try(pool, &claim) && claim.slot)
        CHECK_EQ(play_release(pool, &claim), RELEASE_RETIRE);
    CHECK_EQ(play_release(pool, &claim), RELEASED);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), SLOTS - 1);
}
static void grow_again(void)
{
    act_grow();
    CHECK_EQ(steering_cap(&pool->slab), SLOTS);
}
static void maintain_again(void)
{
    CHECK(pool_be_maintainer(pool));
    CHECK(!pool_be_maintainer(third));
    pool_resign(pool);
    CHECK(pool_be_maintainer(third));
}

static void act_everything(void)
{
    act_register();
    for (int i = 0; i < 2; i++) {
        act_take();
        act_release();
    }
    act_take();
    act_retire();
    act_leave();
}

static const struct operation operations[] = {
    {"take-cached", nothing, queued, act_take, NULL},
    {"take-listed-or-steal", all_idle, registered, act_take, NULL},
    {"dial", nothing, registered, act_take, NULL},
    {"dial-and-abandon", nothing, registered, act_dial_and_abandon, NULL},
    {"take-the-last", one_empty_leased_by_third, registered, act_take_dead_or_alive, NULL},
    {"release", nothing, holds_one, act_release, NULL},
    {"release-handover", third_waits_long, holds_one, act_release, NULL},
    {"release-wake", third_waits_briefly, holds_one, act_release, NULL},
    {"retire", all_idle, holds_one, act_retire, NULL},
    {"retire-of-all", third_waits_long, holds_all, act_retire, NULL},
    {"enter-and-leave", nothing, registered, act_enter_and_leave, NULL},
    {"leave-queue-promised", all_idle, promised, act_leave_queue, NULL},
    {"claim-promise", all_idle, promised, act_claim_promise, NULL},
    {"rematch", all_idle, promised, act_rematch, NULL},
    {"rematch-in-vain", all_idle, promised_in_vain, act_rematch, NULL},
    {"take-expired-offer", somebody_died, registered, act_expired_offer, NULL},
    {"recover", somebody_died, registered, act_recover, NULL},
    {"register", nothing, nothing, act_register, NULL},
    {"register-on-the-dead", somebody_died, nothing, act_register, NULL},
    {"leave", third_waits_long, holds_all, act_leave, NULL},
    {"leave-private", nothing, has_private, act_leave, NULL},
    {"close", third_waits_long, holds_one, act_close, close_again},
    {"everything", nothing, nothing, act_everything, NULL},
    {"dial-fails", nothing, registered, act_dial_fails, NULL},
    {"dial-interrupted", nothing, registered, act_dial_interrupted, NULL},
    {"probe-succeeds", server_is_down, registered, act_dial_succeeds, NULL},
    {"probe-fails", server_is_down, registered, act_dial_fails, NULL},
    {"probe-interrupted", server_is_down, registered, act_dial_interrupted, NULL},
    {"orphan", nothing, registered, act_orphan, NULL},
    {"adopt", third_dials_for_nobody, registered, act_adopt, third_ends_its_dial},
    {"check-well", all_idle_for_long, registered, act_check_well, NULL},
    {"check-ill", all_idle_for_long, registered, act_check_ill, NULL},
    {"revoke", third_holds_all, registered, act_revoke, third_returns},
    {"shrink", half_leased_by_third, registered, act_shrink, shrink_again},
    {"grow", small_and_leased_by_third, registered, act_grow, grow_again},
    {"evict", half_leased_by_third, registered, act_evict, NULL},
    {"pause", third_waits_briefly, registered, act_pause, pause_again},
    {"resume", is_paused, registered, act_resume, resume_again},
    {"drain", half_leased_by_third, registered, act_drain, drain_again},
    {"maintain", nothing, registered, act_maintain, maintain_again},
};

/* ---- what is left ---- */

static const struct operation *operation;

/* `patience_ns`: how long a prober is waited for that may be dead. */
static void begin(uint64_t patience_ns)
{
    put_forward_ns = 0;
    pool = play_found(SLOTS, WORKERS, WAITERS, 1);
    pool->options.backoff.patience_ns = patience_ns;
    third = play_join(pool);
    dead = play_join(pool);
    operation->prepare();
}

static void finish(void)
{
    play_end(dead);
    play_end(third);
    play_end(pool);
}

/* A child does `act` after `first`, and ends at step k. Returns its wait status. */
static int child(void (*first)(void), void (*act)(void), unsigned k, int by, pid_t *left_stopped)
{
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        first();
        steps = 0;
        ending = by;
        armed = k;
        act();
        armed = 0;
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, WUNTRACED), pid);
    if (left_stopped)
        *left_stopped = WIFSTOPPED(status) ? pid : 0;
    return status;
}

/* ---- an instruction at a time ---- */

/* What others act upon, copied out of the slab. */
struct seen {
    uint8_t steered[512];
    struct slot_shm slots[SLOTS];
    struct account_shm accounts[SLOTS];
    uint64_t waiters[WAITERS], bitmaps[SHM_BITMAPS * 8];
    struct waiter_shm cells[WAITERS];
    uint8_t workers[WORKERS][64];
};

static void see(struct seen *seen)
{
    struct slab *slab = &pool->slab;
    memset(seen, 0, sizeof *seen);
    memcpy(seen->steered, (uint8_t *)slab->header + SHM_HEADER_BYTES - sizeof seen->steered, sizeof seen->steered);
    memcpy(seen->slots, slab->slots, sizeof seen->slots);
    memcpy(seen->accounts, slab->accounts, sizeof seen->accounts);
    memcpy(seen->waiters, slab->waiter_words, sizeof seen->waiters);
    memcpy(seen->bitmaps, slab->bitmaps, SHM_BITMAPS * slab->layout.bitmap_words * sizeof(uint64_t));
    memcpy(seen->cells, slab->waiters, sizeof seen->cells);
    for (int i = 0; i < WORKERS; i++)
        memcpy(seen->workers[i], &slab->workers[i], sizeof seen->workers[i]);
}

static bool enters_the_kernel(pid_t pid)
{
#ifdef __x86_64__
    struct user_regs_struct registers;
    CHECK(ptrace(PTRACE_GETREGS, pid, NULL, &registers) == 0);
    long text = ptrace(PTRACE_PEEKTEXT, pid, (void *)registers.rip, NULL);
    return (text & 0xffff) == 0x050f; /* syscall */
#else
    (void)pid;
    return true; /* any may: it is killed after every instruction */
#endif
}

static uint64_t instructions;

/* A child does `act` after `first`, an instruction at a time, and is killed after the k-th that leaves a trace. False: it was done before. */
static bool killed_after(void (*first)(void), void (*act)(void), unsigned k)
{
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        first();
        CHECK(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0);
        raise(SIGSTOP);
        act();
        raise(SIGUSR1);
        _exit(1);
    }
    int status;
    static struct seen before, after;
    CHECK(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
    see(&before);
    bool done = false;
    for (unsigned traces = 0; traces < k && !done;) {
        bool called = enters_the_kernel(pid);
        CHECK(ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) == 0 && waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
        done = WSTOPSIG(status) == SIGUSR1;
        CHECK(done || WSTOPSIG(status) == SIGTRAP);
        instructions++;
        see(&after);
        if (called || memcmp(&before, &after, sizeof before)) {
            traces++;
            before = after;
        }
    }
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
    return !done;
}

static bool was_done(int status) { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }

static void check_status(unsigned k, int status)
{
    if (was_done(status) || (WIFEXITED(status) && WEXITSTATUS(status) == 77) || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) ||
        WIFSTOPPED(status))
        return;
    fprintf(stderr, "crash: %s at step %u: the child ended with status %#x\n", operation->name, k, status);
    abort();
}

/* Everybody who waits gives up; then nothing is missing. */
static void check_whole(void)
{
    put_forward_ns += 1000 * PLAY_MS;
    recovery_run(pool, true);
    uint64_t words[SLOTS];
    for (uint32_t i = 0; i < SLOTS; i++)
        words[i] = play_word(pool, i);
    CHECK_EQ(recovery_run(pool, true), 0);
    for (uint32_t i = 0; i < SLOTS; i++)
        CHECK_EQ(play_word(pool, i), words[i]);
    put_forward_ns += PLAY_MS; /* the time of the next dial is one of whole milliseconds */
    if (operation->again)
        operation->again();
    if (third->worker && place.queued && place.owner == third->worker)
        play_leave_queue(third, &place);
    play_check_queue_empty(pool);
    play_check_accounts(pool, 2); /* who died, and who died over recovering it */
    pool_leave(third);
    bool dead_is_alive = atomic_load(&dead->seat->fd) >= 0;
    if (dead_is_alive)
        pool_leave(dead);
    play_check_workers(pool, 1);
    if (pool_is_open(pool)) {
        play_lease_all(pool);
        return;
    }
    struct pool_claim claim;
    while (play_take_idle(pool, &claim))
        play_retire(pool, &claim, SHM_T_closed_shutdown);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), SLOTS);
}

/* Whoever has died, and wherever: the mailbox of an empty slot has no letter. */
static void check_mailboxes(void)
{
    char byte;
    for (uint32_t i = 0; i < SLOTS; i++)
        if (play_state(pool, i) == SLOT_EMPTY)
            CHECK(recv(pool->mailboxes[i], &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN);
}

/* A sum over all that recovery reads: equal sums, equal recoveries. */
static uint64_t fingerprint(void)
{
    uint64_t sum = 14695981039346656037u;
    struct slab *slab = &pool->slab;
#define MIX(value) (sum = (sum ^ (uint64_t)(value)) * 1099511628211u)
    for (uint32_t i = 0; i < SLOTS; i++) {
        MIX(slab->slots[i].word & ((1 << SLOT_SEQUENCE_SHIFT) - 1));
        MIX(slab->slots[i].kind);
        MIX(slab->slots[i].connection != 0);
        MIX(slab->accounts[i].lives & 1);
        MIX(slab->accounts[i].ended[0] + slab->accounts[i].ended[3] - (slab->accounts[i].lives >> 4));
        MIX(slab->slots[i].mark == slab->slots[i].word);
    }
    for (uint32_t i = 0; i < WAITERS; i++)
        MIX(slab->waiter_words[i] & ((UINT64_C(1) << WAITER_TICKET_SHIFT) - 1));
    for (uint32_t i = 0; i < WORKERS; i++)
        MIX(slab->workers[i].state);
    for (uint32_t i = 0; i < SHM_BITMAPS * slab->layout.bitmap_words; i++)
        MIX(slab->bitmaps[i]);
    MIX(slab->header->summary);
    MIX(slab->header->cap);
    MIX(slab->header->upstream & ((1 << UPSTREAM_RETRY_SHIFT) - 1));
    return sum;
}

static uint64_t seen[SEEN];
static bool is_new(uint64_t sum)
{
    size_t at = sum % SEEN;
    while (seen[at] && seen[at] != sum)
        at = (at + 1) % SEEN;
    bool fresh = !seen[at];
    seen[at] = sum;
    return fresh;
}

/* Idle or offered, and not condemned. */
static unsigned count_kept(void)
{
    unsigned kept = 0;
    for (uint32_t i = 0; i < SLOTS; i++)
        kept += (play_state(pool, i) == SLOT_IDLE || play_state(pool, i) == SLOT_OFFERED) &&
                pool->slab.slots[i].expires_ns > clock_now();
    return kept;
}

/* What others can have while one is stopped: all that is idle, empty or offered. */
static void check_others_go_on(void)
{
    struct pool_claim claims[SLOTS];
    unsigned reachable, got = 0, cap = steering_cap(&pool->slab), used = SLOTS - play_count(pool, SLOT_EMPTY);
    steering_state(&pool->slab, SHM_POOL_OPEN);
    if (!pool_is_open(pool))
        return;
    reachable = count_kept() + (used < cap ? cap - used : 0);
    put_forward_ns += 1000 * PLAY_MS;
    while (got < SLOTS && play_try(pool, &claims[got]))
        got++;
    CHECK(got >= reachable);
    for (unsigned i = 0; i < got; i++)
        CHECK(play_release(pool, &claims[i]) != RELEASE_STALE);
}

static unsigned end_at_each_step(void)
{
    unsigned runs = 0;
    memset(seen, 0, sizeof seen);
    for (unsigned k = 1;; k++) {
        begin(HOUR_NS);
        int by = k % 2 ? 0 : SIGKILL, status = child(operation->begin, operation->act, k, by, NULL);
        check_status(k, status);
        check_mailboxes();
        bool fresh = !was_done(status) && is_new(fingerprint());
        check_whole();
        finish();
        runs++;
        for (unsigned j = 1; fresh; j++) { /* once more for each j, with a recovery that ends there */
            begin(HOUR_NS);
            child(operation->begin, operation->act, k, by, NULL);
            int recovered = child(registered, act_recover, j, j % 2 ? 0 : SIGKILL, NULL);
            check_status(k, recovered);
            check_whole();
            finish();
            runs++;
            if (was_done(recovered))
                break;
        }
        if (was_done(status))
            return runs;
    }
}

static unsigned stop_at_each_step(void)
{
    for (unsigned k = 1;; k++) {
        pid_t stopped;
        begin(PLAY_PATIENCE_NS);
        int status = child(operation->begin, operation->act, k, SIGSTOP, &stopped);
        check_status(k, status);
        check_others_go_on();
        if (stopped) {
            CHECK(kill(stopped, SIGKILL) == 0);
            CHECK_EQ(waitpid(stopped, NULL, 0), stopped);
        }
        check_whole();
        finish();
        if (was_done(status))
            return k;
    }
}

/* How many instructions of the recovery left a trace. */
static unsigned kill_the_recovery(unsigned k)
{
    for (unsigned j = 1;; j++) {
        begin(HOUR_NS);
        CHECK(killed_after(operation->begin, operation->act, k));
        bool killed = killed_after(registered, act_recover, j);
        check_whole();
        finish();
        if (!killed)
            return j - 1;
    }
}

static unsigned kill_at_each_instruction(bool twice)
{
    unsigned recoveries = 0;
    memset(seen, 0, sizeof seen);
    for (unsigned k = 1;; k++) {
        begin(HOUR_NS);
        bool killed = killed_after(operation->begin, operation->act, k), fresh = killed && is_new(fingerprint());
        check_whole();
        finish();
        if (!killed) {
            if (twice)
                printf(" recovery killed after %u;", recoveries);
            return k - 1;
        }
        if (twice && fresh)
            recoveries += kill_the_recovery(k);
    }
}

int main(int argc, char **argv)
{
    const char *wanted = argc > 1 ? argv[1] : "all", *how = argc > 2 ? argv[2] : "both";
    bool any = false;
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) {
        unsigned part, parts;
        bool by_part = sscanf(wanted, "%u/%u", &part, &parts) == 2;
        if (by_part ? i % parts != part : strcmp(wanted, "all") && strcmp(wanted, operations[i].name))
            continue;
        any = true;
        operation = &operations[i];
        printf("%-22s", operation->name);
        fflush(stdout);
        if (!strcmp(how, "killed") || !strcmp(how, "twice")) {
            instructions = 0;
            unsigned traces = kill_at_each_instruction(!strcmp(how, "twice"));
            printf(" killed after %u of its traces, %" PRIu64 " instructions\n", traces, instructions);
            continue;
        }
        if (strcmp(how, "stopped"))
            printf(" ended in %u runs", end_at_each_step());
        fflush(stdout);
        if (strcmp(how, "ended"))
            printf(" stopped at %u steps", stop_at_each_step() - 1);
        printf("\n");
        fflush(stdout);
    }
    CHECK(any);
}
