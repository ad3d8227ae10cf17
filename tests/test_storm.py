"""Many workers with many threads over few connections, undisturbed and under kills, with a server as the witness.

The server counts violations (two users of one connection at once) and the most connections that were ever open. The
short forms run always; SHMPOOL_TEST_LONG=1 runs them at full length too.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from shmpool import Pool
from tests.processes import (
    LONG,
    SECONDS,
    Child,
    Counters,
    Family,
    chance,
    descriptors,
    lease_every_slot,
    proven,
    states,
    use,
)
from tests.servers import ExclusiveServer, exclusive_use

WORKERS, THREADS, CONNECTIONS = 8, 4, 4
LENGTHS: list[Any] = [
    "short",
    pytest.param(
        "long", marks=[pytest.mark.slow, pytest.mark.skipif(not LONG, reason="SHMPOOL_TEST_LONG=1 asks for it")]
    ),
]


def worker(pool: Pool, end: float, turns: Counters, place: int, use_s: float = 0.0) -> tuple[int, int]:
    """In a child: THREADS threads lease, use, release until `end`; its descriptors after a few turns, and at last."""
    errors: list[BaseException] = []
    counts = [0] * THREADS
    early: list[int] = []

    def run(thread: int) -> None:
        try:
            while time.monotonic() < end:
                with pool.get(timeout=20) as lease:
                    exclusive_use(lease.socket, f"w{place}:{os.getpid()}-{thread}-{counts[thread]}")
                    if use_s:
                        time.sleep(use_s)  # sleep: the connection is in use for a while
                counts[thread] += 1
                turns[place] += 1
                if thread == 0 and counts[0] == 50:
                    early.append(len(descriptors()))
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(counts), counts
    pool._close_stale()
    return (early or [1 << 30])[0], len(descriptors())


@pytest.mark.parametrize("length", LENGTHS)
def test_eight_workers_share_four_connections(server: ExclusiveServer, family: Family, length: str) -> None:
    seconds = SECONDS if length == "long" else 4.0
    with proven(server, CONNECTIONS) as pool:
        turns = Counters(WORKERS)
        end = time.monotonic() + seconds
        children = [family.fork(worker, pool, end, turns, place) for place in range(WORKERS)]
        for child in children:
            early, late = child.result(seconds + 30)
            assert late <= early + CONNECTIONS
        counts = turns.list()
        print(f"{sum(counts)} turns; slowest / fastest worker {min(counts) / max(counts):.2f}; {counts}")
        assert min(counts) >= 0.5 * max(counts)
        figures = server.stats()
        assert figures["accepted"] == CONNECTIONS
        assert figures["begins"] == figures["ends"] == sum(counts)
        assert states(pool) == {"idle": CONNECTIONS}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("connections", [1, CONNECTIONS])
def test_workers_are_killed_at_random_and_replaced(
    server: ExclusiveServer, family: Family, length: str, connections: int
) -> None:
    random = chance()
    seconds = SECONDS if length == "long" else 4.0
    wanted = 10 * seconds
    with proven(server, connections) as pool:
        turns = Counters(WORKERS)
        begun = time.monotonic()
        end = begun + seconds
        before = len(descriptors())
        survivor = family.fork(worker, pool, end, turns, 0)
        places: dict[int, Child] = {at: family.fork(worker, pool, end, turns, at) for at in range(1, WORKERS)}
        kills = 0
        while time.monotonic() < end - 0.5:
            time.sleep(random.uniform(0.2, 1.2) * seconds / wanted / 2)  # sleep: the storm's pace
            place = random.choice([*places])
            places[place].kill()
            family.forget(places[place])
            kills += 1
            places[place] = family.fork(worker, pool, end, turns, place)
        for child in places.values():
            child.wait(seconds + 30)
            family.forget(child)
        early, late = survivor.result()
        family.forget(survivor)
        figures = server.stats()
        totals = pool._snapshot()["totals"]
        print(
            f"{kills} kills, {sum(turns.list())} turns {turns.list()}, {figures['accepted']} connections, "
            f"{totals['recovered_leases']} leases recovered"
        )
        assert kills >= wanted
        assert min(turns.list()) > 0
        assert figures["violations"] == 0, figures["violation_log"]
        assert figures["max_open"] <= connections
        assert late <= early + connections
        lease_every_slot(pool, timeout_s=5)
        pool.maintain()
        assert len(descriptors()) <= before + connections + 1
        assert set(states(pool)) <= {"idle", "empty"}


def test_workers_fork_workers_and_vanish(server: ExclusiveServer, family: Family) -> None:
    """Each worker becomes the parent of the next and dies at once or after it: no order of deaths loses a permit."""
    random = chance()
    first = random.randrange(1 << 30)

    def descend(depth: int) -> None:
        for _ in range(random.randrange(4)):
            use(pool)
        lease = pool.get() if random.random() < 0.5 else None
        child = Family().fork(descend, depth - 1) if depth else None
        if random.random() < 0.5:
            if lease is not None:
                lease.release()  # the child may need it
            if child is not None:
                child.wait()
        os._exit(0)  # whatever it still holds

    with proven(server, 2, max_workers=64) as pool:
        for at in range(25):
            random.seed(first + at)
            child = family.fork(descend, 6)
            child.wait()
            lease_every_slot(pool, timeout_s=5)
            family.forget(child)
