"""Processes that come by a pool in every way, for the tests of named pools: `Company`, its `Worker`s, their tasks.

What: a `Worker` is a process that does what it is told, a task at a time, with one pool of its own; the tasks are the
functions whose first argument is `Mine`. It is forked, executed (a new interpreter that inherited nothing), or started
by multiprocessing. `Company` starts workers and ends them. `dying_at` kills a process at a given line of shmpool,
`Runtime` is a runtime directory of the test's own, which proves at its end that nothing is left in it.

Why: a test of joining is a story of several processes in a certain order; here it is told in one place, by the test.

Not here: forks of a test's own functions (`processes.py`), servers (`servers.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import pytest

import shmpool
from shmpool import LeaseExpired, Pool, PoolClosed, PoolExhausted, slab
from tests.processes import TIMEOUT_S, Family, Latch, lease_every_slot, ready, until, use
from tests.servers import ExclusiveServer, exclusive_use

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
PIDFD_GETFD = 438  # the system call, on every architecture that we run on
Way = Literal["fork", "forkserver", "spawn", "execute"]
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_MAIN = "import sys; from tests.joining import main; main(int(sys.argv[1]))"


def fresh_name() -> str:
    return f"join-{secrets.token_hex(6)}"


def segment_of(name: str) -> Path:
    return Path(slab.path_of(name))


def identity(pool: Pool) -> bytes:
    """Which slab it is."""
    slab_id: bytes = pool._identity()[0]
    return slab_id


def socket_of(pool: Pool) -> Path:
    """The socket for newcomers."""
    return Path(pool._identity()[1])


def members(name: str) -> set[int]:
    """The living processes of a pool, as one sees them who is none of them."""
    with shmpool.inspect(name) as inspector:
        return {worker.pid for worker in inspector.stats().workers if worker.alive}


# ---- what a worker is told to do -----------------------------------------------------------------------------------


class Mine:
    """What a worker has."""

    def __init__(self, pool: Pool | None = None) -> None:
        self.given = pool
        self.leases: list[Any] = []

    @property
    def pool(self) -> Pool:
        assert self.given is not None
        return self.given


def make(mine: Mine, *args: Any, **settings: Any) -> bytes:
    """Pool(...), here; which slab it is."""
    mine.given = Pool(*args, **settings)
    return identity(mine.pool)


def attach(mine: Mine, name: str, **settings: Any) -> bytes:
    mine.given = shmpool.attach(name, **settings)
    return identity(mine.pool)


def take(mine: Mine, pool: Pool) -> bytes:
    """A pool that came by pickle, as an argument."""
    mine.given = pool
    return identity(pool)


def which(mine: Mine) -> bytes:
    return identity(mine.pool)


def where(mine: Mine) -> str:
    """The path of the socket for newcomers."""
    return str(socket_of(mine.pool))


def lease_once(mine: Mine, *, discard: bool = False) -> int:
    """Lease, use exclusively, release; the server's number of the connection."""
    if not discard:
        return use(mine.pool)
    with mine.pool.get() as lease:
        number = use_of(lease)
        lease.discard()
    return number


def use_of(lease: Any) -> int:
    return exclusive_use(lease.socket, f"{os.getpid()}:{time.monotonic_ns()}")


def hold(mine: Mine) -> int:
    """Lease one and keep it."""
    mine.leases.append(mine.pool.get())
    return use_of(mine.leases[-1])


def keep_one(mine: Mine, timeout: float | None = None) -> int:
    """Its number in the pool, after an exclusive use; it is kept. Without a timeout: at once or not at all."""
    got = mine.pool.try_get() if timeout is None else mine.pool.get(timeout=timeout)
    mine.leases.append(got)
    use_of(got)
    return int(got.id)


def use_kept_one(mine: Mine, place: int) -> None:
    use_of(mine.leases[place])


def give_back(mine: Mine, place: int, how: str) -> None:
    """And once more, which must be refused."""
    kept = mine.leases.pop(place)
    getattr(kept, how)()
    with pytest.raises(LeaseExpired):
        _ = kept.socket
    with pytest.raises(LeaseExpired):
        kept.release()


def fork_and_lease(mine: Mine) -> str:
    """A child, which has copies of all that this process has, leases for itself, and exits without a word."""
    pid = os.fork()
    if pid == 0:
        ended = 1
        try:
            for stale in mine.leases:
                with pytest.raises(LeaseExpired):
                    _ = stale.socket
            with mine.pool.try_get() as got:
                use_of(got)
            ended = 0
        except PoolExhausted:
            ended = 2
        finally:
            os._exit(ended)
    return ("leased", "failed", "exhausted")[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]


def every_slot(mine: Mine) -> set[int]:
    return lease_every_slot(mine.pool)


def leave(mine: Mine) -> None:
    mine.pool.leave()
    mine.given = None


def close(mine: Mine) -> None:
    mine.pool.close()


def count(mine: Mine) -> int:
    """Threads of this process, by the kernel's account."""
    del mine
    return len(os.listdir("/proc/self/task"))


def hold_the_interpreter(mine: Mine, until_readable: int) -> None:
    """Sit in a call of C without giving the interpreter's lock away, until somebody writes to the descriptor."""
    del mine
    os.set_blocking(until_readable, True)
    ctypes.PyDLL(None).read(until_readable, ctypes.create_string_buffer(8), ctypes.c_size_t(8))


def become_nobody(mine: Mine, *, copyable: bool = False) -> None:
    """Another user. `copyable`: as after exec, other processes of that user may look into this one."""
    del mine
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, int(copyable), 0, 0, 0)
    die_with_parent()  # changing the user forgot it


def set_runtime(mine: Mine, path: str) -> None:
    del mine
    os.environ["XDG_RUNTIME_DIR"] = path


def fork_one(mine: Mine) -> int:
    """A child that has the pool and does not touch it; its pid. It ends with this process."""
    del mine
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        while True:
            signal.pause()
    return pid


def use_until(mine: Mine, readable: int) -> int:
    """Lease, use and release without a pause until the descriptor is readable; how often."""
    turns = 0
    while not ready(readable, 0):
        use(mine.pool)
        turns += 1
    return turns


def get_runtime(mine: Mine) -> str:
    del mine
    return os.environ["XDG_RUNTIME_DIR"]


def knock(mine: Mine | None, path: str) -> tuple[bytes, int]:
    """What a process that just connects to a pool's socket gets: bytes, and how many descriptors."""
    del mine
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(path)
        try:
            data, fds, _, _ = socket.recv_fds(sock, 4096, 253)
        except ConnectionResetError:
            return b"", 0
    for fd in fds:
        os.close(fd)
    return data, len(fds)


def impersonate(mine: Mine, path: str) -> None:
    """Listen at a path; never answer."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(path)
    sock.listen()
    mine.leases.append(sock)


def squat(mine: Mine, path: str, mode: int) -> None:
    """A file in somebody else's place."""
    del mine
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode))
    os.chmod(path, mode)


def end(mine: Mine, how: str) -> None:
    del mine
    if how == "os._exit":
        os._exit(0)
    elif how == "exception":
        raise Unhandled
    elif how == "exit":
        raise SystemExit(0)
    os.kill(os.getpid(), getattr(signal, how))


class Unhandled(BaseException):
    """Ends a worker, as an exception that nobody catches does."""


def has_it(mine: Mine, pool: Pool) -> bool:
    """Whether a pool that came by pickle is the one that this process has."""
    return mine.pool is pool


# ---- what is sent to workers that multiprocessing starts -----------------------------------------------------------


class Holder:
    """An object that has a pool, as those of applications do."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.again = {"pool": pool}


_kept: list[Holder] = []
_noted: list[int] = []


def keep(holder: Holder) -> None:
    """An initializer of workers."""
    _kept[:] = [holder]


def use_kept(number: int) -> tuple[int, int]:
    """In such a worker: the connection that it used, and the number that it was given."""
    (holder,) = _kept
    assert holder.pool is holder.again["pool"]
    return use(holder.pool), number


def note_borrow(lease: Any) -> None:
    """A hook."""
    _noted.append(lease.id)


def noted(mine: Mine) -> int:
    """How often the hook has run in this process."""
    del mine
    return len(_noted)


# ---- the worker's side ---------------------------------------------------------------------------------------------


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def obey(channel: connection.Connection, mine: Mine, latch: Latch | None = None) -> None:
    """Do what comes through the channel until it ends. With a latch, each task waits for it."""
    die_with_parent()
    while True:
        try:
            task, args, settings = channel.recv()
        except EOFError:
            return
        if latch is not None:
            latch.wait()
        try:
            answer = ("returned", task(mine, *args, **settings))
        except Exception as error:  # noqa: BLE001 - it is raised again where the task came from
            answer = ("raised", error)
        channel.send(answer)


def given(channel: connection.Connection, pool: Pool | None) -> None:
    """What multiprocessing starts."""
    obey(channel, Mine(pool))


def main(number: int) -> None:
    """What an executed interpreter runs."""
    latch = Latch.__new__(Latch)
    latch._fd = int(os.environ["LATCH"])
    channel = connection.Connection(number)
    channel.send(("ready", None))
    obey(channel, Mine(), latch)


# ---- the test's side -----------------------------------------------------------------------------------------------


class Worker:
    """A process that does what it is told.

    number = worker.do(lease_once)          # waits for the answer
    worker.tell(lease_once)                 # does not
    worker.answer()
    """

    def __init__(self, pid: int, channel: connection.Connection, wait: Callable[[], object], stderr: Any) -> None:
        self.pid = pid
        self._channel = channel
        self._wait = wait
        self._stderr = stderr
        self._pidfd = os.pidfd_open(pid)
        self._ended = False

    def tell(self, task: Callable[..., Any], *args: Any, **settings: Any) -> None:
        self._channel.send((task, args, settings))

    def answer(self, timeout_s: float = TIMEOUT_S) -> Any:
        assert self._channel.poll(timeout_s), f"worker {self.pid} gave no answer within {timeout_s} s"
        try:
            kind, value = self._channel.recv()
        except EOFError as error:
            self.wait()
            said = "" if self._stderr is None else self.stderr
            raise AssertionError(f"worker {self.pid} ended in place of an answer: {said}") from error
        if kind == "ready":
            return self.answer(timeout_s)
        if kind == "raised":
            raise value
        return value

    def await_start(self) -> None:
        """An executed one has imported everything when this returns. Before its first task."""
        assert self._channel.poll(TIMEOUT_S), f"worker {self.pid} did not start: {self.stderr}"
        assert self._channel.recv() == ("ready", None)

    def do(self, task: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        self.tell(task, *args, **settings)
        return self.answer()

    def answered(self) -> bool:
        return self._channel.poll(0)

    def end(self, how: str = "exit") -> None:
        """Let it end itself in some way, and wait for that."""
        self.tell(end, how)
        self.wait()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        if not self._ended:
            assert ready(self._pidfd, TIMEOUT_S), f"worker {self.pid} still runs"
            self._wait()
            self._ended = True

    def stop(self) -> None:
        """SIGSTOP; it has stopped when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it stops")

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @property
    def stderr(self) -> str:
        """What an executed one has written."""
        self._stderr.seek(0)
        return str(self._stderr.read().decode())

    def close(self) -> None:
        if self._channel.closed:
            return
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self._channel.close()
        os.close(self._pidfd)
        if self._stderr is not None:
            self._stderr.close()


class Company:
    """The workers of one test; those that still live end with it."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._latch = Latch()
        self._latch.set()
        self._family = Family()

    def start(self, way: Way, pool: Pool | None = None) -> Worker:
        """A worker that has `pool`, which an executed one cannot be given."""
        if way == "fork":
            return self.fork(pool)
        if way == "execute":
            assert pool is None
            return self.execute()
        ours, theirs = connection.Pipe()
        context: Any = get_context(way)
        if way == "forkserver":
            context.set_forkserver_preload([__name__])
        process = context.Process(target=given, args=(theirs, pool), daemon=True)
        process.start()
        theirs.close()
        return self._add(Worker(process.pid, ours, process.join, None))

    def fork(self, pool: Pool | None = None) -> Worker:
        ours, theirs = connection.Pipe()

        def child() -> None:
            ours.close()
            obey(theirs, Mine(pool))

        forked = self._family.fork(child)
        theirs.close()
        return self._add(Worker(forked.pid, ours, forked.wait, None))

    def execute(self, latch: Latch | None = None, through: Sequence[str] = (), **environment: str) -> Worker:
        """A new interpreter. Its tasks wait for the latch. `through`: words of the command that starts it."""
        ours, theirs = connection.Pipe()
        latch = latch or self._latch
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - the worker closes it
        process = subprocess.Popen(
            [*through, sys.executable, "-c", _MAIN, str(theirs.fileno())],
            cwd=ROOT,
            env={**os.environ, **environment, "LATCH": str(latch._fd), "PYTHONWARNINGS": "always"},
            pass_fds=[theirs.fileno(), latch._fd],
            stderr=stderr,
        )
        theirs.close()
        return self._add(Worker(process.pid, ours, process.wait, stderr))

    def _add(self, worker: Worker) -> Worker:
        self._workers.append(worker)
        return worker

    def __enter__(self) -> Company:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()
        self._family.__exit__(kind, error, traceback)
        self._latch.close()


# ---- death at every line -------------------------------------------------------------------------------------------

_OURS = str(Path(shmpool.__file__).parent)


@contextlib.contextmanager
def dying_at(line: int, number: int) -> Iterator[list[int]]:
    """A signal for this process at the line number `line` of shmpool's Python that it runs; 0: never. Counts them."""
    counted = [0]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        if event == "line":
            counted[0] += 1
            if counted[0] == line:
                os.kill(os.getpid(), number)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield counted
    finally:
        sys.settrace(before)


def dies_at(line: int, act: Callable[[], object], number: int = signal.SIGKILL) -> int:
    """In a forked child: `act`, killed at that line; how many lines it has."""
    with dying_at(line, number) as counted:
        kept = act()
    lines = counted[0]
    if isinstance(kept, Pool):
        with contextlib.suppress(PoolClosed):
            kept.leave()
    return lines


# ---- nothing is left -----------------------------------------------------------------------------------------------


class Runtime:
    """A directory for XDG_RUNTIME_DIR, and the proof that nothing is left in it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="run-"))

    def sockets(self) -> list[str]:
        return sorted(path.name for path in self.path.rglob("*") if not path.is_dir())

    def come_of_age(self, pids: list[int]) -> None:
        """What these dead processes left half-made is as if abandoned long ago: the next start may remove it."""
        for pid in pids:
            for path in Path(slab.DIRECTORY).glob(f"{slab.prefix()}.{pid}-*"):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, (0, 0))
        for path in self.path.rglob(".*"):
            os.utime(path, (0, 0))

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        left = self.sockets()
        shutil.rmtree(self.path, ignore_errors=True)
        if error is None:
            assert not left, f"left in the runtime directory: {left}"


def halves_of(pids: list[int]) -> list[str]:
    """Segments under private names that these processes left."""
    return [path.name for pid in pids for path in Path(slab.DIRECTORY).glob(f"{slab.prefix()}.{pid}-*")]


def proving(server: ExclusiveServer) -> Iterator[ExclusiveServer]:
    """For a fixture: no connection of the test has two users, none is left at the server."""
    server.close_connections()
    server.reset_stats()
    yield server
    until(lambda: server.stats()["open"] == 0, "every connection is closed")
    figures = server.stats()
    assert figures["violations"] == 0, figures["violation_log"]


def own_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """For a fixture: a runtime directory of the test's own."""
    with Runtime() as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime.path))
        yield runtime


def can_copy_descriptors() -> bool:
    """Whether the kernel lets this process copy descriptors out of another one of this user (pidfd_getfd)."""
    with Family() as family:
        child = family.fork(signal.pause)
        pidfd = os.pidfd_open(child.pid)
        copy = int(ctypes.CDLL(None).syscall(PIDFD_GETFD, pidfd, 0, 0))
        os.close(pidfd)
        if copy >= 0:
            os.close(copy)
    return copy >= 0
