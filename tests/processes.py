"""Forked children for the tests: run a function there, bring back its result or exception, stop it, kill it, wait.

What: `Family` forks children and ends every one that still lives when its block ends; `Child` is one of them; `Latch`
and `Counters` are seen by all processes forked after they were made; `until` waits for a condition with a deadline;
`proven` is a pool on an `ExclusiveServer` that proves at its end that nothing was shared, exceeded or lost, for which
`lease_every_slot` is the last word.

Why: multiprocessing puts handlers of its own around a child, and hides how it ended. Here a child is a bare fork that
ends by `os._exit`, so what a test sees is what the pool does.

Randomness: `chance()` makes a generator whose seed is printed and can be set by SHMPOOL_TEST_SEED. SHMPOOL_TEST_LONG=1
asks for the long forms (`LONG`).

Not here: servers (`servers.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import pickle
import random
import select
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

from shmpool import Pool, PoolClosed
from tests.servers import ExclusiveServer, exclusive_use

TIMEOUT_S = 30.0
LONG = os.environ.get("SHMPOOL_TEST_LONG", "") not in ("", "0")
SECONDS = float(os.environ.get("SHMPOOL_TEST_SECONDS", 20))  # of each long storm

Way = Literal["os", "libc", "clone"]
_CODE_RAISED = 70
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}


def chance() -> random.Random:
    """A generator of its own; the seed stands in the output of a failing test."""
    seed = int(os.environ.get("SHMPOOL_TEST_SEED", random.randrange(1 << 32)))
    print(f"SHMPOOL_TEST_SEED={seed}")
    return random.Random(seed)


def until(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> float:
    """Wait until `condition()` is true; returns the seconds it took, asserts after `timeout_s`."""
    begun = time.monotonic()
    while not condition():
        waited = time.monotonic() - begun
        assert waited < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.0005)  # sleep: between two looks at a condition of another process
    return time.monotonic() - begun


def until_collected(gone: weakref.ref[Any]) -> None:
    """Only garbage holds it. A pool's maintenance thread does too while it does something: then another try is due."""

    def collected() -> bool:
        gc.collect()
        return gone() is None

    until(collected, "it is collected")


def ready(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """The open descriptors of a process and what they are."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:  # the directory being listed, or closed meanwhile
            continue
    return found


class Latch:
    """Set once by any process, seen by all."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        os.eventfd_write(self._fd, 1)

    def is_set(self) -> bool:
        return ready(self._fd, 0)

    def wait(self, timeout_s: float = TIMEOUT_S) -> None:
        assert ready(self._fd, timeout_s), f"the latch was not set within {timeout_s} s"

    def close(self) -> None:
        os.close(self._fd)


class Counters:
    """Whole numbers in memory shared by all processes forked later; each place has one writer."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, 8 * count)
        self._view = memoryview(self._memory).cast("Q")

    def __getitem__(self, index: int) -> int:
        return self._view[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._view[index] = value

    def list(self) -> list[int]:
        return self._view.tolist()


class ChildEnded(AssertionError):
    """The child ended without a result."""


class Child:
    """One forked child. Its function's result travels through a pipe, its end is known by a pidfd."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self._pipe = pipe
        self._pidfd = os.pidfd_open(pid)
        self.status: int | None = None
        self._data = b""

    def result(self, timeout_s: float = TIMEOUT_S) -> Any:
        """What the function returned; what it raised is raised here. Waits for the child's end."""
        self.wait(timeout_s)
        self._data += self._received()
        if not self._data:
            raise ChildEnded(f"child {self.pid} ended with {self.ended()} and no result")
        kind, value, text = pickle.loads(self._data)
        if kind == "returned":
            return value
        print(f"in child {self.pid}:\n{text}", file=sys.stderr)
        raise value

    def _received(self) -> bytes:
        data = b""
        while ready(self._pipe, 0) and (part := os.read(self._pipe, 1 << 16)):
            data += part
        return data

    def wait(self, timeout_s: float = TIMEOUT_S) -> str:
        """Wait for its end; how it ended ("exit 0", "SIGKILL")."""
        if self.status is None:
            if not ready(self._pidfd, timeout_s):
                raise AssertionError(f"child {self.pid} still runs after {timeout_s} s")
            self.status = os.waitpid(self.pid, 0)[1]
        return self.ended()

    def ended(self) -> str:
        assert self.status is not None
        if os.WIFSIGNALED(self.status):
            return signal.Signals(os.WTERMSIG(self.status)).name
        return f"exit {os.waitstatus_to_exitcode(self.status)}"

    def alive(self) -> bool:
        return self.status is None and not ready(self._pidfd, 0)

    def kill(self, number: int = signal.SIGKILL, timeout_s: float = TIMEOUT_S) -> str:
        """Send a signal that ends it, and wait for the end."""
        if self.status is None:
            os.kill(self.pid, number)
        return self.wait(timeout_s)

    def stop(self) -> None:
        """SIGSTOP; it has stopped when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self._pipe)
        os.close(self._pidfd)


class Family:
    """The children of one test.

    with Family() as family:
        child = family.fork(function, argument)
        assert child.result() == 42
    """

    def __init__(self) -> None:
        self.children: list[Child] = []
        self._latches: list[Latch] = []
        self._pid = os.getpid()

    def latch(self) -> Latch:
        self._latches.append(Latch())
        return self._latches[-1]

    def fork(self, function: Callable[..., object], *args: object, way: Way = "os") -> Child:
        """Run `function(*args)` in a child. `way`: os.fork(), libc's fork() or a bare clone(), behind Python's back."""
        out, into = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = _FORKS[way]()
        if pid == 0:
            _run(function, args, into)
        os.close(into)
        child = Child(pid, out)
        self.children.append(child)
        return child

    def forget(self, child: Child) -> None:
        """Release what is held for a child that has ended, in tests with thousands of them."""
        self.children.remove(child)
        child.close()

    def __enter__(self) -> Family:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:
            return
        for child in self.children:
            child.close()
        for latch in self._latches:
            latch.close()


def _run(function: Callable[..., object], args: tuple[object, ...], into: int) -> NoReturn:
    """In the child: run, send, end. Nothing of pytest's may run here."""
    code = 0
    try:
        message: tuple[str, object, str] = ("returned", function(*args), "")
    except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
        message, code = ("raised", error, traceback.format_exc()), _CODE_RAISED
    try:
        data = pickle.dumps(message)
    except Exception:  # noqa: BLE001 - it cannot travel: its text can
        data = pickle.dumps(("raised", AssertionError(f"{message[1]!r}\n{message[2]}"), message[2]))
    try:
        os.write(into, data) if len(data) < 4096 else _write_all(into, data)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _write_all(into: int, data: bytes) -> None:
    while data:
        data = data[os.write(into, data) :]


def _libc_fork() -> int:
    """fork() of libc: pthread_atfork handlers run, Python's hooks do not. PyDLL keeps the interpreter's lock."""
    return int(ctypes.PyDLL(None).fork())


def _bare_clone() -> int:
    """The system call itself: no handler of anybody runs."""
    number = _SYS_CLONE[os.uname().machine]
    return int(ctypes.PyDLL(None).syscall(number, int(signal.SIGCHLD), 0, 0, 0, 0))


_FORKS: dict[Way, Callable[[], int]] = {"os": os.fork, "libc": _libc_fork, "clone": _bare_clone}


# ---- pools that many processes use ---------------------------------------------------------------------------------


def use(pool: Pool, token: str = "", timeout_s: float = TIMEOUT_S, **wanted: Any) -> int:
    """Lease, use exclusively, release; the server's number of the connection."""
    with pool.get(timeout=timeout_s, **wanted) as lease:
        return exclusive_use(lease.socket, token or f"{os.getpid()}:{time.monotonic_ns()}")


def lease_every_slot(pool: Pool, timeout_s: float = TIMEOUT_S) -> set[int]:
    """Hold every permit of the pool at once, use each connection; the server's numbers of them. No slot may be lost."""
    leases = []
    try:
        for place in range(pool.config.max_connections):
            try:
                leases.append(pool.get(timeout=timeout_s))
            except Exception as error:
                raise AssertionError(f"only {place} of {pool.config.max_connections} slots: {states(pool)}") from error
        numbers = {exclusive_use(lease.socket, f"every:{lease.id}") for lease in leases}
        assert len(numbers) == len(leases)
        return numbers
    finally:
        for lease in leases:
            lease.release()


def states(pool: Pool) -> dict[str, int]:
    """How many slots are in which state, without the states that none is in."""
    counts: dict[str, int] = pool._counts()
    return {state: count for state, count in counts.items() if count}


@contextlib.contextmanager
def proven(server: ExclusiveServer, connections: int, *, every_slot: bool = True, **settings: Any) -> Iterator[Pool]:
    """A pool that proves itself at the end: every slot can be leased, no connection had two users, the cap held,
    nothing is left at the server or in shared memory."""
    pool = Pool(server.url, max_connections=connections, **{"min_connections": 0, **settings})
    segment = Path(f"/dev/shm/shmpool-{os.getuid()}-{pool.name}")
    assert segment.exists()
    try:
        yield pool
        if every_slot:
            with contextlib.suppress(PoolClosed):
                lease_every_slot(pool)
    finally:
        pool.close()
    assert not segment.exists()
    figures = server.stats()
    assert figures["violations"] == 0, figures["violation_log"]
    assert figures["max_open"] <= connections
    if not server.kind.startswith("udp"):
        until(lambda: server.stats()["open"] == 0, "the server's connections end with the pool", 5)


def _hold(pool: Pool, count: int, holds: Latch) -> None:
    leases = [pool.get() for _ in range(count)]
    holds.set()
    signal.pause()
    for lease in leases:
        lease.release()


def holder(family: Family, pool: Pool, count: int) -> Child:
    """A child that has `count` connections on lease, and keeps them."""
    holds = family.latch()
    child = family.fork(_hold, pool, count, holds)
    holds.wait()
    return child
