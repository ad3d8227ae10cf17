"""A day in a minute: workers of every kind, and all that may happen to them, to the server and to the pool.

    workers   forked, spawned, joined by name; killed, stopped, resumed, replaced all the time
    server    dies, hangs, resets what dials, comes back; its name means another address
    pool      resized, paused, drained, resumed, evicted; checks, expires, replenishes, takes leases away by itself

At the end all accounts balance, each slot can be leased, and nothing is left. The script of a day follows from its seed
(SHMPOOL_TEST_SEED); what happens in between follows from the machine.

Not here: the workers' part (daily), what each event does by itself (test_life, test_outage and others).
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmpool import Pool
from shmpool.stats import FAILURES
from tests.books import audit
from tests.daily import LEAK_S, OWN, THREADS, Tally, attend, resolve, threads_of_pools, work
from tests.joining import Company, Runtime, Worker, fresh_name, leave, own_runtime
from tests.processes import LONG, SECONDS, chance, descriptors, lease_every_slot, states, until
from tests.servers import ExclusiveServer

CONNECTIONS, MOST = 6, 12
WORKERS = 10
PLACES = 400  # of workers, over the day
WAYS = ("fork", "fork", "fork", "fork", "spawn", "spawn", "spawn", "join", "join", "join")
SETTINGS: dict[str, Any] = {
    "max_connections": CONNECTIONS,
    "resize_limit": MOST,
    "min_connections": 2,
    "max_workers": 128,
    "connection_timeout": 0.3,
    "dial_backoff": (0.01, 0.1),
    "when_down": "wait",
    "socket_timeout": 0.5,
    "idle_timeout": 0.5,
    "max_lifetime": 1.5,
    "alive_bypass": 0.05,
    "health_check_interval": 0.3,
    "health_check_timeout": 0.25,
    "leak_timeout": LEAK_S,
    "leak_action": "revoke",
    "leak_stacks": True,
    "maintenance_interval": 0.05,
    "local_cache_size": 2,
    **OWN,
}


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    yield from own_runtime(monkeypatch)


@pytest.fixture
def servers() -> Iterator[list[ExclusiveServer]]:
    with ExclusiveServer() as first, ExclusiveServer() as second:
        yield [first, second]


class Day:
    """The script: what happens, one event after the other, until `seconds` are over."""

    def __init__(
        self, pool: Pool, company: Company, servers: list[ExclusiveServer], tally_path: str, name_path: str
    ) -> None:
        self.random = chance()
        self.pool, self.company, self.servers = pool, company, servers
        self.tally_path, self.name_path = tally_path, name_path
        self.workers: list[tuple[str, Worker]] = []
        self.stopped: list[Worker] = []
        self.before: dict[int, int] = {}  # by pid: the descriptors of a worker that joined, before that
        self.places = self.kills = 0
        self.happened: Counter[str] = Counter()

    # ---- workers -----------------------------------------------------------------------------------------------------

    def hire(self, way: str) -> None:
        if way == "join":
            worker = self.company.execute()
            self.before[worker.pid] = worker.do(attend, self.pool.name)
        else:
            worker = self.company.start("fork" if way == "fork" else "spawn", self.pool)
        seed = self.random.randrange(1 << 30)
        worker.tell(work, self.tally_path, self.name_path, PLACES, self.places, seed)
        self.places += 1
        self.workers.append((way, worker))

    def kill(self) -> None:
        way, worker = self.workers.pop(self.random.randrange(len(self.workers)))
        if worker in self.stopped:
            self.stopped.remove(worker)
        worker.kill()
        self.kills += 1
        # An interpreter takes a moment to start: in the short form most who come later are forked.
        self.hire(way if LONG and self.random.random() < 0.2 else "fork")

    def stop(self) -> None:
        _, worker = self.random.choice(self.workers)
        if worker not in self.stopped:
            worker.stop()
            self.stopped.append(worker)
        if len(self.stopped) > 3:
            self.resume_one()

    def resume_one(self) -> None:
        if self.stopped:
            self.stopped.pop(0).resume()

    # ---- the server --------------------------------------------------------------------------------------------------

    @property
    def server(self) -> ExclusiveServer:
        """The one that the name means now."""
        return next(server for server in self.servers if server.url == Path(self.name_path).read_text())

    def away(self, how: str) -> None:
        server = self.server
        getattr(server, how)()
        if how == "hang":
            server.pause()
        if self.random.random() < 0.7:
            server.close_connections(rst=self.random.random() < 0.5)
        self.rest(0.1, 0.5)
        server.resume()
        server.listen()

    def die(self) -> None:
        self.away("refuse")

    def hang(self) -> None:
        self.away("hang")

    def reset(self) -> None:
        self.away("reset")

    def close_some(self) -> None:
        self.server.close_idle()

    def move(self) -> None:
        """The name means the other server; connections to the one before may go on."""
        other = next(server for server in self.servers if server is not self.server)
        path = Path(f"{self.name_path}.next")
        path.write_text(other.url)
        path.rename(self.name_path)
        if self.random.random() < 0.5:
            self.pool.evict(leased=True)

    # ---- the pool ----------------------------------------------------------------------------------------------------

    def resize(self) -> None:
        self.pool.resize(self.random.randint(2, MOST))

    def pause(self) -> None:
        self.pool.pause()
        self.rest(0.01, 0.2)
        self.pool.resume()

    def drain(self) -> None:
        self.pool.drain(timeout=self.random.choice([0, 0.1, 0.3]))
        self.rest(0.0, 0.1)
        self.pool.resume()

    def evict(self) -> None:
        self.pool.evict(leased=self.random.random() < 0.5)

    def maintain(self) -> None:
        if self.pool.stats().upstream == "up":
            self.pool.recover()
            self.pool._expire(2)
            self.pool._close_stale()

    # ---- the script --------------------------------------------------------------------------------------------------

    def rest(self, low: float, high: float) -> None:
        time.sleep(self.random.uniform(low, high))  # sleep: the day's pace

    def run(self, seconds: float) -> None:
        events: dict[Callable[[], object], int] = {
            self.kill: 6,
            self.stop: 4,
            self.resume_one: 3,
            self.die: 2,
            self.hang: 2,
            self.reset: 2,
            self.close_some: 3,
            self.move: 2,
            self.resize: 3,
            self.pause: 2,
            self.drain: 2,
            self.evict: 2,
            self.maintain: 3,
        }
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.places < PLACES:
            (event,) = self.random.choices([*events], weights=[*events.values()])
            event()
            self.happened[event.__name__] += 1
            self.rest(0.0, 0.1)

    def evening(self) -> int:
        """All go on undisturbed, then end; how many leases were taken from them."""
        while self.stopped:
            self.resume_one()
        for server in self.servers:
            server.resume()
            server.listen()
        self.pool.resume()
        self.pool.resize(CONNECTIONS)
        tally = Tally(self.tally_path, PLACES)
        served = tally.total()["successes"]
        try:
            until(
                lambda: tally.is_over() or tally.total()["successes"] >= served + 200,
                "they are served again",
            )
            if tally.is_over():  # one of them met what it did not expect, and has ended the day
                for _, worker in self.workers:
                    worker.answer()
        except AssertionError as error:
            stats = self.pool.stats()
            raise AssertionError(f"{error}: {states(self.pool)}, {stats.waiting} wait, {stats.upstream}") from error
        tally.end()
        tally.close()
        return sum(worker.answer() for _, worker in self.workers)

    def night(self) -> None:
        """Each worker leaves, and has what it had before it came."""
        for way, worker in self.workers:
            worker.do(leave)
            if way == "join":
                assert len(descriptors(worker.pid)) == self.before[worker.pid]
            assert worker.do(threads_of_pools) == []


def remains() -> tuple[int, int, int]:
    """What this process has: sockets, segments, threads. (multiprocessing keeps a pipe when it has spawned.)"""
    held = [*descriptors().values()]
    sockets = sum(what.startswith("socket:") for what in held)
    return sockets, sum("shmpool" in what for what in held), threading.active_count()


def close_enough(counted: int, tallied: int, lost: int) -> bool:
    """A call of one that was killed may be in one of the two accounts and not in the other."""
    return abs(counted - tallied) <= lost


def live_through(
    seconds: float, servers: list[ExclusiveServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally_path, name_path = str(tmp_path / "tally"), str(tmp_path / "name")
    Path(tally_path).touch()
    Path(name_path).write_text(servers[0].url)
    monkeypatch.setattr("shmpool.pool.dial_target", None)
    resolve(name_path)
    gc.collect()
    before = remains()
    with Company() as company:
        pool = Pool(servers[0].url, name=fresh_name(), **SETTINGS)
        segment = Path(f"/dev/shm/shmpool-{os.getuid()}-{pool.name}")
        day = Day(pool, company, servers, tally_path, name_path)
        Tally(tally_path, PLACES).close()
        for way in WAYS:
            day.hire(way)
        day.run(seconds)
        expired = day.evening()
        tally = Tally(tally_path, PLACES)
        calls = tally.total()
        tally.close()
        stats = audit(pool)
        print(f"{dict(day.happened)}; {day.kills} kills; {dict(calls)}; {expired} leases expired; {stats.closed}")
        lost = day.kills * THREADS
        assert close_enough(stats.gets, calls["calls"], lost)
        for name in FAILURES:
            assert close_enough(getattr(stats, name), calls[name], lost), name
        assert close_enough(stats.successes, calls["successes"], lost)
        lease_every_slot(pool)
        assert set(states(pool)) <= {"idle", "empty"}
        day.night()
        pool.close()
        audit(pool)
        assert pool.stats().open == 0
        assert not segment.exists()
    del pool, day
    for server in servers:
        figures = server.stats()
        assert figures["violations"] == 0, figures["violation_log"]
        assert figures["max_open"] <= MOST
        until(lambda server=server: server.stats()["open"] == 0, "every connection is closed")  # type: ignore[misc]
    gc.collect()
    until(lambda: remains() == before, f"{before} as before", 5)


def test_a_day_in_a_minute(servers: list[ExclusiveServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live_through(6.0, servers, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="SHMPOOL_TEST_LONG=1 asks for it")
@pytest.mark.parametrize("day", range(1, 21))
def test_twenty_days(servers: list[ExclusiveServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    print(f"day {day}")
    live_through(2 * SECONDS, servers, tmp_path, monkeypatch)
