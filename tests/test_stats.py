"""`PoolStats`: figures from snapshots made by hand, and from real pools of several processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmpool
import shmpool.stats as stats_module
from shmpool import DialError, DialRequest, IPVersion, Pool, PoolClosed, PoolConfig, Protocol
from shmpool.hooks import CloseReason
from shmpool.stats import FAILURES, HELD, KINDS, SOURCES, STATES, UNCOUNTED, ConnectionCounts, Latency, PoolStats
from tests.processes import TIMEOUT_S, Family, until
from tests.servers import ExclusiveServer

CORE = Path(__file__).parent.parent / "shmpool" / "core"
SECOND = 1_000_000_000
NOW = 1000 * SECOND

SLOT_FIELDS = [
    "index",
    "state",
    "owner",
    "id",
    "bucket",
    "peer",
    "created_ns",
    "last_used_ns",
    "leased_ns",
    "uses",
    "flags",
    "checked_ns",
]
WORKER_FIELDS = ["index", "pid", "alive", "started_ns", "generation", "counters", "get_hist", "use_hist"]
WAITER_FIELDS = ["index", "worker", "tid", "mask", "since_ns", "state"]


def core_counters(which: str) -> list[str]:
    """The names in a list of counters of slab.h."""
    text = (CORE / "slab.h").read_text(encoding="utf-8")
    block = re.search(rf"#define SHM_{which}_COUNTERS\(X\)(.*?)\n\n", text, re.DOTALL)
    assert block
    return re.findall(r"X\((\w+),", block.group(1))


WORKER_COUNTERS, TOTAL_COUNTERS = core_counters("WORKER"), core_counters("TOTAL")


def worker(index: int, *, counters: dict[str, int] | None = None, **changes: Any) -> dict[str, Any]:
    made = {
        "index": index,
        "pid": 100 + index,
        "alive": True,
        "started_ns": NOW - 10 * SECOND,
        "generation": 1,
        "counters": {**dict.fromkeys(WORKER_COUNTERS, 0), **(counters or {})},
        "get_hist": [],
        "use_hist": [],
    }
    return {**made, **changes}


def slot(index: int, **changes: Any) -> dict[str, Any]:
    made = {
        "index": index,
        "state": "idle",
        "owner": -1,
        "id": index + 1,
        "bucket": 0,
        "peer": socket.inet_aton("192.0.2.7").ljust(16, b"\0") + (6379).to_bytes(2, "big") + bytes(6),
        "created_ns": NOW - 5 * SECOND,
        "last_used_ns": NOW - 2 * SECOND,
        "leased_ns": NOW - SECOND,
        "uses": 3,
        "flags": 0,
        "checked_ns": NOW - 4 * SECOND,
    }
    return {**made, **changes}


def waiter(index: int, owner: int, waited_s: float) -> dict[str, Any]:
    since = NOW - round(waited_s * SECOND)
    return {"index": index, "worker": owner, "tid": 1, "mask": 31, "since_ns": since, "state": "waiting"}


def snapshot(
    *,
    workers: tuple[dict[str, Any], ...] = (),
    slots: tuple[dict[str, Any], ...] = (),
    waiters: tuple[dict[str, Any], ...] = (),
    totals: dict[str, int] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    made = {
        "name": "p",
        "target": "tcp://192.0.2.7:6379",
        "config": "{}",
        "uid": 0,
        "creator_pid": 100,
        "created_at": 1.5e9,
        "now": NOW,
        "state": "open",
        "max_connections": 4,
        "resize_limit": 8,
        "max_workers": 8,
        "max_waiters": 8,
        "size": 4096,
        "upstream": {"state": "up", "step": 0, "retry_ns": 0, "since_ns": 0, "failures": 0, "error": ""},
        "prewarm": (0, 0, 1),
        "totals": {**dict.fromkeys(TOTAL_COUNTERS, 0), "created": 0, **(totals or {})},
        "kinds": [(0, 0, 0, 0)] * 5,
        "slot_fields": tuple(SLOT_FIELDS),
        "slots": [tuple(row[name] for name in SLOT_FIELDS) for row in slots],
        "worker_fields": tuple(WORKER_FIELDS),
        "workers": [tuple(row[name] for name in WORKER_FIELDS) for row in workers],
        "waiter_fields": tuple(WAITER_FIELDS),
        "waiters": [tuple(row[name] for name in WAITER_FIELDS) for row in waiters],
        "wait_hist": [],
        "dial_hist": [],
    }
    return {**made, **changes}


def stats_of(**parts: Any) -> PoolStats:
    return PoolStats.from_snapshot(snapshot(**parts))


# Names are those of the core -----------------------------------------------------------------------------------------


def test_each_counter_of_the_core_is_a_figure() -> None:
    figures = {each.name for each in fields(PoolStats)}
    plain = {name for name in (*WORKER_COUNTERS, *TOTAL_COUNTERS) if not name.startswith("closed_")}
    assert plain <= figures
    assert {*SOURCES, *FAILURES} - set(WORKER_COUNTERS) == {"late_refusals"}
    assert "late_refusals" in TOTAL_COUNTERS


def test_each_figure_that_counts_is_a_counter_of_the_core() -> None:
    counters = {each.name for each in fields(PoolStats) if each.type == "int"}
    of_the_pool = {"pid", "max_connections", "resize_limit", "waiting", "upstream_failures"}
    of_the_pool |= {"prewarm_target", "prewarm_created", "prewarm_failed"}
    of_the_slots = {"created"}
    of_the_core = {name for name in (*WORKER_COUNTERS, *TOTAL_COUNTERS) if not name.startswith("closed_")}
    assert counters - of_the_pool - of_the_slots == of_the_core


def test_states_are_those_of_the_core() -> None:
    text = (CORE / "slot.h").read_text(encoding="utf-8")
    block = re.search(r"#define SHM_SLOT_STATES\(X\)(.*?)\n\n", text, re.DOTALL)
    assert block
    assert tuple(re.findall(r'X\(\w+, "(\w+)"\)', block.group(1))) == STATES
    assert set(STATES) - HELD == {"empty", "idle"}


def test_reasons_are_those_of_the_hook() -> None:
    reasons = {name.removeprefix("closed_") for name in TOTAL_COUNTERS if name.startswith("closed_")}
    assert reasons == set(get_args(CloseReason)) == set(stats_of().closed) - {UNCOUNTED}


def test_kinds_are_those_of_the_core() -> None:
    text = (CORE / "slab.h").read_text(encoding="utf-8")
    found = re.search(r"enum bucket \{(.*?)\}", text)
    assert found
    assert tuple(re.findall(r"BUCKET_(\w+)", found.group(1).lower().replace("bucket_", "BUCKET_"))) == KINDS


# Latency ------------------------------------------------------------------------------------------------------------

rows = st.dictionaries(st.integers(0, 40), st.integers(0, 1000)).map(
    lambda counts: [(64 * at, 64 * at + 64, count) for at, count in counts.items()]
)


@given(rows)
def test_percentiles_are_those_of_the_values(histogram: list[tuple[int, int, int]]) -> None:
    values = sorted((lower + upper) / 2e9 for lower, upper, count in histogram for _ in range(count))
    latency = Latency.from_histogram(histogram)
    assert latency.count == len(values)
    if values:
        for share, figure in ((0.5, latency.p50), (0.95, latency.p95), (0.99, latency.p99), (0.999, latency.p999)):
            assert figure == values[math.ceil(share * len(values)) - 1]
        assert latency.max == values[-1]
        assert latency.mean == pytest.approx(sum(values) / len(values))
    else:
        assert latency == Latency()


# Figures of a snapshot ----------------------------------------------------------------------------------------------


def test_counters_are_summed_over_living_and_departed_workers() -> None:
    stats = stats_of(
        workers=(
            worker(0, counters={"hits": 5, "timeouts": 1}),
            worker(1, alive=False, counters={"hits": 2, "steals": 3, "dials": 1, "refused": 1}),
        ),
        totals={"created": 2, "closed_idle": 1, "closed_owner_died": 2, "recoveries": 1},
        kinds=[(3, 0, 0, 0), *[(0, 0, 0, 0)] * 4],
    )
    assert (stats.hits, stats.steals, stats.dials, stats.timeouts) == (7, 3, 1, 1)
    assert (stats.successes, stats.gets) == (11, 13)
    assert stats.hit_rate == 7 / 11
    assert stats.reuse_average == 11 / 2
    assert stats.recoveries == 1
    assert {reason: count for reason, count in stats.closed.items() if count} == {"idle": 1, "owner_died": 2}
    assert [(each.gets, each.successes) for each in stats.workers] == [(6, 5), (7, 6)]


def test_who_calls_too_late_is_no_worker_and_counts_nevertheless() -> None:
    stats = stats_of(workers=(worker(0, counters={"hits": 1, "refused": 1}),), totals={"late_refusals": 3})
    assert (stats.gets, stats.late_refusals, stats.workers[0].gets) == (5, 3, 2)


def test_clients_are_leases_too() -> None:
    """Of a pool that listens: new ones, and those that have spoken again."""
    stats = stats_of(workers=(worker(0, counters={"dials": 1, "spoken": 4}),), totals={"created": 1})
    assert (stats.successes, stats.reuse_average, stats.workers[0].successes) == (5, 5, 5)


def test_gauges() -> None:
    stats = stats_of(
        workers=(worker(0), worker(1)),
        slots=(
            slot(0, state="leased", owner=0),
            slot(1, state="offered", owner=1),
            slot(2, state="idle", owner=1),
            slot(3, state="empty"),
        ),
        waiters=(waiter(0, 1, 0.25), waiter(1, 1, 0.5)),
    )
    assert stats.connections == {**dict.fromkeys(STATES, 0), "leased": 1, "offered": 1, "idle": 1, "empty": 1}
    assert (stats.open, stats.in_use, stats.idle, stats.waiting) == (3, 2, 1, 2)
    assert stats.utilisation == 0.5
    assert stats.oldest_wait == 0.5
    assert (stats.max_connections, stats.resize_limit) == (4, 8)
    assert [(each.held, each.cached, each.waiting) for each in stats.workers] == [(1, 0, 0), (1, 1, 2)]
    assert [(each.state, each.holder, each.cached_by) for each in stats.slots] == [
        ("leased", 100, None),
        ("offered", 101, None),
        ("idle", None, 101),
    ]


@pytest.mark.parametrize(("cap", "free"), [(6, 3), (4, 1), (3, 0), (2, 0), (1, 0)])
def test_empty_is_what_may_still_be_opened(cap: int, free: int) -> None:
    """Not what the snapshot has: the slots that were ever used, and more than the cap when a pool was made smaller."""
    used = (slot(0, state="leased", owner=0), slot(1), slot(2, state="retiring", owner=0))
    for empty in ((), (slot(3, state="empty"),), tuple(slot(at, state="empty") for at in range(3, 9))):
        stats = stats_of(max_connections=cap, workers=(worker(0),), slots=(*used, *empty))
        assert (stats.connections["empty"], stats.open, len(stats.slots)) == (free, 3, 3)
    assert stats.utilisation == 1 / cap


def upstream(**changes: Any) -> PoolStats:
    return stats_of(upstream={**snapshot()["upstream"], **changes})


def test_the_state_of_the_server() -> None:
    assert (upstream().upstream, upstream(state="unproved").upstream) == ("up", "unproved")
    since = {"since_ns": NOW - 3 * SECOND, "error": "os|111|refused", "failures": 7}
    for state, retry_in in (("down", 0.5), ("probing", 0.0)):
        down = upstream(state=state, retry_ns=NOW + SECOND // 2, **since)
        assert (down.upstream, down.upstream_error, down.upstream_failures) == (state, "refused", 7)
        assert (down.upstream_down_for, down.upstream_retry_in) == (3.0, retry_in)
    assert upstream(state="down", retry_ns=NOW - 1, **since).upstream_retry_in == 0


@pytest.mark.parametrize("state", ["up", "unproved", "invalid"])
def test_what_was_wrong_with_the_server_is_not_wrong_with_it_now(state: str) -> None:
    back = upstream(state=state, since_ns=NOW - SECOND, retry_ns=NOW + SECOND, error="refused", failures=7)
    assert (back.upstream_error, back.upstream_down_for, back.upstream_retry_in) == ("", 0, 0)
    assert back.upstream_failures == 7


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({}, 2),
        ({"max_connections": 1}, 1),
        ({"max_idle_connections": 0}, 0),
        ({"min_connections": 7}, 7),
        ({"min_connections": 0}, 0),
        ({"listening": True}, 0),
    ],
)
def test_prewarming(settings: dict[str, Any], target: int) -> None:
    config = PoolConfig(target="tcp://192.0.2.7:6379", **settings)
    stats = stats_of(config=config.to_json(), prewarm=(1, 2, 0))
    assert stats.prewarm_target == config.effective_min_connections == target
    assert (stats.prewarm_created, stats.prewarm_failed, stats.prewarm_done) == (1, 2, False)
    assert stats_of().prewarm_done is True


@pytest.mark.parametrize("config", ["", "{", "7", "null", '{"min_connections": "x"}', '{"min_connections": 1e9}'])
def test_settings_that_cannot_be_read(config: str) -> None:
    assert stats_of(config=config).prewarm_target == 0


def test_a_new_pool_divides_nothing_by_zero() -> None:
    stats = stats_of()
    assert (stats.hit_rate, stats.reuse_average, stats.utilisation, stats.per_second(3) > 0) == (0, 0, 0, True)
    assert (stats.dial_failure_rate, stats.health_success_rate) == (0, 1)
    assert stats.get_latency == Latency()


def test_shares_of_dials_and_checks() -> None:
    totals = {"dial_attempts": 8, "dial_failures": 2, "health_checks": 100, "health_failures": 1}
    stats = stats_of(totals=totals)
    assert (stats.dial_failure_rate, stats.health_success_rate) == (0.25, 0.99)


@pytest.mark.parametrize(
    ("bucket", "packed", "expected"),
    [
        (0, socket.inet_aton("192.0.2.7"), ("tcp", 4, "192.0.2.7:6379")),
        (1, socket.inet_pton(socket.AF_INET6, "2001:db8::1"), ("tcp", 6, "[2001:db8::1]:6379")),
        (2, socket.inet_aton("192.0.2.7"), ("udp", 4, "192.0.2.7:6379")),
        (3, socket.inet_pton(socket.AF_INET6, "::1"), ("udp", 6, "[::1]:6379")),
    ],
)
def test_kind_and_peer(bucket: int, packed: bytes, expected: tuple[str, int, str]) -> None:
    peer = packed.ljust(16, b"\0") + (6379).to_bytes(2, "big") + bytes(6)
    (seen,) = stats_of(slots=(slot(0, bucket=bucket, peer=peer),)).slots
    assert (seen.protocol, seen.ip_version, seen.peer) == expected


def test_a_unix_peer_is_the_path_of_the_target() -> None:
    (seen,) = stats_of(target="unix:///run/x.sock", slots=(slot(0, bucket=4, peer=bytes(24)),)).slots
    assert (seen.protocol, seen.ip_version, seen.peer) == ("unix", None, "/run/x.sock")
    (seen,) = stats_of(target="some.dial", slots=(slot(0, bucket=4, peer=bytes(24)),)).slots
    assert seen.peer == ""


def test_ages() -> None:
    leased, idle, fresh, early = stats_of(
        slots=(
            slot(0, state="leased"),
            slot(1),
            slot(2, last_used_ns=0, created_ns=NOW - SECOND),
            slot(3, created_ns=NOW + 1000),  # a clock that is read at another moment
        )
    ).slots
    assert (leased.age, leased.since) == (5.0, 1.0)
    assert (idle.age, idle.since) == (5.0, 2.0)
    assert (fresh.age, fresh.since) == (1.0, 1.0)
    assert early.age == 0.0


def test_a_connection_that_is_being_dialled_is_not_the_one_before() -> None:
    (seen,) = stats_of(slots=(slot(0, state="dialing", owner=0, flags=3),), workers=(worker(0),)).slots
    assert (seen.holder, seen.peer, seen.age, seen.since, seen.uses, seen.flags) == (100, "", None, None, 0, ())


def test_flags() -> None:
    seen = stats_of(slots=(slot(0, flags=1), slot(1, flags=2), slot(2), slot(3, flags=4), slot(4, flags=5))).slots
    assert [each.flags for each in seen] == [("private",), ("unmailed",), (), ("ending",), ("private", "ending")]


def test_a_damaged_slab_yields_figures_nevertheless() -> None:
    stats = stats_of(
        slots=(slot(0, state="invalid", owner=4000, bucket=200), slot(1, bucket=200, owner=77)),
        waiters=(waiter(0, 4000, 1),),
    )
    assert stats.connections["invalid"] == 1
    assert [each.cached_by for each in stats.slots] == [None, None]
    json.dumps(stats.to_dict())


def test_figures_do_not_change() -> None:
    stats = stats_of()
    with pytest.raises(FrozenInstanceError):
        stats.hits = 3  # type: ignore[misc]


def test_a_child_that_is_forked_while_figures_are_made_makes_them_too(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when they are made under a lock, which a forked child finds locked by a thread that it has not."""
    making, may_end = threading.Event(), threading.Event()
    parent, make = os.getpid(), stats_module._connection_stats

    def make_slowly(snapshot: Any) -> Any:
        if os.getpid() == parent:
            making.set()
            may_end.wait(TIMEOUT_S)
        return make(snapshot)

    monkeypatch.setattr(stats_module, "_connection_stats", make_slowly)
    thread = threading.Thread(target=lambda: stats_of(slots=(slot(0),)).slots)
    thread.start()
    try:
        assert making.wait(TIMEOUT_S)
        assert family.fork(lambda: len(stats_of(slots=(slot(0), slot(1))).slots)).result() == 2
    finally:
        may_end.set()
        thread.join()


def test_to_dict_is_json_and_complete() -> None:
    stats = stats_of(workers=(worker(0, counters={"hits": 1}),), slots=(slot(0, flags=1),))
    plain = json.loads(json.dumps(stats.to_dict()))
    assert {each.name for each in fields(PoolStats) if not each.name.startswith("_")} <= set(plain)
    assert plain["successes"] == 1
    assert plain["utilisation"] == 0
    assert (plain["dial_failure_rate"], plain["health_success_rate"]) == (0, 1)
    assert (plain["upstream"], plain["prewarm_done"]) == ("up", True)
    assert plain["workers"][0]["counters"]["hits"] == 1
    assert plain["workers"][0]["hit_rate"] == 1.0
    assert plain["slots"][0]["flags"] == ["private"]
    assert plain["get_latency"]["p999"] == 0
    assert not any(name.startswith("_") for name in plain)


# Connections by kind ------------------------------------------------------------------------------------------------

BY_KIND = [(10, 4, 2, 1), (5, 1, 0, 1), (3, 3, 3, 0), (0, 0, 0, 0), (7, 0, 0, 0)]


def test_connections_by_kind() -> None:
    stats = stats_of(kinds=BY_KIND, totals={"closed_idle": 12, "closed_broken": 3, "created": 25})
    assert stats.kinds["tcp4"] == ConnectionCounts(created=10, closed=6, current=4, idle=2, active=1)
    assert stats.counts() == ConnectionCounts(25, 17, 8, 5, 2)
    assert stats.counts("tcp") == ConnectionCounts(15, 10, 5, 2, 2)
    assert stats.counts("udp", 4) == stats.counts("udp") == ConnectionCounts(3, 0, 3, 3, 0)
    assert stats.counts(ip_version=6) == stats.kinds["tcp6"]
    assert stats.counts("unix").closed == 7
    for wrong in (("sctp", None), ("TCP", 4), ("tcp", 5), (None, "4")):
        with pytest.raises(ValueError, match="protocols are tcp, udp, unix"):
            stats.counts(*wrong)
    assert stats.counts(Protocol.TCP, IPVersion.V4) == stats.kinds["tcp4"]
    assert (stats.current, sum(stats.closed.values()), stats.closed[UNCOUNTED]) == (8, 17, 2)


def test_kinds_in_a_difference() -> None:
    earlier = stats_of(kinds=BY_KIND, totals={"closed_idle": 16, "closed_broken": 0, "created": 25})
    later = [(12, 3, 1, 1), *BY_KIND[1:]]
    totals = {"closed_idle": 20, "closed_broken": 0, "created": 27}
    change = stats_of(now=NOW + SECOND, kinds=later, totals=totals).diff(earlier)
    assert change.kinds["tcp4"] == ConnectionCounts(created=2, closed=3, current=3, idle=1, active=1)
    assert change.counts("tcp", 6) == ConnectionCounts(created=0, closed=0, current=1, idle=0, active=1)
    assert (change.created, change.closed["idle"], change.closed[UNCOUNTED]) == (2, 4, -1)  # one is counted by now
    assert sum(change.closed.values()) == change.counts().closed == 3


def test_what_became_of_connections() -> None:
    totals = {"lifetime_ns": 30 * SECOND, "closed_broken": 3, "closed_idle": 2, "dial_failures": 4, "created": 6}
    workers = (worker(0, counters={"hits": 20, "dials": 5}),)
    stats = stats_of(workers=workers, kinds=[(6, 1, 0, 0), *[(0, 0, 0, 0)] * 4], totals=totals)
    assert (stats.lifetime_average, stats.connection_errors, stats.reuses) == (6.0, 7, 20)


def test_who_waits() -> None:
    waiters = (waiter(0, 0, 0.5), {**waiter(1, 1, 2.0), "mask": 0b00101, "tid": 77})
    first, second = stats_of(workers=(worker(0), worker(1)), waiters=waiters).waiters
    assert (first.pid, first.thread, first.waited, first.wants) == (101, 77, 2.0, ("tcp4", "udp4"))
    assert (second.pid, second.waited, second.wants, second.state) == (100, 0.5, KINDS, "waiting")


# Differences --------------------------------------------------------------------------------------------------------


def test_diff_takes_off_counters_and_latencies_and_keeps_gauges() -> None:
    earlier = stats_of(
        now=NOW - 2 * SECOND,
        workers=(worker(0, counters={"hits": 10}, get_hist=[(64, 66, 10), (128, 130, 1)]),),
        totals={"created": 1, "closed_idle": 1},
        dial_hist=[(64, 66, 1)],
        upstream={**snapshot()["upstream"], "failures": 5},
    )
    later = stats_of(
        workers=(
            worker(0, counters={"hits": 25}, get_hist=[(64, 66, 10), (128, 130, 4)]),
            worker(1, counters={"hits": 5}, get_hist=[(128, 130, 1)]),
        ),
        slots=(slot(0, state="leased", owner=0),),
        totals={"created": 4, "closed_idle": 1},
        dial_hist=[(64, 66, 1), (640, 660, 3)],
        upstream={**snapshot()["upstream"], "state": "down", "error": "os|111|refused", "failures": 7},
    )
    change = later.diff(earlier)
    assert change.interval == 2.0
    assert (change.hits, change.created, change.closed["idle"]) == (20, 3, 0)
    assert change.per_second(change.successes) == 10
    assert [each.successes for each in change.workers] == [15, 5]
    assert change.get_latency == Latency.from_histogram([(128, 130, 4)])
    assert change.dial_latency == Latency.from_histogram([(640, 660, 3)])
    assert (change.in_use, change.slots) == (later.in_use, later.slots)
    assert (change.upstream, change.upstream_error, change.upstream_failures) == ("down", "refused", 2)
    assert change.max_connections == 4


def test_diff_with_itself_is_nothing() -> None:
    stats = stats_of(workers=(worker(0, counters={"hits": 10}, use_hist=[(64, 66, 10)]),))
    change = stats.diff(stats)
    assert (change.interval, change.gets, change.use_latency, change.per_second(change.gets)) == (0, 0, Latency(), 0)


def test_diff_refuses_what_would_be_negative() -> None:
    earlier, later = stats_of(now=NOW - SECOND), stats_of()
    with pytest.raises(ValueError, match=r"later\.diff\(earlier\)"):
        earlier.diff(later)
    for one, other in ((later.diff(earlier), earlier), (later, later.diff(earlier))):
        with pytest.raises(ValueError, match="a difference has none"):
            one.diff(other)


def test_diff_with_another_pool_of_the_name_takes_nothing_off() -> None:
    earlier = stats_of(created_at=1.4e9, workers=(worker(0, counters={"hits": 10}),))
    later = stats_of(workers=(worker(0, counters={"hits": 3}),))
    assert later.diff(earlier).hits == 3


# Of real pools ------------------------------------------------------------------------------------------------------


@pytest.fixture
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


def test_a_pool_of_this_process(url: str) -> None:
    before = time.time()
    with Pool(url, max_connections=3, min_connections=0) as pool:
        for _ in range(50):
            with pool.get():
                pass
        lease = pool.get()
        stats = pool.stats()
        assert (stats.name, stats.target, stats.state, stats.pid) == (pool.name, url, "open", os.getpid())
        assert before <= stats.created_at <= time.time()
        assert 0 < stats.interval <= time.time() - before + 0.1
        assert (stats.successes, stats.dials, stats.created, stats.in_use) == (51, 1, 1, 1)
        assert stats.dial_latency.count == 1
        assert 0 < stats.dial_latency.p50 < 5
        (mine,) = stats.workers
        assert (mine.pid, mine.alive, mine.held) == (os.getpid(), True, 1)
        (connection,) = stats.slots
        assert (connection.id, connection.holder, connection.uses) == (lease.id, os.getpid(), 51)
        assert url.endswith(connection.peer)
        lease.release()
        assert pool.stats().idle == 1
    assert pool.stats().state == "closed"
    assert pool.stats().closed["shutdown"] == 1


def test_the_dead_stay_in_the_sums(url: str) -> None:
    with Pool(url, max_connections=2, min_connections=0) as pool:
        ready, tell = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                for _ in range(20):
                    with pool.get():
                        pass
                held = pool.get()
                os.write(tell, b"x")
                signal.pause()
                held.release()
            finally:
                os._exit(1)
        assert os.read(ready, 1) == b"x"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)
        for lease in [pool.get(), pool.get()]:  # the second one is what the dead had
            lease.release()
        stats = pool.stats()
        assert stats.successes == 21 + 2
        assert (stats.recoveries, stats.recovered_leases) == (1, 1)
        assert {each.pid: each.alive for each in stats.workers} == {os.getpid(): True, pid: False}


def test_the_server_goes_and_comes_back(server: ExclusiveServer) -> None:
    settings: dict[str, Any] = {"min_connections": 0, "alive_bypass": 0, "dial_backoff": (0.2, 0.2)}
    with Pool(server.url, max_connections=1, **settings) as pool:
        assert pool.stats().upstream == "unproved"
        pool.get().release()
        assert pool.stats().upstream == "up"
        server.refuse()
        server.close_connections()
        with pytest.raises(DialError):
            pool.get()
        down = pool.stats()
        assert (down.upstream, down.upstream_failures, down.dial_failure_rate) == ("down", 1, 0.5)
        assert down.upstream_error == f"{server.host}: Connection refused"
        assert down.upstream_down_for < 5
        assert down.upstream_retry_in <= 0.2
        server.listen()
        until(lambda: pool.stats().upstream_retry_in == 0, "the next dial may begin")
        pool.get().release()
        back = pool.stats()
        assert (back.upstream, back.upstream_error, back.upstream_failures) == ("up", "", 1)
        assert back.diff(down).upstream_failures == 0


def test_a_pool_is_warm_before_it_is_used(server: ExclusiveServer) -> None:
    with Pool(server.url, max_connections=4, min_connections=3) as pool:
        until(lambda: pool.stats().prewarm_done, "prewarming")
        stats = pool.stats()
        assert (stats.prewarm_target, stats.prewarm_created, stats.prewarm_failed) == (3, 3, 0)
        assert (stats.idle, stats.created, stats.connections["empty"]) == (3, 3, 1)


def test_the_cap_is_that_of_the_moment(url: str) -> None:
    with Pool(url, max_connections=3, min_connections=0, resize_limit=5, maintenance_interval=math.inf) as pool:
        leases = [pool.get() for _ in range(3)]
        for cap, free in ((5, 2), (1, 0)):
            pool.resize(cap)
            stats = pool.stats()
            assert (stats.max_connections, stats.resize_limit) == (cap, 5)
            assert (stats.connections["empty"], stats.in_use, stats.utilisation) == (free, 3, 3 / cap)
        assert sorted(slot.flags for slot in stats.slots) == [(), ("ending",), ("ending",)]
        for lease in leases:
            lease.release()
        stats = pool.stats()
        assert (stats.closed["resized"], stats.idle, stats.connections["empty"]) == (2, 1, 0)


def test_calls_after_the_end_count(url: str) -> None:
    with Pool(url, max_connections=1, min_connections=0) as pool:
        pool.get().release()
    for call in (pool.get, pool.try_get):
        with pytest.raises(PoolClosed):
            call()
    stats = pool.stats()
    assert (stats.gets, stats.successes, stats.refused + stats.late_refusals) == (3, 1, 2)


@pytest.mark.parametrize("hold_s", [0.0, 0.001])
def test_samples_stand_for_as_many_leases_as_there_were(server: ExclusiveServer, hold_s: float) -> None:
    """Threads that come out of the cache, and out of the queue, which are timed one by one.

    Breaks when a call that does not come out of the cache after all is one of those that the next sample stands for.
    """

    def use() -> None:
        for _ in range(turns):
            with pool.get():
                if hold_s:
                    time.sleep(hold_s)  # sleep: the others wait meanwhile

    turns = 150 if hold_s else 3000
    with Pool(server.url, max_connections=2, min_connections=0) as pool:
        threads = [threading.Thread(target=use) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = pool.stats()
        assert stats.successes == 6 * turns
        assert (stats.waits > turns) or not hold_s
        for latency in (stats.get_latency, stats.use_latency):
            assert 0 <= stats.successes - latency.count < 16, "those that wait for the next sample"
        assert stats.use_latency.total <= 2 * stats.interval * 1.016


# A consistent cut ---------------------------------------------------------------------------------------------------

LOOKS, LOOKS_A_LIFE = 400, 20


def assert_balanced(stats: PoolStats) -> None:
    """What holds in every snapshot, at whatever moment it was taken."""
    assert sum(stats.connections.values()) == max(stats.max_connections, stats.open)
    assert stats.created == sum(stats.closed.values()) + stats.current
    assert stats.counts() == sum(stats.kinds.values(), ConnectionCounts())
    for counts in stats.kinds.values():
        assert counts.created == counts.closed + counts.current
        assert counts.idle + counts.active <= counts.current
    settled = stats.open - stats.connections["dialing"] - stats.connections["retiring"]
    assert settled <= stats.current <= stats.open, (stats.current, stats.connections)
    assert (stats.counts().idle, stats.counts().active) == (stats.idle, stats.in_use)
    assert stats.closed[UNCOUNTED] >= 0, stats.closed
    assert stats.dial_attempts >= stats.created + stats.dial_failures
    assert stats.gets == stats.successes + sum(getattr(stats, name) for name in FAILURES)
    assert stats.successes == sum(each.successes for each in stats.workers)
    assert stats.waiting == len(stats.waiters)


def assert_nothing_is_taken_back(earlier: PoolStats, later: PoolStats) -> None:
    for kind, counts in later.kinds.items():
        assert counts.created >= earlier.kinds[kind].created
        assert counts.closed >= earlier.kinds[kind].closed
    for reason in earlier.closed.keys() - {UNCOUNTED}:
        assert later.closed[reason] >= earlier.closed[reason]


def test_every_snapshot_balances_under_load_and_deaths(server: ExclusiveServer, family: Family) -> None:
    """Workers that lease, throw away, change kinds and are killed; snapshots all the while, from inside and outside.

    Breaks when a connection is counted apart from the step that makes it one, or ends it.
    """

    def churn() -> None:
        for turn in range(1_000_000):
            with contextlib.suppress(DialError):
                lease = pool.get(protocol="udp" if turn % 5 == 4 else "tcp")
                if turn % 3:
                    lease.release()
                else:
                    lease.discard()

    def dial(request: DialRequest) -> socket.socket:
        if request.protocol == "tcp":
            return socket.create_connection(server.address)
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.connect(server.address)
        return made

    settings: dict[str, Any] = {"max_connections": 3, "min_connections": 0, "get_timeout": 30}
    with Pool(dial=dial, **settings) as pool, shmpool.inspect(pool.name) as inspector:
        workers = [family.fork(churn) for _ in range(3)]
        last, kills = pool.stats(), 0
        for look in range(LOOKS):
            stats = (pool if look % 2 else inspector).stats()
            assert_balanced(stats)
            assert_nothing_is_taken_back(last, stats)
            last = stats
            if look % LOOKS_A_LIFE == 0:
                until(lambda before=last.created: pool.stats().created > before, "they are at work")
                workers.pop(0).kill()
                workers.append(family.fork(churn))
                kills += 1
        for each in workers:
            each.kill()
        kills += len(workers)
        pool.maintain()
        assert_balanced(pool.stats())
        assert pool.stats().created >= LOOKS // LOOKS_A_LIFE
        assert pool.stats().closed[UNCOUNTED] <= kills
        assert 0 <= pool.stats().dial_attempts - pool.stats().created - pool.stats().dial_failures <= kills
