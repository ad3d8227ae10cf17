"""The pools of other projects, each doing the job shmpool does: borrow a ready connection and give it back.

Each is set up the way that makes it fastest: no check before use, no reset after it, one connection warm in it, a stub
for the connection wherever the pool allows one (so that only the pool is timed). redis-py and urllib3 look at their
socket at every borrowing, so those have a real one.

A peer whose package is not installed is named as such and left out.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

from benches.harness import Candidate, Options, loop
from benches.workers import Peer


def _candidate(name: str, run: Callable[[int], int]) -> Candidate:
    return Candidate(name, run, "for one process")


class StubConnection:
    """What the pools ask of a connection; all of it does nothing."""

    _pool: Any = None

    def __init__(self) -> None:
        self.pgconn = self
        self.transaction_status = 0
        self._created_at = 0.0
        self._expire_at = float("inf")

    @classmethod
    def connect(cls, *_target: Any, **_options: Any) -> StubConnection:
        return cls()

    def close(self) -> None: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def __enter__(self) -> StubConnection:
        return self

    def __exit__(self, *error: object) -> None: ...

    def cursor(self) -> StubConnection:
        return self


class StubDriver:
    """A DB-API module, as far as DBUtils asks."""

    threadsafety = 1
    paramstyle = "qmark"
    OperationalError = InterfaceError = InternalError = OSError
    connect = staticmethod(StubConnection)


@contextlib.contextmanager
def lifo_queue(_peer: Peer) -> Iterator[list[Candidate]]:
    box: queue.LifoQueue[object] = queue.LifoQueue(4)
    box.put(object())
    yield [_candidate("queue.LifoQueue get/put", loop("c = get()\nput(c)", get=box.get, put=box.put))]


@contextlib.contextmanager
def dbutils(_peer: Peer) -> Iterator[list[Candidate]]:
    make = importlib.import_module("dbutils.pooled_db").PooledDB
    sizes = {"mincached": 1, "maxcached": 4, "maxconnections": 4, "blocking": True}
    pool = make(StubDriver, reset=False, ping=0, **sizes)
    usual = make(StubDriver, **sizes)
    yield [
        _candidate("DBUtils PooledDB with, its defaults", loop("with pool.connection() as c: c.close", pool=usual)),
        _candidate("DBUtils PooledDB get/close", loop("c = pool.connection()\nc.close()", pool=pool)),
        _candidate("DBUtils PooledDB with", loop("with pool.connection() as c: c.close", pool=pool)),
    ]
    pool.close()
    usual.close()


@contextlib.contextmanager
def psycopg_pool(_peer: Peer) -> Iterator[list[Candidate]]:
    pool = importlib.import_module("psycopg_pool").ConnectionPool(
        "", connection_class=StubConnection, min_size=1, max_size=4, open=True
    )
    pool.wait()
    yield [
        _candidate("psycopg_pool getconn/putconn", loop("c = get()\nput(c)", get=pool.getconn, put=pool.putconn)),
        _candidate("psycopg_pool with", loop("with pool.connection() as c: c.close", pool=pool)),
    ]
    pool.close()


@contextlib.contextmanager
def sqlalchemy(_peer: Peer) -> Iterator[list[Candidate]]:
    pool = importlib.import_module("sqlalchemy.pool").QueuePool(
        StubConnection, pool_size=4, max_overflow=0, reset_on_return=None
    )
    yield [_candidate("SQLAlchemy QueuePool connect/close", loop("c = pool.connect()\nc.close()", pool=pool))]
    pool.dispose()


@contextlib.contextmanager
def redis_py(peer: Peer) -> Iterator[list[Candidate]]:
    pool = importlib.import_module("redis").ConnectionPool(
        host="127.0.0.1", port=peer.port, protocol=2, driver_info=None, lib_name=None, lib_version=None
    )
    body = "c = get()\nput(c)"
    yield [_candidate("redis-py get_connection/release", loop(body, get=pool.get_connection, put=pool.release))]
    pool.disconnect()


@contextlib.contextmanager
def urllib3(peer: Peer) -> Iterator[list[Candidate]]:
    pool = importlib.import_module("urllib3").HTTPConnectionPool("127.0.0.1", peer.port, maxsize=4, block=True)
    connection = pool._get_conn()
    connection.connect()
    pool._put_conn(connection)
    yield [_candidate("urllib3 _get_conn/_put_conn", loop("c = get()\nput(c)", get=pool._get_conn, put=pool._put_conn))]
    pool.close()


@contextlib.contextmanager
def connection_pool(_peer: Peer) -> Iterator[list[Candidate]]:
    pool = importlib.import_module("connection_pool").ConnectionPool(create=StubConnection, max_size=4, idle=0)
    yield [_candidate("connection-pool with", loop("with pool.item() as c: c.close", pool=pool))]


@contextlib.contextmanager
def generic_connection_pool(_peer: Peer) -> Iterator[list[Candidate]]:
    common = importlib.import_module("generic_connection_pool.threading")

    class Manager(common.BaseConnectionManager):  # type: ignore[misc, name-defined]
        def create(self, *_endpoint: Any, **_timeout: Any) -> StubConnection:
            return StubConnection()

        def dispose(self, *_endpoint: Any, **_timeout: Any) -> None: ...

    pool = common.ConnectionPool(Manager(), max_size=4, total_max_size=4)
    yield [_candidate("generic-connection-pool with", loop("with pool.connection('x') as c: c.close", pool=pool))]
    pool.close()


#: Pools of whole projects; the queue is no pool and is timed for comparison only.
POOLS: tuple[Callable[[Peer], contextlib.AbstractContextManager[list[Candidate]]], ...] = (
    dbutils,
    psycopg_pool,
    sqlalchemy,
    redis_py,
    urllib3,
    connection_pool,
    generic_connection_pool,
)


def enter_all(stack: contextlib.ExitStack, peer: Peer, options: Options) -> list[Candidate]:
    """Sets up every peer that is installed; the stack takes them down."""
    found: list[Candidate] = []
    for pool in POOLS:
        try:
            found += stack.enter_context(pool(peer))
        except ImportError as missing:
            options.say(f"  left out: {pool.__name__}: {missing}")
    return found
