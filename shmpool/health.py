"""Checks of idle connections by the program's `health_check`, each within its time.

    maintenance thread                              check thread (only with a health_check)
    _check_begin: the connection is CHECKING,
    nobody else can have it
    Checker.run ------------------- job ----------> health_check(conn)
      waits, at most health_check_timeout             |
      then: _check_cut, socket calls end              |  recv() returns, the check ends
      then: _CutShort is raised in that thread        |  a loop in Python ends
      then: it is left behind                         |  it goes on, in C; no check begins until it ends
    _check_end: idle again, or ended

A check that was cut short has failed, whatever it returns after that.

Invariants: one check at a time in a process and pool. A connection that `_check_begin` gave goes to `_check_end`,
whatever is raised. A thread in which _CutShort was raised gets no other job: the exception may come late.

Without a health_check the core looks by itself (closed, reset, unread bytes), and there is no such thread.

Not here: which connection is due (the core), when (maintenance).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from _thread import allocate_lock
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ._core import PooledConnection
    from .config import PoolConfig

__all__ = ["Checker", "Outcome", "Signal", "check_idle"]

logger = logging.getLogger("shmpool.maintenance")

GRACE_S = 0.1  # for a check to end, after each of the ways to end it


class Signal:
    """An event for one waiter, forgotten when it has been seen. Unlike threading.Event it may be set by anything that
    the garbage collector runs, also in the middle of wait()."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        with suppress(RuntimeError):  # it is set already
            self._lock.release()

    def wait(self, timeout: float) -> bool:
        return self._lock.acquire(timeout=min(max(0.0, timeout), threading.TIMEOUT_MAX))


class _CutShort(BaseException):
    """Raised in a check beyond its time. No Exception: a check that catches those and tries again ends as well."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a check. `error`: what it raised. `broken`: the check failed to say anything."""

    healthy: bool
    why: str = ""
    error: BaseException | None = None
    broken: bool = False


class _Job:
    __slots__ = ("_check", "_conn", "_error", "_healthy", "_signal", "finished", "interrupted")

    def __init__(self, check: Callable[[PooledConnection], object], conn: PooledConnection) -> None:
        self._check, self._conn = check, conn
        self._healthy = False
        self._error: BaseException | None = None
        self._signal = Signal()
        self.finished = self.interrupted = False

    def run(self) -> None:
        try:
            self._healthy = bool(self._check(self._conn))
        except BaseException as error:  # noqa: BLE001 - the outcome has it
            self._error = error
        finally:
            self.finish()

    def finish(self) -> None:
        self.finished = True
        self._signal.set()

    def interrupt(self) -> None:
        self.interrupted = True
        self._signal.set()

    def wait(self, timeout: float, *, heed_interrupts: bool = False) -> bool:
        """Until it has finished; whether it has."""
        deadline = time.monotonic() + timeout
        while not self.finished and not (heed_interrupts and self.interrupted):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._signal.wait(left)
        return self.finished

    def outcome(self) -> Outcome:
        if self._error is not None:
            return Outcome(False, f"it raised {type(self._error).__name__}", self._error, broken=True)
        return Outcome(self._healthy, "" if self._healthy else "it said no")


class _Hand:
    """A thread that runs checks one after another, until it is told to end."""

    def __init__(self, name: str) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.thread = threading.Thread(target=_serve, args=(self.jobs,), name=name, daemon=True)
        try:
            self.thread.start()
        except BaseException:  # a signal handler's: it may have begun
            self.jobs.put(None)
            raise


def _serve(jobs: SimpleQueue[_Job | None]) -> None:
    job = None
    with suppress(_CutShort):  # the check had just ended
        try:
            while (job := jobs.get()) is not None:
                job.run()
                job = None  # nothing is kept of it while we wait
        finally:
            if job is not None:
                job.finish()


class Checker:
    """Runs the checks of one pool in one process, one at a time. Any thread may call."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._hand: _Hand | None = None
        self._job: _Job | None = None
        self._left_behind: threading.Thread | None = None

    def ready(self, pool: str) -> bool:
        """Whether a check can begin: not while one is left behind. Raises RuntimeError when there can be no thread."""
        if not self._one_at_a_time.acquire(blocking=False):
            return False  # a check is under way; a signal handler in its thread would wait for itself
        try:
            if self._left_behind is not None and self._left_behind.is_alive():
                return False
            self._left_behind = None
            if self._hand is None:
                self._hand = _Hand(f"shmpool-check:{pool}")
            return True
        finally:
            self._one_at_a_time.release()

    def run(
        self,
        check: Callable[[PooledConnection], object],
        conn: PooledConnection,
        timeout: float,
        cut: Callable[[PooledConnection], object],
    ) -> Outcome:
        """Run `check(conn)` in the check thread; returns soon after `timeout` seconds or interrupt().

        `cut(conn)` ends what the check waits for on the connection. Call ready() before.
        """
        if not self._one_at_a_time.acquire(blocking=False):  # see ready()
            return Outcome(True, "it was not run")
        try:
            hand = self._hand
            if hand is None:  # another thread's check was left behind just now
                return Outcome(True, "it was not run")
            self._job = job = _Job(check, conn)
            hand.jobs.put(job)
            try:
                if job.wait(timeout, heed_interrupts=True):
                    return job.outcome()
            except BaseException:  # a signal handler's, in a thread that calls maintain()
                self._end(job, hand, lambda: cut(conn))
                raise
            finally:
                self._job = None
            self._end(job, hand, lambda: cut(conn))
        finally:
            self._one_at_a_time.release()
        if job.interrupted:
            return Outcome(False, "it was interrupted")
        return Outcome(False, f"it was not done in {timeout:g} s", broken=True)

    def _end(self, job: _Job, hand: _Hand, cut: Callable[[], object]) -> None:
        try:
            cut()
        finally:
            if not job.wait(GRACE_S):
                self._leave(job, hand)

    def _leave(self, job: _Job, hand: _Hand) -> None:
        self._hand = None
        _raise_in(hand.thread)
        hand.jobs.put(None)
        if not job.wait(GRACE_S):
            self._left_behind = hand.thread
            logger.warning(
                "a health check goes on beyond its time in thread %r; it is left behind, no check begins until it ends",
                hand.thread.name,
            )

    def interrupt(self) -> None:
        """Let the check that runs now fail at once."""
        if (job := self._job) is not None:
            job.interrupt()

    def stop(self, timeout: float = GRACE_S) -> threading.Thread | None:
        """End the thread, if there is one, and return it; ready() makes another. Does nothing while a check runs."""
        if not self._one_at_a_time.acquire(blocking=False):
            return None
        try:
            hand, self._hand = self._hand, None
        finally:
            self._one_at_a_time.release()
        if hand is None:
            return None
        hand.jobs.put(None)
        hand.thread.join(timeout)
        return hand.thread

    def runs_here(self) -> bool:
        """Whether the caller is the check thread."""
        hand = self._hand
        return hand is not None and hand.thread is threading.current_thread()


def _raise_in(thread: threading.Thread) -> None:
    """Raise _CutShort in a thread that cannot have ended, at its next step in Python."""
    try:
        import ctypes
    except ImportError:  # a Python without it: loops in Python are left behind
        return
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_CutShort))


class Checked(Protocol):
    """What checking needs of a pool."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> PoolConfig: ...
    def _look_over(self, interval: float, only_private: bool, /) -> int: ...
    def _check_begin(self, interval: float, only_private: bool, /) -> PooledConnection | None: ...
    def _check_end(self, conn: PooledConnection, healthy: bool, /) -> bool: ...
    def _check_cut(self, conn: PooledConnection, /) -> None: ...


def check_idle(
    pool: Checked,
    checker: Checker,
    complain: Callable[[str, BaseException | None], object],
    *,
    only_private: bool,
    stop: Callable[[], bool],
    until: float = math.inf,
) -> bool:
    """Check the idle connections that are due: those private to this process, or all it may use.

    Begins no check when `stop()` says so, nor after `until` (time.monotonic()). True: there may be more to do at once.
    """
    config = pool.config
    interval, check = config.health_check_interval, config.health_check
    if math.isinf(interval):
        return False
    if check is None:
        pool._look_over(interval, only_private)
        return False
    if checker.runs_here() or not checker.ready(pool.name):  # a check that calls maintain() does not wait for itself
        return False
    while not stop() and (conn := pool._check_begin(interval, only_private)) is not None:
        _check(pool, checker, check, conn, complain)
        if not checker.ready(pool.name):
            return False
        if time.monotonic() > until:
            return True
    return False


def _check(
    pool: Checked,
    checker: Checker,
    check: Callable[[PooledConnection], object],
    conn: PooledConnection,
    complain: Callable[[str, BaseException | None], object],
) -> None:
    connection = conn.id
    outcome = Outcome(False, "it was not run")
    try:
        outcome = checker.run(check, conn, pool.config.health_check_timeout, pool._check_cut)
    finally:
        pool._check_end(conn, outcome.healthy)
    if outcome.healthy:
        return
    logger.debug(
        "the health check of connection %d of pool %r failed: %s",
        connection,
        pool.name,
        outcome.why,
        extra={"pool": pool.name, "connection_id": connection, "reason": "unhealthy"},
    )
    if outcome.broken:
        complain(f"the health check of pool {pool.name!r} fails: {outcome.why}", outcome.error)
