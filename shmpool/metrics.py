"""The list of a pool's metrics, once for all who report them: Prometheus (`exporter`) and OpenTelemetry.

    look = look_at(pool)
    for metric in METRICS:
        print(metric.name, metric.unit, metric.of(look))

Names, units and attributes are OpenTelemetry's (`db.client.connection.count`, `{connection}`), those of its semantic
conventions where they have one, `shmpool.*` where not; whoever reports them translates. Times are in seconds ("s").
Counters and times are of the pool's life, over all its processes, living and departed.

Invariants: a metric is computed from one snapshot and nothing is asked again; names are unique. A damaged segment may
yield senseless figures, never an exception.

Not here: what the figures mean (`stats`, and the table in docs/guide/observing.md), how they are reported.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from .inspector import Inspector
from .stats import DOWN, FAILURES, SOURCES, UNCOUNTED, PoolStats

if TYPE_CHECKING:
    from .pool import Pool

__all__ = ["METRICS", "POOL", "POOL_STATES", "Counter", "Gauge", "Look", "Times", "look_at"]

# The attribute that every metric of a pool has: its name.
POOL = "db.client.connection.pool.name"
POOL_STATES = ("open", "paused", "draining", "closed")


class Look(NamedTuple):
    """One pool, now. Its name is the one that it was found by: what a segment says of itself may be another's."""

    name: str
    snapshot: Mapping[str, Any]
    stats: PoolStats


def look_at(pool: Pool | Inspector) -> Look:
    """Raises a PoolError when the segment cannot be read, ValueError of an inspector that has been closed."""
    snapshot = pool.snapshot() if isinstance(pool, Inspector) else pool._snapshot()
    return Look(pool.name, snapshot, PoolStats.from_snapshot(snapshot))


@dataclass(frozen=True)
class Gauge:
    """A figure of the moment. `unit` is as UCUM writes it: "s", "1", or what is counted, in braces. With a `label`,
    `of` yields a number for each of the label's values."""

    name: str
    unit: str
    about: str
    of: Callable[[Look], Any]
    label: str = ""

    def numbers(self, look: Look) -> Mapping[str, float]:
        """By the label's value; "" where there is no label."""
        found = self.of(look)
        return found if self.label else {"": found}


class Counter(Gauge):
    """A figure that only grows."""


@dataclass(frozen=True)
class Times:
    """A distribution; `of` yields the core's buckets, [(lower ns, upper ns, count), ...], in any order, repeatedly."""

    unit: ClassVar[str] = "s"

    name: str
    about: str
    of: Callable[[Look], Iterable[tuple[int, int, int]]]


def _of_workers(name: str) -> Callable[[Look], Iterator[tuple[int, int, int]]]:
    """The buckets of a histogram that each worker has."""

    def buckets(look: Look) -> Iterator[tuple[int, int, int]]:
        at = look.snapshot["worker_fields"].index(name)
        return itertools.chain.from_iterable(row[at] for row in look.snapshot["workers"])

    return buckets


def _idle_max(look: Look) -> int:
    """The setting; where it is None, or cannot be, the cap of this moment."""
    try:
        setting = json.loads(look.snapshot["config"])["max_idle_connections"]
    except (ValueError, TypeError, KeyError, RecursionError):
        setting = None
    cap = look.stats.max_connections
    return setting if isinstance(setting, int) and 0 <= setting < cap else cap


METRICS: tuple[Gauge | Times, ...] = (
    # of the conventions
    Gauge(
        "db.client.connection.count",
        "{connection}",
        "Connections that are idle, or used (leased, or on their way to a waiter)",
        lambda look: {"idle": look.stats.idle, "used": look.stats.in_use},
        label="db.client.connection.state",
    ),
    Gauge("db.client.connection.idle.max", "{connection}", "How many connections may be idle", _idle_max),
    Gauge(
        "db.client.connection.idle.min",
        "{connection}",
        "How many connections are kept open: min_connections",
        lambda look: look.stats.prewarm_target,
    ),
    Gauge(
        "db.client.connection.max",
        "{connection}",
        "The cap: how many connections there may be, over all processes",
        lambda look: look.stats.max_connections,
    ),
    Gauge(
        "db.client.connection.pending_requests",
        "{request}",
        "Calls that wait in the queue",
        lambda look: look.stats.waiting,
    ),
    Counter(
        "db.client.connection.timeouts",
        "{timeout}",
        "Calls that ended with PoolTimeout",
        lambda look: look.stats.timeouts,
    ),
    Times(
        "db.client.connection.create_time",
        "How long dials took, failed ones too",
        lambda look: look.snapshot["dial_hist"],
    ),
    Times(
        "db.client.connection.wait_time",
        "From the call of get() to its return with a connection",
        _of_workers("get_hist"),
    ),
    Times("db.client.connection.use_time", "From a connection's lease to its release", _of_workers("use_hist")),
    # how calls ended
    Counter(
        "shmpool.leases",
        "{lease}",
        "Leases, by where the connection came from",
        lambda look: _each(look.stats, SOURCES),
        label="source",
    ),
    Counter(
        "shmpool.failed_calls",
        "{call}",
        "Calls that got no connection, by why",
        lambda look: _each(look.stats, FAILURES),
        label="kind",
    ),
    Times(
        "shmpool.queue_time",
        "How long calls were in the queue, however that ended",
        lambda look: look.snapshot["wait_hist"],
    ),
    Gauge(
        "shmpool.oldest_wait",
        "s",
        "How long the call that has waited longest has been in the queue",
        lambda look: look.stats.oldest_wait,
    ),
    # connections
    Gauge(
        "shmpool.slots",
        "{slot}",
        "Places for connections, by state",
        lambda look: look.stats.connections,
        label="state",
    ),
    Gauge(
        "shmpool.resize_limit",
        "{connection}",
        "How far resize() may raise the cap",
        lambda look: look.stats.resize_limit,
    ),
    Gauge(
        "shmpool.connections",
        "{connection}",
        "Connections there are, by protocol and IP version",
        lambda look: {kind: counts.current for kind, counts in look.stats.kinds.items()},
        label="kind",
    ),
    Counter(
        "shmpool.connections_created",
        "{connection}",
        "Connections opened, by protocol and IP version",
        lambda look: {kind: counts.created for kind, counts in look.stats.kinds.items()},
        label="kind",
    ),
    Counter(
        "shmpool.connections_closed",
        "{connection}",
        "Connections ended, by reason",
        lambda look: {reason: count for reason, count in look.stats.closed.items() if reason != UNCOUNTED},
        label="reason",
    ),
    Counter(
        "shmpool.connection_lifetime",
        "s",
        "How long the connections that have ended were open, all together",
        lambda look: look.stats.lifetime_ns / 1e9,
    ),
    Counter(
        "shmpool.mailbox_reads",
        "{read}",
        "Connections that a process used for the first time, opened by another",
        lambda look: look.stats.mailbox_reads,
    ),
    Counter(
        "shmpool.failed_deposits",
        "{connection}",
        "Connections that only their opener could use, for want of descriptors in flight",
        lambda look: look.stats.failed_deposits,
    ),
    Counter("shmpool.dial_attempts", "{dial}", "Dials begun", lambda look: look.stats.dial_attempts),
    Counter("shmpool.dial_failures", "{dial}", "Dials that failed", lambda look: look.stats.dial_failures),
    Counter("shmpool.leaks", "{lease}", "Leases dropped without release", lambda look: look.stats.leaks),
    Counter(
        "shmpool.overdue_leases",
        "{lease}",
        "Leases reported as out for longer than leak_timeout",
        lambda look: look.stats.overdue_leases,
    ),
    Counter(
        "shmpool.health_checks",
        "{check}",
        "Checks of idle connections in the background",
        lambda look: look.stats.health_checks,
    ),
    Counter("shmpool.health_failures", "{check}", "Such checks that failed", lambda look: look.stats.health_failures),
    # the server
    Gauge(
        "shmpool.upstream_up",
        "1",
        "0 while the server is known to be down, else 1",
        lambda look: int(look.stats.upstream not in DOWN),
    ),
    Gauge(
        "shmpool.upstream_down",
        "s",
        "How long the server has been known to be down; 0 when it is not",
        lambda look: look.stats.upstream_down_for,
    ),
    Counter(
        "shmpool.upstream_failures",
        "{dial}",
        "Dials that failed because of the server",
        lambda look: look.stats.upstream_failures,
    ),
    # the pool and its processes
    Gauge(
        "shmpool.pool_state",
        "1",
        "1 for the state that the pool is in, 0 for the others",
        lambda look: {state: int(look.stats.state == state) for state in POOL_STATES},
        label="state",
    ),
    Gauge(
        "shmpool.workers_alive",
        "{process}",
        "Processes that use the pool",
        lambda look: sum(worker.alive for worker in look.stats.workers),
    ),
    Counter("shmpool.recoveries", "{process}", "Dead processes swept", lambda look: look.stats.recoveries),
    Counter(
        "shmpool.recovered",
        "{item}",
        "What was taken back from dead processes",
        lambda look: {what: getattr(look.stats, f"recovered_{what}") for what in ("leases", "offers", "waiters")},
        label="what",
    ),
    Gauge(
        "shmpool.prewarm_target",
        "{connection}",
        "How many connections the pool opens at the beginning of its life",
        lambda look: look.stats.prewarm_target,
    ),
    Counter(
        "shmpool.prewarm_created", "{connection}", "Those that were opened", lambda look: look.stats.prewarm_created
    ),
    Counter(
        "shmpool.prewarm_failed",
        "{connection}",
        "Those that were left for later",
        lambda look: look.stats.prewarm_failed,
    ),
)


def _each(stats: PoolStats, names: Iterable[str]) -> dict[str, int]:
    return {name: getattr(stats, name) for name in names}
