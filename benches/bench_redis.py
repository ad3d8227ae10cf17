"""PING and GET from 8 forked workers against a real redis-server: redis-py's pools, a connection for each request, and
one shmpool for all workers.

redis-py's pool is of one process: 8 workers, 8 connections. shmpool has 8 for all, then 4 for all. Each is asked
without a pause, and with a millisecond of work between two requests, as workers have that are busy on their own and
whose connections idle.

Not here: the taking of turns, the figures (requesting).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any

from benches.harness import Line, Options
from benches.requesting import Case, Contender, Request, Server, compare, connections, take_turns

OWN = "redis-py"
ONCE = "redis-py, connecting each time"
SHARED = {f"shmpool, {count} connections": count for count in (8, 4)}
LIMITS = dict(zip(SHARED, (1.0, 0.9), strict=True))  # PINGs a second over redis-py's, without work between
KEY, VALUE = "bench", "x" * 100
COMMANDS = {"PING": methodcaller("ping"), "GET of 100 bytes": methodcaller("get", KEY)}

Ask = Callable[[Any], object]


def run(options: Options) -> list[Line]:
    try:
        redis = importlib.import_module("redis")
        server = importlib.import_module("tests.servers").RedisServer()
    except (ImportError, FileNotFoundError) as missing:
        options.say(f"  left out: {missing}")
        return []
    lines: list[Line] = []
    try:
        server.execute("SET", KEY, VALUE)
        seen = Server(server.pid)
        for command, ask in COMMANDS.items():
            for work_s in (0.0, 1e-3):
                case, contenders = Case("redis", command, work_s), contenders_of(redis, server, ask, options)
                is_budget = command == "PING" and not work_s
                turns = options.pick(2, 8) if is_budget else options.pick(1, 5)
                outcomes = take_turns(case, contenders, seen, options, options.pick(0.2, 1.5), turns)
                lines += compare(case, outcomes, OWN, LIMITS if is_budget else {})
        return lines + connections("redis", outcomes)
    finally:
        server.close()


def contenders_of(redis: Any, server: Any, ask: Ask, options: Options) -> dict[str, Contender]:
    contenders: dict[str, Contender] = {
        OWN: functools.partial(own_pools, redis, server, ask),
        ONCE: functools.partial(no_pools, redis, server, ask),
    }
    for name, count in {} if options.floors_only else SHARED.items():
        contenders[name] = functools.partial(one_pool, redis, server, ask, count)
    return contenders


@contextlib.contextmanager
def own_pools(redis: Any, server: Any, ask: Ask) -> Iterator[Callable[[], Request]]:
    yield lambda: functools.partial(ask, redis.Redis(host=server.host, port=server.port))


@contextlib.contextmanager
def no_pools(redis: Any, server: Any, ask: Ask) -> Iterator[Callable[[], Request]]:
    def begin() -> Request:
        client = redis.Redis(host=server.host, port=server.port)

        def request() -> None:
            ask(client)
            client.connection_pool.disconnect()

        return request

    yield begin


@contextlib.contextmanager
def one_pool(redis: Any, server: Any, ask: Ask, count: int) -> Iterator[Callable[[], Request]]:
    integration = importlib.import_module("shmpool.integrations.redis")
    pool = integration.ConnectionPool(host=server.host, port=server.port, max_connections=count)
    yield lambda: functools.partial(ask, redis.Redis(connection_pool=pool))
    pool.close()
