"""Figures for Prometheus: those of given pools, or of every pool of this user on the host.

    REGISTRY.register(shmpool.exporter.collector(pool))     # beside an application's own metrics
    shmpool export                                          # one endpoint for all pools of the host

Needs `pip install 'shmpool[prometheus]'`; importing this module without it is an ImportError that says so.

Each scrape takes one snapshot a pool, over all its processes, so it does not matter which worker answers it: no files
are shared between them and nothing is summed up outside. Nothing is kept from scrape to scrape.

Names follow OpenTelemetry's semantic conventions for pools of database clients, as Prometheus writes them
(`db.client.connection.count` is `db_client_connection_count`); what those lack is `shmpool_*`. A counter ends in
`_total`. Times are in seconds. Counters are of the pool's life, over all its processes, living and departed.

Histograms have the fixed bounds `BOUNDS`. The core's buckets are finer (32 an octave) and are never split: one that
has a bound inside is counted above it. So no time longer than a bound is ever counted below it, and what is counted
below it is every time up to a point at most 3.1 % short of it. A sum is that of the middles of the core's buckets, at
most 1.6 % off; times beyond 137 s count as 137 s.

Not here: what the figures mean (`stats`, and the table in docs/guide/observing.md), taking them (`inspector`).
"""

from __future__ import annotations

import itertools
import json
import signal
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

try:
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
    from prometheus_client.utils import floatToGoString
except ModuleNotFoundError as missing:
    raise ImportError("the exporter needs prometheus-client: pip install 'shmpool[prometheus]'") from missing

from .errors import PoolError, PoolNotFound
from .inspector import Inspector, pool_names
from .stats import FAILURES, SOURCES, PoolStats

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from .pool import Pool

__all__ = ["BOUNDS", "collector", "exposition", "serve"]

# Upper bounds of the buckets, in seconds: 1, 2.5, 5 a decade from 1 µs to 100 s.
BOUNDS = (*(float(f"{digit}e{power}") for power in range(-6, 2) for digit in ("1", "2.5", "5")), 100.0)
_BOUNDS_NS = [round(bound * 1e9) for bound in BOUNDS]
_POOL = "db_client_connection_pool_name"
_STATES: tuple[str, ...] = ("open", "paused", "draining", "closed")
# What has become of a pool that a scrape looked for.
_OUTCOMES: tuple[str, ...] = ("reported", "dead", "unreadable", "vanished")


def collector(pool: Pool | Inspector | None = None, *more: Pool | Inspector) -> Collector:
    """What prometheus_client's registries take: its `collect()` reports the pools given, or, with none, every pool of
    this user that is on the host at that moment.

    A registry takes one of them: name all pools in one call. `collect()` may be called in any thread, and in forked
    children; it takes no lock, never waits for a pool, and raises nothing because of one: `shmpool_pools` says how
    many were reported, and how many could not be. A pool that was closed is reported while the object given knows it.
    """
    return _Collector([pool, *more] if pool is not None else [])


def exposition() -> str:
    """The figures of every pool of this user on the host, in Prometheus's text format."""
    return generate_latest(_registry()).decode()


def serve(host: str = "127.0.0.1", port: int = 9464) -> None:
    """Answer scrapes of `http://host:port/metrics` for every pool of this user, until SIGINT or SIGTERM comes.

    Prints where it listens; port 0 is any free one. In the main thread only, since those two signals are taken from
    the process meanwhile. Raises a PoolError when it cannot listen there.
    """
    ends = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # the server's threads inherit it
    try:
        try:
            server, thread = start_http_server(port, host, _registry())
        except OSError as error:
            raise _CannotListen(host=host, port=port, reason=error.strerror or str(error)) from error
        try:
            address = f"[{host}]" if ":" in host else host
            print(f"listening on http://{address}:{server.server_port}/metrics; Ctrl-C ends it", flush=True)
            signal.sigwait(ends)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(eq=False, kw_only=True)
class _CannotListen(PoolError):
    host: str = ""
    port: int = 0
    reason: str = ""

    def _text(self) -> str:
        return f"cannot listen on {self.host} port {self.port}: {self.reason}; choose with --host and --port"


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector())
    return registry


# What is reported ---------------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    """One pool, now. Its name is the one that it was found by: what a segment says of itself may be another's."""

    name: str
    snapshot: Mapping[str, Any]
    stats: PoolStats


@dataclass(frozen=True)
class _Figure:
    """A gauge, or a counter if its name says so. With a `label`, `of` yields a value for each of the label's."""

    name: str
    about: str
    of: Callable[[_Look], Any]
    label: str = ""

    def family(self, looks: Iterable[_Look]) -> Metric:
        labels = [_POOL, self.label] if self.label else [_POOL]
        kind = CounterMetricFamily if self.name.endswith("_total") else GaugeMetricFamily
        family = kind(self.name, self.about, labels=labels)
        for look in looks:
            value = self.of(look)
            for each, number in value.items() if self.label else [(None, value)]:
                family.add_metric([look.name] if each is None else [look.name, each], number)
        return family


@dataclass(frozen=True)
class _Histogram:
    """Times; `of` yields the core's buckets, [(lower ns, upper ns, count), ...], in any order and repeatedly."""

    name: str
    about: str
    of: Callable[[_Look], Iterable[tuple[int, int, int]]]

    def family(self, looks: Iterable[_Look]) -> Metric:
        family = HistogramMetricFamily(self.name, self.about, labels=[_POOL])
        for look in looks:
            counts, seconds = coarsened(self.of(look))
            bounds = [*map(floatToGoString, BOUNDS), "+Inf"]
            family.add_metric([look.name], list(zip(bounds, counts, strict=True)), seconds)
        return family


def coarsened(buckets: Iterable[tuple[int, int, int]]) -> tuple[list[int], float]:
    """How many times lie below each of BOUNDS, and all of them; their sum in seconds."""
    counts, twice_ns = [0] * (len(BOUNDS) + 1), 0
    for lower, upper, count in buckets:
        counts[bisect_left(_BOUNDS_NS, upper)] += count
        twice_ns += (lower + upper) * count
    return list(itertools.accumulate(counts)), twice_ns / 2e9


def _of_workers(name: str) -> Callable[[_Look], Iterator[tuple[int, int, int]]]:
    """The buckets of a histogram that each worker has."""

    def buckets(look: _Look) -> Iterator[tuple[int, int, int]]:
        at = look.snapshot["worker_fields"].index(name)
        return itertools.chain.from_iterable(row[at] for row in look.snapshot["workers"])

    return buckets


def _idle_max(look: _Look) -> int:
    """The setting; where it is None, or cannot be, the cap of this moment."""
    try:
        setting = json.loads(look.snapshot["config"])["max_idle_connections"]
    except (ValueError, TypeError, KeyError, RecursionError):
        setting = None
    cap = look.stats.max_connections
    return setting if isinstance(setting, int) and 0 <= setting < cap else cap


_METRICS: tuple[_Figure | _Histogram, ...] = (
    # of the conventions
    _Figure(
        "db_client_connection_count",
        "Connections that are idle, or used (leased, or on their way to a waiter)",
        lambda look: {"idle": look.stats.idle, "used": look.stats.in_use},
        label="db_client_connection_state",
    ),
    _Figure("db_client_connection_idle_max", "How many connections may be idle", _idle_max),
    _Figure(
        "db_client_connection_idle_min",
        "How many connections are kept open: min_connections",
        lambda look: look.stats.prewarm_target,
    ),
    _Figure(
        "db_client_connection_max",
        "The cap: how many connections there may be, over all processes",
        lambda look: look.stats.max_connections,
    ),
    _Figure("db_client_connection_pending_requests", "Calls that wait in the queue", lambda look: look.stats.waiting),
    _Figure(
        "db_client_connection_timeouts_total", "Calls that ended with PoolTimeout", lambda look: look.stats.timeouts
    ),
    _Histogram(
        "db_client_connection_create_time_seconds",
        "How long dials took, failed ones too",
        lambda look: look.snapshot["dial_hist"],
    ),
    _Histogram(
        "db_client_connection_wait_time_seconds",
        "From the call of get() to its return with a connection",
        _of_workers("get_hist"),
    ),
    _Histogram(
        "db_client_connection_use_time_seconds", "From a connection's lease to its release", _of_workers("use_hist")
    ),
    # how calls ended
    _Figure(
        "shmpool_leases_total",
        "Leases, by where the connection came from",
        lambda look: _each(look.stats, SOURCES),
        label="source",
    ),
    _Figure(
        "shmpool_failed_calls_total",
        "Calls that got no connection, by why",
        lambda look: _each(look.stats, FAILURES),
        label="kind",
    ),
    _Histogram(
        "shmpool_queue_time_seconds",
        "How long calls were in the queue, however that ended",
        lambda look: look.snapshot["wait_hist"],
    ),
    _Figure(
        "shmpool_oldest_wait_seconds",
        "How long the call that has waited longest has been in the queue",
        lambda look: look.stats.oldest_wait,
    ),
    # connections
    _Figure("shmpool_slots", "Places for connections, by state", lambda look: look.stats.connections, label="state"),
    _Figure("shmpool_resize_limit", "How far resize() may raise the cap", lambda look: look.stats.resize_limit),
    _Figure("shmpool_connections_created_total", "Connections opened", lambda look: look.stats.created),
    _Figure(
        "shmpool_connections_closed_total",
        "Connections ended, by reason",
        lambda look: look.stats.closed,
        label="reason",
    ),
    _Figure("shmpool_dial_attempts_total", "Dials begun", lambda look: look.stats.dial_attempts),
    _Figure("shmpool_dial_failures_total", "Dials that failed", lambda look: look.stats.dial_failures),
    _Figure("shmpool_leaks_total", "Leases dropped without release", lambda look: look.stats.leaks),
    _Figure(
        "shmpool_overdue_leases_total",
        "Leases reported as out for longer than leak_timeout",
        lambda look: look.stats.overdue_leases,
    ),
    _Figure(
        "shmpool_health_checks_total",
        "Checks of idle connections in the background",
        lambda look: look.stats.health_checks,
    ),
    _Figure("shmpool_health_failures_total", "Such checks that failed", lambda look: look.stats.health_failures),
    # the server
    _Figure(
        "shmpool_upstream_up",
        "0 while the server is known to be down, else 1",
        lambda look: int(look.stats.upstream not in ("down", "probing")),
    ),
    _Figure(
        "shmpool_upstream_down_seconds",
        "How long the server has been known to be down; 0 when it is not",
        lambda look: look.stats.upstream_down_for,
    ),
    _Figure(
        "shmpool_upstream_failures_total",
        "Dials that failed because of the server",
        lambda look: look.stats.upstream_failures,
    ),
    # the pool and its processes
    _Figure(
        "shmpool_pool_state",
        "1 for the state that the pool is in, 0 for the others",
        lambda look: {state: int(look.stats.state == state) for state in _STATES},
        label="state",
    ),
    _Figure(
        "shmpool_workers_alive",
        "Processes that use the pool",
        lambda look: sum(worker.alive for worker in look.stats.workers),
    ),
    _Figure("shmpool_recoveries_total", "Dead processes swept", lambda look: look.stats.recoveries),
    _Figure(
        "shmpool_recovered_total",
        "What was taken back from dead processes",
        lambda look: {what: getattr(look.stats, f"recovered_{what}") for what in ("leases", "offers", "waiters")},
        label="what",
    ),
    _Figure(
        "shmpool_prewarm_target",
        "How many connections the pool opens at the beginning of its life",
        lambda look: look.stats.prewarm_target,
    ),
    _Figure("shmpool_prewarm_created_total", "Those that were opened", lambda look: look.stats.prewarm_created),
    _Figure("shmpool_prewarm_failed_total", "Those that were left for later", lambda look: look.stats.prewarm_failed),
)


def _each(stats: PoolStats, names: Iterable[str]) -> dict[str, int]:
    return {name: getattr(stats, name) for name in names}


# Collecting ---------------------------------------------------------------------------------------------------------


class _Collector(Collector):
    def __init__(self, pools: Sequence[Pool | Inspector]) -> None:
        self._pools = {pool.name: pool for pool in pools}

    def collect(self) -> Iterator[Metric]:
        outcomes = dict.fromkeys(_OUTCOMES, 0)
        looks = []
        for outcome, look in self._given() if self._pools else _found():
            outcomes[outcome] += 1
            looks += [] if look is None else [look]
        for metric in _METRICS:
            yield metric.family(looks)
        pools = GaugeMetricFamily("shmpool_pools", "Pools, by what this scrape made of them", labels=["outcome"])
        for outcome, count in outcomes.items():
            pools.add_metric([outcome], count)
        yield pools

    def _given(self) -> Iterator[tuple[str, _Look | None]]:
        for name, pool in self._pools.items():
            try:
                snapshot = pool.snapshot() if isinstance(pool, Inspector) else pool._snapshot()
            except PoolError:
                yield "unreadable", None
            except ValueError:  # an inspector that has been closed
                yield "vanished", None
            else:
                yield "reported", _look(name, snapshot)


def _found() -> Iterator[tuple[str, _Look | None]]:
    """The pools of this user that there are now. One that no process has any more is not reported."""
    for name in sorted(pool_names()):
        try:
            with Inspector(name) as inspector:
                if inspector.alive:
                    yield "reported", _look(name, inspector.snapshot())
                else:
                    yield "dead", None
        except PoolNotFound:
            yield "vanished", None
        except PoolError:
            yield "unreadable", None


def _look(name: str, snapshot: Mapping[str, Any]) -> _Look:
    return _Look(name, snapshot, PoolStats.from_snapshot(snapshot))
