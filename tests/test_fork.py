"""Forks in every form and at every moment: what a child has of the pool, what it must not have, and how it ends.

What must hold: a child uses the pool without a call; every member of the family uses every connection, whoever opened
it and whether or not that process still lives; what was the parent's (leases, sessions, its place in the queue, the
mode its holder gave a socket) is not the child's; a child keeps nothing of a dead parent alive.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import math
import multiprocessing
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmpool import DialError, LeaseExpired, Pool, PoolClosed, PoolError, PoolExhausted, PoolTimeout
from tests.processes import (
    Family,
    Way,
    chance,
    descriptors,
    lease_every_slot,
    proven,
    ready,
    states,
    until,
    use,
)
from tests.servers import ExclusiveServer, Kind, ask, exclusive_use, has_ipv6

WAYS: list[Way] = ["os", "libc", "clone"]


def seen_by(way: Way) -> dict[str, Any]:
    """Settings of a pool that is forked so: the interpreter's own locks do not survive a fork that it does not see when
    it has a second thread, such as that of maintenance."""
    return {} if way == "os" else {"maintenance_interval": math.inf}


KINDS: list[Any] = [
    "tcp4",
    pytest.param("tcp6", marks=pytest.mark.skipif(not has_ipv6(), reason="no ::1")),
    "unix",
    "udp4",
]


# ---- the pool in a child -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_child_uses_the_pool_without_a_call(server: ExclusiveServer, family: Family, way: Way) -> None:
    with proven(server, 2, **seen_by(way)) as pool:
        number = use(pool)
        assert family.fork(use, pool, way=way).result() == number
        assert use(pool) == number
        assert server.stats()["accepted"] == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_child_of_an_unused_pool(server: ExclusiveServer, family: Family, way: Way) -> None:
    with proven(server, 1, **seen_by(way)) as pool:
        assert family.fork(use, pool, way=way).result() == use(pool)


def test_connections_from_before_the_fork_are_simply_there(server: ExclusiveServer, family: Family) -> None:
    with proven(server, 3) as pool:
        numbers = lease_every_slot(pool)

        def child() -> tuple[set[int], int]:
            found = lease_every_slot(pool)
            return found, sum(row[5]["mailbox_reads"] for row in pool._snapshot()["workers"])

        assert family.fork(child).result() == (numbers, 0)


@pytest.mark.parametrize("generations", [2, 6])
@pytest.mark.parametrize("way", WAYS)
def test_grandchildren(server: ExclusiveServer, family: Family, way: Way, generations: int) -> None:
    """Each generation opens nothing new, leases beside the living older ones, and ends before them."""

    def descend(depth: int) -> list[int]:
        mine = [use(pool)]
        if depth:
            with Family() as inner:
                mine += inner.fork(descend, depth - 1, way=way).result()
        return [*mine, use(pool)]

    with proven(server, 1, max_workers=generations + 1, **seen_by(way)) as pool:
        assert len(set(family.fork(descend, generations - 1, way=way).result())) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["lives", "ended", "killed"])
def test_a_connection_that_a_child_opened_is_everybodys(kind: Kind, how: str, family: Family) -> None:
    with ExclusiveServer(kind) as server, proven(server, 1) as pool:
        opened, siblings_turn = family.latch(), family.latch()

        def open_it() -> int:
            number = use(pool)
            opened.set()
            if how == "killed":
                signal.pause()
            elif how == "lives":
                siblings_turn.wait()
            return number

        def sibling() -> int:
            siblings_turn.wait()
            return use(pool)

        older = family.fork(sibling)
        opener = family.fork(open_it)
        opened.wait()
        if how != "lives":
            opener.kill() if how == "killed" else opener.wait()
        siblings_turn.set()
        numbers = {older.result(), use(pool), family.fork(use, pool).result(), family.fork(use, pool).result()}
        assert len(numbers) == 1
        assert server.stats()["accepted"] == 1


def test_two_threads_of_a_child_touch_the_pool_first(server: ExclusiveServer, family: Family) -> None:
    def child() -> tuple[int, int]:
        barrier = threading.Barrier(8)
        done: list[int] = []

        def touch() -> None:
            barrier.wait()
            done.append(use(pool))

        threads = [threading.Thread(target=touch) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(done), sum(row[2] and row[1] == os.getpid() for row in pool._snapshot()["workers"])

    with proven(server, 4) as pool:
        for _ in range(20):
            child_of_20 = family.fork(child)
            assert child_of_20.result() == (8, 1)
            family.forget(child_of_20)


def test_two_pools_of_which_a_child_uses_one(server: ExclusiveServer, family: Family) -> None:
    """A middle process holds a lease of both pools and dies; its child, which uses one, keeps neither of them."""
    held, end = family.latch(), family.latch()
    with proven(server, 1, every_slot=False) as first, ExclusiveServer() as other, proven(other, 1) as second:

        def grandchild() -> None:
            with contextlib.suppress(PoolExhausted):
                first.try_get()
            held.set()
            end.wait()

        def middle() -> None:
            leases = first.get(), second.get()
            Family().fork(grandchild)
            signal.pause()
            del leases

        child = family.fork(middle)
        held.wait()
        child.kill()
        try:
            use(first, timeout_s=2)
            use(second, timeout_s=2)
        finally:
            end.set()


# ---- what is the parent's stays the parent's -----------------------------------------------------------------------


@pytest.mark.parametrize("touch_first", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_lease_carried_over_is_inert(server: ExclusiveServer, family: Family, way: Way, touch_first: bool) -> None:
    with proven(server, 2, **seen_by(way)) as pool:
        lease = pool.get()
        lease.session = "the parent's"
        carried = [lease]

        def child() -> list[str]:
            if touch_first:
                use(pool)
            before = states(pool)
            refused = []
            for name in ("socket", "session", "id", "peer", "metadata", "age", "created_at", "reuse_count", "protocol"):
                with pytest.raises(LeaseExpired):
                    getattr(carried[0], name)
                refused.append(name)
            for act in (carried[0].release, carried[0].discard, carried[0].__enter__):
                with pytest.raises(LeaseExpired):
                    act()
            with pytest.raises(LeaseExpired):
                carried[0].session = 1
            carried[0].__exit__(*_raised(ZeroDivisionError()))  # the exception of the block says enough
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                carried.clear()
                gc.collect()
            assert states(pool) == before
            return refused

        with exclusive(lease, "parent:1"):
            assert len(family.fork(child, way=way).result()) == 9
        assert lease.session == "the parent's"
        lease.release()


def _raised(error: BaseException) -> tuple[type[BaseException], BaseException, None]:
    return type(error), error, None


@contextlib.contextmanager
def exclusive(lease: Any, token: str) -> Iterator[None]:
    """An open stretch of exclusive use at the server around the block: a foreign use inside is a violation."""
    assert ask(lease.socket, f"BEGIN {token}").startswith("OK")
    yield
    assert ask(lease.socket, f"USE {token}") == "OK"
    assert ask(lease.socket, f"END {token}") == "OK"


def test_a_with_block_that_a_fork_happens_in(server: ExclusiveServer) -> None:
    """Its end gives the connection back in the parent, and raises in the child."""
    with proven(server, 1) as pool:
        out, into = os.pipe()
        pid = -1
        try:
            with pool.get() as lease:
                pid = os.fork()
                if pid:
                    exclusive_use(lease.socket, "parent:1")
        except LeaseExpired:
            os.write(into, b"expired")
            os._exit(0)
        finally:
            if pid == 0:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert os.read(out, 99) == b"expired"
        os.close(out)
        os.close(into)


@pytest.mark.parametrize("way", WAYS)
def test_sessions_are_each_process_own(server: ExclusiveServer, family: Family, way: Way) -> None:
    out, into = os.pipe()

    class Session:
        def __del__(self) -> None:
            os.write(into, f"{os.getpid()} ".encode())

    def child() -> list[object]:
        with pool.get() as lease:
            seen = [lease.session]
            lease.session = "the child's"
            exclusive_use(lease.socket, "child:1")
        with pool.get() as lease:
            seen.append(lease.session)
            lease.discard()  # ends the connection, and what this process has of it
        gc.collect()
        return seen

    with proven(server, 1, maintenance_interval=math.inf) as pool:  # a tick would drop it before we look
        with pool.get() as lease:
            lease.session = Session()
        with pool.get() as lease:
            mine = lease.session
            assert isinstance(mine, Session)
            del mine
        assert family.fork(child, way=way).result() == [None, "the child's"]
        assert not ready(out, 0)
        with pool.get() as lease:  # a new connection: the session of the old one is dropped, here
            assert lease.session is None
        assert os.read(out, 99).decode() == f"{os.getpid()} "
    os.close(out)
    os.close(into)


@pytest.mark.parametrize("spoil", ["short timeout", "no timeout", "not blocking", "closed", "shut down", "detached"])
def test_a_child_does_not_inherit_what_a_holder_did_to_its_socket(
    server: ExclusiveServer, family: Family, spoil: str
) -> None:
    """The fork comes while a thread of the parent holds the connection and has changed its mode."""
    spoilers: dict[str, Callable[[socket.socket], object]] = {
        "short timeout": lambda sock: sock.settimeout(0.001),
        "no timeout": lambda sock: sock.settimeout(None),
        "not blocking": lambda sock: sock.setblocking(False),
        "closed": lambda sock: sock.close(),
        "shut down": lambda sock: sock.shutdown(socket.SHUT_RDWR),
        "detached": lambda sock: os.close(sock.detach()),
    }
    with proven(server, 1, socket_timeout=7.0) as pool:
        released = family.latch()

        def child() -> float | None:
            released.wait()
            with pool.get() as lease:
                exclusive_use(lease.socket, "child:1")
                return lease.socket.gettimeout()

        use(pool)
        lease = pool.get()
        spoilers[spoil](lease.socket)
        started = family.fork(child)
        lease.release()
        server.delay_replies(0.02)
        released.set()
        assert started.result() == 7.0
        server.delay_replies(0)
        use(pool)


# ---- forks at any moment -------------------------------------------------------------------------------------------


def test_forks_from_any_thread_while_others_lease_dial_and_wait(server: ExclusiveServer, family: Family) -> None:
    random = chance()
    stop = time.monotonic() + 2.5
    errors: list[BaseException] = []

    def lease_and_leave() -> None:
        try:
            while time.monotonic() < stop:
                with pool.get(timeout=20) as lease:
                    exclusive_use(lease.socket, f"parent:{threading.get_ident()}")
                    if random.random() < 0.1:
                        lease.discard()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    def child(threads: int) -> int:
        done = []

        def one() -> None:
            for _ in range(3):
                done.append(use(pool, timeout_s=20))

        others = [threading.Thread(target=one) for _ in range(threads)]
        for thread in others:
            thread.start()
        one()
        for thread in others:
            thread.join()
        return len(done)

    def fork_and_wait() -> None:
        try:
            while time.monotonic() < stop:
                threads = random.randrange(3)
                started = family.fork(child, threads)
                if random.random() < 0.2:
                    started.kill()
                else:
                    assert started.result() == 3 * (threads + 1)
                family.forget(started)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    with proven(server, 3) as pool:
        threads = [threading.Thread(target=act) for act in (lease_and_leave,) * 4 + (fork_and_wait,) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def _lease_for_ever(pool: Pool) -> None:
    while True:
        pool.get(timeout=10).release()


def test_a_fork_while_a_thread_closes_the_pool(server: ExclusiveServer, family: Family) -> None:
    """The child either leases or is told that the pool is closed; it never hangs, and keeps nothing alive."""

    def child() -> int:
        with contextlib.suppress(PoolClosed):
            use(pool, timeout_s=10)
        with pytest.raises(PoolClosed):
            _lease_for_ever(pool)
        left = {at: what for at, what in descriptors().items() if what not in before}
        segments = [at for at, what in left.items() if what.startswith("/dev/shm/")]
        assert not segments, [Path(f"/proc/self/fdinfo/{at}").read_text() for at in segments]
        sockets = [at for at, what in left.items() if what.startswith("socket:")]
        for at in sockets:
            with socket.socket(fileno=at) as copy:
                assert copy.family == socket.AF_INET  # no mailbox
                copy.settimeout(5)
                with contextlib.suppress(ConnectionError):
                    assert copy.recv(1) == b""  # it has ended
        return len(sockets)

    random = chance()
    for _ in range(30):
        before = set(descriptors().values())
        with proven(server, 3, every_slot=False) as pool:
            lease_every_slot(pool)
            closer = threading.Timer(random.uniform(0, 0.003), pool.close)
            closer.start()
            children = [family.fork(child) for _ in range(3)]
            closer.join()
            for started in children:
                assert started.result() <= 1  # what the closing thread had in its hand
                family.forget(started)


def test_a_fork_in_the_dial(server: ExclusiveServer) -> None:
    """The child returns from the dial too: it dials for itself, and the parent's permit stays the parent's."""
    out, into = os.pipe()
    forked: list[int] = []

    def dial(_request: object) -> socket.socket:
        if not forked:
            forked.append(os.fork())
        return server.connect()

    pool = Pool(dial=dial, max_connections=2, min_connections=0)
    lease = pool.get()
    if not forked[0]:
        try:
            exclusive_use(lease.socket, "child:1")
            lease.release()
            os.write(into, b"used")
        finally:
            os._exit(0)
    exclusive_use(lease.socket, "parent:1")
    os.waitpid(forked[0], 0)
    assert ready(out, 0)
    assert os.read(out, 99) == b"used"
    lease.release()
    lease_every_slot(pool)
    assert server.stats()["max_open"] <= 3  # the child's copy of the parent's dial was closed, not used
    pool.close()
    os.close(out)
    os.close(into)


@pytest.mark.parametrize("child_uses_the_pool", [False, True])
def test_a_fork_in_a_signal_handler_inside_get(
    server: ExclusiveServer, family: Family, child_uses_the_pool: bool
) -> None:
    """The child goes on in the parent's get(): on its own account, not in the parent's place in the queue."""
    release, release_now = family.latch(), family.latch()

    def hold() -> None:
        with pool.get():
            release.set()
            release_now.wait()

    def wait_and_fork() -> tuple[int, int, int]:
        forked: list[int] = []

        def fork(*_: object) -> None:
            forked.append(os.fork())
            if not forked[0] and child_uses_the_pool:
                with pytest.raises(PoolExhausted):
                    pool.try_get()

        places: list[int] = []

        def count_places() -> None:
            until(lambda: forked, "the fork")
            with contextlib.suppress(AssertionError):
                until(lambda: len(pool._snapshot()["waiters"]) == 2, "two places", 1)
            places.append(len(pool._snapshot()["waiters"]))

        counter = threading.Thread(target=count_places)
        counter.start()
        signal.signal(signal.SIGALRM, fork)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(PoolTimeout):
                pool.get(timeout=0.3 if forked and not forked[0] else 0.6)
        finally:
            if forked and not forked[0]:
                os._exit(0)
        counter.join()
        os.waitpid(forked[0], 0)
        return places[0], len(pool._snapshot()["waiters"]), pool._snapshot()["totals"]["recovered_waiters"]

    with proven(server, 1) as pool:
        holder = family.fork(hold)
        release.wait()
        at_once, left, _ = family.fork(wait_and_fork).result()
        release_now.set()
        holder.wait()
        assert at_once == 2  # parent and child, each in a place of its own
        assert left == 0


def test_a_fork_while_a_thread_waits_and_another_dials(server: ExclusiveServer, family: Family) -> None:
    """The child has neither the parent's place in the queue nor its permit to dial."""
    dialling, go_on = family.latch(), family.latch()

    def dial(_request: object) -> socket.socket:
        dialling.set()
        go_on.wait()
        return server.connect()

    got: list[int] = []
    pool = Pool(dial=dial, max_connections=1, min_connections=0)
    threads = [threading.Thread(target=lambda: got.append(use(pool))) for _ in range(2)]
    for thread in threads:
        thread.start()
    dialling.wait()
    until(lambda: pool._snapshot()["waiters"], "the other thread waits")
    with pytest.raises(PoolExhausted):
        family.fork(pool.try_get).result()
    child = family.fork(use, pool)
    go_on.set()
    for thread in threads:
        thread.join()
    assert {child.result(), *got} == {1}
    pool.close()


@pytest.fixture
def full_server() -> Iterator[tuple[int, Callable[[], list[socket.socket]]]]:
    """A port whose backlog is full, and what lets those in who knock: the connections that are not of this fixture."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        fillers = []
        for _ in range(4):
            fillers.append(stack.enter_context(socket.socket()))
            fillers[-1].setblocking(False)
            fillers[-1].connect_ex(listener.getsockname())
        ours = {sock.getsockname()[1] for sock in fillers}

        def let_in() -> list[socket.socket]:
            for sock in fillers:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # also for the copies that children have
            strangers = []
            deadline = time.monotonic() + 3  # the kernel repeats a SYN after one second
            while select.select([listener], [], [], max(0, deadline - time.monotonic()))[0]:
                accepted, (_, port) = listener.accept()
                stack.enter_context(accepted)
                if port not in ours:
                    strangers.append(accepted)
            return strangers

        yield listener.getsockname()[1], let_in


def test_a_failed_dial_leaves_nothing_that_a_copy_could_complete(
    family: Family, full_server: tuple[int, Callable[[], list[socket.socket]]]
) -> None:
    """A child forked while a thread dials has a copy of the half-open socket. Its connection must not come to life
    later, when no permit covers it any more."""
    port, let_in = full_server
    end = family.latch()
    errors: list[BaseException] = []
    pool = Pool(f"tcp://127.0.0.1:{port}", max_connections=1, min_connections=0, connection_timeout=0.3)

    def dial() -> None:
        try:
            pool.get()
        except DialError as error:
            errors.append(error)

    thread = threading.Thread(target=dial)
    thread.start()
    until(lambda: states(pool) == {"dialing": 1}, "the dial")
    until(lambda: half_open(port), "the SYN")
    family.fork(end.wait)
    thread.join()
    assert len(errors) == 1
    strangers = let_in()
    end.set()
    pool.close()
    assert not strangers


def half_open(port: int) -> bool:
    """Does a socket of this host knock at the port? /proc/net/tcp: remote address, state 02 = SYN_SENT."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return any(row[3] == "02" and row[2].endswith(f":{port:04X}") for row in rows)


# ---- how a child ends ----------------------------------------------------------------------------------------------

# A program of its own: a child of pytest must not run pytest's exit handlers.
ENDINGS = """
import gc, multiprocessing, os, signal, sys, warnings
warnings.simplefilter("error")
import shmpool
from tests.servers import exclusive_use

how, url = sys.argv[1:]
parent = os.getpid()

class Session:
    def __del__(self):
        if os.getpid() != parent:
            os.write(1, b"a session of the parent was dropped in a child\\n")

def child():
    if "touch" in how:
        lease = pool.get(timeout=5)
        exclusive_use(lease.socket, "child:1")
        if "hold" not in how:
            lease.release()
        else:
            kept.append(lease)
    end = how.split()[-1]
    if end == "_exit":
        os._exit(0)
    if end == "exit":
        sys.exit(0)
    if end == "raise":
        sys.excepthook = lambda *_: None
        raise ValueError
    if end == "TERM" or end == "KILL":
        os.kill(os.getpid(), getattr(signal, "SIG" + end))

pool = shmpool.Pool(url, max_connections=2, min_connections=0)
kept = []
leases = [pool.get(), pool.get()]
for lease in leases:
    lease.session = Session()
leases.pop().release()
if how.endswith("multiprocessing"):
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
else:
    pid = os.fork()
    if pid == 0:
        child()
        sys.exit(0)
    os.waitpid(pid, 0)
assert leases[0].session is not None
exclusive_use(leases[0].socket, "parent:1")
leases[0].release()
del leases, lease
again = [pool.get(timeout=2) for _ in range(2)]
for lease in again:
    exclusive_use(lease.socket, "parent:2")
    lease.release()
states = {state: count for state, count in pool._counts().items() if count}
assert states == {"idle": 2}, states
name = pool.name
if "close" in how:
    pool.close()
    assert not os.path.exists(f"/dev/shm/shmpool-{os.getuid()}-{name}")
print("fine", name)
"""


@pytest.mark.parametrize("end", ["_exit", "exit", "raise", "return", "TERM", "KILL", "multiprocessing"])
@pytest.mark.parametrize("before", ["", "touch", "touch hold"])
def test_a_child_ends_in_any_way(server: ExclusiveServer, before: str, end: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDINGS, f"{before} {end}", server.url],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr or "hold" in before, ended.stderr
    assert ended.stdout.startswith("fine"), ended.stdout
    assert not Path(f"/dev/shm/shmpool-{os.getuid()}-{ended.stdout.split()[1]}").exists()
    figures = server.stats()
    assert figures["violations"] == 0
    assert figures["max_open"] <= 2
    until(lambda: server.stats()["open"] == 0, "the connections end with the last process", 5)


@pytest.mark.parametrize("way", ["os", "libc"])
@pytest.mark.parametrize("gap", ["child lives", "grandchild lives", "child execs"])
def test_a_living_child_does_not_hide_its_parents_death(
    server: ExclusiveServer, family: Family, way: Way, gap: str
) -> None:
    """The parent dies with a lease; its child, which never touched the pool, lives on."""
    held, end = family.latch(), family.latch()

    def linger() -> None:
        if gap == "grandchild lives":
            Family().fork(_set_and_wait, held, end, way=way)
            os._exit(0)
        if gap == "child execs":
            held.set()
            os.execv("/bin/sleep", ["sleep", "5"])
        else:
            _set_and_wait(held, end)

    def parent() -> None:
        lease = pool.get()
        Family().fork(linger, way=way)
        signal.pause()
        del lease

    with proven(server, 1, **seen_by(way)) as pool:
        child = family.fork(parent)
        held.wait()
        child.kill()
        begun = time.monotonic()
        use(pool, timeout_s=5)
        took = time.monotonic() - begun
        end.set()
        print(f"back after {took * 1e3:.1f} ms")
        assert took < 1


def _set_and_wait(held: Any, end: Any) -> None:
    held.set()
    end.wait()


def test_a_child_of_a_bare_clone_that_uses_the_pool_does_not_hide_its_parents_death(
    server: ExclusiveServer, family: Family
) -> None:
    """clone() without libc runs no handler: the child lets go of what it inherited at its first touch."""
    held, end = family.latch(), family.latch()

    def touch() -> None:
        with contextlib.suppress(PoolExhausted):
            pool.try_get()
        _set_and_wait(held, end)

    def parent() -> None:
        lease = pool.get()
        Family().fork(touch, way="clone")
        signal.pause()
        del lease

    with proven(server, 1, **seen_by("clone")) as pool:
        child = family.fork(parent)
        held.wait()
        child.kill()
        use(pool, timeout_s=5)
        end.set()


def test_executed_programs_inherit_nothing(server: ExclusiveServer, family: Family) -> None:
    """posix_spawn, subprocess (vfork) and fork + exec, with close_fds off: only O_CLOEXEC protects us."""
    with proven(server, 2) as pool:
        lease_every_slot(pool)
        lease = pool.get()
        kept = []
        ours = {what for what in descriptors().values() if what.startswith(("socket:", "/dev/shm/shmpool-"))}

        def exec_while_leasing() -> None:
            kept.append(pool.get())
            os.execv("/bin/sleep", ["sleep", "60"])

        spawned = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
        popen = subprocess.Popen(["/bin/sleep", "60"], close_fds=False)
        executed = family.fork(exec_while_leasing)
        until(lambda: states(pool) == {"leased": 2}, "the child's lease")
        until(lambda: "sleep" in Path(f"/proc/{executed.pid}/cmdline").read_text(), "the exec")
        try:
            for pid in (spawned, popen.pid, executed.pid):
                until(lambda pid=pid: "sleep" in Path(f"/proc/{pid}/cmdline").read_text(), "the exec")  # type: ignore[misc]
                assert not ours & set(descriptors(pid).values())
            use(pool, timeout_s=5)  # the permit of the process that became another program is back
        finally:
            os.kill(spawned, signal.SIGKILL)
            os.waitpid(spawned, 0)
            popen.kill()
            popen.wait()
        lease.release()


# ---- the pools of others that fork ---------------------------------------------------------------------------------

_pool: Pool  # as in a program: a global that the workers inherit


def _work(token: int) -> tuple[int, int]:
    return os.getpid(), use(_pool, f"{token}:x")


@pytest.mark.parametrize("by", ["Process", "Pool", "ProcessPoolExecutor"])
def test_forking_worker_pools(server: ExclusiveServer, by: str) -> None:
    global _pool
    context = multiprocessing.get_context("fork")
    with proven(server, 2) as _pool:
        use(_pool)
        if by == "Pool":
            with context.Pool(4) as workers:
                done = workers.map(_work, range(200), chunksize=5)
        elif by == "ProcessPoolExecutor":
            with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as executor:
                done = list(executor.map(_work, range(200), chunksize=5))
        else:
            queue = context.SimpleQueue()
            processes = [context.Process(target=lambda at=at: queue.put(_work(at))) for at in range(12)]
            for process in processes:
                process.start()
            done = [queue.get() for _ in processes]
            for process in processes:
                process.join()
                assert process.exitcode == 0
        assert os.getpid() not in {pid for pid, _ in done}
        assert {number for _, number in done} <= {1, 2}


# ---- close() -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closer", ["parent", "child"])
def test_close_wakes_every_waiter_of_every_process(server: ExclusiveServer, family: Family, closer: str) -> None:
    release = family.latch()

    def wait() -> list[str]:
        ends: list[str] = []

        def one() -> None:
            begun = time.monotonic()
            try:
                pool.get(timeout=30)
            except PoolError as error:
                ends.append(f"{type(error).__name__} {'late' if time.monotonic() - begun > 25 else 'at once'}")

        threads = [threading.Thread(target=one) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(PoolClosed):
            pool.get()
        with pytest.raises(PoolClosed):
            pool.try_get()
        assert pool.closed
        assert not [what for what in descriptors().values() if "shmpool-" in what]
        return ends

    with proven(server, 1, every_slot=False) as pool:
        lease = pool.get()
        waiters = [family.fork(wait) for _ in range(3)]
        until(lambda: len(pool._snapshot()["waiters"]) == 9, "nine waiters")
        begun = time.monotonic()
        assert (pool.close() if closer == "parent" else family.fork(pool.close).result()) == 1
        for waiter in waiters:
            assert waiter.result() == ["PoolClosed at once"] * 3
        print(f"all told after {(time.monotonic() - begun) * 1e3:.1f} ms")
        exclusive_use(lease.socket, "parent:1")  # it stays with its holder
        lease.release()
        release.set()


def test_a_survivor_lets_go_of_a_closed_pool_at_its_next_touch(server: ExclusiveServer, family: Family) -> None:
    ready_to_close, closed = family.latch(), family.latch()

    def survive() -> set[str]:
        lease_every_slot(pool)
        lease = pool.get()
        ready_to_close.set()
        closed.wait()
        exclusive_use(lease.socket, "survivor:1")
        lease.release()
        with pytest.raises(PoolClosed):
            pool.get()
        return {what for what in descriptors().values() if what.startswith(("socket:", "/dev/shm"))}

    others = set(descriptors().values())
    with proven(server, 3, every_slot=False) as pool:
        survivor = family.fork(survive)
        ready_to_close.wait()
        assert pool.close() == 1
        closed.set()
        assert survivor.result() <= others


def test_nobody_left_waits_for_a_holder_that_dies_during_close(server: ExclusiveServer, family: Family) -> None:
    held, end = family.latch(), family.latch()

    def hold() -> None:
        lease = pool.get()
        held.set()
        signal.pause()
        del lease

    with proven(server, 1, every_slot=False) as pool:
        family.fork(end.wait)  # an idle member, which keeps its copies of the mailboxes
        holder = family.fork(hold)
        held.wait()
        result: list[int] = []
        closer = threading.Thread(target=lambda: result.append(pool.close(timeout=8)))
        begun = time.monotonic()
        closer.start()
        until(lambda: pool.closed, "the close")
        holder.kill()
        closer.join()
        took = time.monotonic() - begun
        print(f"close() took {took * 1e3:.1f} ms")
        until(lambda: server.stats()["open"] == 0, "the dead holder's connection ends", 2)
        end.set()
        assert result == [0]
        assert took < 2


# ---- descriptors ---------------------------------------------------------------------------------------------------


def test_descriptors_of_a_child_and_of_its_parent(server: ExclusiveServer, family: Family) -> None:
    """What a process needs, it has when it has met each connection once: then nothing grows, here or in the parent."""
    with proven(server, 3) as pool:

        def child() -> list[int]:
            begun = len(descriptors())
            lease_every_slot(pool)
            met_all = len(descriptors())
            for _ in range(200):
                lease_every_slot(pool)
                with pool.get() as lease:
                    lease.discard()
            lease_every_slot(pool)
            return [met_all - begun, len(descriptors()) - met_all]

        lease_every_slot(pool)
        before = len(descriptors())
        for at in range(60):
            started = family.fork(child if at < 3 else use, *(() if at < 3 else (pool,)))
            grown = started.result()
            family.forget(started)
            if at < 3:
                assert grown[0] <= 2 + 3  # its seat, a spare, a copy of each connection
                assert grown[1] <= 0
        lease_every_slot(pool)
        assert len(descriptors()) == before


@pytest.mark.parametrize("reused", [False, True])
def test_a_child_whose_descriptors_were_closed_is_refused(
    server: ExclusiveServer, family: Family, tmp_path: Path, reused: bool
) -> None:
    """A daemonized child has closed everything, and its numbers name other files now. It must not register in those: it
    would be alive for nobody, and lose its lease to the first who looks."""

    def daemonize() -> str:
        log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
        for at, what in descriptors().items():
            if what.startswith(("socket:", "/dev/shm")):
                os.dup2(log, at) if reused else os.close(at)
        try:
            lease = pool.get(timeout=1)
        except (PoolError, OSError) as error:
            return type(error).__name__
        lease.release()
        return "leased"

    with proven(server, 2) as pool:
        use(pool)
        assert family.fork(daemonize).result() != "leased"
        use(pool)


def test_a_process_without_descriptors_does_not_break_the_cap(server: ExclusiveServer, family: Family) -> None:
    """It cannot take a copy of a connection. That is no reason to forget the connection, which others have open."""
    met, end = family.latch(), family.latch()

    def meet() -> None:
        use(pool)
        met.set()
        end.wait()

    def starve() -> str:
        starving(spare=1)
        try:
            pool.get(timeout=0.2).release()
        except (OSError, PoolError) as error:
            return type(error).__name__
        return "leased"

    with proven(server, 1) as pool:
        family.fork(meet)
        met.wait()
        assert family.fork(starve).result() != "leased"
        use(pool)  # proven() compares what the server saw with the cap
        end.set()


def starving(spare: int) -> None:
    """Leave this process `spare` free descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(0))
    for descriptor in taken[len(taken) - spare :]:
        os.close(descriptor)
