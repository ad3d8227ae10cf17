"""A lease: what it tells, that it is of one use, what its holder may do to the socket, and what is never lent again.

Most tests have one connection, so that the next lease would have to be the one that the test has spoilt.
Not here: where leases come from, hooks (test_pool), dials that fail (test_failures).
"""

from __future__ import annotations

import gc
import os
import socket
import ssl
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from shmpool import DialRequest, LeaseExpired, Pool, PooledConnection
from tests.processes import Family, descriptors, until, until_collected
from tests.servers import ExclusiveServer, ask, exclusive_use

FIELDS = (
    "socket",
    "session",
    "id",
    "protocol",
    "ip_version",
    "peer",
    "created_at",
    "age",
    "reuse_count",
    "metadata",
)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[ExclusiveServer]:
    with ExclusiveServer() as server:
        yield server


@pytest.fixture
def server(shared_server: ExclusiveServer) -> ExclusiveServer:
    shared_server.close_connections()  # what a test that failed has left
    shared_server.reset_stats()
    return shared_server


@pytest.fixture(scope="module")
def shared_udp_server() -> Iterator[ExclusiveServer]:
    with ExclusiveServer("udp4") as server:
        yield server


@pytest.fixture
def udp_server(shared_udp_server: ExclusiveServer) -> ExclusiveServer:
    shared_udp_server.close_connections()  # forgets the peers of other tests
    return shared_udp_server


@pytest.fixture
def pool(make: Callable[..., Pool]) -> Pool:
    return make()


def states(pool: Pool) -> dict[str, int]:
    return {state: count for state, count in pool.stats().connections.items() if count}


def closed(pool: Pool) -> dict[str, int]:
    """Why connections were retired so far."""
    return {reason: count for reason, count in pool.stats().closed.items() if count}


def refuses(conn: PooledConnection, number: int) -> None:
    """Every use of the lease raises LeaseExpired that names the connection."""
    uses: list[Callable[[], object]] = [lambda name=name: getattr(conn, name) for name in FIELDS]  # type: ignore[misc]
    uses += [conn.release, conn.discard, conn.__enter__, lambda: setattr(conn, "session", 1)]
    for use in uses:
        with pytest.raises(LeaseExpired) as caught:
            use()
        assert caught.value.connection_id == number


# What it tells --------------------------------------------------------------------------------------------------------


def test_what_a_lease_tells(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    begun, metadata = time.time(), b"\0meta" * 100
    pool = make(dial=lambda _request: (server.connect(), metadata))
    with pool.get() as conn:
        first = conn.socket
        assert (conn.protocol, conn.ip_version, conn.peer) == ("tcp", 4, (server.host, server.port))
        assert begun - 0.01 <= conn.created_at <= time.time()
        age = conn.age
        assert 0 <= age < 5
        until(lambda: conn.age > age, "it grows older")
        assert (conn.reuse_count, conn.metadata, conn.session) == (0, metadata, None)
        number, created = conn.id, conn.created_at
        assert number > 0
        assert "leased" in repr(conn)
    for uses in range(1, 4):
        with pool.get() as conn:
            assert conn.socket is first
            assert (conn.id, conn.created_at, conn.reuse_count, conn.metadata) == (number, created, uses, metadata)
            conn.discard() if uses == 3 else None
    with pool.get() as conn:
        assert conn.id > number
        assert conn.reuse_count == 0
        assert conn.socket is not first


def test_attributes_cannot_be_set(pool: Pool) -> None:
    with pool.get() as conn:
        for name in (*FIELDS, "other"):
            if name != "session":
                with pytest.raises(AttributeError):
                    setattr(conn, name, 1)
        with pytest.raises(TypeError):
            type(conn)()


def test_the_largest_metadata(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    from shmpool._core import MAX_METADATA

    metadata = os.urandom(MAX_METADATA)
    pool = make(dial=lambda _request: (server.connect(), metadata))
    with pool.get() as conn:
        assert conn.metadata == metadata

    def child_reads() -> bool:
        with pool.get() as conn:
            return bool(conn.metadata == metadata)

    with Family() as family:
        assert family.fork(child_reads).result() is True


# One use --------------------------------------------------------------------------------------------------------------


def test_a_released_lease_is_over(pool: Pool) -> None:
    conn = pool.get()
    number = conn.id
    conn.release()
    refuses(conn, number)
    assert "over" in repr(conn)
    with pool.get() as second:
        assert second.id == number
        refuses(conn, number)
        assert ask(second.socket, "PING").startswith("PONG"), "what the old lease was refused has changed nothing"
    assert closed(pool) == {}
    assert states(pool) == {"idle": 1}


def test_a_discarded_lease_is_over(pool: Pool, server: ExclusiveServer) -> None:
    for discard in (
        lambda conn: conn.discard(),
        lambda conn: conn.discard("why"),
        lambda conn: conn.discard(reason="why"),
    ):
        conn = pool.get()
        number = conn.id
        discard(conn)
        refuses(conn, number)
        assert states(pool) == {"empty": 1}
        assert server.stats()["open"] == 0, "the permit is free only when the connection is closed"
    assert closed(pool) == {"error": 3}
    with pool.get() as conn:
        for wrong in (lambda: conn.discard(1, 2), lambda: conn.discard(because="why")):
            with pytest.raises(TypeError):
                wrong()
        assert ask(conn.socket, "PING").startswith("PONG")


def test_release_inside_the_block(pool: Pool) -> None:
    with pool.get() as conn:
        conn.release()
    with pool.get() as conn:
        conn.discard()
    assert states(pool) == {"empty": 1}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
def test_an_exception_in_the_block_retires_the_connection(pool: Pool, error: type[BaseException]) -> None:
    with pytest.raises(error), pool.get() as conn:
        raise error
    assert states(pool) == {"empty": 1}
    assert closed(pool) == {"error": 1}
    with pytest.raises(LeaseExpired):
        _ = conn.socket


def test_an_exception_after_the_release_changes_nothing(pool: Pool) -> None:
    with pytest.raises(ValueError, match="late"), pool.get() as conn:  # noqa: PT012
        conn.release()
        raise ValueError("late")
    assert states(pool) == {"idle": 1}


def test_another_thread_may_release(pool: Pool) -> None:
    conn = pool.get()
    thread = threading.Thread(target=conn.release)
    thread.start()
    thread.join()
    with pytest.raises(LeaseExpired):
        conn.release()
    pool.get().release()
    assert pool.stats().created == 1


@pytest.mark.parametrize("spoilt", [False, True])
def test_of_many_threads_one_releases(make: Callable[..., Pool], spoilt: bool) -> None:
    pool = make(max_connections=2)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(100):
            conn = pool.get()
            if spoilt:
                conn.socket.settimeout(1)
            barrier = threading.Barrier(8)

            def release(conn: PooledConnection = conn, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait(10)
                try:
                    conn.release()
                except LeaseExpired:
                    return False
                return True

            assert sum(future.result(10) for future in [threads.submit(release) for _ in range(8)]) == 1
    assert states(pool) == {"idle": 1, "empty": 1}
    assert pool.stats().created == 1


class Meddling(Pool):
    """Does something once, just when a release has put the socket's mode back, as a signal handler might."""

    meddle: Callable[[], object] | None = None

    def _restore(self, sock: socket.socket) -> bool:
        good = super()._restore(sock)
        if self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            meddle()
        return good


@pytest.fixture
def meddling(server: ExclusiveServer) -> Iterator[Meddling]:
    with Meddling(server.url, max_connections=1, min_connections=0) as pool:
        yield pool


@pytest.mark.parametrize("end", ["release", "discard"])
def test_a_handler_that_ends_the_lease_during_its_release(meddling: Meddling, end: str) -> None:
    conn = meddling.get()
    conn.socket.settimeout(1)
    meddling.meddle = getattr(conn, end)
    with pytest.raises(LeaseExpired):
        conn.release()
    assert states(meddling) == {"idle" if end == "release" else "empty": 1}


def test_a_handler_that_forks_during_a_release(meddling: Meddling) -> None:
    conn = meddling.get()
    conn.socket.settimeout(1)
    number, children = conn.id, []

    def fork() -> None:
        pid = os.fork()
        children.append(pid)
        if pid:  # the child is first
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

    meddling.meddle = fork
    code = 1
    try:
        conn.release()
    except LeaseExpired:
        code = 7  # in the child: it is the parent's
        if children != [0]:
            raise
    finally:
        if children == [0]:
            os._exit(code)
    with meddling.get() as again:
        assert again.id == number


def test_a_handler_that_closes_the_pool_during_a_release(meddling: Meddling) -> None:
    conn = meddling.get()
    conn.socket.settimeout(1)
    meddling.meddle = meddling.close
    conn.release()
    assert states(meddling) == {"empty": 1}


# Dropped, kept --------------------------------------------------------------------------------------------------------


def test_a_dropped_lease_is_reported_and_its_slot_comes_back(pool: Pool, server: ExclusiveServer) -> None:
    with pytest.warns(ResourceWarning, match="was dropped without release"):
        pool.get()
    assert states(pool) == {"empty": 1}
    assert closed(pool) == {"leaked": 1}
    assert pool.stats().leaks == 1
    assert server.stats()["open"] == 0
    pool.get().release()


def test_a_dropped_lease_in_a_cycle(pool: Pool) -> None:
    def lose() -> None:
        cycle: list[Any] = [pool.get()]
        cycle.append(cycle)

    gc.disable()
    try:
        lose()
        assert states(pool) == {"leased": 1}
        with pytest.warns(ResourceWarning, match="dropped"):
            gc.collect()
    finally:
        gc.enable()
    assert states(pool) == {"empty": 1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_warning_that_is_an_error_does_not_stop_the_return(pool: Pool) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.get()
        gc.collect()
    assert states(pool) == {"empty": 1}


def test_a_lease_keeps_its_pool(server: ExclusiveServer) -> None:
    pool = Pool(server.url, max_connections=1, min_connections=0)
    gone, conn = weakref.ref(pool), pool.get()
    del pool
    gc.collect()
    assert gone() is not None
    exclusive_use(conn.socket, "kept:1")
    conn.release()
    del conn
    until_collected(gone)
    until(lambda: server.stats()["open"] == 0, "the pool has gone with its last lease")


def test_a_lease_of_a_closed_pool(pool: Pool, server: ExclusiveServer) -> None:
    conn = pool.get()
    number = conn.id
    assert pool.close() == 1
    exclusive_use(conn.socket, "closed:1")
    assert conn.id == number
    conn.session = "still"
    assert conn.session == "still"
    conn.release()
    refuses(conn, number)
    assert closed(pool) == {"shutdown": 1}
    assert server.stats()["open"] == 0
    assert states(pool) == {"empty": 1}


def test_leases_of_a_closed_pool_that_are_dropped(make: Callable[..., Pool]) -> None:
    pool = make(max_connections=3)
    leases = [pool.get() for _ in range(3)]
    assert pool.close() == 3
    leases.pop().discard()
    with pytest.warns(ResourceWarning, match="dropped"):
        leases.pop()
    assert states(pool) == {"leased": 1, "empty": 2}
    leases.pop().release()
    assert not [what for what in descriptors().values() if what.startswith("/dev/shm")]


def test_many_leases_at_once(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    pool = make(max_connections=200)
    with ExitStack() as stack:
        leases = [stack.enter_context(pool.get()) for _ in range(200)]
        assert len({conn.id for conn in leases}) == len({conn.socket.fileno() for conn in leases}) == 200
        for number, conn in enumerate(leases):
            exclusive_use(conn.socket, f"many:{number}")
    assert states(pool) == {"idle": 200}
    assert server.stats()["max_open"] == 200


# session --------------------------------------------------------------------------------------------------------------


class Session:
    """Notes its end."""

    def __init__(self, ends: list[str], name: str = "s", at_end: Callable[[], object] = lambda: None) -> None:
        self.ends, self.name, self.at_end = ends, name, at_end

    def __del__(self) -> None:
        self.ends.append(self.name)
        self.at_end()


def test_a_session_lives_with_its_connection(pool: Pool) -> None:
    ends: list[str] = []
    with pool.get() as conn:
        conn.session = Session(ends, "first")
        conn.session = Session(ends, "second")
        assert ends == ["first"]
    for _ in range(3):
        with pool.get() as conn:
            assert conn.session.name == "second"
    assert ends == ["first"]
    pool.get().discard()
    assert ends == ["first", "second"]
    with pool.get() as conn:
        assert conn.session is None
        conn.session = Session(ends, "third")
        conn.session = None
        assert ends[2:] == ["third"]
        conn.session = Session(ends, "fourth")
        del conn.session
        assert (conn.session, ends[3:]) == (None, ["fourth"])


@pytest.mark.parametrize("how", ["close", "drop", "expire", "broken", "leak"])
def test_a_session_ends_with_its_connection(make: Callable[..., Pool], server: ExclusiveServer, how: str) -> None:
    ends: list[str] = []
    pool = make(idle_timeout=0.02, alive_bypass=0)
    conn = pool.get()
    conn.session = Session(ends)
    if how == "leak":
        with pytest.warns(ResourceWarning):
            del conn
    else:
        conn.release()
    if how == "close":
        pool.close()
    elif how == "drop":
        pool._leave()
    elif how == "expire":
        until(lambda: (pool.stats().slots[0].since or 0) > 0.04, "it is idle for too long")
        pool.maintain()
    elif how == "broken":
        server.close_connections()
        pool.get().release()
    assert ends == ["s"]
    assert (pool.closed, pool.stats().in_use) == (how in ("close", "drop"), 0)


def test_a_session_whose_end_uses_the_pool(make: Callable[..., Pool]) -> None:
    ends: list[str] = []
    pool = make(max_connections=2)
    conn = pool.get()
    conn.session = Session(ends, at_end=lambda: pool.get().release())
    conn.discard()
    assert ends == ["s"]
    assert states(pool) == {"idle": 1, "empty": 1}
    conn = pool.get()
    conn.session = Session(ends, at_end=pool.close)
    conn.discard()
    assert pool.closed
    assert states(pool) == {"empty": 2}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_session_whose_end_raises(pool: Pool) -> None:
    def fail() -> None:
        raise ValueError("at the end")

    with pytest.raises(ZeroDivisionError), pool.get() as conn:  # noqa: PT012
        conn.session = Session([], at_end=fail)
        _ = 1 / 0
    assert states(pool) == {"empty": 1}


def test_a_session_of_a_leased_connection_outlives_the_close(pool: Pool) -> None:
    ends: list[str] = []
    conn = pool.get()
    conn.session = Session(ends)
    pool.close()
    assert ends == []
    conn.release()
    assert ends == ["s"]


def test_a_session_that_keeps_its_released_lease_does_not_keep_the_pool(server: ExclusiveServer) -> None:
    pool = Pool(server.url, max_connections=1, min_connections=0)
    gone = weakref.ref(pool)
    conn = pool.get()
    conn.session = [conn]
    conn.release()
    del pool, conn
    until_collected(gone)


# What its holder does to the socket -----------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [30.0, 0.5, None])
def test_the_mode_of_the_socket_is_put_back(make: Callable[..., Pool], timeout: float | None) -> None:
    pool = make(socket_timeout=timeout)
    changes: list[Callable[[socket.socket], object]] = [
        lambda sock: sock.settimeout(7),
        lambda sock: sock.settimeout(None),
        lambda sock: sock.setblocking(False),
        lambda sock: sock.setblocking(True),
        lambda sock: sock.settimeout(0),
    ]
    for change in changes:
        with pool.get() as conn:
            assert conn.socket.gettimeout() == timeout
            assert os.get_blocking(conn.socket.fileno()) == (timeout is None)
            change(conn.socket)
    with pool.get() as conn:
        assert conn.socket.gettimeout() == timeout
        assert ask(conn.socket, "PING").startswith("PONG")
    assert pool.stats().created == 1


def test_a_sibling_finds_the_mode_put_back(make: Callable[..., Pool]) -> None:
    pool = make(socket_timeout=None)
    with pool.get() as conn:
        conn.socket.setblocking(False)

    def blocking() -> bool:
        with pool.get() as conn:
            assert ask(conn.socket, "PING").startswith("PONG")
            return os.get_blocking(conn.socket.fileno())

    with Family() as family:
        assert family.fork(blocking).result() is True


def end_of(change: str, sock: socket.socket) -> object:
    """Ruin a socket in one of the ways there are; what is returned is to be kept, and closed later."""
    if change == "close":
        return sock.close()
    if change == "with":
        with sock:
            return None
    if change == "detach":
        return sock.detach()
    if change.startswith("shutdown"):
        return sock.shutdown(getattr(socket, change.removeprefix("shutdown-")))
    if change == "wrap":  # as ssl.wrap_socket does
        return socket.socket(fileno=sock.detach())
    raise AssertionError(change)


@pytest.mark.parametrize(
    "change", ["close", "with", "detach", "wrap", "shutdown-SHUT_RD", "shutdown-SHUT_WR", "shutdown-SHUT_RDWR"]
)
@pytest.mark.parametrize("end", ["release", "discard", "exception", "drop"])
def test_a_socket_that_its_holder_has_ended_is_not_lent_again(
    pool: Pool, server: ExclusiveServer, change: str, end: str
) -> None:
    conn = pool.get()
    number = conn.id
    kept = end_of(change, conn.socket)
    if end == "release":
        conn.release()
    elif end == "discard":
        conn.discard()
    elif end == "exception":
        with pytest.raises(ZeroDivisionError), conn:
            _ = 1 / 0
    else:
        with pytest.warns(ResourceWarning):
            del conn
    assert states(pool) == {"empty": 1}
    assert server.stats()["open"] == 0, "ended for all, though the holder still has a descriptor of it"
    if isinstance(kept, int):
        os.close(kept)
    elif isinstance(kept, socket.socket):
        kept.close()
    with pool.get() as conn:
        assert conn.id != number
        exclusive_use(conn.socket, "next:1")


def test_the_number_of_a_closed_descriptor_is_left_alone(pool: Pool) -> None:
    """It may be somebody else's by the time of the release."""
    for end in ("release", "discard"):
        conn = pool.get()
        conn.socket.close()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            getattr(conn, end)()
            ours.sendall(b"x")
            assert theirs.recv(1) == b"x"


def test_a_file_made_of_the_socket(pool: Pool, server: ExclusiveServer) -> None:
    with pool.get() as conn:
        number = conn.id
        with conn.socket.makefile("rwb") as file:
            file.write(b"PING\n")
            file.flush()
            assert file.readline().startswith(b"PONG")
    conn = pool.get()
    assert conn.id == number
    left_open = conn.socket.makefile("rb")
    conn.discard()
    assert server.stats()["open"] == 0
    assert left_open.read() == b""
    left_open.close()
    pool.get().release()


def test_a_copy_of_the_socket_does_not_keep_the_connection(pool: Pool, server: ExclusiveServer) -> None:
    with pool.get() as conn, conn.socket.dup() as copy:
        assert ask(copy, "PING").startswith("PONG")
        copy.settimeout(3)
        conn.discard()
        assert server.stats()["open"] == 0
        assert copy.recv(1) == b""


def test_a_copy_of_the_socket_may_be_closed(pool: Pool) -> None:
    with pool.get() as conn:
        conn.socket.dup().close()
    with pool.get() as conn:
        assert conn.reuse_count == 1
        assert ask(conn.socket, "PING").startswith("PONG")


def test_the_socket_is_not_inheritable(pool: Pool) -> None:
    with pool.get() as conn:
        assert not conn.socket.get_inheritable()


# What is never lent again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closes", "resets", "sends"])
def test_what_the_peer_did_while_idle_is_noticed(make: Callable[..., Pool], server: ExclusiveServer, how: str) -> None:
    pool = make(alive_bypass=0)
    with pool.get() as conn:
        ask(conn.socket, "PING")
        number, descriptor = conn.id, conn.socket.dup()
    with descriptor:
        if how == "sends":
            server.send_garbage()
        else:
            server.close_connections(rst=how == "resets")
        descriptor.settimeout(10)
        until(lambda: _has_news(descriptor), "it has arrived")
    with pool.get() as conn:
        assert conn.id != number
        exclusive_use(conn.socket, "new:1")
    assert closed(pool) == {"dirty" if how == "sends" else "broken": 1}
    assert pool.stats().checks >= 1


def _has_news(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def test_all_the_dead_are_passed_over(make: Callable[..., Pool], server: ExclusiveServer) -> None:
    pool = make(alive_bypass=0, max_connections=20)
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(pool.get())
    until(lambda: server.stats()["open"] == 20, "it has accepted them all")
    assert server.close_connections() == 20
    begun = time.monotonic()
    with pool.get() as conn:
        exclusive_use(conn.socket, "new:1")
    assert time.monotonic() - begun < 2
    server.close_connections()


def test_one_used_just_now_is_not_looked_at(make: Callable[..., Pool]) -> None:
    pool = make(alive_bypass=60)
    for _ in range(10):
        pool.get().release()
    assert pool.stats().checks == 0
    pool = make(alive_bypass=0)
    for _ in range(10):
        pool.get().release()
    assert pool.stats().checks == 9


def test_one_not_used_for_a_while_is_looked_at(make: Callable[..., Pool]) -> None:
    pool = make(alive_bypass=0.03)
    pool.get().release()
    pool.get().release()
    assert pool.stats().checks == 0
    until(lambda: (pool.stats().slots[0].since or 0) > 0.05, "it lies idle")
    pool.get().release()
    assert pool.stats().checks == 1


@pytest.mark.parametrize("reason", ["idle", "lifetime"])
def test_the_old_are_not_lent(make: Callable[..., Pool], reason: str) -> None:
    settings = {"idle_timeout": 0.03, "alive_bypass": 0} if reason == "idle" else {"max_lifetime": 0.03}
    pool = make(**settings)
    with pool.get() as conn:
        number = conn.id
    until(lambda: (pool.stats().slots[0].since or 0) > 0.05, "it is too old")
    with pool.get() as conn:
        assert conn.id != number
    assert closed(pool) == {reason: 1}


def test_a_lease_is_not_cut_by_its_age(make: Callable[..., Pool]) -> None:
    pool = make(max_lifetime=0.02, idle_timeout=0.02)
    with pool.get() as conn:
        until(lambda: conn.age > 0.04, "it is too old")
        exclusive_use(conn.socket, "old:1")


# Datagrams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strays", "kept"), [(0, True), (1, True), (5, True), (6, False), (9, False), (25, False)])
@pytest.mark.parametrize("bypass", [0, 60])
def test_stray_datagrams_are_cleared(
    make: Callable[..., Pool], udp_server: ExclusiveServer, strays: int, kept: bool, bypass: float
) -> None:
    pool = make(target=udp_server.url, udp_clear_max_packets=5, alive_bypass=bypass)
    with pool.get() as conn:
        ask(conn.socket, "PING")
        number, copy = conn.id, conn.socket.dup()
    with copy:
        for _ in range(strays):  # on loopback they have arrived when this returns
            assert udp_server.send_garbage() == 1
    with pool.get() as conn:
        assert (conn.id == number) is kept
        assert ask(conn.socket, "PING").startswith("PONG"), "no stray is taken for the answer"
    assert closed(pool) == ({} if kept else {"dirty": 1})


def test_datagrams_are_left_alone_when_told_so(make: Callable[..., Pool], udp_server: ExclusiveServer) -> None:
    pool = make(target=udp_server.url, clear_udp_buffer=False, alive_bypass=0)
    with pool.get() as conn:
        ask(conn.socket, "PING")
        copy = conn.socket.dup()
    with copy:
        udp_server.send_garbage(data=b"news")
        until(lambda: _has_news(copy), "it has arrived")
    with pool.get() as conn:
        assert conn.reuse_count == 1
        assert conn.socket.recv(64) == b"news"


def test_an_unreachable_udp_peer_does_not_make_leases_fail(make: Callable[..., Pool]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        pool = make(target=f"udp://127.0.0.1:{peer.getsockname()[1]}")
        with pool.get() as conn:
            number = conn.id
    with pool.get() as conn:
        conn.socket.send(b"into the void")
    with pool.get() as conn:  # the ICMP answer lies in the socket
        assert conn.id == number


# TLS ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """An echo over TLS with a certificate of its own."""
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    try:
        subprocess.run(
            [*command.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no certificate without openssl: {error}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))
    sessions: list[threading.Thread] = []

    def echo(raw: socket.socket) -> None:
        with raw, context.wrap_socket(raw, server_side=True, suppress_ragged_eofs=True) as conn:
            try:
                while data := conn.recv(4096):
                    conn.sendall(data)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            sessions.append(threading.Thread(target=echo, args=(raw,), daemon=True))
            sessions[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    yield str(certificate), listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    acceptor.join(10)
    for session in sessions:
        session.join(10)


@pytest.fixture
def tls_dial(tls_server: tuple[str, int]) -> Callable[[DialRequest], socket.socket]:
    context = ssl.create_default_context(cafile=tls_server[0])
    context.check_hostname = False

    def dial(request: DialRequest) -> socket.socket:
        raw = socket.create_connection(("127.0.0.1", tls_server[1]), request.timeout)
        return context.wrap_socket(raw)

    return dial


def test_a_tls_connection_is_used_again_in_its_process(
    make: Callable[..., Pool], tls_dial: Callable[[DialRequest], socket.socket]
) -> None:
    pool = make(dial=tls_dial, alive_bypass=0)
    sockets = []
    for turn in range(5):
        with pool.get() as conn:
            assert isinstance(conn.socket, ssl.SSLSocket)
            assert conn.reuse_count == turn
            assert conn.socket.gettimeout() == 30.0
            conn.socket.settimeout(turn + 1)
            conn.socket.sendall(b"hello")
            assert conn.socket.recv(5) == b"hello"
            sockets.append(conn.socket)
    assert len({id(sock) for sock in sockets}) == 1
    assert pool.stats().created == 1
    assert pool.stats().slots[0].flags == ("private",)
    with pool.get() as conn:
        conn.socket.close()
    assert states(pool) == {"empty": 1}


def test_a_tls_connection_is_of_no_use_to_another_process(
    make: Callable[..., Pool], tls_dial: Callable[[DialRequest], socket.socket]
) -> None:
    pool = make(dial=tls_dial)
    with pool.get() as conn:
        mine = conn.id

    def use() -> int:
        with pool.get() as conn:
            conn.socket.sendall(b"child")
            assert conn.socket.recv(5) == b"child"
            return conn.id

    with Family() as family:
        assert family.fork(use).result() != mine, "the permit was needed: the idle one was retired"
    with pool.get() as conn:
        assert conn.id != mine
        conn.socket.sendall(b"again")
        assert conn.socket.recv(5) == b"again"
    assert pool.stats().created == 3
