"""A pool in one process: where a lease comes from, which kind it is, who waits how long, and how a pool ends.

Counters tell where a lease came from; a server that notices two clients on one connection tells whether it was the
only one. Not here: what a lease is (test_lease), what goes wrong around a pool (test_failures), several processes.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shmpool import (
    DialError,
    DialRequest,
    InvalidConfig,
    IPVersion,
    NoConnectionForIPVersion,
    NoConnectionForProtocol,
    Pool,
    PoolClosed,
    PoolConfig,
    PooledConnection,
    PoolExhausted,
    PoolTimeout,
    Protocol,
)
from tests.processes import Family, chance, descriptors, until, until_collected
from tests.servers import ExclusiveServer, Kind, ask, exclusive_use, has_ipv6

KINDS: dict[Kind, tuple[Protocol, IPVersion | None]] = {
    "tcp4": (Protocol.TCP, IPVersion.V4),
    "tcp6": (Protocol.TCP, IPVersion.V6),
    "udp4": (Protocol.UDP, IPVersion.V4),
    "udp6": (Protocol.UDP, IPVersion.V6),
    "unix": (Protocol.UNIX, None),
}
LATE_S = 2.0  # how much later than promised anything may come on a machine that is busy
needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no ::1")


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[Kind, ExclusiveServer]]:
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(ExclusiveServer(kind))
            for kind, (_, version) in KINDS.items()
            if version is not IPVersion.V6 or has_ipv6()
        }


@pytest.fixture
def server(servers: dict[Kind, ExclusiveServer]) -> ExclusiveServer:
    servers["tcp4"].close_connections()  # what a test that failed has left
    servers["tcp4"].reset_stats()
    return servers["tcp4"]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as executor:
        yield executor


def dial_any(servers: dict[Kind, ExclusiveServer]) -> Callable[[DialRequest], socket.socket]:
    """A dial that makes whichever kind is asked for; TCP over IPv4 when it may choose."""

    def dial(request: DialRequest) -> socket.socket:
        fitting = [
            kind
            for kind, (protocol, version) in KINDS.items()
            if request.protocol in (None, protocol) and request.ip_version in (None, version) and kind in servers
        ]
        return servers[fitting[0]].connect()

    return dial


def waiting(pool: Pool, count: int = 1) -> None:
    """Until so many threads stand in the queue."""
    until(lambda: pool.stats().waiting == count, f"{count} are waiting")


def sources(pool: Pool) -> dict[str, int]:
    stats = pool.stats()
    found = {name: getattr(stats, name) for name in ("hits", "freelist", "steals", "dials", "handovers")}
    return {name: count for name, count in found.items() if count}


def states(pool: Pool) -> dict[str, int]:
    return {state: count for state, count in pool.stats().connections.items() if count}


# Where a lease comes from ---------------------------------------------------------------------------------------------


def test_first_a_dial_then_the_cache(make: Callable[..., Pool]) -> None:
    pool = make(max_connections=4)
    ids = set()
    for _ in range(10):
        with pool.get() as conn:
            ids.add(conn.id)
    assert len(ids) == 1
    assert sources(pool) == {"dials": 1, "hits": 9}
    assert states(pool) == {"idle": 1, "empty": 3}


def test_the_last_used_is_leased_first(make: Callable[..., Pool]) -> None:
    pool = make(max_connections=3)
    leases = [pool.get() for _ in range(3)]
    ids = [conn.id for conn in leases]
    for conn in leases:
        conn.release()
    with pool.get() as conn:
        assert conn.id == ids[-1]


def test_without_a_cache_the_free_list_serves(make: Callable[..., Pool]) -> None:
    pool = make(local_cache_size=0)
    for _ in range(5):
        pool.get().release()
    assert sources(pool) == {"dials": 1, "freelist": 4}


def test_what_the_cache_has_no_place_for_goes_to_the_free_list(make: Callable[..., Pool]) -> None:
    pool = make(max_connections=4, local_cache_size=2)
    for round_number in range(3):
        leases = [pool.get() for _ in range(4)]
        assert len({conn.id for conn in leases}) == 4
        for conn in leases:
            conn.release()
        assert pool.stats().dials == 4, round_number
    assert sources(pool) == {"dials": 4, "hits": 4, "freelist": 4}


def test_an_idle_connection_is_stolen_before_one_is_dialled(make: Callable[..., Pool]) -> None:
    pool = make(max_connections=2)
    with Family() as family:
        used, done = family.latch(), family.latch()

        def use() -> None:
            pool.get().release()
            used.set()
            done.wait()

        child = family.fork(use)
        used.wait()
        pool.get().release()
        done.set()
        child.result()
    assert sources(pool) == {"dials": 1, "steals": 1}
    assert pool.stats().mailbox_reads == 1


def test_a_waiter_is_handed_what_is_returned(make: Callable[..., Pool], threads: ThreadPoolExecutor) -> None:
    pool = make()
    conn = pool.get()
    future = threads.submit(pool.get)
    waiting(pool)
    until(lambda: pool.stats().oldest_wait > 0.005, "it has waited for long enough to be served first")
    number = conn.id
    conn.release()
    handed = future.result(10)
    assert handed.id == number
    handed.release()
    stats = pool.stats()
    assert sources(pool) == {"dials": 1, "handovers": 1}
    assert (stats.waits, stats.waiting, stats.wait_latency.count) == (1, 0, 1)
    assert stats.wait_ns >= 5_000_000


def test_try_get_takes_the_idle_then_dials_then_refuses(make: Callable[..., Pool]) -> None:
    pool = make(max_connections=2)
    first, second = pool.try_get(), pool.try_get()
    with pytest.raises(PoolExhausted) as caught:
        pool.try_get()
    first.release()
    with pool.try_get():
        pass
    second.release()
    assert caught.value.limit == 2
    assert caught.value.counts["leased"] == 2
    assert caught.value.counts["empty"] == 0
    assert pool.stats().exhausted == 1
    assert pool.stats().waits == 0


def test_try_get_has_the_time_to_dial_whatever_get_may_wait(make: Callable[..., Pool]) -> None:
    with make(get_timeout=0).try_get() as conn:
        assert ask(conn.socket, "PING").startswith("PONG")


# How long -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.001, 0.05, 0.3])
def test_a_timeout_is_kept_and_says_what_it_knows(make: Callable[..., Pool], timeout: float) -> None:
    pool = make(max_connections=2)
    with pool.get(), pool.get():
        begun = time.monotonic()
        with pytest.raises(PoolTimeout) as caught:
            pool.get(timeout)
        took = time.monotonic() - begun
    error = caught.value
    assert timeout <= took < timeout + LATE_S
    assert timeout <= error.waited <= took
    assert error.timeout == timeout
    assert {state: count for state, count in error.counts.items() if count} == {"leased": 2}
    assert (error.protocol, error.ip_version, error.__cause__) == (None, None, None)
    assert "2 leased" in str(error)
    assert pool.stats().timeouts == 1
    assert pool.stats().waiting == 0


def test_the_timeout_of_the_pool_is_the_default(make: Callable[..., Pool]) -> None:
    pool = make(get_timeout=0.02)
    with pool.get():
        for call in (pool.get, pool.get_tcp, pool.get_ipv4):
            with pytest.raises(PoolTimeout) as caught:
                call()
            assert caught.value.timeout == pytest.approx(0.02)


@pytest.mark.parametrize("timeout", [math.inf, 1e12])
def test_waiting_for_ever_ends_with_a_release(
    make: Callable[..., Pool], threads: ThreadPoolExecutor, timeout: float
) -> None:
    pool = make()
    conn = pool.get()
    future = threads.submit(pool.get, timeout)
    waiting(pool)
    conn.release()
    future.result(10).release()


def test_the_wall_clock_does_not_matter(make: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make()
    with pool.get():
        monkeypatch.setattr(time, "time", lambda: 0.0)
        with pytest.raises(PoolTimeout):
            pool.get(0.01)


def test_unfit_connections_do_not_use_up_the_time(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    """Peers that do not answer the end of their connection are waited for, but not one after the other."""
    pool = make(max_connections=40, alive_bypass=0, idle_timeout=0.05, maintenance_interval=math.inf)
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(pool.get())
    server.pause()
    until(lambda: min(slot.since or 0 for slot in pool.stats().slots) > 0.06, "all are idle for too long")
    begun = time.monotonic()
    with pool.get(timeout=0.5) as conn:
        took = time.monotonic() - begun
        assert ask(conn.socket, "PING").startswith("PONG")
    assert took < 0.5
    server.resume()


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, -math.inf, "1", b"1", object(), [1], 1j])
def test_what_is_no_timeout(make: Callable[..., Pool], timeout: Any) -> None:
    pool = make()
    for call in (pool.get, pool.get_tcp, pool.get_ipv4):
        with pytest.raises((TypeError, ValueError)):
            call(timeout)
    assert pool.stats().gets == 0


@pytest.mark.parametrize(
    ("method", "args", "named"),
    [
        ("get", (1, "tcp", 4, 4), {}),
        ("get", (1,), {"timeout": 1}),
        ("get", (), {"time": 1}),
        ("get", (), {"protocol": "tcp", "ipversion": 4}),
        ("try_get", ("tcp", 4, 1), {}),
        ("try_get", (), {"timeout": 1}),
        ("get_tcp", (1, "tcp"), {}),
        ("get_ipv6", (), {"ip_version": 6}),
        ("get", (), {"ip_version": "4"}),
        ("get", (), {"ip_version": 4.0}),
    ],
)
def test_what_is_no_call(make: Callable[..., Pool], method: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        getattr(make(), method)(*args, **named)


# Which kind -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_target(servers: dict[Kind, ExclusiveServer], kind: Kind) -> None:
    if kind not in servers:
        pytest.skip("this host has no ::1")
    server, (protocol, version) = servers[kind], KINDS[kind]
    with Pool(server.url, max_connections=2, min_connections=0) as pool:
        for options in ({}, {"protocol": protocol}, {"protocol": protocol.value}, {"ip_version": version}):
            with pool.get(**options) as conn:
                assert (conn.protocol, conn.ip_version, conn.peer) == (protocol, version, server.address)
                assert isinstance(conn.socket, socket.socket)
                exclusive_use(conn.socket, "kinds:1")
        with pool.get() as first, pool.get() as second:
            assert first.id != second.id
            exclusive_use(first.socket, "kinds:2")
            exclusive_use(second.socket, "kinds:3")
    assert sum(sources(pool).values()) == 6


def test_a_name_with_addresses_of_both_versions(server: ExclusiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def both(_host: str, port: int, family: int = 0, *rest: Any, **named: Any) -> list[Any]:
        found = [entry for host in ("::1", "127.0.0.1") for entry in real(host, port, 0, *rest, **named)]
        return [entry for entry in found if family in (socket.AF_UNSPEC, entry[0])]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with Pool(f"tcp://both.invalid:{server.port}", max_connections=2, min_connections=0) as pool:
        with pool.get() as conn:  # only the IPv4 address answers
            assert conn.ip_version == 4
        with pool.get_ipv4() as conn:
            assert conn.reuse_count == 1
        with pytest.raises(DialError):
            pool.get_ipv6()
        assert states(pool) == {"idle": 1, "empty": 1}


@needs_ipv6
def test_a_choice_reaches_the_dial_and_the_cache(
    make: Callable[..., Pool], servers: dict[Kind, ExclusiveServer]
) -> None:
    pool = make(dial=dial_any(servers), max_connections=8)
    choices: list[tuple[Callable[[], PooledConnection], list[Kind]]] = [
        (lambda: pool.get(protocol="unix"), ["unix"]),
        (pool.get_udp, ["udp4", "udp6"]),
        (pool.get_ipv6, ["tcp6", "udp6"]),
        (pool.get_tcp, ["tcp4", "tcp6"]),
        (pool.get_ipv4, ["tcp4", "udp4"]),
        (lambda: pool.get(protocol=Protocol.UDP, ip_version=IPVersion.V6), ["udp6"]),
        (lambda: pool.try_get("tcp", 6), ["tcp6"]),
        (lambda: pool.get(None, "tcp", 4), ["tcp4"]),
    ]
    for _ in range(3):
        for take, wanted in choices:
            with take() as conn:
                assert (conn.protocol, conn.ip_version) in [KINDS[kind] for kind in wanted]
    stats = pool.stats()
    assert stats.dials <= 5, "what fits is used again"
    assert stats.closed["evicted"] == 0


def test_an_idle_connection_of_another_kind_makes_room(
    make: Callable[..., Pool], servers: dict[Kind, ExclusiveServer], server: ExclusiveServer
) -> None:
    pool = make(dial=dial_any(servers), max_connections=2)
    with pool.get_tcp(), pool.get_tcp():
        pass
    with pool.get_udp() as conn:
        assert conn.protocol == "udp"
        assert ask(conn.socket, "PING").startswith("PONG")
    assert pool.stats().closed["evicted"] == 1
    until(lambda: server.stats()["open"] == 1, "the evicted connection is closed")
    with pool.get_tcp(), pool.get_udp(), pytest.raises(PoolTimeout) as caught:
        pool.get(0.01, protocol="unix")
    assert caught.value.protocol == "unix"
    with pool.get_udp() as udp, pool.get_udp() as second:
        assert udp.id != second.id
    assert pool.stats().closed["evicted"] == 2


def test_a_waiter_for_another_kind_is_served_by_a_release(
    make: Callable[..., Pool], servers: dict[Kind, ExclusiveServer], threads: ThreadPoolExecutor
) -> None:
    pool = make(dial=dial_any(servers))
    conn = pool.get_tcp()
    future = threads.submit(pool.get_udp)
    waiting(pool)
    conn.release()
    with future.result(10) as conn:
        assert conn.protocol == "udp"


def test_a_release_serves_the_first_that_it_fits(
    make: Callable[..., Pool], servers: dict[Kind, ExclusiveServer], threads: ThreadPoolExecutor
) -> None:
    pool = make(dial=dial_any(servers), max_connections=2)
    tcp, udp = pool.get_tcp(), pool.get_udp()
    for_udp = threads.submit(pool.get_udp)
    waiting(pool, 1)
    for_tcp = threads.submit(pool.get_tcp)
    waiting(pool, 2)
    until(lambda: pool.stats().oldest_wait > 0.01, "both have waited for long")
    numbers = tcp.id, udp.id
    tcp.release()
    with for_tcp.result(10) as conn:
        assert conn.id == numbers[0]
        udp.release()
        with for_udp.result(10) as conn:
            assert conn.id == numbers[1]


def test_kinds_that_a_target_never_has(make: Callable[..., Pool], servers: dict[Kind, ExclusiveServer]) -> None:
    pool = make()
    with pytest.raises(NoConnectionForProtocol) as protocol_error:
        pool.get_udp()
    assert (protocol_error.value.protocol, protocol_error.value.available) == ("udp", ("tcp",))
    with pytest.raises(NoConnectionForIPVersion) as version_error:
        pool.get_ipv6()
    assert (version_error.value.ip_version, version_error.value.available) == (6, (4,))
    with pytest.raises(NoConnectionForProtocol):
        pool.try_get(protocol="sctp")
    with pytest.raises(NoConnectionForIPVersion):
        pool.try_get(ip_version=5)
    with Pool(servers["unix"].url, max_connections=1) as unix, pytest.raises(NoConnectionForIPVersion) as none:
        unix.get(ip_version=4)
    assert none.value.available == ()
    assert states(pool) == {"empty": 1}


def test_a_dial_that_brings_another_kind(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    pool = make(dial=lambda _request: server.connect())
    with pytest.raises(NoConnectionForProtocol) as protocol_error:
        pool.get_udp()
    assert (protocol_error.value.protocol, protocol_error.value.available) == ("udp", ("tcp",))
    with pytest.raises(NoConnectionForIPVersion) as version_error:
        pool.get_ipv6()
    assert (version_error.value.ip_version, version_error.value.available) == (6, (4,))
    assert states(pool) == {"empty": 1}
    until(lambda: server.stats()["open"] == 0, "what it brought is closed")


# Waiting, and what interrupts it --------------------------------------------------------------------------------------


class Rude(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[Callable[[float, Callable[[], object]], None]]:
    """Call something in a signal handler of the main thread, once, after so many seconds. (SIGALRM is the runner's.)"""
    before, timers = signal.getsignal(signal.SIGUSR1), []

    def arm(after_s: float, action: Callable[[], object]) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: action())
        main = threading.get_ident()
        timers.append(threading.Timer(after_s, lambda: signal.pthread_kill(main, signal.SIGUSR1)))
        timers[-1].start()

    yield arm
    for timer in timers:
        timer.cancel()
        timer.join()
    signal.signal(signal.SIGUSR1, before)


def raise_rude() -> None:
    raise Rude


def test_ctrl_c_ends_the_waiting(make: Callable[..., Pool], threads: ThreadPoolExecutor) -> None:
    pool = make()
    conn = pool.get()
    other = threads.submit(pool.get, 30)
    waiting(pool)

    def interrupt() -> None:
        waiting(pool, 2)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threads.submit(interrupt)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool.get(30)
    assert time.monotonic() - begun < LATE_S + 1
    killer.result(10)
    assert pool.stats().waiting == 1, "the other thread goes on waiting, nobody stands in our place"
    assert pool.stats().interrupted == 1
    conn.release()
    other.result(10).release()


def test_a_handler_that_raises_ends_the_waiting(
    make: Callable[..., Pool], alarm: Callable[[float, Callable[[], object]], None]
) -> None:
    pool = make()
    with pool.get():
        alarm(0.02, raise_rude)
        with pytest.raises(Rude):
            pool.get(30)
        assert pool.stats().waiting == 0
    pool.get().release()


def test_a_handler_that_returns_does_not_end_it(
    make: Callable[..., Pool], alarm: Callable[[float, Callable[[], object]], None]
) -> None:
    pool, calls = make(), []
    with pool.get():
        alarm(0.01, lambda: calls.append(1))
        with pytest.raises(PoolTimeout) as caught:
            pool.get(0.15)
    assert calls
    assert caught.value.waited >= 0.15


def test_a_handler_may_release_what_we_wait_for(
    make: Callable[..., Pool], alarm: Callable[[float, Callable[[], object]], None]
) -> None:
    pool = make()
    conn = pool.get()
    alarm(0.02, conn.release)
    pool.get(30).release()


def test_a_handler_may_wait_itself(
    make: Callable[..., Pool], alarm: Callable[[float, Callable[[], object]], None]
) -> None:
    pool, inner = make(), []

    def wait_inside() -> None:
        with pytest.raises(PoolTimeout) as caught:
            pool.get(0.03)
        inner.append((caught.value.waited, pool.stats().waiting))

    with pool.get():
        alarm(0.01, wait_inside)
        with pytest.raises(PoolTimeout):
            pool.get(0.1)
    assert inner[0][1] == 1, "ours is still there"
    assert pool.stats().waiting == 0


@pytest.mark.parametrize("child_uses_the_pool", [False, True])
def test_a_handler_that_forks(
    make: Callable[..., Pool],
    alarm: Callable[[float, Callable[[], object]], None],
    threads: ThreadPoolExecutor,
    child_uses_the_pool: bool,
) -> None:
    """The child comes back from the handler into our wait. It has no place there, and leaves ours alone."""
    pool = make()
    conn = pool.get()
    parent, children, still_waiting = os.getpid(), [], []

    def fork() -> None:
        pid = os.fork()
        if pid:
            children.append(pid)
            return
        if child_uses_the_pool:
            with pytest.raises(PoolExhausted):
                pool.try_get()
        alarm(0.05, raise_rude)

    def release_when_the_child_has_left() -> None:
        until(lambda: children, "the fork")
        code = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
        still_waiting.append((code, pool.stats().waiting))
        conn.release()

    releaser = threads.submit(release_when_the_child_has_left)
    alarm(0.02, fork)
    code = 1
    try:
        handed = pool.get(30)
    except Rude:
        code = 0
    finally:
        if os.getpid() != parent:
            os._exit(code)
    handed.release()
    releaser.result(10)
    assert still_waiting == [(0, 1)], "the child has freed our place in the queue"
    assert pool.stats().waiting == 0


def test_others_run_while_one_waits_and_while_one_dials(
    make: Callable[..., Pool], server: ExclusiveServer, threads: ThreadPoolExecutor
) -> None:
    dialling, go_on = threading.Event(), threading.Event()

    def dial(_request: DialRequest) -> socket.socket:
        if not dialling.is_set():
            dialling.set()
            assert go_on.wait(30)
        return server.connect()

    pool = make(dial=dial, max_connections=2)
    slow = threads.submit(pool.get)
    assert dialling.wait(10)
    with pool.get(1.0) as conn:
        waiter = threads.submit(pool.get, 30)
        waiting(pool)
        assert sum(range(1000)) == 499500  # this thread runs
        exclusive_use(conn.socket, "run:1")
    waiter.result(10).release()
    go_on.set()
    slow.result(10).release()


@pytest.mark.parametrize("hold_s", [0, 0.0005])
def test_more_threads_than_connections(
    make: Callable[..., Pool], server: ExclusiveServer, threads: ThreadPoolExecutor, hold_s: float
) -> None:
    pool = make(max_connections=4, get_timeout=30)

    def work(number: int) -> int:
        random, done = chance(), 0
        for turn in range(60):
            with pool.get() as conn:
                exclusive_use(conn.socket, f"{number}:{turn}", uses=1)
                if hold_s:
                    time.sleep(random.random() * hold_s)  # sleep: the work that is done with a connection
                done += 1
                if random.random() < 0.02:
                    conn.discard()
        return done

    assert [future.result(60) for future in [threads.submit(work, n) for n in range(32)]] == [60] * 32
    stats, seen = pool.stats(), server.stats()
    assert seen["violations"] == 0, seen["violation_log"]
    assert seen["max_open"] <= 4
    assert seen["begins"] == 32 * 60
    assert stats.successes == 32 * 60
    assert (stats.waiting, stats.in_use, stats.timeouts) == (0, 0, 0)
    assert stats.created - stats.closed["error"] == stats.idle


# The end --------------------------------------------------------------------------------------------------------------


def test_close_ends_idle_connections_and_refuses_more(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    pool = make(max_connections=3)
    with pool.get(), pool.get():
        pass
    segment = Path("/dev/shm", f"shmpool-{os.getuid()}-{pool.name}")
    assert segment.exists()
    assert pool.close() == 0
    assert pool.closed
    assert not segment.exists()
    until(lambda: server.stats()["open"] == 0, "the server sees the end of both")
    for call in (pool.get, pool.try_get, pool.get_tcp, pool.maintain, lambda: pool.get(protocol="tcp")):
        with pytest.raises(PoolClosed) as caught:
            call()
        assert caught.value.pool == pool.name
    assert states(pool) == {"empty": 3}
    assert pool.stats().state == "closed"
    assert "closed" in repr(pool)


def test_close_twice(make: Callable[..., Pool]) -> None:
    pool = make()
    conn = pool.get()
    assert pool.close() == 1
    assert pool.close() == 1
    conn.release()
    assert pool.close() == 0
    assert pool.close(timeout=1.0) == 0


def test_the_block_closes(make: Callable[..., Pool]) -> None:
    with make() as pool:
        pool.get().release()
    assert pool.closed
    with pytest.raises(ZeroDivisionError), make() as second:
        _ = 1 / 0
    assert second.closed


def test_close_of_a_pool_wakes_all_who_wait(make: Callable[..., Pool], threads: ThreadPoolExecutor) -> None:
    pool = make()
    with pool.get():
        futures = [threads.submit(pool.get, math.inf) for _ in range(20)]
        waiting(pool, 20)
        begun = time.monotonic()
        assert pool.close() == 1
        for future in futures:
            assert isinstance(future.exception(10), PoolClosed)
        assert time.monotonic() - begun < LATE_S
    assert pool.stats().waiting == 0
    assert pool.stats().refused == 20


def test_close_waits_for_leases(make: Callable[..., Pool], threads: ThreadPoolExecutor) -> None:
    pool = make(max_connections=2)
    first, second = pool.get(), pool.get()
    begun = time.monotonic()
    assert pool.close(timeout=0.05) == 2
    assert 0.05 <= time.monotonic() - begun < 0.05 + LATE_S
    assert ask(first.socket, "PING").startswith("PONG"), "leases stay with their holders"
    closing = threads.submit(pool.close, 30)
    first.release()
    second.discard()
    assert closing.result(10) == 0
    assert states(pool) == {"empty": 2}


def test_a_closed_pool_keeps_no_descriptor(make: Callable[..., Pool]) -> None:
    before = set(descriptors().items())
    pool = make(max_connections=4)
    conn, idle = pool.get(), pool.get()
    idle.release()
    pool.close()
    conn.release()
    assert {what for _, what in set(descriptors().items()) - before if what.startswith(("socket", "/dev/shm"))} == set()
    assert pool.closed  # the object can still be asked


def test_a_dial_during_which_the_pool_is_closed(
    make: Callable[..., Pool], server: ExclusiveServer, threads: ThreadPoolExecutor
) -> None:
    dialling, go_on = threading.Event(), threading.Event()

    def dial(_request: DialRequest) -> socket.socket:
        dialling.set()
        assert go_on.wait(30)
        return server.connect()

    pool = make(dial=dial)
    future = threads.submit(pool.get)
    assert dialling.wait(10)
    assert pool.close() == 1
    go_on.set()
    assert isinstance(future.exception(10), PoolClosed), "no lease of a closed pool"
    until(lambda: server.stats()["open"] == 0, "what was dialled is closed")
    assert states(pool) == {"empty": 1}


@pytest.mark.parametrize("by", ["get", "maintain", "the background"])
def test_a_dial_that_fails_in_a_closed_pool(make: Callable[..., Pool], threads: ThreadPoolExecutor, by: str) -> None:
    before = set(descriptors().items())
    dialling, go_on = threading.Event(), threading.Event()

    def dial(_request: DialRequest) -> socket.socket:
        dialling.set()
        assert go_on.wait(30)
        raise OSError("refused")

    def left() -> set[str]:
        return {what for _, what in set(descriptors().items()) - before if what.startswith(("socket", "/dev/shm"))}

    background = by == "the background"
    pool = make(dial=dial, min_connections=1, maintenance_interval=1.0 if background else math.inf)
    future: Future[Any] | None = None if background else threads.submit(getattr(pool, by))
    assert dialling.wait(10)
    pool.close()
    go_on.set()
    if future is None:
        until(lambda: not left(), "the last one out gives everything back")
    else:
        assert isinstance(future.exception(10), DialError | PoolClosed)
        assert left() == set(), "the last one out gives everything back"


def test_a_pool_that_is_dropped_goes_without_a_trace(server: ExclusiveServer) -> None:
    pool = Pool(server.url, max_connections=4, min_connections=0)
    pool.get().release()
    name, gone = pool.name, weakref.ref(pool)
    del pool
    gc.collect()
    until(lambda: gone() is None, "maintenance holds it only while it does something")
    until(lambda: not Path("/dev/shm", f"shmpool-{os.getuid()}-{name}").exists(), "its segment is removed")
    until(lambda: server.stats()["open"] == 0, "its connections are closed")


def test_a_pool_in_a_cycle_is_collected(server: ExclusiveServer) -> None:
    class Holder:
        def dial(self, _request: DialRequest) -> socket.socket:
            return server.connect()

        def hook(self, _conn: PooledConnection) -> None:
            pass

    holder = Holder()
    pool = Pool(dial=holder.dial, max_connections=2, on_borrow=holder.hook, on_return=holder.hook)
    holder.pool = pool  # type: ignore[attr-defined]
    with pool.get() as conn:
        conn.session = [holder, pool]
    gone = weakref.ref(pool)
    del holder, pool, conn
    until_collected(gone)
    until(lambda: server.stats()["open"] == 0, "its connections are closed")


@pytest.mark.parametrize("closed", [True, False])
def test_hundreds_of_pools_leave_nothing(server: ExclusiveServer, closed: bool) -> None:
    def live() -> None:
        pool = Pool(server.url, max_connections=4, min_connections=0, max_workers=4, max_waiters=4)
        with pool.get() as conn, pool.get():
            conn.session = object()
        if closed:
            pool.close()

    def held() -> tuple[int, int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(descriptors()), threading.active_count(), pages

    for _ in range(20):
        live()
    before = held()
    for _ in range(300):
        live()
    until(lambda: held()[:2] == before[:2], "descriptors and threads")
    assert held()[2] - before[2] < 500, "pages"


def test_threads_that_work_while_others_close(
    make: Callable[..., Pool], server: ExclusiveServer, threads: ThreadPoolExecutor
) -> None:
    random = chance()
    for turn in range(15):
        pool = make(max_connections=3, on_return=(lambda _conn: None) if turn % 2 else None)
        seed = random.random()

        def work(number: int, pool: Pool = pool, seed: float = seed) -> str:
            mine = chance()
            mine.seed(seed + number)
            try:
                while True:
                    with pool.get(timeout=30) as conn:
                        what = mine.choice(["use", "mode", "discard", "close", "maintain", "nothing"])
                        if what == "use":
                            exclusive_use(conn.socket, f"{number}:x")
                        elif what == "mode":
                            conn.socket.settimeout(1)
                        elif what == "discard":
                            conn.discard()
                        elif what == "close":
                            conn.socket.close()
                        elif what == "maintain":
                            pool.maintain()
            except PoolClosed:
                return "closed"

        workers = [threads.submit(work, number) for number in range(6)]
        until(lambda pool=pool: pool.stats().successes > 20, "they are at work")  # type: ignore[misc]
        closers = [threads.submit(pool.close, random.choice([0, 0.001])) for _ in range(3)]
        for closer in closers:
            closer.result(10)
        assert [worker.result(10) for worker in workers] == ["closed"] * 6
        assert states(pool) == {"empty": 3}
    assert server.stats()["violations"] == 0


# Hooks ----------------------------------------------------------------------------------------------------------------


def test_hooks_see_each_lease(make: Callable[..., Pool]) -> None:
    seen: list[tuple[str, int]] = []
    pool = make(
        on_borrow=lambda conn: seen.append(("borrow", conn.reuse_count)),
        on_return=lambda conn: seen.append(("return", conn.reuse_count)),
    )
    for _ in range(2):
        with pool.get():
            seen.append(("use", -1))
    assert seen == [("borrow", 0), ("use", -1), ("return", 0), ("borrow", 1), ("use", -1), ("return", 1)]


def test_a_borrow_hook_that_raises_refuses_the_connection(make: Callable[..., Pool]) -> None:
    def refuse(_conn: PooledConnection) -> None:
        raise Rude

    pool = make(on_borrow=refuse)
    for _ in range(3):
        with pytest.raises(Rude):
            pool.get()
    assert states(pool) == {"empty": 1}
    assert pool.stats().closed["refused"] == 3


def test_a_return_hook_that_raises_retires_the_connection(make: Callable[..., Pool]) -> None:
    def refuse(_conn: PooledConnection) -> None:
        raise Rude

    pool = make(on_return=refuse)
    conn = pool.get()
    with pytest.raises(Rude):
        conn.release()
    with pytest.raises(Rude), pool.get():
        pass
    assert states(pool) == {"empty": 1}
    assert pool.stats().closed["error"] == 2


@pytest.mark.parametrize("end", ["release", "discard"])
def test_a_return_hook_that_ends_the_lease_itself(make: Callable[..., Pool], end: str) -> None:
    calls = []

    def hook(conn: PooledConnection) -> None:
        calls.append(end)
        getattr(conn, end)()

    pool = make(on_return=hook)
    with pool.get():
        pass
    pool.get().release()
    assert calls == [end, end]
    assert states(pool) == {"idle" if end == "release" else "empty": 1}


@pytest.mark.parametrize("end", ["release", "discard"])
def test_a_borrow_hook_that_ends_the_lease_itself(make: Callable[..., Pool], end: str) -> None:
    """What get() returns then is a lease that is over; nothing else happens."""
    pool = make(on_borrow=lambda conn: getattr(conn, end)())
    conn = pool.get()
    with pytest.raises(Exception, match="not leased here any more"):
        _ = conn.socket
    assert states(pool) == {"idle" if end == "release" else "empty": 1}


def test_a_hook_that_gets_another_connection(make: Callable[..., Pool]) -> None:
    depth: list[int] = []

    def hook(_conn: PooledConnection) -> None:
        if len(depth) < 3:
            depth.append(pool.stats().in_use)
            with pool.get():
                pass

    pool = make(max_connections=4, on_borrow=hook)
    with pool.get():
        assert depth == [1, 2, 3]
    depth.clear()
    pool = make(max_connections=1, on_borrow=hook, get_timeout=0.02)
    with pytest.raises(PoolTimeout), pool.get(0.01):
        pass
    assert pool.stats().in_use == 0


def test_a_hook_that_closes_the_pool(make: Callable[..., Pool]) -> None:
    pool = make(on_return=lambda _conn: pool.close())
    with pool.get():
        pass
    assert states(pool) == {"empty": 1}


# Maintenance ----------------------------------------------------------------------------------------------------------


def test_maintain_opens_up_to_the_minimum(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    pool = make(max_connections=8, min_connections=5, maintenance_interval=math.inf)
    assert states(pool) == {"empty": 8}
    pool.maintain()
    pool.maintain()
    assert states(pool) == {"idle": 5, "empty": 3}
    until(lambda: server.stats()["accepted"] == 5, "the server has seen them all")
    with pool.get(), pool.get():
        pool.maintain()
    assert pool.stats().created == 5


def test_a_timeout_of_zero_dials_but_waits_for_nobody(make: Callable[..., Pool]) -> None:
    pool = make()
    with pool.get(timeout=0) as conn:
        assert ask(conn.socket, "PING").startswith("PONG")
        with pytest.raises(PoolTimeout) as caught:
            pool.get(timeout=0)
    assert (caught.value.timeout, caught.value.counts["leased"]) == (0, 1)


@pytest.mark.parametrize("interval", [math.inf, 1.0])
def test_maintain_says_when_the_server_is_away(make: Callable[..., Pool], deaf_port: int, interval: float) -> None:
    """Whoever dialled last: this call, the background, or nobody, because the next dial is not due yet."""
    pool = make(
        target=f"tcp://127.0.0.1:{deaf_port}", min_connections=1, dial_backoff=(30, 30), maintenance_interval=interval
    )
    for _ in range(3):
        with pytest.raises(DialError, match="refused"):
            pool.maintain()
    assert states(pool) == {"empty": 1}
    assert pool.stats().dial_attempts == 1


def test_maintain_expires_and_replaces(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    settings = {"max_lifetime": 0.05, "idle_timeout": 0.05, "maintenance_interval": math.inf}
    pool = make(max_connections=3, min_connections=1, **settings)
    with pool.get(), pool.get(), pool.get():
        pass
    until(lambda: min(slot.age or 0 for slot in pool.stats().slots) > 0.05, "all are too old")
    pool.maintain()
    stats = pool.stats()
    assert states(pool) == {"idle": 1, "empty": 2}
    assert stats.closed["lifetime"] + stats.closed["idle"] == 3
    until(lambda: server.stats()["open"] == 1, "the server sees their ends")


def test_maintain_expires_the_idle(make: Callable[..., Pool]) -> None:
    pool = make(max_connections=3, idle_timeout=0.05, maintenance_interval=math.inf)
    with pool.get(), pool.get():
        pass
    pool.maintain()
    assert states(pool) == {"idle": 2, "empty": 1}
    until(lambda: min(slot.since or 0 for slot in pool.stats().slots) > 0.07, "they are idle for too long")
    pool.maintain()
    assert states(pool) == {"empty": 3}
    assert pool.stats().closed["idle"] == 2


def test_maintain_leaves_what_is_leased(make: Callable[..., Pool]) -> None:
    pool = make(max_lifetime=0.02, idle_timeout=0.02)
    with pool.get() as conn:
        until(lambda: conn.age > 0.03, "it is too old")
        pool.maintain()
        assert ask(conn.socket, "PING").startswith("PONG")


def test_maintain_ends_though_a_hook_throws_everything_away(
    make: Callable[..., Pool], threads: ThreadPoolExecutor
) -> None:
    pool = make(max_connections=2, min_connections=2, on_return=lambda conn: conn.discard())
    done = threads.submit(pool.maintain)
    try:
        done.result(10)
    finally:
        pool.close()


def test_maintain_by_many_at_once(
    make: Callable[..., Pool], server: ExclusiveServer, threads: ThreadPoolExecutor
) -> None:
    pool = make(max_connections=4, min_connections=4)
    for done in [threads.submit(pool.maintain) for _ in range(16)]:
        done.result(30)
    until(lambda: states(pool) == {"idle": 4}, "the background has done its part as well")
    assert server.stats()["max_open"] <= 4


# Construction ---------------------------------------------------------------------------------------------------------


def test_a_config_excludes_settings(server: ExclusiveServer) -> None:
    config = PoolConfig(target=server.url, max_connections=1)
    with Pool(config=config) as pool:
        assert pool.config is config
    with pytest.raises(InvalidConfig, match="target"):
        Pool(server.url, config=config)
    with pytest.raises(InvalidConfig, match="max_connections"):
        Pool(config=config, max_connections=2)


def test_a_pool_that_was_never_made_does_no_harm() -> None:
    for call in ("get", "try_get", "stats", "maintain", "close"):
        with pytest.raises((RuntimeError, AttributeError)):
            getattr(Pool.__new__(Pool), call)()
    for _ in range(3):
        with pytest.raises(InvalidConfig):
            Pool("tcp://127.0.0.1:1", max_connections=0, name="/")
    assert Pool.__new__(Pool).closed
