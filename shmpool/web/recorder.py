"""What the web view remembers of each pool: the newest look at it, ten minutes of figures, its last events.

One thread looks once in `PERIOD_S` at every pool of this user, or at the one of a given name; whoever asks is answered
from memory, so it costs the pools nothing more however many ask. An inspector is kept open as long as its segment is
the one that bears the name (the same inode), and is read a last time when it is not: so the end of a pool is seen.

Invariants: answers are of plain JSON types. What is kept is bounded: `POINTS_MAX` points and `EVENTS_MAX` events a
pool, and `ENDED_MAX` pools that have ended. A name that is asked for is looked up here and nowhere else. The lock is
held for one look at one pool, or for one answer.

Not here: HTTP (`web`), what the figures mean (`stats`), opening a pool (`inspector`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from .. import slab
from ..errors import PoolError, PoolNotFound
from ..events import Event
from ..inspector import Inspector, pool_names
from ..stats import FAILURES, PoolStats

__all__ = ["Recorder"]

PERIOD_S = 1.0
POINTS_MAX = 600
EVENTS_MAX = 200
ENDED_MAX = 16

_T = TypeVar("_T")


class Tail(Generic[_T]):
    """The last items of a sequence; they are numbered from 0 on, and the next one will be number `next`."""

    def __init__(self, most: int) -> None:
        self._items: deque[_T] = deque(maxlen=most)
        self.next = 0

    def add(self, item: _T) -> None:
        """One more; the oldest may go."""
        self._items.append(item)
        self.next += 1

    def since(self, number: int) -> list[_T]:
        """Those from `number` on, as far as they are kept."""
        first = self.next - len(self._items)
        return list(itertools.islice(self._items, max(0, number - first), None))


class Point(NamedTuple):
    """What is plotted of one look. None: nothing was timed since the look before, or there was none before."""

    time: float  # time.time()
    cap: int
    in_use: int
    idle: int
    busy: int  # open, and neither in use nor idle: being dialled, checked or ended
    waiting: int
    leases: float | None  # a second
    failures: float | None  # calls that got no connection, a second
    get_p50: float | None  # seconds, as all that follow
    get_p99: float | None
    wait_p99: float | None


@dataclass(frozen=True)
class Look:
    """A pool at a moment: `stats`, and `change` since the look before; at the first its interval is 0."""

    time: float
    stats: PoolStats
    change: PoolStats

    def point(self) -> Point:
        """Its part of the plots."""
        now, change = self.stats, self.change
        get, wait = change.get_latency, change.wait_latency
        failures = sum(getattr(change, name) for name in FAILURES)
        return Point(
            time=self.time,
            cap=now.max_connections,
            in_use=now.in_use,
            idle=now.idle,
            busy=now.open - now.in_use - now.idle,
            waiting=now.waiting,
            leases=change.per_second(change.successes) if change.interval else None,
            failures=change.per_second(failures) if change.interval else None,
            get_p50=get.p50 if get.count else None,
            get_p99=get.p99 if get.count else None,
            wait_p99=wait.p99 if wait.count else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures: of the pool's life, and of the time since the look before, of which the workers' are too."""
        return {
            "taken_at": self.time,
            "total": self.stats.figures(),
            "recent": self.change.figures(),
            "workers": [each.to_dict() for each in self.change.workers],
            "connections": [each.to_dict() for each in self.stats.slots],
            "waiters": [each.to_dict() for each in self.stats.waiters],
        }


class Record:
    """What is known of the pool of one name, and of those that had the name before."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.newest: Look | None = None
        self.points: Tail[Point] = Tail(POINTS_MAX)
        self.events: Tail[Event] = Tail(EVENTS_MAX)
        self.events_lost = 0  # since the first look at the pool that there is
        self.error = ""
        self.ended_at: float | None = None  # when its end was seen; a pool that never was has none
        self._is_alive = False
        self._inode: int | None = None
        self._inspector: Inspector | None = None
        self._next_event = 0
        self._event_is_stuck = False  # half written at the last look: for ever, if its process died

    @property
    def status(self) -> str:
        """The pool's state, or "absent", "damaged", "ended", "dead" (no process has it, its segment is still there)."""
        if self.error:
            return "damaged"
        if self.ended_at is not None:
            return "ended"
        if self.newest is None:
            return "absent"
        return self.newest.stats.state if self._is_alive else "dead"

    def look(self) -> None:
        """One more look, also for whether the name has a pool at all."""
        inode = _inode(self.name)
        try:
            if self._inspector is not None:
                self._read(self._inspector)
            if inode != self._inode:
                self.close()
                self._inode = inode
            if inode is not None and self._inspector is None:
                self._open()
        except PoolNotFound:  # just now; the next look sees the same
            pass
        except PoolError as error:
            self.close()
            self.error = str(error)
        if inode is None:
            self.error = ""
            if self.newest is not None and self.ended_at is None:
                self.ended_at = time.time()

    def close(self) -> None:
        """Let go of the segment."""
        if self._inspector is not None:
            self._inspector.close()
        self._inspector, self._is_alive = None, False

    def _open(self) -> None:
        self._inspector = inspector = Inspector(self.name)
        self._next_event, self._event_is_stuck, self.events_lost = 0, False, 0
        self._read(inspector, is_first=True)
        self.error, self.ended_at = "", None

    def _read(self, inspector: Inspector, *, is_first: bool = False) -> None:
        """Once after the last process has gone, and then no more."""
        was_alive, self._is_alive = self._is_alive, inspector.alive
        if not (self._is_alive or was_alive or is_first):
            return
        stats = inspector.stats()
        earlier = self.newest.stats if self.newest and not is_first else stats
        self.newest = Look(time.time(), stats, stats.diff(earlier))
        if self._is_alive:
            self.points.add(self.newest.point())
        self._read_events(inspector, is_first)

    def _read_events(self, inspector: Inspector, is_first: bool) -> None:
        batch = inspector.events(self._next_event, patient=not self._event_is_stuck)
        is_late = batch.next == self._next_event
        self._event_is_stuck = is_late and inspector.events(self._next_event).next > self._next_event
        self._next_event = batch.next
        for event in batch.events:
            self.events.add(event)
        if not is_first:
            self.events_lost += batch.lost


def _inode(name: str) -> int | None:
    try:
        return os.lstat(slab.checked_path(name)).st_ino
    except OSError:
        return None


class Recorder:
    """The records of all pools of this user, or of the one named `only`; a context manager that looks meanwhile.

    Raises InvalidConfig when no pool can be named so.
    """

    def __init__(self, only: str | None = None) -> None:
        if only is not None:
            slab.checked_path(only)
        self.run = f"{time.time_ns():x}"  # numbers of points and events are of one recorder
        self._only = only
        self._records: dict[str, Record] = {}
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="shmpool-recorder", daemon=True)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        for record in self._records.values():
            record.close()

    def _look_on(self) -> None:
        due = time.monotonic()
        while not self._is_over.wait(max(0.0, due - time.monotonic())):
            with contextlib.suppress(OSError):  # no descriptor was free, say: the next look may have one
                self.look()
            due = max(due + PERIOD_S, time.monotonic())  # what was missed, in a sleep of the machine's say, is a gap

    def look(self) -> None:
        """At every pool, once."""
        for name in [self._only] if self._only is not None else sorted(pool_names()):
            if name not in self._records:
                with self._lock:
                    self._records[name] = Record(name)
        for record in list(self._records.values()):
            with self._lock:
                record.look()
        self._forget()

    def _forget(self) -> None:
        """Names that are gone and never had a sound pool, and all but the last that have ended."""
        ended = sorted(
            (record for record in self._records.values() if record.status == "ended"),
            key=lambda record: record.ended_at or 0.0,
        )
        gone = [record for record in self._records.values() if record.status == "absent" and record.name != self._only]
        with self._lock:
            for record in ended[:-ENDED_MAX] + gone:
                del self._records[record.name]

    # What is asked ---------------------------------------------------------------------------------------------------

    def pools(self) -> dict[str, Any]:
        """A row for each pool, by name."""
        with self._lock:
            rows = [_row(record) for _, record in sorted(self._records.items())]
        return {"run": self.run, "now": time.time(), "only": self._only, "pools": rows}

    def pool(self, name: str, events: int = 0) -> dict[str, Any] | None:
        """The newest figures of a pool, with its events from number `events` on; None when there is no such pool."""
        with self._lock:
            if (record := self._records.get(name)) is None:
                return None
            figures = record.newest.to_dict() if record.newest else {}
            return {
                "run": self.run,
                "now": time.time(),
                "name": name,
                "status": record.status,
                "error": record.error,
                "ended_at": record.ended_at,
                **figures,
                "events": [{**event.to_dict(), "says": event.describe()} for event in record.events.since(events)],
                "next_event": record.events.next,
                "events_lost": record.events_lost,
            }

    def history(self, name: str, since: int = 0) -> dict[str, Any] | None:
        """The points of a pool from number `since` on; None when there is no such pool."""
        with self._lock:
            if (record := self._records.get(name)) is None:
                return None
            points, following = record.points.since(since), record.points.next
        return {
            "run": self.run,
            "period": PERIOD_S,
            "points_max": POINTS_MAX,
            "fields": Point._fields,
            "points": points,
            "next": following,
        }


def _row(record: Record) -> dict[str, Any]:
    stats = record.newest.stats if record.newest else None
    return {
        "name": record.name,
        "status": record.status,
        "error": record.error,
        "target": stats.target if stats else "",
        "upstream": stats.upstream if stats else "",
        "in_use": stats.in_use if stats else None,
        "waiting": stats.waiting if stats else None,
        "max_connections": stats.max_connections if stats else None,
    }
