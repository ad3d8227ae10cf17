"""Every kind of worker with every kind of connection; pools on their way by pickle; what processes say when they end.

What must hold: a worker that was forked, started by a fork server, spawned, or that joined by name, uses the very
connections that others opened, before it came and after, and whether or not their openers live; a pool that arrives by
pickle is the process's own pool if it has it already; no start method's helpers warn of us or remove what is ours.

Each cell is repeated with new connections: SHMPOOL_TEST_LONG=1 does it 50 times.

Not here: joining itself (`test_join.py`).
"""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import shmpool
from shmpool import Pool, PoolClosed, slab
from tests import joining
from tests.joining import (
    Company,
    Runtime,
    Way,
    Worker,
    fresh_name,
    identity,
    lease_once,
    make,
    own_runtime,
    proving,
    segment_of,
)
from tests.processes import LONG, lease_every_slot, until, use
from tests.servers import ExclusiveServer, Kind

TURNS = 50 if LONG else 2
KINDS: list[Kind] = ["tcp4", "udp4", "unix"]
Column = Literal["fork", "forkserver", "spawn", "attach"]
COLUMNS: list[Column] = ["fork", "forkserver", "spawn", "attach"]
Order = Literal["before", "after", "killed"]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[Kind, ExclusiveServer]]:
    made = {kind: ExclusiveServer(kind) for kind in KINDS}
    yield made
    for server in made.values():
        server.close()


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, servers: dict[Kind, ExclusiveServer]) -> Iterator[ExclusiveServer]:
    yield from proving(servers[request.param])


@pytest.fixture
def tcp_server(servers: dict[Kind, ExclusiveServer]) -> Iterator[ExclusiveServer]:
    yield from proving(servers["tcp4"])


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    yield from own_runtime(monkeypatch)


@pytest.fixture
def name() -> Iterator[str]:
    name = fresh_name()
    yield name
    until(lambda: slab.remove_remains(name), "the last member ends", 5)


@pytest.fixture
def company(name: str, runtime: Runtime) -> Iterator[Company]:
    """Ends before the others look whether anything is left; ask for the server first."""
    del name, runtime
    with Company() as company:
        yield company


# ---- the matrix ----------------------------------------------------------------------------------------------------


class Cell:
    """One cell: this process makes the pool; workers of one kind come and use what others opened."""

    def __init__(self, company: Company, column: Column, server: ExclusiveServer, name: str) -> None:
        self.company, self.column = company, column
        unrelated = company.fork() if column == "attach" else None  # before there is a pool
        self.pool = Pool(
            server.url, name=name if column == "attach" else None, max_connections=2, min_connections=0, max_workers=200
        )
        self._worker = unrelated

    def worker(self) -> Worker:
        """One that has joined just now: a fresh process where that costs little, else one that had left."""
        worker = self._worker
        if self.column == "attach":
            assert worker is not None
            worker.do(joining.attach, self.pool.name)
        elif self.column == "fork":
            worker = self.company.fork(self.pool)
        elif worker is None:
            worker = self.company.start(self.column, self.pool)
        else:
            worker.do(joining.take, self.pool)
        assert worker.do(joining.which) == identity(self.pool)
        self._worker = worker
        return worker

    def part(self, worker: Worker) -> None:
        if self.column == "fork":
            worker.kill()
        else:
            worker.do(joining.leave)


@pytest.mark.parametrize("order", ["before", "after", "killed"])
@pytest.mark.parametrize("column", COLUMNS)
def test_one_connection(server: ExclusiveServer, company: Company, column: Column, order: Order, name: str) -> None:
    cell = Cell(company, column, server, name)
    with cell.pool:
        seen: set[int] = set()
        for _ in range(TURNS):
            number, worker = open_and_join(cell, order)
            assert worker.do(lease_once) == number
            assert use(cell.pool) == number
            assert worker.do(lease_once, discard=True) == number
            assert number not in seen
            seen.add(number)
            cell.part(worker)
            server.close_connections()  # over UDP: forget the ports, one of which the kernel may give again
        assert server.stats()["accepted"] == TURNS
        assert server.stats()["max_open"] <= 2


def open_and_join(cell: Cell, order: Order) -> tuple[int, Worker]:
    """A connection that somebody opened, and a worker that joined before that, or after."""
    if order == "before":
        return use(cell.pool), cell.worker()
    worker = cell.worker()
    opener = cell.company.fork(cell.pool)
    number = opener.do(lease_once)
    opener.kill() if order == "killed" else opener.end("os._exit")
    return number, worker


@pytest.mark.parametrize("column", COLUMNS)
def test_what_a_worker_opened(tcp_server: ExclusiveServer, company: Company, column: Column, name: str) -> None:
    """It may be killed: who was there before has its connection, and so has who comes after."""
    cell = Cell(company, column, tcp_server, name)
    with cell.pool:
        worker = cell.worker()
        older = company.fork(cell.pool)
        number = worker.do(lease_once)
        worker.kill()
        assert older.do(lease_once) == use(cell.pool) == company.fork(cell.pool).do(lease_once) == number


@pytest.mark.parametrize("column", COLUMNS)
def test_what_a_dead_worker_held(tcp_server: ExclusiveServer, company: Company, column: Column, name: str) -> None:
    cell = Cell(company, column, tcp_server, name)
    with cell.pool:
        worker = cell.worker()
        held = {worker.do(joining.hold), worker.do(joining.hold)}
        worker.kill()
        assert cell.pool.recover() == 2
        assert not lease_every_slot(cell.pool) & held


@pytest.mark.parametrize("way", ["forkserver", "spawn"])
def test_the_maker_may_be_killed(tcp_server: ExclusiveServer, company: Company, way: Way, name: str) -> None:
    """Workers of a start method keep the pool and its connections when the process that gave it to them is gone."""
    maker = company.fork()
    maker.do(make, tcp_server.url, name=name, max_connections=2, min_connections=0)
    numbers = maker.do(joining.every_slot)
    with shmpool.attach(name) as pool:
        worker = company.start(way, pool)
        assert worker.do(joining.every_slot) == numbers
        maker.kill()
    assert worker.do(joining.every_slot) == numbers
    worker.do(joining.leave)
    assert not segment_of(name).exists()


# ---- pickle --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["named", "unnamed"])
def pool(request: pytest.FixtureRequest, tcp_server: ExclusiveServer, company: Company, name: str) -> Iterator[Pool]:
    del company  # ends after the pool
    own = name if request.param == "named" else None
    with Pool(tcp_server.url, name=own, max_connections=1, min_connections=0) as pool:
        yield pool


def test_in_one_process_it_is_the_same_object(pool: Pool) -> None:
    assert pickle.loads(pickle.dumps(pool)) is pool
    holder = pickle.loads(pickle.dumps(joining.Holder(pool)))
    assert holder.pool is holder.again["pool"] is pool
    assert copy.copy(pool) is pool
    assert copy.deepcopy(pool) is pool
    assert copy.deepcopy(joining.Holder(pool)).pool is pool
    assert shmpool.pools() == [pool]


def test_in_a_forked_child_it_is_the_one_it_has(pool: Pool, company: Company) -> None:
    worker = company.fork(pool)
    number = use(pool)
    assert worker.do(joining.has_it, pool)
    assert worker.do(lease_once) == number


def test_to_a_process_that_has_nothing_of_it(pool: Pool, company: Company) -> None:
    worker = company.start("spawn")
    number = use(pool)
    for _ in range(3):
        assert worker.do(joining.take, pool) == identity(pool)
        assert worker.do(lease_once) == number
        worker.do(joining.leave)


@pytest.mark.parametrize("way", ["fork", "forkserver", "spawn"])
def test_by_initargs_of_executors(pool: Pool, way: str) -> None:
    context = multiprocessing.get_context(way)
    number = use(pool)
    with concurrent.futures.ProcessPoolExecutor(2, context, joining.keep, (joining.Holder(pool),)) as executor:
        assert list(executor.map(joining.use_kept, range(4))) == [(number, each) for each in range(4)]
    with context.Pool(2, joining.keep, (joining.Holder(pool),)) as workers:
        assert workers.map(joining.use_kept, range(4), chunksize=1) == [(number, each) for each in range(4)]
        workers.close()
        workers.join()


def test_after_the_end(pool: Pool) -> None:
    data = pickle.dumps(pool) if pool.config.name is not None else b""
    pool.close()
    with pytest.raises(PoolClosed):
        pickle.dumps(pool)
    if data:
        with pytest.raises(shmpool.PoolNotFound):
            pickle.loads(data)


class Unpicklable:
    """A callable to which pickle says no."""

    def __call__(self, _: object) -> None: ...

    def __reduce__(self) -> str:
        raise ValueError("not me")


@pytest.mark.parametrize("setting", ["on_borrow", "on_return", "dial"])
@pytest.mark.parametrize("what", [lambda _: None, Unpicklable()], ids=["lambda", "object"])
def test_what_cannot_travel_is_named(tcp_server: ExclusiveServer, setting: str, what: Any) -> None:
    target = None if setting == "dial" else tcp_server.url
    with Pool(target, **{setting: what}, min_connections=0) as pool:
        with pytest.raises(TypeError, match=rf"{setting}=.*top level of a module"):
            pickle.dumps(pool)
        assert copy.copy(pool) is pool


def test_hooks_travel(tcp_server: ExclusiveServer, company: Company) -> None:
    with Pool(tcp_server.url, on_borrow=joining.note_borrow, min_connections=0, max_connections=1) as pool:
        worker = company.start("spawn", pool)
        number = worker.do(lease_once)
        assert worker.do(joining.noted) == 1
        assert use(pool) == number


# ---- what is said at the end ---------------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing
import os
import sys
import threading

import shmpool


def work(pool):
    with pool.get() as lease:
        lease.socket.sendall(b"PING\\n")
        assert lease.socket.recv(99).startswith(b"PONG")


def child(pool):
    work(pool)
    assert os.path.exists(sys.argv[2]) == (pool.config.name is not None)


if __name__ == "__main__":
    url, segment, name, way = sys.argv[1:5]
    pool = shmpool.Pool(url, name=name or None, min_connections=0, max_connections=2, max_workers=9)
    work(pool)
    for _ in range(2):
        if way == "os.fork":
            for _ in range(20):
                pid = os.fork()
                if pid == 0:
                    child(pool)
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0
                work(pool)
            continue
        process = multiprocessing.get_context(way).Process(target=child, args=(pool,))
        process.start()
        process.join()
        assert process.exitcode == 0, process.exitcode
        work(pool)
    print("done")
"""


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("way", ["os.fork", "fork", "forkserver", "spawn"])
def test_nobody_complains(tcp_server: ExclusiveServer, name: str, tmp_path: Path, way: str, named: bool) -> None:
    """No resource tracker warns or removes the pool, no Python warns of forks beside threads."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "always", program, tcp_server.url, segment_of(name), name if named else "", way],
        env={**os.environ, "PYTHONPATH": str(joining.ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert not segment_of(name).exists()


@pytest.mark.parametrize("way", ["attach", "forkserver", "spawn"])
def test_a_worker_that_ends_removes_nothing(
    tcp_server: ExclusiveServer, company: Company, name: str, runtime: Runtime, way: str
) -> None:
    with Pool(tcp_server.url, name=name, min_connections=0) as pool:
        number = use(pool)
        for _ in range(2):
            if way == "attach":
                worker = company.execute()
                worker.do(joining.attach, name)
            else:
                worker = company.start(way, pool)  # type: ignore[arg-type]
            assert worker.do(lease_once) == number
            worker.end("exit")
            assert segment_of(name).exists()
            assert runtime.sockets() == [identity(pool).hex()]
            assert use(pool) == number
            if way == "attach":
                assert worker.stderr == ""
