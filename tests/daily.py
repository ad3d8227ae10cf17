"""What the workers of a day do (test_day): lease, use, return, leak, lose, and keep books of it that outlive them.

What: `Tally` is a file with the counts of each worker's threads; `work` is the task of a worker (`joining.Worker`), by
whatever way it was started; `resolve` makes a process look its server up in a file, as a name in DNS that changes.

Why: a worker that is killed cannot tell what it did. Its tally says it, but for the call that was under way.

Not here: the script of the day, and its end (test_day).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shmpool.pool
from shmpool import LeaseExpired, Pool, PooledConnection
from shmpool.config import Target
from shmpool.dialing import dial_target
from tests.books import ABSURD, Ledger
from tests.joining import Mine
from tests.processes import descriptors
from tests.servers import ask, exclusive_use

THREADS = 2  # of each worker
ENDINGS = ("calls", "successes", "timeouts", "exhausted", "refused", "dial_errors", "interrupted")
LEAK_S = 0.4


class Tally:
    """A word that says when to end, and for each thread of each worker a row of counts, which it alone writes."""

    def __init__(self, path: str, workers: int) -> None:
        size = 8 * (1 + workers * THREADS * len(ENDINGS))
        with open(path, "r+b") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        self._words = memoryview(self._memory).cast("Q")

    def end(self) -> None:
        self._words[0] = 1

    def is_over(self) -> bool:
        return bool(self._words[0])

    def note(self, row: int, ledger: Ledger) -> None:
        for at, name in enumerate(ENDINGS):
            self._words[1 + row * len(ENDINGS) + at] = ledger[name]

    def total(self) -> Ledger:
        total = Ledger()
        for at, name in enumerate(ENDINGS):
            total[name] = sum(self._words[1 + at :: len(ENDINGS)])
            assert total[name] < ABSURD
        return total

    def close(self) -> None:
        self._words.release()
        self._memory.close()


def resolve(path: str) -> None:
    """In this process: connections go to the target that the file names now."""

    def dial(_target: Target, *args: Any) -> socket.socket:
        return dial_target(Target.parse(Path(path).read_text()), *args)

    vars(shmpool.pool)["dial_target"] = dial


def handshake(conn: PooledConnection) -> bool:
    """on_created, and the health check: somebody is there who answers."""
    return ask(conn.socket, "PING").startswith("PONG")


OWN: dict[str, Any] = {"on_created": handshake, "health_check": handshake}


def attend(mine: Mine, name: str) -> int:
    """Join the pool; how many descriptors this process had before."""
    before = len(descriptors())
    mine.given = shmpool.attach(name, **OWN)
    return before


def work(mine: Mine, tally_path: str, name_path: str, workers: int, place: int, seed: int) -> int:
    """Until the day is over: what callers do, and what they should not. How many leases were taken away."""
    resolve(name_path)
    warnings.simplefilter("ignore", ResourceWarning)  # of leases that are dropped
    tally = Tally(tally_path, workers)
    errors: list[str] = []
    expired: list[int] = []

    def run(thread: int) -> None:
        try:
            expired.append(_Caller(mine.pool, tally, place * THREADS + thread, seed + thread).run())
        except BaseException:  # noqa: BLE001 - told below
            errors.append(traceback.format_exc())
            tally.end()

    threads = [threading.Thread(target=run, args=(at,)) for at in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.close()
    assert not errors, errors[0]
    return sum(expired)


def threads_of_pools(_mine: Mine) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shmpool-")]


class _Caller:
    """One thread of a worker."""

    def __init__(self, pool: Pool, tally: Tally, row: int, seed: int) -> None:
        self.pool, self.tally, self.row = pool, tally, row
        self.random = random.Random(seed)
        self.ledger = Ledger()
        self.expired = 0

    def run(self) -> int:
        while not self.tally.is_over():
            self.ledger["calls"] += 1
            self.tally.note(self.row, self.ledger)
            leased = self._call()
            self.tally.note(self.row, self.ledger)
            if leased is not None:
                self._spend(leased)
                del leased
        return self.expired

    def _call(self) -> PooledConnection | None:
        if self.random.random() < 0.2:
            return self.ledger.call(self.pool.try_get)
        refused = self.ledger["refused"]
        leased = self.ledger.call(self.pool.get, timeout=self.random.choice([0, 0.02, 0.3, 1.0]))
        if self.ledger["refused"] > refused:
            time.sleep(0.005)  # sleep: the pool is draining, and says so at once
        return leased

    def _spend(self, leased: PooledConnection) -> None:
        ways: list[Callable[[PooledConnection], None]] = [self._use, self._keep, self._drop, self._throw_away]
        (what,) = self.random.choices(ways, weights=[200, 1, 1, 4])
        try:
            with contextlib.suppress(OSError, EOFError):  # the server is away
                what(leased)
        except LeaseExpired:  # it was taken away
            self.expired += 1

    def _use(self, leased: PooledConnection) -> None:
        with leased:
            exclusive_use(leased.socket, f"{os.getpid()}:{self.row}")
            if self.random.random() < 0.1:
                time.sleep(self.random.uniform(0, 0.01))  # sleep: the connection is in use for a while

    def _keep(self, leased: PooledConnection) -> None:
        """For longer than a lease may last: it is taken away."""
        time.sleep(LEAK_S * self.random.uniform(1, 2))  # sleep: a caller that has forgotten
        leased.release()

    def _drop(self, leased: PooledConnection) -> None:
        del leased

    def _throw_away(self, leased: PooledConnection) -> None:
        leased.discard()
