/* sets.h: sets of descriptors made by hand, and a look at what this process has open.
 *
 * Not here: what a test checks.
 */
#ifndef SETS_H
#define SETS_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "descriptors.h"

#define SETS __attribute__((unused)) static

#define SETS_LONG_NS UINT64_C(15000000000) /* longer than anything takes that works */

SETS int sets_open_descriptors(void)
{
    int count = 0;
    DIR *listing = opendir("/proc/self/fd");
    CHECK(listing);
    while (readdir(listing))
        count++;
    closedir(listing);
    return count;
}

/* As many descriptors, open or under way, as this user may have. How many that is. */
SETS uint64_t sets_make_room(void)
{
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = limit.rlim_max;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    return geteuid() == 0 ? UINT64_MAX : limit.rlim_max; /* those under way are not counted for root */
}

/* Leave room for `count` more descriptors, until sets_make_room(). */
SETS void sets_leave_room(int count)
{
    struct rlimit limit;
    int next = dup(0);
    close(next);
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = (rlim_t)(next + count);
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
}

SETS bool sets_same_file(int a, int b)
{
    struct stat left, right;
    CHECK(fstat(a, &left) == 0 && fstat(b, &right) == 0);
    return left.st_ino == right.st_ino && left.st_dev == right.st_dev;
}

/* A set of `count` mailboxes; no more than `files` are files of their own, the others are those again, in turn. */
SETS struct descriptors sets_new(uint32_t count, uint32_t files, bool listens)
{
    struct descriptors set = {.slab_id = "slab of a test..", .listener = -1, .count = count};
    set.slab = memfd_create("check", MFD_CLOEXEC);
    set.mailboxes = malloc(count * sizeof *set.mailboxes);
    if (listens)
        set.listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(set.slab >= 0 && set.mailboxes && (!listens || set.listener >= 0));
    for (uint32_t i = 0; i < count; i++) {
        set.mailboxes[i] = i < files ? socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0) : set.mailboxes[i - files];
        CHECK(set.mailboxes[i] >= 0);
    }
    return set;
}

SETS void sets_free(struct descriptors *set, uint32_t files)
{
    set->count = set->count < files ? set->count : files;
    descriptors_close(set);
}

SETS void sets_check_copy(int original, int copy)
{
    CHECK(sets_same_file(copy, original));
    CHECK(fcntl(copy, F_GETFD) & FD_CLOEXEC);
}

/* The same files, each by a descriptor that was opened for this process alone. */
SETS void sets_check_same(const struct descriptors *sent, const struct descriptors *got)
{
    CHECK(!memcmp(sent->slab_id, got->slab_id, sizeof got->slab_id));
    CHECK_EQ(got->count, sent->count);
    CHECK_EQ(got->listener >= 0, sent->listener >= 0);
    sets_check_copy(sent->slab, got->slab);
    if (got->listener >= 0)
        sets_check_copy(sent->listener, got->listener);
    for (uint32_t i = 0; i < got->count; i++)
        sets_check_copy(sent->mailboxes[i], got->mailboxes[i]);
}

/* ThreadSanitizer does not notice a bare clone(): it takes the parent's threads for threads of the child. */
SETS bool sets_skip_raw_clone(void)
{
#ifdef __SANITIZE_THREAD__
    printf("  not done under ThreadSanitizer\n");
    return true;
#else
    return false;
#endif
}

SETS void sets_expect_exit(pid_t child)
{
    int status;
    CHECK(child > 0);
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
}

#endif
