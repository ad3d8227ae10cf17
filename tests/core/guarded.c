/* guarded.c: mmap() and munmap() that leave no memory before and behind a mapping, for a build in which the core's own calls are these:
 * -Dmmap=guarded_mmap -Dmunmap=guarded_munmap. A load beyond the end of a slab, which no sanitizer knows, is a SIGSEGV then.
 *
 * Not here: what is mapped (pool.c, module_view.c), the build (tests/test_hostile.py).
 */
#include <stddef.h>
#include <sys/mman.h>
#include <sys/types.h>

enum { GUARD = 65536 }; /* a page, on every machine */

static size_t whole_pages(size_t size) { return (size + GUARD - 1) / GUARD * GUARD; }

void *guarded_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
int guarded_munmap(void *at, size_t size);

void *guarded_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    if (at) /* in place of a mapping that has its guards */
        return mmap(at, size, protection, flags, fd, offset);
    char *room = mmap(NULL, whole_pages(size) + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        return MAP_FAILED;
    void *base = mmap(room + GUARD, size, protection, flags | MAP_FIXED, fd, offset);
    if (base == MAP_FAILED)
        munmap(room, whole_pages(size) + 2 * GUARD);
    return base;
}

int guarded_munmap(void *at, size_t size) { return munmap((char *)at - GUARD, whole_pages(size) + 2 * GUARD); }
