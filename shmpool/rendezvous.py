"""How a process that inherited nothing of a pool gets its descriptors.

    newcomer -> the socket named in the slab's header -> a member's thread sends them     (core/rendezvous.h)
             -> nobody answers: out of a living member's own table, where the kernel lets us   (pidfd_getfd)

Each named pool has one listening socket, which all its members hold: `<directory>/<slab id>` with mode 0600, in a
directory of this user alone: `$XDG_RUNTIME_DIR/shmpool`, or `shmpool-<uid>.d` beside the segments, in /dev/shm, when
there is no such variable or it does not name a directory of this user's. Its path stands in the slab, so that processes
with another environment find it. (A pool without a name gets one when a process first pickles it, `<slab id>.<random>`;
its path travels with the pickle.) The kernel says on both sides who the other one is; another user is refused.

`ask()` gives a socket over which the descriptors arrive; `PoolBase._attach` receives them. `holders()` says who has
which; `PoolBase._attach_copies` copies them.

Not here: the thread (core/rendezvous.c), joining (pool), the segment (slab).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Iterator

from . import _core
from .errors import SHORTAGES, InvalidConfig

_PATH_MAX = 511  # bytes; the slab keeps the path
_BACKLOG = 4096
_ABANDONED_AFTER_S = 60.0
_NAME = re.compile(r"([0-9a-f]{32})(\.[0-9a-f]{8})?")
_UCRED = struct.Struct("iII")


# The directory ------------------------------------------------------------------------------------------------------


def directory() -> str:
    """Where this process puts the sockets of its pools."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.path.isabs(base) and _is_ours(base):
        return os.path.join(base, "shmpool")
    return f"/dev/shm/shmpool-{os.getuid()}.d"  # who can see the segment sees this too, whatever /tmp is there


def _is_ours(path: str) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


@contextlib.contextmanager
def _opened(path: str) -> Iterator[str]:
    """A name by which the directory can be reached, however long its path is, after a look at whose it is."""
    if os.path.islink(path):  # O_NOFOLLOW refuses it as well, but says only that it is no directory
        raise NotADirectoryError(f"{path} is a symbolic link, not a directory")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            found = f"it belongs to user {status.st_uid} and has mode {mode:04o}"
            raise PermissionError(f"{path} must belong to user {os.getuid()} alone (0700): {found}")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


# The socket ---------------------------------------------------------------------------------------------------------


def listen(slab_id: bytes, mark: str = "") -> tuple[int, str]:
    """A socket on which newcomers of the slab can ask: its descriptor and path.

    Raises InvalidConfig when there is no directory fit for it, OSError when something runs out.
    """
    name = f"{slab_id.hex()}.{mark}" if mark else slab_id.hex()
    path = os.path.join(directory(), name)
    try:
        for _ in range(100):
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), 0o700)
            if len(os.fsencode(path)) > _PATH_MAX:
                raise OSError(f"the path {path} has more than {_PATH_MAX} bytes")
            with contextlib.suppress(FileNotFoundError), _opened(os.path.dirname(path)) as there:
                return _listen(there, name), path  # else the last to leave removed the directory just now
        raise FileNotFoundError(f"{path} vanishes again and again")
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        raise InvalidConfig(
            field="XDG_RUNTIME_DIR",
            value=os.environ.get("XDG_RUNTIME_DIR"),
            remedy=f"a named pool needs a directory for its socket: {error}; set it to one of this user's",
        ) from error


def _listen(there: str, name: str) -> int:
    private = f"{there}/.{os.urandom(8).hex()}"  # nobody meets a socket that does not listen yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(private)
        try:
            os.chmod(private, 0o600)
            sock.setblocking(False)
            sock.listen(_BACKLOG)
            os.rename(private, f"{there}/{name}")
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(private)
            raise
        return sock.detach()


def ask(path: str) -> socket.socket:
    """A connection to the socket at `path`: one of the members sends the descriptors over it.

    Raises OSError when nobody listens there, or not this user.
    """
    where, name = os.path.split(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.setblocking(False)
        with _opened(where) as there:
            sock.connect(f"{there}/{name}")
        _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != os.geteuid():
            raise PermissionError(f"{path} belongs to a process of user {uid}, not of this one ({os.geteuid()})")
    except BaseException:
        sock.close()
        raise
    return sock


def remove(path: str) -> None:
    """Remove the socket of a pool that has ended, and the directory with the last one."""
    where, name = os.path.split(path)
    if not _NAME.fullmatch(name):
        return
    with contextlib.suppress(OSError), _opened(where) as there:
        os.unlink(f"{there}/{name}")
        os.rmdir(where)


def sweep(living: set[bytes]) -> list[str]:
    """Remove the sockets to which no pool belongs any more; their paths. Those of the slabs `living` are left alone."""
    removed = []
    where = directory()
    with contextlib.suppress(OSError), _opened(where) as there:
        for name in os.listdir(there):
            path = f"{there}/{name}"
            if _is_dead(path, name, living):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    removed.append(os.path.join(where, name))
        os.rmdir(where)  # if it is empty
    return removed


def _is_dead(path: str, name: str, living: set[bytes]) -> bool:
    if _NAME.fullmatch(name):
        alive = "." not in name and bytes.fromhex(name) in living
        return not alive and not _is_heard(path)
    return name.startswith(".") and _age(path) > _ABANDONED_AFTER_S


def _is_heard(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # cannot tell
    return True


def _age(path: str) -> float:
    try:
        return time.time() - os.stat(path, follow_symlinks=False).st_mtime
    except OSError:
        return 0.0


# Without an answer --------------------------------------------------------------------------------------------------


def holders(view: _core.SlabView) -> Iterator[tuple[int, list[int], bool]]:
    """Processes that have all descriptors of the pool: (pid, their numbers there: mailboxes, listener; is there one).

    Registered members first, then any process of this user: it may have forked and not used the pool since.
    """
    _, _, _, _, listener, _, _ = view.identity()
    wanted = [*view.mailboxes(), *([listener] if listener else [])]
    members = view.workers()
    for pid in [*members, *(pid for pid in _processes() if pid not in members)]:
        with contextlib.suppress(OSError):  # it has ended meanwhile, or may not be looked at
            places = _sockets_of(pid)
            if all(inode in places for inode in wanted):
                yield pid, [places[inode] for inode in wanted], bool(listener)


def hold(slab: int, path: str) -> None:
    """Hold the segment before its descriptors are used: the member that was copied from may have been the last one, and
    may have left meanwhile, and the name with it. It cannot go any more once we hold the family's byte
    (core/segment.h). Raises FileNotFoundError when it has gone."""
    _core.family_join(slab)
    if not os.path.samestat(os.stat(path), os.fstat(slab)):
        raise FileNotFoundError(f"{path} has been replaced")


def _processes() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == os.geteuid():
                    yield int(name)


def _sockets_of(pid: int) -> dict[int, int]:
    """The sockets of a process: inode to descriptor."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            what = os.readlink(f"/proc/{pid}/fd/{name}")
            if what.startswith("socket:["):
                found[int(what[8:-1])] = int(name)
    return found
