"""What Prometheus is told: the figures of real pools over several processes, read back from the text it would get."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from shmpool import Pool, PoolStats, PoolTimeout, exporter, inspect, slab
from shmpool.exporter import BOUNDS, coarsened, collector
from shmpool.inspector import Inspector
from shmpool.metrics import METRICS, POOL_STATES, Times
from shmpool.stats import FAILURES, SOURCES, UNCOUNTED, Latency
from tests.members import some_name
from tests.processes import Family, holder, proven, until, use
from tests.servers import ExclusiveServer
from tests.test_inspector import segment

GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "observing.md"
DEADLINE_S = 30.0
COMMAND = [sys.executable, "-m", "shmpool"]
POOL = "db_client_connection_pool_name"
LOWEST_NS, LONGEST_NS, OCTAVE_BUCKETS = 64, 1 << 37, 32  # core/stats.h


class Scrape:
    """A text for Prometheus, as its own parser reads it."""

    def __init__(self, text: str) -> None:
        self.families: dict[str, Metric] = {}
        for family in text_string_to_metric_families(text):
            assert family.name not in self.families, "each family stands once, in one piece"
            self.families[family.name] = family
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self._values, key
                self._values[key] = sample.value

    def value(self, name: str, **labels: str) -> float:
        return self._values[name, frozenset(labels.items())]

    def by(self, label: str, name: str, pool: str) -> dict[str, float]:
        """The values of a metric for each value of its label."""
        wanted = {key: value for key, value in self._values.items() if key[0] == name and (POOL, pool) in key[1]}
        return {dict(labels)[label]: value for (_, labels), value in wanted.items()}

    def pools(self) -> set[str]:
        return {value for _, labels in self._values for label, value in labels if label == POOL}

    def outcomes(self) -> dict[str, float]:
        found = {dict(labels)["outcome"]: value for (name, labels), value in self._values.items() if "pools" in name}
        return {outcome: count for outcome, count in found.items() if count}


def scraped(*pools: Pool | Inspector) -> Scrape:
    """As an application registers them; of none: all there are."""
    registry = CollectorRegistry(auto_describe=True)
    registry.register(collector(*pools))
    return Scrape(generate_latest(registry).decode())


@pytest.fixture
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def whole(url: str) -> bytes:
    """The bytes of a sound slab."""
    with Pool(url, max_connections=3, maintenance_interval=math.inf) as made:
        return Path(slab.path_of(made.name)).read_bytes()


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test's pools are the only ones there are, whatever other tests do meanwhile."""
    own = f"shmpool-{some_name()}-"
    monkeypatch.setattr(slab, "prefix", lambda: own)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


# The figures --------------------------------------------------------------------------------------------------------


def assert_tells(scrape: Scrape, stats: PoolStats) -> None:
    """All figures of a pool at rest are those of `stats`; `oldest_wait` and `upstream_down_for` grow meanwhile."""
    name = stats.name
    gauges = {
        "db_client_connection_idle_min": stats.prewarm_target,
        "db_client_connection_max": stats.max_connections,
        "db_client_connection_pending_requests": stats.waiting,
        "db_client_connection_timeouts_total": stats.timeouts,
        "shmpool_resize_limit": stats.resize_limit,
        "shmpool_connection_lifetime_seconds_total": stats.lifetime_ns / 1e9,
        "shmpool_mailbox_reads_total": stats.mailbox_reads,
        "shmpool_failed_deposits_total": stats.failed_deposits,
        "shmpool_dial_attempts_total": stats.dial_attempts,
        "shmpool_dial_failures_total": stats.dial_failures,
        "shmpool_leaks_total": stats.leaks,
        "shmpool_overdue_leases_total": stats.overdue_leases,
        "shmpool_health_checks_total": stats.health_checks,
        "shmpool_health_failures_total": stats.health_failures,
        "shmpool_upstream_up": 0 if stats.upstream in ("down", "probing") else 1,
        "shmpool_upstream_failures_total": stats.upstream_failures,
        "shmpool_workers_alive": len([worker for worker in stats.workers if worker.alive]),
        "shmpool_recoveries_total": stats.recoveries,
        "shmpool_prewarm_target": stats.prewarm_target,
        "shmpool_prewarm_created_total": stats.prewarm_created,
        "shmpool_prewarm_failed_total": stats.prewarm_failed,
    }
    assert {each: scrape.value(each, **{POOL: name}) for each in gauges} == gauges
    state = "db_client_connection_state"
    used = {"idle": stats.idle, "used": stats.in_use}
    assert scrape.by(state, "db_client_connection_count", name) == used
    assert scrape.by("state", "shmpool_slots", name) == stats.connections
    reasons = {reason: count for reason, count in stats.closed.items() if reason != UNCOUNTED}
    assert scrape.by("reason", "shmpool_connections_closed_total", name) == reasons
    kinds = stats.kinds.items()
    assert scrape.by("kind", "shmpool_connections", name) == {kind: each.current for kind, each in kinds}
    created = scrape.by("kind", "shmpool_connections_created_total", name)
    assert created == {kind: each.created for kind, each in kinds}
    assert scrape.by("source", "shmpool_leases_total", name) == {each: getattr(stats, each) for each in SOURCES}
    assert scrape.by("kind", "shmpool_failed_calls_total", name) == {each: getattr(stats, each) for each in FAILURES}
    taken_back = {
        "leases": stats.recovered_leases,
        "offers": stats.recovered_offers,
        "waiters": stats.recovered_waiters,
    }
    assert scrape.by("what", "shmpool_recovered_total", name) == taken_back
    now = scrape.by("state", "shmpool_pool_state", name)
    assert now == {each: int(each == stats.state) for each in ("open", "paused", "draining", "closed")}
    assert_times(scrape, name, "db_client_connection_create_time_seconds", stats.dial_latency)
    assert_times(scrape, name, "db_client_connection_wait_time_seconds", stats.get_latency)
    assert_times(scrape, name, "db_client_connection_use_time_seconds", stats.use_latency)
    assert_times(scrape, name, "shmpool_queue_time_seconds", stats.wait_latency)


def assert_times(scrape: Scrape, pool: str, name: str, times: Latency) -> None:
    buckets = scrape.by("le", f"{name}_bucket", pool)
    assert list(map(float, buckets)) == [*BOUNDS, math.inf]
    counts = list(buckets.values())
    assert counts == sorted(counts), "they are cumulative"
    assert counts[-1] == times.count == scrape.value(f"{name}_count", **{POOL: pool})
    assert scrape.value(f"{name}_sum", **{POOL: pool}) == pytest.approx(times.mean * times.count)
    if times.count:
        below = [count for bound, count in buckets.items() if float(bound) < times.max * 0.96]
        assert times.count > max(below, default=0)
        assert next(count for bound, count in buckets.items() if float(bound) > times.max * 1.04) == times.count


def test_the_figures_of_several_processes(server: ExclusiveServer, family: Family) -> None:
    def work() -> None:
        for _ in range(50):
            use(pool)

    def in_vain() -> None:
        with pytest.raises(PoolTimeout):
            pool.get(timeout=0.02)

    with proven(server, 3, maintenance_interval=math.inf) as pool:
        assert_tells(scraped(pool), pool.stats())
        for child in [family.fork(work) for _ in range(4)]:
            child.result()
        killed = holder(family, pool, 2)
        assert_tells(scraped(pool), pool.stats())
        killed.kill()
        pool.recover()
        last = holder(family, pool, 3)
        family.fork(in_vain).result()
        pool.recover()
        waiter = family.fork(use, pool)
        until(lambda: pool.stats().waiting == 1, "it waits in the queue")

        scrape, stats = scraped(pool), pool.stats()
        assert_tells(scrape, stats)
        with inspect(pool.name) as inspector:
            assert_tells(scraped(inspector), stats)
        oldest = scrape.value("shmpool_oldest_wait_seconds", **{POOL: pool.name})
        assert 0 < oldest < stats.oldest_wait
        seen = {
            "used": scrape.by("db_client_connection_state", "db_client_connection_count", pool.name)["used"],
            "waiting": scrape.value("db_client_connection_pending_requests", **{POOL: pool.name}),
            "timeouts": scrape.value("db_client_connection_timeouts_total", **{POOL: pool.name}),
            "taken back": scrape.by("what", "shmpool_recovered_total", pool.name)["leases"],
            "died": scrape.by("reason", "shmpool_connections_closed_total", pool.name)["owner_died"],
            "leases": sum(scrape.by("source", "shmpool_leases_total", pool.name).values()),
        }
        assert seen == {"used": 3, "waiting": 1, "timeouts": 1, "taken back": 2, "died": 2, "leases": 4 * 50 + 2 + 3}
        assert scrape.outcomes() == {"reported": 1}

        last.kill()
        waiter.result()
        assert_tells(scraped(pool), pool.stats())


def test_every_process_tells_the_same(server: ExclusiveServer, family: Family) -> None:
    with proven(server, 2, maintenance_interval=math.inf) as pool:
        use(pool)

        def tell() -> str:
            use(pool)
            return generate_latest(registry).decode()

        registry = CollectorRegistry()
        registry.register(collector(pool))
        told = family.fork(tell).result()
        own = generate_latest(registry).decode()
        gone = re.compile(r"^shmpool_workers_alive.*$", re.MULTILINE)
        assert gone.sub("", told) == gone.sub("", own)


def test_openmetrics(url: str) -> None:
    """The stricter form of the text, which Prometheus asks for first."""
    with Pool(url, maintenance_interval=math.inf) as pool:
        pool.get().release()
        registry = CollectorRegistry()
        registry.register(collector(pool))
        strict = generate_openmetrics(registry).decode()
        families = {family.name: family for family in openmetrics_families(strict)}
        plain = scraped(pool).families
    assert {name: (each.type, each.samples) for name, each in families.items()} == {
        name: (each.type, each.samples) for name, each in plain.items()
    }


def test_a_server_that_is_down(deaf_port: int) -> None:
    with Pool(f"tcp://127.0.0.1:{deaf_port}", min_connections=1, maintenance_interval=math.inf) as pool:
        assert scraped(pool).value("shmpool_upstream_up", **{POOL: pool.name}) == 1, "nobody knows"
        with pytest.raises(ConnectionError):
            pool.get()
        scrape = scraped(pool)
        assert_tells(scrape, pool.stats())
        assert scrape.value("shmpool_upstream_up", **{POOL: pool.name}) == 0
        assert 0 < scrape.value("shmpool_upstream_down_seconds", **{POOL: pool.name}) < DEADLINE_S


def test_how_many_may_be_idle(url: str) -> None:
    with (
        Pool(url, max_connections=6, resize_limit=9, min_connections=0) as free,
        Pool(url, max_connections=6, max_idle_connections=4, min_connections=1) as bound,
    ):
        free.resize(8)
        scrape = scraped(free, bound)
        limits = {
            pool.name: tuple(
                scrape.value(f"db_client_connection_{what}", **{POOL: pool.name})
                for what in ("idle_min", "idle_max", "max")
            )
            for pool in (free, bound)
        }
        assert limits == {free.name: (0, 8, 8), bound.name: (1, 4, 6)}


# Histograms ---------------------------------------------------------------------------------------------------------


def bucket_of(ns: int) -> tuple[int, int]:
    """Of the core: from, up to and without."""
    ns = min(max(ns, LOWEST_NS), LONGEST_NS - 1)
    width = (1 << ns.bit_length() - 1) // OCTAVE_BUCKETS
    lower = ns // width * width
    return lower, lower + width


def test_the_buckets_are_those_of_the_core(url: str) -> None:
    with Pool(url, min_connections=0, maintenance_interval=math.inf) as pool:
        for _ in range(100):
            pool.get().release()
        snapshot = pool._snapshot()
    rows = [row for worker in snapshot["workers"] for row in worker[snapshot["worker_fields"].index("get_hist")]]
    assert len(rows) > 1
    assert all(bucket_of(lower) == bucket_of(upper - 1) == (lower, upper) for lower, upper, _ in rows)


@given(st.lists(st.integers(0, 40).flatmap(lambda bits: st.integers(1 << bits, 2 << bits)), max_size=30))
def test_each_bound_counts_what_is_surely_below_it(times_ns: list[int]) -> None:
    counts, seconds = coarsened([(*bucket_of(ns), 1) for ns in times_ns])
    assert counts == sorted(counts)
    assert counts[-1] == len(times_ns)
    for bound, count in zip(BOUNDS, counts, strict=False):
        short = bound * (1 - 1 / OCTAVE_BUCKETS)
        assert sum(ns / 1e9 < short for ns in times_ns) <= count <= sum(ns / 1e9 <= bound for ns in times_ns)
    known = [min(max(ns, LOWEST_NS), LONGEST_NS) / 1e9 for ns in times_ns]
    assert seconds == pytest.approx(sum(known), rel=0.016)


def test_a_bound_that_ends_a_bucket_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_BOUNDS_NS", [1024 * (1 + at) for at in range(len(BOUNDS))])
    counts, seconds = coarsened([(992, 1024, 5), (1024, 1056, 2)])
    assert counts[:3] == [5, 7, 7]
    assert seconds == pytest.approx((1008 * 5 + 1040 * 2) / 1e9)


# All pools of the host ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_none() -> None:
    scrape = scraped()
    assert scrape.pools() == set()
    assert scrape.outcomes() == {}
    assert scrape.families["db_client_connection_count"].samples == []


@pytest.mark.usefixtures("alone")
def test_pools_come_and_go(url: str) -> None:
    registry = CollectorRegistry()
    registry.register(collector())

    def scrape() -> Scrape:
        return Scrape(generate_latest(registry).decode())

    with Pool(url, name="one", maintenance_interval=math.inf) as one:
        assert scrape().pools() == {"one"}
        with Pool(url, name="two", max_connections=3) as two, two.get():
            assert scrape().outcomes() == {"reported": 2}
            assert scrape().by("db_client_connection_state", "db_client_connection_count", "two")["used"] == 1
            two.close()
        assert scrape().pools() == {"one"}
        assert_tells(scrape(), one.stats())
    assert scrape().pools() == set()


@pytest.mark.usefixtures("alone")
def test_what_is_no_living_pool_is_counted_and_left_out(
    url: str, whole: bytes, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        with Pool(url, name="dead"):
            os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.ExitStack() as stack, Pool(url, name="living", maintenance_interval=math.inf) as living:
        family.fork(die).wait()
        stack.callback(slab.remove_remains, "dead")
        for name, data in {"empty": b"", "text": b"no slab", "cut": whole[:5000], "zeros": bytes(9999)}.items():
            stack.enter_context(segment(name, data))
        stack.enter_context(segment("open-to-all", whole, 0o644))
        there = list(exporter.pool_names())
        monkeypatch.setattr(exporter, "pool_names", lambda: [*there, "gone"])
        scrape = scraped()
        assert scrape.pools() == {"living"}
        assert scrape.outcomes() == {"reported": 1, "dead": 1, "unreadable": 5, "vanished": 1}
        assert_tells(scrape, living.stats())


@pytest.mark.usefixtures("alone")
def test_what_a_segment_says_is_not_believed(whole: bytes) -> None:
    """It cannot take another's name, which would make two of one series, nor report limits that cannot be."""
    config = whole.index(b'"max_idle_connections": null')
    wrong = whole[:config] + b'"max_idle_connections": 9999' + whole[config + 28 :]
    senseless = whole.replace(b'{"target"', b'["target"', 1)
    with segment("first", whole), segment("second", wrong), segment("third", senseless):
        scrape = scraped()
        assert scrape.pools() == {"first", "second", "third"}
        for name in scrape.pools():
            assert scrape.value("db_client_connection_idle_max", **{POOL: name}) == 3


@pytest.mark.usefixtures("alone")
def test_a_segment_that_is_cut_between_two_scrapes(whole: bytes) -> None:
    with segment("cut", whole) as path, inspect("cut") as inspector:
        registry = CollectorRegistry()
        registry.register(collector(inspector))
        told = [Scrape(generate_latest(registry).decode()).outcomes()]
        os.truncate(path, 4096)
        told.append(Scrape(generate_latest(registry).decode()).outcomes())
        inspector.close()
        told.append(Scrape(generate_latest(registry).decode()).outcomes())
    assert told == [{"reported": 1}, {"unreadable": 1}, {"vanished": 1}]


def test_a_pool_that_was_closed_is_told_by_who_had_it(url: str) -> None:
    with Pool(url, maintenance_interval=math.inf) as pool:
        pool.get().release()
        pool.close()
        scrape = scraped(pool, pool)
    assert scrape.outcomes() == {"reported": 1}
    assert_tells(scrape, pool.stats())
    assert scrape.by("state", "shmpool_pool_state", pool.name)["closed"] == 1


# The command --------------------------------------------------------------------------------------------------------


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=DEADLINE_S)


class Served(NamedTuple):
    process: subprocess.Popen[str]
    url: str

    def scrape(self) -> Scrape:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url, timeout=DEADLINE_S) as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=")
            return Scrape(response.read().decode())


@contextlib.contextmanager
def served(*options: str) -> Iterator[Served]:
    command = [*COMMAND, "export", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = re.fullmatch(r"listening on (http://\S+/metrics); Ctrl-C ends it\n", process.stdout.readline())
            assert said
            yield Served(process, said[1])
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_over_http(url: str, number: signal.Signals) -> None:
    with served() as server:
        with Pool(url, name=some_name(), maintenance_interval=math.inf) as pool:
            pool.get().release()
            assert_tells(server.scrape(), pool.stats())
            assert server.url.startswith("http://127.0.0.1:"), "loopback, if nothing else was asked for"
        assert pool.name not in server.scrape().pools()
        with socket.create_connection(("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))):  # and asks nothing
            server.process.send_signal(number)
            assert server.process.communicate(timeout=DEADLINE_S) == ("", "")
        assert server.process.returncode == 0


def test_a_client_that_says_nothing_is_let_go() -> None:
    program = "from shmpool import exporter; exporter._SILENCE_S = 0.05; exporter.serve(port=0)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as silent:
                assert silent.recv(1) == b""
        finally:
            process.kill()


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = run("export", "--port", port)
    said = f"shmpool: cannot listen on 127.0.0.1 port {port}: Address already in use; choose with --host and --port\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_addresses_that_cannot_be() -> None:
    done = run("export", "--host", "192.0.2.1", "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("shmpool: cannot listen on 192.0.2.1 port 0: ")
    done = run("export", "--port", "65536")
    assert done.returncode == 2
    assert "must be from 0 to 65535" in done.stderr


def test_once(url: str) -> None:
    with Pool(url, name=some_name(), maintenance_interval=math.inf) as pool:
        pool.get().release()
        done = run("export", "--once")
        assert (done.returncode, done.stderr) == (0, "")
        assert_tells(Scrape(done.stdout), pool.stats())


def test_without_the_client() -> None:
    remedy = "the exporter needs prometheus-client: pip install 'shmpool[prometheus]'\n"
    blocked = "import sys; sys.modules['prometheus_client'] = None; "

    def python(program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", blocked + program], capture_output=True, text=True, timeout=DEADLINE_S
        )

    imported = python("import shmpool.exporter")
    assert imported.returncode == 1
    assert imported.stderr.endswith(f"\nImportError: {remedy}")
    command = python("from shmpool.cli import main; sys.exit(main(['export', '--once']))")
    assert (command.returncode, command.stdout, command.stderr) == (1, "", f"shmpool: {remedy}")
    assert python("from shmpool.cli import main; sys.exit(main(['list']))").returncode == 0


# The guide ----------------------------------------------------------------------------------------------------------


def test_the_guide_has_the_metrics_there_are(url: str) -> None:
    with Pool(url, maintenance_interval=math.inf) as pool:
        scrape = scraped(pool)
    there = {}
    for family in scrape.families.values():
        suffix = "_total" if family.type == "counter" else ""
        labels: dict[str, set[str]] = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
        labels.pop("le", None)
        assert (labels.pop(POOL, None) is None) == (family.name == "shmpool_pools")
        there[family.name + suffix] = (family.type, labels)
    told = {}
    text = GUIDE.read_text(encoding="utf-8")
    for name, kind, cell in re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) ?\|", text, re.MULTILINE):
        assert name not in told
        label, _, values = cell.strip().partition(": ")
        told[name] = (kind, {label.strip("`"): set(values.split(", "))} if label else {})
    assert told["shmpool_connections_closed_total"][1].keys() == {"reason"}
    told["shmpool_connections_closed_total"] = there["shmpool_connections_closed_total"]  # another guide has them
    assert told == there


def test_the_alerts_use_metrics_there_are() -> None:
    rules = "\n".join(re.findall(r"^```yaml\n(groups:.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.M))
    labels = {"db_client_connection_state"}
    used = set(re.findall(r"\b(?:db_client|shmpool)_\w+", rules)) - labels
    assert len(used) > 3
    histograms = [exporter._name(each) for each in METRICS if isinstance(each, Times)]
    there = {exporter._name(each) for each in METRICS}
    assert used <= there | {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}


def test_the_guides_program_runs(url: str) -> None:
    programs = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (program,) = [each for each in programs if "exporter" in each]
    name = some_name()
    program = program.replace("tcp://127.0.0.1:6379", url).replace('"guide"', f'"{name}"')
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert name in Scrape(done.stdout).pools()


def test_the_core_has_no_more_states(url: str) -> None:
    """Of a pool: those that `shmpool_pool_state` tells."""
    with Pool(url, maintenance_interval=math.inf) as pool:
        seen = {pool.stats().state}
        for change in (pool.pause, pool.resume, pool.drain):
            change()
            seen.add(pool.stats().state)
    seen.add(pool.stats().state)
    assert seen == set(POOL_STATES)
