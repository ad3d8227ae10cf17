"""The shared segment as a file: its name, its making, its end.

A segment is `/dev/shm/shmpool-<uid>-<name>`. It is made under a private name, filled, and only then given its public
one by a rename that fails when the name exists: nobody ever meets half a slab. Every process of a pool's family holds a
lock in it (core/worker.h, SHM_FAMILY_BYTE), so a segment that nobody locks is the remains of the dead.

Not here: what is in it (core/slab.h), looking at it (inspector).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory

import posix_ipc

from . import _core
from .errors import InvalidConfig, PoolExists

DIRECTORY = "/dev/shm"
# A private segment this old belongs to a process that died while making it.
_ABANDONED_AFTER_S = 60.0


def prefix() -> str:
    """How the names of this user's segments begin."""
    return f"shmpool-{os.getuid()}-"


def path_of(name: str) -> str:
    """The file of the pool `name`."""
    return os.path.join(DIRECTORY, prefix() + name)


def create(size: int) -> tuple[int, str]:
    """A zeroed segment of `size` bytes, its memory reserved, under a private name: its descriptor and path.

    Raises InvalidConfig when there is no room for it, or no shared memory at all.
    """
    name = f"{prefix()}.{os.getpid()}-{secrets.token_hex(8)}"
    try:
        segment = _shared_memory(name, size)
    except OSError as error:
        raise _no_room(size, error) from error
    path = os.path.join(DIRECTORY, name)
    try:
        fd = posix_ipc.SharedMemory("/" + name).fd  # ours from now on: the object does not close it
    except BaseException:
        _remove(path)
        raise
    finally:
        segment.close()
    try:
        os.posix_fallocate(fd, 0, size)  # ftruncate reserves nothing: a full /dev/shm would be a SIGBUS later
    except BaseException as error:
        os.close(fd)
        _remove(path)
        if isinstance(error, OSError):
            raise _no_room(size, error) from error
        raise
    return fd, path


def _shared_memory(name: str, size: int) -> shared_memory.SharedMemory:
    """Make the segment so that no resource tracker will ever unlink it."""
    if sys.version_info >= (3, 13):
        return shared_memory.SharedMemory(name, create=True, size=size, track=False)
    segment = shared_memory.SharedMemory(name, create=True, size=size)
    resource_tracker.unregister("/" + segment.name, "shared_memory")
    return segment


def _no_room(size: int, error: OSError) -> InvalidConfig:
    needed = f"the pool needs {size / 2**20:.1f} MiB of shared memory in {DIRECTORY}"
    try:
        there = os.statvfs(DIRECTORY)
        have = f"{there.f_bavail * there.f_frsize / 2**20:.1f} MiB are free"
    except OSError as absent:
        have = f"it cannot be used ({absent.strerror})"
    remedy = (
        f"{needed}, but {have} ({error.strerror}); lower max_connections, max_workers or max_waiters, "
        "or give the machine or container more shared memory"
    )
    return InvalidConfig(field="max_connections", value=size, remedy=remedy)


def publish(path: str, name: str) -> None:
    """Give the segment at the private `path` the public `name`. Raises PoolExists when a living pool has it."""
    public = path_of(name)
    for _ in range(100):
        try:
            _core.publish(path, public)
            return
        except FileExistsError:
            if not remove_remains(name):
                raise PoolExists(name=name, pid=creator_of(name)) from None
    raise PoolExists(name=name, pid=creator_of(name))


def creator_of(name: str) -> int:
    """The process that made the pool `name`; 0 when it cannot be told."""
    with contextlib.suppress(OSError, ValueError, posix_ipc.Error), _opened(name) as view:
        return int(view.snapshot()["creator_pid"])
    return 0


@contextlib.contextmanager
def _opened(name: str) -> Iterator[_core.SlabView]:
    fd = os.open(path_of(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        view = _core.SlabView(fd)
    finally:
        os.close(fd)
    try:
        yield view
    finally:
        view.close()


def remove_remains(name: str) -> bool:
    """Remove the segment `name` if no process uses it; whether the name is free now.

    Only a slab of this user is touched, and what is removed is what was looked at: it is renamed first.
    """
    path = path_of(name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        seen = os.fstat(fd)
        if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.getuid():
            return False
        ours = os.pread(fd, len(_core.SLAB_MAGIC), 0) == _core.SLAB_MAGIC  # of whatever version
        return ours and not _core.byte_is_locked(fd, _core.FAMILY_BYTE) and _remove_this(path, seen)
    finally:
        os.close(fd)


def _remove_this(path: str, seen: os.stat_result) -> bool:
    aside = os.path.join(DIRECTORY, f"{prefix()}.{os.getpid()}-{secrets.token_hex(8)}")
    try:
        _core.publish(path, aside)
    except OSError as error:
        return error.errno == errno.ENOENT
    if os.path.samestat(os.stat(aside), seen):
        _remove(aside)
        return True
    _core.publish(aside, path)  # another pool took the name between the look and the rename
    return False


def remove_own(name: str, inode: int) -> None:
    """Remove the name of a pool that is closed, if it still is that pool's."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path_of(name)).st_ino == inode:
            os.unlink(path_of(name))


def reap() -> list[str]:
    """Remove what dead pools of this user left behind; their names."""
    removed = []
    try:
        names = os.listdir(DIRECTORY)
    except OSError:
        return []
    for entry in names:
        if not entry.startswith(prefix()):
            continue
        name = entry.removeprefix(prefix())
        if name.startswith("."):
            _reap_private(os.path.join(DIRECTORY, entry))
        elif remove_remains(name):
            removed.append(name)
    return removed


def _reap_private(path: str) -> None:
    with contextlib.suppress(OSError):
        if time.time() - os.stat(path, follow_symlinks=False).st_mtime > _ABANDONED_AFTER_S:
            os.unlink(path)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
