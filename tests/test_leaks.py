"""Leases that are out for too long: reported once, with where they were taken; revoked when that is wanted."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from shmpool import LeaseExpired, Pool, PoolConfig, PooledConnection
from shmpool.hooks import ClosedConnection, LeakReport, call_on_close, call_on_leak
from shmpool.leaks import Taken, Takers, report_overdue
from tests.processes import Family, proven, until, use
from tests.servers import ExclusiveServer, ask, exclusive_use

ELSEWHERE = 1  # the process of somebody else's lease


def conn(slot: int = 0, connection: int = 7) -> Any:
    return SimpleNamespace(_slot=slot, id=connection)


class Overdue:
    """A pool with one overdue lease."""

    def __init__(self, pid: int = 0, **settings: Any) -> None:
        self.config = PoolConfig.from_dict({"target": "tcp://127.0.0.1:1", "leak_timeout": 10, **settings})
        self.name = "p"
        self.pid = pid or os.getpid()
        self.asked: list[tuple[Any, ...]] = []
        self.ours = True
        self.frames: list[tuple[int, int, str]] = []

    def _overdue(self, age: float, only_own: bool) -> list[tuple[int, int, int, int, float]]:
        self.asked.append(("overdue", age, only_own))
        return [(3, 77, 7, self.pid, 12.5)]

    def _report_leak(self, slot: int, word: int) -> bool:
        self.asked.append(("report", slot, word))
        return self.ours

    def _note_frame(self, slot: int, connection: int, text: str) -> None:
        self.frames.append((slot, connection, text))

    def _revoke(self, slot: int, word: int) -> bool:
        self.asked.append(("revoke", slot, word))
        return self.ours


def take_here(takers: Takers, slot: int = 3) -> None:
    takers.remember(conn(slot))


def test_a_stack_says_where_a_lease_was_taken() -> None:
    takers = Takers()
    take_here(takers)
    taken = takers.of(3, 7)
    assert taken is not None
    assert taken.thread == threading.current_thread().name
    lines = taken.stack().splitlines()
    assert lines[-2].endswith("in take_here")
    assert lines[-1].strip() == "takers.remember(conn(slot))"
    assert "in test_a_stack_says_where_a_lease_was_taken" in taken.stack()
    assert takers.of(3, 8) is None, "another connection by now"
    assert takers.of(4, 7) is None


def test_what_is_kept_is_bounded_and_holds_no_variables() -> None:
    takers = Takers()

    def deep(left: int) -> None:
        mine = object()
        if left:
            deep(left - 1)
        else:
            takers.remember(conn(left, id(mine)))

    for _ in range(100):
        deep(100)
    assert len(takers._by_slot) == 1
    (taken,) = takers._by_slot.values()
    assert len(taken.frames) == 40
    takers.clear()
    assert takers.of(0, taken.connection_id) is None


def test_the_programs_hook_runs_after_the_note() -> None:
    takers = Takers()
    assert takers.noting(None) == takers.remember
    seen: list[object] = []

    def hook(conn: Any) -> str:
        seen.append(takers.of(3, 7))
        return f"said {conn.id}"

    assert takers.noting(hook)(conn(3)) == "said 7"
    assert seen[0] is not None
    assert takers.of(3, 7).stack().rstrip().splitlines()[-2].endswith("in test_the_programs_hook_runs_after_the_note")  # type: ignore[union-attr]


def test_a_report(caplog: Any) -> None:
    reports: list[LeakReport] = []
    pool = Overdue(on_leak=reports.append, leak_stacks=True)
    takers = Takers()
    take_here(takers)
    assert report_overdue(pool, takers, only_own=True) == 1
    (report,) = reports
    assert (report.connection_id, report.slot, report.pid, report.held) == (7, 3, os.getpid(), 12.5)
    assert (report.thread, report.revoked) == (threading.current_thread().name, False)
    assert report.stack is not None
    assert "in take_here" in report.stack
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("shmpool.maintenance", logging.WARNING)
    assert "out for 12.5 s (leak_timeout 10 s): connection 7, held by thread 'MainThread'" in record.getMessage()
    assert "in take_here" in record.getMessage()
    extra = (record.pool, record.slot, record.connection_id, record.reason)
    assert extra == ("p", 3, 7, "overdue")
    assert pool.asked == [("overdue", 10, True), ("report", 3, 77)]
    assert len(pool.frames) == 8
    assert pool.frames[0][:2] == (3, 7)
    assert pool.frames[0][2].startswith("take_here (")
    assert pool.frames[0][2].endswith(f"test_leaks.py:{take_here.__code__.co_firstlineno + 1})")
    assert pool.frames[1][2].startswith("test_a_report (")
    assert max(len(text.encode()) for _, _, text in pool.frames) <= 63


def test_a_place_keeps_the_end_of_its_path() -> None:
    code = compile("0", "/very/long/" * 9 + "öffnen.py", "exec").replace(co_name="handle" * 9)
    (place,) = Taken(7, "t", ((code, 42),)).places()
    assert len(place.encode()) <= 63
    assert place.startswith("handlehandlehandlehandlehandle (…")
    assert place.endswith("/öffnen.py:42)")


def test_what_another_process_reports_is_left_to_it(caplog: Any) -> None:
    pool = Overdue(on_leak=pytest.fail)
    pool.ours = False
    assert report_overdue(pool, Takers(), only_own=True) == 0
    assert caplog.text == ""


def test_revoking_is_the_right_to_report(caplog: Any) -> None:
    """One step that one process alone succeeds in: a death between two steps would lose the second."""
    reports: list[LeakReport] = []
    pool = Overdue(on_leak=reports.append, leak_action="revoke")
    assert report_overdue(pool, Takers(), only_own=True) == 1
    assert pool.asked[1:] == [("revoke", 3, 77)]
    assert reports[0].revoked
    assert "has been taken away" in caplog.text
    assert "leak_stacks=True" in caplog.text


def test_anothers_lease_has_no_stack_and_is_given_time(caplog: Any) -> None:
    reports: list[LeakReport] = []
    pool = Overdue(ELSEWHERE, on_leak=reports.append, leak_stacks=True, maintenance_interval=3)
    takers = Takers()
    take_here(takers)
    assert report_overdue(pool, takers, only_own=False) == 1
    assert pool.asked[0] == ("overdue", 16, False)
    assert (reports[0].pid, reports[0].thread, reports[0].stack) == (ELSEWHERE, None, None)
    assert "held by process 1" in caplog.text


def test_never_is_never() -> None:
    pool = Overdue(leak_timeout=math.inf)
    assert report_overdue(pool, Takers(), only_own=True) == 0
    assert pool.asked == []
    pool = Overdue(maintenance_interval=math.inf)
    report_overdue(pool, Takers(), only_own=False)
    assert pool.asked[0] == ("overdue", 10, False)


CLOSED = ClosedConnection(
    id=7,
    slot=3,
    protocol="tcp",
    ip_version=4,
    peer=("127.0.0.1", 1),
    reason="broken",
    age=1.0,
    uses=2,  # type: ignore[arg-type]
)
LEAK = LeakReport(connection_id=7, slot=3, pid=1, held=12.5, thread=None, stack=None, revoked=False)


@pytest.mark.parametrize(
    ("call", "told", "reason"), [(call_on_close, CLOSED, "broken"), (call_on_leak, LEAK, "overdue")]
)
def test_what_a_hook_raises_is_logged_and_goes_nowhere_else(
    call: Callable[..., None], told: Any, reason: str, caplog: Any
) -> None:
    def hook(what: object) -> None:
        assert what is told
        raise ValueError("odd")

    call(hook, told, "p")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("shmpool.hooks", logging.ERROR)
    assert (record.pool, record.slot, record.connection_id, record.reason) == ("p", 3, 7, reason)
    assert isinstance(record.exc_info[1], ValueError)

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(interrupted, told, "p")


# ---- real pools ------------------------------------------------------------------------------------------------------

FAST: dict[str, Any] = {"leak_timeout": 0.05, "maintenance_interval": 0.01, "health_check_interval": math.inf}
SOON_S = 5.0


def overdue(pool: Pool) -> int:
    count: int = pool._snapshot()["totals"]["overdue_leases"]
    return count


def wait_ticks(pool: Pool, ticks: int) -> None:
    for _ in range(ticks):
        before = pool._maintenance._next_tick
        until(lambda before=before: pool._maintenance._next_tick != before, "a tick")  # type: ignore[misc]


def calm(pool: Pool) -> None:
    """From now on no lease is overdue: the proof at the end of a test holds them all."""
    pool._config = pool.config.replace(leak_timeout=math.inf)


def take(pool: Pool) -> PooledConnection:
    return pool.get()


@pytest.mark.parametrize("stacks", [False, True])
def test_a_lease_is_reported_once(server: ExclusiveServer, stacks: bool) -> None:
    reports: list[LeakReport] = []
    names: list[str] = []

    def on_leak(report: LeakReport) -> None:
        names.append(threading.current_thread().name)
        reports.append(report)

    with proven(server, 3, on_leak=on_leak, leak_stacks=stacks, **FAST) as pool:
        with take(pool) as lease, pool.get() as other:
            until(lambda: len(reports) == 2, "the reports")
            wait_ticks(pool, 5)
            assert len(reports) == 2
            found = {report.connection_id: report for report in reports}
            assert set(found) == {lease.id, other.id}
            report = found[lease.id]
            assert (report.pid, report.revoked) == (os.getpid(), False)
            assert 0.05 <= report.held < SOON_S
            if stacks:
                assert report.stack is not None
                assert report.stack.splitlines()[-2].endswith("in take")
                assert report.thread == "MainThread"
            else:
                assert (report.stack, report.thread) == (None, None)
            exclusive_use(lease.socket, "late:1")
        assert set(names) == {f"shmpool-maintenance:{pool.name}"}
        assert overdue(pool) == 2
        with pool.get() as again:
            until(lambda: len(reports) == 3, "a new lease of the same connection is reported again")
            assert reports[2].connection_id == again.id


def test_short_leases_are_not_reported(server: ExclusiveServer) -> None:
    with proven(server, 1, on_leak=pytest.fail, **{**FAST, "leak_timeout": 0.5}) as pool:
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            use(pool)
        assert overdue(pool) == 0


def test_a_lease_begins_when_its_connection_is_open(server: ExclusiveServer) -> None:
    """A dial that took longer than leak_timeout is no leak, and the lease after it is one in its turn."""
    reports: list[LeakReport] = []

    def dial(_: object) -> socket.socket:
        sock = server.connect()
        time.sleep(0.2)  # sleep: a server that is slow to answer
        return sock

    with Pool(dial=dial, max_connections=1, min_connections=0, on_leak=reports.append, **FAST) as pool, pool.get():
        begun = time.monotonic()
        until(lambda: reports, "the report")
        assert 0.05 <= reports[0].held < time.monotonic() - begun + 0.1


def test_a_revoked_lease(server: ExclusiveServer, caplog: Any) -> None:
    """The slot is free for others at once; who comes late is told, and changes nothing."""
    reports: list[LeakReport] = []
    with proven(server, 1, on_leak=reports.append, leak_action="revoke", leak_stacks=True, **FAST) as pool:
        lease = take(pool)
        sock, number = lease.socket, lease.id
        until(lambda: reports, "the report")
        calm(pool)
        assert use(pool) == 2, "another connection, in the only slot"
        assert [report.revoked for report in reports] == [True]
        for late in (lambda: lease.socket, lease.release, lease.discard, lambda: lease.session):
            with pytest.raises(LeaseExpired, match=str(number)):
                late()
        with pytest.raises((OSError, EOFError)):
            ask(sock, "PING")
        sock.close()
        for _ in range(3):
            use(pool)
        assert overdue(pool) == 1
        assert pool._snapshot()["totals"]["closed_revoked"] == 1
        assert "in take" in caplog.text


@pytest.mark.parametrize("warm", [True, False])
def test_a_lease_taken_away_before_its_caller_has_it(server: ExclusiveServer, warm: bool) -> None:
    """A process that was stopped in the hook, say. Breaks when get() raises LeaseExpired."""
    armed = threading.Event()
    seen: list[int] = []

    def slow(conn: PooledConnection) -> None:
        seen.append(conn.id)
        if armed.is_set():
            armed.clear()
            until(lambda: pool._overdue(0.0, True), "a moment is over")
            ((slot, word, *_),) = pool._overdue(0.0, True)
            assert pool._revoke(slot, word)
        assert conn.socket

    with proven(server, 2, on_borrow=slow, maintenance_interval=math.inf) as pool:
        pool.evict()
        pool.maintain()
        if warm:
            use(pool)
        before = pool.stats()
        armed.set()
        with pool.get() as conn:
            exclusive_use(conn.socket, "after")
            assert seen[-1] == conn.id
        assert seen[-2] != seen[-1]
        counted = pool.stats().diff(before)
        assert (counted.gets, counted.successes, counted.closed["revoked"], counted.closed["refused"]) == (1, 1, 1, 0)


def test_a_revoked_holder_in_the_middle_of_a_call(server: ExclusiveServer) -> None:
    """It is blocked in recv() on that connection: the call ends."""
    with proven(server, 1, leak_action="revoke", **FAST) as pool:
        lease = pool.get()
        lease.socket.settimeout(None)
        assert lease.socket.recv(1) == b""
        until(lambda: overdue(pool) == 1, "it is reported")
        with pytest.raises(LeaseExpired):
            lease.release()
        calm(pool)


@pytest.mark.parametrize("action", ["report", "revoke"])
def test_over_several_processes_each_lease_is_reported_once_by_its_own(
    server: ExclusiveServer, family: Family, action: str
) -> None:
    def hold() -> list[tuple[int, int, bool]]:
        reports: list[LeakReport] = []
        pool._config = pool.config.replace(on_leak=reports.append)
        lease = pool.get()
        number = lease.id
        until(lambda: reports, "the report")
        reported.set()
        end.wait()
        wait_ticks(pool, 3)
        if action == "revoke":
            with pytest.raises(LeaseExpired):
                lease.release()
        else:
            lease.release()
        return [(report.pid, report.connection_id - number, report.revoked) for report in reports]

    end = family.latch()
    with proven(server, 4, leak_action=action, **FAST) as pool:
        children, latches = [], []
        for _ in range(4):
            latches.append(reported := family.latch())
            children.append(family.fork(hold))
        for latch in latches:
            latch.wait()
        end.set()
        for child in children:
            ((pid, difference, revoked),) = child.result()
            assert pid == child.pid
            assert (difference, revoked) == (0, action == "revoke")
        assert overdue(pool) == 4
        calm(pool)


def test_the_elected_one_reports_a_lease_of_a_stopped_process(server: ExclusiveServer, family: Family) -> None:
    """Its holder cannot. When it goes on it finds its lease reported, or taken away."""

    def hold() -> None:
        lease = pool.get()
        held.set()
        until(lambda: go.is_set(), "the end")
        with pytest.raises(LeaseExpired):
            lease.release()

    reports: list[LeakReport] = []
    held, go = family.latch(), family.latch()
    settings = {**FAST, "leak_timeout": 0.2}
    with proven(server, 1, leak_action="revoke", leak_stacks=True, on_leak=reports.append, **settings) as pool:
        until(lambda: pool._maintenance._elected, "this process is elected")
        holder = family.fork(hold)
        held.wait()
        holder.stop()
        until(lambda: reports, "the report")
        calm(pool)
        use(pool)
        (report,) = reports
        assert (report.pid, report.thread, report.stack, report.revoked) == (holder.pid, None, None, True)
        assert report.held >= 0.2
        holder.resume()
        go.set()
        holder.result()


def test_a_leak_hook_that_raises(server: ExclusiveServer, caplog: Any) -> None:
    def on_leak(_: LeakReport) -> None:
        raise ValueError("odd")

    with proven(server, 2, on_leak=on_leak, **FAST) as pool, pool.get(), pool.get():
        until(lambda: overdue(pool) == 2, "both are reported")
        wait_ticks(pool, 3)
        errors = [record for record in caplog.records if record.name == "shmpool.hooks"]
        assert len(errors) == 2
        assert pool._maintenance.is_running()


def test_a_close_hook_that_raises(server: ExclusiveServer, caplog: Any) -> None:
    """Wherever it runs: in a release, in maintenance, in close(). Each connection is told once, no slot is lost."""
    told: list[tuple[int, str, str]] = []

    def on_close(closed: ClosedConnection) -> None:
        told.append((closed.id, closed.reason, threading.current_thread().name))
        raise ValueError("odd")

    with proven(server, 2, on_close=on_close, idle_timeout=0.05, maintenance_interval=0.01) as pool:
        lease = pool.get()
        lease.discard()
        use(pool)
        until(lambda: len(told) == 2, "it has expired")
        pool.get().release()
    assert told[:2] == [(1, "error", "MainThread"), (2, "idle", f"shmpool-maintenance:{pool.name}")]
    assert len({number for number, _, _ in told}) == len(told)
    assert sum(record.name == "shmpool.hooks" for record in caplog.records) == len(told)


def test_what_is_told_of_a_connection_that_has_ended(server: ExclusiveServer) -> None:
    told: list[ClosedConnection] = []
    free: list[dict[str, int]] = []

    def on_close(closed: ClosedConnection) -> None:
        told.append(closed)
        free.append(pool._counts())

    with proven(server, 1, on_close=on_close) as pool:
        for _ in range(3):
            with pool.get() as lease:
                peer = lease.peer
        with pool.get() as lease:
            lease.discard()
        (closed,) = told
        assert (closed.id, closed.slot, closed.protocol, closed.ip_version) == (1, 0, "tcp", 4)
        assert (closed.peer, closed.reason, closed.uses) == (peer, "error", 4)
        assert 0 < closed.age < 10
        assert free[0]["empty"] == 1, "its permit is free"


def test_records_of_leases_taken_before_a_fork_are_not_the_childs(server: ExclusiveServer, family: Family) -> None:
    with proven(server, 1, leak_stacks=True, leak_timeout=100) as pool, pool.get() as lease:
        assert pool._maintenance.takers.of(lease._slot, lease.id) is not None
        assert family.fork(lambda: len(pool._maintenance.takers._by_slot)).result() == 0
