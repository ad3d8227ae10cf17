"""What happened to a pool: its last 1024 events, noted by all processes, also by those that are gone.

    with shmpool.inspect("redis") as inspector:
        batch = inspector.events()
        for event in batch.events:
            print(event.describe())
        later = inspector.events(after=batch.next)     # what has happened since

Reading writes nothing and stops nobody. Events are of the life of connections, of the server, of processes and of the
pool; leases and returns are none (they are counted, see `stats`).

Not here: how they are kept (`core/events.h`), `shmpool events` (`cli`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from .dialing import unpack_failure

__all__ = ["KINDS", "Event", "EventBatch", "EventKind", "read_events"]

EventKind = Literal[
    "opened",
    "closed",
    "discarded",
    "dial_failed",
    "down",
    "up",
    "overdue",
    "taken_at",
    "died",
    "joined",
    "left",
    "state",
    "resized",
    "evicted",
]
KINDS: tuple[EventKind, ...] = get_args(EventKind)  # in the order of SHM_EVENT_KINDS in core/events.h

_IN_SECONDS = frozenset({"opened", "closed", "up", "overdue"})
_COUNTED = frozenset({"died", "resized", "evicted"})
_OF_FAILURES = frozenset({"dial_failed", "down"})


@dataclass(frozen=True)
class Event:
    """One event. What a kind does not have is None, or an empty text.

    kind          reason, seconds, count, text
    ----------    ----------------------------------------------------------------------------
    opened        `seconds` the dial took (None: a client's, accepted)
    closed        `reason` as in PoolStats.closed; `seconds` is its age
    discarded     `text`: what discard() was told
    dial_failed   `text`: why
    down          the server was found down; `text`: why
    up            the server answers again; `seconds` it was down
    overdue       a lease is out for longer than leak_timeout; `pid` holds it, for `seconds`
    taken_at      (with leak_stacks) where that lease was taken; `text`: one frame, the innermost comes first
    died          process `pid` died; `count` slots were taken back from it
    joined, left  process `pid` takes part, or does no more
    state         `reason`: what the pool is now ("open", "paused", "draining", "closed")
    resized       `count`: the cap now
    evicted       `count` connections are to end
    """

    number: int  # 0, 1, 2 ... in the order in which they were begun
    time: float  # time.time(), by the clock of the host
    kind: EventKind
    pid: int  # the process in which it happened, or to which
    connection_id: int | None
    slot: int | None
    reason: str
    seconds: float | None
    count: int | None
    text: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """A sentence."""
        return _describe(self)


class EventBatch(NamedTuple):
    """Some events, in order."""

    events: list[Event]
    next: int  # what to ask for to go on
    lost: int  # events in between that are gone: overwritten, or their process died while it wrote


def read_events(
    read: Callable[[int, bool], tuple[int, int, list[tuple[Any, ...]]]], after: int, patient: bool
) -> EventBatch:
    """The events from number `after` on. `patient`: the batch ends before one that is being written this moment."""
    if after < 0:
        raise ValueError(f"after={after}: events are numbered from 0 on")
    following, lost, rows = read(after, patient)
    return EventBatch([_event(*row) for row in rows], following, lost)


def _event(
    number: int, kind: EventKind, reason: str, time: float, connection: int, slot: int, pid: int, value: int, text: str
) -> Event:
    return Event(
        number=number,
        time=time,
        kind=kind,
        pid=pid,
        connection_id=connection or None,
        slot=slot if slot >= 0 else None,
        reason=reason,
        seconds=value / 1e9 if kind in _IN_SECONDS and value else None,
        count=value if kind in _COUNTED else None,
        text=unpack_failure(text)[0] if kind in _OF_FAILURES else text,
    )


def _describe(event: Event) -> str:
    which = f"connection {event.connection_id}"
    for_so_long = "" if event.seconds is None else f" after {_seconds(event.seconds)}"
    why, at = (f"{joint}{event.text}" if event.text else "" for joint in (": ", " at "))
    texts: dict[EventKind, str] = {
        "opened": f"{which} is opened" + ("" if event.seconds is None else f" in {_seconds(event.seconds)}"),
        "closed": f"{which} ended{for_so_long}: {event.reason}",
        "discarded": f"{which} was discarded{why}",
        "dial_failed": f"a dial failed{why}",
        "down": f"the server is down{why}",
        "up": f"the server answers again{for_so_long}",
        "overdue": f"{which} is out on lease for {_seconds(event.seconds or 0.0)}",
        "taken_at": f"{which} was taken{at}",
        "died": f"this process died; {_slots(event.count or 0)} taken back",
        "joined": "this process takes part",
        "left": "this process has given its part back",
        "state": f"the pool is {event.reason}",
        "resized": f"the cap is {event.count}",
        "evicted": f"{event.count} to end: evicted",
    }
    return texts[event.kind]


def _slots(count: int) -> str:
    return f"{count} slot{'' if count == 1 else 's'} {'was' if count == 1 else 'were'}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.1f} s" if value < 600 else f"{value / 60:.0f} min"
