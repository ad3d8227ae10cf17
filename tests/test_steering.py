"""Steering a pool from outside: this process is never a member of the pools that it steers here, its children are."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shmpool import (
    InvalidConfig,
    Pool,
    PoolClosed,
    PoolError,
    PoolExhausted,
    PoolNotFound,
    PoolTimeout,
    SlabCorrupt,
    _core,
    inspect,
    slab,
    steering,
)
from shmpool.steering import Unattended
from tests.members import Members, WakesAtTheSecondLook
from tests.processes import Counters, Family, chance, until, use
from tests.servers import ExclusiveServer
from tests.test_inspector import segment

# pause and resume ---------------------------------------------------------------------------------------------------


def test_a_paused_pool_gives_nothing_out_until_it_is_resumed(members: Callable[..., Members], name: str) -> None:
    few = members(max_connections=1)
    _, gives_back = few.holder()
    waiter = few.waiter()
    assert steering.pause(name)
    assert not steering.pause(name)
    assert few.stats().state == "paused"
    gives_back.set()
    until(lambda: few.stats().idle == 1, "the lease is given back")
    late = few.fork(lambda pool: pool.get(timeout=0.1))
    with pytest.raises(PoolTimeout) as caught:
        late.result()
    assert caught.value.paused
    with pytest.raises(PoolExhausted, match="paused"):
        few.fork(lambda pool: pool.try_get()).result()
    stats = few.stats()
    assert (stats.idle, stats.waiting) == (1, 1)
    assert waiter.alive()
    assert steering.resume(name)
    assert waiter.result() >= 1
    assert not steering.resume(name)
    assert few.stats().state == "open"


def test_pausing_while_many_work_loses_nobody(members: Callable[..., Members], name: str) -> None:
    many = members(max_connections=2)
    gone, stop = Counters(4), many.family.latch()

    def work(pool: Pool, place: int) -> None:
        while not stop.is_set():
            use(pool, f"worker:{place}")
            gone[place] += 1

    workers = [many.fork(work, place) for place in range(4)]
    until(lambda: min(gone.list()) > 10, "all are at work")
    for _ in range(20):
        steering.pause(name)
        until(lambda: many.stats().in_use == 0, "what was leased is given back")
        before = gone.list()
        steering.resume(name)
        until(lambda before=before: all(map(int.__gt__, gone.list(), before)), "all go on")  # type: ignore[misc]
    stop.set()
    for worker in workers:
        worker.result()


# drain --------------------------------------------------------------------------------------------------------------


def test_drain_finishes_what_is_under_way_and_refuses_the_rest(
    members: Callable[..., Members], name: str, server: ExclusiveServer
) -> None:
    one = members(max_connections=1)
    _, gives_back = one.holder()
    waiter = one.waiter()
    assert steering.drain(name, 0.01) == 1
    with pytest.raises(PoolClosed) as caught:
        one.fork(lambda pool: pool.get()).result()
    assert caught.value.draining
    gives_back.set()
    assert waiter.result() >= 1
    assert steering.drain(name) == 0
    assert (one.stats().state, one.stats().open) == ("draining", 0)
    until(lambda: server.stats()["open"] == 0, "the connections have ended")
    assert steering.resume(name)
    assert one.fork(use).result() >= 1


def test_drain_ends_what_is_idle(members: Callable[..., Members], name: str) -> None:
    idle = members(max_connections=3, min_connections=3)
    idle.fork(lambda pool: pool.wait_ready()).result()
    idle.keeper()
    until(lambda: idle.stats().idle == 3, "three are idle")
    assert steering.drain(name) == 0
    assert idle.stats().open == 0
    assert idle.stats().closed["shutdown"] == 3
    assert steering.resume(name)
    until(lambda: idle.stats().idle == 3, "the minimum is open again")


def test_drain_where_nobody_has_maintenance(members: Callable[..., Members], name: str) -> None:
    """Nobody ends the idle connection, and nobody waits for that."""
    alone = members(max_connections=1, maintenance_interval=math.inf)
    _, gives_back = alone.holder()
    gives_back.set()
    until(lambda: alone.stats().idle == 1, "it is given back")
    assert steering.drain(name, 30) == 0
    assert alone.stats().idle == 1


def test_drain_ends_when_the_pool_is_resumed(members: Callable[..., Members], name: str) -> None:
    one = members(max_connections=1)
    one.holder()
    drained: list[int] = []
    thread = threading.Thread(target=lambda: drained.append(steering.drain(name, math.inf)))
    thread.start()
    until(lambda: one.stats().state == "draining", "it drains")
    steering.resume(name)
    thread.join(30)
    assert drained == [1]


def test_drain_does_not_wait_for_the_dead(members: Callable[..., Members], name: str) -> None:
    two = members(max_connections=1)
    two.keeper()
    holder, _ = two.holder()
    holder.kill()
    assert steering.drain(name) == 0
    assert two.stats().closed["owner_died"] == 1


# resize -------------------------------------------------------------------------------------------------------------


def test_a_larger_cap_serves_who_waits(members: Callable[..., Members], name: str) -> None:
    small = members(max_connections=1, resize_limit=3)
    small.holder()
    waiters = [small.waiter(), small.waiter()]
    assert steering.resize(name, 3) == 1
    assert len({waiter.result() for waiter in waiters}) >= 1
    assert small.stats().max_connections == 3
    assert small.stats().in_use == 1


def test_a_smaller_cap_is_reached_and_never_exceeded_again(
    members: Callable[..., Members], name: str, server: ExclusiveServer
) -> None:
    large = members(max_connections=4)
    _, gives_back = large.holder(4)
    waiter = large.waiter()
    assert steering.resize(name, 2) == 4
    assert large.stats().open == 4, "a lease is left alone"
    assert waiter.alive()
    gives_back.set()
    assert waiter.result() >= 1
    until(lambda: large.stats().open <= 2, "the surplus ends")
    until(lambda: server.stats()["open"] <= 2, "also for the server")
    server.reset_stats()
    for worker in [large.fork(lambda pool: [use(pool) for _ in range(50)]) for _ in range(4)]:
        worker.result()
    assert server.stats()["max_open"] <= 2
    assert large.stats().closed["resized"] >= 2


def test_idle_surplus_ends_by_itself(members: Callable[..., Members], name: str) -> None:
    large = members(max_connections=4)
    _, gives_back = large.holder(4)
    gives_back.set()
    until(lambda: large.stats().idle == 4, "all are idle")
    steering.resize(name, 1)
    until(lambda: large.stats().open == 1, "three of them end")


def test_resizing_while_many_work(members: Callable[..., Members], name: str, server: ExclusiveServer) -> None:
    random, many = chance(), members(max_connections=3, resize_limit=6)
    gone, stop = Counters(6), many.family.latch()

    def work(pool: Pool, place: int) -> None:
        while not stop.is_set():
            use(pool, f"worker:{place}")
            gone[place] += 1

    workers = [many.fork(work, place) for place in range(6)]
    until(lambda: min(gone.list()) > 0, "all are at work")
    for _ in range(40):
        cap = random.randint(1, 6)
        steering.resize(name, cap)
        until(lambda cap=cap: many.stats().open <= cap, "the cap is kept")  # type: ignore[misc]
        server.reset_stats()
        before = sum(gone.list())
        until(lambda before=before: sum(gone.list()) > before + 20, "work goes on")  # type: ignore[misc]
        assert server.stats()["max_open"] <= cap
    stop.set()
    for worker in workers:
        worker.result()
    assert server.stats()["violations"] == 0


@pytest.mark.parametrize(
    ("cap", "said"),
    [
        (1, r"can have 2 \(min_connections\) to 4 connections"),
        (5, r"can have 2 \(min_connections\) to 4 connections"),
        (0, "must be a whole number from 1"),
        (-1, "must be a whole number from 1"),
        (2.0, "must be a whole number from 1"),
        ("2", "must be a whole number from 1"),
        (True, "must be a whole number from 1"),
        (None, "must be a whole number from 1"),
        (1 << 70, "can have 2"),
    ],
)
def test_caps_that_cannot_be(server: ExclusiveServer, name: str, cap: Any, said: str) -> None:
    with Pool(server.url, name=name, max_connections=3, min_connections=2, resize_limit=4) as pool:
        with pytest.raises(InvalidConfig, match=said) as caught:
            steering.resize(name, cap)
        assert (caught.value.field, caught.value.value) == ("max_connections", cap)
        with pytest.raises(InvalidConfig) as by_member:
            pool.resize(cap)
        assert str(by_member.value) == str(caught.value)
        assert pool.max_connections == 3


def dial_nowhere(_: object) -> Any:
    raise ConnectionRefusedError("nowhere")


def test_the_limits_of_a_pool_with_a_dial_of_its_own(name: str) -> None:
    with Pool(dial=dial_nowhere, name=name, max_connections=2, min_connections=0) as pool:
        assert steering.resize(name, 4) == 2
        assert pool.max_connections == 4


# evict --------------------------------------------------------------------------------------------------------------


def test_evict_all_that_is_idle(members: Callable[..., Members], name: str) -> None:
    some = members(max_connections=3)
    some.holder()
    _, gives_back = some.holder(2)
    gives_back.set()
    until(lambda: some.stats().idle == 2, "two are idle")
    assert steering.evict(name) == 2
    until(lambda: some.stats().open == 1, "they end")
    assert some.stats().in_use == 1
    assert some.stats().closed["evicted"] == 2
    assert steering.evict(name) == 0
    assert steering.evict(name, leased=True) == 1


def test_an_evicted_connection_is_lent_to_nobody(members: Callable[..., Members], name: str) -> None:
    one = members(max_connections=1, maintenance_interval=math.inf)
    _, gives_back = one.holder()
    gives_back.set()
    until(lambda: one.stats().idle == 1, "it is idle")
    (old,) = one.stats().slots
    assert steering.evict(name) == 1
    assert one.stats().idle == 1, "nobody has met it"
    with pytest.raises(PoolTimeout):
        one.fork(lambda pool: [pool.get(timeout=0.01) for _ in range(2)]).result()
    assert one.stats().closed["evicted"] == 1
    assert old.id not in {slot.id for slot in one.stats().slots}


def test_evict_one_connection(members: Callable[..., Members], name: str) -> None:
    two = members(max_connections=2)
    _, gives_back = two.holder(2)
    first, second = (slot.id for slot in two.stats().slots)
    for nobody in (0, -1, 12345, 1 << 64, first + (1 << 64)):
        assert steering.evict(name, nobody) == 0
    assert steering.evict(name, first) == 1
    assert two.stats().in_use == 2, "it is leased"
    gives_back.set()
    until(lambda: [slot.id for slot in two.stats().slots] == [second], "it ended when it was returned")
    assert two.stats().closed["evicted"] == 1


def test_evict_a_peer(members: Callable[..., Members], name: str, server: ExclusiveServer) -> None:
    two = members(max_connections=2)
    _, gives_back = two.holder(2)
    for others in ("127.0.0.2", ("127.0.0.1", server.port - 1), "::1", ("::", 0)):
        assert steering.evict(name, peer=others) == 0
    assert steering.evict(name, peer="127.0.0.1") == 2
    assert steering.evict(name, peer=("127.0.0.1", server.port)) == 2
    gives_back.set()
    until(lambda: two.stats().open == 0, "they ended when they were returned")


@pytest.mark.parametrize(
    "peer", ["localhost", "1.2.3", "", ("127.0.0.1", -1), ("127.0.0.1", 70000), ("127.0.0.1", "x")]
)
def test_peers_that_are_no_address(server: ExclusiveServer, name: str, peer: Any) -> None:
    with Pool(server.url, name=name), pytest.raises(ValueError, match="is no address"):
        steering.evict(name, peer=peer)


# Killed in the middle -----------------------------------------------------------------------------------------------


def test_whoever_steers_may_be_killed_at_any_moment(
    members: Callable[..., Members], name: str, server: ExclusiveServer
) -> None:
    random, four = chance(), members(max_connections=3, resize_limit=6)
    gone, stop = Counters(5), four.family.latch()

    def work(pool: Pool, place: int) -> None:
        while not stop.is_set():
            use(pool, f"worker:{place}")
            gone[place] += 1

    def steer(seed: int) -> None:
        acts = type(random)(seed)
        while True:
            acts.choice((steering.pause, steering.resume, steering.evict))(name)
            steering.resize(name, acts.randint(1, 6))
            gone[4] += 1

    four.keeper()
    workers = [four.fork(work, place) for place in range(4)]
    until(lambda: min(gone.list()[:4]) > 0, "all are at work")
    for _ in range(40):
        steered = gone[4]
        child = four.family.fork(steer, random.randrange(1 << 32))
        until(lambda steered=steered: gone[4] > steered, "it steers")  # type: ignore[misc]
        time.sleep(random.random() * 0.003)  # sleep: until some moment of it
        child.kill()
        four.family.forget(child)
    steering.resize(name, 2)
    steering.resume(name)
    until(lambda: four.stats().open <= 2, "the cap is kept")
    server.reset_stats()
    before = gone.list()
    until(lambda: all(map(int.__gt__, gone.list()[:4], before)), "all are at work again")
    assert server.stats()["max_open"] <= 2
    stop.set()
    for worker in workers:
        worker.result()
    assert server.stats()["violations"] == 0
    assert four.fork(lambda pool: len([pool.get(timeout=5) for _ in range(2)])).result() == 2
    stats = four.stats()
    assert stats.created == sum(stats.closed.values()) + stats.open


# recover ------------------------------------------------------------------------------------------------------------


def test_recover(members: Callable[..., Members], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    three = members(max_connections=3)
    keeper = three.keeper()
    assert steering.recover(name) == 0
    keeper.stop()
    for holder, _ in (three.holder(), three.holder(2)):
        holder.kill()
    monkeypatch.setattr(steering, "time", WakesAtTheSecondLook(keeper))
    assert steering.recover(name) == 2
    stats = three.stats()
    assert (stats.in_use, stats.recoveries, stats.closed["owner_died"]) == (0, 2, 3)
    assert steering.recover(name) == 0


def test_recover_when_the_maintainer_died(members: Callable[..., Members], name: str) -> None:
    two = members(max_connections=1)
    maintainer, _ = two.holder()
    two.keeper()
    maintainer.kill()
    assert steering.recover(name) <= 1, "it may have been noticed before"
    assert (two.stats().in_use, two.stats().recoveries) == (0, 1)


def test_recover_where_nobody_has_maintenance(members: Callable[..., Members], name: str) -> None:
    two = members(max_connections=2, maintenance_interval=math.inf)
    two.keeper()
    holder, _ = two.holder()
    holder.kill()
    with pytest.raises(Unattended, match="no process of it has a maintenance thread at work") as caught:
        steering.recover(name, 60)
    assert (caught.value.name, caught.value.pids, caught.value.maintained) == (name, (holder.pid,), False)
    assert two.fork(lambda pool: pool.recover()).result() == 1
    assert steering.recover(name) == 0


def test_recover_gives_up_in_time(members: Callable[..., Members], name: str) -> None:
    two = members(max_connections=2, maintenance_interval=3600.0)
    two.keeper()
    until(lambda: two.stats().state == "open", "it is there")
    with slab.view(name) as view:
        until(view.maintained, "it has a maintainer")
    holder, _ = two.holder()
    holder.kill()
    with pytest.raises(Unattended, match="its maintenance is busy"):
        steering.recover(name, 0.05)


# close --------------------------------------------------------------------------------------------------------------


def test_close(members: Callable[..., Members], name: str, server: ExclusiveServer) -> None:
    one = members(max_connections=1)
    holder, gives_back = one.holder()
    waiter = one.waiter()
    with inspect(name) as inspector:
        assert steering.close(name) == 1
        assert inspector.stats().state == "closed"
        with pytest.raises(PoolClosed):
            waiter.result()
        with pytest.raises(PoolNotFound):
            steering.close(name)
        assert not Path(slab.path_of(name)).exists()
        gives_back.set()
        until(lambda: server.stats()["open"] == 0, "the connection ended when it was returned")
        until(lambda: not inspector.alive, "the process has given its part back")
    assert holder.alive()
    with Pool(server.url, name=name, min_connections=0):
        assert steering.close(name) == 0


def test_close_waits_for_leases(members: Callable[..., Members], name: str) -> None:
    one = members(max_connections=1)
    _, gives_back = one.holder()
    left: list[int] = []
    with inspect(name) as inspector:
        thread = threading.Thread(target=lambda: left.append(steering.close(name, 30)))
        thread.start()
        until(lambda: inspector.stats().state == "closed", "it is closed")
        gives_back.set()
        thread.join(30)
    assert left == [0]


# The log ------------------------------------------------------------------------------------------------------------


def test_who_steers_logs_it(server: ExclusiveServer, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with Pool(server.url, name=name, max_connections=3, min_connections=0):
        caplog.clear()
        with caplog.at_level(logging.INFO, "shmpool.pool"):
            for act in ACTS:
                act(name) if act is not steering.drain else steering.drain(name, 0)
    reasons = [
        (record.__dict__["pool"], record.__dict__["reason"]) for record in caplog.records if "outside" in record.message
    ]
    assert reasons == [(name, each) for each in ("paused", "resumed", "draining", "resized", "evicted", "closed")]


# What cannot be steered ---------------------------------------------------------------------------------------------

ACTS: list[Callable[[str], object]] = [
    steering.pause,
    steering.resume,
    steering.drain,
    lambda name: steering.resize(name, 2),
    steering.evict,
    steering.recover,
    steering.close,
]


@pytest.mark.parametrize("act", ACTS)
def test_no_such_pool(act: Callable[[str], object], name: str) -> None:
    with pytest.raises(PoolNotFound, match="there is no pool"):
        act(name)
    with pytest.raises(InvalidConfig):
        act("../x")


@pytest.mark.parametrize("act", [steering.drain, steering.recover, steering.close])
@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), (math.nan, ValueError), ("1", TypeError), (None, TypeError)]
)
def test_timeouts_that_are_none(
    act: Callable[[str, Any], object], timeout: Any, error: type[Exception], server: ExclusiveServer, name: str
) -> None:
    with Pool(server.url, name=name, min_connections=0) as pool:
        with pytest.raises(error, match="timeout must be seconds"):
            act(name, timeout)
        assert pool.state == "open"


@pytest.fixture
def whole(server: ExclusiveServer) -> bytes:
    """The bytes of a sound slab."""
    with Pool(server.url, max_connections=3, min_connections=0, maintenance_interval=math.inf) as made:
        for lease in [made.get() for _ in range(3)]:
            lease.release()
        return Path(slab.path_of(made.name)).read_bytes()


def test_remains_are_called_so(whole: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "prefix", lambda own=f"shmpool-{name}-": own)  # pools of other tests reap what they see
    with (
        segment(name, whole, locked=False),
        pytest.raises(PoolNotFound, match=f"no process has pool {name!r} any more"),
    ):
        steering.pause(name)


@pytest.mark.parametrize("act", ACTS)
def test_a_closed_pool_that_still_has_its_name(act: Callable[[str], object], whole: bytes, name: str) -> None:
    with segment(name, whole):
        steering.close(name)
        assert not Path(slab.path_of(name)).exists()
    with segment(name, whole):
        with slab.view(name, writable=True) as view:
            assert view.steer("closed")
        with pytest.raises(PoolClosed):
            act(name)


@pytest.mark.parametrize("act", ACTS)
def test_what_is_no_slab(act: Callable[[str], object], name: str) -> None:
    path = Path(slab.path_of(name))
    os.mkfifo(path, 0o600)
    try:
        with pytest.raises(SlabCorrupt, match="FIFO"):
            act(name)
    finally:
        path.unlink()
    for data in (b"", os.urandom(1 << 20)):
        with segment(name, data), pytest.raises(SlabCorrupt):
            act(name)


def steer_everything(name: str) -> None:
    """Every act, on a slab that nobody maintains; only errors of ours may come of it."""
    drain: Callable[[str], object] = lambda each: steering.drain(each, 0)  # noqa: E731
    recover: Callable[[str], object] = lambda each: steering.recover(each, 0)  # noqa: E731
    for act in (*ACTS[:2], drain, *ACTS[3:5], recover):
        with contextlib.suppress(PoolError):
            act(name)


def test_damage_is_no_crash(whole: bytes, name: str, family: Family) -> None:
    """Noise in the words that change while a pool lives, and in its settings."""
    random = chance()
    changing = len(whole)

    def damage(seed: int) -> None:
        noise = type(random)(seed)
        with segment(name, whole) as path, open(path, "r+b", buffering=0) as file:
            for _ in range(60):
                for _ in range(noise.randrange(1, 40)):
                    at = noise.randrange(changing) if noise.random() < 0.5 else noise.randrange(8192)
                    os.pwrite(file.fileno(), noise.randbytes(noise.randrange(1, 9)), at)
                steer_everything(name)
                os.pwrite(file.fileno(), whole, 0)

    seed = random.randrange(1 << 32)
    assert family.fork(damage, seed).wait(100) == "exit 0"


def test_a_slab_that_is_cut_while_it_is_steered(whole: bytes, name: str) -> None:
    with segment(name, whole) as path:
        with slab.view(name, writable=True) as view:
            os.truncate(path, 4096)
            acts: list[Callable[[], object]] = [
                lambda: view.steer("paused"),
                lambda: view.resize(2),
                lambda: view.evict(0, b"", True),
                view.members,
                view.maintained,
                view.limits,
            ]
            for act in acts:
                with pytest.raises(ValueError, match="cut to 4096 bytes"):
                    act()
        with pytest.raises(SlabCorrupt):
            steering.pause(name)


def test_settings_that_cannot_be_read(whole: bytes, name: str) -> None:
    begins = whole.index(b'{"target"')
    with segment(name, whole[:begins] + b"[" + whole[begins + 1 :]):
        for act in (lambda each: steering.resize(each, 2), steering.recover):
            with pytest.raises(SlabCorrupt, match="its settings cannot be read"):
                act(name)


# The mapping itself -------------------------------------------------------------------------------------------------


def test_who_only_looks_cannot_steer(whole: bytes, name: str) -> None:
    with segment(name, whole), slab.view(name) as view:
        acts: list[Callable[[], object]] = [
            lambda: view.steer("paused"),
            lambda: view.resize(2),
            lambda: view.evict(0, b"", True),
        ]
        for act in acts:
            with pytest.raises(ValueError, match="the view is read-only"):
                act()


def test_a_descriptor_that_only_reads(whole: bytes, name: str) -> None:
    with segment(name, whole):
        fd = slab.open_checked(name)
        try:
            with pytest.raises(PermissionError):
                _core.SlabView(fd, writable=True)
        finally:
            os.close(fd)


@pytest.mark.parametrize("state", ["", "invalid", "shut", "Open"])
def test_states_that_do_not_exist(whole: bytes, name: str, state: str) -> None:
    with segment(name, whole), slab.view(name, writable=True) as view, pytest.raises(ValueError, match="no pool is"):
        view.steer(state)


def test_a_closed_view(whole: bytes, name: str) -> None:
    with segment(name, whole):
        view = slab.open_view(name, writable=True)
        view.close()
        acts: list[Callable[[], object]] = [lambda: view.steer("open"), lambda: view.resize(2), view.members]
        for act in (*acts, view.limits, view.maintained):
            with pytest.raises(ValueError, match="the view is closed"):
                act()


def test_steering_leaves_no_trace(members: Callable[..., Members], name: str) -> None:
    """Whoever steers is no worker, and what it has changed and changed back is as before."""
    one = members(max_connections=2)
    one.keeper()
    before = one.stats()
    for _ in range(3):
        steering.pause(name)
        steering.resume(name)
        steering.resize(name, 1)
        steering.resize(name, 2)
        steering.recover(name)
    after = one.stats()
    assert [worker.pid for worker in after.workers] == [worker.pid for worker in before.workers]
    assert (after.state, after.max_connections, after.created) == ("open", 2, before.created)
    assert time.time() - after.created_at < 60
