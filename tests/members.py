"""Processes that have a pool of a name, while the test's own process only looks at it, or steers it from outside.

`Members` forks them.

Not here: forking itself (processes), servers (servers).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from shmpool import Pool, PoolStats, inspect, slab
from tests.processes import Child, Family, Latch, until, use
from tests.servers import ExclusiveServer

TICK_S = 0.05


class Members:
    """Processes that have the pool `name`; the first of them makes it.

    They have maintenance that ticks quickly, and no minimum of connections, unless `settings` say otherwise.
    """

    def __init__(self, family: Family, server: ExclusiveServer, name: str, **settings: Any) -> None:
        self.family, self.name = family, name
        self._url = server.url
        self._settings = {"name": name, "min_connections": 0, "maintenance_interval": TICK_S, **settings}

    def pool(self) -> Pool:
        return Pool(self._url, **self._settings)

    def fork(self, does: Callable[..., object], *args: object) -> Child:
        """A process that calls `does(pool, *args)` and leaves the pool."""

        def member() -> object:
            with self.pool() as pool:
                return does(pool, *args)

        return self.family.fork(member)

    def holder(self, count: int = 1) -> tuple[Child, Latch]:
        """A process that holds so many leases, until the latch is set; then it stays a member until it is killed."""
        has, gives_back = self.family.latch(), self.family.latch()

        def hold(pool: Pool) -> None:
            leases = [pool.get() for _ in range(count)]
            has.set()
            gives_back.wait()
            for lease in leases:
                lease.release()
            threading.Event().wait()

        child = self.fork(hold)
        has.wait()
        return child, gives_back

    def keeper(self) -> Child:
        """A process that only has the pool."""
        return self.holder(0)[0]

    def waiter(self, timeout_s: float = 30.0) -> Child:
        """A process that waits in the queue for a connection, which it uses."""
        before = self.stats().waiting
        child = self.fork(use, "waiter", timeout_s)
        until(lambda: self.stats().waiting > before, "it waits in the queue")
        return child

    def stats(self) -> PoolStats:
        with inspect(self.name) as inspector:
            return inspector.stats()


class WakesAtTheSecondLook:
    """The clock of who waits by looking: a stopped process goes on when the first look has been taken."""

    monotonic = staticmethod(time.monotonic)

    def __init__(self, stopped: Child) -> None:
        self._stopped = stopped

    def sleep(self, seconds: float) -> None:
        self._stopped.resume()
        time.sleep(seconds)  # sleep: in the place of the sleep of who looks


def some_name() -> str:
    """A name for a pool of this test."""
    return f"test-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def members_of(name: str, family: Family, server: ExclusiveServer) -> Iterator[Callable[..., Members]]:
    """A way to make Members of the pool `name`. At the end they are killed, and what they leave is removed."""

    def make(**settings: Any) -> Members:
        return Members(family, server, name, **settings)

    yield make
    for child in family.children:
        child.close()
    family.children.clear()
    slab.remove_remains(name)
