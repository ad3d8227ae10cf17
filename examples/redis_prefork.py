"""Eight forked workers, four connections to Redis: `python examples/redis_prefork.py redis://127.0.0.1:6379/0`.

The pool is made before the fork; the workers then use redis-py as ever. Needs `pip install redis`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

import redis

from shmpool.integrations.redis import ConnectionPool


def work(client: Any, turns: int) -> None:
    for turn in range(turns):
        client.hincrby("shmpool:example", str(os.getpid()), 1)
        with client.pipeline() as pipe:
            pipe.set("shmpool:example:last", turn, ex=60).get("shmpool:example:last").execute()


def main(url: str, workers: int = 8, turns: int = 1000) -> None:
    with ConnectionPool.from_url(url, max_connections=4, client_name="shmpool-example") as pool:
        client: Any = redis.Redis(connection_pool=pool)
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=work, args=(client, turns)) for _ in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

        done = client.hgetall("shmpool:example")
        client.delete("shmpool:example")
        ours = [each for each in client.client_list() if each["name"] == "shmpool-example"]
        print(f"{sum(map(int, done.values()))} turns by {len(done)} workers over {len(ours)} connections")
        stats = pool.pool.stats()
        wait_us = stats.wait_latency.p99 * 1e6
        print(f"{stats.created} handshakes, {stats.handovers} hand-overs, 99 of 100 waits were below {wait_us:.0f} us")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "redis://127.0.0.1:6379/0")
