"""PING from 8 forked workers against a real redis-server: redis-py's own pools against one shmpool for all of them.

redis-py's pool is of one process: 8 workers, 8 connections. shmpool has 8 for all, then 4 for all. Runs take turns;
ratios are taken within a turn. The connections that the server sees are counted at the server, at the end of each run.
"""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benches import floor
from benches.harness import Line, Options, Spread, quantile
from benches.workers import Crew, Forked

WORKERS = 8
START, END, GATE, IN_PLACE = 0, 1, 2, 8  # words
OWN = "redis-py, a pool in each process"


@dataclass(frozen=True)
class Outcome:
    rate: float
    waits_us: list[float]
    connections: int

    def text(self) -> str:
        waits = "  ".join(f"{quantile(self.waits_us, share):7.0f}" for share in (0.5, 0.99, 0.999))
        return f"{self.rate:8.0f}  {waits}  {self.connections:6d}"


def run(options: Options) -> list[Line]:
    try:
        redis = importlib.import_module("redis")
        server = importlib.import_module("tests.servers").RedisServer()
    except (ImportError, FileNotFoundError) as missing:
        options.say(f"  left out: {missing}")
        return []
    contenders: dict[str, Callable[[], contextlib.AbstractContextManager[Callable[[], Any]]]] = {
        OWN: functools.partial(own_pools, redis, server)
    }
    if not options.floors_only:
        for count in (8, 4):
            contenders[f"shmpool, {count} connections"] = functools.partial(one_pool, redis, server, count)
    try:
        outcomes = take_turns(contenders, server, options)
    finally:
        server.close()
    return [] if options.floors_only else judge(outcomes)


@contextlib.contextmanager
def own_pools(redis: Any, server: Any) -> Iterator[Callable[[], Any]]:
    yield lambda: redis.Redis(host=server.host, port=server.port)


@contextlib.contextmanager
def one_pool(redis: Any, server: Any, count: int) -> Iterator[Callable[[], Any]]:
    integration = importlib.import_module("shmpool.integrations.redis")
    pool = integration.ConnectionPool(host=server.host, port=server.port, max_connections=count)
    client = redis.Redis(connection_pool=pool)
    yield lambda: client
    pool.close()


def take_turns(contenders: dict[str, Any], server: Any, options: Options) -> dict[str, list[Outcome]]:
    turns, seconds = options.pick(2, 8), options.pick(1.0, 3.0)
    width = max(map(len, contenders))
    options.say(f"  {WORKERS} workers; time of a PING in us")
    options.say(f"  {'':{width}}  {'a second':>8}  {'p50':>7}  {'p99':>7}  {'p99.9':>7}  connections")
    outcomes: dict[str, list[Outcome]] = {}
    names = list(contenders)
    for turn in range(turns):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            with contenders[name]() as make_client:
                outcome = contend(make_client, server, seconds)
            outcomes.setdefault(name, []).append(outcome)
            options.say(f"  {name:{width}}  {outcome.text()}")
    return outcomes


def contend(make_client: Callable[[], Any], server: Any, seconds: float) -> Outcome:
    words = floor.load().Words()
    with Crew(*(Forked(_worker, words, number, make_client) for number in range(WORKERS))) as crew:
        for number in range(WORKERS):
            words.sleep_while(IN_PLACE + number, 0)
        words.store(END, time.perf_counter_ns() + int(seconds * 1e9))
        for _ in range(WORKERS):
            words.wake(START, 1)
        time.sleep(seconds + 0.1)
        connections = server.execute("CLIENT", "LIST").strip().count("\n")  # less the one that asks
        for _ in range(WORKERS):
            words.wake(GATE, 1)
        all_waits = crew.results()
    waits_us = sorted(wait / 1000 for waits in all_waits for wait in waits)
    return Outcome(sum(map(len, all_waits)) / seconds, waits_us, connections)


def _worker(words: Any, number: int, make_client: Callable[[], Any]) -> array.array[int]:
    client, clock = make_client(), time.perf_counter_ns
    ping, waits = client.ping, array.array("Q")
    gc.disable()
    for _ in range(50):
        ping()
    words.wake(IN_PLACE + number, 1)
    words.sleep_while(START, 0)
    end = words.load(END)
    while (began := clock()) < end:
        ping()
        waits.append(clock() - began)
    words.sleep_while(GATE, 0)  # until the connections have been counted
    return waits


def judge(outcomes: dict[str, list[Outcome]]) -> list[Line]:
    lines = []
    for name, limit in (("shmpool, 8 connections", 1.0), ("shmpool, 4 connections", 0.9)):
        both = zip(outcomes[name], outcomes[OWN], strict=True)
        rates = Spread.of(ours.rate / theirs.rate for ours, theirs in both)
        lines.append(Line("redis", f"PINGs a second: {name} / redis-py", rates, limit=limit, at_least=True))
        seen = Spread.of(outcome.connections for outcome in outcomes[name])
        lines.append(Line("redis", f"connections at the server: {name}", seen, unit="", digits=0))
    seen = Spread.of(outcome.connections for outcome in outcomes[OWN])
    lines.append(Line("redis", f"connections at the server: {OWN}", seen, unit="", digits=0))
    return lines
