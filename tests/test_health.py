"""Health checks: a check has its time and no more, however it hangs; first the checker alone, then over real pools."""

from __future__ import annotations

import gc
import math
import os
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shmpool import LeaseExpired, Pool, PooledConnection, PoolExhausted, PoolTimeout
from shmpool.health import GRACE_S, Checker, Outcome, Signal
from tests.processes import Family, chance, proven, states, until, use
from tests.servers import ExclusiveServer, ask, exclusive_use

CHECK_BEGIN = Pool._check_begin
SOON_S = 5.0  # generous: the ways to end a check take a grace each


def check_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shmpool-")]


@pytest.fixture(autouse=True)
def threads_come_home() -> Iterator[None]:
    yield
    gc.collect()
    until(lambda: not check_threads(), "every thread has ended", 5)


@pytest.fixture
def checker() -> Iterator[Checker]:
    checker = Checker()
    yield checker
    checker.stop()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def run(
    checker: Checker, check: Callable[[Any], object], sock: Any = None, timeout: float = 0.05
) -> tuple[Outcome, float]:
    def cut(sock: Any) -> None:
        if sock is not None:
            sock.shutdown(socket.SHUT_RDWR)

    begun = time.monotonic()
    outcome = checker.run(check, sock, timeout, cut)
    return outcome, time.monotonic() - begun


def test_a_signal_is_seen_once_and_may_be_set_before_it_is_waited_for() -> None:
    signal = Signal()
    assert not signal.wait(0)
    signal.set()
    signal.set()
    assert signal.wait(0)
    assert not signal.wait(0)
    threading.Timer(0.01, signal.set).start()
    assert signal.wait(10)


def test_checks_share_one_thread(checker: Checker) -> None:
    seen: set[str] = set()

    def check(_: object) -> bool:
        seen.add(threading.current_thread().name)
        return True

    assert check_threads() == [], "no thread before there is a check"
    for _ in range(5):
        assert checker.ready("p")
        assert run(checker, check)[0] == Outcome(True)
    assert seen == {"shmpool-check:p"}
    thread = checker.stop()
    assert thread is not None
    assert not thread.is_alive()
    assert checker.ready("p"), "stop() is not for good"


@pytest.mark.parametrize("answer", [False, None, 0, ""])
def test_a_falsy_answer_fails(checker: Checker, answer: object) -> None:
    assert checker.ready("p")
    assert run(checker, lambda _: answer)[0] == Outcome(False, "it said no")


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(1), KeyboardInterrupt()])
def test_a_check_that_raises_fails(checker: Checker, error: BaseException) -> None:
    def check(_: object) -> bool:
        raise error

    assert checker.ready("p")
    outcome, _ = run(checker, check)
    assert (outcome.healthy, outcome.error, outcome.broken) == (False, error, True)
    assert checker.ready("p")
    assert run(checker, lambda _: True)[0].healthy


def test_an_answer_that_cannot_be_asked_fails(checker: Checker) -> None:
    class Odd:
        def __bool__(self) -> bool:
            raise ValueError("neither")

    assert checker.ready("p")
    assert isinstance(run(checker, lambda _: Odd())[0].error, ValueError)


def test_a_check_that_hangs_in_recv_ends_with_its_socket(checker: Checker, pair: Any) -> None:
    assert checker.ready("p")
    outcome, took = run(checker, lambda sock: sock.recv(1) == b"", pair[0])
    assert outcome == Outcome(False, "it was not done in 0.05 s", None, True)
    assert 0.05 <= took < SOON_S
    assert check_threads() == ["shmpool-check:p"], "that thread is as good as before"
    assert run(checker, lambda _: True)[0].healthy


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_check_that_loops_in_python_is_ended(checker: Checker, stubborn: bool) -> None:
    turns = [0]

    def check(_: object) -> bool:
        while True:
            len(turns)  # CPython 3.10 never switches threads in a loop that begins with `try` and calls nothing
            try:
                turns[0] += 1
            except Exception:
                if not stubborn:
                    raise

    assert checker.ready("p")
    outcome, took = run(checker, check)
    assert not outcome.healthy
    assert took < SOON_S
    until(lambda: not check_threads(), "the thread has ended", SOON_S)
    assert checker.ready("p")
    assert run(checker, lambda _: True)[0].healthy


def test_a_check_that_goes_on_is_left_behind(checker: Checker, caplog: Any) -> None:
    release = threading.Event()
    assert checker.ready("p")
    outcome, took = run(checker, lambda _: release.wait(20))
    assert not outcome.healthy
    assert 2 * GRACE_S <= took < SOON_S
    assert caplog.text.count("left behind") == 1
    for _ in range(3):
        assert not checker.ready("p"), "no check begins until it ends"
    release.set()
    until(lambda: checker.ready("p"), "it has ended", SOON_S)
    assert run(checker, lambda _: True)[0].healthy
    assert caplog.text.count("left behind") == 1


def test_interrupt_fails_the_check_at_once(checker: Checker, pair: Any) -> None:
    checking = threading.Event()

    def check(sock: socket.socket) -> bool:
        checking.set()
        return bool(sock.recv(1))

    def interrupt() -> None:
        assert checking.wait(10)
        checker.interrupt()

    assert checker.ready("p")
    threading.Thread(target=interrupt).start()
    outcome, took = run(checker, check, pair[0], timeout=60)
    assert outcome == Outcome(False, "it was interrupted")
    assert took < SOON_S
    checker.interrupt()
    assert run(checker, lambda _: True)[0].healthy, "without a check, nothing is interrupted"


def test_what_interrupts_the_caller_ends_the_check(checker: Checker, pair: Any, monkeypatch: Any) -> None:
    """A signal handler that raises, in the thread that called maintain()."""
    waits = [0]
    wait = Signal.wait

    def interrupted(signal: Signal, timeout: float) -> bool:
        waits[0] += 1
        if waits[0] == 1:
            raise KeyboardInterrupt
        return wait(signal, timeout)

    assert checker.ready("p")
    with monkeypatch.context() as patch:
        patch.setattr(Signal, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(checker, lambda sock: sock.recv(1), pair[0], timeout=60)
    assert checker.ready("p")
    assert run(checker, lambda _: True)[0].healthy


def test_a_cut_that_raises_leaves_no_check_behind(checker: Checker) -> None:
    def cut(_: object) -> None:
        raise ValueError("odd")

    def loop(_: object) -> None:
        while True:
            continue

    assert checker.ready("p")
    with pytest.raises(ValueError, match="odd"):
        checker.run(loop, None, 0.02, cut)  # type: ignore[arg-type]
    until(lambda: not check_threads(), "the thread has ended", SOON_S)
    assert checker.ready("p")


def test_a_check_that_ends_just_when_it_is_ended(checker: Checker, monkeypatch: Any) -> None:
    """The exception that ends a loop may come when the check has just ended: no job is lost, no thread is left."""
    monkeypatch.setattr("shmpool.health.GRACE_S", 0.003)
    random = chance()
    for _ in range(200):
        end = time.monotonic() + 0.004 + random.uniform(-0.0005, 0.001)

        def check(_: object, end: float = end) -> bool:
            while time.monotonic() < end:
                continue
            return True

        until(lambda: checker.ready("p"), "what was left behind has ended", SOON_S)
        run(checker, check, timeout=0.001)
        until(lambda: checker.ready("p"), "what was left behind has ended", SOON_S)
        assert run(checker, lambda _: True, timeout=20)[0].healthy


def test_nothing_is_kept_of_a_check(checker: Checker) -> None:
    class Conn:
        pass

    conn = Conn()
    gone = weakref.ref(conn)
    assert checker.ready("p")
    checker.run(lambda _: True, conn, 10, lambda _: None)  # type: ignore[arg-type]
    del conn
    until(lambda: gone() is None, "the connection is nobody's", SOON_S)


# ---- real pools ------------------------------------------------------------------------------------------------------

FAST: dict[str, Any] = {"health_check_interval": 0.03, "health_check_timeout": 0.02, "maintenance_interval": 0.01}
FAIR: dict[str, Any] = {**FAST, "health_check_interval": 0.21, "health_check_timeout": 0.2}  # for checks that succeed


def figures(pool: Pool) -> tuple[int, int]:
    """(checks, those that failed)"""
    totals = pool._snapshot()["totals"]
    return totals["health_checks"], totals["health_failures"]


def ended(pool: Pool) -> dict[str, int]:
    """How many connections ended, by reason."""
    return {name[7:]: n for name, n in pool._snapshot()["totals"].items() if name.startswith("closed_") and n}


def held(pool: Pool) -> dict[str, int]:
    return {state: count for state, count in states(pool).items() if state != "empty"}


def test_idle_connections_are_checked_and_stay(server: ExclusiveServer) -> None:
    seen: Counter[int] = Counter()
    names: set[str] = set()

    def check(conn: PooledConnection) -> bool:
        seen[conn.id] += 1
        names.add(threading.current_thread().name)
        return exclusive_use(conn.socket, "check:1") > 0

    with proven(server, 3, min_connections=3, health_check=check, **FAIR) as pool:
        pool.wait_ready()
        with pool.get() as leased:
            assert ask(leased.socket, "BEGIN holder:1").startswith("OK"), "a check would be a violation"
            others = {1, 2, 3} - {leased.id}
            before = seen[leased.id]
            until(lambda: all(seen[other] >= 2 for other in others), "checks of the idle ones")
            assert seen[leased.id] == before
            assert ask(leased.socket, "END holder:1") == "OK"
        assert names == {f"shmpool-check:{pool.name}"}
        checks, failures = figures(pool)
        assert checks >= sum(seen.values())
        assert (failures, ended(pool)) == (0, {})
        assert server.stats()["accepted"] == 3


@pytest.mark.parametrize("way", ["says no", "raises", "closes the socket", "discards"])
def test_a_connection_that_fails_its_check_is_replaced(server: ExclusiveServer, way: str) -> None:
    def check(conn: PooledConnection) -> bool:
        if conn.id > 2:
            return True
        if way == "raises":
            raise ValueError(way)
        if way == "closes the socket":
            conn.socket.close()
            return True
        if way == "discards":
            conn.discard()
        return False

    with proven(server, 2, min_connections=2, health_check=check, **FAIR) as pool:
        pool.wait_ready()
        until(lambda: server.stats()["accepted"] == 4 and held(pool) == {"idle": 2}, "both are replaced")
        assert sum(ended(pool).values()) == 2
        assert "leaked" not in ended(pool)
        assert figures(pool)[1] == 2


@pytest.mark.parametrize("way", ["recv", "a loop", "a lock"])
def test_a_check_that_hangs(server: ExclusiveServer, way: str) -> None:
    """Its connection ends, other duties and every get() go on."""
    release = threading.Event()
    hung: list[int] = []

    def check(conn: PooledConnection) -> bool:
        if conn.id > 1:
            return True
        hung.append(conn.id)
        if way == "recv":
            conn.socket.settimeout(None)
            return bool(conn.socket.recv(1))
        while way == "a loop":
            continue
        return release.wait(20)

    with proven(server, 2, min_connections=1, health_check=check, **FAST) as pool:
        pool.wait_ready()
        until(lambda: hung, "the check")
        begun = time.monotonic()
        assert use(pool) == 2
        until(lambda: ended(pool) == {"unhealthy": 1}, "its connection has ended", SOON_S)
        until(lambda: server.stats()["open"] == 1, "also at the server", SOON_S)
        print(f"{way}: ended after {time.monotonic() - begun:.2f} s")
        assert hung == [1]
        checks, _ = figures(pool)
        if way != "a lock":
            until(lambda: figures(pool)[0] > checks, "checks go on", SOON_S)
        else:
            with pool.get():
                pass
            next_tick = pool._maintenance._next_tick
            until(lambda: pool._maintenance._next_tick > next_tick, "a tick")
            assert figures(pool)[0] == checks
            release.set()
            until(lambda: figures(pool)[0] > checks, "checks go on when it has ended", SOON_S)


def test_nobody_gets_a_connection_that_is_being_checked(server: ExclusiveServer) -> None:
    checking, go = threading.Event(), threading.Event()

    def check(_: PooledConnection) -> bool:
        checking.set()
        return go.wait(10)

    settings = {**FAST, "health_check_interval": 20, "health_check_timeout": 10}
    with proven(server, 1, health_check=check, **settings) as pool:
        use(pool)
        pool._config = pool.config.replace(health_check_interval=10.5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pool, "_check_begin", lambda pool, _, private: CHECK_BEGIN(pool, 0.0, private))
            assert checking.wait(10)
        with pytest.raises(PoolExhausted):
            pool.try_get()
        with pytest.raises(PoolTimeout):
            pool.get(timeout=0.05)
        assert held(pool) == {"checking": 1}
        waiter = threading.Thread(target=use, args=(pool,))
        waiter.start()
        until(lambda: pool._snapshot()["waiters"], "the waiter")
        go.set()
        waiter.join()
        assert server.stats()["accepted"] == 1, "it was the same connection"


def test_what_a_check_changes_is_put_back(server: ExclusiveServer) -> None:
    def check(conn: PooledConnection) -> bool:
        conn.socket.settimeout(0.001)
        conn.socket.setblocking(False)
        return True

    with proven(server, 1, min_connections=1, health_check=check, **FAIR) as pool:
        until(lambda: figures(pool)[0] >= 2, "two checks")
        with pool.get() as lease:
            assert lease.socket.gettimeout() == pool.config.socket_timeout
            assert os.get_blocking(lease.socket.fileno()) is False, "a timeout is O_NONBLOCK and poll()"


def test_what_a_check_leaves_unread_reaches_nobody(server: ExclusiveServer) -> None:
    def check(conn: PooledConnection) -> bool:
        if conn.id == 1:
            conn.socket.sendall(b"PING\n")
            conn.socket.recv(1, socket.MSG_PEEK)
        return True

    with proven(server, 1, health_check=check, alive_bypass=1000, **FAIR) as pool:
        use(pool)
        until(lambda: figures(pool)[0] >= 1 and "checking" not in states(pool), "a check")
        assert use(pool) == 2
        assert ended(pool) in ({"dirty": 1}, {"unhealthy": 1})


def test_a_connection_that_was_checked_expires_for_who_keeps_it(server: ExclusiveServer) -> None:
    kept: list[PooledConnection] = []

    def check(conn: PooledConnection) -> bool:
        kept.append(conn)
        return True

    with proven(server, 1, min_connections=1, health_check=check, **FAIR):
        until(lambda: len(kept) > 2, "checks")
        with pytest.raises(LeaseExpired):
            kept[0].socket  # noqa: B018
        with pytest.raises(LeaseExpired):
            kept[0].release()
        kept.clear()


def test_without_a_check_there_is_no_check_thread(server: ExclusiveServer) -> None:
    with proven(server, 2, min_connections=2, health_check_interval=0.01, maintenance_interval=0.01) as pool:
        until(lambda: figures(pool)[0] > 5, "looks at idle connections")
        assert check_threads() == [f"shmpool-maintenance:{pool.name}"]
        assert figures(pool)[1] == 0


@pytest.mark.parametrize("how", ["close", "leave"])
def test_the_end_of_a_pool_does_not_wait_for_a_check(server: ExclusiveServer, how: str) -> None:
    checking = threading.Event()

    def check(conn: PooledConnection) -> bool:
        checking.set()
        conn.socket.settimeout(None)
        return bool(conn.socket.recv(1))

    settings = {**FAST, "health_check_interval": 30.1, "health_check_timeout": 30}
    pool = Pool(server.url, max_connections=1, min_connections=1, health_check=check, **settings)
    pool.wait_ready()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "_check_begin", lambda pool, _, private: CHECK_BEGIN(pool, 0.0, private))
        assert checking.wait(10)
    begun = time.monotonic()
    getattr(pool, how)()
    assert time.monotonic() - begun < SOON_S
    assert check_threads() == []
    until(lambda: server.stats()["open"] == 0, "the connection is closed")


def test_checks_by_hand(server: ExclusiveServer) -> None:
    names: list[str] = []

    def check(_: PooledConnection) -> bool:
        names.append(threading.current_thread().name)
        return True

    settings = {**FAIR, "maintenance_interval": math.inf}
    with proven(server, 2, min_connections=2, health_check=check, **settings) as pool:
        pool.maintain()
        until(lambda: pool.maintain() or len(names) >= 2, "both are due")
        assert set(names) == {f"shmpool-check:{pool.name}"}
        assert check_threads() == [], "its thread ends with the call"


def test_the_elected_process_checks_what_others_opened(server: ExclusiveServer, family: Family) -> None:
    checked: Counter[int] = Counter()

    def check(conn: PooledConnection) -> bool:
        checked[conn.id] += 1
        return exclusive_use(conn.socket, f"check:{os.getpid()}") > 0

    def open_one() -> int:
        before = sum(checked.values())
        with pool.get(), pool.get():
            pass
        opened.set()
        end.wait()
        return sum(checked.values()) - before

    opened, end = family.latch(), family.latch()
    with proven(server, 2, health_check=check, **FAIR) as pool:
        until(lambda: pool._maintenance._elected, "this process is elected")
        child = family.fork(open_one)
        opened.wait()
        until(lambda: checked[1] >= 2 and checked[2] >= 2, "checks of both")
        end.set()
        assert child.result() == 0


def test_a_check_that_calls_maintain_does_not_wait_for_itself(server: ExclusiveServer) -> None:
    done: list[int] = []

    def check(conn: PooledConnection) -> bool:
        pool.maintain()
        done.append(conn.id)
        return True

    with proven(server, 2, min_connections=2, health_check=check, **FAIR) as pool:
        until(lambda: done, "a check")
        assert figures(pool)[1] == 0


def test_private_connections_are_checked_by_their_own_process(
    server: ExclusiveServer, family: Family, monkeypatch: Any
) -> None:
    """As TLS connections are: their state is in the memory of one process."""
    monkeypatch.setattr("shmpool.pool.is_private", lambda _: True)
    checked: Counter[int] = Counter()

    def check(conn: PooledConnection) -> bool:
        checked[conn.id] += 1
        return True

    def open_one() -> int:
        before = checked[1]
        with pool.get():
            pass
        until(lambda: checked[2] >= 2, "checks in the process that has it")
        return checked[1] - before

    with proven(server, 2, health_check=check, **FAIR) as pool:
        with pool.get():
            pass
        until(lambda: pool._maintenance._elected and checked[1] >= 2, "this process checks its own")
        assert family.fork(open_one).result() == 0
        assert checked[2] == 0
