/* test_segment.c: what may be removed, what may not, and what a process that only calls exit() leaves. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "play.h"
#include "segment.h"

static char beside[96], where[128], path[160], door[160]; /* beside this program: what an abort leaves goes with it */

static bool is_there(const char *name)
{
    struct stat status;
    return lstat(name, &status) == 0;
}

static void begin(void)
{
    snprintf(where, sizeof where, "%s/segment-XXXXXX", beside);
    CHECK(mkdtemp(where));
    snprintf(path, sizeof path, "%s/slab", where);
    snprintf(door, sizeof door, "%s/door", where);
}

static void end(void)
{
    unlink(path);
    unlink(door);
    CHECK_EQ(rmdir(where), 0);
}

static void listen_at_door(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    memcpy(address.sun_path, door, strlen(door) + 1);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0);
    close(fd);
}

/* A pool whose slab is the file at `path`. */
static struct pool *pool_at_path(const char *rendezvous)
{
    struct slab_layout layout;
    struct slab_identity who = play_identity();
    struct pool_options options = play_options(1);
    static struct pool pools[32]; /* some are never freed: their process ends with exit() */
    static unsigned made;
    CHECK(made < sizeof pools / sizeof pools[0]);
    struct pool *pool = &pools[made++];
    who.rendezvous = rendezvous;
    CHECK(slab_layout(&layout, 1, 4, 1));
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)layout.total_size) == 0);
    CHECK_EQ(pool_create(pool, fd, -1, &layout, &who, &options), POOL_OK);
    segment_note(pool->seat, pool->slab_fd, path);
    return pool;
}

static void the_living_keep_theirs(void)
{
    begin();
    struct pool *pool = pool_at_path("");
    CHECK(!segment_remove(path, NULL) && is_there(path));
    pool_leave(pool);
    CHECK(!segment_remove(path, NULL) && is_there(path)); /* it has given its place back, not the slab */
    pool_free(pool);
    CHECK(segment_remove(path, NULL) && !is_there(path));
    CHECK(segment_remove(path, NULL)); /* there is none: the name is free */
    end();
}

static void by_id(void)
{
    begin();
    uint8_t other[16] = "another slab";
    struct pool *pool = pool_at_path("");
    CHECK(!segment_remove(path, other) && is_there(path));
    CHECK(segment_remove(path, play_identity().id) && !is_there(path)); /* living or not */
    pool_free(pool);
    end();
}

static void the_socket_goes_along(void)
{
    begin();
    listen_at_door();
    pool_free(pool_at_path(door));
    CHECK(segment_remove(path, NULL));
    CHECK(!is_there(path) && !is_there(door) && !is_there(where)); /* it was the last in its directory */
    CHECK_EQ(mkdir(where, 0700), 0);
    end();
}

static void what_is_no_socket_stays(void)
{
    begin();
    int fd = open(door, O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    close(fd);
    pool_free(pool_at_path(door));
    CHECK(segment_remove(path, NULL) && !is_there(path) && is_there(door));
    end();
}

static void write_file(const char *content, size_t size)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, content, size) == (ssize_t)size);
    close(fd);
}

static void what_is_no_slab_stays(void)
{
    begin();
    write_file("", 0);
    CHECK(!segment_remove(path, NULL) && is_there(path));
    write_file("no slab of ours, but a long text", 32);
    CHECK(!segment_remove(path, NULL) && is_there(path));
    unlink(path);
    CHECK_EQ(symlink("/dev/null", path), 0);
    CHECK(!segment_remove(path, NULL) && is_there(path));
    unlink(path);
    CHECK_EQ(mkfifo(path, 0600), 0);
    CHECK(!segment_remove(path, NULL) && is_there(path)); /* and does not block */
    end();
}

static void cut_after_the_magic(void)
{
    begin();
    uint64_t magic = SHM_MAGIC;
    write_file((const char *)&magic, sizeof magic);
    CHECK(!segment_remove(path, play_identity().id) && is_there(path));
    CHECK(segment_remove(path, NULL) && !is_there(path)); /* remains of whatever version */
    end();
}

static void while_another_removes(void)
{
    begin();
    pool_free(pool_at_path(""));
    int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0 && byte_lock(fd, SHM_REMOVER_BYTE));
    CHECK(!segment_remove(path, NULL) && is_there(path));
    close(fd);
    CHECK(segment_remove(path, NULL));
    end();
}

static void *lets_go(void *fd)
{
    usleep(2000);
    close((int)(intptr_t)fd);
    return NULL;
}

static void one_remover_waits_for_the_other(void)
{
    begin();
    pool_free(pool_at_path(""));
    pthread_t other;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0 && byte_lock(fd, SHM_REMOVER_BYTE)); /* it has looked already, while we still held the family's byte */
    CHECK_EQ(pthread_create(&other, NULL, lets_go, (void *)(intptr_t)fd), 0);
    CHECK(segment_remove(path, NULL) && !is_there(path));
    pthread_join(other, NULL);
    end();
}

static void nobody_joins_what_is_being_removed(void)
{
    begin();
    struct pool *pool = pool_at_path("");
    int fd = open(path, O_RDWR | O_CLOEXEC), newcomer = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0 && newcomer >= 0 && !byte_lock(fd, SHM_FAMILY_BYTE));
    pool_free(pool);
    CHECK(byte_lock(fd, SHM_FAMILY_BYTE));
    CHECK(!family_join(newcomer)); /* it finds the name gone the next time */
    close(fd);
    CHECK(family_join(newcomer));
    CHECK(!segment_remove(path, NULL) && is_there(path));
    close(newcomer);
    end();
}

/* Two removers and a founder who gives the name to a new slab each time it is free: the new one is never taken for the old. */
static _Atomic(bool) over;
static void *removes(void *unused)
{
    (void)unused;
    while (!atomic_load(&over))
        segment_remove(path, play_identity().id);
    return NULL;
}

static void a_new_one_is_not_the_old_one(void)
{
    begin();
    pthread_t removers[2];
    struct slab_layout layout;
    struct slab_identity who = play_identity();
    static uint8_t its_id[16] = "the living one";
    struct slab slab;
    CHECK(slab_layout(&layout, 1, 1, 1));
    void *bytes = calloc(1, layout.total_size);
    CHECK(bytes);
    atomic_store(&over, false);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pthread_create(&removers[i], NULL, removes, NULL), 0);
    for (int turn = 0; turn < 300; turn++) { /* dead, dead, ..., and then one with another id, which must stay */
        char private[192];
        bool stays = turn % 3 == 2;
        memset(bytes, 0, layout.total_size);
        who.id = stays ? its_id : play_identity().id;
        slab_format_new(&slab, bytes, &layout, &who);
        snprintf(private, sizeof private, "%s/private", where);
        int fd = open(private, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        CHECK(fd >= 0 && write(fd, bytes, 8192) == 8192);
        while (renameat2(AT_FDCWD, private, AT_FDCWD, path, RENAME_NOREPLACE))
            CHECK_EQ(errno, EEXIST);
        struct stat ours, named;
        for (int look = 0; stays && look < 20; look++)
            CHECK(fstat(fd, &ours) == 0 && stat(path, &named) == 0 && ours.st_ino == named.st_ino);
        if (stays)
            CHECK_EQ(unlink(path), 0);
        close(fd);
    }
    atomic_store(&over, true);
    for (int i = 0; i < 2; i++)
        pthread_join(removers[i], NULL);
    free(bytes);
    end();
}

/* Many leave at once: whoever is the last finds the name, whoever else looks at that moment. */
enum { LEAVERS = 8 };
static pthread_barrier_t together;
static void *leaves(void *unused)
{
    (void)unused;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0 && family_join(fd));
    pthread_barrier_wait(&together);
    close(fd);
    segment_remove(path, NULL);
    return NULL;
}

static void the_last_of_many_removes_it(void)
{
    begin();
    for (int turn = 0; turn < 200; turn++) {
        pthread_t leavers[LEAVERS];
        struct slab_layout layout;
        struct slab_identity who = play_identity();
        static struct slab slab;
        CHECK(slab_layout(&layout, 1, 1, 1));
        void *bytes = calloc(1, layout.total_size);
        CHECK(bytes);
        slab_format_new(&slab, bytes, &layout, &who);
        write_file(bytes, 8192);
        free(bytes);
        CHECK_EQ(pthread_barrier_init(&together, NULL, LEAVERS), 0);
        for (int i = 0; i < LEAVERS; i++)
            CHECK_EQ(pthread_create(&leavers[i], NULL, leaves, NULL), 0);
        for (int i = 0; i < LEAVERS; i++)
            pthread_join(leavers[i], NULL);
        pthread_barrier_destroy(&together);
        CHECK(!is_there(path));
    }
    end();
}

enum ending { BY_EXIT, BY_UNDERSCORE_EXIT, BY_EXIT_AFTER_LEAVE };

static void ends(enum ending how, bool child_lives, bool stays)
{
    int hold[2];
    begin();
    CHECK_EQ(pipe(hold), 0);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        struct pool *pool = pool_at_path("");
        close(hold[1]);
        if (child_lives && fork() == 0) {
            char byte;
            _exit((int)read(hold[0], &byte, 1)); /* a member that has not registered; lives until the test closes the pipe */
        }
        if (how == BY_EXIT_AFTER_LEAVE) {
            pool_leave(pool);
            pool_release_descriptors(pool);
        }
        if (how == BY_UNDERSCORE_EXIT)
            _exit(0);
        exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_EQ(is_there(path), stays);
    close(hold[1]);
    close(hold[0]);
    end();
}

/* Its number is used again, for something that is written to when the process ends. */
static void exits_after_closing_the_slab(void)
{
    char log[192], text[8] = "";
    begin();
    snprintf(log, sizeof log, "%s/log", where);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        struct pool *pool = pool_at_path("");
        int fd = open(log, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        CHECK(fd >= 0 && dup2(fd, pool->slab_fd) == pool->slab_fd);
        fputs("kept", fdopen(pool->slab_fd, "w"));
        exit(0);
    }
    int status, fd = -1;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK((fd = open(log, O_RDONLY | O_CLOEXEC)) >= 0 && read(fd, text, 4) == 4 && !strcmp(text, "kept"));
    close(fd);
    unlink(log);
    end();
}

static void last_one_exits(void) { ends(BY_EXIT, false, false); }
static void one_exits_and_another_lives(void) { ends(BY_EXIT, true, true); }
static void ends_without_a_word(void) { ends(BY_UNDERSCORE_EXIT, false, true); }
static void left_before(void) { ends(BY_EXIT_AFTER_LEAVE, false, true); } /* the program's own affair */

int main(int count, char **arguments)
{
    const char *last = count ? strrchr(arguments[0], '/') : NULL;
    bool fits = last && last - arguments[0] < 86; /* with a socket's name behind it */
    snprintf(beside, sizeof beside, "%.*s", fits ? (int)(last - arguments[0]) : 8, fits ? arguments[0] : "/dev/shm");
    RUN(the_living_keep_theirs);
    RUN(by_id);
    RUN(the_socket_goes_along);
    RUN(what_is_no_socket_stays);
    RUN(what_is_no_slab_stays);
    RUN(cut_after_the_magic);
    RUN(while_another_removes);
    RUN(one_remover_waits_for_the_other);
    RUN(nobody_joins_what_is_being_removed);
    RUN(a_new_one_is_not_the_old_one);
    RUN(the_last_of_many_removes_it);
    RUN(last_one_exits);
    RUN(one_exits_and_another_lives);
    RUN(ends_without_a_word);
    RUN(left_before);
    RUN(exits_after_closing_the_slab);
    return 0;
}
