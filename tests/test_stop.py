"""A process that is stopped (SIGSTOP) at any instruction: the others go on, and it is a member still when it goes on.

A stopped process keeps what it held, nothing more: not the queue, not a hand-over, not the pool's close. Moments are
random, many, and found again by their seed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from typing import Any

import pytest

from shmpool import LeaseExpired, PoolClosed, PoolTimeout
from tests.processes import (
    LONG,
    Child,
    Counters,
    Family,
    chance,
    lease_every_slot,
    proven,
    states,
    until,
    use,
)
from tests.servers import ExclusiveServer, exclusive_use

OTHERS = 3


def test_stopped_with_a_lease(server: ExclusiveServer, family: Family) -> None:
    """Nobody takes it away, however long it takes; the rest is everybody's."""
    held, go = family.latch(), family.latch()

    def hold() -> int:
        with pool.get() as lease:
            held.set()
            go.wait()
            return exclusive_use(lease.socket, "holder:1")

    with proven(server, 2) as pool:
        holder = family.fork(hold)
        held.wait()
        holder.stop()
        for _ in range(50):
            use(pool, timeout_s=1)
        both = pool.get()
        with pytest.raises(PoolTimeout):
            pool.get(timeout=0.2)
        pool.maintain()
        both.release()
        assert [row[1] for row in pool._snapshot()["workers"] if row[2]] == [os.getpid(), holder.pid]
        go.set()
        holder.resume()
        assert holder.result() in (1, 2)


@pytest.mark.parametrize("waiters", [1, 3])
def test_stopped_in_the_queue(server: ExclusiveServer, family: Family, waiters: int) -> None:
    """What is offered to a stopped waiter passes on to those behind it; it finds its turn when it wakes."""
    with proven(server, 1) as pool:
        lease = pool.get()
        stopped = family.fork(use, pool)
        until(lambda: len(pool._snapshot()["waiters"]) == 1, "the waiter")
        stopped.stop()
        others = [family.fork(use, pool) for _ in range(waiters)]
        until(lambda: len(pool._snapshot()["waiters"]) == 1 + waiters, "the others")
        begun = time.monotonic()
        lease.release()
        for other in others:
            other.result(5)
        print(f"past the stopped one after {(time.monotonic() - begun) * 1e3:.1f} ms")
        assert use(pool, timeout_s=2) == 1
        stopped.resume()
        stopped.result(5)


def test_stopped_while_dialling(server: ExclusiveServer, family: Family) -> None:
    with proven(server, 2) as pool:
        server.pause()
        family_dialler = family.fork(_open_many, pool)
        _spin(0.002)
        family_dialler.stop()
        server.resume()
        for _ in range(20):
            use(pool, timeout_s=2)
        family_dialler.resume()
        family_dialler.kill()


def _open_many(pool: Any) -> None:
    while True:
        with pool.get() as lease:
            lease.discard()


def test_close_does_not_wait_for_the_stopped(server: ExclusiveServer, family: Family) -> None:
    held, closed = family.latch(), family.latch()

    def hold() -> str:
        waiting = threading.Thread(target=_until_closed, args=(pool,))
        lease = pool.get()
        waiting.start()
        held.set()
        closed.wait()
        try:
            exclusive_use(lease.socket, "holder:1")
            lease.release()
        except LeaseExpired:
            return "expired"
        waiting.join()
        with pytest.raises(PoolClosed):
            pool.get()
        return "released"

    with proven(server, 1, every_slot=False) as pool:
        holder = family.fork(hold)
        held.wait()
        until(lambda: pool._snapshot()["waiters"], "its other thread waits")
        holder.stop()
        begun = time.monotonic()
        assert pool.close() == 1
        assert time.monotonic() - begun < 2
        closed.set()
        holder.resume()
        assert holder.result() in ("released", "expired")


def _until_closed(pool: Any) -> None:
    with pytest.raises(PoolClosed):
        pool.get(timeout=20)


def work(pool: Any, turns: Counters, place: int, discard_every: int = 0) -> None:
    """In a child: lease, use, release, for ever."""
    while True:
        with pool.get(timeout=20) as lease:
            exclusive_use(lease.socket, f"{place}:{turns[place]}")
            if discard_every and turns[place] % discard_every == discard_every - 1:
                lease.discard()
        turns[place] += 1


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _progress(turns: Counters, places: range, seconds: float) -> tuple[int, float]:
    """Turns of the workers at `places` within `seconds`, and the longest time without any."""
    counted = begun = sum(turns[place] for place in places)
    moved = since = time.monotonic()
    gap = 0.0
    while (now := time.monotonic()) - since < seconds:
        total = sum(turns[place] for place in places)
        if total != counted:
            gap, moved, counted = max(gap, now - moved), now, total
        time.sleep(0.001)  # sleep: between two looks at the counters
    return counted - begun, max(gap, time.monotonic() - moved)


def test_the_others_go_on_at_their_pace(server: ExclusiveServer, family: Family) -> None:
    """Four workers on three connections; one is stopped in the middle of its loop. It holds one connection at most, so
    the others have two left: their throughput falls by a third if every turn needs its connection all the time."""
    random = chance()
    period, times = (5.0, 3) if LONG else (0.12, 12)
    turns = Counters(OTHERS + 1)
    with proven(server, 3) as pool:
        children = [family.fork(work, pool, turns, place) for place in range(OTHERS + 1)]
        until(lambda: min(turns.list()) > 0, "all work")
        before = during = 0
        gaps = []
        for _ in range(times):
            before += _progress(turns, range(OTHERS), period)[0]
            _spin(random.uniform(0, 0.002))
            children[OTHERS].stop()
            moved, gap = _progress(turns, range(OTHERS), period)
            during += moved
            gaps.append(gap)
            if not moved:  # a busy machine, or a pool that the stopped one holds up: then nothing will move at all
                print([row[:4] for row in pool._snapshot()["slots"]], [row[:3] for row in pool._snapshot()["workers"]])
                stuck = sum(turns[place] for place in range(OTHERS))
                until(
                    lambda stuck=stuck: sum(turns[place] for place in range(OTHERS)) > stuck,  # type: ignore[misc]
                    f"something moves while one is stopped: {states(pool)}",
                    5,
                )
            at = turns[OTHERS]
            children[OTHERS].resume()
            until(lambda at=at: turns[OTHERS] > at, "the stopped one goes on")  # type: ignore[misc]
        print(f"others' turns: {before} before, {during} during; longest gap {max(gaps) * 1e3:.0f} ms")
        assert during > 0.4 * before
        _end(children)


def _end(children: list[Child]) -> None:
    for child in children:
        assert child.alive()
        child.kill()


def holdings(pool: Any, child: Child) -> tuple[str, ...]:
    """The states of the slots that a process has in its hands; what it was offered is not its own yet."""
    return tuple(
        sorted(slot.state for slot in pool.stats().slots if slot.holder == child.pid and slot.state != "offered")
    )


@pytest.mark.parametrize("discard_every", [0, 2])
@pytest.mark.parametrize("threads", [0, 3])
def test_stopped_at_any_moment(server: ExclusiveServer, family: Family, threads: int, discard_every: int) -> None:
    """Hundreds of times: a worker is stopped after a random number of microseconds in get, release, hand-over or dial;
    every permit but its own can be leased at once. It goes on, or is killed as it stands: then all of them. Its own is
    one; when others are about, it lets threads dial while it waits, and may be served before they are done."""
    random = chance()
    rounds = 1500 if LONG else 120
    end = threading.Event()
    errors: list[BaseException] = []

    def compete() -> None:
        try:
            while not end.is_set():
                use(pool, timeout_s=20)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    with proven(server, 4) as pool:
        turns = Counters(1)
        competitors = [threading.Thread(target=compete) for _ in range(threads)]
        for competitor in competitors:
            competitor.start()
        child = family.fork(work, pool, turns, 0, discard_every)
        slowest, found = 0.0, Counter[tuple[str, ...]]()
        for _ in range(rounds):
            at = turns[0]
            until(lambda at=at: turns[0] > at, "it works")  # type: ignore[misc]
            _spin(random.uniform(0, 0.001))
            child.stop()
            stuck = holdings(pool, child)
            found[stuck] += 1
            assert len(stuck) <= (3 if threads else 1), stuck
            begun = time.monotonic()
            leases = [pool.get(timeout=5) for _ in range(4 - max(1, len(stuck)))]
            slowest = max(slowest, time.monotonic() - begun)
            for lease in leases:
                exclusive_use(lease.socket, f"parent:{lease.id}")
                lease.release()
            if random.random() < 0.2:
                child.kill()
                if not threads:
                    lease_every_slot(pool, timeout_s=5)
                family.forget(child)
                child = family.fork(work, pool, turns, 0, discard_every)
            else:
                child.resume()
        end.set()
        for competitor in competitors:
            competitor.join()
        child.kill(signal.SIGKILL)
        print(f"stopped with {dict(found)}; the others' slowest leases: {slowest * 1e3:.1f} ms")
        if errors:
            raise errors[0]
        assert slowest < 2
