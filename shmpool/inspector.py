"""Looking at pools from outside: `inspect(name)`, `list_pools()`, `unlink(name)`.

    with shmpool.inspect("redis") as inspector:
        print(inspector.stats().in_use)

A segment is opened with `posix_ipc`, which registers with no resource tracker (one would unlink the live pool when
this process ends), and mapped read-only: an inspector cannot change a pool, is no worker of it and holds no lock in it.

A segment is checked before it is believed (`slab.open_view`). What does not fit is a `SlabCorrupt` that says why, or a
`SlabVersionMismatch`; a name that nobody has, `PoolNotFound`; a name that nobody can have, `InvalidConfig`.

Not here: what the figures mean (`stats`), and making or joining a pool (`pool`).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import posix_ipc

from . import _core, slab
from .config import name_problem
from .errors import PoolError, PoolInUse, PoolNotFound, SlabCorrupt
from .events import EventBatch, read_events
from .stats import PoolStats

__all__ = ["Inspector", "PoolInfo", "inspect", "list_pools", "pool_names", "unlink"]


@dataclass(frozen=True)
class PoolInfo:
    """A segment that bears a pool's name. With an `error` (damaged, foreign) only name, alive and size are known."""

    name: str
    pid: int = 0  # who created it
    alive: bool = False  # some process still has it
    state: str = ""  # "open", "paused", "draining", "closed"
    size: int = 0  # bytes
    open: int = 0  # connections there are, or are being opened or closed
    max_connections: int = 0  # as it is now
    target: str = ""
    upstream: str = ""  # the server's state: "unproved", "up", "down", "probing"
    created_at: float = 0.0  # time.time()
    error: str = ""


class Inspector:
    """A read-only look at one pool; see `inspect`. A context manager."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._closed = False
        self._view = slab.open_view(name)

    def snapshot(self) -> dict[str, Any]:
        """All that the pool's segment says, as plain objects; `stats()` is for people."""
        try:
            return self._view.snapshot()
        except ValueError as error:
            if self._closed:
                raise
            raise SlabCorrupt(name=self.name, detail=str(error)) from error

    def stats(self) -> PoolStats:
        """The figures of this moment."""
        return PoolStats.from_snapshot(self.snapshot())

    def events(self, after: int = 0, *, patient: bool = False) -> EventBatch:
        """What happened from event number `after` on, as far as it is kept (the last 1024 events).

        To follow, ask with `patient=True`, so that an event that is being written this moment is not counted as lost
        but comes with the next batch.
        """
        try:
            return read_events(self._view.events, after, patient)
        except ValueError as error:
            if self._closed or after < 0:
                raise
            raise SlabCorrupt(name=self.name, detail=str(error)) from error

    @property
    def alive(self) -> bool:
        """Whether any process still has the pool."""
        return self._view.in_use()

    def close(self) -> None:
        """Let go of the segment. Once more does nothing."""
        self._closed = True
        self._view.close()

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Inspector of {self.name!r}{', closed' if self._closed else ''}>"


def inspect(name: str) -> Inspector:
    """A read-only look at the pool of that name. It never writes, and the pool does not notice."""
    return Inspector(name)


def list_pools() -> list[PoolInfo]:
    """Every segment of this user that bears a pool's name, sorted; the damaged ones too, each with its `error`."""
    return [info for name in sorted(pool_names()) if (info := _info(name)) is not None]


def unlink(name: str, force: bool = False) -> None:
    """Remove a segment that nobody uses, or with `force` any; damaged ones and what only bears the name as well.

    Processes that have the pool go on with it after a forced removal; nobody can find it any more. Raises
    `PoolInUse`, `PoolNotFound`, or `PoolError` when it may not be removed.
    """
    path = slab.checked_path(name)
    try:
        status = os.lstat(path)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
        if force or not ours:
            posix_ipc.unlink_shared_memory(f"/{path.name}")
        elif not slab.remove_remains(name):
            if _in_use(name):
                raise PoolInUse(name=name, pids=_pids(name))
            posix_ipc.unlink_shared_memory(f"/{path.name}")  # no slab, or no longer one, and nobody has it open as one
    except (FileNotFoundError, posix_ipc.ExistentialError):
        raise PoolNotFound(name=name) from None
    except (OSError, posix_ipc.Error) as error:
        raise _CannotRemove(path=str(path), reason=str(error) or type(error).__name__) from error


@dataclass(eq=False, kw_only=True)
class _CannotRemove(PoolError):
    path: str = ""
    reason: str = ""

    def _text(self) -> str:
        return f"{self.path} cannot be removed: {self.reason}"


def pool_names() -> Iterator[str]:
    """The names of this user's segments, damaged ones too, in no order; any of them may be gone a moment later."""
    for entry in Path(slab.DIRECTORY).glob(f"{slab.prefix()}*"):
        name = entry.name.removeprefix(slab.prefix())
        if not name_problem(name):  # else it is a segment that is just being made
            yield name


# Looking around -----------------------------------------------------------------------------------------------------


def _info(name: str) -> PoolInfo | None:
    """None: it has gone meanwhile."""
    try:
        with Inspector(name) as inspector:
            snapshot = inspector.snapshot()
            return PoolInfo(
                name=name,
                pid=snapshot["creator_pid"],
                alive=inspector.alive,
                state=snapshot["state"],
                size=snapshot["size"],
                open=sum(row[1] != "empty" for row in snapshot["slots"]),
                max_connections=snapshot["max_connections"],
                target=snapshot["target"],
                upstream=snapshot["upstream"]["state"],
                created_at=snapshot["created_at"],
            )
    except PoolNotFound:
        return None
    except PoolError as error:
        return PoolInfo(name=name, alive=_in_use(name), size=_size(name), error=re.sub(r"\s+", " ", str(error)))


def _size(name: str) -> int:
    try:
        return os.lstat(slab.checked_path(name)).st_size
    except OSError:
        return 0


def _in_use(name: str) -> bool:
    """Whether any process has the segment, be its contents sound or not. What is no segment of ours, nobody has."""
    try:
        fd = slab.open_checked(name)
    except PoolError:
        return False
    try:
        return _core.byte_is_locked(fd, _core.FAMILY_BYTE)
    finally:
        os.close(fd)


def _pids(name: str) -> tuple[int, ...]:
    """Who uses it; empty when that cannot be told: nobody has registered, or the segment is damaged."""
    try:
        with Inspector(name) as inspector:
            return tuple(worker.pid for worker in inspector.stats().workers if worker.alive)
    except PoolError:
        return ()
