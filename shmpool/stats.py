"""What a snapshot of a pool says, in seconds and names: `PoolStats`, its `workers` and its `slots`.

    stats = pool.stats()                          # or shmpool.inspect("redis").stats()
    stats.in_use, stats.waiting, stats.get_latency.p99
    change = later.diff(earlier)
    change.per_second(change.gets)                # between the two

A snapshot is a plain dict that the core makes; everything here is computed from it and nothing is asked again, so the
figures of one `PoolStats` belong together as far as a pool that is never stopped for looking allows. Gauges
(connections by state, waiting, the server's state) are of the moment; counters and latencies are of `interval` seconds:
the pool's life, or the time between two snapshots. Counters of a worker belong to its index, and go on when a new
process takes the index over: sums over `workers` are sums over all processes, living and departed.

Invariants: a counter of the core that is a field here bears the same name (`slab.h` has the list, with what each
counts). A damaged slab may yield senseless figures, never an exception.

Not here: taking the snapshot (the core, `inspector`), and showing it (`cli`).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
import operator
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

from .config import PoolConfig
from .dialing import unpack_failure

__all__ = ["ConnectionCounts", "ConnectionStats", "Latency", "PoolStats", "WaiterStats", "WorkerStats"]

# Counters that say where a lease came from, and why a call got none: those of workers, but for the last, because who
# calls after it has given its part back is no worker.
SOURCES = ("hits", "freelist", "steals", "dials", "spoken", "handovers")
FAILURES = ("timeouts", "exhausted", "refused", "dial_errors", "interrupted", "late_refusals")
# Of a slot, in the order of slot.h.
STATES = ("empty", "dialing", "leased", "idle", "checking", "retiring", "offered")
# What a worker has in its hands, as against what lies idle.
HELD = frozenset({"leased", "dialing", "checking", "retiring", "offered"})
# States in which the row describes the connection that is there, not the one before.
_DESCRIBED = HELD - {"dialing"} | {"idle"}

_BUCKETS: tuple[tuple[str, int | None], ...] = (("tcp", 4), ("tcp", 6), ("udp", 4), ("udp", 6), ("unix", None))
KINDS = tuple(f"{protocol}{version or ''}" for protocol, version in _BUCKETS)
_PROTOCOLS, _VERSIONS = ("tcp", "udp", "unix"), (4, 6)
_FLAGS = ("private", "unmailed", "ending", "overdue")
_CLOSED = "closed_"
# The reason of an end that has not been counted yet, or never is, because its process died before it could.
UNCOUNTED = "uncounted"
_ROWS = frozenset({"workers", "slots", "waiters"})
# Why a connection was at fault, or the way to it.
_ERRORS = ("broken", "dirty", "error", "letter", "unhealthy", "refused")
# States of the server in which its dials have failed.
DOWN = frozenset({"down", "probing"})
# The settings that say how many connections are kept open.
_SIZES = ("listening", "max_connections", "min_connections", "max_idle_connections")

# (lower, upper, count) of a bucket; nanoseconds
_Histogram = Sequence[tuple[int, int, int]]
_T = TypeVar("_T")


class made_once(Generic[_T]):  # noqa: N801 - a decorator
    """functools.cached_property without its lock: before Python 3.12 all instances share one, and a child that is
    forked while another thread has it waits for it for ever. Two threads may make the same figures twice."""

    def __init__(self, make: Callable[[Any], _T]) -> None:
        self._make, self._name = make, make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, owner: Any, _: type) -> _T:
        if owner is None:  # of the class: it is documentation
            return self  # type: ignore[return-value]
        made = vars(owner)[self._name] = self._make(owner)
        return made


class _Record:
    """What all of these have in common: they become plain JSON-able dicts, their computed figures included."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _computed: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every figure by name, in types that JSON has."""
        return {name: _plain(getattr(self, name)) for name in self._names()}

    def _names(self) -> tuple[str, ...]:
        return (*(name for name in self.__dataclass_fields__ if not name.startswith("_")), *self._computed)


def _plain(value: object) -> object:
    if isinstance(value, _Record):
        return value.to_dict()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Latency(_Record):
    """A distribution of times in seconds. Each figure is the middle of its bucket: at most 1.6 % off."""

    count: int = 0
    total: float = 0.0  # all of them together
    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    p999: float = 0.0
    max: float = 0.0

    @classmethod
    def from_histogram(cls, histogram: _Histogram) -> Latency:
        """The figures of [(lower ns, upper ns, count), ...]."""
        rows = sorted(row for row in histogram if row[2] > 0)
        if not rows:
            return cls()
        middles = [(lower + upper) / 2e9 for lower, upper, _ in rows]
        up_to = list(itertools.accumulate(row[2] for row in rows))
        count = up_to[-1]
        total = sum(middle * row[2] for middle, row in zip(middles, rows, strict=True))

        def percentile(share: float) -> float:
            """The bucket that holds the value at rank ceil(share * count)."""
            at = bisect.bisect_left(up_to, math.ceil(share * count))
            return middles[min(at, len(middles) - 1)]  # a rank of a damaged slab may be rounded up

        p50, p95, p99, p999 = map(percentile, (0.5, 0.95, 0.99, 0.999))
        return cls(count, total, total / count, p50, p95, p99, p999, middles[-1])


@dataclass(frozen=True)
class WorkerStats(_Record):
    """A worker index: the process that has it now, or had it last, and all that was counted under it.

    `held` are the slots in its hands, `cached` those idle in its local cache (others may take them), `waiting` its
    threads in the queue. `counters` are those of the core, by name.
    """

    index: int
    pid: int
    alive: bool
    age: float
    generation: int
    counters: Mapping[str, int]
    held: int
    cached: int
    waiting: int
    get_latency: Latency
    use_latency: Latency

    _computed: ClassVar[tuple[str, ...]] = ("gets", "successes", "hit_rate")

    @property
    def gets(self) -> int:
        """Calls of get() and try_get(), however they ended."""
        return self.successes + _sum(self.counters, FAILURES)

    @property
    def successes(self) -> int:
        """Leases."""
        return _sum(self.counters, SOURCES)

    @property
    def hit_rate(self) -> float:
        """The share of leases that came out of the local cache."""
        return _ratio(self.counters.get("hits", 0), self.successes)


@dataclass(frozen=True)
class ConnectionCounts(_Record):
    """Connections of one kind, or of several: created - closed = current, in every snapshot.

    Of `current`, `idle` are those that anyone may lease and `active` those leased, or on their way to a waiter; the
    others are being checked, shown to `on_created`, or closed. In a difference `created` and `closed` are of the
    interval.
    """

    created: int = 0
    closed: int = 0
    current: int = 0
    idle: int = 0
    active: int = 0

    def __add__(self, other: ConnectionCounts) -> ConnectionCounts:
        return ConnectionCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


@dataclass(frozen=True)
class WaiterStats(_Record):
    """A call that waits in the queue: of which process and thread (as the kernel numbers it), for how many seconds.

    `wants` are the kinds that would do; `state` is "waiting", or "matched": a connection is on its way to it.
    """

    pid: int | None
    thread: int
    waited: float
    wants: tuple[str, ...]
    state: str


@dataclass(frozen=True)
class ConnectionStats(_Record):
    """A slot that is not empty. Times in seconds; None where the state has none.

    `holder` is the pid that has it in its hands, `cached_by` the pid in whose local cache it lies idle. `since` is how
    long it has been leased, or unused; `checked` how long ago it was opened, or checked in the background. `flags`:
    "private" (only one process can use it), "unmailed" (its descriptor could not be deposited), "ending" (evict() or
    resize() will end it when it is returned), "overdue" (its lease was reported as out for longer than leak_timeout).
    """

    index: int
    id: int
    state: str
    holder: int | None
    cached_by: int | None
    protocol: str
    ip_version: int | None
    peer: str
    age: float | None
    since: float | None
    uses: int
    flags: tuple[str, ...]
    checked: float | None = None


@dataclass(frozen=True, kw_only=True)
class PoolStats(_Record):
    """All of a pool, over all its processes. Counters are of the last `interval` seconds (the pool's life at first)."""

    name: str
    target: str
    state: str  # "open", "paused", "draining", "closed"
    pid: int  # who created it
    created_at: float  # time.time()
    interval: float
    max_connections: int  # as it is now; resize() changes it, up to resize_limit
    resize_limit: int

    # the moment
    connections: dict[str, int]  # slots by state; "empty" are those that may still be opened
    waiting: int
    oldest_wait: float

    # the server, as the last dials found it: "unproved" (nobody knows), "up", "down", "probing" (down, and one dial is
    # finding out whether it still is)
    upstream: str
    upstream_error: str  # of the last failed dial while it is down, else ""
    upstream_down_for: float  # how long it has been down, else 0
    upstream_retry_in: float  # when the next dial may begin, while it is down; else 0: now

    # opening min_connections, at the beginning of the pool's life
    prewarm_target: int
    prewarm_created: int
    prewarm_failed: int  # given up by it; they are opened later
    prewarm_done: bool

    # how calls of get() ended: leases by source, failures by kind
    hits: int = 0
    freelist: int = 0
    steals: int = 0
    dials: int = 0  # in a pool that listens: clients that are new
    spoken: int = 0  # in one that listens: clients that have spoken again
    handovers: int = 0
    timeouts: int = 0
    exhausted: int = 0
    refused: int = 0
    dial_errors: int = 0
    interrupted: int = 0
    late_refusals: int = 0

    # what else happened in the workers
    waits: int = 0
    wait_ns: int = 0
    mailbox_reads: int = 0
    bad_letters: int = 0
    checks: int = 0
    errors: int = 0

    # what happened to connections
    created: int = 0
    closed: dict[str, int]  # by reason; "uncounted": ended this moment, or by a process that died before it said why
    kinds: dict[str, ConnectionCounts]  # "tcp4", "tcp6", "udp4", "udp6", "unix"
    lifetime_ns: int = 0  # that ended connections were open, all together
    dial_attempts: int = 0
    dial_failures: int = 0
    upstream_failures: int = 0  # dials that failed because of the server
    failed_deposits: int = 0
    leaks: int = 0
    overdue_leases: int = 0
    health_checks: int = 0  # in the background; `checks` are those at a lease
    health_failures: int = 0

    # what was taken back from the dead
    recoveries: int = 0
    recovered_leases: int = 0
    recovered_offers: int = 0
    recovered_waiters: int = 0

    _snapshot: Mapping[str, Any] = field(repr=False, compare=False)

    _computed: ClassVar[tuple[str, ...]] = (
        "get_latency",
        "wait_latency",
        "use_latency",
        "dial_latency",
        "workers",
        "slots",
        "waiters",
        "open",
        "current",
        "in_use",
        "idle",
        "reuses",
        "lifetime_average",
        "connection_errors",
        "gets",
        "successes",
        "failures",
        "hit_rate",
        "utilisation",
        "reuse_average",
        "dial_failure_rate",
        "health_success_rate",
    )

    @classmethod
    def from_snapshot(cls, snapshot: Mapping[str, Any]) -> PoolStats:
        """The figures of a dict that the core's `snapshot()` made."""
        workers, waiters = _rows(snapshot, "worker"), _rows(snapshot, "waiter")
        counters: Counter[str] = Counter(snapshot["totals"])
        for worker in workers:
            counters.update(worker["counters"])
        states: dict[str, int] = {**dict.fromkeys(STATES, 0), **Counter(_column(snapshot, "slot", "state"))}
        used = sum(states.values()) - states["empty"]
        states["empty"] = max(0, snapshot["max_connections"] - used)  # more are used while resize() ends some
        known = {each.name for each in fields(cls)}
        upstream, (created, failed, done) = snapshot["upstream"], snapshot["prewarm"]
        kinds = _kinds(snapshot)
        down = upstream["state"] in DOWN
        return cls(
            name=snapshot["name"],
            target=snapshot["target"],
            state=snapshot["state"],
            pid=snapshot["creator_pid"],
            created_at=snapshot["created_at"],
            interval=_interval(snapshot),
            max_connections=snapshot["max_connections"],
            resize_limit=snapshot["resize_limit"],
            connections=states,
            waiting=len(waiters),
            oldest_wait=max((_elapsed(snapshot, waiter["since_ns"]) for waiter in waiters), default=0.0),
            upstream=upstream["state"],
            upstream_error=unpack_failure(upstream["error"])[0] if down else "",
            upstream_down_for=_elapsed(snapshot, upstream["since_ns"]) if down else 0.0,
            upstream_retry_in=_remaining(snapshot, upstream["retry_ns"]) if upstream["state"] == "down" else 0.0,
            upstream_failures=upstream["failures"],
            prewarm_target=_minimum(snapshot["config"]),
            prewarm_created=created,
            prewarm_failed=failed,
            prewarm_done=bool(done),
            closed=_closed(counters, sum(each.closed for each in kinds.values())),
            kinds=kinds,
            _snapshot=snapshot,
            **{name: counters[name] for name in counters if name in known},
        )

    def diff(self, earlier: PoolStats) -> PoolStats:
        """What happened since `earlier`: its counters and latencies taken off, `interval` the seconds between.

        Gauges stay those of the moment. An `earlier` of another pool, of the same name even, takes nothing off. Raises
        ValueError when one of the two is a difference already, or `earlier` the later one.
        """
        if "interval" in self._snapshot or "interval" in earlier._snapshot:
            raise ValueError("a difference has none to another: take the one of two snapshots as they were taken")
        if _same_pool(self._snapshot, earlier._snapshot) and self._snapshot["now"] < earlier._snapshot["now"]:
            raise ValueError("the snapshot to take off is the later one: later.diff(earlier)")
        return PoolStats.from_snapshot(_difference(self._snapshot, earlier._snapshot))

    def per_second(self, count: float) -> float:
        """A count of this interval as a rate."""
        return _ratio(count, self.interval)

    # Times and rows cost more than all the rest: they are made when they are asked for.

    def figures(self) -> dict[str, Any]:
        """What to_dict() has, without workers, slots and waiters."""
        return {name: _plain(getattr(self, name)) for name in self._names() if name not in _ROWS}

    @made_once
    def get_latency(self) -> Latency:
        """From the call of get() to its return with a connection."""
        return Latency.from_histogram(_merged(_column(self._snapshot, "worker", "get_hist")))

    @made_once
    def wait_latency(self) -> Latency:
        """In the queue, however that ended; calls that did not wait are not in it."""
        return Latency.from_histogram(self._snapshot["wait_hist"])

    @made_once
    def use_latency(self) -> Latency:
        """From lease to release."""
        return Latency.from_histogram(_merged(_column(self._snapshot, "worker", "use_hist")))

    @made_once
    def dial_latency(self) -> Latency:
        """Of dials, failed ones too."""
        return Latency.from_histogram(self._snapshot["dial_hist"])

    @made_once
    def workers(self) -> tuple[WorkerStats, ...]:
        """Every worker index that was ever used, in order."""
        return _worker_stats(self._snapshot)

    @made_once
    def slots(self) -> tuple[ConnectionStats, ...]:
        """The slots that are not empty, in order."""
        return _connection_stats(self._snapshot)

    @made_once
    def waiters(self) -> tuple[WaiterStats, ...]:
        """The calls that wait; who has waited longest is the first."""
        return _waiter_stats(self._snapshot)

    @property
    def open(self) -> int:
        """The connections there are, or are being opened or closed."""
        return sum(self.connections.values()) - self.connections.get("empty", 0)

    @property
    def current(self) -> int:
        """The connections there are: created less closed, in every snapshot."""
        return self.counts().current

    def counts(self, protocol: str | None = None, ip_version: int | None = None) -> ConnectionCounts:
        """Created, closed, current, idle and active connections of a protocol, an IP version, both, or all.

        Raises ValueError when there are none such: "tcp", "udp", "unix"; 4, 6.
        """
        if protocol not in (None, *_PROTOCOLS) or ip_version not in (None, *_VERSIONS):
            asked = f"protocol={protocol!r}, ip_version={ip_version!r}"
            raise ValueError(f"{asked}: protocols are {', '.join(_PROTOCOLS)}; versions of IP are 4 and 6")
        wanted = [
            counts
            for (its_protocol, its_version), counts in zip(_BUCKETS, self.kinds.values(), strict=True)
            if protocol in (None, its_protocol) and ip_version in (None, its_version)
        ]
        return sum(wanted, ConnectionCounts())

    @property
    def in_use(self) -> int:
        """Connections that are leased, or on their way to a waiter."""
        return self.connections.get("leased", 0) + self.connections.get("offered", 0)

    @property
    def idle(self) -> int:
        """Connections that anyone may lease."""
        return self.connections.get("idle", 0)

    @property
    def gets(self) -> int:
        """Calls of get() and try_get(), however they ended."""
        return self.successes + self.failures

    @property
    def successes(self) -> int:
        """Leases."""
        return _sum(vars(self), SOURCES)

    @property
    def failures(self) -> int:
        """Calls that got no connection."""
        return _sum(vars(self), FAILURES)

    @property
    def hit_rate(self) -> float:
        """The share of leases that came out of the worker's own cache."""
        return _ratio(self.hits, self.successes)

    @property
    def utilisation(self) -> float:
        """The share of `max_connections` in use."""
        return _ratio(self.in_use, self.max_connections)

    @property
    def reuses(self) -> int:
        """Leases of a connection that was there already."""
        return self.successes - self.dials

    @property
    def lifetime_average(self) -> float:
        """Seconds that connections which have ended were open, on average."""
        return _ratio(self.lifetime_ns / 1e9, sum(self.closed.values()))

    @property
    def connection_errors(self) -> int:
        """Dials that failed, and connections that ended because something was wrong with them or with their use."""
        return self.dial_failures + _sum(self.closed, _ERRORS)

    @property
    def reuse_average(self) -> float:
        """Leases a connection."""
        return _ratio(self.successes, self.created)

    @property
    def dial_failure_rate(self) -> float:
        """The share of dials that failed."""
        return _ratio(self.dial_failures, self.dial_attempts)

    @property
    def health_success_rate(self) -> float:
        """The share of background checks that found their connection well; 1 when there were none."""
        return 1.0 - _ratio(self.health_failures, self.health_checks)


# From rows of the snapshot to the records ---------------------------------------------------------------------------


def _rows(snapshot: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    names = snapshot[f"{what}_fields"]
    return [dict(zip(names, row, strict=True)) for row in snapshot[f"{what}s"]]


def _column(snapshot: Mapping[str, Any], what: str, name: str) -> list[Any]:
    at = snapshot[f"{what}_fields"].index(name)
    return [row[at] for row in snapshot[f"{what}s"]]


def _worker_stats(snapshot: Mapping[str, Any]) -> tuple[WorkerStats, ...]:
    owners = list(zip(_column(snapshot, "slot", "owner"), _column(snapshot, "slot", "state"), strict=True))
    held = Counter(owner for owner, state in owners if state in HELD)
    cached = Counter(owner for owner, state in owners if state == "idle")
    waiting = Counter(_column(snapshot, "waiter", "worker"))
    return tuple(
        WorkerStats(
            index=worker["index"],
            pid=worker["pid"],
            alive=worker["alive"],
            age=_elapsed(snapshot, worker["started_ns"]),
            generation=worker["generation"],
            counters=worker["counters"],
            held=held[worker["index"]],
            cached=cached[worker["index"]],
            waiting=waiting[worker["index"]],
            get_latency=Latency.from_histogram(worker["get_hist"]),
            use_latency=Latency.from_histogram(worker["use_hist"]),
        )
        for worker in _rows(snapshot, "worker")
    )


def _pids(snapshot: Mapping[str, Any]) -> dict[int, int]:
    """By the index of the worker."""
    return dict(zip(_column(snapshot, "worker", "index"), _column(snapshot, "worker", "pid"), strict=True))


def _connection_stats(snapshot: Mapping[str, Any]) -> tuple[ConnectionStats, ...]:
    pids = _pids(snapshot)
    unix_path = str(snapshot["target"]).removeprefix("unix://") if snapshot["target"].startswith("unix://") else ""
    found = []
    for slot in _rows(snapshot, "slot"):
        if slot["state"] == "empty":
            continue
        described = slot["state"] in _DESCRIBED
        protocol, ip_version = _BUCKETS[slot["bucket"]] if slot["bucket"] < len(_BUCKETS) else ("?", None)
        used_ns = slot["leased_ns"] if slot["state"] == "leased" else slot["last_used_ns"]
        changed_ns = max(used_ns, slot["created_ns"])  # the clock of leases is coarse
        pid = pids.get(slot["owner"])
        found.append(
            ConnectionStats(
                index=slot["index"],
                id=slot["id"],
                state=slot["state"],
                holder=pid if slot["state"] in HELD else None,
                cached_by=pid if slot["state"] == "idle" else None,
                protocol=protocol if described else "",
                ip_version=ip_version if described else None,
                peer=_peer_text(protocol, ip_version, slot["peer"], unix_path) if described else "",
                age=_elapsed(snapshot, slot["created_ns"]) if described else None,
                since=_elapsed(snapshot, changed_ns) if described else None,
                uses=slot["uses"] if described else 0,
                flags=tuple(name for bit, name in enumerate(_FLAGS) if slot["flags"] >> bit & 1) if described else (),
                checked=_elapsed(snapshot, slot["checked_ns"]) if described else None,
            )
        )
    return tuple(found)


def _waiter_stats(snapshot: Mapping[str, Any]) -> tuple[WaiterStats, ...]:
    pids = _pids(snapshot)
    found = (
        WaiterStats(
            pid=pids.get(waiter["worker"]),
            thread=waiter["tid"],
            waited=_elapsed(snapshot, waiter["since_ns"]),
            wants=tuple(kind for bit, kind in enumerate(KINDS) if waiter["mask"] >> bit & 1),
            state=waiter["state"],
        )
        for waiter in _rows(snapshot, "waiter")
    )
    return tuple(sorted(found, key=lambda each: -each.waited))


def _kinds(snapshot: Mapping[str, Any]) -> dict[str, ConnectionCounts]:
    """By name; in a difference `created` is that of the interval, and `kinds_closed` stands beside it."""
    rows = snapshot["kinds"]
    closed = snapshot.get("kinds_closed") or [created - there for created, there, _, _ in rows]
    return {
        kind: ConnectionCounts(created, ended, there, idle, active)
        for kind, (created, there, idle, active), ended in zip(KINDS, rows, closed, strict=True)
    }


def _closed(counters: Mapping[str, int], all_closed: int) -> dict[str, int]:
    """How many ended, by reason; their sum is all that ended."""
    reasons = {name.removeprefix(_CLOSED): n for name, n in counters.items() if name.startswith(_CLOSED)}
    return {**reasons, UNCOUNTED: all_closed - sum(reasons.values())}


def _peer_text(protocol: str, ip_version: int | None, peer: bytes, unix_path: str) -> str:
    if protocol == "unix":
        return unix_path
    port = int.from_bytes(peer[16:18], "big")
    if ip_version == 6:
        return f"[{socket.inet_ntop(socket.AF_INET6, peer[:16])}]:{port}"
    return f"{socket.inet_ntop(socket.AF_INET, peer[:4])}:{port}"


def _elapsed(snapshot: Mapping[str, Any], since_ns: int) -> float:
    """Seconds from then to the snapshot; 0 for never, and for what the coarse clock puts after it."""
    now: int = snapshot["now"]
    return max(0, now - since_ns) / 1e9 if since_ns else 0.0


def _remaining(snapshot: Mapping[str, Any], until_ns: int) -> float:
    """Seconds from the snapshot to then; 0 when it is over."""
    now: int = snapshot["now"]
    return max(0, until_ns - now) / 1e9


@functools.lru_cache(maxsize=64)
def _minimum(config: str) -> int:
    """How many connections a pool of these settings keeps open; 0 when they cannot be read."""
    try:
        settings = json.loads(config)
        wanted = {name: settings[name] for name in _SIZES if name in settings}
        return PoolConfig.from_dict({"target": "unix:///any", **wanted}).effective_min_connections
    except (ValueError, TypeError, RecursionError):
        return 0


def _interval(snapshot: Mapping[str, Any]) -> float:
    """The seconds that a difference covers, or from the pool's creation to the snapshot.

    The creation is known by the wall clock, the snapshot by the monotonic one: both are read to set one on the other.
    """
    if "interval" in snapshot:
        return float(snapshot["interval"])
    taken_at = time.time() - (time.monotonic_ns() - int(snapshot["now"])) / 1e9
    return max(0.0, taken_at - float(snapshot["created_at"]))


def _sum(counters: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(counters.get(name, 0) for name in names)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# Sums and differences of snapshots ----------------------------------------------------------------------------------


def _merged(histograms: Iterable[_Histogram]) -> list[tuple[int, int, int]]:
    counts: Counter[tuple[int, int]] = Counter()
    for histogram in histograms:
        for lower, upper, count in histogram:
            counts[lower, upper] += count
    return [(lower, upper, count) for (lower, upper), count in counts.items()]


def _same_pool(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["name"], one["created_at"]) == (other["name"], other["created_at"])


def _difference(later: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The snapshot `later` with the counters and histograms of `earlier` taken off."""
    if not _same_pool(later, earlier):
        return dict(later)
    before = {row["index"]: row for row in _rows(earlier, "worker")}
    workers = []
    for row in _rows(later, "worker"):
        old = before.get(row["index"])
        if old is not None:
            row["counters"] = _less(row["counters"], old["counters"])
            for name in ("get_hist", "use_hist"):
                row[name] = _histogram_less(row[name], old[name])
        workers.append(tuple(row[name] for name in later["worker_fields"]))
    return {
        **later,
        "interval": (later["now"] - earlier["now"]) / 1e9,
        "totals": _less(later["totals"], earlier["totals"]),
        "kinds": [(new[0] - old[0], *new[1:]) for new, old in zip(later["kinds"], earlier["kinds"], strict=True)],
        "kinds_closed": [
            (new[0] - new[1]) - (old[0] - old[1]) for new, old in zip(later["kinds"], earlier["kinds"], strict=True)
        ],
        "upstream": {**later["upstream"], "failures": later["upstream"]["failures"] - earlier["upstream"]["failures"]},
        "workers": workers,
        "wait_hist": _histogram_less(later["wait_hist"], earlier["wait_hist"]),
        "dial_hist": _histogram_less(later["dial_hist"], earlier["dial_hist"]),
    }


def _less(later: Mapping[str, int], earlier: Mapping[str, int]) -> dict[str, int]:
    return {name: count - earlier.get(name, 0) for name, count in later.items()}


def _histogram_less(later: _Histogram, earlier: _Histogram) -> list[tuple[int, int, int]]:
    """The buckets that have grown: of a life's hundreds few change in a second, and most of the rest is done in C."""
    if len(later) == len(earlier):
        differ = list(map(operator.ne, later, earlier))
        later, earlier = list(itertools.compress(later, differ)), list(itertools.compress(earlier, differ))
    else:
        later, earlier = list(set(later).difference(earlier)), list(set(earlier).difference(later))
    old = {(lower, upper): count for lower, upper, count in earlier}
    rows = ((lower, upper, count - old.get((lower, upper), 0)) for lower, upper, count in later)
    return [row for row in rows if row[2]]
