"""What the program's hooks are told, and what becomes of one that raises.

    hook        in which process and thread
    on_created  the one that dialled or accepted the connection, before anybody can lease it; raising refuses it
    on_borrow   the one that leases, before get() returns
    on_return   the one that releases, before the connection is free
    on_close    the one that ended the connection, when its permit is free again
    on_leak     the maintenance thread of the process that holds the lease; of the elected one when that one is late

The first three have somebody who waits for what they say: what they raise is raised there (pool and core). The last two
are told of something that has happened: what they raise goes to the log "shmpool.hooks", as ERROR with its traceback,
and nowhere else. Only what is no `Exception` (a KeyboardInterrupt that a signal handler raised meanwhile) goes on to
the caller.

Not here: finding leaks (leaks), and the thread (maintenance).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from .config import IPVersion, Protocol

__all__ = ["CloseReason", "ClosedConnection", "LeakReport", "call_on_close", "call_on_leak"]

logger = logging.getLogger("shmpool.hooks")

CloseReason = Literal[
    "broken",  # closed or reset by the peer
    "dirty",  # unread bytes, or a socket that could not be put back into the pool's mode
    "error",  # its lease ended with an exception, or with discard()
    "leaked",  # its lease was dropped without release
    "idle",  # idle for longer than idle_timeout, or more idle ones than max_idle_connections
    "lifetime",  # older than max_lifetime
    "refused",  # a hook refused it
    "evicted",  # evict(), or its permit was needed for another kind of connection
    "letter",  # its descriptor could not be shared between the processes
    "owner_died",  # the process that held it died
    "shutdown",  # the pool was closed or drained, or its holder left
    "unhealthy",  # a health check found it so
    "resized",  # resize() made the pool smaller
    "revoked",  # its lease was overdue, and leak_action is "revoke"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedConnection:
    """A connection that has ended, as `on_close` gets it. A plain value: it may be kept, and pickled."""

    id: int
    """Number of the connection, unique in the pool."""
    slot: int
    """Which of the pool's places it had; by now another connection may have it."""
    protocol: Protocol
    ip_version: IPVersion | None
    """None for a unix socket."""
    peer: tuple[str, int] | str
    """(host, port), or the path of a unix socket."""
    reason: CloseReason
    age: float
    """Seconds from its opening to its end."""
    uses: int
    """How often it was leased, over all processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakReport:
    """A lease that is out for longer than `leak_timeout`, as `on_leak` gets it: once for each lease. A plain value."""

    connection_id: int
    slot: int
    pid: int
    """The process that holds it; not always the one that reports it."""
    held: float
    """Seconds since it was taken."""
    thread: str | None
    """Name of the thread that took it; None without `leak_stacks`, and in a report on another process."""
    stack: str | None
    """Where it was taken, as a traceback shows it, innermost call last; None in the same cases."""
    revoked: bool
    """Whether it has been taken away (leak_action="revoke"): the connection is ended, the holder gets LeaseExpired."""


_Told = TypeVar("_Told")


def call_on_close(hook: Callable[[ClosedConnection], object], closed: ClosedConnection, pool: str) -> None:
    """Tell `hook` of a connection of `pool` (its name) that has ended."""
    _tell("on_close", hook, closed, pool, closed.slot, closed.id, closed.reason)


def call_on_leak(hook: Callable[[LeakReport], object], report: LeakReport, pool: str) -> None:
    """Tell `hook` of a lease of `pool` (its name) that is overdue."""
    reason = "revoked" if report.revoked else "overdue"
    _tell("on_leak", hook, report, pool, report.slot, report.connection_id, reason)


def _tell(
    name: str, hook: Callable[[_Told], object], told: _Told, pool: str, slot: int, connection: int, reason: str
) -> None:
    try:
        hook(told)
    except (Exception, SystemExit) as error:
        logger.error(
            "%s of pool %r raised %s for connection %d (%s)",
            name,
            pool,
            type(error).__name__,
            connection,
            reason,
            exc_info=error,
            extra={"pool": pool, "slot": slot, "connection_id": connection, "reason": reason},
        )
