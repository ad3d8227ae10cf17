"""What the life of a connection must not have: sixteen faults and more that pools were seen to have, each with the test
that finds it, over several processes where that says something.

Most tests hold the pool and the server against each other: `proven` pools end with every slot leased once, `audit`
with all accounts in agreement.

Not here: what each part does in detail (test_health, test_leaks, test_maintenance, test_steering), outages
(test_outage), all of it at once (test_day).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import math
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from shmpool import DialError, DialRequest, LeaseExpired, Pool, PoolClosed, PooledConnection, PoolExhausted, Protocol
from shmpool.dialing import dial_target
from tests.books import Ledger, audit, settle
from tests.joining import Company, Mine, fresh_name
from tests.processes import (
    Child,
    Counters,
    Family,
    Latch,
    chance,
    descriptors,
    lease_every_slot,
    proven,
    states,
    until,
    use,
)
from tests.servers import ExclusiveServer, exclusive_use

BY_HAND: dict[str, Any] = {"maintenance_interval": math.inf}
SEGMENTS = Path("/dev/shm")
SOON_S = 5.0  # far less than what a faulty pool would take, far more than a busy machine does


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def fill(pool: Pool, count: int) -> None:
    """Open so many connections, idle in this process's cache."""
    leases = [pool.get() for _ in range(count)]
    for lease in leases:
        lease.release()


# ---- a waiter that sleeps its whole timeout although a connection is idle --------------------------------------------

TRIES, WAITERS, PATIENCE_S = 40, 2, 20.0


def holding(pool: Pool, family: Family, way: str) -> Callable[[], object]:
    """Keep the only connection from all others; returns what ends that."""

    def hold() -> None:
        lease = pool.get()
        held.set()
        threading.Event().wait()
        del lease

    def drop() -> None:
        with pytest.warns(ResourceWarning, match="dropped without release"):
            leases.clear()

    def die() -> None:
        child.kill()
        family.forget(child)

    def resize() -> None:
        pool.resize(2)
        leases.pop().release()
        pool.resize(1)

    if way == "resume":
        pool.pause()
        return pool.resume
    if way == "death":
        held = family.latch()
        child = family.fork(hold)
        held.wait()
        return die
    leases = [pool.get()]
    if way == "drop":
        return drop
    return resize if way == "resize" else cast("Callable[[], object]", getattr(leases.pop(), way))


@pytest.mark.parametrize("way", ["release", "discard", "drop", "death", "resize", "resume"])
def test_no_waiter_sleeps_its_time_away(server: ExclusiveServer, family: Family, way: str) -> None:
    """Breaks when whatever frees a connection does not wake who waits, or wakes one who has gone; every second try
    comes while the waiters are about to sleep."""
    random = chance()
    turns = Counters(1 + WAITERS)

    def wait_often(place: int) -> float:
        slowest = 0.0
        for turn in range(1, TRIES + 1):
            until(lambda turn=turn: turns[0] == turn, "the turn")  # type: ignore[misc]
            begun = time.monotonic()
            use(pool, timeout_s=PATIENCE_S)
            slowest = max(slowest, time.monotonic() - begun)
            turns[place] = turn
        return slowest

    with proven(server, 2, every_slot=False, **BY_HAND) as pool:
        pool.resize(1)
        waiters = [family.fork(wait_often, place) for place in range(1, 1 + WAITERS)]
        for turn in range(1, TRIES + 1):
            free = holding(pool, family, way)
            turns[0] = turn
            if turn % 2:
                until(lambda: pool.stats().waiting == WAITERS, "all wait")
            else:
                spin(random.uniform(0, 0.003))
            free()
            until(lambda turn=turn: turns.list() == [turn] * (1 + WAITERS), "all were served", SOON_S)  # type: ignore[misc]
        slowest = max(waiter.result() for waiter in waiters)
        print(f"the slowest of {TRIES * WAITERS} waits: {slowest * 1e3:.1f} ms")
        assert slowest < SOON_S


# ---- a call that does not wait, and finds nothing although connections are idle --------------------------------------


@pytest.mark.parametrize("cache", [0, 8])
def test_a_call_that_does_not_wait_finds_what_is_idle(server: ExclusiveServer, family: Family, cache: int) -> None:
    """Four processes have at most four of five connections, so one is idle at every moment: in a free-list, in
    another's cache, on its way from one hand to the next. Breaks when a search may miss it."""

    def take(turns: int) -> None:
        for turn in range(turns):
            lease = pool.try_get() if turn % 2 else pool.get(timeout=0)
            if turn % 3 == 0:
                os.sched_yield()
            lease.release()

    with proven(server, 5, local_cache_size=cache, **BY_HAND) as pool:
        fill(pool, 5)
        for child in [family.fork(take, 3000) for _ in range(4)]:
            child.result()
        assert audit(pool, {"successes": 5 + 4 * 3000}, server).created == 5


def test_what_is_idle_in_a_stopped_process_is_found(server: ExclusiveServer, family: Family) -> None:
    """Breaks when a search leaves another's cache alone, or asks its owner."""

    def keep() -> None:
        fill(pool, 3)
        idle.set()
        threading.Event().wait()

    idle = family.latch()
    with proven(server, 3, **BY_HAND) as pool:
        child = family.fork(keep)
        idle.wait()
        child.stop()
        leases = [pool.try_get(), pool.get(timeout=0), pool.try_get()]
        with pytest.raises(PoolExhausted):
            pool.try_get()
        for lease in leases:
            lease.release()
        assert server.stats()["accepted"] == 3
        child.resume()


# ---- max_connections=1, sixteen first callers, sixteen dials ---------------------------------------------------------


def together(family: Family, go: Latch, processes: int, threads: int, do: Callable[[], object]) -> list[Any]:
    """Run `do` in so many processes and threads of each, all beginning at the latch; what they returned."""

    def run() -> list[Any]:
        found: list[Any] = []
        errors: list[BaseException] = []

        def one() -> None:
            try:
                go.wait()
                found.append(do())
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)

        runners = [threading.Thread(target=one) for _ in range(threads)]
        for runner in runners:
            runner.start()
        ready[place] = 1
        for runner in runners:
            runner.join()
        if errors:
            raise errors[0]
        return found

    ready = Counters(processes)
    children = []
    for place in range(processes):  # noqa: B007 - the children have it
        children.append(family.fork(run))
    until(lambda: all(ready.list()), "all are ready")
    go.set()
    return [result for child in children for result in child.result()]


@pytest.mark.parametrize("slow_s", [0.0, 0.3])
@pytest.mark.parametrize(("processes", "threads"), [(1, 16), (4, 4), (16, 1)])
def test_sixteen_first_callers_dial_once(
    server: ExclusiveServer, family: Family, processes: int, threads: int, slow_s: float
) -> None:
    """Breaks when a caller dials before it has the permit, or gives a dial up that another goes on with."""
    dials = Counters(64)

    def dial(_request: object) -> Any:
        dials[os.getpid() % 64] += 1
        time.sleep(slow_s)  # sleep: a server far away
        return server.connect()

    go = family.latch()
    with Pool(dial=dial, max_connections=1, min_connections=0) as pool:
        numbers = together(family, go, processes, threads, lambda: use(pool))
        assert numbers == [1] * 16
        assert sum(dials.list()) == 1
        assert audit(pool, {"successes": 16}, server).dial_attempts == 1
        assert server.stats()["max_open"] == 1
        assert states(pool) == {"idle": 1}


# ---- counters that go negative, or drift, after an eviction, a leak, a late return -----------------------------------

_rude: list[bool] = []  # of this process: whether its borrow hook raises
_upstream: list[ExclusiveServer] = []  # the server, for events in forked processes


class Rude(Exception):
    """What a hook raises."""


def refuse_when_rude(_conn: object) -> None:
    if _rude:
        raise Rude


def lease(mine: Mine, ledger: Ledger) -> PooledConnection:
    leased = ledger.call(mine.pool.get, timeout=SOON_S)
    assert leased is not None, states(mine.pool)
    return leased


def give_back(mine: Mine, ledger: Ledger) -> None:
    lease(mine, ledger).release()
    with lease(mine, ledger) as leased:
        exclusive_use(leased.socket, "books:1")


def give_back_twice(mine: Mine, ledger: Ledger) -> None:
    for first, then in itertools.product(("release", "discard"), repeat=2):
        leased = lease(mine, ledger)
        getattr(leased, first)()
        with pytest.raises(LeaseExpired):
            getattr(leased, then)()


def fail_in_the_block(mine: Mine, ledger: Ledger) -> None:
    with pytest.raises(Rude), lease(mine, ledger):
        raise Rude


def forget(mine: Mine, ledger: Ledger) -> None:
    leased = lease(mine, ledger)
    assert leased.id
    with pytest.warns(ResourceWarning, match="dropped without release"):
        del leased


def ask_in_vain(mine: Mine, ledger: Ledger) -> None:
    held = [lease(mine, ledger) for _ in range(mine.pool.max_connections)]
    assert ledger.call(mine.pool.try_get) is None
    assert ledger.call(mine.pool.get, timeout=0) is None
    assert ledger.call(mine.pool.get, timeout=0.01) is None
    for leased in held:
        leased.release()


def evict_the_idle(mine: Mine, ledger: Ledger) -> None:
    ask_in_vain(mine, ledger)
    assert mine.pool.evict() == mine.pool.max_connections


def evict_the_leased(mine: Mine, ledger: Ledger) -> None:
    first, second, third = (lease(mine, ledger) for _ in range(3))
    assert mine.pool.evict(connection_id=first.id) == 1
    assert mine.pool.evict(leased=True) >= 3
    assert mine.pool.evict(peer=second.peer) >= 3
    first.release()
    second.discard()
    with pytest.raises(LeaseExpired):
        first.release()
    third.release()


def come_back_late(mine: Mine, ledger: Ledger) -> None:
    """The lease has been taken away when its holder gives it back, in each way to do that."""

    def leave_the_block(leased: PooledConnection) -> None:
        with leased:
            revoke(leased)

    def revoke(leased: PooledConnection) -> None:
        (word,) = [word for slot, word, *_ in mine.pool._overdue(0.0, True) if slot == leased._slot]
        assert mine.pool._revoke(leased._slot, word)

    for late in ("release", "discard"):
        revoke(leased := lease(mine, ledger))
        with pytest.raises(LeaseExpired):
            getattr(leased, late)()
    with pytest.raises(LeaseExpired):
        leave_the_block(lease(mine, ledger))
    revoke(leased := lease(mine, ledger))
    del leased


def drain_and_resume(mine: Mine, ledger: Ledger) -> None:
    leased = lease(mine, ledger)
    assert mine.pool.drain(timeout=0) == 1
    assert ledger.call(mine.pool.get) is None
    leased.release()
    assert mine.pool.drain(timeout=SOON_S) == 0
    mine.pool.resume()


def be_refused_by_a_hook(mine: Mine, ledger: Ledger) -> None:
    _rude.append(True)
    for get in (mine.pool.get, mine.pool.try_get):
        with pytest.raises(Rude):
            ledger.call(get)
    _rude.clear()


def meet_the_closed(mine: Mine, ledger: Ledger) -> None:
    give_back(mine, ledger)
    _upstream[0].close_connections(rst=True)
    give_back(mine, ledger)


def find_nobody(mine: Mine, ledger: Ledger) -> None:
    mine.pool.evict()
    _upstream[0].refuse()
    assert ledger.call(mine.pool.get) is None
    assert ledger.call(mine.pool.try_get) is None
    _upstream[0].listen()
    give_back(mine, ledger)


def die_with_leases(mine: Mine, ledger: Ledger) -> None:
    def die() -> None:
        kept = mine.pool.get(), mine.pool.get()
        os._exit(len(kept))

    with Family() as family:
        assert family.fork(die).wait() == "exit 2"
    ledger["successes"] += 2
    mine.pool.recover()


def die_in_a_dial(mine: Mine, ledger: Ledger) -> None:
    """When the connection stands at the server, and nowhere else."""

    def die() -> None:
        def dial(*args: Any) -> Any:
            os._exit(dial_target(*args).fileno() > 0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shmpool.pool.dial_target", dial)
            mine.pool.get()

    mine.pool.evict()
    with Family() as family:
        assert family.fork(die).wait() == "exit 1"
    ledger["unborn"] += 1
    mine.pool.recover()


def die_in_the_queue(mine: Mine, ledger: Ledger) -> None:
    held = [lease(mine, ledger) for _ in range(mine.pool.max_connections)]
    with Family() as family:
        child = family.fork(mine.pool.get)
        until(lambda: mine.pool.stats().waiting == 1, "it waits")
        child.kill()
    for leased in held:
        leased.release()
    mine.pool.recover()
    assert mine.pool.stats().waiting == 0


EVENTS: list[Callable[[Mine, Ledger], None]] = [
    give_back,
    give_back_twice,
    fail_in_the_block,
    forget,
    ask_in_vain,
    evict_the_idle,
    evict_the_leased,
    come_back_late,
    drain_and_resume,
    be_refused_by_a_hook,
    meet_the_closed,
    find_nobody,
    die_with_leases,
    die_in_a_dial,
    die_in_the_queue,
]


def happen(mine: Mine, event: Callable[[Mine, Ledger], None]) -> Ledger:
    ledger = Ledger()
    event(mine, ledger)
    return ledger


def test_the_books_balance_after_every_event(server: ExclusiveServer) -> None:
    """Three processes; what one of them has opened another ends. Breaks when a way out of a lease, or an end of a
    connection, is counted twice, in the wrong place or not at all."""
    random = chance()
    ledger = Ledger()
    settings = {"alive_bypass": 0, "dial_backoff": (0.001, 0.01), "on_borrow": refuse_when_rude, **BY_HAND}
    _upstream[:] = [server]
    with Company() as company, proven(server, 4, **settings) as pool:
        members = [company.fork(pool) for _ in range(3)]
        for _ in range(2):
            for event in random.sample(EVENTS, len(EVENTS)):
                ledger += random.choice(members).do(happen, event)
                try:
                    audit(pool, ledger, server)
                except AssertionError as error:
                    raise AssertionError(f"after {event.__name__}: {error}") from error


# ---- an idle count that includes closed connections, and descriptors that stay open after expiry ---------------------

TICK_S = 0.03


def sockets() -> int:
    return sum(what.startswith("socket:") for what in descriptors().values())


@pytest.mark.parametrize("end", ["idle", "lifetime", "evicted", "broken", "resized"])
def test_what_has_ended_is_nowhere_counted_and_nowhere_open(server: ExclusiveServer, family: Family, end: str) -> None:
    """Three processes have a copy of each connection. Breaks when only the process that ends it lets go of it, or the
    count of idle ones is kept beside the connections."""

    def have_copies() -> None:
        fill(pool, 4)
        copied[0] += 1
        until(lambda: sockets() == mine + left, "the copies are closed")

    settings: dict[str, Any] = {
        "idle": {"idle_timeout": 1.0},
        "lifetime": {"max_lifetime": 1.0},
        "broken": {"health_check_interval": 0.05},
    }.get(end, {})
    left = int(end == "resized")
    copied = Counters(1)
    with proven(server, 4, every_slot=False, maintenance_interval=TICK_S, **settings) as pool:
        mine = sockets()
        fill(pool, 4)
        children = []
        for count in range(1, 3):
            children.append(family.fork(have_copies))
            until(lambda count=count: copied[0] == count, "it has them")  # type: ignore[misc]
        if end == "evicted":
            assert pool.evict() == 4
        elif end == "resized":
            pool.resize(1)
        elif end == "broken":
            server.close_connections()
        until(lambda: states(pool).get("idle", 0) == left, "they have ended", SOON_S)
        stats = audit(pool)
        assert (stats.idle, stats.open) == (left, left)
        assert stats.closed[end] == stats.created - left
        for child in children:
            child.result()
        until(lambda: sockets() == mine + left, "no copy is here")
        until(lambda: server.stats()["open"] == left, "they have ended at the server", SOON_S)


# ---- a connection lent while the health checker uses it; a check that runs longer than its timeout -------------------


def test_no_connection_is_lent_while_it_is_checked(server: ExclusiveServer, family: Family) -> None:
    """Checks and leases of three processes meet on the same connections all the time; the server sees two users at
    once. Breaks when a check uses a connection that it does not have, or keeps one that was taken from it."""

    def check(conn: PooledConnection) -> bool:
        return exclusive_use(conn.socket, f"check:{conn.id}", uses=3) > 0

    def work(place: int) -> None:
        random = chance()
        while checks() < 300:
            with pool.get() as leased:
                exclusive_use(leased.socket, f"work:{place}")
            time.sleep(random.uniform(0, 0.02))  # sleep: about as long as an idle one waits for its check

    def checks() -> int:
        return int(pool._snapshot()["totals"]["health_checks"])

    settings: dict[str, Any] = {
        "health_check_interval": 0.01,
        "health_check_timeout": 0.009,
        "maintenance_interval": 0.001,
    }
    with proven(server, 4, **settings, health_check=check) as pool:
        fill(pool, 4)
        for child in [family.fork(work, place) for place in range(3)]:
            child.result()
        figures = server.stats()
        assert figures["violations"] == 0, figures["violation_log"]
        assert figures["by_prefix"]["check"] > 0
        assert figures["by_prefix"]["work"] > 0
        audit(pool, server=server)


@pytest.mark.parametrize("way", ["recv", "loop", "sleep"])
def test_no_check_outlives_its_time(server: ExclusiveServer, family: Family, way: str) -> None:
    """Breaks when the timeout is looked at after the check, or a check that hangs keeps a slot, caller or thread."""
    hung: list[float] = []

    def check(conn: PooledConnection) -> bool:
        if conn.id != 1:
            return True
        hung.append(time.monotonic())
        try:
            if way == "recv":
                conn.socket.settimeout(None)
                return conn.socket.recv(1) == b""
            while way == "loop":
                pass
            for _ in range(6000):
                time.sleep(0.01)  # sleep: the check hangs, with a breath now and then
            return True
        finally:
            hung.append(time.monotonic())

    settings: dict[str, Any] = {
        "health_check_interval": 0.06,
        "health_check_timeout": 0.05,
        "maintenance_interval": TICK_S,
    }
    with proven(server, 2, min_connections=1, health_check=check, **settings) as pool:
        until(lambda: hung, "the check has begun")
        used = [family.fork(use, pool, "", SOON_S) for _ in range(3)]
        assert all(number > 1 for number in [child.result() for child in used])
        until(lambda: len(hung) == 2, "the check has ended", SOON_S)
        print(f"ended {hung[1] - hung[0] - 0.05:.3f} s after its time")
        until(lambda: pool.stats().closed["unhealthy"] == 1, "its connection has ended", SOON_S)
        until(lambda: "1" not in server.stats()["connections"], "at the server too", SOON_S)
    assert not pool_threads()


# ---- a closed peer's connection lent again; one unhealthy connection and the next get() dials ------------------------


def pool_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shmpool-")]


def lease_and_use(mine: Mine, count: int) -> list[int]:
    """Have so many connections at once, use each; the server's numbers of them."""
    leases = [mine.pool.get(timeout=SOON_S) for _ in range(count)]
    numbers = [exclusive_use(leased.socket, f"{os.getpid()}:{leased.id}") for leased in leases]
    for leased in leases:
        leased.release()
    return numbers


def spoil(server: ExclusiveServer, how: str, number: int) -> None:
    spoilt = server.send_garbage(number) if how == "bytes" else server.close_connections(number, rst=how == "RST")
    assert spoilt == 1


@pytest.mark.parametrize("bypass_s", [0.0, 0.02])
@pytest.mark.parametrize("how", ["FIN", "RST", "bytes"])
def test_what_the_peer_has_closed_is_not_lent_again(server: ExclusiveServer, how: str, bypass_s: float) -> None:
    """In whichever process it lies, whether it was used there a moment ago or is met for the first time. Breaks when a
    connection is lent without a look, or with one at what the pool remembers of it."""
    random = chance()
    spoilt = 0
    with Company() as company, proven(server, 4, alive_bypass=bypass_s, **BY_HAND) as pool:
        members = [company.fork(pool) for _ in range(3)]
        for _ in range(30):
            numbers = random.choice(members).do(lease_and_use, 4)
            chosen = random.sample(numbers, random.randint(1, 4))
            # Leases read the coarse clock, which may be a tick behind.
            until(lambda: min(slot.since or 0 for slot in pool.stats().slots) > bypass_s + 0.02, "idle for a while")
            for number in chosen:
                spoil(server, how, number)
            spoilt += len(chosen)
            assert not {*random.choice(members).do(lease_and_use, 4)} & {*chosen}
        stats = audit(pool, server=server)
        reason = "dirty" if how == "bytes" else "broken"
        assert {name: count for name, count in stats.closed.items() if count} == {reason: spoilt}


@pytest.mark.parametrize("how", ["FIN", "RST", "bytes"])
def test_beside_an_unhealthy_connection_the_healthy_ones_are_lent(server: ExclusiveServer, how: str) -> None:
    """Whichever of four it is, the other three are leased without a dial, by any process. Breaks when a search ends
    with the first connection that it finds unfit."""
    random = chance()
    with Company() as company, proven(server, 4, alive_bypass=0, **BY_HAND) as pool:
        members = [company.fork(pool) for _ in range(3)]
        for turn in range(24):
            numbers = random.choice(members).do(lease_and_use, 4)
            spoil(server, how, numbers[turn % 4])
            dialled = pool.stats().dial_attempts
            found = random.choice(members).do(lease_and_use, 3 if turn % 2 else 1)
            assert {*found} <= {*numbers} - {numbers[turn % 4]}
            assert pool.stats().dial_attempts == dialled


# ---- close() that waits for a leaked lease, or leaves a thread behind; dropped pools that leave anything -------------


def tasks() -> int:
    """Threads of this process, by the kernel's account; one that Python has joined may be on it for a moment longer."""
    return len(os.listdir("/proc/self/task"))


def thorough(**settings: Any) -> dict[str, Any]:
    """Settings of a pool that has every thread and every descriptor that a pool can have."""
    return {
        "max_connections": 4,
        "min_connections": 2,
        "name": fresh_name(),
        "maintenance_interval": TICK_S,
        "health_check": lambda conn: exclusive_use(conn.socket, "check:1") > 0,
        "health_check_interval": 0.02,
        "health_check_timeout": 0.01,
        "leak_stacks": True,
        **settings,
    }


def dial_for_a_waiter(pool: Pool) -> None:
    """Let a thread dial for a call that waits."""
    with pool.get(), pool.get(), pool.get():
        pass


@pytest.mark.parametrize("holder", ["here", "in a thread", "elsewhere", "stopped", "dead"])
def test_close_waits_for_no_leaked_lease_and_leaves_no_thread(
    server: ExclusiveServer, family: Family, holder: str
) -> None:
    """Breaks when close() waits for leases that nobody asked it to wait for, or for their leak_timeout; when it returns
    before its threads have ended; when a connection that is returned afterwards stays open."""
    held, go = family.latch(), family.latch()

    def hold() -> None:
        leased = pool.get()
        held.set()
        go.wait()
        leased.release()

    strays = tasks() - threading.active_count()  # of other tests
    pool = Pool(server.url, **thorough(leak_timeout=300))
    pool.wait_ready()
    dial_for_a_waiter(pool)
    assert pool_threads()
    thread = threading.Thread(target=hold)
    child = None
    if holder == "in a thread":
        thread.start()
        held.wait()
    elif holder == "here":
        leased = pool.get()
    else:
        child = family.fork(hold)
        held.wait()
    if child is not None and holder in ("stopped", "dead"):
        child.stop() if holder == "stopped" else child.kill()
    begun = time.monotonic()
    try:
        assert pool.close() == int(holder != "dead")
        assert time.monotonic() - begun < SOON_S
        assert not pool_threads()
        until(lambda: tasks() - threading.active_count() <= strays, "no thread is left", SOON_S)
    finally:
        go.set()
        if holder == "in a thread":
            thread.join()
        elif holder == "here":
            leased.release()
        elif child is not None and holder != "dead":
            child.resume()
            child.result()
    until(lambda: server.stats()["open"] == 0, "every connection is closed")


def remains(pid: int | str = "self") -> tuple[int, int]:
    """What a process has: descriptors, threads."""
    return len(descriptors(pid)), len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("end", ["dropped", "dropped with leases", "in a cycle", "left", "closed"])
def test_pools_that_are_dropped_leave_nothing(server: ExclusiveServer, family: Family, end: str, named: bool) -> None:
    """In the process that made them, and in a child that used them. Breaks when anything keeps a pool that nobody has:
    a thread, a table, a connection; or when the end of the object is not the end of what it held."""

    def live() -> None:
        pool = Pool(server.url, **thorough(**({} if named else {"name": None})))
        pool.wait_ready()
        dial_for_a_waiter(pool)
        leases = [pool.get(), pool.get()]
        if end != "dropped with leases":
            for leased in leases:
                leased.release()
        if end == "in a cycle":
            leases.append(cast("Any", (pool, leases)))
        elif end in ("left", "closed"):
            pool.leave() if end == "left" else pool.close()

    def live_often() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of the leases
            live()
            gc.collect()
            before = remains()
            for _ in range(10):
                live()
            gc.collect()
            until(lambda: gc.collect() is not None and sum(remains()) <= sum(before), f"{before} as before", SOON_S)

    segments = {path.name for path in SEGMENTS.glob(f"shmpool-{os.getuid()}-*")}
    live_often()
    family.fork(live_often).result()
    until(lambda: server.stats()["open"] == 0, "every connection is closed")
    mine = {path.name for path in SEGMENTS.glob(f"shmpool-{os.getuid()}-*")} - segments
    assert not {name for name in mine if f"-{os.getpid()}-" in name or "-join-" in name}


# ---- a hook that raises, and thereby loses a slot or a waiter for ever -----------------------------------------------


class Armed:
    """A hook that raises as often as it is told, in whichever process; else it does nothing."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self._times = Counters(1)

    def __call__(self, _: object) -> None:
        if self._times[0]:
            self._times[0] -= 1
            raise self.error

    def arm(self, times: int = 1) -> None:
        self._times[0] = times

    def has_raised(self) -> bool:
        return not self._times[0]


@pytest.fixture(params=[Rude("odd"), SystemExit(7)], ids=["exception", "exit"])
def armed(request: pytest.FixtureRequest) -> Armed:
    return Armed(request.param)


def raised_for_a_caller(armed: Armed, call: Callable[[], object]) -> None:
    """Who called is told: by what the hook raised, or by the DialError that it caused."""
    try:
        call()
    except DialError as error:
        assert error.__cause__ is armed.error  # noqa: PT017 - either of the two is right
        assert isinstance(armed.error, Exception)
    except (Rude, SystemExit) as error:
        assert type(error) is type(armed.error)  # noqa: PT017
    else:
        pytest.fail("nothing was raised")
    assert armed.has_raised()


def waiter(pool: Pool, family: Family) -> Child:
    """A process that waits for a connection, uses it and ends."""
    child = family.fork(use, pool, "", SOON_S)
    until(lambda: pool.stats().waiting == 1, "it waits")
    return child


@pytest.mark.parametrize("place", ["get", "try_get", "queue", "maintain"])
def test_on_created_raises_for_who_wanted_the_connection(
    server: ExclusiveServer, family: Family, armed: Armed, place: str
) -> None:
    """Breaks when the refused connection keeps its slot, or its waiter is not told."""
    settings = {"dial_backoff": (0.001, 0.001), **BY_HAND}
    with proven(server, 2, on_created=armed, min_connections=2, **settings) as pool:
        if place != "queue":
            armed.arm()
            raised_for_a_caller(armed, getattr(pool, place))
        else:  # a thread of its own dials for who waits, as long as something may come back
            with pool.get():
                armed.arm()
                raised_for_a_caller(armed, lambda: pool.get(timeout=SOON_S))
                assert use(pool) == 3
        assert pool.stats().closed["refused"] == 1
        assert pool.stats().in_use == 0
        assert family.fork(use, pool, "", SOON_S).result() != (2 if place == "queue" else 1)
        audit(pool, server=server)


def test_on_created_raises_in_maintenance(server: ExclusiveServer, armed: Armed, caplog: Any) -> None:
    """The log is told, and the next round opens what is missing. Breaks when the thread ends, or gives up."""
    armed.arm(3)
    settings: dict[str, Any] = {"dial_backoff": (0.001, 0.002), "maintenance_interval": TICK_S}
    with proven(server, 2, on_created=armed, min_connections=2, **settings) as pool:
        pool.wait_ready(SOON_S)
        assert pool.stats().closed["refused"] == 3
        audit(pool, server=server)
    assert str(armed.error) in caplog.text or type(armed.error).__name__ in caplog.text


@pytest.mark.parametrize("place", ["new", "warm", "another's", "handed over", "try_get"])
def test_on_borrow_raises_for_the_borrower(server: ExclusiveServer, family: Family, armed: Armed, place: str) -> None:
    """Breaks when the lease that nobody got keeps its slot, or a waiter behind it is forgotten."""
    with proven(server, 1, on_borrow=armed, **BY_HAND) as pool:
        if place == "warm":
            fill(pool, 1)
        elif place == "another's":
            family.fork(use, pool).result()
        if place == "handed over":
            leased = pool.get()
            first = waiter(pool, family)
            second = family.fork(use, pool, "", SOON_S)
            until(lambda: pool.stats().waiting == 2, "both wait")
            armed.arm()
            leased.release()
            with pytest.raises((Rude, SystemExit)):
                first.result()
            assert second.result() == 2
        else:
            armed.arm()
            raised_for_a_caller(armed, pool.try_get if place == "try_get" else pool.get)
        assert family.fork(use, pool, "", SOON_S).result() == 2
        assert {reason: n for reason, n in pool.stats().closed.items() if n} == {"refused": 1}
        audit(pool, server=server)


@pytest.mark.parametrize("place", ["release", "block"])
def test_on_return_raises_for_who_returns(server: ExclusiveServer, family: Family, armed: Armed, place: str) -> None:
    """Breaks when the connection that was not taken back keeps its slot from who waits for it."""

    def give_it_back() -> None:
        with pool.get() as leased:
            next_one.append(waiter(pool, family))
            armed.arm()
            if place == "release":
                leased.release()

    next_one: list[Child] = []
    with proven(server, 1, on_return=armed, **BY_HAND) as pool:
        raised_for_a_caller(armed, give_it_back)
        assert next_one[0].result() == 2
        audit(pool, server=server)


@pytest.mark.parametrize("place", ["discard", "evict", "broken", "expiry", "death", "close"])
def test_on_close_raises_for_the_log(
    server: ExclusiveServer, family: Family, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And for nobody else: the connection has ended, and its permit is free. Breaks when what it raises reaches a
    caller who has not asked, or comes before the permit is free."""
    hook = Armed(Rude("odd"))
    settings = {"idle_timeout": 0.2, "maintenance_interval": TICK_S} if place == "expiry" else BY_HAND
    with proven(server, 1, on_close=hook, alive_bypass=0, every_slot=place != "close", **settings) as pool:
        leased = pool.get()
        hook.arm()
        if place == "discard":
            next_one = waiter(pool, family)
            leased.discard()
            assert next_one.result() == 2
        elif place == "death":
            leased.release()
            child = family.fork(pool.get)
            child.wait()
            assert use(pool, timeout_s=SOON_S) == 2
        else:
            leased.release()
        if place == "evict":
            assert pool.evict() == 1
        elif place == "broken":
            server.close_connections()
            assert use(pool) == 2
        elif place == "close":
            assert pool.close() == 0
        until(hook.has_raised, "it has raised", SOON_S)
        until(lambda: "shmpool.hooks" in {record.name for record in caplog.records}, "the log is told")
        (record,) = [record for record in caplog.records if record.name == "shmpool.hooks"]
        assert record.levelno == logging.ERROR
        assert record.exc_info is not None
        assert record.exc_info[1] is hook.error
        if place != "close":
            audit(pool, server=server)


@pytest.mark.parametrize("action", ["report", "revoke"])
def test_on_leak_raises_for_the_log(
    server: ExclusiveServer, family: Family, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Breaks when the lease is reported again for it, or not taken away."""
    hook = Armed(Rude("odd"))
    hook.arm(2)
    settings: dict[str, Any] = {"leak_timeout": 0.05, "leak_action": action, "maintenance_interval": TICK_S}
    with proven(server, 1, on_leak=hook, **settings) as pool:
        leased = pool.get()
        until(lambda: "shmpool.hooks" in {record.name for record in caplog.records}, "the log is told", SOON_S)
        if action == "revoke":
            assert family.fork(use, pool, "", SOON_S).result() == 2
            with pytest.raises(LeaseExpired):
                leased.release()
        else:
            leased.release()
        assert [record.levelname for record in caplog.records if record.name == "shmpool.hooks"] == ["ERROR"]
        assert not hook.has_raised()
        hook.arm(0)
        audit(pool, server=server)


@pytest.mark.parametrize("place", ["get", "try_get", "queue", "maintain"])
def test_a_dial_that_raises_anything(server: ExclusiveServer, family: Family, armed: Armed, place: str) -> None:
    """It is as a hook: what it raises is told to who wanted the connection. Breaks when only OSErrors are expected."""

    def dial(request: object) -> socket.socket:
        armed(request)
        return server.connect()

    settings = {"min_connections": 2, "dial_backoff": (0.001, 0.001), **BY_HAND}
    with Pool(dial=dial, max_connections=2, **settings) as pool:
        if place != "queue":
            armed.arm()
            raised_for_a_caller(armed, getattr(pool, place))
        else:
            with pool.get():
                armed.arm()
                raised_for_a_caller(armed, lambda: pool.get(timeout=SOON_S))
        assert family.fork(use, pool, "", SOON_S).result() >= 1
        assert len(lease_every_slot(pool, SOON_S)) == 2
        audit(pool, server=server)


# ---- stale datagrams reach the next borrower because there were more than the limit ----------------------------------

LIMIT = 5


class Datagrams:
    """A UDP server that sends what it is told to, to whom it has heard of."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(SOON_S)
        self.url = f"udp://127.0.0.1:{self._socket.getsockname()[1]}"

    def hear(self) -> Any:
        """The address of the next that sends something."""
        return self._socket.recvfrom(100)[1]

    def send(self, address: Any, *texts: str) -> None:
        for text in texts:
            self._socket.sendto(text.encode(), address)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def datagrams() -> Iterator[Datagrams]:
    with contextlib.closing(Datagrams()) as datagrams:
        yield datagrams


def ask_datagrams(pool: Pool, text: str) -> str:
    """Lease, send, and what comes first."""
    with pool.get() as leased:
        leased.socket.sendall(text.encode())
        return str(leased.socket.recv(100).decode())


@pytest.mark.parametrize("when", ["leased", "idle"])
@pytest.mark.parametrize("late", [1, LIMIT, LIMIT + 1, 20 * LIMIT])
def test_no_stale_datagram_reaches_the_next_borrower(
    datagrams: Datagrams, family: Family, late: int, when: str
) -> None:
    """Neither here nor in another process, a moment after or later. Breaks when what is beyond the limit stays, when
    the first of them is read and the rest believed gone, or when a connection used a moment ago is not looked at."""
    settings = {"udp_clear_max_packets": LIMIT, "udp_clear_timeout": SOON_S, "min_connections": 0, **BY_HAND}
    with Pool(datagrams.url, max_connections=1, **settings) as pool:
        for elsewhere in (False, True, False):
            with pool.get() as leased:
                was = leased.id
                leased.socket.sendall(b"hello")
                address = datagrams.hear()
                if when == "leased":
                    datagrams.send(address, *["late"] * late)
            if when == "idle":
                datagrams.send(address, *["late"] * late)
            child = family.fork(ask_datagrams, pool, "fresh") if elsewhere else None
            thread = None if elsewhere else ThreadPoolExecutor(1)
            answer = thread.submit(ask_datagrams, pool, "fresh") if thread else None
            address = datagrams.hear()
            datagrams.send(address, "fresh")
            assert (child.result() if child else answer.result() if answer else "") == "fresh"
            if thread:
                thread.shutdown()
            with pool.get() as leased:
                assert (leased.id == was) == (late <= LIMIT), "one that cannot be emptied is retired"
        audit(pool)
        assert pool.stats().closed["dirty"] == (0 if late <= LIMIT else 3)


# ---- UDP is wanted, and idle TCP connections hold all permits: a timeout instead of an eviction ----------------------


@pytest.mark.parametrize("where", ["here", "in the caller", "in a stopped process", "in a dead process"])
@pytest.mark.parametrize("waits", [True, False])
def test_udp_is_had_although_idle_tcp_has_all_permits(
    server: ExclusiveServer, family: Family, where: str, waits: bool
) -> None:
    """And the other way round. Breaks when only what fits is counted as free, or when the permit of a connection can be
    had by those only in whose process it lies."""

    def dial(request: DialRequest) -> socket.socket:
        if request.protocol is Protocol.UDP:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.connect(server.address)
            return sock
        return server.connect()

    def keep_two() -> None:
        fill(pool, 2)
        idle.set()
        threading.Event().wait()

    def want(protocol: Protocol) -> list[str]:
        if where == "in the caller":
            fill(pool, 2)
        with get(protocol) as first, get(protocol) as second:
            return [str(first.protocol), str(second.protocol)]

    def get(protocol: Protocol) -> PooledConnection:
        return pool.get(SOON_S, protocol) if waits else pool.try_get(protocol)

    idle = family.latch()
    with Pool(dial=dial, max_connections=2, min_connections=0, **BY_HAND) as pool:
        if where == "here":
            fill(pool, 2)
        elif where != "in the caller":
            child = family.fork(keep_two)
            idle.wait()
            child.stop() if where == "in a stopped process" else child.kill()
        assert family.fork(want, Protocol.UDP).result() == ["udp", "udp"]
        until(lambda: server.stats()["open"] == 0, "both TCP connections have ended")
        assert pool.stats().closed["evicted"] == 2
        if where != "in the caller":
            assert family.fork(want, Protocol.TCP).result() == ["tcp", "tcp"]
            assert pool.stats().closed["evicted"] == 4
        assert server.stats()["max_open"] <= 2
        audit(pool)


# ---- a closed pool that still hands out a connection when one finally comes; requests on a closed pool not counted ---


@pytest.mark.parametrize("comes_by", ["a dial", "a return", "a return elsewhere"])
def test_a_closed_pool_hands_nothing_out(server: ExclusiveServer, family: Family, comes_by: str) -> None:
    """Callers of two processes wait when the pool is closed, and only then a connection is there: none of them gets it,
    and it ends. Breaks when a connection is handed over without a look at the pool."""
    closed = family.latch()
    held = family.latch()

    def dial(_request: object) -> socket.socket:
        sock = server.connect()
        if comes_by == "a dial" and not closed.is_set():
            held.set()
            closed.wait()
        return sock

    def wait() -> str:
        try:
            pool.get(timeout=SOON_S)
        except PoolClosed:
            return "refused"
        return "lent"

    def hold() -> None:
        leased = pool.get()
        held.set()
        closed.wait()
        leased.release()

    callers = 2
    pool = Pool(dial=dial, max_connections=1, min_connections=0, connection_timeout=60, **BY_HAND)
    if comes_by == "a return":
        leased = pool.get()
    elif comes_by == "a return elsewhere":
        holder = family.fork(hold)
        held.wait()
    children = [family.fork(together_in_threads, wait, callers) for _ in range(2)]
    waiting = 2 * callers - (comes_by == "a dial")
    until(lambda: pool.stats().waiting == waiting, "all wait")
    if comes_by == "a dial":
        held.wait()
    assert pool.close() == 1
    closed.set()
    if comes_by == "a return":
        leased.release()
    for child in children:
        assert child.result() == ["refused"] * callers
    if comes_by == "a return elsewhere":
        holder.result()
    until(lambda: server.stats()["open"] == 0, "the connection has ended")
    settle(pool)
    stats = pool.stats()
    assert stats.open == 0
    assert stats.gets == 2 * callers + (comes_by != "a dial")
    assert stats.refused + stats.late_refusals == 2 * callers


def together_in_threads(do: Callable[[], str], threads: int) -> list[str]:
    with ThreadPoolExecutor(threads) as executor:
        return [each.result() for each in [executor.submit(do) for _ in range(threads)]]


def test_calls_of_a_closed_pool_are_counted(server: ExclusiveServer, family: Family) -> None:
    """In the process that closed it, in one that used it, in one that never did, and in one that has left it. Breaks
    when a call that is refused at the door is not counted, or counted where nobody finds it."""

    def call(ways: list[str]) -> None:
        for way in ways:
            with pytest.raises(PoolClosed):
                getattr(pool, way)()

    def use_then_call(leave: bool) -> None:
        use(pool)
        if leave:
            pool.leave()
            call(ways)
        used.set()
        closed.wait()
        if not leave:
            call(ways)

    ways = ["get", "try_get", "get_tcp", "get_ipv4", "get"]
    closed = family.latch()
    with proven(server, 2, every_slot=False, **BY_HAND) as pool:
        for leave in (False, True):
            used = family.latch()
            child = family.fork(use_then_call, leave)
            used.wait()
        counted = pool.stats().gets
        assert counted == 2 + len(ways)
        pool.close()
        call(ways)
        family.fork(call, ways).result()
        closed.set()
        for child in family.children:
            child.result()
        stats = pool.stats()
        assert stats.gets == counted + 3 * len(ways)
        assert stats.refused + stats.late_refusals == 4 * len(ways)
        assert stats.successes == 2
