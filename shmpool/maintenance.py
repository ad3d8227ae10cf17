"""What happens to a pool without being asked for: one thread in each process that uses it, and the duties it does.

    every process, each tick (`maintenance_interval`)      of all, the elected one as well
      give its part back, when another closed the pool       recover      take back what the dead held
      close copies of connections that have ended            expire       lifetime, idle_timeout, evicted, resized
      check the connections that are private to it           check_idle   those that all can use
      report its overdue leases                              replenish    up to min_connections; at first: prewarm
                                                             report those of processes that did not

Elected is who holds a lock of the kernel's, so a death frees it at once, and the next tick of any other process takes
it. All duties are safe when two processes do them at once, or when a process dies in the middle: what they take from
the pool is in slots with an owner (core/slot.h). So the election saves work; nothing relies on it.

The thread holds the Pool weakly between ticks: one that is dropped ends it. Its life:

    (none) --start()--> runs --stop(), the pool's end, a dropped Pool--> over
                         | ^
            before a fork| |after it, in the parent
                         v |
                       stopped

Forks. Before each os.fork() the threads of all pools are ended and gone from the kernel's list (CPython 3.12 warns of
forks beside threads, and a child would have half a tick); in the parent they begin again. That takes as long as the
step they are in, at most FORK_PATIENCE_S for all together; a thread that is not done by then (a hook that sleeps) goes
on beside the fork. A fork in such a thread itself (a hook that forks) waits for the other pools' threads only. In a
child nothing of the parent's is used again: locks, threads and the election are new, and the thread begins with the
child's first use of the pool. A fork that Python does not see (uWSGI) is noticed by the process's number at the next
call.

Not here: what a duty does (the core, health, leaks), the reaction to a get() that finds nothing (core/pool.c).
"""

from __future__ import annotations

import functools
import logging
import math
import os
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ParamSpec, Protocol

from . import _core
from .errors import DialError, PoolClosed
from .health import Checker, Signal, check_idle
from .leaks import Takers, report_overdue

if TYPE_CHECKING:
    from ._core import PooledConnection
    from .config import PoolConfig

__all__ = ["Maintained", "Maintenance", "maintain_now"]

logger = logging.getLogger("shmpool.maintenance")

FORK_PATIENCE_S = 0.5
STOP_PATIENCE_S = 1.0
_GRACE_S = 0.1  # for what is being done, before it is interrupted
_JITTER = 0.1  # a tick comes up to this share of the interval early: processes forked together do not tick together
_SLICE_S = 1.0  # after so long in one duty the others have their turn
_REPEAT_AFTER_S = 60.0  # the same complaint again
_FINDING_OUT_S = 0.05  # while another process finds out whether the server answers


class Maintained(Protocol):
    """What maintenance needs of a pool. The methods are of the core; any thread may call them."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> PoolConfig: ...
    @property
    def closed(self) -> bool: ...
    @property
    def _maintenance(self) -> Maintenance: ...
    def _maintainer(self) -> bool: ...
    def _resign(self) -> None: ...
    def _recover(self) -> int: ...
    def _close_stale(self) -> int: ...
    def _expire(self, minimum: int, /) -> int: ...
    def _open(self, mask: int, /) -> bool: ...
    def _open_connections(self) -> int: ...
    def _is_short(self) -> bool: ...
    def _whole_mask(self) -> int: ...
    def _upstream(self) -> tuple[str, float, str, int]: ...
    def _interrupt_dials(self) -> None: ...
    def _prewarm_note(self, created: int, failed: int, done: bool, /) -> None: ...
    def _prewarm_is_done(self) -> bool: ...
    def _look_over(self, interval: float, only_private: bool, /) -> int: ...
    def _check_begin(self, interval: float, only_private: bool, /) -> PooledConnection | None: ...
    def _check_end(self, conn: PooledConnection, healthy: bool, /) -> bool: ...
    def _check_cut(self, conn: PooledConnection, /) -> None: ...
    def _overdue(self, age: float, only_own: bool, /) -> list[tuple[int, int, int, int, float]]: ...
    def _report_leak(self, slot: int, word: int, /) -> bool: ...
    def _note_frame(self, slot: int, connection: int, text: str, /) -> None: ...
    def _revoke(self, slot: int, word: int, /) -> bool: ...
    def _ended_elsewhere(self) -> bool: ...
    def _finish(self) -> bool: ...


# Duties -------------------------------------------------------------------------------------------------------------


class _Turn:
    """One round of duties: of whom, and when to stop. A duty returns True when it has more to do at once."""

    __slots__ = ("checker", "complain", "pool", "prewarm", "stop", "takers", "until")

    def __init__(
        self, maintenance: Maintenance, pool: Maintained, stop: Callable[[], bool], until: float = math.inf
    ) -> None:
        self.pool, self.stop, self.until = pool, stop, until
        self.checker, self.prewarm, self.takers = maintenance._checker, maintenance._prewarm, maintenance.takers
        self.complain = maintenance._complain

    def is_late(self) -> bool:
        return time.monotonic() > self.until


_Duty = Callable[[_Turn], bool]
_P = ParamSpec("_P")


def _close_stale(turn: _Turn) -> bool:
    turn.pool._close_stale()
    return False


def _check_private(turn: _Turn) -> bool:
    return _check(turn, only_private=True)


def _report_own(turn: _Turn) -> bool:
    report_overdue(turn.pool, turn.takers, only_own=True)
    return False


def _recover(turn: _Turn) -> bool:
    turn.pool._recover()
    return False


def _expire(turn: _Turn) -> bool:
    turn.pool._expire(turn.pool.config.effective_min_connections)
    return False


def _check_shared(turn: _Turn) -> bool:
    return _check(turn, only_private=False)


def _check(turn: _Turn, *, only_private: bool) -> bool:
    return check_idle(
        turn.pool, turn.checker, turn.complain, only_private=only_private, stop=turn.stop, until=turn.until
    )


def _replenish(turn: _Turn) -> bool:
    """Up to min_connections; the first time with prewarm_retries."""
    if not turn.pool._prewarm_is_done():
        return turn.prewarm.step(turn)
    try:
        return _open_missing(turn) == "later"
    except DialError as error:  # an outage is logged once, by who dials
        extra = {"pool": turn.pool.name, "slot": None, "connection_id": None, "reason": "minimum"}
        logger.debug("no connection for the minimum of pool %r: %s", turn.pool.name, error, extra=extra)
        return False


def _report_others(turn: _Turn) -> bool:
    report_overdue(turn.pool, turn.takers, only_own=False)
    return False


_OWN: tuple[_Duty, ...] = (_close_stale, _check_private, _report_own)
_OF_A_CLOSED_POOL: tuple[_Duty, ...] = (_close_stale, _report_own)
_ELECTED: tuple[_Duty, ...] = (_recover, _expire, _check_shared, _replenish, _report_others)


# Opening connections ------------------------------------------------------------------------------------------------


def _missing(pool: Maintained) -> int:
    return max(0, pool.config.effective_min_connections - pool._open_connections())


def _open_missing(turn: _Turn, opened: Callable[[], object] = lambda: None) -> str:
    """Open what is missing, one after another: "full", "none" (it cannot be now), or "later": others have their turn.

    Calls `opened` after each. Raises DialError.
    """
    while _missing(turn.pool):
        if turn.stop() or turn.is_late():
            return "later"
        if not turn.pool._open(turn.pool._whole_mask()):
            return "none" if _missing(turn.pool) else "full"
        opened()
    return "full"


class _Prewarm:
    """The first opening of min_connections: rounds, in each of which every missing connection is tried.

    A server that is down is noticed by one dial, which counts as a try of all that are missing; then comes a pause of
    `dial_backoff`, and the next round. After 1 + prewarm_retries rounds prewarming is done, and the missing ones are
    counted as failed. How far it is stands in the slab, for all; only the rounds are this process's own: who takes over
    from one that died begins with the first.
    """

    def __init__(self) -> None:
        self.due = math.inf  # of the next round, or of going on with this one
        self._rounds = 0

    def step(self, turn: _Turn) -> bool:
        """Go on with the round; True: at once again."""
        pool = turn.pool
        self.due = math.inf
        try:
            how = _open_missing(turn, lambda: pool._prewarm_note(1, 0, False))
        except DialError as error:
            if turn.stop():  # it was interrupted, and says nothing
                return True
            self._failed(turn, str(error))
            return False
        except Exception:
            self._failed(turn, "")
            raise
        if how == "full" and pool._is_short():  # the rest are under way, in whichever process
            self.due = time.monotonic() + _FINDING_OUT_S
        elif how == "full":
            pool._prewarm_note(0, 0, True)
        elif how == "none":
            state, wait, why, _ = pool._upstream()
            if state in ("down", "probing"):
                self._failed(turn, why, wait)
            else:  # another process is finding out, or has the permits
                self.due = time.monotonic() + max(wait, _FINDING_OUT_S)
        return how == "later"

    def _failed(self, turn: _Turn, why: str, wait: float = 0.0) -> None:
        pool, config = turn.pool, turn.pool.config
        self._rounds += 1
        if self._rounds > config.prewarm_retries:
            missing = _missing(pool)
            pool._prewarm_note(0, missing, True)
            logger.info(
                "pool %r begins with %d of %d connections%s; more are tried every %g s",
                pool.name,
                config.effective_min_connections - missing,
                config.effective_min_connections,
                f": {why}" if why else "",
                config.maintenance_interval,
                extra={"pool": pool.name, "reason": "prewarm"},
            )
            return
        first, longest = config.dial_backoff
        # No shorter than a step of the upstream's (core/upstream.h), which doubles in the same way.
        pause = min(longest, first * 2 ** (self._rounds - 1)) * random.uniform(1.0, 1.5)
        self.due = time.monotonic() + max(pause, wait)


# The thread ---------------------------------------------------------------------------------------------------------


class _Run:
    """One life of the thread."""

    __slots__ = ("check_thread", "over", "pid", "pool", "stopping", "thread", "wake")

    def __init__(self, pool: Maintained, target: Callable[[_Run], object]) -> None:
        self.pid = os.getpid()
        self.wake = wake = Signal()
        self.stopping = self.over = False
        self.check_thread: threading.Thread | None = None  # that ended with this one
        self.pool = weakref.ref(pool, lambda _: wake.set())
        name = f"shmpool-maintenance:{pool.name}"
        self.thread = threading.Thread(target=target, args=(self,), name=name, daemon=True)

    def stop(self) -> None:
        self.stopping = True
        self.wake.set()

    def must_stop(self) -> bool:
        return self.stopping or self.pid != os.getpid()


class Maintenance:
    """The maintenance of one Pool object in one process. Any thread may call anything.

    It never holds the Pool, so the Pool may hold it.
    """

    def __init__(self) -> None:
        self.takers = Takers()
        self._begin_anew()
        key = id(self)
        _all[key] = weakref.ref(self, lambda _: _all.pop(key, None))

    def _begin_anew(self) -> None:
        """Nothing of another process's may be used: its locks may be held, its threads are not here."""
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a finalizer may run stop() in a thread that has it
        self._run: _Run | None = None
        self._suspended = 0  # forks under way
        self._ended = self._elected = self._kicked = self._cannot_start = False
        self._pool: weakref.ref[Maintained] | None = None
        self._next_tick = 0.0  # time.monotonic()
        self._checker = Checker()
        self._prewarm = _Prewarm()
        self._complaints: dict[str, float] = {}
        self.takers.clear()

    def _notice_fork(self) -> None:
        if self._pid != os.getpid():
            self._begin_anew()

    # ---- its life --------------------------------------------------------------------------------------------------

    def start(self, pool: Maintained) -> bool:
        """See that the thread runs. Nothing happens when it does, after stop(), and with an interval of math.inf.

        False: this is the process that uWSGI forks its workers from, and may become one of them. Try again later."""
        self._notice_fork()
        if math.isinf(pool.config.maintenance_interval):
            return True
        if _is_uwsgi_master():
            return False
        with self._lock:
            if self._ended:
                return True
            self._pool = weakref.ref(pool)
            if not self._suspended:
                self._launch(pool)
        return True

    def _launch(self, pool: Maintained) -> None:
        if self._run is not None and not self._run.over:
            self._run.stopping = False  # it was to end for a fork, and had not got to it
            return
        self._run = run = _Run(pool, self._live)  # before it starts: a signal handler may fork in the middle
        try:
            run.thread.start()
        except RuntimeError as error:  # the limit of threads, or the end of the interpreter
            if not self._cannot_start:
                logger.warning(
                    "pool %r has no maintenance thread in process %d: %s",
                    pool.name,
                    self._pid,
                    error,
                    extra={"pool": pool.name, "reason": "thread"},
                )
            self._cannot_start = run.over = True
            return
        except BaseException:  # a signal handler's: it may have begun
            run.stop()
            raise

    def kick(self) -> None:
        """Tick now, not only when the interval is over."""
        self._notice_fork()
        self._kicked = True
        if (run := self._run) is not None:
            run.wake.set()

    def stop(self, timeout: float = STOP_PATIENCE_S) -> bool:
        """End the thread for good, in this process; what it does is interrupted. Returns whether it has ended.

        It has not when this is called in that thread itself (it ends when the caller is done), or when a hook of the
        program goes on for `timeout` seconds.
        """
        self._notice_fork()
        with self._lock:
            self._ended = True
            run = self._run
        if run is None or not run.thread.is_alive():
            self._checker.stop()  # of a maintain() by hand
            return True
        run.stop()
        if self._is_here(run):
            return False
        _join([(self, run)], time.monotonic() + timeout)
        if run.thread.is_alive():
            logger.warning(
                "the thread %r still runs a hook after %g s; it ends when that does", run.thread.name, timeout
            )
        return not run.thread.is_alive()

    def is_running(self) -> bool:
        """Whether this process has the thread now."""
        run = self._run
        return self._pid == os.getpid() and run is not None and not run.over and run.thread.is_alive()

    def is_thread(self, ident: int) -> bool:
        """Whether that is the thread of this process, by its threading.get_ident()."""
        run = self._run
        return self._pid == os.getpid() and run is not None and run.thread.ident == ident

    def _is_here(self, run: _Run) -> bool:
        return run.thread is threading.current_thread() or self._checker.runs_here()

    def _interrupt(self, run: _Run) -> None:
        self._checker.interrupt()
        if (pool := run.pool()) is not None:
            pool._interrupt_dials()

    def _suspend(self, timeout: float) -> _Run | None:
        """Before a fork: the run that must end; the caller waits for it."""
        if self._pid != os.getpid() or not self._lock.acquire(timeout=timeout):
            return None
        try:
            self._suspended += 1
            run = self._run
            if run is None or not run.thread.is_alive() or self._is_here(run):
                return None
            run.stop()
            return run
        finally:
            self._lock.release()

    def _resume(self) -> None:
        """After the fork, in the parent."""
        with self._lock:
            self._suspended = max(0, self._suspended - 1)
            pool = self._pool() if self._pool is not None else None
            if pool is not None and not self._suspended and not self._ended:
                self._launch(pool)
                if self._run is None or self._run.over:
                    pool._resign()

    # ---- in the thread ---------------------------------------------------------------------------------------------

    def _live(self, run: _Run) -> None:
        try:
            while not self._is_over(run):
                pool = run.pool()
                if pool is None or self._has_ended(pool):
                    break
                wait = self._turn(pool, run)
                del pool
                run.wake.wait(wait)
        finally:
            if run.pid == os.getpid():  # else it forked, and what is left here is nobody's
                run.check_thread = self._checker.stop()
                self._give_up_election(run)
                run.over = True

    def _is_over(self, run: _Run) -> bool:
        """Decided under the lock: whoever wants the thread back after a fork finds it running, or over."""
        if run.pid != os.getpid():
            return True
        with self._lock:
            run.over = run.stopping
            return run.over

    def _has_ended(self, pool: Maintained) -> bool:
        """Whether the pool is closed and this process has no part in it any more."""
        if not pool.closed:
            return False
        return not pool._ended_elsewhere() or self._guarded("giving the part back", pool._finish)

    def _give_up_election(self, run: _Run) -> None:
        if self._ended and self._elected and (pool := run.pool()) is not None:
            pool._resign()

    def _turn(self, pool: Maintained, run: _Run) -> float:
        """Do what is due; seconds until something is due again."""
        if self._kicked or time.monotonic() >= self._next_tick:
            self._kicked = False
            self._prewarm.due = math.inf
            more = self._tick(pool, run)
            interval = pool.config.maintenance_interval * random.uniform(1 - _JITTER, 1)
            self._next_tick = time.monotonic() + (0 if more else interval)
        elif time.monotonic() >= self._prewarm.due:
            self._prewarm.due = math.inf
            if self._do((_replenish,), pool, run):
                self._prewarm.due = time.monotonic()
        return max(0.0, min(self._next_tick, self._prewarm.due) - time.monotonic())

    def _tick(self, pool: Maintained, run: _Run) -> bool:
        """All duties that are this process's now; True: again at once."""
        if pool.closed:
            self._do(_OF_A_CLOSED_POOL, pool, run)
            return False
        more = self._do(_OWN, pool, run)
        if self._guarded("the election", self._be_elected, pool):
            more = self._do(_ELECTED, pool, run) or more
        return more or run.must_stop()

    def _be_elected(self, pool: Maintained) -> bool:
        elected = pool._maintainer()
        if elected and not self._elected:
            logger.info(
                "process %d maintains pool %r", self._pid, pool.name, extra={"pool": pool.name, "reason": "elected"}
            )
        self._elected = elected
        return elected

    def _do(self, duties: Iterable[_Duty], pool: Maintained, run: _Run) -> bool:
        """Each of the duties, whatever the others raise; True: there is more to do at once."""
        more = False
        for duty in duties:
            if run.must_stop():
                return True
            turn = _Turn(self, pool, run.must_stop, time.monotonic() + _SLICE_S)
            more = self._guarded(duty.__name__.lstrip("_"), duty, turn) or more
        return more

    def _guarded(self, what: str, do: Callable[_P, bool], *args: _P.args, **named: _P.kwargs) -> bool:
        try:
            return do(*args, **named)
        except PoolClosed:  # meanwhile: the next look at the pool sees it
            return False
        except BaseException as error:  # noqa: BLE001 - a hook that calls sys.exit() does not end maintenance
            self._complain(f"{what} failed, maintenance goes on: {type(error).__name__}", error)
            return False

    def _complain(self, text: str, error: BaseException | None = None) -> None:
        """WARNING, the same text at most once a minute."""
        now = time.monotonic()
        if now - self._complaints.get(text, -math.inf) < _REPEAT_AFTER_S:
            return
        if len(self._complaints) > 100:
            self._complaints.clear()
        self._complaints[text] = now
        pool = self._pool() if self._pool is not None else None
        extra = {"pool": pool.name if pool is not None else "", "reason": "maintenance"}
        logger.warning("%s", text, exc_info=error, extra=extra)


def _is_uwsgi_master() -> bool:
    """Whether uWSGI forks this process. It does so without the interpreter's lock: if a thread had it, a child would
    wait for it for ever. Its workers and mules fork no more."""
    uwsgi = sys.modules.get("uwsgi")
    return uwsgi is not None and not (uwsgi.worker_id() or uwsgi.mule_id())


def maintain_now(pool: Maintained) -> None:
    """All duties once, in the calling thread, whoever is elected.

    The first exception is raised when all have been done; opening connections raises DialError.
    """
    maintenance = pool._maintenance
    maintenance._notice_fork()
    turn = _Turn(maintenance, pool, lambda: pool.closed)
    first: Exception | None = None
    for duty in (
        _recover,
        _close_stale,
        _expire,
        _check_private,
        _check_shared,
        _open_all,
        _report_own,
        _report_others,
    ):
        try:
            duty(turn)
        except Exception as error:  # noqa: BLE001 - raised below
            first = first or error
    if not maintenance.is_running():
        maintenance._checker.stop()
    if first is not None:
        try:
            raise first
        finally:
            first = None  # else it and this frame keep each other, and the connection that was being checked


def _open_all(turn: _Turn) -> bool:
    """Raises DialError when a dial fails; one that is not tried, as the server is known to be down, has not failed."""
    pool = turn.pool
    note = not pool._prewarm_is_done()
    how = _open_missing(turn, lambda: pool._prewarm_note(1, 0, False) if note else None)
    if note and how == "full":
        pool._prewarm_note(0, 0, True)
    return False


# Forks --------------------------------------------------------------------------------------------------------------

# By id. A plain dict: a copy of its values is atomic.
_all: dict[int, weakref.ref[Maintenance]] = {}


def _every() -> list[Maintenance]:
    return [maintenance for reference in list(_all.values()) if (maintenance := reference()) is not None]


def _join(runs: list[tuple[Maintenance, _Run]], deadline: float) -> None:
    """Wait until all threads have ended and gone: for a moment as they are, then their work is interrupted."""
    grace = min(time.monotonic() + _GRACE_S, deadline)
    for _, run in runs:
        run.thread.join(max(0.0, grace - time.monotonic()))
    for maintenance, run in runs:
        if run.thread.is_alive():
            maintenance._interrupt(run)
    for _, run in runs:
        run.thread.join(max(0.0, deadline - time.monotonic()))
        for thread in (run.thread, run.check_thread):
            if thread is not None and not thread.is_alive():
                _wait_gone(thread.native_id, deadline)


def _wait_gone(native_id: int | None, deadline: float) -> None:
    """A thread that was joined is in the kernel's list for a moment longer."""
    while native_id is not None and os.path.exists(f"/proc/self/task/{native_id}") and time.monotonic() < deadline:
        time.sleep(0.00005)


def _before_fork() -> None:
    deadline = time.monotonic() + FORK_PATIENCE_S
    every = _every()
    runs = [
        (maintenance, run)
        for maintenance in every
        if (run := maintenance._suspend(max(0.0, deadline - time.monotonic()))) is not None
    ]
    _join(runs, deadline)


def _after_fork_in_parent() -> None:
    global _resumes_due
    if threading.current_thread() is threading.main_thread():
        _resumes_due += 1
    else:
        _resume_all()


def _resume_soon() -> None:
    global _resumes_due
    while _resumes_due:
        _resumes_due -= 1
        _resume_all()


def _resume_all() -> None:
    for maintenance in _every():
        maintenance._resume()


def _after_fork_in_child() -> None:
    global _resumes_due
    _resumes_due = 0
    for maintenance in _every():
        maintenance._begin_anew()


_resumes_due = 0  # touched by the main thread alone
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
# CPython 3.13.0 to 3.13.9, and 3.14.0, count threads for their warning after these hooks (gh-137109): after a fork in
# the main thread ours begin when os.fork() has returned. So this hook has no step in Python, where it would be called
# already. After a fork in another thread they begin at once: the warning is right there, the main one may be asleep.
os.register_at_fork(after_in_parent=functools.partial(_core.call_soon, _resume_soon))
