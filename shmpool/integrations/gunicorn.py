"""Server hooks for gunicorn. In gunicorn.conf.py:

    from shmpool.integrations.gunicorn import child_exit, on_exit, post_fork, post_worker_init, worker_exit

They need no setting and find the pools by themselves. Nothing but `user` and `group` (`post_fork`) depends on them:
without them the same happens a little later, when somebody needs it. With them

    hook                runs in     does
    post_fork           worker      takes its place in inherited pools, before `user` and `group` take its rights
    post_worker_init    worker      takes its place in the pools of the app, takes back what dead workers held, opens
                                    connections up to `min_connections`; then the worker takes requests
    worker_exit         worker      gives its place back
    child_exit          arbiter     takes back at once what the dead worker held
    on_exit             arbiter     the same once more, then leaves

The arbiter has pools only with `preload_app`; without it, its two hooks find none and do nothing, and a dead worker's
leases come back when its successor starts.

An exception in `child_exit` ends the whole server, one in `post_worker_init` the worker and then the server, one in
`on_exit` hides why the server ends. So no hook raises: what goes wrong is logged by gunicorn's logger, and the app
meets it when it needs the pool.

gunicorn is not imported, not even for its types. It counts the positional parameters of a hook: they are what they are.

Not here: making pools (the app does).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Protocol

import shmpool
from shmpool import Pool, PoolClosed

__all__ = ["child_exit", "on_exit", "post_fork", "post_worker_init", "worker_exit"]


class _Log(Protocol):
    def warning(self, message: str, /, *args: object) -> object: ...


class _Arbiter(Protocol):
    @property
    def log(self) -> _Log: ...


class _Worker(Protocol):
    @property
    def log(self) -> _Log: ...

    @property
    def pid(self) -> int | str: ...

    def notify(self) -> object: ...


def post_fork(server: _Arbiter, worker: _Worker) -> None:  # noqa: ARG001 - gunicorn counts the parameters
    """Before the worker becomes another user, who may not open what the arbiter made (`preload_app` with `user`)."""
    # Whoever looks for dead workers takes a place first.
    _for_each_pool(server.log, "the worker has no place in it yet", Pool.recover)


def post_worker_init(worker: _Worker) -> None:
    """Before the worker takes requests: join, and open connections up to `min_connections`.

    A server that cannot be reached costs one dial (at most `connection_timeout`), or none when it is known to be down,
    and a line in the log. That has all of gunicorn's `timeout` to itself: the time that the app took to load is not
    counted.
    """
    worker.notify()
    _for_each_pool(worker.log, "the worker starts without its connections", Pool.maintain)


def worker_exit(server: _Arbiter, worker: _Worker) -> None:
    """After the worker's last request: leave.

    gunicorn also calls it in the arbiter, for a worker that is not there any more: the arbiter stays. And it calls it
    while threads still have requests in hand (SIGQUIT, or beyond `graceful_timeout`), which they finish: then the
    worker leaves when its process ends, as it does without this hook.
    """
    if worker.pid == os.getpid() and not any(map(_may_have_requests, threading.enumerate())):
        _for_each_pool(server.log, "the worker leaves it when its process ends", Pool.leave)


def _may_have_requests(thread: threading.Thread) -> bool:
    """Not those of the pools, nor those that were not begun in Python, which it remembers when they have ended."""
    if thread is threading.current_thread() or thread.name.startswith("shmpool-"):
        return False
    return os.path.exists(f"/proc/self/task/{thread.native_id}")


def child_exit(server: _Arbiter, worker: _Worker) -> None:  # noqa: ARG001 - gunicorn counts the parameters
    """In the arbiter, when a worker has ended, however it did."""
    _for_each_pool(server.log, "what a dead worker held stays until it is needed", Pool.recover)


def on_exit(server: _Arbiter) -> None:
    """In the arbiter, when its workers have ended: some were killed just now, unseen by `child_exit`."""
    _for_each_pool(server.log, "what a dead worker held stays until it is needed", Pool.recover)
    _for_each_pool(server.log, "the arbiter did not leave it", Pool.leave)


def _for_each_pool(log: _Log, otherwise: str, do: Callable[[Pool], object]) -> None:
    for pool in shmpool.pools():
        try:
            do(pool)
        except PoolClosed:  # by another process, a moment ago
            continue
        except Exception as error:  # noqa: BLE001 - what a hook raises ends the server
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            log.warning("shmpool: pool %r: %s%s; %s", pool.name, error, cause, otherwise)
