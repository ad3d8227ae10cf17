"""Leases that are out for too long: where they were taken, and the report.

The core knows since when each lease is out, and gives the right to report it to one process, once. What it cannot know
is where the lease was taken: with `leak_stacks`, `Takers.noting()` is this process's on_borrow hook and keeps for each
slot the last lease's thread and stack, as code objects and line numbers, which become text when they are reported.
Without `leak_stacks` nothing is noted and no lease pays for it.

A lease is reported by its holder's process when it is overdue; by the elected one `GRACE_TICKS` intervals of
maintenance later, without the stack, if the holder has not done it (it is stopped, or has no thread).

Not here: when this is done (maintenance), what the hook is told (hooks).
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .hooks import LeakReport, call_on_leak

if TYPE_CHECKING:
    from ._core import PooledConnection
    from .config import PoolConfig

__all__ = ["Taken", "Takers", "report_overdue"]

logger = logging.getLogger("shmpool.maintenance")

GRACE_TICKS = 2
_DEPTH_MAX = 40  # frames
_PLACES_MAX = 8  # of which events are made
_PLACE_BYTES, _NAME_BYTES = 63, 30


class Taken(NamedTuple):
    """Where a lease was taken. Holds no frame, and so none of its variables."""

    connection_id: int
    thread: str
    frames: tuple[tuple[CodeType, int], ...]  # innermost first

    def stack(self) -> str:
        """As a traceback shows it, without its heading."""
        summary = [traceback.FrameSummary(code.co_filename, line, code.co_name) for code, line in self.frames]
        return "".join(traceback.StackSummary.from_list(summary[::-1]).format())

    def places(self) -> list[str]:
        """The innermost frames, each as an event can hold it: "handler (…/shop/views.py:42)"."""
        return [_place(code, line) for code, line in self.frames[:_PLACES_MAX]]


class Takers:
    """Who took which connection, of one pool in one process. Any thread may call anything."""

    def __init__(self) -> None:
        self._by_slot: dict[int, Taken] = {}  # as many as there are slots, at most

    def remember(self, conn: PooledConnection) -> None:
        """Note that the calling thread takes this lease, called from where it stands."""
        self._by_slot[conn._slot] = Taken(conn.id, threading.current_thread().name, _frames())

    def noting(self, hook: Callable[[PooledConnection], object] | None) -> Callable[[PooledConnection], object]:
        """An on_borrow hook that remembers, and then calls `hook`."""
        if hook is None:
            return self.remember
        then = hook

        def note(conn: PooledConnection) -> object:
            self.remember(conn)
            return then(conn)

        return note

    def of(self, slot: int, connection_id: int) -> Taken | None:
        taken = self._by_slot.get(slot)
        return taken if taken is not None and taken.connection_id == connection_id else None

    def clear(self) -> None:
        self._by_slot.clear()


def _frames() -> tuple[tuple[CodeType, int], ...]:
    frame = sys._getframe(1)
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < _DEPTH_MAX:
        if found or frame.f_code.co_filename != __file__:
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


def _place(code: CodeType, line: int) -> str:
    """What is too long loses the beginning of its path."""
    function, where = (text.encode(errors="replace") for text in (code.co_name, f"{code.co_filename}:{line})"))
    start = function[:_NAME_BYTES] + b" ("
    if len(start) + len(where) > _PLACE_BYTES:
        start += "…".encode()
        where = where[len(start) - _PLACE_BYTES :]
    return (start + where).decode(errors="ignore")


class Lender(Protocol):
    """What reporting needs of a pool."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> PoolConfig: ...
    def _overdue(self, age: float, only_own: bool, /) -> list[tuple[int, int, int, int, float]]: ...
    def _report_leak(self, slot: int, word: int, /) -> bool: ...
    def _note_frame(self, slot: int, connection: int, text: str, /) -> None: ...
    def _revoke(self, slot: int, word: int, /) -> bool: ...


def report_overdue(pool: Lender, takers: Takers, *, only_own: bool) -> int:
    """Report the leases that are overdue and not reported: this process's, or those of all, a little later. How many.

    With leak_action="revoke" the lease is taken away first: of all who see it one succeeds, and that one reports it.
    """
    config = pool.config
    if math.isinf(config.leak_timeout):
        return 0
    age = config.leak_timeout
    if not only_own and not math.isinf(config.maintenance_interval):
        age += GRACE_TICKS * config.maintenance_interval
    revoke = config.leak_action == "revoke"
    reported = 0
    for slot, word, connection_id, pid, held in pool._overdue(age, only_own):
        taken = takers.of(slot, connection_id) if pid == os.getpid() else None  # a revoked slot is soon another's
        if not (pool._revoke(slot, word) if revoke else pool._report_leak(slot, word)):
            continue  # given back just now, or another process reports it
        for place in taken.places() if taken else ():
            pool._note_frame(slot, connection_id, place)
        report = LeakReport(
            connection_id=connection_id,
            slot=slot,
            pid=pid,
            held=held,
            thread=taken.thread if taken else None,
            stack=taken.stack() if taken else None,
            revoked=revoke,
        )
        _log(pool.name, config, report)
        if config.on_leak is not None:
            call_on_leak(config.on_leak, report, pool.name)
        reported += 1
    return reported


def _log(pool: str, config: PoolConfig, report: LeakReport) -> None:
    by = f"thread {report.thread!r} of process {report.pid}" if report.thread else f"process {report.pid}"
    if report.stack is not None:
        where = f"; it was taken here:\n{report.stack.rstrip()}"
    elif not config.leak_stacks:
        where = "; leak_stacks=True would tell where it was taken"
    else:
        where = ""
    logger.warning(
        "a lease of pool %r is out for %.1f s (leak_timeout %g s): connection %d, held by %s%s%s",
        pool,
        report.held,
        config.leak_timeout,
        report.connection_id,
        by,
        ", has been taken away" if report.revoked else "",
        where,
        extra={
            "pool": pool,
            "slot": report.slot,
            "connection_id": report.connection_id,
            "reason": "revoked" if report.revoked else "overdue",
        },
    )
