"""What OpenTelemetry's SDK collects of real pools over several processes: the pool's own figures, and those once."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader, Sum
from opentelemetry.semconv._incubating.metrics import db_metrics

from shmpool import Pool, PoolStats, PoolTimeout, __version__, inspect, slab
from shmpool.errors import PoolNotFound
from shmpool.inspector import Inspector
from shmpool.integrations.opentelemetry import instrument
from shmpool.metrics import METRICS, Times
from shmpool.stats import FAILURES, SOURCES, UNCOUNTED
from tests.processes import Family, Latch, Way, holder, proven, until, use
from tests.servers import ExclusiveServer
from tests.test_inspector import segment

POOL = "db.client.connection.pool.name"
STATE = "db.client.connection.state"
DEADLINE_S = 30.0
# They grow between a collection and `stats()`.
AGES = {"shmpool.oldest_wait", "shmpool.upstream_down"}
TIMES = {
    "shmpool.create_time": "dial_latency",
    "shmpool.wait_time": "get_latency",
    "shmpool.use_time": "use_latency",
    "shmpool.queue_time": "wait_latency",
}


class Collected:
    """One collection: the value of each series."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        data = reader.get_metrics_data()
        self.metrics = {
            metric.name: metric
            for of_resource in (data.resource_metrics if data else ())
            for scope in of_resource.scope_metrics
            for metric in scope.metrics
            if metric.data.data_points
        }
        self.values: dict[tuple[str, str, str, str], float] = {}
        for metric in self.metrics.values():
            for point in metric.data.data_points:
                attributes = dict(point.attributes or {})
                pool = str(attributes.pop(POOL))
                label, value = attributes.popitem() if attributes else ("", "")
                assert not attributes
                self.values[metric.name, pool, label, str(value)] = point.value

    def value(self, name: str, pool: str) -> float:
        return self.values[name, pool, "", ""]

    def by(self, label: str, name: str, pool: str) -> dict[str, float]:
        return {key[3]: value for key, value in self.values.items() if key[:3] == (name, pool, label)}

    def pools(self) -> set[str]:
        return {pool for _, pool, _, _ in self.values}


class Reported:
    """Pools, reported to a provider of their own."""

    def __init__(self, *pools: Pool | Inspector, deltas: bool = False) -> None:
        temporality = {ObservableCounter: AggregationTemporality.DELTA} if deltas else {}
        self.reader = InMemoryMetricReader(preferred_temporality=temporality)
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
        self.instrumentation = instrument(*pools, meter_provider=self.provider)

    def collect(self) -> Collected:
        return Collected(self.reader)

    def close(self) -> None:
        self.instrumentation.uninstrument()
        self.provider.shutdown()


@contextlib.contextmanager
def reported(*pools: Pool | Inspector, deltas: bool = False) -> Iterator[Reported]:
    with contextlib.closing(Reported(*pools, deltas=deltas)) as found:
        yield found


@pytest.fixture
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def pool(url: str) -> Iterator[Pool]:
    with Pool(url, min_connections=0, max_connections=4, maintenance_interval=math.inf) as made:
        yield made


# The figures --------------------------------------------------------------------------------------------------------


def assert_tells(collected: Collected, stats: PoolStats) -> None:
    """All figures of a pool at rest that was instrumented at its beginning."""
    name = stats.name
    single = {
        "db.client.connection.idle.max": stats.max_connections,
        "db.client.connection.idle.min": stats.prewarm_target,
        "db.client.connection.max": stats.max_connections,
        "db.client.connection.pending_requests": stats.waiting,
        "db.client.connection.timeouts": stats.timeouts,
        "shmpool.resize_limit": stats.resize_limit,
        "shmpool.connection_lifetime": pytest.approx(stats.lifetime_ns / 1e9),
        "shmpool.mailbox_reads": stats.mailbox_reads,
        "shmpool.failed_deposits": stats.failed_deposits,
        "shmpool.dial_attempts": stats.dial_attempts,
        "shmpool.dial_failures": stats.dial_failures,
        "shmpool.leaks": stats.leaks,
        "shmpool.overdue_leases": stats.overdue_leases,
        "shmpool.health_checks": stats.health_checks,
        "shmpool.health_failures": stats.health_failures,
        "shmpool.upstream_up": 1,
        "shmpool.upstream_failures": stats.upstream_failures,
        "shmpool.workers_alive": len([worker for worker in stats.workers if worker.alive]),
        "shmpool.recoveries": stats.recoveries,
        "shmpool.prewarm_target": stats.prewarm_target,
        "shmpool.prewarm_created": stats.prewarm_created,
        "shmpool.prewarm_failed": stats.prewarm_failed,
    }
    assert {each: collected.value(each, name) for each in single} == single
    labelled = {
        ("db.client.connection.count", STATE): {"idle": stats.idle, "used": stats.in_use},
        ("shmpool.slots", "shmpool.state"): stats.connections,
        ("shmpool.pool_state", "shmpool.state"): {
            each: int(each == stats.state) for each in ("open", "paused", "draining", "closed")
        },
        ("shmpool.connections_closed", "shmpool.reason"): {
            reason: count for reason, count in stats.closed.items() if reason != UNCOUNTED
        },
        ("shmpool.connections", "shmpool.kind"): {kind: each.current for kind, each in stats.kinds.items()},
        ("shmpool.connections_created", "shmpool.kind"): {kind: each.created for kind, each in stats.kinds.items()},
        ("shmpool.leases", "shmpool.source"): {each: getattr(stats, each) for each in SOURCES},
        ("shmpool.failed_calls", "shmpool.kind"): {each: getattr(stats, each) for each in FAILURES},
        ("shmpool.recovered", "shmpool.what"): {
            "leases": stats.recovered_leases,
            "offers": stats.recovered_offers,
            "waiters": stats.recovered_waiters,
        },
    }
    assert {key: collected.by(key[1], key[0], name) for key in labelled} == labelled
    for stem, latency in TIMES.items():
        times = getattr(stats, latency)
        assert collected.value(f"{stem}.count", name) == times.count, stem
        assert collected.value(f"{stem}.sum", name) == pytest.approx(times.mean * times.count), stem
    known = {*single, *(metric for metric, _ in labelled), *AGES}
    known |= {f"{stem}.{part}" for stem in TIMES for part in ("count", "sum", "quantile")}
    assert set(collected.metrics) <= known
    assert known - set(collected.metrics) <= {f"{stem}.quantile" for stem in TIMES}


def test_the_figures_of_several_processes(server: ExclusiveServer, family: Family) -> None:
    def work() -> None:
        for _ in range(50):
            use(pool)

    def in_vain() -> None:
        with pytest.raises(PoolTimeout):
            pool.get(timeout=0.02)

    with proven(server, 3, maintenance_interval=math.inf) as pool, reported(pool) as report:
        assert_tells(report.collect(), pool.stats())
        for child in [family.fork(work) for _ in range(4)]:
            child.result()
        killed = holder(family, pool, 2)
        assert_tells(report.collect(), pool.stats())
        killed.kill()
        pool.recover()
        last = holder(family, pool, 3)
        family.fork(in_vain).result()
        waiter = family.fork(use, pool)
        until(lambda: pool.stats().waiting == 1, "it waits in the queue")

        collected, stats = report.collect(), pool.stats()
        assert_tells(collected, stats)
        assert 0 < collected.value("shmpool.oldest_wait", pool.name) < stats.oldest_wait
        seen = {
            "used": collected.by(STATE, "db.client.connection.count", pool.name)["used"],
            "waiting": collected.value("db.client.connection.pending_requests", pool.name),
            "timeouts": collected.value("db.client.connection.timeouts", pool.name),
            "taken back": collected.by("shmpool.what", "shmpool.recovered", pool.name)["leases"],
            "leases": sum(collected.by("shmpool.source", "shmpool.leases", pool.name).values()),
        }
        assert seen == {"used": 3, "waiting": 1, "timeouts": 1, "taken back": 2, "leases": 4 * 50 + 2 + 3}
        last.kill()
        waiter.result()
        assert_tells(report.collect(), pool.stats())


def test_everything_on_the_list_is_reported(pool: Pool) -> None:
    with reported(pool) as report:
        pool.get().release()
        told = set(report.collect().metrics)
    stems = {
        metric.name.replace("db.client.connection.", "shmpool.") for metric in METRICS if isinstance(metric, Times)
    }
    assert stems == set(TIMES)
    figures = {metric.name for metric in METRICS if not isinstance(metric, Times)}
    assert figures | {f"{stem}.{part}" for stem in stems for part in ("count", "sum")} <= told


def test_one_snapshot_a_collection(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    snapshot = Pool._snapshot
    monkeypatch.setattr(Pool, "_snapshot", lambda self: taken.append(self) or snapshot(self))
    with reported(pool) as report:
        taken.clear()
        for count in (1, 2, 3):
            report.collect()
            assert len(taken) == count


def test_names_units_and_kinds_are_those_of_the_conventions(pool: Pool) -> None:
    class Wanted:
        """A meter that only notes what it is asked for."""

        def __getattr__(self, create: str) -> Callable[..., tuple[str, str, bool]]:
            return lambda name, description, unit: (name, unit, create == "create_counter")  # noqa: ARG005

    meter: Any = Wanted()
    factories = [
        db_metrics.create_db_client_connection_count,
        db_metrics.create_db_client_connection_idle_max,
        db_metrics.create_db_client_connection_idle_min,
        db_metrics.create_db_client_connection_max,
        db_metrics.create_db_client_connection_pending_requests,
        db_metrics.create_db_client_connection_timeouts,
    ]
    wanted = {factory(meter) for factory in factories}
    with reported(pool) as report:
        metrics = report.collect().metrics
    sums = {name: metric.data for name, metric in metrics.items() if isinstance(metric.data, Sum)}
    told = {(name, metrics[name].unit, data.is_monotonic) for name, data in sums.items() if name.startswith("db.")}
    assert told == wanted
    assert not [name for name in metrics if name.startswith("db.") and name not in sums]
    assert metrics["shmpool.oldest_wait"].unit == "s"
    assert "shmpool.oldest_wait" not in sums, "seconds of two pools do not add up"


def test_quantiles_are_of_the_time_between_two_collections(pool: Pool) -> None:
    def dial() -> None:
        pool.get().discard("the next one is dialled")

    with reported(pool) as report:
        for _ in range(3):
            dial()
        report.collect()
        earlier = pool.stats()
        dial()
        now = report.collect().by("shmpool.quantile", "shmpool.create_time.quantile", pool.name)
        times = pool.stats().diff(earlier).dial_latency
        assert times.count == 1
        assert now == {"0.5": times.p50, "0.95": times.p95, "0.99": times.p99, "0.999": times.p999, "1": times.max}
        assert "shmpool.create_time.quantile" not in report.collect().metrics, "nothing happened"


def test_counters_begin_with_the_instrumentation(pool: Pool) -> None:
    pool.get().release()
    with reported(pool) as report:
        assert sum(report.collect().by("shmpool.source", "shmpool.leases", pool.name).values()) == 0
        pool.get().release()
        collected = report.collect()
        assert sum(collected.by("shmpool.source", "shmpool.leases", pool.name).values()) == 1
        assert sum(collected.by("shmpool.kind", "shmpool.connections_created", pool.name).values()) == 0
        assert sum(collected.by(STATE, "db.client.connection.count", pool.name).values()) == 1


# Who reports --------------------------------------------------------------------------------------------------------


class Worker:
    """A forked process with an SDK of its own that works and collects when told to."""

    def __init__(self, family: Family, pool: Pool) -> None:
        self._end, theirs = multiprocessing.Pipe()
        self.child = family.fork(self._run, theirs, pool)
        theirs.close()

    def _run(self, pipe: Connection, pool: Pool) -> None:
        self._end.close()
        with reported(pool, deltas=True) as report:
            while (order := pipe.recv()) != "end":
                if order == "work":
                    use(pool)
                pipe.send(report.collect().values if order == "collect" else None)

    def do(self, order: str) -> Any:
        self._end.send(order)
        assert self._end.poll(DEADLINE_S)
        return self._end.recv()

    def close(self) -> None:
        self._end.close()


def test_one_of_the_workers_reports_and_another_when_it_dies(server: ExclusiveServer, family: Family) -> None:
    with contextlib.ExitStack() as stack, proven(server, 2, maintenance_interval=math.inf) as pool:
        workers = [stack.enter_context(contextlib.closing(Worker(family, pool))) for _ in range(3)]

        def reporters() -> list[Worker]:
            found = []
            for worker in workers:
                values = worker.do("collect")
                found += [worker] if values else []
                for (name, _, _, _), value in values.items():
                    totals[name] += value
            return found

        totals: Counter[str] = Counter()
        for worker in workers:
            worker.do("work")
        first = reporters()
        assert len(first) == 1
        for worker in workers:
            worker.do("work")
        assert reporters() == first
        first[0].child.kill()
        workers.remove(first[0])
        second = reporters()
        assert len(second) == 1
        for worker in workers:
            worker.do("work")
        assert reporters() == second
        stats = pool.stats()
        assert stats.successes == 3 + 3 + 2
        assert totals["shmpool.leases"] == stats.successes, "what is counted once is reported once, in deltas too"
        assert totals["shmpool.use_time.count"] == stats.use_latency.count


def test_a_forked_child_is_not_its_parent(pool: Pool, family: Family) -> None:
    def collects() -> set[str]:
        return report.collect().pools()

    def stays() -> None:
        signal.pause()

    with reported(pool) as report:
        assert report.collect().pools() == {pool.name}
        assert family.fork(collects).result() == set(), "the parent reports"
        silent = family.fork(stays)
        assert report.collect().pools() == {pool.name}
        report.instrumentation.uninstrument()
        with reported(pool) as other:
            assert silent.alive()
            assert other.collect().pools() == {pool.name}, "the silent child has not kept its parent's part"


def test_what_was_told_is_never_taken_back(pool: Pool, family: Family) -> None:
    """Neither by who instruments a pool anew, nor by a child that has its parent's provider."""

    def leases(report: Reported) -> float:
        return sum(report.collect().by("shmpool.source", "shmpool.leases", pool.name).values())

    def takes_over() -> list[float]:
        found = [leases(report)]
        is_asked.set()
        is_left.wait()
        for _ in range(2):
            pool.get().release()
            found.append(leases(report))
        return found

    latches = contextlib.closing(Latch()), contextlib.closing(Latch())
    with latches[0] as is_asked, latches[1] as is_left, reported(pool, deltas=True) as report:
        for _ in range(5):
            pool.get().release()
        assert leases(report) == 5
        report.instrumentation.uninstrument()
        report.instrumentation = instrument(pool, meter_provider=report.provider)
        pool.get().release()
        assert leases(report) == 1
        child = family.fork(takes_over)
        is_asked.wait()
        report.instrumentation.uninstrument()
        is_left.set()
        assert child.result() == [0, 1, 1]


@pytest.mark.parametrize("way", ["libc", "clone"])
def test_a_child_that_python_knows_nothing_of(pool: Pool, family: Family, way: Way) -> None:
    def collects() -> set[str]:
        return report.collect().pools()

    with reported(pool) as report:
        assert collects() == {pool.name}
        assert family.fork(collects, way=way).result() == set(), "the parent reports"


def test_a_child_that_is_forked_while_a_pool_is_instrumented(
    pool: Pool, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when it gets a descriptor that it does not know of, and with it its parent's part."""
    is_open, has_forked, opens = threading.Event(), threading.Event(), slab.open_checked

    def open_slowly(name: str) -> int:
        found = opens(name)
        is_open.set()
        has_forked.wait(0.2)  # it waits for us, if all is well
        return found

    def instruments() -> None:
        with reported(pool) as report:
            found.extend(report.collect().pools())

    found: list[str] = []
    monkeypatch.setattr(slab, "open_checked", open_slowly)
    thread = threading.Thread(target=instruments)
    thread.start()
    assert is_open.wait(DEADLINE_S)
    silent = family.fork(signal.pause)
    has_forked.set()
    thread.join()
    assert found == [pool.name]
    with reported(pool) as other:
        assert silent.alive()
        assert other.collect().pools() == {pool.name}


def test_descriptors_that_the_program_has_closed(pool: Pool, family: Family) -> None:
    """A daemon closes what it finds open; the numbers are its own then."""

    def becomes_a_daemon() -> tuple[set[str], bool]:
        report = Reported(pool)
        number = report.instrumentation._watched[0]._segment
        os.close(number)
        own = os.open(os.devnull, os.O_RDONLY)
        assert own == number
        collected = report.collect().pools()
        report.instrumentation.uninstrument()
        gc.collect()
        return collected, stat.S_ISCHR(os.fstat(own).st_mode)

    assert family.fork(becomes_a_daemon).result() == (set(), True)


def test_an_instrumented_parent_leaves_it_to_its_children(pool: Pool, family: Family) -> None:
    def collects() -> set[str]:
        return report.collect().pools()

    with reported(pool) as report:
        assert family.fork(collects).result() == {pool.name}


def test_a_second_report_of_one_pool_has_nothing_to_say(pool: Pool) -> None:
    with reported(pool) as one, reported(pool) as other:
        assert one.collect().pools() == {pool.name}
        assert other.collect().pools() == set()
        one.instrumentation.uninstrument()
        one.instrumentation.uninstrument()
        assert one.collect().pools() == set()
        assert other.collect().pools() == {pool.name}
        again = instrument(pool, meter_provider=one.provider)
        other.instrumentation.uninstrument()
        assert one.collect().pools() == {pool.name}
        again.uninstrument()


def test_pools_of_one_provider(url: str, pool: Pool) -> None:
    with Pool(url, min_connections=0) as second, reported(pool) as report, inspect(second.name) as inspector:
        more = instrument(inspector, meter_provider=report.provider)
        assert report.collect().pools() == {pool.name, second.name}
        more.uninstrument()
        assert report.collect().pools() == {pool.name}


# What can be wrong --------------------------------------------------------------------------------------------------


def test_a_segment_that_is_cut(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    whole = Path(slab.path_of(pool.name)).read_bytes()
    name = f"{pool.name}-cut"
    with segment(name, whole) as path, inspect(name) as inspector, reported(inspector, pool) as report:
        assert report.collect().pools() == {name, pool.name}
        os.truncate(path, 4096)
        assert report.collect().pools() == {pool.name}
        inspector.close()
        assert report.collect().pools() == {pool.name}
    assert caplog.records == []


def test_a_pool_that_was_closed(pool: Pool) -> None:
    with reported(pool) as report:
        pool.close()
        assert report.collect().by("shmpool.state", "shmpool.pool_state", pool.name)["closed"] == 1
    with pytest.raises(PoolNotFound):
        reported(pool).__enter__()


def python(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)


def test_without_the_api() -> None:
    done = python("import sys; sys.modules['opentelemetry.metrics'] = None; import shmpool.integrations.opentelemetry")
    remedy = "the integration needs opentelemetry-api: pip install 'shmpool[opentelemetry]'"
    assert done.stderr.endswith(f"\nImportError: {remedy}\n")
    assert python("import shmpool, sys; sys.exit('opentelemetry' in sys.modules)").returncode == 0


def test_the_global_provider_may_be_set_later(url: str) -> None:
    done = python(f"""
import shmpool
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from shmpool.integrations.opentelemetry import instrument
one, other, third = pools = [shmpool.Pool({url!r}, min_connections=0) for _ in range(3)]
instrument(one)
reader = InMemoryMetricReader()
metrics.set_meter_provider(provider := MeterProvider([reader]))
instrument(other)
instrument(third, meter_provider=provider)
(told,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
(limit,) = [each for each in told.metrics if each.name == "db.client.connection.max"]
print(len(limit.data.data_points))
for pool in pools:
    pool.close()
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_without_an_sdk_nothing_is_done(url: str) -> None:
    done = python(f"""
import shmpool
from shmpool.integrations.opentelemetry import instrument
with shmpool.Pool({url!r}, min_connections=0) as pool:
    instrument(pool).uninstrument()
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_meter_is_named_for_the_library(pool: Pool) -> None:
    meters: list[tuple[str, str | None]] = []

    class Provider(MeterProvider):
        def get_meter(self, name: str, version: str | None = None, *more: Any, **named: Any) -> Meter:
            meters.append((name, version))
            return super().get_meter(name, version, *more, **named)

    provider = Provider(shutdown_on_exit=False)
    instrument(pool, meter_provider=provider).uninstrument()
    provider.shutdown()
    assert meters == [("shmpool", __version__)]
