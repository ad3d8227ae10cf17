"""A Celery application whose tasks lease from one shared pool and end in every way a task can end.

What: `SHMPOOL_TEST_APP` (JSON) says where broker, upstream server and pool are; the pool is made in module code, which
Celery's parent process runs before it forks. Each task proves at the upstream that nobody else uses its connection.

Not here: who starts the worker and judges what the tasks did (`tests/test_servers_celery.py`).
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

import shmpool
from tests.servers import ask, exclusive_use

SETTINGS: dict[str, Any] = json.loads(os.environ["SHMPOOL_TEST_APP"])

app = Celery("celery_tasks", broker=SETTINGS["broker"], backend=SETTINGS["broker"])
app.conf.update(SETTINGS["celery"])

pool = shmpool.Pool(SETTINGS["upstream"], **SETTINGS["pool"])

if SETTINGS["hooks"]:
    from shmpool.integrations import celery as hooks

    hooks.install()


@app.task(name="use", bind=True)
def use(self: Any) -> list[int]:
    """Lease, use exclusively, release."""
    with pool.get() as lease:
        return [os.getpid(), exclusive_use(lease.socket, f"use:{self.request.id}", uses=2)]


@app.task(name="die", bind=True)
def die(self: Any, how: str) -> None:
    """End this worker process, or only this task, in the middle of an exclusive use."""
    with pool.get() as lease:
        ask(lease.socket, f"BEGIN die:{self.request.id}")
        _end(how)


@app.task(name="die_once", bind=True, acks_late=True, reject_on_worker_lost=True)
def die_once(self: Any) -> list[int]:
    """Kill the first worker that takes this task; the one that gets it again does the work."""
    with pool.get() as lease:
        if not self.request.delivery_info["redelivered"]:
            ask(lease.socket, f"BEGIN once:{self.request.id}")
            _end("SIGKILL")
        return [os.getpid(), exclusive_use(lease.socket, f"again:{self.request.id}")]


@app.task(name="overrun")
def overrun(stubborn: bool) -> None:
    """Hold a lease until a time limit: the soft one, or, stubborn, the hard one. Also until the worker is shut down."""
    with pool.get() as lease:
        ask(lease.socket, f"BEGIN overrun:{os.getpid()}")
        while True:
            try:
                signal.pause()
            except SoftTimeLimitExceeded:
                if not stubborn:
                    raise


def _end(how: str) -> None:
    if how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "_exit":
        os._exit(3)
    if how == "SystemExit":
        raise SystemExit(4)
    raise LookupError(how)
