"""How the benches make pools: one place that knows shmpool's constructor.

Not here: any timing. With `--floors` nothing of shmpool is imported.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any


def make_pool(dial: Callable[[Any], Any], max_connections: int, **config: Any) -> Any:
    """A pool without anything running on its own during a bench that the bench did not ask for."""
    shmpool = importlib.import_module("shmpool")
    settings = {"min_connections": 0, "idle_timeout": 3600.0, "max_lifetime": 7200.0, "get_timeout": 30.0}
    return shmpool.Pool(dial=dial, max_connections=max_connections, **{**settings, **config})


@contextlib.contextmanager
def pool_of(dial: Callable[[Any], Any], max_connections: int, **config: Any) -> Iterator[Any]:
    pool = make_pool(dial, max_connections, **config)
    try:
        yield pool
    finally:
        pool.close()


def inspector_of(pool: Any) -> Any:
    """The read-only view that another process has of the pool."""
    return inspector_of_name(pool.name)


def inspector_of_name(name: str) -> Any:
    return importlib.import_module("shmpool").inspect(name)


def warm(pool: Any, count: int) -> None:
    """Dials `count` connections and leaves them idle."""
    leases = [pool.get() for _ in range(count)]
    for lease in leases:
        assert lease.socket.fileno() >= 0
        lease.release()
