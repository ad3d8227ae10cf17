"""Steering a pool from outside, by name: `pause`, `resume`, `drain`, `resize`, `evict`, `recover`, `close`.

    from shmpool import steering
    steering.pause("redis")             # in all its processes: who wants a connection waits
    steering.resume("redis")

They do what the methods of Pool of the same names do, for who is no member of the pool: the person who runs it, a
script at deployment, the command `shmpool`. Any process of the pool's user may. It joins nothing and needs no
descriptor of the pool.

How: the segment is mapped for writing, after the checks that every look at it makes (`slab.open_view`), and the words
that all members look at are changed (core/steering.h). What takes a member, such as ending an idle connection or
taking back what the dead held, is done by the members' maintenance at its next tick, or by whoever meets it before;
`drain` and `recover` wait for that by looking.

All raise PoolNotFound (nobody has a pool of that name), PoolClosed, SlabCorrupt, SlabVersionMismatch, or InvalidConfig
for a name that no pool can have.

Not here: what a state means to get() and release() (core/pool.c), a member's own steering (pool).
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from . import _core, slab
from .config import PoolConfig, checked_timeout
from .errors import InvalidConfig, PoolClosed, PoolError, PoolNotFound, SlabCorrupt
from .sockets import pack_peer

__all__ = ["Unattended", "check_cap", "close", "drain", "evict", "pause", "recover", "resize", "resume"]

logger = logging.getLogger("shmpool.pool")

DRAIN_TIMEOUT_S = 30.0
RECOVER_TIMEOUT_S = 10.0
_LOOK_S = 0.02
_ELECTION_S = 1.0  # one of the members is elected within this time and an interval
_IN_USE = ("leased", "offered", "dialing", "checking")


@dataclass(eq=False, kw_only=True)
class Unattended(PoolError, TimeoutError):
    """What dead processes (`pids`) held is not taken back: no process of the pool has looked after it in time."""

    name: str = ""
    pids: tuple[int, ...] = ()
    waited: float = 0.0
    maintained: bool = False

    def _text(self) -> str:
        who = f"process {', '.join(map(str, self.pids))} of " if self.pids else ""
        why = "its maintenance is busy" if self.maintained else "no process of it has a maintenance thread at work"
        return (
            f"what {who}pool {self.name!r} held is not taken back after {self.waited:.1f} s: {why}; the next get() "
            "that finds nothing idle does it, or recover() in one of its processes"
        )


@dataclass(eq=False, kw_only=True)
class _Remains(PoolNotFound):
    def _text(self) -> str:
        return f"no process has pool {self.name!r} any more; 'shmpool doctor' removes what is left of it"


def pause(name: str) -> bool:
    """Give nothing out, in all processes of the pool, until `resume()`: get() waits, at most its timeout; leases that
    are out go on. Whether that is new: False when it was paused already."""
    with _opened(name) as view:
        return _steer(view, name, "paused")


def resume(name: str) -> bool:
    """Go on after `pause()` or `drain()`. False when it was open already."""
    with _opened(name) as view:
        return _steer(view, name, "open")


def drain(name: str, timeout: float = DRAIN_TIMEOUT_S) -> int:
    """Let what is under way finish and refuse the rest: callers that wait already are served, later ones get PoolClosed
    (its `draining` is true), idle connections end, leased ones at their return. The pool stays so until `resume()`.

    Waits up to `timeout` seconds until nothing is in use and, where members have maintenance, nothing is open; returns
    how many leases are still out. It stops waiting when somebody resumes the pool.
    """
    checked_timeout(timeout)
    with _opened(name) as view:
        _steer(view, name, "draining")
        return _wait_for_leases(view, timeout, "draining")


def close(name: str, timeout: float = 0.0) -> int:
    """Close the pool for all processes, and free its name: waiting and later calls get PoolClosed, idle connections
    end, leased ones at their return. Waits up to `timeout` seconds for the leases; returns how many are still out."""
    checked_timeout(timeout)
    with _opened(name) as view:
        _steer(view, name, "closed")
        slab.remove_own(name, view.identity()[0])
        return _wait_for_leases(view, timeout, "closed")


def resize(name: str, max_connections: int) -> int:
    """Change the cap, to `min_connections` .. `resize_limit`; returns what it was.

    A larger one serves waiting callers at once. For a smaller one the connections beyond it end: idle ones at the
    next tick of the members' maintenance, leased ones at their return. Raises InvalidConfig for a number out of range.
    """
    with _opened(name) as view:
        _, most = view.limits()
        check_cap(max_connections, max(1, _config(view, name).effective_min_connections), most)
        before = view.resize(max_connections)
        _log(name, "resized", f"pool {name!r} has {max_connections} connections at most, before {before}")
        return before


def check_cap(max_connections: object, lowest: int, most: int) -> None:
    """Raise InvalidConfig when a pool that may have `lowest` to `most` connections cannot be resized to this."""
    if isinstance(max_connections, bool) or not isinstance(max_connections, int) or max_connections < 1:
        raise InvalidConfig(field="max_connections", value=max_connections, remedy="must be a whole number from 1")
    if not lowest <= max_connections <= most:
        remedy = (
            f"this pool can have {lowest} (min_connections) to {most} connections; "
            "make it with another min_connections, or with resize_limit= for more"
        )
        raise InvalidConfig(field="max_connections", value=max_connections, remedy=remedy)


def evict(
    name: str,
    connection_id: int | None = None,
    peer: tuple[str, int] | str | None = None,
    *,
    leased: bool = False,
) -> int:
    """End connections: one, those to a peer (an address, or (address, port)), or, with neither, all idle ones.

    Idle ones end at the next tick of the members' maintenance, or when somebody meets them; nobody leases them any
    more. With `connection_id`, `peer` or `leased=True` those in use are meant as well: they end when they are returned.
    Returns how many were found. Raises ValueError for a peer that is no address.
    """
    packed = b"" if peer is None else pack_peer(peer)
    named = connection_id is not None or peer is not None
    with _opened(name) as view:
        if connection_id is not None and not 1 <= connection_id < 1 << 64:
            return 0
        found = view.evict(connection_id or 0, packed, leased or named)
        _log(name, "evicted", f"pool {name!r}: {found} connections are evicted")
        return found


def recover(name: str, timeout: float = RECOVER_TIMEOUT_S) -> int:
    """See that what dead processes held is taken back; returns how many dead processes there were.

    The members do it, at each tick of their maintenance and whenever a get() finds nothing; this waits until it is
    done, at most `timeout` seconds. Raises Unattended when it is not, and as soon as it is clear that no member has
    maintenance.
    """
    checked_timeout(timeout)
    begun = time.monotonic()
    unattended_since = begun
    dead: dict[tuple[int, int], int] = {}
    with _opened(name) as view:
        interval = _config(view, name).maintenance_interval
        patience = _ELECTION_S + (2 * interval if interval < math.inf else 0)
        while True:
            members = view.members()
            dead.update({(index, generation): pid for index, generation, pid, alive in members if not alive})
            # A place that is being swept looks alive: whoever sweeps it holds its lock.
            left = dead.keys() & {(index, generation) for index, generation, _, _ in members}
            if not left:
                return len(dead)
            now, maintained = time.monotonic(), view.maintained()
            if maintained:
                unattended_since = now
            if now - begun >= timeout or now - unattended_since >= patience:
                pids = tuple(sorted(dead[each] for each in left))
                raise Unattended(name=name, pids=pids, waited=now - begun, maintained=maintained)
            time.sleep(_LOOK_S)


# ---- the pool in hand -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(name: str) -> Iterator[_core.SlabView]:
    """The living pool `name`, for writing."""
    with slab.view(name, writable=True) as view:
        if not view.identity()[6]:
            raise PoolClosed(pool=name)
        if not view.in_use():
            raise _Remains(name=name)
        yield view


def _steer(view: _core.SlabView, name: str, state: str) -> bool:
    changed = view.steer(state)
    if not changed and state != "closed" and not view.identity()[6]:
        raise PoolClosed(pool=name)
    if changed:
        _log(name, "resumed" if state == "open" else state, f"pool {name!r} is {state}")
    return changed


def _log(name: str, reason: str, text: str) -> None:
    """In the log of this process, as a member has it in its own."""
    logger.info("%s, from outside", text, extra={"pool": name, "slot": None, "connection_id": None, "reason": reason})


def _wait_for_leases(view: _core.SlabView, timeout: float, state: str) -> int:
    """Until nothing is in use (or open, if somebody can see to that); the leases that are still out."""
    deadline = time.monotonic() + timeout
    while True:
        snapshot = view.snapshot()
        states = Counter(str(row[1]) for row in snapshot["slots"])
        out = sum(states[each] for each in _IN_USE)
        waits = state == "draining" and snapshot["waiters"]  # they are served yet
        settled = not (out or waits) and (states["empty"] == states.total() or not view.maintained())
        gone = not view.in_use() or snapshot["state"] not in (state, "closed")
        if settled or gone or time.monotonic() >= deadline:
            return out
        time.sleep(_LOOK_S)


def _config(view: _core.SlabView, name: str) -> PoolConfig:
    """The pool's settings; callables of its own are None, or this module's."""
    text = view.identity()[2]
    try:
        try:
            return PoolConfig.from_json(text)
        except InvalidConfig as error:
            if error.field != "dial":
                raise
            return PoolConfig.from_json(text, dial=_not_called)
    except (ValueError, TypeError, RecursionError) as error:
        raise SlabCorrupt(name=name, detail=f"its settings cannot be read: {error}") from error


def _not_called(_: object) -> tuple[()]:
    raise AssertionError("stands for a dial of another process")
