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

Not here: the list of the metrics (`metrics`), what they mean (the table in docs/guide/observing.md), taking them
(`inspector`).
"""

from __future__ import annotations

import itertools
import signal
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

try:
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector
    from prometheus_client.utils import floatToGoString
except ModuleNotFoundError as missing:
    raise ImportError("the exporter needs prometheus-client: pip install 'shmpool[prometheus]'") from missing

from .errors import CannotListen, PoolError, PoolNotFound
from .inspector import Inspector, pool_names
from .metrics import METRICS, POOL, Counter, Gauge, Look, Times, look_at
from .pool import Pool

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

__all__ = ["BOUNDS", "collector", "exposition", "serve"]

# Upper bounds of the buckets, in seconds: 1, 2.5, 5 a decade from 1 µs to 100 s.
BOUNDS = (*(float(f"{digit}e{power}") for power in range(-6, 2) for digit in ("1", "2.5", "5")), 100.0)
_BOUNDS_NS = [round(bound * 1e9) for bound in BOUNDS]
_POOL = POOL.replace(".", "_")
_SILENCE_S = 60.0  # a client that says nothing for so long is let go
# What has become of a pool that a scrape looked for.
_OUTCOMES: tuple[str, ...] = ("reported", "dead", "unreadable", "vanished")


def collector(pool: Pool | Inspector | None = None, *more: Pool | Inspector) -> Collector:
    """What prometheus_client's registries take: its `collect()` reports the pools given, or, with none, every pool of
    this user that is on the host at that moment.

    A registry takes one of them: name all pools in one call. `collect()` may be called in any thread, and in forked
    children; it takes no lock, never waits for a pool, and raises nothing because of one: `shmpool_pools` says how
    many were reported, and how many could not be. A pool that was closed is reported while the object given knows it.
    """
    pools = [pool, *more] if pool is not None else list(more)
    for each in pools:
        if not isinstance(each, (Pool, Inspector)):
            raise TypeError(f"collector() takes pools, or what shmpool.inspect() returns, not {each!r}")
    return _Collector(pools)


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
            raise CannotListen(host=host, port=port, reason=error.strerror or str(error)) from error
        patient: Any = server.RequestHandlerClass  # for ever, with clients that say nothing
        impatient: Any = type("_Handler", (patient,), {"timeout": _SILENCE_S})
        server.RequestHandlerClass = impatient
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


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector())
    return registry


# From the list to Prometheus's families -----------------------------------------------------------------------------


def _family(metric: Gauge | Times, looks: Iterable[Look]) -> Metric:
    return _histogram(metric, looks) if isinstance(metric, Times) else _figure(metric, looks)


def _figure(metric: Gauge, looks: Iterable[Look]) -> Metric:
    labels = [_POOL, _word(metric.label)] if metric.label else [_POOL]
    kind = CounterMetricFamily if isinstance(metric, Counter) else GaugeMetricFamily
    family = kind(_name(metric), metric.about, labels=labels)
    for look in looks:
        for each, number in metric.numbers(look).items():
            family.add_metric([look.name, each] if metric.label else [look.name], number)
    return family


def _histogram(metric: Times, looks: Iterable[Look]) -> Metric:
    family = HistogramMetricFamily(_name(metric), metric.about, labels=[_POOL])
    for look in looks:
        counts, seconds = coarsened(metric.of(look))
        bounds = [*map(floatToGoString, BOUNDS), "+Inf"]
        family.add_metric([look.name], list(zip(bounds, counts, strict=True)), seconds)
    return family


def _name(metric: Gauge | Times) -> str:
    """A metric's name as Prometheus writes it: with its unit if that is seconds, `_total` if it counts."""
    seconds = "_seconds" if metric.unit == "s" else ""
    return f"{_word(metric.name)}{seconds}{'_total' if isinstance(metric, Counter) else ''}"


def _word(name: str) -> str:
    return name.replace(".", "_")


def coarsened(buckets: Iterable[tuple[int, int, int]]) -> tuple[list[int], float]:
    """How many times lie below each of BOUNDS, and all of them; their sum in seconds."""
    counts, twice_ns = [0] * (len(BOUNDS) + 1), 0
    for lower, upper, count in buckets:
        counts[bisect_left(_BOUNDS_NS, upper)] += count
        twice_ns += (lower + upper) * count
    return list(itertools.accumulate(counts)), twice_ns / 2e9


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
        for metric in METRICS:
            yield _family(metric, looks)
        pools = GaugeMetricFamily("shmpool_pools", "Pools, by what this scrape made of them", labels=["outcome"])
        for outcome, count in outcomes.items():
            pools.add_metric([outcome], count)
        yield pools

    def _given(self) -> Iterator[tuple[str, Look | None]]:
        for pool in self._pools.values():
            try:
                found = look_at(pool)
            except PoolError:
                yield "unreadable", None
            except ValueError:  # an inspector that has been closed
                yield "vanished", None
            else:
                yield "reported", found


def _found() -> Iterator[tuple[str, Look | None]]:
    """The pools of this user that there are now. One that no process has any more is not reported."""
    for name in sorted(pool_names()):
        try:
            with Inspector(name) as inspector:
                if inspector.alive:
                    yield "reported", look_at(inspector)
                else:
                    yield "dead", None
        except PoolNotFound:
            yield "vanished", None
        except PoolError:
            yield "unreadable", None
