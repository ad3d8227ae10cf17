/* guarded.c: mmap() and munmap() that leave no memory before and behind a mapping, for a build that is linked with
 * -Wl,--wrap=mmap,--wrap=mmap64,--wrap=munmap. A load beyond the end of a slab, which no sanitizer knows, is a SIGSEGV then.
 *
 * Not here: what is mapped (pool.c, module_view.c), the build (tests/test_hostile.py).
 */
#include <stddef.h>
#include <sys/mman.h>
#include <sys/types.h>

enum { GUARD = 65536 }; /* a page, on every machine */

static size_t whole_pages(size_t size) { return (size + GUARD - 1) / GUARD * GUARD; }

void *__real_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t size);
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap64(void *at, size_t size, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void *at, size_t size);

void *__wrap_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    if (at) /* in place of a mapping that has its guards */
        return __real_mmap(at, size, protection, flags, fd, offset);
    char *room = __real_mmap(NULL, whole_pages(size) + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        return MAP_FAILED;
    void *base = __real_mmap(room + GUARD, size, protection, flags | MAP_FIXED, fd, offset);
    if (base == MAP_FAILED)
        __real_munmap(room, whole_pages(size) + 2 * GUARD);
    return base;
}

void *__wrap_mmap64(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    return __wrap_mmap(at, size, protection, flags, fd, offset);
}

int __wrap_munmap(void *at, size_t size) { return __real_munmap((char *)at - GUARD, whole_pages(size) + 2 * GUARD); }
