"""The shared segment as a file: its name, its making, its end.

A segment is `/dev/shm/shmpool-<uid>-<name>`. It is made under a private name, filled, and only then given its public
one by a rename that fails when the name exists: nobody ever meets half a slab. Every process of a pool's family holds a
lock in it (core/worker.h, SHM_FAMILY_BYTE), so a segment that nobody locks is the remains of the dead.

A segment that exists is not believed because of its name: anyone may put anything under any name into that directory.
Looked at before it is opened, because opening a FIFO blocks: is it a regular file, of this user, for this user alone,
under one name? (In a directory with the sticky bit nobody but root could exchange it then.) Looked at again through the
descriptor; then the core checks magic, version, format and sizes.

Not here: what is in it (core/slab.h), looking at it (inspector), its descriptors (rendezvous).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import posix_ipc

from . import _core, rendezvous
from .config import name_problem
from .errors import (
    SHORTAGES,
    InvalidConfig,
    PoolError,
    PoolExists,
    PoolNotFound,
    SlabCorrupt,
    SlabVersionMismatch,
    shortage,
)

if TYPE_CHECKING:
    from pathlib import Path

DIRECTORY = "/dev/shm"
# A private segment this old belongs to a process that died while making it.
_ABANDONED_AFTER_S = 60.0


def prefix() -> str:
    """How the names of this user's segments begin."""
    return f"shmpool-{os.getuid()}-"


def path_of(name: str) -> str:
    """The file of the pool `name`."""
    return os.path.join(DIRECTORY, prefix() + name)


def create(size: int, connections: int) -> tuple[int, str]:
    """A zeroed segment of `size` bytes, its memory reserved, under a private name: its descriptor and path.

    Raises InvalidConfig when there is no room for it, or no shared memory at all; OSError when this process has no
    descriptor left.
    """
    path = os.path.join(DIRECTORY, f"{prefix()}.{os.getpid()}-{os.urandom(8).hex()}")
    try:
        fd = _shared_memory(os.path.basename(path), size)
    except OSError as error:
        with contextlib.suppress(OSError):  # most errors come before there is one
            os.unlink(path)
        raise _no_room(size, connections, error) from error
    except BaseException:
        _remove(path)
        raise
    try:
        os.posix_fallocate(fd, 0, size)  # ftruncate reserves nothing: a full /dev/shm would be a SIGBUS later
    except BaseException as error:
        os.close(fd)
        _remove(path)
        if isinstance(error, OSError):
            raise _no_room(size, connections, error) from error
        raise
    return fd, path


def _shared_memory(name: str, size: int) -> int:
    """Make the segment so that no resource tracker will ever unlink it; its descriptor."""
    if sys.version_info >= (3, 13):
        from multiprocessing import shared_memory

        segment = shared_memory.SharedMemory(name, create=True, size=size, track=False)
        try:
            return int(posix_ipc.SharedMemory("/" + name).fd)  # ours from now on: the object does not close it
        finally:
            segment.close()
    # SharedMemory has no track=False yet: it would start a tracker, a process, only to be told to forget this.
    try:
        return int(posix_ipc.SharedMemory("/" + name, posix_ipc.O_CREX, mode=0o600, size=size).fd)
    except posix_ipc.Error as error:
        raise OSError(errno.ENOENT, str(error)) from error
    except ValueError as error:  # its word for EFBIG
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG)) from error
    except OSError as error:  # it has no errno for a process or a machine that has as many files open as it may
        raise OSError(error.errno or errno.EMFILE, error.strerror or str(error)) from error


def _no_room(size: int, connections: int, error: OSError) -> InvalidConfig | OSError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return error
    needed = f"the pool needs {size / 2**20:.1f} MiB of shared memory in {DIRECTORY}"
    try:
        there = os.statvfs(DIRECTORY)
        have = f"{there.f_bavail * there.f_frsize / 2**20:.1f} MiB are free"
    except OSError as absent:
        have = f"it cannot be used ({absent.strerror})"
    remedy = "lower max_workers (16 KiB each) or max_connections, or give the machine or container more shared memory"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        have, remedy = "it cannot be written to", "mount it so that this user may write there"
    elif error.errno == errno.EFBIG:
        have, remedy = "this process may not write a file of that size", "raise its RLIMIT_FSIZE (ulimit -f)"
    return InvalidConfig(
        field="max_connections", value=connections, remedy=f"{needed}, but {have} ({error.strerror}); {remedy}"
    )


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
    with contextlib.suppress(PoolError, ValueError), view(name) as found:
        return int(found.identity()[5])
    return 0


# Opening one that exists --------------------------------------------------------------------------------------------


def checked_path(name: str) -> Path:
    """The file of the pool `name`; raises InvalidConfig when no pool can have that name."""
    if problem := name_problem(name):
        raise InvalidConfig(field="name", value=name, remedy=problem)
    from pathlib import Path

    return Path(path_of(name))


@contextlib.contextmanager
def view(name: str, *, writable: bool = False) -> Iterator[_core.SlabView]:
    """A look at the segment `name`, for as long as the block lasts; see `open_view`. SlabCorrupt also when it is cut
    meanwhile."""
    found = open_view(name, writable=writable)
    try:
        yield found
    except PoolError:
        raise
    except ValueError as error:
        raise SlabCorrupt(name=name, detail=str(error)) from error
    finally:
        found.close()


def open_view(name: str, *, writable: bool = False) -> _core.SlabView:
    """A look at the segment `name`, whose status and contents have been found good; read-only unless `writable`.

    Raises PoolNotFound, SlabCorrupt, SlabVersionMismatch, InvalidConfig for an impossible name, or OSError when this
    process has no descriptor or no memory left.
    """
    fd = open_checked(name, writable=writable)
    try:
        return _core.SlabView(fd, writable=writable)
    except ValueError as error:
        why, is_version = error.args if len(error.args) == 2 else (str(error), False)
        if is_version:
            found, expected = _layouts(fd)
            raise SlabVersionMismatch(name=name, found=found, expected=expected) from None
        raise SlabCorrupt(name=name, detail=why) from None
    except OSError as error:
        raise _unreadable(name, "mapped", error) from error
    finally:
        os.close(fd)


def _layouts(fd: int) -> tuple[object, object]:
    """The version that the segment has and ours; when they are equal, it is the build that differs."""
    version = int.from_bytes(os.pread(fd, 4, 8), "little")  # struct header_shm
    if version != _core.SLAB_VERSION:
        return f"version {version}", f"version {_core.SLAB_VERSION}"
    return f"version {version} of another build", f"version {version} of this build"


def open_checked(name: str, *, writable: bool = False) -> int:
    """A descriptor of the segment, whose status has been found good: a segment is not believed because of its name."""
    path = checked_path(name)
    try:
        _check_status(name, os.lstat(path))
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | _OPEN_FLAGS)
    except FileNotFoundError:
        raise PoolNotFound(name=name) from None
    except OSError as error:
        raise _unreadable(name, "opened", error) from error
    try:
        status = os.fstat(fd)
        if status.st_nlink == 0:  # removed since it was opened
            raise PoolNotFound(name=name)
        _check_status(name, status)
    except BaseException:
        os.close(fd)
        raise
    return fd


_OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # as shm_open(); never to wait for a FIFO put there


def _unreadable(name: str, what: str, error: OSError) -> SlabCorrupt | OSError:
    """What an error of the kernel says: of the segment, or of this process."""
    if error.errno in SHORTAGES:
        return shortage(error, f"slab {name!r} cannot be {what}")
    return SlabCorrupt(name=name, detail=f"it cannot be {what}: {error.strerror}")


def _check_status(name: str, status: os.stat_result) -> None:
    if wrong := _wrong_status(status):
        raise SlabCorrupt(name=name, detail=wrong)


def _wrong_status(status: os.stat_result) -> str:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        return f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no regular file')}, not shared memory"
    if status.st_uid != os.getuid():
        return f"it belongs to user {status.st_uid}, not to this one ({os.getuid()})"
    if mode & 0o077:
        return f"its mode {mode:04o} lets other users in (a pool has 0600)"
    if status.st_nlink != 1:
        return f"it has {status.st_nlink} names (a pool has one)"
    return ""


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# Ending ---------------------------------------------------------------------------------------------------------------


def remove_remains(name: str) -> bool:
    """Remove the segment `name`, and its socket, if no process uses it; whether the name is free now.

    Only a slab of this user is touched.
    """
    return _core.remove_segment(path_of(name), b"")


def remove_own(name: str, slab_id: bytes) -> None:
    """Remove the name and the socket of a pool that is closed, if the name still is that pool's."""
    _core.remove_segment(path_of(name), slab_id)


def reap() -> list[str]:
    """Remove what dead pools of this user left behind, segments and sockets; their names and paths."""
    removed = []
    try:
        names = [name for name in os.listdir(DIRECTORY) if name.startswith(prefix())]
    except OSError:
        return []
    for entry in names:
        name = entry.removeprefix(prefix())
        if name.startswith("."):
            _reap_private(os.path.join(DIRECTORY, entry))
        elif remove_remains(name):
            removed.append(name)
    return removed + rendezvous.sweep(_ids())


def _ids() -> set[bytes]:
    """Of all slabs there are."""
    found = set()
    for entry in os.listdir(DIRECTORY):
        if entry.startswith(prefix()):
            with contextlib.suppress(PoolError, ValueError), view(entry.removeprefix(prefix())) as slab:
                found.add(slab.identity()[0])
    return found


def _reap_private(path: str) -> None:
    with contextlib.suppress(OSError):
        if time.time() - os.stat(path, follow_symlinks=False).st_mtime > _ABANDONED_AFTER_S:
            os.unlink(path)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
