"""HTTP/1.1 keep-alive GET from 8 forked workers: urllib3's pools, connecting each time, and one shmpool for all.

The request goes the same way through urllib3 each time (`HTTPConnectionPool.request`); only where its connection comes
from differs. shmpool has 8 connections for all workers, then 4.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from benches.harness import Line, Options
from benches.http_server import HOST, HttpServer
from benches.requesting import Case, Contender, Request, Server, compare, connections, take_turns

OWN = "urllib3"
ONCE = "urllib3, connecting each time"
CASES = (Case("http", "HTTP GET"), Case("http", "HTTP GET", 1e-3))


def run(options: Options) -> list[Line]:
    try:
        urllib3 = importlib.import_module("urllib3")
        server = HttpServer()
    except ImportError as missing:
        options.say(f"  left out: {missing}")
        return []
    contenders: dict[str, Contender] = {
        OWN: functools.partial(own_pools, urllib3, server.port, {}),
        ONCE: functools.partial(own_pools, urllib3, server.port, {"Connection": "close"}),
    }
    for count in () if options.floors_only else (8, 4):
        contenders[f"shmpool, {count} connections"] = functools.partial(one_pool, urllib3, server.port, count)
    lines: list[Line] = []
    with server:
        seen = Server(server.pid)
        for case in CASES:
            outcomes = take_turns(case, contenders, seen, options, options.pick(0.2, 2.0), options.pick(1, 6))
            lines += compare(case, outcomes, OWN, {})
    return lines + connections("http", outcomes)


@contextlib.contextmanager
def own_pools(urllib3: Any, port: int, headers: dict[str, str]) -> Iterator[Callable[[], Request]]:
    yield lambda: requests_by(urllib3.HTTPConnectionPool(HOST, port, headers=headers))


@contextlib.contextmanager
def one_pool(urllib3: Any, port: int, count: int) -> Iterator[Callable[[], Request]]:
    shmpool = importlib.import_module("shmpool")
    with shmpool.Pool(f"tcp://{HOST}:{port}", max_connections=count, min_connections=0, socket_timeout=None) as pool:
        yield lambda: requests_by(leasing(urllib3, pool)(HOST, port))


def requests_by(pool: Any) -> Request:
    def request() -> None:
        response = pool.request("GET", "/")
        assert response.status == 200
        assert len(response.data) == 100

    return request


def leasing(urllib3: Any, pool: Any) -> Any:
    """A class as urllib3's HTTPConnectionPool, for one thread, whose connections are leased from `pool`."""

    class Leasing(urllib3.HTTPConnectionPool):  # type: ignore[misc]
        _lease: Any = None

        def _get_conn(self, timeout: float | None = None) -> Any:
            self._lease = lease = pool.get(timeout)
            connection = lease.session
            if connection is None:
                connection = lease.session = self._new_conn()
                connection.sock = lease.socket
            return connection

        def _put_conn(self, connection: Any) -> None:
            if connection is None:
                self._lease.discard("urllib3 has given it up")
            else:
                self._lease.release()

    return Leasing
