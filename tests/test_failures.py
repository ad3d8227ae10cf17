"""What goes wrong around a pool: dials that fail in every way, interrupts at every point, limits that are reached.

After each of them the same must hold: every slot comes home, no descriptor and no connection is left, and the pool
still works. Not here: leases that are misused (test_lease), shared memory that is full or taken (test_slab).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import FrameType
from typing import Any

import pytest

import shmpool.dialing
import shmpool.health
import shmpool.leaks
import shmpool.maintenance
import shmpool.pool
import shmpool.sockets
from shmpool import (
    DialError,
    DialRequest,
    InvalidConfig,
    Pool,
    PoolClosed,
    PooledConnection,
    PoolExhausted,
    PoolTimeout,
)
from shmpool._core import MAX_METADATA
from tests.processes import LONG, Family, chance, descriptors, until
from tests.servers import ExclusiveServer, ask, exclusive_use


@pytest.fixture(scope="module")
def shared_server() -> Iterator[ExclusiveServer]:
    with ExclusiveServer() as server:
        yield server


@pytest.fixture
def server(shared_server: ExclusiveServer) -> ExclusiveServer:
    shared_server.listen()
    shared_server.close_connections()  # what a test that failed has left
    shared_server.reset_stats()
    return shared_server


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def states(pool: Pool) -> dict[str, int]:
    return {state: count for state, count in pool.stats().connections.items() if count}


class Rude(BaseException):
    pass


class Scripted:
    """A dial that does what is next in its list, and connects when there is nothing more."""

    def __init__(self, server: ExclusiveServer, *script: object) -> None:
        self.server, self.script = server, list(script)
        self.requests: list[DialRequest] = []
        self.times: list[float] = []

    def __call__(self, request: DialRequest) -> Any:
        self.requests.append(request)
        self.times.append(time.monotonic())
        step = self.script.pop(0) if self.script else self.server.connect
        if isinstance(step, BaseException):
            raise step
        return step() if callable(step) else step


# Dials that fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENETUNREACH, "unreachable"),
        ConnectionRefusedError(),
        TimeoutError("too late"),
        socket.gaierror(socket.EAI_NONAME, "who?"),
        ValueError("a bug"),
        StopIteration(),
        RecursionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_dial_that_raises(make: Callable[..., Pool], server: ExclusiveServer, error: Exception) -> None:
    calls: list[Callable[[Pool], object]] = [Pool.get, Pool.try_get, lambda pool: pool.get(0.5)]
    for call in calls:
        pool = make(dial=Scripted(server, error))
        with pytest.raises(DialError) as caught:
            call(pool)
        assert caught.value.__cause__ is error
        assert isinstance(caught.value, ConnectionError)
        assert caught.value.attempt == 1
        assert "Scripted" in caught.value.target
        assert states(pool) == {"empty": 1}
        stats = pool.stats()
        assert (stats.dial_errors, stats.dial_failures, stats.dial_attempts, stats.created) == (1, 1, 1, 0)
        with pool.get() as conn:
            exclusive_use(conn.socket, "after:1")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, Rude])
def test_a_dial_that_is_interrupted(
    make: Callable[..., Pool], server: ExclusiveServer, error: type[BaseException]
) -> None:
    pool = make(dial=Scripted(server, error()))
    with pytest.raises(error):
        pool.get()
    assert states(pool) == {"empty": 1}
    assert pool.stats().interrupted == 1
    pool.get().release()


def test_an_error_of_a_pool_goes_through(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    error = PoolExhausted(reason="of another pool")
    pool = make(dial=Scripted(server, error))
    with pytest.raises(PoolExhausted) as caught:
        pool.get()
    assert caught.value is error
    assert states(pool) == {"empty": 1}


def closed_socket() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


GARBAGE: dict[str, Callable[[ExclusiveServer], Any]] = {
    "none": lambda _server: None,
    "text": lambda _server: "127.0.0.1:80",
    "number": lambda _server: 7,
    "nothing": lambda _server: (),
    "closed": lambda _server: closed_socket(),
    "listening": lambda _server: socket.create_server(("127.0.0.1", 0)),
    "unconnected tcp": lambda _server: socket.socket(),
    "unconnected udp": lambda _server: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "unconnected unix": lambda _server: socket.socket(socket.AF_UNIX),
    "raw netlink": lambda _server: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "no metadata": lambda server: (server.connect(),),
    "text as metadata": lambda server: (server.connect(), "text"),
    "none as metadata": lambda server: (server.connect(), None),
    "one too many": lambda server: (server.connect(), b"", b""),
    "the wrong way round": lambda server: (b"", server.connect()),
    "too much metadata": lambda server: (server.connect(), bytes(MAX_METADATA + 1)),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_dial_that_returns_garbage(make: Callable[..., Pool], server: ExclusiveServer, what: str) -> None:
    pool = make(dial=Scripted(server, lambda: GARBAGE[what](server)))
    with pytest.raises(DialError) as caught:
        pool.get()
    assert caught.value.__cause__ is not None
    assert states(pool) == {"empty": 1}
    held = [what for what in descriptors().values() if what.startswith("socket")]
    until(lambda: server.stats()["open"] == 0, f"sockets in garbage are closed at once: {held}", 3)
    pool.get().release()


def test_a_dead_upstream(make: Callable[..., Pool], deaf_port: int) -> None:
    pool = make(target=f"tcp://127.0.0.1:{deaf_port}", max_connections=2)
    for _ in range(5):
        with pytest.raises(DialError) as caught:
            pool.get()
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)
        assert caught.value.target == f"tcp://127.0.0.1:{deaf_port}"
        assert str(deaf_port) in str(caught.value)
    assert states(pool) == {"empty": 2}


def test_a_name_that_nobody_knows(make: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def unknown(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    pool = make(target="tcp://nobody.invalid:80")
    with pytest.raises(DialError, match="check the host name") as caught:
        pool.get()
    assert caught.value.__cause__ is error
    assert states(pool) == {"empty": 1}


@pytest.mark.parametrize("rst", [False, True])
def test_a_server_that_accepts_and_closes(make: Callable[..., Pool], rst: bool) -> None:
    """The holder notices first; nothing is lost by it, and nobody is lent the same twice."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept_and_close() -> None:
            with contextlib.suppress(OSError):  # shut down, at the end
                while True:
                    conn, _ = listener.accept()
                    if rst:
                        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    conn.close()

        thread = threading.Thread(target=accept_and_close)
        thread.start()
        pool = make(target=f"tcp://127.0.0.1:{listener.getsockname()[1]}", alive_bypass=0)
        ids = set()
        for _ in range(5):
            try:
                conn = pool.get()
            except DialError:  # it was reset before it was ours
                assert rst
                continue
            ids.add(conn.id)
            conn.socket.settimeout(10)
            try:
                assert conn.socket.recv(1) == b""
            except ConnectionResetError:
                assert rst
            conn.release()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert rst or len(ids) == 5
        # One that a probe opened in a thread of its own may be found reset before anybody has it.
        assert len(ids) <= pool.stats().created
        assert pool.stats().closed["broken"] >= pool.stats().created - 1


def test_it_comes_back_with_the_server(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    pool = make(alive_bypass=0, max_connections=3)
    with pool.get(), pool.get(), pool.get():
        pass
    until(lambda: server.stats()["open"] == 3, "it has accepted all")
    server.refuse()
    assert server.close_connections() == 3
    with pytest.raises(DialError):
        pool.get()
    assert states(pool) == {"empty": 3}
    server.listen()
    with pool.get() as conn:
        exclusive_use(conn.socket, "back:1")


# Retries --------------------------------------------------------------------------------------------------------------


def test_retries_until_it_works(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    dial = Scripted(server, OSError("one"), OSError("two"))
    pool = make(dial=dial, dial_retries=2, dial_backoff=(0.001, 0.01))
    pool.get().release()
    assert [request.attempt for request in dial.requests] == [1, 2, 3]
    assert states(pool) == {"idle": 1}


def test_retries_that_are_used_up(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    last = OSError("four")
    dial = Scripted(server, OSError("one"), OSError("two"), OSError("three"), last)
    pool = make(dial=dial, dial_retries=3, dial_backoff=(0.001, 0.004))
    with pytest.raises(DialError) as caught:
        pool.get()
    assert caught.value.attempt == 4
    assert caught.value.__cause__ is last
    assert len(dial.requests) == 4
    assert states(pool) == {"empty": 1}


def test_the_pauses_grow_up_to_the_longest(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    dial = Scripted(server, *[OSError("no")] * 6)
    make(dial=dial, dial_retries=5, dial_backoff=(0.02, 0.05))
    pool = make(dial=dial, dial_retries=5, dial_backoff=(0.02, 0.05))
    with pytest.raises(DialError):
        pool.get()
    pauses = [after - before for before, after in zip(dial.times, dial.times[1:], strict=False)]
    for pause, longest in zip(pauses, (0.02, 0.04, 0.05, 0.05, 0.05), strict=True):
        assert pause >= longest / 2


def test_retries_end_with_the_time(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    dial = Scripted(server, *[OSError("no")] * 1000)
    pool = make(dial=dial, dial_retries=100, dial_backoff=(0.01, 0.02), connection_timeout=7)
    begun = time.monotonic()
    with pytest.raises(PoolTimeout) as caught:
        pool.get(0.1)
    assert 0.1 <= time.monotonic() - begun < 2
    assert caught.value.timeout == pytest.approx(0.1)
    assert caught.value.waited >= 0.1
    assert isinstance(caught.value.__cause__, DialError)
    assert "the last dial failed" in str(caught.value)
    first, *probes = (request.timeout for request in dial.requests)
    assert first <= 0.1
    assert set(probes) == {7}, "a probe says whether the server is there, however little time its caller has"
    assert pool.stats().timeouts == 1
    until(lambda: states(pool) == {"empty": 1}, "a probe in a thread of its own has ended")


def test_a_dial_has_the_connection_timeout(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    dial = Scripted(server)
    pool = make(dial=dial, connection_timeout=3)
    pool.get(60).discard()
    pool.get(1).discard()
    pool.try_get().discard()
    assert dial.requests[0].timeout == 3
    assert 0 < dial.requests[1].timeout <= 1
    assert dial.requests[2].timeout == 3


def test_a_silent_server_ends_with_the_time(make: Callable[..., Pool]) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        pool = make(target=f"tcp://127.0.0.1:{listener.getsockname()[1]}", connection_timeout=0.1)
        with pytest.raises(DialError):
            pool.get(30)
        with pytest.raises(PoolTimeout) as caught:
            pool.get(0.05)
        assert caught.value.timeout == pytest.approx(0.05)
        until(lambda: states(pool) == {"empty": 1}, "the dial has ended too")


@pytest.mark.parametrize(
    ("when_down", "next_dial_s", "served"),
    [("fail", 0.01, (False, True)), ("fail", 30, (False, False)), ("wait", 0.3, (True, True))],
)
def test_a_failed_dial_is_news_for_who_waits_for_it(
    make: Callable[..., Pool],
    server: ExclusiveServer,
    threads: ThreadPoolExecutor,
    when_down: str,
    next_dial_s: float,
    served: tuple[bool, bool],
) -> None:
    """Nothing else can come back. Whose dial it was hears of it; who only waited does, too, unless the next dial is
    near. With when_down="wait" both wait for the next dial, however long that takes."""
    dialling, go_on = threading.Event(), threading.Event()

    def fail() -> None:
        dialling.set()
        assert go_on.wait(30)
        raise error

    error = OSError("no")
    pool = make(dial=Scripted(server, fail), when_down=when_down, dial_backoff=(next_dial_s, next_dial_s))
    first = threads.submit(lambda: pool.get(30).release())
    assert dialling.wait(10)
    second = threads.submit(lambda: pool.get(30).release())
    until(lambda: pool.stats().waiting == 1, "the second waits")
    go_on.set()
    for caller, is_served in zip((first, second), served, strict=True):
        if is_served:
            caller.result(10)
        else:
            assert isinstance(caller.exception(10), DialError)
            assert "OSError: no" in str(caller.exception())
    assert pool.stats().dial_attempts == 1 + any(served)
    assert states(pool) == {"idle" if any(served) else "empty": 1}


# Interrupts at every point --------------------------------------------------------------------------------------------


class Interrupter:
    """Raises at the n-th bytecode executed in the pool's Python, as Ctrl-C may."""

    files = frozenset(
        module.__file__
        for module in (
            shmpool.dialing,
            shmpool.health,
            shmpool.leaks,
            shmpool.maintenance,
            shmpool.pool,
            shmpool.sockets,
        )
    )

    def __init__(self, countdown: int) -> None:
        self.countdown = countdown
        self.at = ""

    def __enter__(self) -> Interrupter:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, _event: str, _arg: object) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: FrameType, event: str, _arg: object) -> Any:
        if event != "opcode":
            return self._step
        self.countdown -= 1
        if self.countdown == 0:
            self.at = f"{frame.f_code.co_name}, line {frame.f_lineno}"
            sys.settrace(None)
            raise Rude
        return self._step


def lease_cold_and_spoil(pool: Pool) -> None:
    with pool.get() as conn:
        conn.socket.settimeout(3)
    pool.get().discard()


def close_with_a_lease_out(pool: Pool) -> None:
    with pool.get():
        pool.close()


SCENARIOS: dict[str, Callable[[Pool], object]] = {
    "lease": lease_cold_and_spoil,
    "maintain": lambda pool: pool.maintain(),
    "close": close_with_a_lease_out,
}


def sockets_held() -> int:
    return sum(what.startswith("socket") for what in descriptors().values())


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """Hundreds of them, which look at what was made since."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_collections")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("dialled_by", ["target", "dial"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_interrupt_at_every_point(
    server: ExclusiveServer, scenario: str, dialled_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    settings: dict[str, Any] = {"max_connections": 2, "min_connections": 1, "max_workers": 2, "max_waiters": 2}
    settings["maintenance_interval"] = math.inf  # another thread's connections would be counted too
    source: dict[str, Any] = {"target": server.url}
    if dialled_by == "dial":
        source = {"dial": lambda _request: (server.connect(), b"meta")}
    failures, point, pool, ended = [], 0, None, ""
    while ended != "ran through":
        point += 1
        if pool is None or pool.closed:
            gc.collect()
            empty = sockets_held()
            pool = Pool(**source, **settings)
            fresh = sockets_held()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Interrupter(point) as interrupter:
                try:
                    SCENARIOS[scenario](pool)
                    ended = "ran through" if not interrupter.at else "swallowed"
                except Rude:
                    ended = "raised"
                except PoolClosed:
                    ended = "closed"
            problem = what_is_left(pool, empty, fresh)
        if problem:
            failures.append(f"{point}: {interrupter.at}: {problem}")
            pool.close()
    pool.close()
    assert not failures, "\n".join(failures[:20])
    assert point > 30


def what_is_left(pool: Pool, empty: int, fresh: int) -> str:
    """What an interrupt has left behind, "" if nothing. The pool has no connection afterwards."""
    counts = pool._counts()
    if counts["idle"] + counts["empty"] != 2:
        return f"slots are not home: {counts}"
    if not pool.closed:
        try:
            for _ in range(counts["idle"]):
                pool.get(5).discard()
            pool.get(5).discard()
        except Exception as error:  # noqa: BLE001  whatever it is, it is what this test looks for
            return f"the pool does not work: {error!r}"
        return "" if sockets_held() == fresh else f"sockets: {sockets_held() - fresh}"
    pool.close()
    return "" if sockets_held() == empty else f"sockets: {sockets_held() - empty}"


def test_a_storm_of_signals(
    make: Callable[..., Pool],
    server: ExclusiveServer,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Handlers that raise at random moments in one thread, while others go on."""
    random, wanted = chance(), 2000 if LONG else 300
    pool = make(max_connections=3, alive_bypass=0, get_timeout=30)
    stop, main = threading.Event(), threading.get_ident()

    def others() -> int:
        done = 0
        while not stop.is_set():
            with pool.get() as conn:
                exclusive_use(conn.socket, "other:1")
                done += 1
        return done

    def disturb() -> None:
        while not stop.wait(random.uniform(1e-4, 3e-3)):
            signal.pthread_kill(main, signal.SIGUSR1)

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # a handler may raise where nothing can be raised
    armed, interrupted = False, 0

    def raise_rude(*_: object) -> None:
        nonlocal armed
        if armed:  # once: the clean-up after it is not interrupted again
            armed = False
            raise Rude

    before = signal.signal(signal.SIGUSR1, raise_rude)
    workers = [threads.submit(others) for _ in range(3)]
    disturber = threads.submit(disturb)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # a lease between get() and `with`
            while interrupted < wanted:
                try:
                    armed = True
                    with pool.get() as conn:
                        conn.socket.settimeout(5)
                    pool.get().discard()
                    armed = False
                except Rude:
                    interrupted += 1
            gc.collect()
    finally:
        armed = False
        stop.set()
        disturber.result(30)
        signal.signal(signal.SIGUSR1, before)
    assert all(worker.result(30) for worker in workers)
    until(lambda: pool.stats().in_use == 0, "every lease is home")
    seen = server.stats()
    assert seen["violations"] == 0, seen["violation_log"]
    assert seen["max_open"] <= 3
    leases = [pool.get(5) for _ in range(3)]
    for conn in leases:
        exclusive_use(conn.socket, "end:1")
        conn.release()


# Limits ---------------------------------------------------------------------------------------------------------------


def test_too_many_waiters(make: Callable[..., Pool], threads: ThreadPoolExecutor) -> None:
    pool = make(max_waiters=2)
    conn = pool.get()
    waiters = [threads.submit(lambda: pool.get(30).release()) for _ in range(2)]
    until(lambda: pool.stats().waiting == 2, "both wait")
    with pytest.raises(PoolExhausted, match="raise max_waiters") as caught:
        pool.get(30)
    assert caught.value.limit == 2
    assert caught.value.counts["leased"] == 1
    conn.release()
    for waiter in waiters:
        waiter.result(10)
    assert pool.stats().exhausted == 1


def test_too_many_workers(make: Callable[..., Pool]) -> None:
    pool = make(max_workers=2)
    pool.get().release()
    with Family() as family:
        there, done = family.latch(), family.latch()

        def second() -> None:
            pool.get().release()
            there.set()
            done.wait()

        def third() -> tuple[str, int]:
            with pytest.raises(PoolExhausted, match="raise max_workers") as caught:
                pool.get()
            with pytest.raises(PoolExhausted):
                pool.try_get()
            done.set()
            until(lambda: not child.alive(), "the second has gone")
            pool.get().release()
            return caught.value.reason, caught.value.limit

        child = family.fork(second)
        there.wait()
        reason, limit = family.fork(third).result()
        child.result()
    assert "worker limit" in reason
    assert limit == 2


def in_child(function: Callable[[], object]) -> Any:
    """Run it where limits can be lowered for good."""
    with Family() as family:
        return family.fork(function).result()


def test_a_hard_limit_of_descriptors_that_is_too_low(server: ExclusiveServer) -> None:
    def refused() -> tuple[str, int, int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        before = len(descriptors())
        with pytest.raises(InvalidConfig) as caught:
            Pool(server.url, max_connections=500)
        assert len(descriptors()) == before
        fitting = int(caught.value.remedy.partition("lower it to ")[2].split()[0])
        with Pool(server.url, max_connections=fitting) as pool, ExitStack() as stack:
            for _ in range(fitting):
                stack.enter_context(pool.get())
        return str(caught.value), caught.value.value, fitting  # type: ignore[return-value]

    text, value, fitting = in_child(refused)
    assert value == 500
    assert "hard limit is 256" in text
    assert 50 <= fitting < 128
    assert "ulimit -Hn" in text


def test_a_soft_limit_of_descriptors_is_raised(server: ExclusiveServer) -> None:
    def raised() -> tuple[int, int]:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        with Pool(server.url, max_connections=200, min_connections=0) as pool, ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(pool.get())
            return resource.getrlimit(resource.RLIMIT_NOFILE)

    soft, hard = in_child(raised)
    assert 400 < soft < hard


def test_a_process_without_descriptors_does_no_harm(make: Callable[..., Pool]) -> None:
    """It cannot use what others have opened, but leaves it to them."""
    pool = make(max_connections=4)

    def open_all() -> None:
        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(pool.get())

    with Family() as family:
        family.fork(open_all).result()
    assert states(pool) == {"idle": 4}

    def starve() -> list[str]:
        names = []
        pool.stats()
        limit = max(descriptors()) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        hoard = []
        try:
            while True:
                hoard.append(os.dup(0))
        except OSError:
            pass
        os.close(hoard.pop())  # for its registration
        for _ in range(3):
            try:
                pool.get(0.05)
            except Exception as error:  # noqa: BLE001  named below
                names.append(type(error).__name__)
        for descriptor in hoard:
            os.close(descriptor)
        return names

    with Family() as family:
        names = family.fork(starve).result()
    assert len(names) == 3
    assert not {"KeyError", "TypeError", "SystemError"} & set(names)
    assert states(pool) == {"idle": 4}, f"{names}"
    assert pool.stats().closed["letter"] == 0
    pool.get().release()


def test_mailboxes_that_cannot_be_made(server: ExclusiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit was right when it was looked at, and is reached all the same."""

    def tight() -> str:
        monkeypatch.setattr(shmpool.pool, "_reserve_descriptors", lambda *_: None)
        Pool(server.url, max_connections=1).close()  # whatever is opened once is open
        limit = len(descriptors()) + 20
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        before = descriptors()
        with pytest.raises(OSError, match="Too many open files"):
            Pool(server.url, max_connections=100)
        gc.collect()
        assert descriptors() == before
        return "refused"

    assert in_child(tight) == "refused"


# A deposit that fails -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_deposits() -> Callable[[], ExitStack]:
    """Make the kernel refuse letters with ETOOMANYREFS: too many descriptors of this user are in flight."""

    def refuse() -> ExitStack:
        stack = ExitStack()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = max(descriptors()) + 40
        flight = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(8)]
        for pair in flight:
            for sock in pair:
                stack.enter_context(sock)
            for _ in range(max(1, needed // 200)):
                socket.send_fds(pair[0], [b"x"], [0] * 200)
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        if os.geteuid() == 0:  # root may exceed the limit
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        probe = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        probe.bind("")
        probe.connect(probe.getsockname())
        try:
            socket.send_fds(probe, [b"x"], [0])
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                return stack
        stack.close()
        pytest.skip("this kernel does not count descriptors in flight")

    return refuse


def test_a_connection_that_cannot_be_shared_works_for_its_opener(
    make: Callable[..., Pool], no_deposits: Callable[[], ExitStack], server: ExclusiveServer
) -> None:
    """Once: at its release it is retired, because nobody else could use it or end it."""
    pool = make(max_connections=2)
    with no_deposits():
        conn = pool.get()
    exclusive_use(conn.socket, "own:1")
    stats = pool.stats()
    assert stats.failed_deposits == 1
    assert stats.slots[0].flags == ("unmailed",)
    conn.socket.settimeout(3)
    conn.release()
    assert server.stats()["open"] == 0, "it is ended all the same"
    assert states(pool) == {"empty": 2}
    assert pool.stats().closed["letter"] == 1
    with pool.get() as conn:
        exclusive_use(conn.socket, "own:2")
    assert states(pool) == {"idle": 1, "empty": 1}


def test_a_connection_that_cannot_be_shared_counts(
    make: Callable[..., Pool],
    no_deposits: Callable[[], ExitStack],
    server: ExclusiveServer,
    threads: ThreadPoolExecutor,
) -> None:
    pool = make(get_timeout=30)
    with no_deposits():
        conn = pool.get()
    with pytest.raises(PoolExhausted):
        pool.try_get()
    waiter = threads.submit(pool.get)
    until(lambda: pool.stats().waiting == 1, "a thread waits")
    conn.release()
    with waiter.result(10) as conn:
        exclusive_use(conn.socket, "next:1")
    assert server.stats()["max_open"] == 1
    assert pool.close() == 0


@pytest.mark.parametrize("spoilt", [False, True])
def test_one_that_cannot_be_shared_is_ended_for_children_too(
    make: Callable[..., Pool], no_deposits: Callable[[], ExitStack], server: ExclusiveServer, spoilt: bool
) -> None:
    """A forked child has a copy of its descriptor, and there is no letter to end it by."""
    pool = make()
    with no_deposits():
        conn = pool.get()
    with Family() as family:
        done = family.latch()
        family.fork(done.wait)
        if spoilt:
            conn.socket.settimeout(3)
        conn.discard()
        assert states(pool) == {"empty": 1}
        assert server.stats()["open"] == 0
        done.set()


# Odd places -----------------------------------------------------------------------------------------------------------


def test_a_pool_in_a_thread_that_ends(make: Callable[..., Pool]) -> None:
    made: list[Pool] = []
    leases: list[PooledConnection] = []

    def work() -> None:
        made.append(make())
        leases.append(made[0].get())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ask(leases[0].socket, "PING").startswith("PONG")
    leases[0].release()
    with made[0].get() as conn:
        assert conn.reuse_count == 1


def test_a_process_that_exits_with_leases_out_and_threads_waiting(server: ExclusiveServer) -> None:
    script = f"""
import threading, sys
from shmpool import Pool
pool = Pool({server.url!r}, max_connections=1, get_timeout=60)
conn = pool.get()
threads = [threading.Thread(target=pool.get, daemon=True) for _ in range(4)]
for thread in threads: thread.start()
while pool.stats().waiting < 4: pass
print(pool.name)
"""
    import subprocess

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    name = done.stdout.strip()
    assert not os.path.exists(f"/dev/shm/shmpool-{os.getuid()}-{name}")
    assert "Fatal" not in done.stderr
    until(lambda: server.stats()["open"] == 0, "its connection has ended")
