"""Celery's signals tell the pools of a process which worker comes, which goes, and which died.

    app = Celery("shop", broker="redis://127.0.0.1:6379/0")
    pool = shmpool.Pool("tcp://db.example:5432", max_connections=8)     # in the module of the tasks, or one it imports
    shmpool.integrations.celery.install()                               # once, in module code too

What: `install()` connects to four signals. Pools made later are seen too: each signal asks for the pools there are.

    signal                          comes in     and then each open pool
    worker_before_create_process    the parent   takes back what dead workers held: one of them is about to be replaced
    worker_process_init             the child    takes this process in, before its first task
    worker_process_shutdown         the child    lets this process go: its leases end, its place is free
    worker_shutdown                 the parent   takes back what the workers held that a shutdown killed

Why: Celery ends its children by `os._exit()`, which runs no exit handler, and it has no signal for a child's death.
`worker_before_create_process` is the nearest: a child that died is replaced in the same turn of the parent's event loop
in which its death was noticed, about a millisecond after it.

What does not come: any word of a death during a shutdown (until `worker_shutdown`), and of any death with brokers that
Celery serves by threads instead of its event loop. Nothing depends on the signals: without them a dead worker's
leases are taken back as soon as another `get()` needs them, and `maintain()` takes them back at any time.

Errors: a hook that raises does not stop Celery, which logs it; a worker that found no place in the pool (PoolExhausted,
`max_workers`) so says it when it starts, not at its first task.

Not here: clients on a pool (`redis`), pools of `worker_pool = "threads"` or `"solo"`: one process, which needs no hook.
"""

from __future__ import annotations

import contextlib

from celery import signals

from ..errors import PoolClosed
from ..pool import pools

__all__ = ["install"]


def install() -> None:
    """Connect the pools of this process to Celery's signals. More than one call does no more than one."""
    for signal, hook in (
        (signals.worker_before_create_process, _recover),
        (signals.worker_process_init, _recover),  # whoever looks for the dead takes part
        (signals.worker_process_shutdown, _leave),
        (signals.worker_shutdown, _recover),
    ):
        signal.connect(hook, dispatch_uid=f"{__name__}.{hook.__name__}")


def _recover(**_: object) -> None:
    for pool in pools():
        with contextlib.suppress(PoolClosed):  # closed since we asked
            pool.recover()


def _leave(**_: object) -> None:
    for pool in pools():
        pool.leave()
