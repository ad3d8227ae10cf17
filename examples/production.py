"""A pool with all that a server in production wants: `python examples/production.py tcp://127.0.0.1:6379`.

Four forked workers say PING to a Redis, or to anything that answers a line with a line. Meanwhile the parent, which has
no part in what they do, steers their pool from outside as `shmpool pause NAME` and so on would.
"""

from __future__ import annotations

import logging
import os
import sys
import time

import shmpool
from shmpool import steering
from shmpool.hooks import ClosedConnection, LeakReport

WORKERS, SECONDS = 4, 3.0


def ping(conn: shmpool.PooledConnection) -> bool:
    conn.socket.sendall(b"PING\r\n")
    return conn.socket.recv(64).endswith(b"\r\n")


def closed(conn: ClosedConnection) -> None:
    logging.getLogger("example").info("connection %d ended: %s, %d leases", conn.id, conn.reason, conn.uses)


def leaked(leak: LeakReport) -> None:
    logging.getLogger("example").warning(
        "process %d keeps connection %d:\n%s", leak.pid, leak.connection_id, leak.stack
    )


def work(pool: shmpool.Pool) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            with pool.get() as conn:
                ping(conn)
        except shmpool.PoolClosed as error:
            if not error.draining:
                raise
            return  # no more work for this one
        except (shmpool.DialError, shmpool.PoolTimeout, OSError) as error:
            logging.getLogger("example").warning("no answer: %s", error)
            time.sleep(0.1)


def main(url: str) -> None:
    logging.basicConfig(format="%(process)d %(name)s %(levelname)s %(message)s", level=logging.INFO)
    pool = shmpool.Pool(
        url,
        name=f"example-{os.getpid()}",
        max_connections=2,
        resize_limit=4,
        min_connections=1,
        get_timeout=2.0,
        when_down="wait",
        health_check=ping,
        health_check_interval=1.0,
        health_check_timeout=0.5,
        leak_timeout=1.0,
        leak_stacks=True,
        on_created=ping,  # one that does not answer is not lent
        on_close=closed,
        on_leak=leaked,
    )
    pool.wait_ready()
    workers = []
    for _ in range(WORKERS):
        if not (pid := os.fork()):
            work(pool)
            os._exit(0)
        workers.append(pid)

    time.sleep(SECONDS / 5)
    steering.resize(pool.name, 4)
    time.sleep(SECONDS / 5)
    steering.pause(pool.name)
    steering.evict(pool.name)  # while nobody gets one: as for a restart of the server
    steering.resume(pool.name)
    time.sleep(SECONDS / 5)
    left = steering.drain(pool.name, timeout=5)

    for pid in workers:
        os.waitpid(pid, 0)
    stats = pool.stats()
    most = sum(1 for worker in stats.workers if worker.gets)
    print(f"{stats.successes} turns by {most} workers over {stats.created - stats.closed['evicted']} connections")
    print(f"{left} leases left, {stats.timeouts} timeouts, {stats.closed['evicted']} evicted, ended: {stats.closed}")
    pool.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "tcp://127.0.0.1:6379")
