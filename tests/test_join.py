"""Pools by name: who begins, who joins, who need not answer, what must be equal, how one leaves, who is kept out.

What must hold: of all processes of a user that make a Pool of one name, exactly one creates it, however many begin at
once and whoever of them is killed meanwhile; one joins whatever the members are busy with; whoever ends, and how, the
others keep every connection; after the last one nothing is left that the next start does not remove.

Not here: every kind of worker against every protocol, and pools on their way by pickle (`test_join_matrix.py`).
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import shmpool
from shmpool import (
    InvalidConfig,
    Pool,
    PoolClosed,
    PoolConfig,
    PoolExhausted,
    PoolNotFound,
    PoolUnreachable,
    SlabCorrupt,
    attach,
    rendezvous,
    slab,
)
from tests import joining
from tests.joining import (
    NOBODY,
    Company,
    Runtime,
    Worker,
    can_copy_descriptors,
    dies_at,
    every_slot,
    fresh_name,
    halves_of,
    identity,
    lease_once,
    make,
    members,
    own_runtime,
    proving,
    segment_of,
    socket_of,
)
from tests.processes import LONG, Child, Counters, Family, Latch, chance, lease_every_slot, until, use
from tests.servers import ExclusiveServer

CAP, CROWD = 3, 16
POINTS = 20  # of death, in the short form; the long one takes every line


@pytest.fixture(scope="module")
def one_server() -> Iterator[ExclusiveServer]:
    with ExclusiveServer() as server:
        yield server


@pytest.fixture
def server(one_server: ExclusiveServer) -> Iterator[ExclusiveServer]:
    """The server of all tests here; each proves that no connection had two users, and leaves none open."""
    yield from proving(one_server)


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    yield from own_runtime(monkeypatch)


@pytest.fixture
def company(server: ExclusiveServer, name: str, runtime: Runtime) -> Iterator[Company]:
    """Ends before the others look whether anything is left."""
    del server, name, runtime
    with Company() as company:
        yield company


@pytest.fixture
def name() -> Iterator[str]:
    """A name of the test's own, which is free at its end."""
    name = fresh_name()
    yield name
    until(lambda: slab.remove_remains(name), "the last member ends", 5)
    assert not segment_of(name).exists()


@pytest.fixture
def settings(server: ExclusiveServer, name: str) -> dict[str, Any]:
    """What all members of the test's pool give."""
    return {"target": server.url, "name": name, "max_connections": CAP, "min_connections": 0}


@pytest.fixture
def only_by_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process copies nothing out of others: a member must answer."""

    monkeypatch.setattr(rendezvous, "holders", lambda _: iter(()))


BESIDE_THE_SEGMENTS = Path(slab.DIRECTORY, f"shmpool-{os.getuid()}.d")
needs_copying = pytest.mark.skipif(not can_copy_descriptors(), reason="the kernel lets nobody copy descriptors here")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


# ---- all at once ---------------------------------------------------------------------------------------------------


class Crowd:
    """CROWD children that make a Pool of one name, all at once."""

    def __init__(self, family: Family, settings: dict[str, Any]) -> None:
        self.go, self.end = family.latch(), family.latch()
        self.joined = Counters(CROWD)
        self.settings = settings
        self.children = [family.fork(self._member, place) for place in range(CROWD)]

    def _member(self, place: int) -> bytes:
        self.go.wait()
        pool = Pool(**self.settings)
        for _ in range(3):
            use(pool)
        self.joined[place] = 1
        self.end.wait()
        pool.leave()
        return identity(pool)

    def await_all(self) -> list[Child]:
        """Until all that were not killed have joined; these."""
        until(lambda: all(each or not child.alive() for each, child in self._places()), "all join")
        for each, child in self._places():
            if not each and child.wait() != "SIGKILL":
                child.result()  # raises what it raised
        return [child for _, child in self._places() if child.alive()]

    def _places(self) -> list[tuple[int, Child]]:
        return list(zip(self.joined.list(), self.children, strict=True))


@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=pytest.mark.skipif(not LONG, reason="long form"))])
def test_many_begin_at_once(server: ExclusiveServer, settings: dict[str, Any], rounds: int) -> None:
    for _ in range(rounds):
        server.reset_stats()
        with Family() as family:
            crowd = Crowd(family, settings)
            crowd.go.set()
            crowd.await_all()
            assert members(settings["name"]) == {child.pid for child in crowd.children}
            crowd.end.set()
            assert len({child.result() for child in crowd.children}) == 1
        assert server.stats()["accepted"] <= CAP
        assert not segment_of(settings["name"]).exists()


def test_many_interpreters_begin_at_once(
    server: ExclusiveServer, company: Company, settings: dict[str, Any], name: str
) -> None:
    go = Latch()
    workers = [company.execute(go) for _ in range(CROWD)]
    for worker in workers:
        worker.await_start()
        worker.tell(make, **settings)
    go.set()
    assert len({worker.answer() for worker in workers}) == 1
    go.close()
    assert members(name) == {worker.pid for worker in workers}
    assert len({frozenset(worker.do(every_slot)) for worker in workers}) == 1
    assert server.stats()["accepted"] == CAP
    for worker in workers:
        worker.tell(joining.end, "exit")
    for worker in workers:
        worker.wait()
        assert worker.stderr == ""
    assert not segment_of(name).exists()


@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=pytest.mark.skipif(not LONG, reason="long form"))])
def test_some_are_killed_while_all_begin(settings: dict[str, Any], runtime: Runtime, rounds: int) -> None:
    """The survivors are members of one pool, all of whose slots can be leased; a newcomer finds the same."""
    dice = chance()
    for _ in range(rounds):
        with Family() as family:
            crowd = Crowd(family, settings)
            victims = dice.sample(crowd.children, dice.randrange(1, CROWD))
            moments = sorted(dice.uniform(0, 0.05) for _ in victims)
            crowd.go.set()
            begun = time.monotonic()
            for moment, victim in zip(moments, victims, strict=True):
                time.sleep(max(0.0, begun + moment - time.monotonic()))  # sleep: the moment is what is random
                victim.kill()
            survivors = crowd.await_all()
            assert members(settings["name"]) == {child.pid for child in survivors}
            with Pool(**settings) as pool:
                lease_every_slot(pool)
                found = identity(pool)
            crowd.end.set()
            assert {child.result() for child in survivors} == {found}
        assert not segment_of(settings["name"]).exists()
        assert_remains_can_be_removed(runtime, [victim.pid for victim in victims])


def test_many_find_the_remains_of_the_dead(settings: dict[str, Any]) -> None:
    """As after the machine's memory ran out and all workers were killed: they start again, all at once."""
    for _ in range(50 if LONG else 3):
        with Family() as family:
            crowd = Crowd(family, settings)
            with Company() as company:
                dead = company.fork()
                first = dead.do(make, **settings)
                dead.kill()
            crowd.go.set()
            assert len(crowd.await_all()) == CROWD
            crowd.end.set()
            (second,) = {child.result() for child in crowd.children}
            assert second != first


@needs_copying
def test_one_stops_at_any_line_while_it_begins(family: Family, settings: dict[str, Any], runtime: Runtime) -> None:
    """It is not dead, it does not go on: the others do."""
    for line in points(family, lambda: Pool(**settings)):
        stopped = stopped_at(line, family, settings)
        with Pool(**settings) as pool:
            lease_every_slot(pool)
        stopped.kill()
        assert_remains_can_be_removed(runtime, [stopped.pid])


@needs_copying
def test_one_stops_at_any_line_while_it_joins_the_dying(
    company: Company, family: Family, settings: dict[str, Any], runtime: Runtime
) -> None:
    """The one member that it met, and that did not answer, has died: what that left is not kept by who only looks."""
    member = silent_member(company, settings)
    lines = points(family, lambda: Pool(**settings))
    member.kill()
    for line in lines:
        member = silent_member(company, settings)
        stopped = stopped_at(line, family, settings)
        member.kill()
        with Pool(**settings) as pool:
            lease_every_slot(pool)
        stopped.kill()
        assert_remains_can_be_removed(runtime, [stopped.pid])


def silent_member(company: Company, settings: dict[str, Any]) -> Worker:
    member = company.fork()
    member.do(make, **settings)
    member.stop()
    return member


def stopped_at(line: int, family: Family, settings: dict[str, Any]) -> Child:
    """A child that stopped in the middle of Pool(...), or was done with it before."""
    child = family.fork(dies_at, line, lambda: Pool(**settings), signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return child


def assert_remains_can_be_removed(runtime: Runtime, pids: list[int]) -> None:
    """What these dead processes left half-made goes with the first start that finds it old."""
    runtime.come_of_age(pids)
    slab.reap()
    assert not halves_of(pids)
    assert not runtime.sockets()


def points(family: Family, act: Callable[[], object]) -> list[int]:
    """The lines of `act` at which to die: in the long form all."""
    lines = family.fork(dies_at, 0, act).result()
    return list(range(1, lines + 1)) if LONG else sorted(chance().sample(range(1, lines + 1), min(POINTS, lines)))


def test_a_creator_is_killed_at_any_line(family: Family, settings: dict[str, Any], runtime: Runtime) -> None:
    """While another process wants the same, and before a third does."""

    def rival() -> None:
        with Pool(**settings) as pool:
            lease_every_slot(pool)

    for line in points(family, lambda: Pool(**settings)):
        creator = family.fork(dies_at, line, lambda: Pool(**settings))
        family.fork(rival).result()
        creator.wait()
        rival()
        assert not segment_of(settings["name"]).exists()
        assert_remains_can_be_removed(runtime, [creator.pid])


@pytest.mark.parametrize("way", ["make", "attach"])
def test_a_newcomer_is_killed_at_any_line(family: Family, settings: dict[str, Any], name: str, way: str) -> None:
    """The members go on: no error, the same connections, no slot lost, no place taken."""
    act = {"make": lambda: Pool(**settings), "attach": lambda: attach(name)}[way]
    turn = family.latch()

    def newcomers() -> list[str]:
        """From a process that never had the pool."""
        turn.wait()
        with Family() as inner:
            return [inner.fork(dies_at, line, act).wait() for line in points(inner, act)]

    unrelated = family.fork(newcomers)
    with Pool(**settings) as pool:
        numbers = lease_every_slot(pool)
        turn.set()
        while unrelated.alive():
            assert lease_every_slot(pool) == numbers
        assert unrelated.result().count("SIGKILL") > 0
        pool.recover()
        assert members(name) == {os.getpid()}
        assert lease_every_slot(pool) == numbers


def test_newcomers_are_killed_at_random_moments(company: Company, settings: dict[str, Any], name: str) -> None:
    """In the middle of calls of C too."""
    dice = chance()
    stop = os.eventfd(0)
    member = company.fork()
    member.do(make, **settings)
    numbers = member.do(every_slot)
    member.tell(joining.use_until, stop)
    for _ in range(1000 if LONG else 20):
        with Family() as family:
            newcomer = family.fork(dies_at, 0, lambda: attach(name))
            time.sleep(dice.uniform(0, 0.008))  # sleep: the moment is what is random
            newcomer.kill()
    os.eventfd_write(stop, 1)
    assert member.answer() > 0
    assert member.do(every_slot) == numbers
    assert members(name) == {member.pid}
    member.do(joining.leave)
    os.close(stop)


@pytest.mark.parametrize("act", ["close", "leave"])
def test_one_that_goes_is_killed_at_any_line(
    family: Family, settings: dict[str, Any], runtime: Runtime, act: str
) -> None:
    """The others have a pool afterwards: the same, or when it was closed a new one."""
    gone: list[int] = []
    with Pool(**settings) as pool:
        lines = points(family, getattr(pool, act))
    for line in lines:
        with Pool(**settings) as pool:
            lease_every_slot(pool)
            going = family.fork(dies_at, line, getattr(pool, act))
            gone.append(going.pid)
            assert going.wait() in ("SIGKILL", "exit 0")
            if act == "leave":
                assert not pool.closed
            with Pool(**settings) as again:
                lease_every_slot(again)
                assert (identity(again) == identity(pool)) is not pool.closed
        assert not segment_of(settings["name"]).exists()
    assert_remains_can_be_removed(runtime, gone)


def test_closing_in_the_middle_of_joins(family: Family, settings: dict[str, Any]) -> None:
    """Whoever joins a pool that another one closes meanwhile gets PoolClosed, or a new pool; nothing else."""
    seed = chance().randrange(1 << 30)
    go = family.latch()

    def member(place: int) -> int:
        dice = random.Random(seed + place)
        go.wait()
        closings = 0
        for _ in range(200 if LONG else 15):
            pool = Pool(**settings)
            with contextlib.suppress(PoolClosed):
                use(pool)
            if dice.random() < 0.3:
                pool.close()
                closings += 1
            pool.leave()
        return closings

    children = [family.fork(member, place) for place in range(5)]
    go.set()
    assert sum(child.result() for child in children) > 0
    assert not segment_of(settings["name"]).exists()


def test_two_pools_of_one_name_in_one_process(settings: dict[str, Any], server: ExclusiveServer) -> None:
    with Pool(**settings) as first, Pool(**settings) as second:
        assert identity(first) == identity(second)
        assert use(first) == use(second)
    assert server.stats()["accepted"] == 1


def test_threads_begin_at_once(settings: dict[str, Any]) -> None:
    barrier = threading.Barrier(8)
    made: list[Pool] = []

    def run() -> None:
        barrier.wait()
        made.append(Pool(**settings))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({identity(pool) for pool in made}) == 1
    for pool in made:
        pool.leave()


# ---- members that are silent ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_by_asking")
def test_the_only_member_sits_in_c_with_the_interpreters_lock(
    company: Company, settings: dict[str, Any], name: str
) -> None:
    block = os.eventfd(0)
    member = company.fork()
    member.do(make, **settings)
    number = member.do(lease_once)
    member.tell(joining.hold_the_interpreter, block)
    call = Path(f"/proc/{member.pid}/syscall")
    until(lambda: call.read_text().split()[1:2] == [hex(block)], "it sits in read()")
    with Pool(**settings) as made, attach(name) as attached:
        assert use(made) == use(attached) == number
        assert not member.answered()
        os.eventfd_write(block, 1)
        member.answer()
        assert member.do(lease_once) == number
        member.end()
    os.close(block)


@pytest.mark.usefixtures("only_by_asking")
def test_the_creator_was_killed(company: Company, settings: dict[str, Any], name: str) -> None:
    creator, member = company.fork(), company.fork()
    creator.do(make, **settings)
    member.do(joining.attach, name)
    numbers = creator.do(every_slot)
    creator.kill()
    with attach(name) as pool:
        assert lease_every_slot(pool) == numbers
        member.kill()
        assert lease_every_slot(pool) == numbers


@needs_copying
def test_the_only_member_is_stopped(company: Company, settings: dict[str, Any], name: str) -> None:
    member = company.fork()
    member.do(make, **settings)
    numbers = member.do(every_slot)
    member.stop()
    with attach(name) as pool:
        assert lease_every_slot(pool) == numbers
        member.resume()
        assert member.do(every_slot) == numbers
        member.end()


@needs_copying
@pytest.mark.parametrize("who", ["both", "the child", "the parent"])
def test_members_have_forked_and_not_used_the_pool_since(
    company: Company, settings: dict[str, Any], name: str, who: str
) -> None:
    parent = company.fork()
    parent.do(make, **settings, maintenance_interval=math.inf)
    number = parent.do(lease_once)
    child = parent.do(joining.fork_one)
    assert parent.do(joining.count) == 1  # nobody answers
    if who == "the parent":
        os.kill(child, signal.SIGKILL)
        until(lambda: Path(f"/proc/{child}/stat").read_text().split()[2] == "Z", "it ends")
    elif who == "the child":
        child = parent.do(joining.fork_one)
        os.kill(parent.pid, signal.SIGSTOP)
    with attach(name) as pool:
        assert use(pool) == number
        parent.kill()


@pytest.mark.usefixtures("only_by_asking")
def test_maintenance_uses_the_pool_after_a_fork(company: Company, settings: dict[str, Any], name: str) -> None:
    """So its process answers newcomers again, whatever the program does."""
    parent = company.fork()
    parent.do(make, **settings)
    number = parent.do(lease_once)
    parent.do(joining.fork_one)
    with attach(name) as pool:
        assert use(pool) == number


@needs_copying
def test_the_socket_was_removed_by_hand(company: Company, settings: dict[str, Any], name: str) -> None:
    member = company.fork()
    member.do(make, **settings)
    number = member.do(lease_once)
    with attach(name) as pool:
        socket_of(pool).unlink()
    with attach(name) as pool:
        assert use(pool) == number
        member.end()


@pytest.mark.usefixtures("only_by_asking")
@pytest.mark.parametrize("why", ["removed", "stopped"])
def test_nobody_can_be_reached(company: Company, settings: dict[str, Any], name: str, why: str) -> None:
    member = company.fork()
    member.do(make, **settings)
    with attach(name) as pool:
        where = socket_of(pool)
    if why == "removed":
        where.unlink()
    else:
        member.stop()
    with pytest.raises(PoolUnreachable) as caught:
        attach(name, timeout=0.2)
    assert caught.value.pids == (member.pid,)
    assert caught.value.waited >= 0.2
    assert caught.value.__cause__ is not None
    assert str(member.pid) in str(caught.value)
    assert "see that one of them uses it, or stop them" in str(caught.value)


def test_no_place_is_left(company: Company, settings: dict[str, Any], name: str) -> None:
    settings["max_workers"] = 2
    first, second = company.fork(), company.fork()
    first.do(make, **settings)
    second.do(make, **settings)
    acts: list[Callable[[], Pool]] = [lambda: Pool(**settings), lambda: attach(name)]
    for act in acts:
        with pytest.raises(PoolExhausted, match="worker limit"):
            act()
    second.kill()
    with attach(name) as pool:
        use(pool)
        first.end()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_an_answering_thread_and_forks(settings: dict[str, Any], family: Family) -> None:
    """A process with a named pool has one thread more, and none directly after a fork, on either side."""

    def child() -> list[int]:
        before = threads()
        use(pool)
        return [before, threads()]

    settings["maintenance_interval"] = math.inf
    alone = threads()
    with Pool(settings["target"], min_connections=0, maintenance_interval=math.inf) as unnamed:
        use(unnamed)
        assert threads() == alone
    with Pool(**settings) as pool:
        assert threads() == alone + 1
        assert family.fork(child).result() == [1, 2]
        assert threads() == alone
        use(pool)
        assert threads() == alone + 1
    assert threads() == alone


def test_the_threads_of_a_process(settings: dict[str, Any], family: Family) -> None:
    """One that maintains, and one that answers when the pool has a name: also after a fork, when it was used; in the
    parent maintenance uses it."""

    def child() -> list[int]:
        before = threads()
        use(pool)
        return [before, threads()]

    alone = threads()
    with Pool(settings["target"], min_connections=0) as unnamed:
        use(unnamed)
        assert threads() == alone + 1
    assert threads() == alone
    with Pool(**settings) as pool:
        assert threads() == alone + 2
        assert family.fork(child).result() == [1, 3]
        until(lambda: threads() == alone + 2, "maintenance goes on")
    assert threads() == alone


# ---- what must be equal --------------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "target": "tcp://127.0.0.1:1",
    "backlog": 77,
    "max_connections": 5,
    "min_connections": 1,
    "max_idle_connections": 1,
    "resize_limit": 77,
    "idle_timeout": 77.0,
    "max_lifetime": 777.0,
    "socket_timeout": 7.0,
    "max_waiters": 77,
    "max_workers": 7,
    "clear_udp_buffer": False,
}
OWN: dict[str, Any] = {
    "connection_timeout": 7.0,
    "get_timeout": 7.0,
    "alive_bypass": 0.07,
    "dial_retries": 7,
    "dial_backoff": (0.07, 0.7),
    "prewarm_retries": 7,
    "when_down": "wait",
    "tcp_nodelay": False,
    "tcp_keepalive": (7, 7, 7),
    "send_buffer_size": 7777,
    "receive_buffer_size": 7777,
    "maintenance_interval": 7.0,
    "health_check": print,
    "health_check_interval": 7.0,
    "health_check_timeout": 0.7,
    "leak_timeout": 7.0,
    "leak_action": "revoke",
    "leak_stacks": True,
    "local_cache_size": 7,
    "udp_clear_timeout": 0.07,
    "udp_clear_max_packets": 7,
    "on_created": print,
    "on_borrow": print,
    "on_return": print,
    "on_close": print,
    "on_leak": print,
    "stats": False,
}


def test_every_setting_is_shared_or_own() -> None:
    names = {setting.name for setting in fields(PoolConfig)}
    assert names == {*OTHER, *OWN, "name", "dial", "listening", "acceptor"}


def test_each_shared_setting_that_differs_is_named_in_one_error(settings: dict[str, Any], name: str) -> None:
    with Pool(**settings):
        with pytest.raises(InvalidConfig) as caught:
            Pool(**{**settings, **OTHER})
        assert sorted(error.field for error in caught.value.errors) == sorted(OTHER)
        with pytest.raises(InvalidConfig) as caught:
            attach(name, **OTHER)
        assert sorted(error.field for error in caught.value.errors) == sorted(OTHER)
        for setting, value in {**OTHER, "listening": True}.items():
            with pytest.raises(InvalidConfig, match=setting) as caught:
                Pool(**{**settings, setting: value})
            assert caught.value.field == setting
            assert name in str(caught.value)
            assert repr(value) in str(caught.value)
        del settings["target"]
        with pytest.raises(InvalidConfig) as caught:
            Pool(**settings, dial=lambda _: socket.socket())
        assert sorted(error.field for error in caught.value.errors) == ["dial", "target"]


def test_own_settings_may_differ(settings: dict[str, Any], name: str) -> None:
    with Pool(**settings) as pool, Pool(**settings, **OWN) as other, attach(name, **OWN) as attached:
        assert identity(pool) == identity(other) == identity(attached)
        for setting, value in OWN.items():
            assert getattr(other.config, setting) == getattr(attached.config, setting) == value


def test_attach_takes_the_pools_settings(settings: dict[str, Any], name: str, server: ExclusiveServer) -> None:
    settings.update({key: OTHER[key] for key in OTHER if key not in settings}, get_timeout=float("inf"))
    with Pool(**settings, dial_backoff=(0.5, 2.0)) as pool, attach(name) as other:
        assert other.config == pool.config
        assert use(other) == use(pool)
    assert server.stats()["accepted"] == 1


def test_attach_and_dials(server: ExclusiveServer, name: str) -> None:
    with Pool(dial=lambda _: server.connect(), name=name, max_connections=CAP, min_connections=0) as pool:
        with pytest.raises(InvalidConfig, match="dial=") as caught:
            attach(name)
        assert caught.value.field == "dial"
        with pytest.raises(InvalidConfig):
            attach(name, dial="this is none")
        with attach(name, dial=lambda _: server.connect()) as other:
            assert use(other) == use(pool)
            assert len(lease_every_slot(other)) == CAP


def test_attach_has_hooks_of_its_own(settings: dict[str, Any], name: str) -> None:
    seen: list[str] = []
    with (
        Pool(**settings, on_borrow=lambda _: seen.append("maker")) as pool,
        attach(name, on_borrow=lambda _: seen.append("borrow"), on_return=lambda _: seen.append("return")) as other,
    ):
        use(other)
        assert seen == ["borrow", "return"]
        use(pool)
        assert seen[2:] == ["maker"]


def test_attach_to_nobody(company: Company, settings: dict[str, Any], name: str, runtime: Runtime) -> None:
    with pytest.raises(PoolNotFound, match=name):
        attach(name)
    member = company.fork()
    first = member.do(make, **settings)
    assert runtime.sockets() == [first.hex()]
    member.kill()
    with pytest.raises(PoolNotFound, match=name):
        attach(name)
    with Pool(**settings) as pool:
        assert identity(pool) != first
        assert runtime.sockets() == [identity(pool).hex()]
        lease_every_slot(pool)


def test_pools_without_a_name_are_not_attached_to(server: ExclusiveServer) -> None:
    with Pool(server.url, min_connections=0) as pool, pytest.raises(InvalidConfig, match="without a name") as caught:
        attach(pool.name)
    assert caught.value.field == "name"


@pytest.mark.parametrize("wrong", ["", "a/b", ".hidden", "x" * 65])
def test_impossible_names(wrong: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        attach(wrong)
    assert caught.value.field == "name"


# ---- leaving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["exit", "exception", "os._exit", "SIGTERM", "SIGKILL"])
def test_whoever_ends(company: Company, settings: dict[str, Any], name: str, runtime: Runtime, how: str) -> None:
    """The creator ends, then the last one. Whoever lives has every connection; what a killed one leaves, the next
    start removes."""
    creator, other = company.execute(), company.execute()
    numbers = (creator.do(make, **settings), creator.do(every_slot))[1]
    slab_id = other.do(joining.attach, name)
    creator.end(how)
    assert other.do(every_slot) == numbers
    other.end(how)
    if how in ("exit", "exception"):
        assert not segment_of(name).exists()
        assert not runtime.sockets()
    with Pool(**settings) as pool:
        assert identity(pool) != slab_id
        assert not lease_every_slot(pool) & numbers
        assert runtime.sockets() == [identity(pool).hex()]
    wrote = {creator.stderr.strip().rpartition("\n")[2], other.stderr.strip().rpartition("\n")[2]}
    assert wrote == {"tests.joining.Unhandled" if how == "exception" else ""}


def test_leaving(company: Company, settings: dict[str, Any], name: str) -> None:
    member = company.fork()
    pool = Pool(**settings)
    numbers = lease_every_slot(pool)
    member.do(joining.attach, name)
    lease = pool.get()
    pool.leave()
    pool.leave()
    assert pool.closed
    for act in (pool.get, pool.try_get, pool.recover, pool.maintain, pool.__reduce__):
        with pytest.raises(PoolClosed):
            act()
    with pytest.raises(shmpool.LeaseExpired):
        lease.release()
    assert pool not in shmpool.pools()
    assert members(name) == {member.pid}
    left = member.do(every_slot)
    assert len(left & numbers) == CAP - 1  # what was leased is retired
    member.do(joining.leave)
    assert not segment_of(name).exists()


def test_a_with_block_leaves_a_named_pool(company: Company, settings: dict[str, Any]) -> None:
    with Pool(**settings) as pool:
        member = company.fork(pool)
        number = use(pool)
    assert pool.closed
    assert member.do(lease_once) == number
    member.do(joining.leave)


def test_a_with_block_closes_an_unnamed_pool(company: Company, server: ExclusiveServer) -> None:
    with Pool(server.url, min_connections=0) as pool:
        member = company.fork(pool)
        use(pool)
    with pytest.raises(PoolClosed):
        member.do(lease_once)


def test_one_closes_for_all(company: Company, settings: dict[str, Any], name: str, runtime: Runtime) -> None:
    closer = company.fork()
    first = closer.do(make, **settings)
    pool = attach(name)
    number = use(pool)
    closer.do(joining.close)
    assert pool.closed
    with pytest.raises(PoolClosed):
        pool.get()
    assert not segment_of(name).exists()
    with pytest.raises(PoolNotFound):
        attach(name)
    with Pool(**settings) as again:
        assert identity(again) != first
        assert use(again) != number
        assert runtime.sockets() == [identity(again).hex()]
    pool.leave()


def test_dropping_the_object_leaves(settings: dict[str, Any], name: str) -> None:
    pool = Pool(**settings)
    use(pool)
    assert pool in shmpool.pools()
    del pool
    assert not segment_of(name).exists()


def test_recover_takes_back_what_the_dead_held(company: Company, settings: dict[str, Any], name: str) -> None:
    member = company.fork()
    member.do(make, **settings)
    with attach(name) as pool:
        member.do(joining.hold)
        member.do(joining.hold)
        assert pool.recover() == 0
        member.kill()
        assert pool.recover() == 2


def test_what_was_left_is_not_closed(settings: dict[str, Any], name: str) -> None:
    with Pool(**settings) as stays:
        leaver = attach(name)
        number = use(leaver)
        leaver.leave()
        assert "left" in repr(leaver)
        with pytest.raises(PoolClosed, match="has left") as caught:
            leaver.get()
        assert caught.value.left
        assert leaver.close() == 0
        leaver.leave()
        assert not stays.closed
        with attach(name) as again:
            assert use(again) == number
    with pytest.raises(PoolClosed, match=r"is closed|has left"):
        leaver.get()


# ---- other users ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(company: Company) -> Iterator[Worker]:
    """A worker of another user, with a runtime directory of its own."""
    where = tempfile.mkdtemp(prefix="run-")
    os.chown(where, NOBODY, NOBODY)
    worker = company.fork()
    worker.do(joining.become_nobody)
    worker.do(joining.set_runtime, where)
    yield worker
    worker.close()
    for path in Path(where).rglob("*"):
        if not path.is_dir():
            path.unlink()
    with contextlib.suppress(FileNotFoundError):
        Path(where, "shmpool").rmdir()
    Path(where).rmdir()


@needs_root
def test_users_have_names_of_their_own(nobody: Worker, settings: dict[str, Any], name: str) -> None:
    with Pool(**settings) as pool:
        with pytest.raises(PoolNotFound):
            nobody.do(joining.attach, name)
        assert nobody.do(make, **settings) != identity(pool)
    with pytest.raises(PoolNotFound):
        attach(name)
    nobody.do(joining.leave)


@needs_root
def test_users_get_nothing_by_asking_each_other(nobody: Worker, settings: dict[str, Any], runtime: Runtime) -> None:
    """Not even where the directory lets them come to the socket."""
    with Pool(**settings) as pool:
        assert joining.knock(None, str(socket_of(pool)))[1] > 0
        with pytest.raises(PermissionError):
            nobody.do(joining.knock, str(socket_of(pool)))
        for path in (runtime.path, socket_of(pool).parent):
            path.chmod(0o711)
        socket_of(pool).chmod(0o666)
        assert nobody.do(joining.knock, str(socket_of(pool))) == (b"", 0)
        socket_of(pool).parent.chmod(0o700)
    nobody.do(make, **settings)
    assert joining.knock(None, nobody.do(joining.where)) == (b"", 0)
    nobody.do(joining.leave)


@needs_root
@needs_copying
@pytest.mark.parametrize("copyable", [True, False])
def test_what_the_kernel_allows_those_who_are_not_root(
    nobody: Worker, company: Company, settings: dict[str, Any], name: str, copyable: bool
) -> None:
    """A stopped member's descriptors are copied if the kernel lets one look into it; else the error says who it is."""
    member = company.fork()
    member.do(joining.become_nobody, copyable=copyable)
    member.do(joining.set_runtime, nobody.do(joining.get_runtime))
    member.do(make, **settings)
    number = member.do(lease_once)
    member.stop()
    if copyable:
        nobody.do(joining.attach, name)
        assert nobody.do(lease_once) == number
        nobody.do(joining.leave)
    else:
        with pytest.raises(PoolUnreachable, match=f"process {member.pid}"):
            nobody.do(joining.attach, name, timeout=0.2)
    member.resume()
    member.do(joining.leave)


@needs_root
@pytest.mark.usefixtures("only_by_asking")
def test_another_user_who_answers_is_not_believed(
    nobody: Worker, company: Company, settings: dict[str, Any], name: str
) -> None:
    member = company.fork()
    member.do(make, **settings)
    there = Path(member.do(joining.where))
    false = Path(nobody.do(joining.get_runtime), "false")
    nobody.do(joining.impersonate, str(false))
    false.rename(there)
    with pytest.raises(PoolUnreachable, match=f"user {NOBODY}"):
        attach(name, timeout=0.1)
    there.unlink()
    member.end()


@needs_root
@pytest.mark.parametrize("act", ["make", "attach"])
def test_another_user_has_the_name_of_the_segment(
    nobody: Worker, settings: dict[str, Any], name: str, act: str
) -> None:
    nobody.do(joining.squat, str(segment_of(name)), 0o666)
    try:
        with pytest.raises(SlabCorrupt, match=f"user {NOBODY}"):
            Pool(**settings) if act == "make" else attach(name)
        assert segment_of(name).exists()
    finally:
        segment_of(name).unlink()


def test_the_segment_lets_others_in(settings: dict[str, Any], name: str) -> None:
    with Pool(**settings):
        segment_of(name).chmod(0o660)
        acts: list[Callable[[], Pool]] = [lambda: Pool(**settings), lambda: attach(name)]
        for act in acts:
            with pytest.raises(SlabCorrupt, match="0660"):
                act()


# ---- the runtime directory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("mode", "0755"),
        pytest.param("owner", f"user {NOBODY}", marks=needs_root),
        ("link", "symbolic link|Not a directory|Too many levels"),
        ("dangling link", "symbolic link|Not a directory|Too many levels"),
        ("file", "Not a directory"),
    ],
)
def test_somebody_was_there_before(settings: dict[str, Any], runtime: Runtime, wrong: str, says: str) -> None:
    there = runtime.path / "shmpool"
    if wrong.endswith("link"):
        there.symlink_to(runtime.path / "elsewhere")
        if wrong == "link":
            (runtime.path / "elsewhere").mkdir(0o700)
    elif wrong == "file":
        there.touch()
    else:
        there.mkdir(0o755 if wrong == "mode" else 0o700)
        os.chown(there, NOBODY if wrong == "owner" else -1, -1)
    with pytest.raises(InvalidConfig, match=says) as caught:
        Pool(**settings)
    assert str(there) in str(caught.value)
    assert "XDG_RUNTIME_DIR" in str(caught.value)
    there.rmdir() if there.is_dir() and not there.is_symlink() else there.unlink()
    with Pool(**settings) as pool:
        assert socket_of(pool).parent == there


@pytest.mark.parametrize("value", [None, "", "relative", "absent", pytest.param("foreign", marks=needs_root)])
def test_without_a_runtime_directory(
    settings: dict[str, Any], runtime: Runtime, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    """The one beside the segments serves."""
    if value is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", value if value in ("", "relative") else str(runtime.path / value))
    if value == "foreign":
        (runtime.path / value).mkdir(0o700)
        os.chown(runtime.path / value, NOBODY, -1)
    with Pool(**settings) as pool, attach(pool.name) as other:
        assert socket_of(pool).parent == BESIDE_THE_SEGMENTS
        assert use(pool) == use(other)
    assert not socket_of(pool).exists()


@pytest.mark.usefixtures("only_by_asking")
def test_members_with_different_environments_meet(
    company: Company, settings: dict[str, Any], runtime: Runtime, name: str
) -> None:
    member = company.execute(XDG_RUNTIME_DIR=str(runtime.path / "absent"))
    member.do(make, **settings)
    number = member.do(lease_once)
    with attach(name) as pool:
        assert socket_of(pool).parent == BESIDE_THE_SEGMENTS
        assert use(pool) == number
        member.end()


@pytest.mark.usefixtures("only_by_asking")
def test_a_long_path(
    company: Company, settings: dict[str, Any], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that no socket's address has room for is none the worse; one beyond what a slab keeps is refused."""
    there = runtime.path / ("a" * 100) / ("b" * 100)
    there.mkdir(0o700, parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(there))
    member = company.fork()
    member.do(make, **settings)
    with Pool(**settings) as pool:
        assert len(str(socket_of(pool))) > 200
        assert member.do(lease_once) == use(pool)
        member.end()
    beyond = there / ("c" * 200) / ("d" * 100)
    beyond.mkdir(0o700, parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(beyond))
    with pytest.raises(InvalidConfig, match="more than 511 bytes"):
        Pool(**settings)


def test_a_sweep_touches_only_what_is_dead(settings: dict[str, Any], runtime: Runtime) -> None:
    """Sockets to which no slab belongs go; those of living pools, half-made ones and what is not ours stay."""
    strangers = [runtime.path / "shmpool" / each for each in ("notes", "0123", f".{secrets.token_hex(8)}")]
    dead = runtime.path / "shmpool" / secrets.token_hex(16)
    with Pool(**settings) as pool:
        for path in strangers:
            path.touch()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(str(dead))
        assert str(dead) in rendezvous.sweep({identity(pool)})
        assert runtime.sockets() == sorted([socket_of(pool).name, *(path.name for path in strangers)])
        assert rendezvous.sweep(set()) == []  # a socket that somebody listens on is alive, whatever the list says
    for path in strangers:
        path.unlink()


# Leaving with multiprocessing ---------------------------------------------------------------------------------------

LEAVES = """
import sys
{first}
{second}
from multiprocessing import get_context
pool = shmpool.Pool(sys.argv[1], name=sys.argv[2], max_connections=1, min_connections=0, maintenance_interval=1e6)

def use():
    pool.get().release()

child = get_context("fork").Process(target=use)
child.start()
child.join()
print([event.pid == child.pid for event in pool.events().events if event.kind in ("left", "died")])
print([event.kind for event in pool.events().events if event.kind in ("left", "died")], child.exitcode)
"""


@pytest.mark.parametrize(
    "order", [("import shmpool", "import multiprocessing.util"), ("import multiprocessing.util", "import shmpool")]
)
def test_a_child_of_multiprocessing_leaves(settings: dict[str, Any], order: tuple[str, str]) -> None:
    """Its finalizers run, and no atexit: whichever of the two modules was loaded first."""
    program = LEAVES.format(first=order[0], second=order[1])
    command = [sys.executable, "-c", program, settings["target"], settings["name"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[True]\n['left'] 0\n", "")
