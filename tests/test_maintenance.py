"""The maintenance thread: its life, its duties, forks; first against a pool that only notes what is asked of it, then
over real pools and processes."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmpool import DialError, LeaseExpired, Pool, PoolClosed, PoolConfig, PooledConnection, PoolTimeout
from shmpool.dialing import dial_target
from shmpool.maintenance import FORK_PATIENCE_S, Maintenance, maintain_now
from tests.processes import LONG, Child, Counters, Family, Latch, Way, descriptors, proven, states, until, use
from tests.servers import ExclusiveServer, ask, exclusive_use

DUTIES = ["_close_stale", "_look_over", "_overdue", "_maintainer", "_recover", "_expire", "_look_over", "_overdue"]


class FakePool:
    """Answers what maintenance asks of a pool, and notes it. `does[name]` runs in place of an answer."""

    def __init__(self, **settings: Any) -> None:
        defaults = {"maintenance_interval": 0.01, "min_connections": 0, "dial_backoff": (0.001, 0.01)}
        self.config = PoolConfig.from_dict({"target": "tcp://127.0.0.1:1", **defaults, **settings})
        self.name = "fake"
        self.closed = False
        self.connections = 0
        self.asked: list[str] = []
        self.threads: set[str] = set()
        self.does: dict[str, Callable[..., Any]] = {}
        self.prewarm = [0, 0, False]
        self._maintenance = Maintenance()

    def start(self) -> FakePool:
        self._maintenance.start(self)
        return self

    def _answer(self, name: str, otherwise: Any, *args: object) -> Any:
        self.asked.append(name)
        self.threads.add(threading.current_thread().name)
        return self.does[name](*args) if name in self.does else otherwise

    def _maintainer(self) -> bool:
        return bool(self._answer("_maintainer", True))

    def _resign(self) -> None:
        self._answer("_resign", None)

    def _recover(self) -> int:
        return int(self._answer("_recover", 0))

    def _close_stale(self) -> int:
        return int(self._answer("_close_stale", 0))

    def _expire(self, minimum: int) -> int:
        return int(self._answer("_expire", 0, minimum))

    def _open(self, mask: int) -> bool:
        opened = self._answer("_open", True, mask)
        self.connections += bool(opened)
        return bool(opened)

    def _open_connections(self) -> int:
        return self.connections

    def _is_short(self) -> bool:
        return self.connections < self.config.effective_min_connections

    def _whole_mask(self) -> int:
        return 1

    def _upstream(self) -> tuple[str, float, str, int]:
        answer: tuple[str, float, str, int] = self._answer("_upstream", ("up", 0.0, "", 0))
        return answer

    def _interrupt_dials(self) -> None:
        self._answer("_interrupt_dials", None)

    def _prewarm_note(self, created: int, failed: int, done: bool) -> None:
        self.prewarm = [self.prewarm[0] + created, self.prewarm[1] + failed, self.prewarm[2] or done]

    def _prewarm_is_done(self) -> bool:
        return bool(self.prewarm[2])

    def _look_over(self, interval: float, only_private: bool) -> int:
        return int(self._answer("_look_over", 0, interval, only_private))

    def _check_begin(self, interval: float, only_private: bool) -> PooledConnection | None:
        conn: PooledConnection | None = self._answer("_check_begin", None, interval, only_private)
        return conn

    def _check_end(self, conn: PooledConnection, healthy: bool) -> bool:
        return bool(self._answer("_check_end", True, conn, healthy))

    def _check_cut(self, conn: PooledConnection) -> None:
        self._answer("_check_cut", None, conn)

    def _overdue(self, age: float, only_own: bool) -> list[tuple[int, int, int, int, float]]:
        found: list[tuple[int, int, int, int, float]] = self._answer("_overdue", [], age, only_own)
        return found

    def _report_leak(self, slot: int, word: int) -> bool:
        return bool(self._answer("_report_leak", True, slot, word))

    def _note_frame(self, slot: int, connection: int, text: str) -> None:
        self._answer("_note_frame", None, slot, connection, text)

    def _revoke(self, slot: int, word: int) -> bool:
        return bool(self._answer("_revoke", True, slot, word))

    def _ended_elsewhere(self) -> bool:
        return bool(self._answer("_ended_elsewhere", False))

    def _finish(self) -> bool:
        return bool(self._answer("_finish", True))


def threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("shmpool-"))


def ended() -> bool:
    gc.collect()
    return not threads()


def ticks(pool: FakePool) -> int:
    return pool.asked.count("_close_stale")


def wait_ticks(pool: FakePool, more: int = 2) -> None:
    wanted = ticks(pool) + more
    until(lambda: ticks(pool) >= wanted, f"{more} ticks more")


@pytest.fixture(autouse=True)
def threads_come_home() -> Iterator[None]:
    yield
    gc.collect()
    until(lambda: not threads(), "every maintenance thread has ended", 5)


@pytest.fixture
def fake() -> Iterator[Callable[..., FakePool]]:
    made: list[FakePool] = []

    def make(**settings: Any) -> FakePool:
        made.append(FakePool(**settings))
        return made[-1]

    yield make
    for pool in made:
        pool._maintenance.stop()


# ---- the thread's life -----------------------------------------------------------------------------------------------


def test_one_daemon_thread_ticks(fake: Callable[..., FakePool]) -> None:
    pool = fake().start()
    for _ in range(10):
        pool.start()
    assert threads() == ["shmpool-maintenance:fake"]
    assert all(thread.daemon for thread in threading.enumerate() if thread.name in threads())
    wait_ticks(pool)
    assert pool.asked[: len(DUTIES)] == DUTIES
    assert pool.threads == {"shmpool-maintenance:fake"}
    assert pool._maintenance.stop()
    assert threads() == []
    pool.start()
    assert threads() == [], "stop() is for good"


def test_the_first_tick_comes_at_once_and_kick_brings_the_next(fake: Callable[..., FakePool]) -> None:
    pool = fake(maintenance_interval=1000).start()
    until(lambda: ticks(pool) == 1, "the first tick")
    pool._maintenance.kick()
    until(lambda: ticks(pool) == 2, "the second tick")


def test_no_thread_with_an_endless_interval(fake: Callable[..., FakePool]) -> None:
    pool = fake(maintenance_interval=math.inf, min_connections=2).start()
    assert threads() == []
    maintain_now(pool)
    assert pool.connections == 2
    assert pool.prewarm == [2, 0, True]
    assert set(DUTIES) - {"_maintainer"} <= set(pool.asked)


def test_a_dropped_pool_ends_its_thread() -> None:
    def use() -> None:
        pool = FakePool(maintenance_interval=1000).start()
        until(lambda: ticks(pool) == 1, "the first tick")
        assert threads()

    use()
    gc.collect()
    until(lambda: not threads(), "the thread has ended", 1)


def test_stop_in_the_thread_itself_ends_it_after_the_duty(fake: Callable[..., FakePool]) -> None:
    pool = fake()
    pool.does["_recover"] = lambda: stopped.append(pool._maintenance.stop()) or 0
    stopped: list[bool] = []
    pool.start()
    until(lambda: not threads(), "the thread has ended", 1)
    assert stopped == [False]
    assert pool.asked.count("_expire") == 0


def test_stop_interrupts_a_dial(fake: Callable[..., FakePool]) -> None:
    pool = fake(min_connections=1)
    dialling, interrupted = threading.Event(), threading.Event()

    def dial(_mask: int) -> bool:
        dialling.set()
        assert interrupted.wait(10)
        raise DialError

    pool.does["_open"] = dial
    pool.does["_interrupt_dials"] = interrupted.set
    pool.start()
    assert dialling.wait(10)
    begun = time.monotonic()
    assert pool._maintenance.stop()
    assert time.monotonic() - begun < 2
    assert pool.prewarm == [0, 0, False], "an interrupted dial says nothing about the server"
    assert pool.asked[-1] == "_resign"


def test_stop_gives_a_hook_up_that_does_not_end(fake: Callable[..., FakePool], caplog: Any) -> None:
    pool = fake()
    release, hooked = threading.Event(), threading.Event()
    pool.does["_recover"] = lambda: hooked.set() or int(release.wait(10))
    pool.start()
    assert hooked.wait(10)
    assert not pool._maintenance.stop(timeout=0.05)
    assert "still runs a hook" in caplog.text
    release.set()
    until(lambda: not threads(), "it ends when the hook does", 1)


def test_a_thread_that_cannot_start_is_said_once(fake: Callable[..., FakePool], caplog: Any, monkeypatch: Any) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = fake()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        pool.start()
        pool.start()
    assert caplog.text.count("has no maintenance thread") == 1
    assert threads() == []
    wait_ticks(pool.start())


def test_a_pool_that_another_closed_is_given_back(fake: Callable[..., FakePool]) -> None:
    pool = fake()
    given = [False]
    pool.does["_ended_elsewhere"] = lambda: pool.closed and not given[0]
    pool.does["_finish"] = lambda: given[0]
    pool.start()
    wait_ticks(pool)
    pool.closed = True
    wait_ticks(pool, 3)  # a lease is out: it goes on, but only with what is this process's own
    asked = pool.asked[-10:]
    assert "_finish" in asked
    assert "_recover" not in asked
    given[0] = True
    until(lambda: not threads(), "the thread has ended", 1)


def test_a_closed_pool_ends_the_thread_also_when_stop_was_missed(fake: Callable[..., FakePool]) -> None:
    pool = fake().start()
    wait_ticks(pool)
    pool.closed = True
    until(lambda: not threads(), "the thread has ended", 1)


# ---- duties ----------------------------------------------------------------------------------------------------------


def test_only_the_elected_does_what_is_for_all(fake: Callable[..., FakePool], caplog: Any) -> None:
    caplog.set_level(logging.INFO, "shmpool.maintenance")
    pool = fake()
    elected = [False]
    pool.does["_maintainer"] = lambda: elected[0]
    pool.start()
    wait_ticks(pool, 3)
    assert set(pool.asked) == {"_close_stale", "_look_over", "_overdue", "_maintainer"}
    elected[0] = True
    until(lambda: "_expire" in pool.asked, "the duties of the elected")
    wait_ticks(pool, 3)
    assert caplog.text.count("maintains pool 'fake'") == 1


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(3), KeyboardInterrupt()])
def test_a_duty_that_raises_stops_no_other(fake: Callable[..., FakePool], caplog: Any, error: BaseException) -> None:
    pool = fake()

    def fail(*_: object) -> Any:
        raise error

    for name in DUTIES:
        if name != "_maintainer":
            pool.does[name] = fail
    pool.start()
    wait_ticks(pool, 5)
    pool._maintenance.stop()
    assert set(pool.asked) == {*DUTIES, "_resign"}
    complaints = [record for record in caplog.records if record.name == "shmpool.maintenance"]
    assert max(Counter(record.getMessage() for record in complaints).values()) == 1, "once a minute"
    assert len(complaints) == 7, "each duty"
    assert all(record.exc_info and record.levelno == logging.WARNING for record in complaints)


def test_a_pool_closed_in_the_middle_is_no_complaint(fake: Callable[..., FakePool], caplog: Any) -> None:
    pool = fake()

    def closed(*_: object) -> Any:
        pool.closed = True
        raise PoolClosed

    pool.does["_recover"] = closed
    pool.start()
    until(lambda: not threads(), "the thread has ended", 1)
    assert caplog.text == ""


def test_maintain_now_does_everything_and_raises_the_first_error(fake: Callable[..., FakePool]) -> None:
    pool = fake(min_connections=1, maintenance_interval=math.inf)

    def fail(*_: object) -> Any:
        raise DialError(target="here")

    pool.does["_open"] = fail
    with pytest.raises(DialError, match="here"):
        maintain_now(pool)
    assert pool.asked.count("_overdue") == 2
    assert pool.prewarm == [0, 0, False]


def test_a_long_duty_gives_the_others_their_turn(fake: Callable[..., FakePool], monkeypatch: Any) -> None:
    """Opening a thousand connections does not keep recovery and checks waiting."""
    monkeypatch.setattr("shmpool.maintenance._SLICE_S", 0.0)
    pool = fake(min_connections=50, max_connections=50, maintenance_interval=1000)
    pool.does["_open"] = lambda _mask: time.monotonic() > 0
    pool.start()
    until(lambda: pool.connections == 50 or ticks(pool) > 60, "ticks without a pause")
    assert pool.connections <= ticks(pool)


# ---- prewarming ------------------------------------------------------------------------------------------------------


class Upstream:
    """A server that refuses the first `refusals` dials; noticed as the core does it."""

    def __init__(self, pool: FakePool, refusals: int) -> None:
        self.refusals, self.dials = refusals, 0
        pool.does["_open"] = self.dial
        pool.does["_upstream"] = lambda: ("up", 0.0, "", 0)

    def dial(self, _mask: int) -> bool:
        self.dials += 1
        if self.dials <= self.refusals:
            raise DialError(target="refused")
        return True


@pytest.mark.parametrize(
    ("refusals", "retries", "dials", "created", "failed"),
    [(0, 0, 3, 3, 0), (2, 3, 5, 3, 0), (1, 0, 1, 0, 3), (9, 2, 3, 0, 3), (3, 3, 6, 3, 0)],
)
def test_prewarming(
    fake: Callable[..., FakePool], refusals: int, retries: int, dials: int, created: int, failed: int
) -> None:
    pool = fake(min_connections=3, prewarm_retries=retries, maintenance_interval=1000)
    upstream = Upstream(pool, refusals)
    pool.start()
    until(lambda: pool.prewarm[2], "prewarming is done", 5)
    pool._maintenance.stop()
    assert (upstream.dials, pool.prewarm[0], pool.prewarm[1]) == (dials, created, failed)


def test_replenishing_goes_on_after_prewarming_has_failed(fake: Callable[..., FakePool]) -> None:
    pool = fake(min_connections=2)
    Upstream(pool, 20)
    pool.start()
    until(lambda: pool.connections == 2, "the minimum", 5)
    assert pool.prewarm == [0, 2, True]
    pool.connections = 0
    until(lambda: pool.connections == 2, "the minimum again", 5)


def test_prewarming_waits_while_another_process_finds_out(fake: Callable[..., FakePool]) -> None:
    pool = fake(min_connections=2, maintenance_interval=1000)
    looks = [0]

    def wait(_mask: int) -> bool:
        looks[0] += 1
        return looks[0] > 3

    pool.does["_open"] = wait
    pool.does["_upstream"] = lambda: ("unproved", 0.001, "", 0)
    pool.start()
    until(lambda: pool.prewarm[2], "prewarming is done", 5)
    assert pool.prewarm == [2, 0, True]


def test_a_server_known_to_be_down_is_a_failed_try(fake: Callable[..., FakePool]) -> None:
    pool = fake(min_connections=2, prewarm_retries=2, maintenance_interval=1000)
    pool.does["_open"] = lambda _mask: False
    pool.does["_upstream"] = lambda: ("down", 0.001, "nobody there", 1)
    pool.start()
    until(lambda: pool.prewarm[2], "prewarming is done", 5)
    pool._maintenance.stop()
    assert pool.prewarm == [0, 2, True]
    assert pool.asked.count("_open") == 3


# ---- forks -----------------------------------------------------------------------------------------------------------


def tasks() -> int:
    """Threads of this process, as the kernel counts them. pytest's own and xdist's are among them."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_the_thread_is_gone_before_a_fork_and_back_after_it(fake: Callable[..., FakePool], family: Family) -> None:
    without = tasks()
    pool = fake(maintenance_interval=0.001).start()
    seen: list[int] = []
    for _ in range(20):
        wait_ticks(pool)
        child = family.fork(lambda: (tasks(), threads(), pool._maintenance.is_running()))
        assert child.result() == (1, [], False)
        assert pool._maintenance.is_running()
        seen.append(tasks())
    wait_ticks(pool)
    assert set(seen) <= {without, without + 1}


def test_the_child_begins_anew_with_its_first_use(fake: Callable[..., FakePool], family: Family) -> None:
    pool = fake().start()
    wait_ticks(pool)

    def use() -> tuple[list[str], bool]:
        pool.start()
        wait_ticks(pool)
        names = threads()
        return names, pool._maintenance.stop()

    assert family.fork(use).result() == (["shmpool-maintenance:fake"], True)
    wait_ticks(pool)


@pytest.mark.parametrize("way", ["libc", "clone"])
def test_a_fork_behind_pythons_back(fake: Callable[..., FakePool], family: Family, way: Way) -> None:
    pool = fake().start()
    wait_ticks(pool)

    def use() -> bool:
        pool.start()
        wait_ticks(pool)
        return pool._maintenance.stop()

    assert family.fork(use, way=way).result() is True
    assert family.fork(pool._maintenance.stop, way=way).result() is True, "the parent's thread is not waited for"
    wait_ticks(pool)


def test_many_threads_fork_at_once(fake: Callable[..., FakePool]) -> None:
    pools = [fake(maintenance_interval=0.001).start() for _ in range(4)]

    def fork() -> None:
        for _ in range(20):
            if (pid := os.fork()) == 0:
                os._exit(len(threads()))
            statuses.append(os.waitpid(pid, 0)[1])

    statuses: list[int] = []
    forkers = [threading.Thread(target=fork) for _ in range(4)]
    for forker in forkers:
        forker.start()
    for forker in forkers:
        forker.join()
    assert statuses == [0] * 80
    for pool in pools:
        wait_ticks(pool)


def test_a_duty_that_forks(fake: Callable[..., FakePool]) -> None:
    others = [fake(maintenance_interval=0.001).start() for _ in range(2)]
    statuses: list[int] = []

    def fork() -> int:
        if (pid := os.fork()) == 0:
            os._exit(0)
        statuses.append(os.waitpid(pid, 0)[1])
        return 0

    pool = fake()
    pool.does["_recover"] = fork
    pool.start()
    until(lambda: len(statuses) > 10, "forks in the thread")
    assert set(statuses) == {0}
    for each in (pool, *others):
        wait_ticks(each)


def test_a_fork_does_not_wait_long_for_a_hook_that_does_not_end(fake: Callable[..., FakePool], family: Family) -> None:
    pool = fake()
    release, hooked = threading.Event(), threading.Event()
    pool.does["_recover"] = lambda: hooked.set() or int(release.wait(10))
    pool.start()
    assert hooked.wait(10)
    begun = time.monotonic()
    assert family.fork(lambda: True).result() is True
    took = time.monotonic() - begun
    assert took < FORK_PATIENCE_S + 2
    before = ticks(pool)
    release.set()
    until(lambda: ticks(pool) > before, "the same thread goes on")
    assert len(threads()) == 1


def test_a_fork_interrupts_a_dial(fake: Callable[..., FakePool], family: Family) -> None:
    pool = fake(min_connections=1)
    dialling, interrupted = threading.Event(), threading.Event()

    def dial(_mask: int) -> bool:
        dialling.set()
        if not interrupted.is_set():
            assert interrupted.wait(10)
            raise DialError
        return True

    pool.does["_open"] = dial
    pool.does["_interrupt_dials"] = interrupted.set
    pool.start()
    assert dialling.wait(10)
    assert family.fork(lambda: True).result() is True
    until(lambda: pool.prewarm == [1, 0, True], "prewarming goes on after the fork", 5)


def test_forks_beside_start_and_stop() -> None:
    """Threads start and drop pools while this one forks: nothing hangs, nothing is left."""
    end = threading.Event()

    def churn() -> None:
        while not end.is_set():
            pool = FakePool(maintenance_interval=0.001).start()
            pool._maintenance.kick()
            pool._maintenance.stop()

    churners = [threading.Thread(target=churn) for _ in range(3)]
    for churner in churners:
        churner.start()
    try:
        for _ in range(30):
            if (pid := os.fork()) == 0:
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        end.set()
        for churner in churners:
            churner.join()


# ---- real pools ------------------------------------------------------------------------------------------------------

TICK_S = 0.03
SOON_S = 5.0  # a few ticks, on a machine that is busy with other tests


def prewarm(pool: Pool) -> tuple[int, int, bool]:
    """(created, failed, done)"""
    created, failed, done = pool._snapshot()["prewarm"]
    return created, failed, bool(done)


def held(pool: Pool) -> dict[str, int]:
    """How many connections are in which state."""
    return {state: count for state, count in states(pool).items() if state != "empty"}


def closed(pool: Pool) -> dict[str, int]:
    """How many connections ended, by reason."""
    totals: dict[str, int] = pool._snapshot()["totals"]
    return {name[7:]: count for name, count in totals.items() if name.startswith("closed_") and count}


def take_part(pool: Pool, **own: Any) -> None:
    """In a child that has not used the pool: begin to, with settings of its own."""
    pool._config = pool.config.replace(maintenance_interval=TICK_S, **own)
    pool.recover()


def member(family: Family, pool: Pool, end: Latch, **own: Any) -> Child:
    """A process that does nothing but take part, until the end."""

    def live() -> None:
        take_part(pool, **own)
        part.set()
        end.wait()

    part = family.latch()
    child = family.fork(live)
    part.wait()
    return child


def elected(pool: Pool) -> bool:
    return pool._maintenance._elected


def die(*_: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_prewarming_does_not_keep_the_constructor_waiting(server: ExclusiveServer) -> None:
    go = threading.Event()

    def dial(_request: object) -> socket.socket:
        assert go.wait(10)
        return server.connect()

    with Pool(dial=dial, max_connections=8, min_connections=3) as pool:
        assert threads() == [f"shmpool-maintenance:{pool.name}"]
        go.set()
        pool.wait_ready(10)
        assert held(pool) == {"idle": 3}
        until(lambda: prewarm(pool)[2], "prewarming is done")
        assert prewarm(pool) == (3, 0, True)
    assert threads() == []


def test_prewarming_against_a_server_that_is_down(deaf_port: int) -> None:
    """Nobody is kept waiting, the server is asked once in each round, and the pool has its minimum when it is up."""
    with Pool(
        f"tcp://127.0.0.1:{deaf_port}",
        max_connections=8,
        min_connections=4,
        prewarm_retries=2,
        dial_backoff=(0.005, 0.01),
        maintenance_interval=TICK_S,
    ) as pool:
        until(lambda: prewarm(pool)[2], "prewarming is done")
        assert prewarm(pool) == (0, 4, True)
        assert pool._snapshot()["totals"]["dial_attempts"] == 3


def test_replenishing_when_the_server_comes_back(server: ExclusiveServer) -> None:
    server.refuse()
    with proven(server, 4, min_connections=3, dial_backoff=(0.005, 0.01), maintenance_interval=TICK_S) as pool:
        until(lambda: prewarm(pool)[2], "prewarming is done")
        assert prewarm(pool) == (0, 3, True)
        server.listen()
        pool.wait_ready(10)
        assert held(pool) == {"idle": 3}


@pytest.mark.parametrize("how", ["close", "leave", "with", "drop"])
def test_the_thread_ends_with_the_pool(server: ExclusiveServer, how: str) -> None:
    def use_it() -> None:
        pool = Pool(server.url, max_connections=2, maintenance_interval=1000)
        pool.wait_ready()
        assert threads() == [f"shmpool-maintenance:{pool.name}"]
        if how == "with":
            with pool:
                pass
        elif how != "drop":
            getattr(pool, how)()
            assert threads() == []

    use_it()
    if how == "drop":
        until(ended, "its thread holds it only while it does something")
    assert threads() == []
    until(lambda: server.stats()["open"] == 0, "every connection is closed")


def test_many_dropped_pools_leave_no_thread(server: ExclusiveServer) -> None:
    for _ in range(30):
        Pool(server.url, max_connections=2, maintenance_interval=TICK_S)
    until(ended, "each thread holds its pool only while it does something")


@pytest.mark.parametrize("how", ["close", "leave", "drop"])
def test_a_pool_ends_in_its_own_hook(server: ExclusiveServer, how: str) -> None:
    """on_close runs in the maintenance thread when a connection has expired: the thread cannot wait for itself."""
    done = threading.Event()

    def on_close(_: object) -> None:
        if not done.is_set():
            done.set()
            pool = pools.pop()
            if how != "drop":
                getattr(pool, how)()

    pools = [
        Pool(
            server.url,
            max_connections=2,
            min_connections=0,
            idle_timeout=0.02,
            maintenance_interval=TICK_S,
            on_close=on_close,
        )
    ]
    with pools[0].get():
        pass
    assert done.wait(10)
    until(lambda: not threads(), "the thread has ended", SOON_S)
    gc.collect()
    until(lambda: server.stats()["open"] == 0, "every connection is closed")


def test_a_pool_closed_elsewhere_is_given_back(server: ExclusiveServer, family: Family) -> None:
    """A process that does nothing any more keeps no descriptor of a pool that another one closed."""

    def idle() -> float:
        before = len(descriptors())
        use(pool)
        ready.set()
        took = until(lambda: pool.closed and not threads(), "the thread has ended")
        assert len(descriptors()) < before, "mailboxes and segment were inherited"
        return took

    ready = family.latch()
    with proven(server, 3, every_slot=False, maintenance_interval=TICK_S) as pool:
        child = family.fork(idle)
        ready.wait()
        pool.close()
        child.result()


def test_expiry_keeps_the_minimum(server: ExclusiveServer) -> None:
    with proven(server, 5, min_connections=2, idle_timeout=0.05, maintenance_interval=TICK_S) as pool:
        leases = [pool.get() for _ in range(5)]
        for lease in leases:
            lease.release()
        until(lambda: held(pool) == {"idle": 2} and server.stats()["open"] == 2, "the surplus has ended")
        assert closed(pool)["idle"] >= 3
        for _ in range(3):
            number = ticks_of(pool)
            until(lambda number=number: ticks_of(pool) > number, "a tick")
            assert server.stats()["open"] == 2


def ticks_of(pool: Pool) -> float:
    """Changes with each tick."""
    return pool._maintenance._next_tick


def test_lifetime_ends_idle_connections_and_they_are_replaced(server: ExclusiveServer) -> None:
    with proven(server, 3, min_connections=3, max_lifetime=0.2, idle_timeout=0.2, maintenance_interval=TICK_S) as pool:
        pool.wait_ready()
        until(lambda: closed(pool).get("lifetime", 0) >= 6, "two generations have ended")
        until(lambda: held(pool) == {"idle": 3}, "and were replaced")


def test_what_the_server_closed_is_noticed_and_replaced(server: ExclusiveServer) -> None:
    with proven(server, 3, min_connections=2, health_check_interval=0.05, maintenance_interval=TICK_S) as pool:
        pool.wait_ready()
        for _ in range(3):
            until(lambda: server.stats()["open"] == 2, "the server has both")
            before = server.stats()["accepted"]
            assert server.close_connections() == 2
            until(lambda before=before: server.stats()["accepted"] == before + 2, "two new ones", SOON_S)
            until(lambda: held(pool) == {"idle": 2}, "both are idle")
        assert closed(pool) == {"broken": 6}


def test_what_a_dead_process_held_comes_back_unasked(server: ExclusiveServer, family: Family) -> None:
    def hold() -> None:
        leases = [pool.get(), pool.get()]
        holding.set()
        signal.pause()
        del leases

    holding = family.latch()
    with proven(server, 2, maintenance_interval=TICK_S) as pool:
        child = family.fork(hold)
        holding.wait()
        child.kill()
        took = until(lambda: not held(pool), "both permits are free", SOON_S)
        print(f"back after {took * 1e3:.0f} ms")


def test_copies_of_ended_connections_are_closed_everywhere(server: ExclusiveServer, family: Family) -> None:
    """The elected process ends them; each other one closes its copies at its next tick."""

    def idle() -> None:
        take_part(pool, idle_timeout=math.inf)
        leases = [pool.get() for _ in range(4)]
        for lease in leases:
            lease.release()
        used.set()
        go.wait()
        until(lambda: sockets() == sockets_before[0], "no copy is left")

    def sockets() -> int:
        return sum(what.startswith("socket:") for what in descriptors().values())

    used, go = family.latch(), family.latch()
    sockets_before = [0]
    with proven(server, 4, maintenance_interval=math.inf) as pool:
        sockets_before[0] = sockets()
        child = family.fork(idle)
        used.wait()
        assert pool.evict() == 4
        pool.maintain()
        assert held(pool) == {}
        go.set()
        child.result()


def test_one_of_all_is_elected_and_the_next_when_it_dies(server: ExclusiveServer, family: Family) -> None:
    def live(index: int) -> None:
        take_part(pool)
        while not end.is_set():
            marks[index] = elected(pool)
            end_or_tick()

    def end_or_tick() -> None:
        with contextlib.suppress(AssertionError):
            end.wait(TICK_S)

    end, marks = family.latch(), Counters(5)
    with proven(server, 2, maintenance_interval=math.inf) as pool:
        children = [family.fork(live, index) for index in range(5)]
        for left in range(5, 0, -1):
            until(lambda: sum(marks.list()) == 1, "one is elected", SOON_S)
            (first,) = [index for index, mark in enumerate(marks.list()) if mark]
            assert children[first].alive()
            children[first].kill()
            marks[first] = 0
            if left > 1:
                took = until(lambda: sum(marks.list()) == 1, "another is elected", SOON_S)
                print(f"the next one after {took * 1e3:.0f} ms")


@pytest.mark.skipif(not LONG, reason="SHMPOOL_TEST_LONG is not set: others help only after 10 s")
def test_others_help_when_the_elected_one_is_stopped(server: ExclusiveServer, family: Family) -> None:
    end = family.latch()
    with proven(server, 2, min_connections=2, maintenance_interval=math.inf, health_check_interval=0.1) as pool:
        first = member(family, pool, end)
        pool.wait_ready(10)
        first.stop()
        member(family, pool, end)
        until(lambda: server.stats()["open"] == 2, "the server has both")
        assert server.close_connections() == 2
        took = until(lambda: server.stats()["open"] == 2 and held(pool) == {"idle": 2}, "new ones", 20)
        print(f"after {took:.1f} s")
        first.resume()
        end.set()
        first.wait()


# ---- the elected one dies in the middle ------------------------------------------------------------------------------


@contextlib.contextmanager
def first_dies(
    server: ExclusiveServer,
    family: Family,
    prepare: Callable[[], dict[str, Any]],
    at_work: Callable[[Pool], object] = lambda _: None,
    **settings: Any,
) -> Iterator[tuple[Pool, Callable[..., float]]]:
    """A pool, and what to call for its first member, which dies in a duty: by what `prepare` does in it or the settings
    that this returns, or by what `at_work` does in it. When it has died, a second one begins, with the settings that
    the call is given; returns when the first died.
    """
    end = family.latch()
    with proven(server, 4, maintenance_interval=math.inf, **settings) as pool:

        def first() -> None:
            pool._config = pool.config.replace(**prepare())
            take_part(pool)
            at_work(pool)
            end.wait()

        def begin(**second: Any) -> float:
            assert family.fork(first).wait() == "SIGKILL"
            died = time.monotonic()
            member(family, pool, end, **second)
            return died

        yield pool, begin
        end.set()
        for child in family.children:
            child.wait()


def test_killed_in_a_health_check(server: ExclusiveServer, family: Family) -> None:
    settings = {"min_connections": 2, "health_check_interval": 0.02}
    with first_dies(server, family, lambda: {"health_check": die, "health_check_timeout": 0.01}, **settings) as both:
        pool, begin = both
        pool.maintain()
        assert held(pool) == {"idle": 2}
        died = begin()
        until(lambda: held(pool) == {"idle": 2}, "what it checked has been replaced")
        assert time.monotonic() - died < SOON_S
        assert closed(pool) == {"owner_died": 1}
        assert prewarm(pool) == (2, 0, True)


@pytest.mark.parametrize("connected", [False, True])
def test_killed_while_prewarming(server: ExclusiveServer, family: Family, connected: bool, monkeypatch: Any) -> None:
    def prepare() -> dict[str, Any]:
        dials = [0]

        def dial(*args: Any) -> Any:
            dials[0] += 1
            sock = dial_target(*args) if connected or dials[0] == 1 else None
            return sock if dials[0] == 1 else die(sock)

        monkeypatch.setattr("shmpool.pool.dial_target", dial)
        return {}

    with first_dies(server, family, prepare, min_connections=3) as (pool, begin):
        died = begin()
        until(lambda: prewarm(pool)[2], "prewarming is done")
        assert time.monotonic() - died < SOON_S
        assert held(pool) == {"idle": 3}
        assert prewarm(pool) == (3, 0, True)
        until(lambda: server.stats()["open"] == 3, "the half-made connection is closed")


def test_killed_while_ending_what_has_expired(server: ExclusiveServer, family: Family) -> None:
    """It has taken the idle connections out of use, and has not ended them: their sessions are dropped in between."""

    class Session:
        def __del__(self) -> None:
            die()

    def leave_sessions(pool: Pool) -> None:
        leases = [pool.get() for _ in range(3)]
        for lease in leases:
            lease.session = Session()
            lease.release()

    with first_dies(server, family, dict, leave_sessions, idle_timeout=0.05) as (pool, begin):
        died = begin()
        until(lambda: not held(pool) and server.stats()["open"] == 0, "the rest of it")
        assert time.monotonic() - died < SOON_S
        assert closed(pool) == {"owner_died": 3}


@pytest.mark.parametrize("action", ["report", "revoke"])
def test_killed_while_reporting_a_leak(server: ExclusiveServer, family: Family, action: str) -> None:
    """What it was reporting is in its log; what comes after it is reported by the next."""
    told = family.latch()
    leaks = {"leak_timeout": 0.05, "leak_action": action}
    with first_dies(server, family, lambda: {**leaks, "on_leak": die}) as (pool, begin):
        lease = pool.get()
        begin(**leaks, on_leak=lambda _: told.set())
        assert not told.is_set()
        later = pool.get()
        told.wait()
        until(lambda: pool._snapshot()["totals"]["overdue_leases"] == 2, "both are reported")
        if action == "revoke":
            assert closed(pool) == {"revoked": 2}
            assert held(pool) == {}
        for each in (lease, later):
            with pytest.raises(LeaseExpired) if action == "revoke" else contextlib.nullcontext():
                exclusive_use(each.socket, "holder:1")
                each.release()


# ---- real pools and forks --------------------------------------------------------------------------------------------


def test_forks_while_a_dial_hangs(family: Family) -> None:
    """The fork waits for a moment only, and the server is not called down for it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        pool = stack.enter_context(Pool(f"tcp://127.0.0.1:{port}", max_connections=2, maintenance_interval=TICK_S))
        for _ in range(3):
            until(lambda: "dialing" in held(pool), "a dial")
            begun = time.monotonic()
            assert family.fork(lambda: threads()).result() == []
            assert time.monotonic() - begun < SOON_S
            assert pool._upstream()[0] == "unproved"


def test_fork_storm_beside_every_duty(server: ExclusiveServer, family: Family) -> None:
    """Connections expire, are checked, opened and leased while the process forks; the children use the pool too."""
    with proven(
        server,
        4,
        min_connections=2,
        idle_timeout=0.05,
        max_lifetime=0.2,
        health_check=lambda conn: exclusive_use(conn.socket, "check:1") > 0,
        health_check_interval=0.03,
        health_check_timeout=0.02,
        maintenance_interval=0.005,
    ) as pool:
        for _ in range(25):
            child = family.fork(lambda: [use(pool) for _ in range(3)])
            use(pool)
            child.result()
            family.forget(child)
        assert pool._maintenance.is_running()


FORKS = """
import os, warnings
seen = []
# Hooks run in the reverse order of their registration: this one after the pool's.
os.register_at_fork(before=lambda: seen.append(len(os.listdir("/proc/self/task"))))
from shmpool import Pool
pool = Pool({url!r}, max_connections=4, min_connections=2, maintenance_interval=0.001, health_check=lambda conn: True,
            health_check_interval=0.01, health_check_timeout=0.005)
pool.wait_ready()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(100):
        if (pid := os.fork()) == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
assert set(seen) == {{1}}, seen
assert not caught, [str(each.message) for each in caught]
assert pool._maintenance.is_running()
"""


def run_script(script: str) -> None:
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_no_fork_meets_a_second_thread(server: ExclusiveServer) -> None:
    """As the kernel counts them, and as CPython 3.12 and later do, which warns. The script ends without close()."""
    run_script(FORKS.format(url=server.url))
    until(lambda: server.stats()["open"] == 0, "every connection is closed")


EXIT = """
import sys, threading, time
from shmpool import Pool
pools = [Pool({url!r}, max_connections=4, min_connections=2, maintenance_interval=0.001) for _ in range(3)]
{how}
"""


@pytest.mark.parametrize("how", ["", "lease = pools[0].get()", "sys.exit()", "del pools[:]"])
def test_a_process_that_ends_beside_its_threads(server: ExclusiveServer, how: str) -> None:
    run_script(EXIT.format(url=server.url, how=how))
    until(lambda: server.stats()["open"] == 0, "every connection is closed")


# on_created is a part of the dial -------------------------------------------------------------------------------------


def silent_hook(conn: PooledConnection) -> None:
    conn.socket.sendall(b"PING\n")
    conn.socket.recv(1)


@pytest.fixture
def deaf() -> Iterator[str]:
    """A server that accepts, by its kernel, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def test_a_connection_that_a_hook_looks_at_is_not_open_yet(deaf: str) -> None:
    """Breaks when wait_ready() believes connections that nobody can use, or when people are told that they are lent."""
    settings: dict[str, Any] = {"on_created": silent_hook, "connection_timeout": 1.0, "maintenance_interval": math.inf}
    with Pool(deaf, min_connections=2, max_connections=4, **settings) as pool:

        def call() -> None:
            with pytest.raises(PoolTimeout):
                pool.get(0.6)

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        until(lambda: pool.stats().connections["dialing"] >= 1, "they dial")
        with pytest.raises(PoolTimeout) as caught:
            pool.wait_ready(0.3)
        assert "is the server slow" in str(caught.value)
        assert pool.stats().connections["leased"] == 0
        for caller in callers:
            caller.join(10)


@pytest.mark.parametrize("timeout", [0.3, 5.0])
def test_what_a_hook_does_on_the_socket_has_the_time_of_the_dial(deaf: str, timeout: float) -> None:
    """Breaks when get() waits for the socket's own timeout (30 s) in on_created."""
    seen: list[float | None] = []

    def hook(conn: PooledConnection) -> None:
        seen.append(conn.socket.gettimeout())
        silent_hook(conn)

    with Pool(deaf, on_created=hook, connection_timeout=0.5, maintenance_interval=math.inf) as pool:
        begun = time.monotonic()
        with pytest.raises(PoolTimeout if timeout < 0.5 else DialError) as caught:
            pool.get(timeout)
        assert min(timeout, 0.5) <= time.monotonic() - begun < 3
        assert seen[0] is not None
        assert 0 < seen[0] <= min(timeout, 0.5)
        if isinstance(caught.value, DialError):
            assert caught.value.waited >= 0.4
            assert pool.stats().upstream == "down"
        else:
            assert pool.stats().upstream == "unproved", "a deadline of the caller's own says nothing of the server"


def test_after_the_hook_the_socket_is_as_always(server: ExclusiveServer) -> None:
    with proven(server, 1, on_created=lambda conn: ask(conn.socket, "PING"), socket_timeout=7.0) as pool:
        pool.evict()
        with pool.get() as conn:
            assert conn.socket.gettimeout() == 7.0


def test_a_pool_with_a_hook_ends_when_it_is_dropped(server: ExclusiveServer) -> None:
    """Without the garbage collector's help."""
    before = len(descriptors())
    gc.disable()
    try:
        pool = Pool(server.url, on_created=lambda conn: ask(conn.socket, "PING"), maintenance_interval=math.inf)
        pool.get().release()
        del pool
        assert len(descriptors()) == before
    finally:
        gc.enable()


def test_a_hook_that_hangs_does_not_keep_close_waiting(deaf: str) -> None:
    pool = Pool(deaf, min_connections=1, on_created=silent_hook, connection_timeout=30, maintenance_interval=0.05)
    until(lambda: pool.stats().connections["dialing"] == 1, "maintenance dials")
    begun = time.monotonic()
    pool.close()
    assert time.monotonic() - begun < 1.2
