/* test_service.c: a pool that accepts: its letters, events and what becomes of them, the listener at the cap, the sweep, and storms of
 * threads and of forked processes, in which each request is served exactly once.
 *
 * A worker that dies between an event and its CAS is played by taking the event from the epoll and doing nothing with it.
 */
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/un.h>

#include "play.h"
#include "service.h"
#include "sets.h"
#include "steering.h"

enum { MS = 1000000 };
static struct pool *pool, *other;
static int family = AF_UNIX;
static struct sockaddr_storage address;
static socklen_t address_size;

/* ---- a listening pool, and clients ---- */

static int listener_new(void)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in inet = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_un local = {.sun_family = AF_UNIX}; /* autobind */
    bool is_local = family == AF_UNIX;
    CHECK(fd >= 0 && bind(fd, is_local ? (void *)&local : (void *)&inet, is_local ? sizeof(sa_family_t) : sizeof inet) == 0);
    CHECK(listen(fd, 1024) == 0);
    address_size = sizeof address;
    CHECK(getsockname(fd, (struct sockaddr *)&address, &address_size) == 0);
    return fd;
}

static struct pool *join(void)
{
    struct pool *who = play_join(pool);
    CHECK_EQ(service_open(who), 0);
    return who;
}

static void begin(uint32_t slots)
{
    pool = play_found_capped(slots + SERVICE_RESERVED, slots, 16, 8, 0);
    CHECK_EQ(service_create(pool, listener_new()), 0);
    other = join();
}

static void end(void)
{
    for (uint32_t slot = pool->slab.layout.max_slots - SERVICE_RESERVED; slot < pool->slab.layout.max_slots; slot++)
        CHECK_EQ(play_word(pool, slot), slot_word(0, SHM_NO_WORKER, SLOT_EMPTY));
    play_leave(other);
    play_check_workers(pool, 1);
    play_leave(pool);
}

/* No piece of the sweep is due for a while; what was urgent is not. */
static void no_sweep(void)
{
    atomic_store(&pool->slab.header->service_sweep, 0);
    atomic_store(&pool->slab.header->service_due_ns, clock_now() + 1000 * PLAY_MS);
}

static int client_new(void)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&address, address_size) == 0);
    return fd;
}

static void say(int client, char byte) { CHECK_EQ(send(client, &byte, 1, MSG_NOSIGNAL), 1); }

/* One look without waiting; what is of no use is passed over. */
static enum service_found next(struct pool *who, struct pool_claim *claim)
{
    enum service_found found;
    do
        found = service_next(who, 0, claim);
    while (found == SERVICE_AGAIN);
    return found;
}

/* The event that a worker takes which then dies, or is stopped; false: there is none. */
static bool take_raw(struct pool *who, uint64_t *data)
{
    struct epoll_event event;
    int got = epoll_wait(atomic_load(&who->service->epoll), &event, 1, 0);
    CHECK(got >= 0);
    *data = event.data.u64;
    return got == 1;
}
static bool is_silent(void)
{
    uint64_t data;
    return !take_raw(pool, &data);
}

/* DIALING, and a client is there: LEASED. */
static void accept_client(struct pool *who, struct pool_claim *claim)
{
    bool mailed = false;
    struct entry *entry = &who->entries[claim->slot];
    int fd = service_accept(who, claim, &mailed);
    CHECK(fd >= 0 && mailed && fcntl(fd, F_GETFD) & FD_CLOEXEC);
    play_drop_entry(entry);
    entry->fd = fd;
    entry->connection = atomic_load(&who->slab.slots[claim->slot].connection);
    struct pool_birth birth = {.bucket = family == AF_UNIX ? BUCKET_UNIX : BUCKET_TCP4, .expires_ns = PLAY_NEVER};
    CHECK(pool_install(who, claim, &birth));
}

static void back(struct pool *who, struct pool_claim claim)
{
    CHECK_EQ(service_release(who, &claim, clock_coarse(), who->entries[claim.slot].fd), RELEASED);
}

/* A client that `who` has accepted and released; *slot: where. */
static int known_client(struct pool *who, uint32_t *slot)
{
    struct pool_claim claim;
    int client = client_new();
    CHECK_EQ(next(who, &claim), SERVICE_CLIENT);
    accept_client(who, &claim);
    *slot = claim.slot;
    back(who, claim);
    return client;
}

/* What the leased connection has to say; the byte is read. 0: nothing, -1: it has ended. */
static int heard(struct pool *who, struct pool_claim *claim)
{
    char byte;
    int fd = play_fetch(who, claim);
    CHECK(fd >= 0);
    switch (connection_check(fd)) {
    case CONNECTION_DIRTY:
        CHECK_EQ(recv(fd, &byte, 1, 0), 1);
        return byte;
    case CONNECTION_GOOD:
        return 0;
    case CONNECTION_CLOSED:
        break;
    }
    return -1;
}

static void end_leased(struct pool *who, struct pool_claim *claim, unsigned reason)
{
    CHECK(pool_condemn(who, claim));
    play_retire(who, claim, reason);
}

/* `who` gets that client's connection, with that byte, and gives it back. */
static void serve(struct pool *who, uint32_t slot, char byte)
{
    struct pool_claim claim;
    CHECK_EQ(next(who, &claim), SERVICE_SPOKE);
    CHECK_EQ(claim.slot, slot);
    CHECK_EQ(heard(who, &claim), byte);
    back(who, claim);
}

/* ---- the letters ---- */

static void letters(void)
{
    begin(4);
    int before = sets_open_descriptors();
    struct pool *third = join();
    sets_check_copy(atomic_load(&pool->service->listener), atomic_load(&third->service->listener));
    CHECK(fcntl(atomic_load(&third->service->epoll), F_GETFD) & FD_CLOEXEC);
    play_leave(third);
    CHECK_EQ(sets_open_descriptors(), before);
    third = play_join(pool);
    mailbox_drain(pool->mailboxes[5]);
    before = sets_open_descriptors();
    CHECK_EQ(service_open(third), ENOENT); /* the epoll's letter is gone; the listener's copy is not kept */
    CHECK_EQ(sets_open_descriptors(), before);
    CHECK(!third->service);
    service_close(third);
    service_slot_emptied(third);
    play_leave(third);
    end();
}

static void no_listening_pool(void)
{
    pool = play_found(3, 2, 8, 0);
    CHECK_EQ(service_open(pool), ENOENT);
    service_doubt(&pool->slab);
    CHECK_EQ(atomic_load(&pool->slab.header->service_sweep), 0);
    CHECK_EQ(service_create(pool, -1), EBADF);
    int file = open("/dev/null", O_RDONLY), before = sets_open_descriptors();
    CHECK_EQ(service_create(pool, file), EPERM); /* nothing that can be watched */
    CHECK_EQ(sets_open_descriptors(), before);
    close(file);
    CHECK(!pool->service && !pool->slab.header->listening);
    CHECK_EQ(service_create(pool, listener_new()), 0);
    play_leave(pool);
}

/* The program has closed all descriptors and uses the numbers again: what it has there stays open. */
static void closed_behind_our_back(void)
{
    struct pool_claim claim;
    begin(1);
    int listener = atomic_load(&other->service->listener), epoll = atomic_load(&other->service->epoll), file = open("/dev/null", O_RDONLY);
    CHECK(dup2(file, epoll) == epoll);
    CHECK_EQ(service_next(other, 0, &claim), SERVICE_LOST);
    CHECK(dup2(file, listener) == listener);
    service_close(other);
    CHECK_EQ(service_next(other, 0, &claim), SERVICE_NOTHING);
    CHECK(fcntl(epoll, F_GETFD) >= 0 && fcntl(listener, F_GETFD) >= 0);
    close(file);
    close(listener);
    close(epoll);
    end();
}

static void *wait_long(void *arg)
{
    struct pool_claim claim;
    enum service_found found;
    while ((found = service_next(arg, 1000 * PLAY_MS, &claim)) == SERVICE_NOTHING && atomic_load(&((struct pool *)arg)->service->epoll) >= 0)
        ;
    return (void *)(uintptr_t)found;
}

/* Closing waits for the threads that wait there; not for those of the parent of a fork. */
static void closing_while_waiting(void)
{
    pthread_t thread;
    void *found;
    begin(1);
    CHECK(pthread_create(&thread, NULL, wait_long, other) == 0);
    while (!atomic_load(&other->fork->service_users))
        sched_yield();
    pid_t child = fork();
    if (!child) {
        CHECK_EQ(atomic_load(&other->fork->service_users), 0);
        service_close(other);
        _exit(0);
    }
    sets_expect_exit(child);
    service_close(other);
    CHECK_EQ(atomic_load(&other->fork->service_users), 0);
    pthread_join(thread, &found);
    CHECK_EQ((uintptr_t)found, SERVICE_NOTHING);
    end();
}

static void shut(void)
{
    struct pool_claim claim;
    begin(2);
    int waiting = client_new();
    service_shut(other);
    int late = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(connect(late, (struct sockaddr *)&address, address_size) < 0 && errno == ECONNREFUSED);
    if (next(pool, &claim) == SERVICE_CLIENT) { /* a unix socket keeps those who came before */
        bool mailed;
        int fd = service_accept(pool, &claim, &mailed);
        if (fd >= 0) {
            close(fd);
            pool_abandon(pool, &claim);
        }
    }
    for (int i = 0; i < 3; i++) /* nobody is there any more, and nobody looks for ever */
        if (next(pool, &claim) == SERVICE_CLIENT)
            CHECK(service_accept(pool, &claim, &(bool){false}) < 0);
    close(waiting);
    close(late);
    end();
}

/* ---- one client ---- */

static void a_client_and_its_requests(void)
{
    struct pool_claim claim;
    uint32_t slot;
    begin(3);
    CHECK_EQ(next(pool, &claim), SERVICE_NOTHING);
    int client = known_client(pool, &slot);
    CHECK_EQ(next(other, &claim), SERVICE_NOTHING); /* it is silent */
    say(client, 'a');
    serve(other, slot, 'a'); /* whom the other has accepted */
    say(client, 'b');
    say(client, 'c');
    serve(pool, slot, 'b');
    serve(other, slot, 'c'); /* it was there before it was released */
    CHECK_EQ(next(pool, &claim), SERVICE_NOTHING);
    say(client, 'd');
    close(client);
    serve(pool, slot, 'd');
    CHECK_EQ(next(other, &claim), SERVICE_SPOKE); /* its end */
    CHECK_EQ(heard(other, &claim), -1);
    end_leased(other, &claim, SHM_T_closed_broken);
    CHECK_EQ(next(pool, &claim), SERVICE_NOTHING);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 5);
    CHECK_EQ(play_created(pool), 1);
    end();
}

/* A connection that only this process could hear serves one lease; so does one past its lifetime. */
static void not_to_be_kept(void)
{
    struct pool_claim claim;
    begin(1);
    for (int round = 0; round < 2; round++) {
        int client = client_new();
        CHECK_EQ(next(pool, &claim), SERVICE_CLIENT);
        accept_client(pool, &claim);
        if (round)
            atomic_store(&pool->slab.slots[claim.slot].expires_ns, clock_coarse());
        else
            atomic_fetch_or(&pool->slab.slots[claim.slot].kind, SHM_KIND_PRIVATE);
        CHECK_EQ(service_release(pool, &claim, clock_coarse(), pool->entries[claim.slot].fd), RELEASE_RETIRE);
        CHECK_EQ(service_release(pool, &(struct pool_claim){.slot = claim.slot, .word = claim.word + 1}, clock_coarse(), 0), RELEASE_STALE);
        end_leased(pool, &claim, SHM_T_closed_lifetime);
        close(client);
    }
    end();
}

/* Nobody was there: the slot goes back, and the listener sleeps, because somebody else was faster and watches it. */
static void nobody_there(void)
{
    struct pool_claim claim;
    bool mailed;
    uint64_t data;
    begin(2);
    int client = client_new();
    CHECK_EQ(next(pool, &claim), SERVICE_CLIENT);
    int stolen = accept4(atomic_load(&other->service->listener), NULL, NULL, SOCK_CLOEXEC);
    CHECK(stolen >= 0);
    CHECK_EQ(service_accept(pool, &claim, &mailed), -1);
    CHECK_EQ(errno, EAGAIN);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 4);
    close(stolen);
    close(client);
    service_listen_on(other);
    client = client_new();
    CHECK(take_raw(pool, &data) && is_silent());
    close(client);
    end();
}

/* No descriptor for the client: the slot goes back, and the listener stays watched for others. */
static void no_room_for_a_client(void)
{
    struct pool_claim claim;
    bool mailed;
    uint64_t data;
    begin(2);
    int client = client_new();
    CHECK_EQ(next(pool, &claim), SERVICE_CLIENT);
    sets_leave_room(0);
    CHECK_EQ(service_accept(pool, &claim, &mailed), -1);
    CHECK_EQ(errno, EMFILE);
    CHECK(service_is_short(EMFILE) && !service_is_short(EAGAIN) && !service_is_short(ECONNABORTED));
    sets_make_room();
    CHECK_EQ(play_count(pool, SLOT_EMPTY), 4);
    CHECK(take_raw(other, &data));
    close(client);
    end();
}

static void two_clients_at_once(void)
{
    struct pool_claim claim;
    uint64_t data;
    begin(2);
    int clients[2] = {client_new(), client_new()};
    CHECK_EQ(next(pool, &claim), SERVICE_CLIENT);
    CHECK(is_silent()); /* one event for one waiter */
    accept_client(pool, &claim);
    CHECK(take_raw(other, &data)); /* at once, and not when somebody's slice is over */
    end_leased(pool, &claim, SHM_T_closed_error);
    close(clients[0]);
    close(clients[1]);
    end();
}

/* Whoever had the listener's event has not come back: one that has waited in vain looks itself. */
static void a_listener_that_nobody_watches(void)
{
    struct pool_claim claim;
    uint64_t data;
    begin(2);
    int client = client_new();
    CHECK(take_raw(other, &data) && is_silent());
    CHECK_EQ(service_next(pool, 1, &claim), SERVICE_CLIENT);
    accept_client(pool, &claim);
    end_leased(pool, &claim, SHM_T_closed_error);
    close(client);
    end();
}

/* ---- events ---- */

static void events_of_an_older_connection(void)
{
    struct pool_claim claim;
    uint64_t data;
    uint32_t slot, again;
    begin(1);
    int client = known_client(pool, &slot);
    say(client, 'a');
    CHECK(take_raw(other, &data)); /* and is stopped */
    CHECK(service_take(pool, data, &claim));
    CHECK(!service_take(other, data, &claim)); /* leased */
    CHECK_EQ(heard(pool, &claim), 'a');
    end_leased(pool, &claim, SHM_T_closed_error);
    close(client);
    CHECK(!service_take(other, data, &claim)); /* empty */
    client = known_client(pool, &again);
    CHECK_EQ(again, slot);
    CHECK(!service_take(other, data, &claim)); /* another connection of that slot */
    say(client, 'b');
    serve(other, slot, 'b');
    CHECK(!service_take(other, UINT64_MAX, &claim));
    CHECK(!service_take(other, 0, &claim));
    CHECK(!service_take(other, 1, &claim)); /* the slots of the letters */
    CHECK(!service_take(other, 2, &claim));
    CHECK(!service_take(other, 99999, &claim));
    close(client);
    end();
}

/* Two processes have armed, each by a number of its own: two events, of which one finds the connection leased or silent. */
static void events_twice(void)
{
    struct pool_claim claim, vain;
    uint64_t data;
    uint32_t slot;
    begin(2);
    int client = known_client(pool, &slot);
    service_watch_letter(other, slot);
    say(client, 'a');
    CHECK_EQ(service_next(other, 0, &claim), SERVICE_SPOKE);
    CHECK_EQ(service_next(pool, 0, &vain), SERVICE_AGAIN);
    CHECK_EQ(heard(other, &claim), 'a');
    back(other, claim);
    service_watch_letter(pool, slot);
    say(client, 'b');
    CHECK(take_raw(pool, &data));
    serve(other, slot, 'b');
    CHECK(service_take(pool, data, &claim)); /* a little late */
    CHECK_EQ(heard(pool, &claim), 0);
    back(pool, claim);
    say(client, 'c');
    serve(pool, slot, 'c');
    close(client);
    end();
}

/* One that was stopped between release and arming goes on when the connection is leased, idle, ended, or another's. */
static void late_arming(void)
{
    struct pool_claim claim;
    uint32_t slot;
    begin(1);
    int client = known_client(pool, &slot), copy = dup(pool->entries[slot].fd);
    uint64_t connection = pool->entries[slot].connection;
    say(client, 'a');
    CHECK_EQ(next(other, &claim), SERVICE_SPOKE);
    CHECK_EQ(service_watch(pool, slot, connection, copy), 0); /* leased: its event comes to nothing */
    CHECK_EQ(next(pool, &(struct pool_claim){0}), SERVICE_NOTHING);
    CHECK_EQ(heard(other, &claim), 'a');
    back(other, claim);
    say(client, 'b');
    serve(pool, slot, 'b');
    CHECK_EQ(next(other, &claim), SERVICE_NOTHING);
    say(client, 'c');
    CHECK_EQ(next(other, &claim), SERVICE_SPOKE);
    end_leased(other, &claim, SHM_T_closed_error);
    close(client);
    client = known_client(other, &slot);
    CHECK_EQ(service_watch(pool, slot, connection, copy), 0); /* a dead one: it speaks at once */
    CHECK_EQ(service_next(pool, 0, &claim), SERVICE_AGAIN);
    say(client, 'd');
    serve(pool, slot, 'd');
    close(copy);
    close(client);
    end();
}

/* The watch outlives the descriptor by which it was made, and the process. */
static void who_watched_is_gone(void)
{
    uint32_t slot;
    begin(1);
    struct pool *third = join();
    int client = known_client(third, &slot);
    play_leave(third);
    no_sweep();
    say(client, 'a');
    serve(pool, slot, 'a');
    third = join();
    say(client, 'b');
    serve(third, slot, 'b');
    play_die(third);
    play_end(third);
    no_sweep();
    say(client, 'c');
    serve(other, slot, 'c');
    close(client);
    recovery_run(pool, true);
    end();
}

static void paused(void)
{
    struct pool_claim claim;
    uint32_t slot;
    begin(2);
    int client = known_client(pool, &slot);
    no_sweep();
    CHECK(steering_state(&pool->slab, SHM_POOL_PAUSED));
    say(client, 'a');
    int newcomer = client_new();
    for (int i = 0; i < 3; i++)
        CHECK_EQ(service_next(other, 0, &claim), SERVICE_NOTHING);
    CHECK(is_silent());
    CHECK(steering_state(&pool->slab, SHM_POOL_OPEN));
    serve(other, slot, 'a');
    CHECK_EQ(next(other, &claim), SERVICE_CLIENT);
    accept_client(other, &claim);
    end_leased(other, &claim, SHM_T_closed_error);
    close(newcomer);
    close(client);
    end();
}

/* ---- the cap ---- */

static void cap_reached_and_freed(void)
{
    struct pool_claim claim;
    uint64_t data;
    uint32_t slot;
    begin(1);
    int first = known_client(pool, &slot), second = client_new();
    CHECK_EQ(next(pool, &claim), SERVICE_NOTHING);
    CHECK(is_silent()); /* the listener is left alone */
    say(first, 'a');
    serve(other, slot, 'a'); /* others are heard */
    say(first, 'b');
    CHECK_EQ(next(pool, &claim), SERVICE_SPOKE);
    end_leased(pool, &claim, SHM_T_closed_error);
    CHECK_EQ(atomic_load(&pool->slab.header->service_starved), 0);
    CHECK(take_raw(other, &data)); /* at once */
    CHECK_EQ(next(pool, &claim), SERVICE_CLIENT);
    accept_client(pool, &claim);
    back(pool, claim);
    say(second, 'c');
    serve(other, slot, 'c');
    close(first);
    close(second);
    end();
}

static void was_used_before(uint32_t slot, uint64_t ns) { atomic_store(&pool->slab.slots[slot].last_used_ns, clock_now() - ns); }
static void has_starved_for(uint64_t ns)
{
    atomic_store(&pool->slab.header->service_starved, (uint32_t)((clock_now() - ns) / 1000000) | 1);
}

/* Who keeps connections open without a word makes room for who waits. */
static void silent_ones_make_room(void)
{
    struct pool_claim claim;
    uint64_t data;
    uint32_t slots[2], slot;
    begin(2);
    int silent[2] = {known_client(pool, &slots[0]), known_client(pool, &slots[1])}, waiting = client_new();
    CHECK_EQ(next(other, &claim), SERVICE_NOTHING); /* both have spoken a moment ago */
    was_used_before(slots[0], 2 * SERVICE_PATIENCE_NS);
    was_used_before(slots[1], 3 * SERVICE_PATIENCE_NS);
    CHECK_EQ(next(other, &claim), SERVICE_CROWDED);
    CHECK_EQ(claim.slot, slots[1]);
    CHECK_EQ(heard(other, &claim), 0);
    close(silent[1]);
    end_leased(other, &claim, SHM_T_closed_evicted);
    CHECK(take_raw(pool, &data));
    CHECK_EQ(next(pool, &claim), SERVICE_CLIENT);
    accept_client(pool, &claim);
    slot = claim.slot;
    back(pool, claim);
    CHECK_EQ(next(other, &claim), SERVICE_NOTHING); /* nobody waits any more: nobody ends */
    CHECK_EQ(play_count(pool, SLOT_IDLE), 2);
    say(waiting, 'a');
    serve(other, slot, 'a');
    close(silent[0]);
    close(waiting);
    end();
}

/* All are talkative: one after the other makes room all the same, but not sooner than after SERVICE_PATIENCE_NS, and not before it is heard. */
static void talkative_ones_make_room(void)
{
    struct pool_claim claim;
    uint32_t slot;
    begin(1);
    int talks = known_client(pool, &slot), waiting = client_new();
    CHECK_EQ(next(other, &claim), SERVICE_NOTHING);
    has_starved_for(SERVICE_PATIENCE_NS * 9 / 10);
    CHECK_EQ(next(other, &claim), SERVICE_NOTHING);
    has_starved_for(SERVICE_PATIENCE_NS + 20 * PLAY_MS);
    say(talks, 'a');
    CHECK_EQ(next(other, &claim), SERVICE_CROWDED); /* although others have something to say: else it would wait for ever */
    CHECK_EQ(heard(other, &claim), 'a');
    back(other, claim);
    CHECK_EQ(next(pool, &claim), SERVICE_NOTHING); /* the next one not for a while */
    close(waiting);
    has_starved_for(SERVICE_PATIENCE_NS + 20 * PLAY_MS);
    close(accept(atomic_load(&pool->service->listener), NULL, NULL)); /* nobody waits any more */
    CHECK_EQ(next(pool, &claim), SERVICE_NOTHING);
    CHECK_EQ(atomic_load(&pool->slab.header->service_starved), 0);
    CHECK_EQ(play_count(pool, SLOT_IDLE), 1);
    close(talks);
    end();
}

/* A slot that was taken for a client who was not there is given up: that, too, is an empty one. */
static void given_up(void)
{
    struct pool_claim claim, vain;
    uint64_t data;
    begin(1);
    int client = client_new();
    CHECK_EQ(next(pool, &claim), SERVICE_CLIENT);
    service_listen_on(other);
    CHECK_EQ(next(other, &vain), SERVICE_NOTHING);
    CHECK(atomic_load(&pool->slab.header->service_starved));
    CHECK(is_silent());
    service_give_up(pool, &claim);
    CHECK(take_raw(other, &data));
    close(client);
    end();
}

/* One has the listener's event and finds no slot; another empties the only one: the client is seen by one of the two. Both spin, so that
 * they come within nanoseconds of each other. */
enum { RACES = 20000 };
static struct race {
    atomic_int begun, done; /* number of the race */
    atomic_uint pause;
    struct pool_claim claim;
    enum service_found found;
} race;

static void spin(uint32_t turns)
{
    for (volatile uint32_t i = 0; i < turns; i++)
        ;
}

static void *find_room(void *unused)
{
    for (int i = 1; i <= RACES; i++) {
        for (uint32_t turns = 0; atomic_load(&race.begun) < i; turns++)
            if (turns % 4096 == 4095)
                sched_yield(); /* there may be one processor only */
        spin(atomic_load(&race.pause));
        race.found = service_next(other, 0, &race.claim);
        atomic_store(&race.done, i);
    }
    return unused;
}

static void starved_or_emptied(void)
{
    struct check_random random = check_seed(getenv("SHMPOOL_SEED"));
    struct pool_claim claim;
    pthread_t thread;
    uint64_t data;
    begin(1);
    race = (struct race){.found = SERVICE_NOTHING};
    CHECK(pthread_create(&thread, NULL, find_room, NULL) == 0);
    for (int i = 1; i <= RACES; i++) {
        no_sweep();
        CHECK(pool_take_empty(pool, &claim));
        int client = client_new();
        atomic_store(&race.pause, (uint32_t)(check_random(&random) % 256));
        atomic_store(&race.begun, i);
        spin((uint32_t)(check_random(&random) % 2048));
        service_give_up(pool, &claim);
        while (atomic_load(&race.done) < i)
            sched_yield();
        if (race.found != SERVICE_CLIENT) {
            CHECK(take_raw(pool, &data));
            CHECK(pool_take_empty(other, &race.claim));
        }
        accept_client(other, &race.claim);
        close(client);
        end_leased(other, &race.claim, SHM_T_closed_error);
    }
    pthread_join(thread, NULL);
    end();
}

/* ---- what was lost ---- */

enum { MANY = 2 * SERVICE_PIECE_SLOTS + 3 };

/* A worker dies with an event in its hands: who recovers it makes the others look everywhere. */
static void died_with_an_event(void)
{
    static const uint32_t which[] = {0, SERVICE_PIECE_SLOTS, MANY - 1};
    struct pool_claim claim;
    int clients[MANY];
    uint64_t data;
    begin(MANY);
    for (uint32_t i = 0, slot; i < MANY; i++) {
        clients[i] = known_client(pool, &slot);
        CHECK_EQ(slot, i);
    }
    for (int i = 0; i < 3; i++) {
        no_sweep();
        struct pool *third = join();
        no_sweep(); /* joining is a reason to look, too */
        say(clients[which[i]], 'a');
        CHECK(take_raw(third, &data));
        CHECK_EQ(next(pool, &claim), SERVICE_NOTHING);
        play_die(third);
        recovery_run(other, true);
        serve(pool, which[i], 'a');
        play_end(third);
    }
    for (int i = 0; i < MANY; i++)
        close(clients[i]);
    end();
}

/* A worker dies between release and arming: the silent connection is watched again, and not only looked at. */
static void died_before_arming(void)
{
    struct pool_claim claim;
    uint32_t slot;
    begin(2);
    struct pool *third = join();
    int client = known_client(pool, &slot);
    say(client, 'a');
    CHECK_EQ(next(third, &claim), SERVICE_SPOKE);
    CHECK_EQ(heard(third, &claim), 'a');
    CHECK_EQ(pool_release(third, &claim, clock_coarse()), RELEASED);
    play_die(third);
    recovery_run(other, true);
    CHECK_EQ(next(pool, &claim), SERVICE_NOTHING);
    no_sweep();
    say(client, 'b');
    serve(pool, slot, 'b');
    play_end(third);
    close(client);
    end();
}

/* Nobody died, but one was stopped, or the kernel refused: found when its turn comes. */
static void lost_without_a_death(void)
{
    struct pool_claim claim;
    uint64_t data;
    uint32_t slot;
    begin(MANY);
    int client = known_client(pool, &slot);
    no_sweep();
    say(client, 'a');
    CHECK(take_raw(other, &data));
    CHECK_EQ(next(pool, &claim), SERVICE_NOTHING);
    atomic_store(&pool->slab.header->service_due_ns, 0);
    CHECK_EQ(next(pool, &claim), SERVICE_NOTHING); /* released a moment ago: its event may well be on its way */
    uint64_t begun = clock_now();
    while (next(pool, &claim) != SERVICE_SPOKE)
        CHECK(clock_now() - begun < SETS_LONG_NS);
    CHECK(clock_now() - begun >= SERVICE_FRESH_NS / 2);
    CHECK_EQ(claim.slot, slot);
    CHECK_EQ(heard(pool, &claim), 'a');
    back(pool, claim);
    CHECK(atomic_load(&pool->slab.header->service_due_ns) > 0);
    close(client);
    end();
}

/* ---- storms ---- */

enum { CLIENTS = 14, STORM_SLOTS = 8, WORKERS = 4, REQUESTS = 20000, SILENCE_MS = 5000 };

/* What driver and workers share. */
static struct storm {
    atomic_uint served[2 * REQUESTS]; /* times that request was read by a worker */
    atomic_bool over;
} *storm;

/* A worker has the connection: it reads one request and answers, or leaves it for the next, or finds nothing. */
static void work(struct pool *who, struct pool_claim *claim, struct check_random *random)
{
    uint64_t request;
    int fd = play_fetch(who, claim);
    CHECK(fd >= 0);
    enum connection_health health = connection_check(fd);
    if (health == CONNECTION_CLOSED) {
        end_leased(who, claim, SHM_T_closed_broken);
        return;
    }
    if (health == CONNECTION_DIRTY && check_random(random) % 8) {
        CHECK_EQ(recv(fd, &request, sizeof request, MSG_DONTWAIT), sizeof request);
        CHECK(request < 2 * REQUESTS);
        atomic_fetch_add(&storm->served[request], 1);
        if (check_random(random) % 4 == 0)
            sched_yield();
        (void)!send(fd, &request, sizeof request, MSG_NOSIGNAL);
    }
    back(who, *claim);
}

static void work_on(struct pool *who, uint64_t seed)
{
    struct check_random random = {seed | 1};
    struct pool_claim claim = {0};
    while (!atomic_load(&storm->over))
        switch (service_next(who, SERVICE_SLICE_MS * PLAY_MS, &claim)) {
        case SERVICE_CLIENT: {
            int fd;
            bool mailed;
            if ((fd = service_accept(who, &claim, &mailed)) < 0) {
                CHECK_EQ(errno, EAGAIN);
                break;
            }
            play_drop_entry(&who->entries[claim.slot]);
            who->entries[claim.slot].fd = fd;
            who->entries[claim.slot].connection = atomic_load(&who->slab.slots[claim.slot].connection);
            CHECK(pool_install(who, &claim, &(struct pool_birth){.bucket = BUCKET_UNIX, .expires_ns = PLAY_NEVER}));
            back(who, claim);
            break;
        }
        case SERVICE_SPOKE:
            work(who, &claim, &random);
            break;
        case SERVICE_CROWDED:
            if (connection_check(play_fetch(who, &claim)) == CONNECTION_GOOD)
                end_leased(who, &claim, SHM_T_closed_evicted);
            else
                work(who, &claim, &random);
            break;
        case SERVICE_NOTHING:
            if (recovery_is_due(who))
                recovery_run(who, false);
            break;
        case SERVICE_AGAIN:
            break;
        case SERVICE_LOST:
            CHECK(!"the epoll is there");
        }
}

/* The other side: clients, each with at most one request under way. */
static struct client {
    int fd;
    bool asked;
    uint64_t request;
} clients[CLIENTS];
static uint64_t asked, answered, broken /* by the workers' side */, left /* by us, before the answer */;

static void ask(struct client *client)
{
    client->request = asked++;
    client->asked = send(client->fd, &client->request, sizeof client->request, MSG_NOSIGNAL) == sizeof client->request;
    broken += !client->asked;
}

static void hang_up(struct client *client)
{
    close(client->fd);
    *client = (struct client){.fd = -1};
}

/* Something came from the worker's side: the answer, or the end. */
static void hear(struct client *client)
{
    uint64_t answer;
    ssize_t got = recv(client->fd, &answer, sizeof answer, MSG_DONTWAIT);
    if (got <= 0) {
        broken += client->asked;
        hang_up(client);
        return;
    }
    CHECK(client->asked && got == sizeof answer);
    CHECK_EQ(answer, client->request);
    CHECK_EQ(atomic_load(&storm->served[answer]), 1);
    client->asked = false;
    answered++;
}

/* A random thing for each client that waits for nothing. */
static void act(struct check_random *random)
{
    for (int i = 0; i < CLIENTS; i++) {
        uint64_t chance = check_random(random) % 16;
        if (clients[i].fd < 0 && asked < REQUESTS)
            clients[i] = (struct client){.fd = client_new()};
        if (clients[i].fd < 0 || clients[i].asked)
            continue;
        if (chance == 0)
            hang_up(&clients[i]);
        else if (chance > 3 && asked < REQUESTS)
            ask(&clients[i]);
        if (chance == 15 && clients[i].fd >= 0 && clients[i].asked) {
            hang_up(&clients[i]);
            left++;
        }
    }
}

/* Wait for answers; fails when one that is due does not come. Clients that wait for nothing make room for those at the listener. */
static void listen_to_workers(bool *quiet)
{
    struct pollfd polls[CLIENTS];
    int waiting = 0;
    for (int i = 0; i < CLIENTS; i++) {
        waiting += clients[i].fd >= 0 && clients[i].asked;
        polls[i] = (struct pollfd){.fd = clients[i].fd, .events = POLLIN};
    }
    *quiet = poll(polls, CLIENTS, waiting ? 2 : 0) == 0;
    for (int i = 0; i < CLIENTS; i++)
        if (clients[i].fd >= 0 && polls[i].revents)
            hear(&clients[i]);
}

static void free_idle(void)
{
    for (int i = 0; i < CLIENTS; i++)
        if (clients[i].fd >= 0 && !clients[i].asked)
            hang_up(&clients[i]);
}

static bool anyone_waits(void)
{
    for (int i = 0; i < CLIENTS; i++)
        if (clients[i].fd >= 0 && clients[i].asked)
            return true;
    return false;
}

/* Until all requests are answered. `each` is called on each turn. */
static void drive(struct check_random *random, void (*each)(struct check_random *))
{
    uint64_t last = clock_now();
    asked = answered = broken = left = 0;
    for (int i = 0; i < CLIENTS; i++)
        clients[i].fd = -1;
    while (asked < REQUESTS || anyone_waits()) {
        bool quiet;
        act(random);
        listen_to_workers(&quiet);
        if (!quiet)
            last = clock_now();
        else
            free_idle();
        each(random);
        if (clock_now() - last > SILENCE_MS * PLAY_MS) {
            fprintf(stderr, "%" PRIu64 " asked, %" PRIu64 " answered, %" PRIu64 " broken\n", asked, answered, broken);
            CHECK(!"a request is not answered");
        }
    }
    free_idle();
    CHECK_EQ(answered + broken + left, asked);
    for (uint64_t i = 0; i < asked; i++)
        CHECK(atomic_load(&storm->served[i]) <= 1);
}

static void begin_storm(void)
{
    begin(STORM_SLOTS);
    storm = mmap(NULL, sizeof *storm, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(storm != MAP_FAILED);
}

static void end_storm(void)
{
    struct pool_claim claim;
    recovery_run(pool, true);
    for (enum service_found found; (found = next(pool, &claim)) != SERVICE_NOTHING;) /* what has hung up at last */
        if (found == SERVICE_CLIENT) {
            if (service_accept(pool, &claim, &(bool){false}) >= 0)
                pool_abandon(pool, &claim);
        } else
            end_leased(pool, &claim, SHM_T_closed_broken);
    CHECK_EQ(play_count(pool, SLOT_EMPTY), STORM_SLOTS + SERVICE_RESERVED);
    munmap(storm, sizeof *storm);
    end();
}

struct thread {
    pthread_t thread;
    struct pool *who;
    uint64_t seed;
};
static void *work_in_thread(void *arg)
{
    struct thread *thread = arg;
    work_on(thread->who, thread->seed);
    return NULL;
}

static void keep_from_sweeping(struct check_random *random)
{
    (void)random;
    no_sweep();
}

/* No deaths, and no sweep: nothing is lost in the first place. */
static void storm_of_threads(void)
{
    struct check_random random = check_seed(getenv("SHMPOOL_SEED"));
    struct thread threads[WORKERS];
    begin_storm();
    for (int i = 0; i < WORKERS; i++)
        threads[i] = (struct thread){.who = join(), .seed = check_random(&random)};
    no_sweep();
    for (int i = 0; i < WORKERS; i++)
        CHECK(pthread_create(&threads[i].thread, NULL, work_in_thread, &threads[i]) == 0);
    drive(&random, keep_from_sweeping);
    CHECK_EQ(broken, 0);
    atomic_store(&storm->over, true);
    for (int i = 0; i < WORKERS; i++) {
        pthread_join(threads[i].thread, NULL);
        play_leave(threads[i].who);
    }
    end_storm();
}

static pid_t workers[WORKERS];
static bool stopped[WORKERS];
static uint64_t kills;

static void fork_worker(int i, uint64_t seed)
{
    fflush(stdout);
    workers[i] = fork();
    CHECK(workers[i] >= 0);
    if (workers[i])
        return;
    for (int other_end = 0; other_end < CLIENTS; other_end++)
        if (clients[other_end].fd >= 0)
            close(clients[other_end].fd); /* our copy would keep it open */
    CHECK_EQ(pool_join(pool), POOL_OK);
    work_on(pool, seed);
    pool_leave(pool);
    _exit(0);
}

/* Now and then one is killed, and another takes its place, or stopped for a while. */
static void strike(struct check_random *random)
{
    int i = (int)(check_random(random) % WORKERS);
    uint64_t chance = check_random(random) % 64;
    if (stopped[i] || chance == 1) {
        kill(workers[i], stopped[i] ? SIGCONT : SIGSTOP);
        stopped[i] = !stopped[i];
    } else if (chance == 0) {
        kill(workers[i], SIGKILL);
        CHECK_EQ(waitpid(workers[i], NULL, 0), workers[i]);
        kills++;
        fork_worker(i, check_random(random));
    }
}

static void storm_of_killed_processes(void)
{
    struct check_random random = check_seed(getenv("SHMPOOL_SEED"));
    begin_storm();
    kills = 0;
    for (int i = 0; i < CLIENTS; i++)
        clients[i].fd = -1;
    for (int i = 0; i < WORKERS; i++)
        fork_worker(i, check_random(&random));
    drive(&random, strike);
    atomic_store(&storm->over, true);
    for (int i = 0; i < WORKERS; i++) {
        kill(workers[i], SIGCONT);
        stopped[i] = false;
        sets_expect_exit(workers[i]);
    }
    printf("  %" PRIu64 " killed; %" PRIu64 " answered, %" PRIu64 " broken\n", kills, answered, broken);
    CHECK(kills > 0 && broken <= kills); /* each had at most one lease */
    end_storm();
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    RUN(letters);
    RUN(no_listening_pool);
    RUN(closed_behind_our_back);
    RUN(closing_while_waiting);
    for (int inet = 0; inet <= 1; inet++) {
        family = inet ? AF_INET : AF_UNIX;
        RUN(shut);
        RUN(a_client_and_its_requests);
        RUN(not_to_be_kept);
        RUN(nobody_there);
        RUN(no_room_for_a_client);
        RUN(two_clients_at_once);
        RUN(a_listener_that_nobody_watches);
        RUN(events_of_an_older_connection);
        RUN(events_twice);
        RUN(late_arming);
        RUN(who_watched_is_gone);
        RUN(paused);
        RUN(cap_reached_and_freed);
        RUN(silent_ones_make_room);
        RUN(talkative_ones_make_room);
        RUN(given_up);
    }
    family = AF_UNIX;
    RUN(starved_or_emptied);
    RUN(died_with_an_event);
    RUN(died_before_arming);
    RUN(lost_without_a_death);
    play_one_mapping = true;
    RUN(storm_of_threads);
    play_one_mapping = false;
    RUN(storm_of_killed_processes);
    return 0;
}
